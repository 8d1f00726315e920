"""What the live page shows: images, what is chosen on them, and the picture of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from torch import nn

from _common import ToolError
from _dataset import build_dataset, objects_of
from mmyolo_vis_hooks.data.alignment import (
    PlacedImage,
    Placement,
    first_loaded,
    own_placement,
)
from mmyolo_vis_hooks.data.pipeline import ImagePipeline, Loaded
from mmyolo_vis_hooks.data.selector import ImageSelector, SelectedImage
from mmyolo_vis_hooks.data.sources import ImageSource
from mmyolo_vis_hooks.detector import build_pipeline, read_dataset
from mmyolo_vis_hooks.diagnosis.candidates import FLOOR
from mmyolo_vis_hooks.diagnosis.live import LiveDetector
from mmyolo_vis_hooks.diagnosis.look import Look
from mmyolo_vis_hooks.diagnosis.maps import ErrorMap
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth
from mmyolo_vis_hooks.diagnosis.picture import ROLE_COLORS as COLORS
from mmyolo_vis_hooks.diagnosis.picture import boxes_of, resized_labels
from mmyolo_vis_hooks.diagnosis.place import (
    DETECTED,
    Considered,
    considered,
    considered_at,
    detections_of_candidates,
)
from mmyolo_vis_hooks.diagnosis.report import KINDS as ALL_KINDS
from mmyolo_vis_hooks.diagnosis.report import kind_of
from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.options import BoxAMOptions, DiagnosisOptions
from mmyolo_vis_hooks.render.boxes import LabeledBox, class_name, draw_boxes
from mmyolo_vis_hooks.render.heatmap import fade_heatmap
from mmyolo_vis_hooks.render.montage import cell_size_hw, resize_image
from mmyolo_vis_hooks.render.panel import count_boxes, joined

logger = logging.getLogger("mmyolo_vis_hooks")

DETECTION = (29, 111, 184)
"""Colour of boxes where the objects are not known."""
ANY = "any error"
KINDS = [ANY, *ALL_KINDS]
_LEAST_SIZE, _MOST_SIZE = 800, 1100
_KEPT_LOOKS, _KEPT_MAPS = 32, 64


@dataclass(frozen=True)
class Photo:
    """An image that can be looked at; ``truth`` is None where nobody knows it."""

    name: str
    load: Callable[[], Loaded]
    pipeline: ImagePipeline
    truth: Callable[[], GroundTruth] | None = None


def photos_of_files(
    paths: Sequence[str], config: Config, channels: Sequence[int] | None
) -> list[Photo]:
    """Images of files, folders and addresses, without objects."""
    pipeline = build_pipeline(config, read_dataset(config), channels=channels)
    source = ImageSource(paths)
    if source.has_videos:
        raise ToolError("IMAGES: a video cannot be browsed; give images")

    def photo(number: int, image: Any) -> Photo:
        path = dict(img_id=number, img_path=image.title)
        load = partial(pipeline.load, image.read(), **path)
        return Photo(image.name, load, pipeline)

    return [photo(number, image) for number, image in enumerate(source)]


def photos_of_dataset(
    config: Config, split: str, channels: Sequence[int] | None
) -> tuple[list[Photo], Any]:
    """Images of a config's data set with their objects, and the data set."""
    dataset = build_dataset(config, split, "--dataset")
    pipelines: dict[int, ImagePipeline] = {}

    def photo(image: SelectedImage) -> Photo:
        own = image.dataset
        if id(own) not in pipelines:
            pipelines[id(own)] = ImagePipeline(own.pipeline, channels=channels)
        pipeline = pipelines[id(own)]
        load = partial(image.through, pipeline.load)
        truth = partial(objects_of, image) if "instances" in image.info else None
        return Photo(image.image_id, load, pipeline, truth)

    images = ImageSelector(dataset, -1, None).images
    return [photo(image) for image in images], dataset


class View:
    """One detector on all images; what was looked at last is kept."""

    def __init__(
        self, photos: Sequence[Photo], detector: nn.Module, names: Sequence[str]
    ) -> None:
        self.photos, self.detector, self.names = photos, detector, tuple(names)
        self._live = LiveDetector(detector, names, logger)
        self._placements: dict[int, Placement] = {}
        self.look = functools.lru_cache(_KEPT_LOOKS)(self._look)
        self.map = functools.lru_cache(_KEPT_MAPS)(self._map)

    def _look(self, number: int) -> Look:
        photo = self.photos[number]
        placement = self._placements.get(id(photo.pipeline))
        if placement is None:
            own = [p.load for p in self.photos if p.pipeline is photo.pipeline]
            placement = own_placement(photo.pipeline, first_loaded(own), self.detector)
            self._placements[id(photo.pipeline)] = placement
        truth = photo.truth() if photo.truth is not None else None
        return self._live.look(PlacedImage(photo.name, photo.load(), placement), truth)

    def diagnose(self, number: int, settings: Settings) -> Diagnosis:
        """What is right and wrong in an image, as the controls say."""
        return self.look(number).diagnose(settings.options, settings.nms_iou_thr)

    def _map(self, number: int, candidate: int, options: BoxAMOptions) -> Any:
        return self._live.explain(self.look(number), candidate, options)


