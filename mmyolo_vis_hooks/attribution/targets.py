"""The registry of targets: which number of a detection is explained.

A target is a function with a decorator that gives one differentiable number per box:

    @register_target('area', summary='the area of the box, square pixels')
    def area(boxes):
        x1, y1, x2, y2 = boxes.boxes_xyxy.unbind(dim=1)
        return (x2 - x1) * (y2 - y1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from ..data.detections import upright
from ..declare import register_once
from ..errors import VisConfigError, VisError
from ..network.graph import PredictionGraph
from ..network.nested import OutputKey
from .anchors import Anchor, RawEntries, locate_anchors

BOX_SIDES = ("x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class ChosenBoxes:
    """The K detections of an image that are explained; everything has a graph."""

    graph: PredictionGraph
    indices: list[int]
    detector: str  # name of its class, for messages

    @property
    def scores(self) -> torch.Tensor:
        """``(K,)``, the final scores."""
        return self.graph.predictions.scores[self.indices]

    @property
    def boxes_xyxy(self) -> torch.Tensor:
        """``(K, 4)``, the final boxes in pixels of the original image, upright."""
        boxes = upright(self.graph.predictions.bboxes)[self.indices]
        if not boxes.requires_grad:
            raise VisError(
                f"the boxes of {self.detector} carry no gradients; use target='score'"
            )
        return boxes

    @cached_property
    def labels(self) -> list[int]:
        """Their classes."""
        return self.graph.predictions.labels[self.indices].tolist()

    @cached_property
    def anchors(self) -> list[Anchor]:
        """Where the head decided their scores."""
        if not self.graph.head_outputs:
            raise VisConfigError(
                "the place of a box in the raw outputs is known for detectors with a "
                f"module called 'bbox_head', and {self.detector} has none; use "
                "target='score' and a gradient method"
            )
        return locate_anchors(self.scores, self.labels, self.graph)

    @property
    def mask_logits(self) -> torch.Tensor:
        """``(K, h, w)``, raw scores of their masks, on the image or each on its box."""
        final = self.graph.predictions
        if "masks" not in final:
            raise VisConfigError(
                f"target='mask' cannot work with {self.detector}, which predicts no "
                "masks; use 'score' or another target"
            )
        for logits in reversed(self.graph.squashed):
            if logits.shape[1:] == final.masks.shape:
                return logits[0, self.indices]
            if len(logits) == len(final.masks):
                one_for_all = logits.shape[1] == 1
                labels = [0] * len(self.labels) if one_for_all else self.labels
                return logits[self.indices, labels]
        raise VisError(
            f"the raw scores of the masks of {self.detector} cannot be found; use "
            "target='score'"
        )

    def logits(self, labels: Sequence[int] | None = None) -> torch.Tensor:
        """``(K,)``, raw scores at the anchors: of the boxes' classes, or of others."""
        wanted = self.labels if labels is None else labels
        return self.raw_means(list(map(class_logits, self.anchors, wanted)))

    def raw_means(self, places: Sequence[list[RawPlace]]) -> torch.Tensor:
        """``(K,)``, means of raw outputs at places; 0 where a box has none."""
        raw = self.graph.head_outputs
        means = []
        for of_box in places:
            own = [raw[key][place] for key, place in of_box]
            means.append(torch.stack(own).mean() if own else self.scores.new_zeros(()))
        return torch.stack(means)


RawPlace = tuple[OutputKey, tuple[int, ...]]
"""An element of a raw output."""


@dataclass(frozen=True)
class Target:
    """One number of a detection: ``(K,)`` with a graph for ``ChosenBoxes``.

    It ``compares`` if changes of it mean something to the methods that change what the
    network computes: it must be linear in the raw outputs, or the score. It is
    ``at_anchor`` if the head decides it where it decides the box.
    """

    name: str
    function: Callable[[ChosenBoxes], torch.Tensor]
    summary: str
    compares: bool = False
    at_anchor: bool = True


TARGETS: dict[str, Target] = {}


