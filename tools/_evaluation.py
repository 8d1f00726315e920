"""Explains detections by several methods and measures their maps."""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import nn

from _common import ToolError
from _dataset import DetectorOnDataset
from _peers import MMYOLO_DEMO, PEERS, mmyolo_demo
from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.attribution.blackbox import final_scores, vector_similarities
from mmyolo_vis_hooks.checks import count
from mmyolo_vis_hooks.data.alignment import (
    network_input,
)
from mmyolo_vis_hooks.data.detections import detections_of
from mmyolo_vis_hooks.data.pictures import network_picture
from mmyolo_vis_hooks.diagnosis.matching import match
from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.metrics.baselines import BASELINES
from mmyolo_vis_hooks.metrics.faithfulness import Score
from mmyolo_vis_hooks.metrics.metric import Metric, Subject
from mmyolo_vis_hooks.metrics.search import greedy_cells, ridge_cells
from mmyolo_vis_hooks.network.graph import instances_of, prediction_of
from mmyolo_vis_hooks.network.state import frozen
from mmyolo_vis_hooks.options import BoxAMOptions
from mmyolo_vis_hooks.records import Look
from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel
from mmyolo_vis_hooks.render.boxes import class_name
from mmyolo_vis_hooks.subjects import subjects_with_objects

logger = logging.getLogger("mmyolo_vis_hooks")

REFERENCES: dict[str, Callable[..., tuple[np.ndarray, int]]] = {
    "search": greedy_cells,
    "ridge": ridge_cells,
}
"""Not explanations that a hook could draw."""


@dataclass(frozen=True)
class Explained:
    """A detection with its maps over the network's input, ``(H, W)`` each by name.

    ``costs`` are the milliseconds and forwards that a map took.
    """

    subject: Subject
    label: int
    title: str
    maps: dict[str, np.ndarray]
    costs: dict[str, dict[str, float]]

    @property
    def size(self) -> float:
        """Square root of the area of the box, pixels of the network's input."""
        x1, y1, x2, y2 = self.subject.box_xyxy
        return float(np.sqrt(max(0.0, (x2 - x1) * (y2 - y1))))


class _Chosen(BoxAttributor):
    """Explains what it is told to."""

    chosen: list[int]

    def choose(self, predictions: InstanceData) -> list[int]:
        return self.chosen


