"""Makes the record of explained boxes that an explainer draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from torch import nn

from .attribution.attribute import BoxMapper
from .data.pipeline import network_divisor, prepare_data
from .data.selector import SelectedImage
from .network.graph import head_modules
from .network.nested import map_tensors
from .network.recorder import ForwardRecord
from .network.state import preserve_rng_state
from .records import BoxSample
from .samples import SampleMaker, slot_of

# Detectors with 900 queries choose them among as many cells.
_TRIAL_STRIDE = 32
_TRIAL_CELLS = 8


class BoxSampleMaker(SampleMaker):
    """Turns images into records of explained boxes.

    The mapper makes its own forward, with a graph and in full precision, since small
    gradients vanish in half precision. The way of alignment says on which input: the
    Resize-only one, or the very tensor that the loop's own forward received.

    Args:
        detector (nn.Module): The detector, without wrappers.
        mapper (BoxMapper): Explains the detections.
        alignment (str): ``'network'`` draws on the network's own input, the other
            ways on the original image.
        backend_args (dict, optional): File backend that images are read with.
    """

    def __init__(
        self,
        detector: nn.Module,
        mapper: BoxMapper,
        *,
        alignment: str,
        backend_args: dict | None = None,
    ) -> None:
        super().__init__(detector, {}, alignment=alignment, backend_args=backend_args)
        self._mapper = mapper

    def run(  # type: ignore[override]
        self, image: SelectedImage, pipeline: Callable, *, fp16: bool = False
    ) -> BoxSample:
        """Explain one image.

        Args:
            image (SelectedImage): The image and the dataset that loads it.
            pipeline (Callable): Test pipeline to load it through.
            fp16 (bool): Not looked at: gradients are taken in full precision.
        """
        data = prepare_data(image.dataset, image.index, pipeline)
        return self.run_data(image, data, fp16=fp16)

    def run_data(  # type: ignore[override]
        self, image: SelectedImage, data: dict[str, Any], *, fp16: bool = False
    ) -> BoxSample:
        """Explain what a test pipeline gave for an image.

        Args:
            image (SelectedImage): The image.
            data (dict): ``inputs`` and ``data_samples``.
            fp16 (bool): Not looked at: gradients are taken in full precision.
        """
        with torch.no_grad(), preserve_rng_state():
            batch = self._detector.data_preprocessor(  # type: ignore[operator]
                pseudo_collate([data]), False
            )
        metainfo = batch["data_samples"][0].metainfo
        return self._explained(image, batch["inputs"], metainfo)

    def from_record(  # type: ignore[override]
        self, image: SelectedImage, record: ForwardRecord, position: int, output: Any
    ) -> BoxSample:
        """Explain one image of a recorded forward.

        Args:
            image (SelectedImage): The image.
            record (ForwardRecord): The forward; only its input is needed.
            position (int): Position of the image in the batch.
            output (DetDataSample): What the forward found.

        Raises:
            VisError: If the recording failed or the image cannot be loaded.
        """
        slot = slot_of(record, image, position)
        inputs = record.inputs[slot : slot + 1]  # type: ignore[index]
        return self._explained(image, inputs, record.metainfos[slot])

    def prepare(self) -> None:
        """Try the mapper on noise, so that what cannot work fails before the run.

        Raises:
            VisError: With the reason.
        """
        with torch.no_grad(), preserve_rng_state():
            parameter = next(self._detector.parameters())
            size = _TRIAL_CELLS * max(_TRIAL_STRIDE, network_divisor(self._detector))
            inputs = torch.randn(
                1, 3, size, size, device=parameter.device, dtype=parameter.dtype
            )
        metainfo = dict(
            img_id=0,
            img_path="",
            ori_shape=(size, size),
            img_shape=(size, size),
            pad_shape=(size, size),
            batch_input_shape=(size, size),
            scale_factor=(1.0, 1.0),
        )
        with _everything_found(self._detector):
            self._mapper.prepare(inputs, metainfo)

    def _explained(
        self, image: SelectedImage, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> BoxSample:
        network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
        metainfo = {"batch_input_shape": network_hw, **metainfo}
        # Autocast of the loop would round gradients away.
        with torch.autocast(inputs.device.type, enabled=False):
            predictions, explanations = self._mapper.explain(inputs, metainfo)
        output = DetDataSample()
        output.pred_instances = predictions
        image_rgb, frame, detections = self.picture(image, inputs[0], metainfo, output)
        return BoxSample(image.image_id, image_rgb, frame, detections, explanations)


@contextlib.contextmanager
def _everything_found(detector: nn.Module) -> Iterator[None]:
    """Let weights that know nothing find boxes, a few and quickly.

    They may give logits of any size, and scores without a gradient; before a
    checkpoint is loaded that says nothing about the detector.
    """
    changed = []
    handles = []
    try:
        for head in head_modules(detector).values():
            handles.append(
                head.register_forward_hook(lambda module, args, out: _moderate(out))
            )
        for module in detector.modules():
            config = getattr(module, "test_cfg", None)
            for part in (config, (config or {}).get("rcnn")):
                if isinstance(part, dict) and "score_thr" in part:
                    changed.append((part, dict(part)))
                    part["score_thr"] = 0.0
                    if "nms_pre" in part:
                        part["nms_pre"] = 100
                    if "max_per_img" in part:
                        part["max_per_img"] = 10
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part, values in reversed(changed):
            part.update(values)


def _moderate(output: Any) -> Any:
    """Raw outputs scaled to at most 2, without NaN, still in the graph."""

    def change(index: Any, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        tensor = tensor.nan_to_num()
        return tensor * (2 / tensor.detach().abs().amax().clamp(min=1e-6))

    return map_tensors(output, change)