@dataclass(frozen=True)
class Spot:
    """What is looked at: an image, and maybe a place on it and candidates there.

    Attributes:
        point_xy: Pixels of the image.
        chosen: Of each view the candidate that is explained.
        kind: Of the errors that are looked for.
        error: How many of them ``next error`` has passed in the image.
    """

    image: int = 0
    point_xy: tuple[float, float] | None = None
    chosen: tuple[int | None, ...] = (None, None)
    kind: str = ""
    error: int = 0


@dataclass(frozen=True)
class Settings:
    """What the controls of the page say; each detector has an NMS of its own."""

    options: DiagnosisOptions
    nms_iou_thr: float | None = None
    label: int | None = None
    method: str = "boxam"
    target: str = "score"
    layer: str | None = None


@dataclass(frozen=True)
class Side:
    """What one view shows of a spot."""

    picture_rgb: np.ndarray
    lines: list[str]
    choices: list[tuple[str, int]] = field(default_factory=list)
    chosen: int | None = None


def clicked(views: Sequence[View], spot: Spot, settings: Settings) -> Spot:
    """Choose in each view the smallest box at the place, or else its best candidate."""
    found = (view.diagnose(spot.image, settings) for view in views)
    return replace(spot, chosen=tuple(_chosen(own, spot, settings) for own in found))


def _chosen(diagnosis: Diagnosis, spot: Spot, settings: Settings) -> int | None:
    assert spot.point_xy is not None
    found = diagnosis.detections
    became = detections_of_candidates(diagnosis.candidates, found)
    boxes: list[tuple[np.ndarray, int, int | None]] = []
    for index, box in enumerate(found.boxes_xyxy):
        own = np.flatnonzero(became == index)
        if len(own):
            boxes.append((box, int(found.labels[index]), int(own[0])))
    for missed in diagnosis.missed:
        label = int(diagnosis.truth.labels[missed.record.truth])
        boxes.append((missed.box_xyxy, label, missed.record.candidate))
    here = [
        (_area(box), candidate)
        for box, label, candidate in boxes
        if _holds(box, spot.point_xy) and settings.label in (None, label)
    ]
    if here:
        return min(here, key=lambda own: own[0])[1]
    others = considered_at(
        spot.point_xy, diagnosis, settings.options, label=settings.label, most=1
    )
    return others[0].candidate if others else None


def errors_of(
    diagnosis: Diagnosis, kind: str
) -> Iterator[tuple[np.ndarray, int | None]]:
    """Boxes of the errors of a kind, with the candidate that each is about."""
    became = detections_of_candidates(diagnosis.candidates, diagnosis.detections)
    for missed in diagnosis.missed:
        if kind in (ANY, kind_of(missed.mechanism, "")):
            yield missed.box_xyxy, missed.record.candidate
    for false in diagnosis.false_positives:
        if kind in (ANY, kind_of("", false.kind)):
            own = np.flatnonzero(became == false.record.detection)
            yield false.box_xyxy, int(own[0]) if len(own) else None


def next_error(
    views: Sequence[View], spot: Spot, settings: Settings, kind: str, numbers: Any
) -> Spot | None:
    """The next error of the first view, in the image or in those that follow.

    Args:
        numbers: Makes an iterator over image numbers, such as a progress bar.
    """
    if spot.kind != kind:
        spot = replace(spot, error=0)
    total = len(views[0].photos)
    order = [(spot.image + step) % total for step in range(total)]
    for number in numbers([*order, spot.image]):
        passed = spot.error if number == spot.image else 0
        errors = list(errors_of(views[0].diagnose(number, settings), kind))
        if passed >= len(errors):
            spot = replace(spot, error=0)
            continue
        box, candidate = errors[passed]
        x1, y1, x2, y2 = map(float, box)
        point = ((x1 + x2) / 2, (y1 + y2) / 2)
        found = clicked(
            views, Spot(number, point, kind=kind, error=passed + 1), settings
        )
        return replace(found, chosen=(candidate, *found.chosen[1:]))
    return None


