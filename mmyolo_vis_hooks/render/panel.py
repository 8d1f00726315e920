"""What the panels share: the image with its boxes, and words of captions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..records import Detections, Sample
from .boxes import draw_detections
from .montage import Cell

NO_BREAK = "\u00a0"
MAX_OVERLAY_SIZE = 480
"""Longest side, in pixels, of a map that a page lays over an image."""


@dataclass(frozen=True)
class Panel:
    """Draws a sample.

    Args:
        options: What is drawn and how.
        class_names (Sequence[str]): Names of the classes; may be empty.
        palette (Sequence, optional): RGB of the classes, as in a data set's
            ``dataset_meta``. Defaults to None, colours that are easy to tell
            apart.
        max_cell_size (int): Longest side of a picture in the panel, pixels; a
            small image is enlarged.
    """

    fades: ClassVar[Any] = False

    options: Any
    class_names: Sequence[str] = ()
    palette: Sequence[Sequence[int]] | None = None
    max_cell_size: int = 1024

    @property
    def colormap(self) -> str | int:
        """That of the maps."""
        return self.options.colormap

    def overview(
        self,
        sample: Sample,
        picture_rgb: np.ndarray,
        explained: Collection[int] | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> Cell:
        """Draw the boxes of an image and say in the caption what is shown.

        Args:
            sample (Sample): The image and its detections.
            picture_rgb (np.ndarray): The image at the size of the drawing.
            explained (Collection[int], optional): Indices of the detections that are
                explained; the others are drawn faintly. None: all are alike.
            numbers (Mapping[int, int], optional): As :func:`draw_detections` takes it.
        """
        found, image_hw = sample.detections, sample.image_rgb.shape[:2]
        score_thr = self.options.score_thr
        shown = np.flatnonzero(found.scores > score_thr).tolist()
        faint = set(shown) - set(shown if explained is None else explained)
        boxes = resized_boxes(found.boxes_xyxy, image_hw, picture_rgb.shape[:2])
        drawn = draw_detections(
            picture_rgb,
            Detections(boxes, found.scores, found.labels),
            shown,
            class_names=self.class_names,
            palette=self.palette,
            numbers=numbers,
            faint=faint,
        )
        notes = [f"{image_hw[1]} x {image_hw[0]} px", sample.note]
        if score_thr < 1:
            notes.append(f"{count_boxes(len(shown))} with score > {score_thr:g}")
        if explained is not None and score_thr == 1:
            notes.append(f"{count_boxes(len(explained))} explained")
        elif explained or (explained is not None and shown):
            others = ", the others thin" if explained and faint else ""
            notes.append(f"{len(explained) or 'none'} explained{others}")
        return Cell(drawn, sample.image_id, joined(notes))


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


def joined(notes: Sequence[str]) -> str:
    """The notes of a caption in one line; empty ones are left out."""
    return " · ".join(note for note in notes if note)
