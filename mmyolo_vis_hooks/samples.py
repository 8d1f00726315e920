"""Makes the records that are drawn: image, frame, maps or explanations, detections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from logging import Logger
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from torch import nn

from .attribution.attribute import BoxAttributor
from .data.alignment import PlacedImage, Placement, network_input
from .data.detections import detections_of
from .data.pictures import network_picture
from .geometry import FrameTransform
from .network.graph import head_modules, prediction_of
from .network.layer_path import resolve_layers
from .network.nested import map_tensors
from .network.recorder import ForwardRecord, LayerRecorder, only_flipped
from .network.settings import other_settings
from .network.state import frozen, is_compiled, preserve_rng_state
from .options import BoxAMOptions, FeatMapOptions
from .records import BoxSample, Detections, Look, VisSample

_SAME_PX = 0.1


class SampleMaker:
    """Turns images into records of feature maps.

    Args:
        detector (nn.Module): The detector, without wrappers.
        layers (Mapping[str, nn.Module]): Path and module of each layer.
        logger (Logger): Told what a user should know.
        channels (Sequence[int], optional): Which channels a picture of the network's
            input shows.
    """

    def __init__(
        self,
        detector: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        logger: Logger,
        channels: Sequence[int] | None = None,
    ) -> None:
        self._recorder = LayerRecorder(detector, layers)
        self._detector = detector
        self._logger = logger
        self._channels = channels
        self._keeps_padding: bool | None = None

    @property
    def recorder(self) -> LayerRecorder:
        """Records what :meth:`from_record` needs of a forward that is not ours.

        Compiled code calls no hooks of its parts, and hooks that come and go let it
        compile anew: of a model under ``torch.compile`` the input alone is recorded.
        """
        if is_compiled(self._detector):
            return LayerRecorder(self._detector, {})
        return self._recorder

    def prepare(self, image: PlacedImage) -> Any:
        """Try before a run, on one image, whether what is asked for can be had.

        Returns:
            A sample to be drawn, or None. Its weights may know nothing yet.

        Raises:
            VisError: If it cannot be had of this detector.
        """
        with _everything_found(self._detector):
            return self.run(image)

    def run(self, image: PlacedImage) -> Any:
        """Run the detector on one image and record it."""
        batch = pseudo_collate([image.packed()])
        with (
            frozen(self._detector),
            torch.no_grad(),  # inside: the block before allows gradients
            self._recorder.record(keep=[0]) as record,
        ):
            outputs = self._detector.test_step(batch)  # type: ignore[operator]
        return self.from_record(image, record, 0, outputs[0])

    def from_record(
        self, image: PlacedImage, record: ForwardRecord, position: int, output: Any
    ) -> Any:
        """Make the sample of one image of a recorded forward.

        Args:
            image (PlacedImage): The image.
            record (ForwardRecord): The forward.
            position (int): Of the image in the batch.
            output (DetDataSample): What the forward found, in the original frame.

        Raises:
            VisError: If the recording failed.
        """
        inputs, metainfo = record.given(position)
        asked = self._asked(image.placement, inputs, metainfo)
        if is_compiled(self._detector):
            record, position = self._again(inputs, metainfo)[0], 0
        if asked is not metainfo:
            output = self._again(inputs, asked)[1]
        activations = record.activations(position)
        image_rgb, note, frame = self._picture(image, inputs, metainfo)
        found = on_picture(detections_of(output), image.placement, asked)
        return VisSample(
            image.image_id, image_rgb, frame, found, activations, note=note
        )

    def _again(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> tuple:
        """Record and output of another forward, without compiled code."""
        with (
            frozen(self._detector),
            torch.no_grad(),
            self._recorder.record(keep=[0]) as record,
        ):
            (output,) = prediction_of(self._detector, inputs, metainfo)()
        return record, output

    def _asked(
        self, placement: Placement, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Metainfo that says where the detector's boxes lie in its input."""
        if placement.alignment == "network" and not leads_there(placement, metainfo):
            return _in_input(metainfo)
        padding = metainfo.get("pad_param")
        if placement.alignment == "resize" or padding is None or not np.any(padding):
            return metainfo
        if self._keeps_padding is None:
            frame = FrameTransform.from_metainfo(metainfo)
            own, in_input = (
                detections_of(self._again(inputs, given)[1]).boxes_xyxy
                for given in (metainfo, _in_input(metainfo))
            )
            if own.shape == in_input.shape:
                # Those that are cut off at the border of the image fit in neither way.
                unpadded, padded = (
                    np.abs(given.boxes_to_network(own) - in_input).max(axis=1)
                    < _SAME_PX
                    for given in (frame, replace(frame, offset_xy=(0.0, 0.0)))
                )
                if padded.any() != unpadded.any():
                    self._keeps_padding = bool(padded.any())
            if self._keeps_padding:
                left, top = frame.offset_xy
                self._logger.warning(
                    f"the boxes of {type(self._detector).__name__} count from the edge "
                    f"of the padding: where they are evaluated, and in pictures of the "
                    f"image, they lie beside the objects, here by {left:g}, {top:g} "
                    "pixels of the network's input; use mmdet.Resize and mmdet.Pad in "
                    "the test pipeline, not mmyolo.LetterResize"
                )
        if self._keeps_padding is not False and placement.alignment == "network":
            return _in_input(metainfo)
        if not self._keeps_padding:
            return metainfo
        return {**metainfo, "pad_param": np.zeros_like(np.asarray(padding))}

    def _picture(
        self, image: PlacedImage, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> tuple[np.ndarray, str, FrameTransform]:
        """What is drawn on, how it was made, and where it lies in the input."""
        network_hw = metainfo["batch_input_shape"]
        if image.placement.alignment == "network":
            image_rgb, note = network_picture(
                inputs[0], self._detector.data_preprocessor, self._channels
            )
            return image_rgb, note, FrameTransform.identity(network_hw)
        assert image.loaded is not None
        image_rgb = image.loaded.image_rgb
        height, width = image_rgb.shape[:2]
        frame = image.placement.frame((height, width), network_hw, metainfo)
        return image_rgb, image.loaded.note, frame


class BoxSampleMaker(SampleMaker):
    """Turns images into records of explained boxes.

    The attributor makes its own forward, with a graph and in full precision, since
    small gradients vanish in half precision: on the Resize-only input, or on the very
    tensor that the loop's own forward received.

    Args:
        detector (nn.Module): The detector, without wrappers.
        attributor (BoxAttributor): Explains the detections.
        logger, channels: As of :class:`SampleMaker`.
    """

    def __init__(
        self,
        detector: nn.Module,
        attributor: BoxAttributor,
        *,
        logger: Logger,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__(detector, {}, logger=logger, channels=channels)
        self._attributor = attributor

    def prepare(self, image: PlacedImage) -> None:
        """Try the attributor alone; maps of all boxes would take too long."""
        inputs, metainfo = network_input(self._detector, image.packed())
        if image.placement.alignment != "resize" and metainfo.get("flip"):
            raise only_flipped()
        with _everything_found(self._detector):
            self._attributor.prepare(inputs, metainfo)

    def run(self, image: PlacedImage) -> BoxSample:
        """Explain one image."""
        with preserve_rng_state():
            inputs, metainfo = network_input(self._detector, image.packed())
        return self._explained(image, inputs, metainfo)

    def from_record(
        self, image: PlacedImage, record: ForwardRecord, position: int, output: Any
    ) -> BoxSample:
        """Explain one image of a recorded forward, of which the input is needed."""
        return self._explained(image, *record.given(position))

    def _explained(
        self, image: PlacedImage, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> BoxSample:
        asked = self._asked(image.placement, inputs, metainfo)
        # Autocast of the loop would round gradients away.
        with torch.autocast(inputs.device.type, enabled=False):
            predictions, explanations = self._attributor.explain(inputs, asked)
        found = on_picture(detections_of(predictions), image.placement, asked)
        image_rgb, note, frame = self._picture(image, inputs, metainfo)
        look = Look(inputs, asked, predictions, in_original=asked is metainfo)
        return BoxSample(
            image.image_id,
            image_rgb,
            frame,
            found,
            explanations,
            note=note,
            look=look,
        )


def leads_there(placement: Placement, metainfo: Mapping[str, Any]) -> bool:
    """Whether boxes in the original frame can be put into that of the input."""
    return placement.proven and "ori_shape" in metainfo


def on_picture(
    detections: Detections, placement: Placement, metainfo: Mapping[str, Any]
) -> Detections:
    """What lies in the original frame, of metainfo, in that of the picture."""
    if placement.alignment != "network" or not len(detections):
        return detections
    frame = FrameTransform.from_metainfo(metainfo)
    boxes = frame.boxes_to_network(detections.boxes_xyxy)
    return Detections(boxes, detections.scores, detections.labels)


def _in_input(metainfo: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metainfo with which a detector leaves boxes in its input."""
    # ``img_shape`` stays, which says how much of the input is image.
    changed = {
        **metainfo,
        "ori_shape": metainfo["batch_input_shape"],
        "scale_factor": (1.0, 1.0),
    }
    for key in ("pad_param", "border"):
        if metainfo.get(key) is not None:
            changed[key] = np.zeros_like(np.asarray(metainfo[key]))
    return changed


def make_sample_maker(
    detector: nn.Module,
    options: BoxAMOptions | FeatMapOptions,
    class_names: Sequence[str],
    logger: Logger,
    *,
    show_progress: bool = False,
) -> SampleMaker:
    """Make what turns images into the records that some options ask for.

    Args:
        detector (nn.Module): The detector, without wrappers.
        options (Options): Those of feature maps, or of explanations.
        class_names (Sequence[str]): Names that ``options.classes`` may use.
        logger (Logger): Told what a user should know.
        show_progress (bool): Show a bar while masks or channels are tried.

    Raises:
        VisError: If the options do not fit the detector or the classes.
    """
    channels = options.image_channels
    if isinstance(options, FeatMapOptions):
        layers = resolve_layers(detector, options.target_layers)
        return SampleMaker(detector, layers, logger=logger, channels=channels)
    attributor = BoxAttributor(
        detector,
        options,
        class_names=class_names,
        logger=logger,
        show_progress=show_progress,
    )
    return BoxSampleMaker(detector, attributor, logger=logger, channels=channels)


@contextlib.contextmanager
def _everything_found(detector: nn.Module) -> Iterator[None]:
    """Let weights that know nothing yet find boxes, a few and quickly."""

    def few(settings: ConfigDict) -> None:
        settings.update(score_thr=0.0, nms_pre=100)
        if "max_per_img" in settings:
            settings.max_per_img = 10

    with contextlib.ExitStack() as stack:
        for head in head_modules(detector).values():
            stack.enter_context(head.register_forward_hook(_moderate))
        stack.enter_context(other_settings(detector, few))
        yield


def _moderate(module: nn.Module, args: Any, output: Any) -> Any:
    """Raw outputs scaled to at most 2, without NaN, still in the graph."""

    def change(index: Any, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        tensor = tensor.nan_to_num()
        return tensor * (2 / tensor.detach().abs().amax().clamp(min=1e-6))

    return map_tensors(output, change)