def register_target(
    name: str, *, summary: str, compares: bool = False, at_anchor: bool = True
) -> Callable:
    """Make a function a target that can be asked for by name.

    Args:
        name (str): As users will write it.
        summary, compares, at_anchor: See :class:`Target`.

    Raises:
        VisConfigError: If the name belongs to another function.
    """

    def register(function: Callable) -> Callable:
        target = Target(name, function, summary, compares, at_anchor)
        register_once(TARGETS, "target", target)
        return function

    return register


@register_target("score", summary="the final score", compares=True)
def score(boxes: ChosenBoxes) -> torch.Tensor:
    return boxes.scores


@register_target("logit", summary="the raw class score at the anchor", compares=True)
def logit(boxes: ChosenBoxes) -> torch.Tensor:
    return boxes.logits()


@register_target(
    "objectness", summary="the raw objectness or centerness there", compares=True
)
def objectness(boxes: ChosenBoxes) -> torch.Tensor:
    places = list(map(objectness_logits, boxes.anchors))
    if not any(places) and any(anchor.entries for anchor in boxes.anchors):
        raise VisConfigError(
            "target='objectness' cannot work: the scores of this detector depend on "
            "class scores only, or it is saturated; use target='score' or 'logit'"
        )
    return boxes.raw_means(places)


def _side(column: int, boxes: ChosenBoxes) -> torch.Tensor:
    return boxes.boxes_xyxy[:, column]


for _column, _name in enumerate(BOX_SIDES):
    register_target(_name, summary=f"the side {_name} of the box, pixels")(
        partial(_side, _column)
    )


@register_target(
    "mask", summary="the mean raw score inside the predicted mask", at_anchor=False
)
def mask(boxes: ChosenBoxes) -> torch.Tensor:
    """Inside is where the mask's probability is above one half."""
    logits = boxes.mask_logits
    inside = logits.detach() > 0
    total = torch.where(inside, logits, 0).sum(dim=(1, 2))
    return total / inside.sum(dim=(1, 2)).clamp(min=1)


def class_logits(anchor: Anchor, label: int | None = None) -> list[RawPlace]:
    """Places of the raw class logits of a detection, one per stage of a cascade.

    Heads give their class scores before everything else. Of those of a softmax, which
    all take part, only the own one raises the score. There may be several anchors in a
    cell, one after the other, with all classes each.

    Args:
        anchor (Anchor): Where the score of the detection was decided.
        label (int, optional): Of another class at the same anchor. Defaults to None,
            the detection's own.
    """
    step = 0 if label is None else label - anchor.label
    logits = []
    for entries in _class_entries(anchor):
        places = entries.places.tolist()
        if len(places) > 1:
            places = entries.places[entries.gradient > 0].tolist()
        if len(places) != 1:
            raise VisError(
                "the class logit of a detection cannot be told from the other raw "
                f"outputs of {entries.key.layer}; use target='score'"
            )
        place, axis = places[0], 1 if entries.is_map else -1
        place[axis] += step
        if not 0 <= place[axis] < entries.shape[axis]:
            raise VisError(f"{entries.key.layer} gives no score for class {label}")
        logits.append((entries.key, tuple(place)))
    return logits


def objectness_logits(anchor: Anchor) -> list[RawPlace]:
    """Places of the raw objectness or centerness of a detection; none if saturated."""
    own = {entries.key for entries in _class_entries(anchor)}
    return [
        (entries.key, tuple(entries.places[0].tolist()))
        for entries in anchor.entries
        if entries.key not in own and len(entries.places) == 1
    ]


def _class_entries(anchor: Anchor) -> Sequence[RawEntries]:
    """Of each call of a head the first raw output that takes part."""
    first: dict[tuple, RawEntries] = {}
    for entries in anchor.entries:
        index = entries.key.output_index
        call = entries.key[:2]
        if index[:1] not in ((), (0,)):
            continue  # the class score of this call is saturated
        if call not in first or index < first[call].key.output_index:
            first[call] = entries
    return list(first.values())
