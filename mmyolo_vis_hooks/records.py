"""Frozen records that travel between the steps of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData

from .geometry import FrameTransform


@dataclass(frozen=True)
class Activation:
    """One feature map of one image.

    Attributes:
        title: Name for captions, as of ``OutputKey``.
        feature_map: ``(C, h, w)``, on the device and in the dtype of the layer.
    """

    title: str
    feature_map: torch.Tensor


@dataclass(frozen=True)
class Detections:
    """Final detections of one image.

    Attributes:
        boxes_xyxy: ``(N, 4)`` float32, pixels of the frame they are drawn in.
        scores: ``(N,)`` float32 in [0, 1].
        labels: ``(N,)`` int64, indices into the classes.
    """

    boxes_xyxy: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"Detections({len(self)} boxes)"

    def take(self, which: Any) -> Detections:
        """Some of them, by indices or ``(N,)`` bool."""
        return Detections(
            self.boxes_xyxy[which], self.scores[which], self.labels[which]
        )


def name_of(label: int, class_names: Sequence[str]) -> str:
    """Name of a class; of one that has none, its number."""
    known = 0 <= label < len(class_names)
    return class_names[label] if known else f"class {label}"


@dataclass(frozen=True)
class Sample:
    """What is needed to draw one image, but for its maps.

    Attributes:
        image_id: Unique name of the image, safe in file names.
        image_rgb: ``(H, W, 3)`` uint8, RGB; the frame that is drawn on.
        frame: How a pixel of ``image_rgb`` lies in the network's input.
        detections: In pixels of ``image_rgb``.
        note: How ``image_rgb`` was made of an image that is not three 8-bit
            channels, a few words for the caption; empty otherwise.
    """

    image_id: str
    image_rgb: np.ndarray
    frame: FrameTransform
    detections: Detections
    note: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class VisSample(Sample):
    """An image with its feature maps, in the order of the layers and calls."""

    activations: tuple[Activation, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the maps."""
        return tuple(activation.title for activation in self.activations)


@dataclass(frozen=True)
class LayerMap:
    """Where one layer made one detection.

    Attributes:
        layer: Name of the layer for captions.
        saliency: ``(h, w)`` float32, finite, cells over the network frame; negative
            where a method that is signed found what speaks against the detection. It
            is not normalised: its unit is that of the target for methods that
            multiply by gradients.
    """

    layer: str
    saliency: np.ndarray


@dataclass(frozen=True)
class BoxExplanation:
    """What made one detection.

    Attributes:
        index: Which detection of the sample.
        maps: One per layer; empty where no layer has any influence.
        warning: Why the maps are missing or not to be trusted, one sentence.
        cell: Row and column where the head decided the box, in the raw outputs of
            its level; None for boxes of regions and of queries.
        smooth: The method's own smoothing, in units of the square root of the
            box's area.
        points: ``(n, 3)`` float32, where a query of a deformable decoder sampled: x
            and y in pixels of the network's input, and the weight; None of others.
    """

    index: int
    maps: tuple[LayerMap, ...]
    warning: str = ""
    cell: tuple[int, int] | None = None
    smooth: float = 0.0
    points: np.ndarray | None = None

    @property
    def layer(self) -> str:
        """Names of the layers that have a map."""
        return ", ".join(layer_map.layer for layer_map in self.maps)


@dataclass(frozen=True)
class Look:
    """A forward whose detections were explained.

    Attributes:
        inputs: ``(1, C, H, W)``, what the network saw.
        metainfo: Of the data sample that it was given, with ``batch_input_shape``.
        predictions: All final detections, without a graph, in the frame that
            ``metainfo`` asks for, which is the original one but for
            ``alignment='network'`` where nothing leads there.
        in_original: Whether that is the original one, that of annotated objects.
    """

    inputs: torch.Tensor
    metainfo: Mapping[str, Any]
    predictions: InstanceData
    in_original: bool = True


@dataclass(frozen=True)
class BoxSample(Sample):
    """An image with what made some of its detections, the highest score first.

    ``look`` is the forward that found them.
    """

    explanations: tuple[BoxExplanation, ...]
    look: Look | None = field(default=None, kw_only=True, repr=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have a map, each once."""
        maps = (found for explained in self.explanations for found in explained.maps)
        return tuple(dict.fromkeys(layer_map.layer for layer_map in maps))


@dataclass(frozen=True)
class BoxedImage:
    """An image and its boxes, for viewers that draw them by themselves.

    Attributes:
        image_rgb: ``(H, W, 3)`` uint8, RGB, without boxes.
        predictions: In pixels of ``image_rgb``.
        truth: The annotated objects, in the same pixels, with scores of 1; None where
            nothing is known of them.
        class_names: Names of the classes; may be empty.
        layers: Whose maps the picture of the image shows.
    """

    image_rgb: np.ndarray
    predictions: Detections
    truth: Detections | None = None
    class_names: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class VisImage:
    """One finished picture with the name of its image.

    Attributes:
        image_id: Name of the image.
        image_rgb: ``(H, W, 3)`` uint8, RGB: the picture.
        boxed: The image alone, where a backend draws boxes by itself.
    """

    image_id: str
    image_rgb: np.ndarray
    boxed: BoxedImage | None = None


@dataclass(frozen=True)
class OverlayMap:
    """A map that can be laid over an image in any strength, such as on a page.

    Attributes:
        title: Layer, or class and score of a box.
        note: Shape, range or method.
        levels: ``(h, w)`` uint8 over the whole image, 255 the strongest value.
        detection: Which detection of the sample the map is of; None if of none.
    """

    title: str
    note: str
    levels: np.ndarray
    detection: int | None = None
