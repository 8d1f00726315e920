"""The first picture of a panel: the image with its boxes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..geometry import FrameTransform
from ..records import BoxSample, Detections, VisSample
from .boxes import draw_detections
from .montage import Cell

NO_BREAK = "\u00a0"
MAX_OVERLAY_SIZE = 480
"""Longest side, in pixels, of a map that a page lays over an image."""


def resized_frame(frame: FrameTransform, image_hw: tuple[int, int]) -> FrameTransform:
    """The frame of the same image after it was resized.

    Args:
        frame (FrameTransform): The frame of the image as it is.
        image_hw (tuple): Its new height and width, pixels.
    """
    scale_xy = (
        frame.scale_xy[0] * frame.image_hw[1] / image_hw[1],
        frame.scale_xy[1] * frame.image_hw[0] / image_hw[0],
    )
    return replace(frame, image_hw=image_hw, scale_xy=scale_xy)


def resized_boxes(
    boxes_xyxy: np.ndarray, image_hw: Sequence[int], new_hw: Sequence[int]
) -> np.ndarray:
    """``(N, 4)`` float32: boxes of an image in the pixels of a resized copy."""
    scale = np.array([new_hw[1] / image_hw[1], new_hw[0] / image_hw[0]] * 2, np.float32)
    return boxes_xyxy * scale


def count_boxes(number: int) -> str:
    """'1 box', '2 boxes', 'no boxes'."""
    return f"{number} box" if number == 1 else f"{number or 'no'} boxes"


def cells_text(map_hw: Sequence[int]) -> str:
    """Size of a map for captions, width first as that of an image, on one line."""
    return f"{map_hw[1]} x {map_hw[0]} cells".replace(" ", NO_BREAK)


def overview_cell(
    sample: VisSample | BoxSample,
    picture_rgb: np.ndarray,
    *,
    score_thr: float,
    class_names: Sequence[str] | None,
    palette: Sequence[Sequence[int]] | None,
    explained: Collection[int] | None = None,
    numbers: Mapping[int, int] | None = None,
) -> Cell:
    """Draw the boxes of an image and say in the caption what is shown.

    Args:
        sample (VisSample | BoxSample): The image and its detections.
        picture_rgb (np.ndarray): The image at the size of the drawing.
        score_thr (float): Boxes with a higher score are drawn; 1 draws none.
        class_names (Sequence[str], optional): Names of the classes.
        palette (Sequence, optional): RGB of the classes.
        explained (Collection[int], optional): Indices of the detections that are
            explained; the others are drawn faintly. Defaults to None, all alike.
        numbers (Mapping[int, int], optional): Numbers for labels, by the index of the
            detection. Defaults to None.
    """
    found, image_hw = sample.detections, sample.image_rgb.shape[:2]
    indices = np.flatnonzero(found.scores > score_thr)
    boxes = resized_boxes(found.boxes_xyxy[indices], image_hw, picture_rgb.shape[:2])
    faint = {
        place
        for place, index in enumerate(indices.tolist())
        if explained is not None and index not in explained
    }
    drawn = draw_detections(
        picture_rgb,
        Detections(boxes, found.scores[indices], found.labels[indices]),
        class_names=class_names,
        palette=palette,
        numbers={
            place: numbers[index]
            for place, index in enumerate(indices.tolist())
            if numbers and index in numbers
        },
        faint=faint,
    )
    notes = [f"{image_hw[1]} x {image_hw[0]} px", sample.note]
    if score_thr < 1:
        notes.append(f"{count_boxes(len(indices))} with score > {score_thr:g}")
    if explained is not None and score_thr == 1:
        notes.append(f"{count_boxes(len(explained))} explained")
    elif explained or (explained is not None and len(indices)):
        others = ", the others thin" if explained and faint else ""
        notes.append(f"{len(explained) or 'none'} explained{others}")
    return Cell(drawn, sample.image_id, joined(notes))


def joined(notes: Sequence[str]) -> str:
    """The notes of a caption in one line; empty ones are left out."""
    return " · ".join(note for note in notes if note)
