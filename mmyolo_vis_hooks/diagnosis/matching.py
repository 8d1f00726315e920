"""Which detections hit which objects, and which are false alarms, of which kind.

Detections are matched as COCO's evaluation does at one IoU; the kinds of false alarms
are those of TIDE (Bolya 2020).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..errors import VisConfigError
from ..records import Detections

CONFUSED, BADLY_PLACED, BOTH = "confused", "badly placed", "both"
DUPLICATE, BACKGROUND = "duplicate", "background"
FALSE_KINDS = (CONFUSED, BADLY_PLACED, BOTH, DUPLICATE, BACKGROUND)
BACKGROUND_IOU = 0.1
"""What has at most this IoU with any object lies on background."""


@dataclass(frozen=True)
class GroundTruth:
    """Annotated objects of one image.

    Attributes:
        boxes_xyxy: ``(M, 4)`` float32, pixels of the original image.
        labels: ``(M,)`` int64, indices into the classes.
        ignored: ``(M,)`` bool: crowds and objects that count neither as found nor as
            missed; a detection that lies on one of its class, or of a negative label,
            is no false alarm.
        masks: Outlines of the objects, as COCO writes them or ``(H, W)`` bool, None
            for one without; empty where there are none.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    masks: tuple[Any, ...] = ()

    @classmethod
    def of(cls, given: Any) -> GroundTruth:
        """Read objects as a data set or a user has them.

        Args:
            given (GroundTruth | Sequence[Mapping] | Mapping): ``instances`` of
                MMEngine's data sets (``bbox``, ``bbox_label``, ``ignore_flag``), or a
                mapping with ``boxes_xyxy``, ``labels`` and, if need be, ``ignored``
                and ``masks`` ``(M, H, W)`` bool.

        Raises:
            VisConfigError: If these are no boxes with labels.
        """
        if isinstance(given, cls):
            return given
        try:
            if isinstance(given, Mapping):
                boxes, labels = given["boxes_xyxy"], given["labels"]
                ignored = given.get("ignored", np.zeros(len(labels), bool))
                masks = tuple(given.get("masks", ()))
            else:
                boxes = [instance["bbox"] for instance in given]
                labels = [instance["bbox_label"] for instance in given]
                ignored = [bool(i.get("ignore_flag", 0)) for i in given]
                masks = tuple(i.get("mask") for i in given)
            truth = cls(
                _array(boxes, np.float32).reshape(-1, 4),
                _array(labels, np.int64).reshape(-1),
                _array(ignored, bool).reshape(-1),
                masks,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VisConfigError(
                f"ground_truth={type(given).__name__} cannot be read ({error!r}): give "
                "the instances of a data set, with 'bbox' and 'bbox_label', or a "
                "mapping with 'boxes_xyxy' (M, 4) and 'labels' (M,)"
            ) from error
        if not len(truth.boxes_xyxy) == len(truth.labels) == len(truth.ignored):
            raise VisConfigError(
                f"ground_truth has {len(truth.boxes_xyxy)} boxes, {len(truth.labels)} "
                f"labels and {len(truth.ignored)} marks of ignored objects: give one "
                "of each per object"
            )
        if truth.masks and len(truth.masks) != len(truth):
            raise VisConfigError(
                f"ground_truth has {len(truth.masks)} masks for {len(truth)} objects: "
                "give one for each, or none"
            )
        return truth

    def region(self, index: int, image_hw: tuple[int, int]) -> np.ndarray:
        """Where an object is: its mask ``(H, W)`` bool, else its box ``(4,)`` xyxy."""
        mask: Any = self.masks[index] if self.masks else None
        if mask is None or not len(mask):
            return self.boxes_xyxy[index]
        if isinstance(mask, (np.ndarray, torch.Tensor)):
            return _array(mask, bool)
        if isinstance(mask, list) or isinstance(mask["counts"], list):
            mask = coco_mask.frPyObjects(mask, *image_hw)
        if isinstance(mask, list):  # the polygons of one object
            mask = coco_mask.merge(mask)
        return coco_mask.decode(mask).astype(bool)

    def check(self, num_classes: int) -> None:
        """Refuse what no detection could hit; ``num_classes`` is 0 if unknown.

        Raises:
            VisConfigError: If a box has no area, such as one of x, y, width and height,
                or a label is of no class. Ignored objects may have any.
        """
        real = np.flatnonzero(~self.ignored)
        x1, y1, x2, y2 = self.boxes_xyxy[real].T
        for index in real[~((x2 > x1) & (y2 > y1) & np.isfinite(x2 + y2 - x1 - y1))]:
            box = self.boxes_xyxy[index].tolist()
            raise VisConfigError(
                f"ground_truth: box {index} is {box}: give x1, y1, x2, y2 in pixels, "
                "with x1 < x2 and y1 < y2, or mark the object as ignored"
            )
        labels = self.labels[real]
        for index in real[(labels < 0) | (labels >= (num_classes or np.inf))]:
            known = f" to {num_classes - 1}" if num_classes else ""
            raise VisConfigError(
                f"ground_truth: label {index} is {self.labels[index]}: labels are "
                f"indices of the detector's classes, 0{known or ' and up'}"
            )

    def parts(self) -> tuple[bytes, ...]:
        """All that it holds, for a digest."""
        arrays = self.boxes_xyxy, self.labels, self.ignored
        return (*(array.tobytes() for array in arrays), pickle.dumps(self.masks))

    def __len__(self) -> int:
        return len(self.labels)


def _array(values: Any, dtype: type) -> np.ndarray:
    """Values of NumPy, torch, MMDetection's boxes or lists of numbers."""
    values = getattr(values, "tensor", values)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    array = np.asarray(values)
    if dtype is np.int64 and array.dtype.kind == "f" and (array % 1).any():
        raise ValueError("labels that are no whole numbers")
    return array.astype(dtype)


@dataclass(frozen=True)
class Hit:
    """A detection that found an object.

    Attributes:
        detection: Index of the detection.
        truth: Index of the object.
        iou: Their intersection over union.
    """

    detection: int
    truth: int
    iou: float


@dataclass(frozen=True)
class FalseAlarm:
    """A detection that found no object.

    Attributes:
        detection: Index of the detection.
        kind: One of :data:`FALSE_KINDS`.
        truth: The object that it is confused with, placed badly on, or a duplicate
            of; None for background and for both at once.
        iou: With that object; the greatest with any where there is none.
    """

    detection: int
    kind: str
    truth: int | None
    iou: float


@dataclass(frozen=True)
class Matches:
    """What became of the detections and of the objects of one image.

    Attributes:
        hits: Detections that found an object.
        false_alarms: Detections that found none.
        missed: Indices of objects that no detection found.
        excused: Detections that lie on an ignored object.
    """

    hits: tuple[Hit, ...] = ()
    false_alarms: tuple[FalseAlarm, ...] = ()
    missed: tuple[int, ...] = ()
    excused: tuple[int, ...] = ()
    iou: np.ndarray = field(repr=False, default_factory=lambda: np.zeros((0, 0)))
    """``(N, M)`` IoU of detections and objects."""


def match(
    detections: Detections, truth: GroundTruth, *, iou_thr: float = 0.5
) -> Matches:
    """Match detections with objects, the best score first.

    Args:
        detections (Detections): Those that count, in the frame of the objects.
        truth (GroundTruth): The objects.
        iou_thr (float): A hit has at least this IoU. Defaults to 0.5.
    """
    iou = box_iou(detections.boxes_xyxy, truth.boxes_xyxy)
    same = detections.labels[:, None] == truth.labels[None]
    real = np.flatnonzero(~truth.ignored)
    free = np.where(same[:, real], iou[:, real], 0.0)
    on_ignored = _lies_on(detections, truth, same, iou_thr)
    hits, excused, unmatched = [], [], []
    for k in np.argsort(-detections.scores, kind="stable"):
        best = int(free[k].argmax()) if len(real) else -1
        if best >= 0 and free[k, best] >= iou_thr:
            free[:, best] = 0
            index = int(real[best])
            hits.append(Hit(int(k), index, float(iou[k, index])))
        elif on_ignored[k]:
            excused.append(int(k))
        else:
            unmatched.append(int(k))
    found = {hit.truth for hit in hits}
    false_alarms = tuple(
        _kind_of(k, iou[k, real], same[k, real], real, found, iou_thr)
        for k in unmatched
    )
    missed = tuple(int(j) for j in real if int(j) not in found)
    return Matches(tuple(hits), false_alarms, missed, tuple(excused), iou)


def box_iou(
    boxes_xyxy: np.ndarray, others_xyxy: np.ndarray, crowd: Sequence[bool] | None = None
) -> np.ndarray:
    """``(N, M)`` intersection over union, as COCO computes it; of no numbers 0.

    Args:
        boxes_xyxy (np.ndarray): ``(N, 4)``.
        others_xyxy (np.ndarray): ``(M, 4)``.
        crowd (Sequence[bool], optional): For which of the others the share of the
            first box is computed instead. Defaults to None: for none.
    """
    if not len(boxes_xyxy) or not len(others_xyxy):
        return np.zeros((len(boxes_xyxy), len(others_xyxy)))
    marks = [0] * len(others_xyxy) if crowd is None else [int(c) for c in crowd]
    iou = coco_mask.iou(_xywh(boxes_xyxy), _xywh(others_xyxy), marks)
    return np.nan_to_num(np.asarray(iou))


def _xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes_xyxy, np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _lies_on(
    detections: Detections, truth: GroundTruth, same: np.ndarray, iou_thr: float
) -> np.ndarray:
    """Which detections lie on an ignored object of their class, or of none."""
    ignored = truth.ignored
    share = box_iou(
        detections.boxes_xyxy, truth.boxes_xyxy[ignored], [True] * int(ignored.sum())
    )
    # CrowdHuman labels such regions -1.
    fits = same[:, ignored] | (truth.labels[ignored] < 0)
    return ((share >= iou_thr) & fits).any(axis=1)


def _kind_of(
    k: int,
    iou: np.ndarray,
    same: np.ndarray,
    real: np.ndarray,
    found: set[int],
    iou_thr: float,
) -> FalseAlarm:
    """The kind of a false alarm, in TIDE's order."""
    if not len(iou):
        return FalseAlarm(k, BACKGROUND, None, 0.0)

    def nearest(wanted: np.ndarray) -> tuple[int, float]:
        best = int(np.where(wanted, iou, 0.0).argmax())
        return int(real[best]), float(iou[best]) if wanted[best] else 0.0

    own, own_iou = nearest(same)
    if BACKGROUND_IOU <= own_iou <= iou_thr:
        return FalseAlarm(k, BADLY_PLACED, own, own_iou)
    other, other_iou = nearest(~same)
    if other_iou >= iou_thr:
        return FalseAlarm(k, CONFUSED, other, other_iou)
    taken, taken_iou = nearest(same & np.isin(real, list(found)))
    if taken_iou >= iou_thr:
        return FalseAlarm(k, DUPLICATE, taken, taken_iou)
    if (most := float(iou.max())) <= BACKGROUND_IOU:
        return FalseAlarm(k, BACKGROUND, None, most)
    return FalseAlarm(k, BOTH, None, most)
