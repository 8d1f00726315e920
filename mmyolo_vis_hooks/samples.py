"""Makes the records that are drawn: image, frame, maps or explanations, detections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from mmengine.runner.amp import autocast
from torch import nn

from .attribution.attribute import BoxAttributor
from .data.alignment import Placement, network_input, packed_frame
from .data.pictures import network_picture
from .data.pipeline import Loaded
from .data.samples import detections_of
from .errors import VisError
from .geometry import FrameTransform
from .network.graph import head_modules
from .network.nested import map_tensors
from .network.recorder import ForwardRecord, LayerRecorder
from .network.state import frozen, preserve_rng_state
from .records import BoxSample, Detections, VisSample


class SampleMaker:
    """Turns images into records of feature maps.

    Args:
        detector (nn.Module): The detector, without wrappers.
        layers (Mapping[str, nn.Module]): Path and module of each layer.
        channels (Sequence[int], optional): Which channels a picture of the network's
            input shows.
    """

    def __init__(
        self,
        detector: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        channels: Sequence[int] | None = None,
    ) -> None:
        self.recorder = LayerRecorder(detector, layers)
        self._detector = detector
        self._channels = channels

    def prepare(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> None:
        """Try on an image what can be tried before a run.

        Args:
            inputs (Tensor): ``(1, C, H, W)``, as the data preprocessor gives it.
            metainfo (Mapping): Of its data sample.

        Raises:
            VisError: If what is asked for cannot be had of this detector.
        """

    def run(
        self, image_id: str, loaded: Loaded, placement: Placement, *, fp16: bool = False
    ) -> Any:
        """Run the detector on one image and record it.

        Args:
            image_id (str): Name of the image.
            loaded (Loaded): The image.
            placement (Placement): How it is drawn, and what it goes through.
            fp16 (bool): Run under autocast.
        """
        data = placement.pipeline.pack(loaded)
        with (
            frozen(self._detector, parameters=False),
            torch.no_grad(),  # inside: the block before allows gradients
            autocast(enabled=fp16),
            self.recorder.record(keep=[0]) as record,
        ):
            outputs = self._detector.test_step(  # type: ignore[operator]
                pseudo_collate([data])
            )
        return self.from_record(image_id, loaded, placement, record, 0, outputs[0])

    def from_record(
        self,
        image_id: str,
        loaded: Loaded | None,
        placement: Placement,
        record: ForwardRecord,
        position: int,
        output: Any,
    ) -> Any:
        """Make the sample of one image of a recorded forward.

        Args:
            image_id (str): Name of the image.
            loaded (Loaded, optional): The image; ``'network'`` does not need it.
            placement (Placement): How it is drawn.
            record (ForwardRecord): The forward.
            position (int): Position of the image in the batch.
            output (DetDataSample): What the forward found, in the original frame.

        Raises:
            VisError: If the recording failed.
        """
        slot = _slot_of(record, image_id, position)
        activations = record.activations(slot)
        inputs = record.inputs[slot : slot + 1]  # type: ignore[index]
        metainfo = record.metainfos[slot]
        image_rgb, note, frame = self._picture(loaded, placement, inputs, metainfo)
        if placement.alignment != "network":
            detections = detections_of(output)
        elif _leads_to_network(placement, metainfo):
            detections = _to_network(detections_of(output), inputs, metainfo)
        else:
            detections = self._found_in_network(inputs, metainfo)
        return VisSample(image_id, image_rgb, frame, detections, activations, note=note)

    def _picture(
        self,
        loaded: Loaded | None,
        placement: Placement,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
    ) -> tuple[np.ndarray, str, FrameTransform]:
        """What is drawn on, how it was made, and where it lies in the input."""
        network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
        if placement.alignment == "network":
            image_rgb, note = network_picture(
                inputs[0], self._detector.data_preprocessor, self._channels
            )
            return image_rgb, note, FrameTransform.identity(network_hw)
        if loaded is None:
            raise VisError(f"alignment={placement.alignment!r} needs the loaded image")
        image_hw = (loaded.image_rgb.shape[0], loaded.image_rgb.shape[1])
        frame = placement.frame(image_hw, network_hw, metainfo)
        return loaded.image_rgb, loaded.note, frame

    def _found_in_network(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> Detections:
        """Ask the detector again, for boxes in the frame of its input."""
        sample = DetDataSample(metainfo=_network_metainfo(metainfo, inputs))
        with frozen(self._detector, parameters=False), torch.no_grad():
            (output,) = self._detector(inputs, [sample], mode="predict")
        return detections_of(output)


class BoxSampleMaker(SampleMaker):
    """Turns images into records of explained boxes.

    The mapper makes its own forward, with a graph and in full precision, since small
    gradients vanish in half precision. The way of alignment says on which input: the
    Resize-only one, or the very tensor that the loop's own forward received.

    Args:
        detector (nn.Module): The detector, without wrappers.
        mapper (BoxAttributor): Explains the detections.
        channels (Sequence[int], optional): Which channels a picture of the network's
            input shows.
    """

    def __init__(
        self,
        detector: nn.Module,
        mapper: BoxAttributor,
        *,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__(detector, {}, channels=channels)
        self._mapper = mapper

    def prepare(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> None:
        """Try the mapper, so that what cannot work fails before the run."""
        with _everything_found(self._detector):
            self._mapper.prepare(inputs, metainfo)

    def run(
        self, image_id: str, loaded: Loaded, placement: Placement, *, fp16: bool = False
    ) -> BoxSample:
        """Explain one image; ``fp16`` is not looked at."""
        with preserve_rng_state():
            data = placement.pipeline.pack(loaded)
            inputs, metainfo = network_input(self._detector, data)
        return self._explained(image_id, loaded, placement, inputs, metainfo)

    def from_record(
        self,
        image_id: str,
        loaded: Loaded | None,
        placement: Placement,
        record: ForwardRecord,
        position: int,
        output: Any,
    ) -> BoxSample:
        """Explain one image of a recorded forward, of which the input is needed."""
        slot = _slot_of(record, image_id, position)
        inputs = record.inputs[slot : slot + 1]  # type: ignore[index]
        metainfo = record.metainfos[slot]
        return self._explained(image_id, loaded, placement, inputs, metainfo)

    def _explained(
        self,
        image_id: str,
        loaded: Loaded | None,
        placement: Placement,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
    ) -> BoxSample:
        network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
        metainfo = {"batch_input_shape": network_hw, **metainfo}
        on_network = placement.alignment == "network"
        leads_there = on_network and _leads_to_network(placement, metainfo)
        asked = metainfo
        if on_network and not leads_there:
            asked = _network_metainfo(metainfo, inputs)
        # Autocast of the loop would round gradients away.
        with torch.autocast(inputs.device.type, enabled=False):
            predictions, explanations = self._mapper.explain(inputs, asked)
        detections = detections_of(DetDataSample(pred_instances=predictions))
        if leads_there:
            detections = _to_network(detections, inputs, metainfo)
        image_rgb, note, frame = self._picture(loaded, placement, inputs, metainfo)
        return BoxSample(
            image_id, image_rgb, frame, detections, explanations, note=note
        )


def _slot_of(record: ForwardRecord, image_id: str, position: int) -> int:
    """Where in a recorded forward an image is kept."""
    if record.error is not None:
        raise record.error
    if position not in record.keep or record.inputs is None:
        raise VisError(f"the forward of image {image_id} was not recorded")
    return record.keep.index(position)


def _leads_to_network(placement: Placement, metainfo: Mapping[str, Any]) -> bool:
    return placement.proven and "ori_shape" in metainfo


def _to_network(
    detections: Detections, inputs: torch.Tensor, metainfo: Mapping[str, Any]
) -> Detections:
    if not len(detections):
        return detections
    image_hw = (int(metainfo["ori_shape"][0]), int(metainfo["ori_shape"][1]))
    network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
    frame = packed_frame(image_hw, network_hw, metainfo)
    boxes = frame.boxes_to_network(detections.boxes_xyxy)
    return Detections(boxes, detections.scores, detections.labels)


def _network_metainfo(
    metainfo: Mapping[str, Any], inputs: torch.Tensor
) -> dict[str, Any]:
    """Metainfo with which a detector leaves its boxes in the frame of its input.

    ``img_shape`` stays, which says how much of the input is image.
    """
    network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
    changed = {
        "batch_input_shape": network_hw,
        **metainfo,
        "ori_shape": network_hw,
        "scale_factor": (1.0, 1.0),
    }
    for key in ("pad_param", "border"):
        if metainfo.get(key) is not None:
            changed[key] = np.zeros_like(np.asarray(metainfo[key]))
    return changed


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