def side_of(view: View, spot: Spot, settings: Settings, which: int = 0) -> Side:
    """What a view shows of a spot."""
    look, options = view.look(spot.image), settings.options
    diagnosis = view.diagnose(spot.image, settings)
    if spot.point_xy is None:
        return Side(_draw(look, diagnosis, spot), [_summary(look, diagnosis)])
    at = considered_at(spot.point_xy, diagnosis, options, label=settings.label)
    chosen = spot.chosen[which]
    if chosen is not None and chosen not in [own.candidate for own in at]:
        at.insert(0, considered(chosen, diagnosis, options))
    missed = [m for m in diagnosis.missed if _holds(m.box_xyxy, spot.point_xy)]
    lines = [
        f"Missed **{own.class_name}**, {own.mechanism}: {own.why}"
        for own in sorted(missed, key=lambda own: _area(own.box_xyxy))
    ]
    if not at:
        lines.append(f"Nothing here scores above {FLOOR:g}, for any class.")
        return Side(_draw(look, diagnosis, spot), lines)
    own = next((own for own in at if own.candidate == chosen), None)
    saliency = None
    if own is not None:
        lines.append(f"**{_name_of(diagnosis, own.candidate)}**: {own.why}")
        note, saliency = _explained(view, spot, own.candidate, settings)
        lines.append(note)
    choices = [(_choice(diagnosis, own), own.candidate) for own in at]
    picture = _draw(look, diagnosis, spot, own, saliency)
    return Side(picture, lines, choices, chosen)


def _explained(
    view: View, spot: Spot, candidate: int, settings: Settings
) -> tuple[str, np.ndarray | None]:
    method, target = settings.method, settings.target
    try:
        layers = None if settings.layer is None else (settings.layer,)
        boxam = BoxAMOptions(method=method, target=target, target_layers=layers)
        found: ErrorMap | None = view.map(spot.image, candidate, boxam)
    except VisError as error:
        return f"No map: {error}", None
    if found is None:
        return f"No map: by {method} nothing there has any influence on it", None
    made = f"{method} of its {target} at {found.layer}"
    return f"Map: {made}, {found.inside:.0%} of it in the box", found.saliency


def _summary(look: Look, diagnosis: Diagnosis) -> str:
    if look.truth is None:
        return f"**{count_boxes(len(diagnosis.detections))}**"
    hits, missed = len(diagnosis.matches.hits), len(diagnosis.missed)
    false = len(diagnosis.false_positives)
    return f"**{hits} found, {missed} missed, {false} false**"


def _name_of(diagnosis: Diagnosis, candidate: int) -> str:
    known = diagnosis.candidates
    name = class_name(int(known.labels[candidate]), diagnosis.class_names)
    return f"{name} {known.scores[candidate]:.2f}"


def _choice(diagnosis: Diagnosis, own: Considered) -> str:
    alike = f"{own.alike} more like it" if own.alike else ""
    return joined([_name_of(diagnosis, own.candidate), own.why, alike])


def _holds(box_xyxy: np.ndarray, point_xy: tuple[float, float]) -> bool:
    x1, y1, x2, y2 = box_xyxy
    return bool(x1 <= point_xy[0] <= x2 and y1 <= point_xy[1] <= y2)


def _area(box_xyxy: np.ndarray) -> float:
    x1, y1, x2, y2 = map(float, box_xyxy)
    return (x2 - x1) * (y2 - y1)


# The picture.


def drawn_hw(image_hw: tuple[int, int]) -> tuple[int, int]:
    """Size at which an image is shown: labels need room."""
    return cell_size_hw(image_hw, _MOST_SIZE, _LEAST_SIZE)


def _draw(
    look: Look,
    diagnosis: Diagnosis,
    spot: Spot,
    own: Considered | None = None,
    saliency: np.ndarray | None = None,
) -> np.ndarray:
    image_hw = look.image_rgb.shape[:2]
    size_hw = drawn_hw(image_hw)
    picture = resize_image(look.image_rgb, size_hw)
    if saliency is not None:
        picture = fade_heatmap(cv2.resize(saliency, size_hw[::-1]), picture)
    boxes = _boxes(look, diagnosis, spot, own)
    picture = draw_boxes(picture, resized_labels(boxes, image_hw, size_hw))
    if spot.point_xy is not None:
        x, y = spot.point_xy
        x, y = round(x * size_hw[1] / image_hw[1]), round(y * size_hw[0] / image_hw[0])
        for radius, ink in ((9, (0, 0, 0)), (7, COLORS["candidate"])):
            cv2.circle(picture, (x, y), radius, ink, 2, cv2.LINE_AA)
    return picture


def _boxes(
    look: Look, diagnosis: Diagnosis, spot: Spot, own: Considered | None
) -> list[LabeledBox]:
    """All boxes, of which only what the place is about is strong, if there is one."""
    right = COLORS["found"] if look.truth is not None else DETECTION
    boxes, point = boxes_of(diagnosis, right), spot.point_xy
    strong = [
        point is not None and _holds(missed.box_xyxy, point)
        for missed in diagnosis.missed
    ]
    found = range(len(diagnosis.detections))
    strong += [own is not None and i == own.detection for i in found]
    boxes = [
        replace(box, faint=point is not None and not is_strong)
        for box, is_strong in zip(boxes, strong)
    ]
    if own is not None and own.fate != DETECTED:
        xyxy = diagnosis.candidates.boxes_xyxy[own.candidate]
        name = _name_of(diagnosis, own.candidate)
        boxes.insert(0, LabeledBox(xyxy, name, "", COLORS["candidate"]))
    return boxes