class Evaluation(DetectorOnDataset):
    """A detector, the images of a data set, and the methods that explain them.

    Args:
        config (Config): Of the detector and its data set.
        checkpoint (str): Its weights.
        methods (Sequence[str]): Each as of :func:`read_method`, whose name is a
            method's, a peer's or one of ``REFERENCES``.
        split, device, score_thr, per_image, score: As on the command line.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: str,
        methods: list[str],
        *,
        split: str,
        device: str,
        score_thr: float,
        per_image: int,
        score: str = "iou",
    ) -> None:
        super().__init__(config, checkpoint, split=split, device=device)
        of = type(self.detector).__module__.split(".")[0]
        if any(read_method(m)[0] == MMYOLO_DEMO for m in methods) and of != "mmyolo":
            raise ToolError(f"--methods {MMYOLO_DEMO} is for MMYOLO's detectors only")
        self._score_thr, self._per_image = score_thr, per_image
        self._methods: dict[str, _Chosen | None] = {}
        self._references: dict[str, Callable[..., tuple[np.ndarray, int]]] = {}
        for name in methods:
            self._methods[name] = None
            own, options = read_method(name)
            if own in REFERENCES:
                self._references[name] = partial(REFERENCES[own], **options)
            elif own != MMYOLO_DEMO:
                explain = PEERS.get(own) or dict(options, method=own)
                own_options = BoxAMOptions(**explain)
                self._methods[name] = _Chosen(self.detector, own_options, logger=logger)
        self._score = score
        self._anchors: _Chosen | None = None
        if score == "own":
            look_at_none = BoxAMOptions(method="drise")
            self._anchors = _Chosen(self.detector, look_at_none, logger=logger)

    def on_unproven(self, reason: str) -> None:
        """End: what would be measured is not true."""
        raise ToolError(f"maps cannot be measured: {reason}")

    def find(self, name: str) -> tuple[Look, list[int]]:
        """The forward of an image, and which of its detections are looked at.

        They are the best that hit an object.
        """
        inputs, metainfo = network_input(self.detector, self.placed(name).packed())
        with torch.no_grad():
            (output,) = prediction_of(self.detector, inputs, metainfo)()
        predictions = instances_of(output, self.detector)
        found = detections_of(predictions)
        hits = [
            hit.detection
            for hit in match(found, self.truths[name]).hits
            if found.scores[hit.detection] > self._score_thr
        ]
        return Look(inputs, metainfo, predictions), hits[: self._per_image]

    def explain(self, name: str) -> tuple[np.ndarray, list[Explained]]:
        """The network's input as an RGB picture, and its detections with their maps."""
        look, chosen = self.find(name)
        inputs, metainfo = look.inputs, look.metainfo
        picture, _ = network_picture(inputs[0], self.detector.data_preprocessor)
        if not chosen:
            return picture, []
        found = detections_of(look.predictions)
        image = self.images[name]
        instances = image.info["instances"]
        explained = []
        score = self._score_of(look, chosen)
        subjects = subjects_with_objects(
            self.detector, look, chosen, instances, score=score
        )
        for index, subject in zip(chosen, subjects):
            label = int(found.labels[index])
            title = f"{class_name(label, self.names)} {found.scores[index]:.2f}"
            explained.append(Explained(subject, label, title, {}, {}))
        for method in self._methods:
            self._add_maps(method, inputs, metainfo, chosen, explained)
        height, width = inputs.shape[-2:]
        for own in explained:
            for baseline, make in BASELINES.items():
                drawn = make(own.subject, (height, width))
                if drawn is not None:
                    own.maps[baseline] = drawn
        return picture, explained

    def _score_of(self, look: Look, chosen: list[int]) -> Score | None:
        """What scores detections, where that is not the product of IoU and score."""
        if self._score == "cosine":
            own = self.detector, look.predictions, chosen, look.metainfo
            return final_scores(*own, vector_similarities)
        if self._anchors is None:
            return None
        self._anchors.chosen = chosen
        try:
            with frozen(self.detector):
                _, _, scorer = self._anchors.anchored(look.inputs, look.metainfo)
        except VisError as error:
            raise ToolError(f"--score own: {error}; use --score iou") from error
        return scorer.scores if scorer is not None else None

    def _add_maps(
        self,
        name: str,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        chosen: list[int],
        explained: list[Explained],
    ) -> None:
        network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
        attributor = self._methods[name]
        if attributor is None:
            for own in explained:
                start = time.perf_counter()
                if name in self._references:
                    try_regions = self._references[name]
                    own.maps[name], forwards = try_regions(own.subject, network_hw)
                else:
                    box, forwards = own.subject.box_xyxy, 1
                    own.maps[name] = mmyolo_demo(
                        self.detector, inputs, metainfo, box, own.label
                    )
                spent = (time.perf_counter() - start) * 1e3
                own.costs[name] = dict(ms=spent, forwards=forwards)
            return
        attributor.chosen = chosen
        start = time.perf_counter()
        with _counted(self.detector) as count:
            _, explanations = attributor.explain(inputs, metainfo)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        spent = (time.perf_counter() - start) * 1e3
        box_map = BoxAMPanel(attributor.options).box_map
        whole = FrameTransform.identity(network_hw)
        for own, explanation in zip(explained, explanations, strict=True):
            own.maps[name] = box_map(explanation, whole, own.subject.box_xyxy)
            own.costs[name] = dict(
                ms=spent / len(chosen), forwards=count() / len(chosen)
            )


def measure(explained: Explained, metrics: list[Metric]) -> dict[str, dict[str, Any]]:
    """Numbers, and curves as lists, of each map by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, saliency in explained.maps.items():
        values: dict[str, Any] = dict(explained.costs.get(name, {}))
        for metric in metrics:
            own = metric.update(saliency, explained.subject)
            values |= {key: np.asarray(v).round(5).tolist() for key, v in own.items()}
        found[name] = values
    return found


def read_method(written: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME``, or of ``NAME:option=value,...``."""
    name, _, words = written.partition(":")
    known = {field.name for field in fields(BoxAMOptions)} - {"method"}
    if name in PEERS or name == MMYOLO_DEMO:
        known = set()
    elif name in REFERENCES:
        parameters = inspect.signature(REFERENCES[name]).parameters.values()
        known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    options: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            remedy = ", ".join(sorted(known)) or "it takes none"
            raise ToolError(
                f"--methods {written}: {word!r} is no option of {name}; write "
                f"{name}:option=value,option=value, with of its options: {remedy}"
            )
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    if name in REFERENCES:
        for key, value in options.items():
            least = 1 if key == "at_once" else 2
            check_count = count(f"use a whole number from {least} on", least=least)
            check_count(f"--methods {written}: {key}", value)
    return name, options


@contextlib.contextmanager
def _counted(detector: nn.Module) -> Iterator[Callable[[], int]]:
    """Count images that pass the backbone; a backward through it counts as two."""
    total = 0

    def count(size: int) -> None:
        nonlocal total
        total += size

    def begin(module: nn.Module, args: Any) -> None:
        count(len(args[0]))
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: count(2 * len(gradient)))

    # Replays call its children with other images than it was called with itself.
    backbone = getattr(detector, "backbone", detector)
    first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    handle = first.register_forward_pre_hook(begin)
    try:
        yield lambda: total
    finally:
        handle.remove()
