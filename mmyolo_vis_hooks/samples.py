"""Makes the record that an explainer draws: image, frame, maps, detections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner.amp import autocast
from torch import nn

from .data.pipeline import prepare_data
from .data.samples import detections_of, load_image_rgb, network_image_rgb
from .data.selector import SelectedImage
from .errors import VisError
from .geometry import FrameTransform
from .network.recorder import ForwardRecord, LayerRecorder
from .network.state import preserve_model_state
from .records import Detections, VisSample

ALIGNMENTS = ("resize", "letterbox", "network")


class SampleMaker:
    """Turns forwards of a detector into records that can be drawn.

    Args:
        detector (nn.Module): The detector, without wrappers.
        layers (Mapping[str, nn.Module]): Path and module of each layer.
        alignment (str): ``'network'`` draws on the network's own input, the other
            ways on the original image.
        backend_args (dict, optional): File backend that images are read with.
    """

    def __init__(
        self,
        detector: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        alignment: str,
        backend_args: dict | None = None,
    ) -> None:
        self.recorder = LayerRecorder(detector, layers)
        self._detector = detector
        self._alignment = alignment
        self._backend_args = backend_args

    def run(
        self, image: SelectedImage, pipeline: Callable, *, fp16: bool = False
    ) -> VisSample:
        """Run the detector on one image and record it.

        Args:
            image (SelectedImage): The image and the dataset that loads it.
            pipeline (Callable): Test pipeline to load it through.
            fp16 (bool): Run under autocast.
        """
        data = prepare_data(image.dataset, image.index, pipeline)
        return self.run_data(image, data, fp16=fp16)

    def run_data(
        self, image: SelectedImage, data: dict[str, Any], *, fp16: bool = False
    ) -> VisSample:
        """Run the detector on what a test pipeline gave for an image, and record it.

        Args:
            image (SelectedImage): The image.
            data (dict): ``inputs`` and ``data_samples``.
            fp16 (bool): Run under autocast.
        """
        with (
            torch.no_grad(),
            preserve_model_state(self._detector),
            autocast(enabled=fp16),
            self.recorder.record(keep=[0]) as record,
        ):
            outputs = self._detector.test_step(  # type: ignore[operator]
                pseudo_collate([data])
            )
        return self.from_record(image, record, 0, outputs[0])

    def from_record(
        self, image: SelectedImage, record: ForwardRecord, position: int, output: Any
    ) -> VisSample:
        """Make the sample of one image of a recorded forward.

        Args:
            image (SelectedImage): The image.
            record (ForwardRecord): The forward.
            position (int): Position of the image in the batch.
            output (DetDataSample): What the forward found, in the original frame.

        Raises:
            VisError: If the recording failed or the image cannot be loaded.
        """
        slot = slot_of(record, image, position)
        activations = record.activations(slot)
        inputs = record.inputs[slot]  # type: ignore[index]
        image_rgb, frame, detections = self.picture(
            image, inputs, record.metainfos[slot], output
        )
        return VisSample(image.image_id, image_rgb, frame, activations, detections)

    def picture(
        self,
        image: SelectedImage,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        output: Any,
    ) -> tuple[np.ndarray, FrameTransform, Detections]:
        """What is drawn on, and the detections in its pixels.

        Args:
            image (SelectedImage): The image.
            inputs (Tensor): ``(3, H, W)``, the network's input.
            metainfo (Mapping): Of its data sample.
            output (DetDataSample): What was found, in the original frame.

        Returns:
            tuple: ``(H, W, 3)`` uint8 RGB, its frame, and the detections.

        Raises:
            VisError: If the image cannot be loaded or is not what the network saw.
        """
        network_hw = (inputs.shape[-2], inputs.shape[-1])
        metainfo = {"batch_input_shape": network_hw, **metainfo}
        detections = detections_of(output)
        if self._alignment == "network":
            if len(detections):
                to_network = FrameTransform.from_metainfo(metainfo).boxes_to_network
                detections = Detections(
                    to_network(detections.boxes_xyxy),
                    detections.scores,
                    detections.labels,
                )
            image_rgb = network_image_rgb(inputs, self._detector.data_preprocessor)
            return image_rgb, FrameTransform.identity(network_hw), detections
        image_rgb = self._load(image)
        frame = FrameTransform.from_metainfo(metainfo, image_rgb.shape[:2])
        if frame.image_hw != image_rgb.shape[:2]:
            raise VisError(
                f"{image.img_path!r} has {image_rgb.shape[:2]} pixels on disk but "
                f"{frame.image_hw} in the test pipeline; use alignment='network', "
                "which needs no file"
            )
        return image_rgb, frame, detections

    def _load(self, image: SelectedImage) -> np.ndarray:
        if image.image_rgb is not None:
            return image.image_rgb
        if image.img_path is None:
            raise VisError(
                f"the dataset names no file for image {image.image_id}; use "
                "alignment='network', which draws on the network's own input"
            )
        return load_image_rgb(image.img_path, self._backend_args)


def slot_of(record: ForwardRecord, image: SelectedImage, position: int) -> int:
    """Where in a recorded forward an image is kept.

    Args:
        record (ForwardRecord): The forward.
        image (SelectedImage): The image.
        position (int): Position of the image in the batch.

    Raises:
        VisError: If the recording failed or does not hold the image.
    """
    if record.error is not None:
        raise record.error
    if position not in record.keep or record.inputs is None:
        raise VisError(f"the forward of image {image.image_id} was not recorded")
    return record.keep.index(position)
