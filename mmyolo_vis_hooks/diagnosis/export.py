"""Everything that has a box, for other programs: COCO's JSON, CSV, FiftyOne."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..publish.files import encode, make_writable, write_whole
from .cost import MISSED
from .report import FOUND, ErrorRecord, ErrorReport, csv_text

_CSV_HEADER = ("image", "kind", "class", "score", "x1", "y1", "x2", "y2", "why")


@dataclass(frozen=True)
class ImageFile:
    """Where an image of a report comes from.

    Attributes:
        id: Number that the data set gives it.
        path: Its file.
    """

    id: int
    path: str


class Export:
    """Writes the boxes of a report: hits, false positives and missed objects.

    Args:
        report (ErrorReport): With all images.
        images (Mapping[str, ImageFile]): By the names that the report has.
        category_ids (Mapping[str, int]): Numbers that the data set gives the classes;
            others are 0.
    """

    def __init__(
        self,
        report: ErrorReport,
        images: Mapping[str, ImageFile],
        category_ids: Mapping[str, int],
    ) -> None:
        self._report = report
        self._images = images
        self._category_ids = category_ids
        self._records = [*report.hits, *report.records]

    def coco_results(self) -> str:
        """The detections in COCO's results format, as its evaluation takes them."""
        return json.dumps([self._coco_box(*own) for own in self._report.detections])

    def coco(self) -> str:
        """A data set in COCO's format; an annotation has also ``error`` and ``why``.

        A missed object has the score of its best candidate.
        """
        images = [
            {"id": own.id, "file_name": own.path, "width": width, "height": height}
            for name, own in self._images.items()
            for height, width in [self._report.sizes[name]]
        ]
        annotations = [
            {
                "id": number,
                **self._coco_box(own.image, own.class_name, own.score, own.box_xyxy),
                "area": (own.box_xyxy[2] - own.box_xyxy[0])
                * (own.box_xyxy[3] - own.box_xyxy[1]),
                "iscrowd": 0,
                "error": own.full_kind,
                "why": own.why,
            }
            for number, own in enumerate(self._records, 1)
        ]
        names = self._category_ids.items()
        categories = [{"id": number, "name": name} for name, number in names]
        return json.dumps(
            {"images": images, "categories": categories, "annotations": annotations}
        )

    def csv(self) -> str:
        """A row for each box: image, kind, class, score, corners, reason."""
        rows = (
            (
                own.image,
                own.full_kind,
                own.class_name,
                own.score,
                *own.box_xyxy,
                own.why,
            )
            for own in self._records
        )
        return csv_text(_CSV_HEADER, rows)

    def write_fiftyone(self, folder: Path, maps: Mapping[str, np.ndarray]) -> None:
        """Write a data set that FiftyOne opens; the images stay where they are.

        ``fiftyone.Dataset.from_dir(folder, fiftyone.types.FiftyOneDataset)`` reads it.
        A sample has the detections ``ground_truth`` and ``predictions``, whose tags say
        the kind of error or ``'found'``, and the heat map ``error_map``.

        Args:
            folder (Path): Made if it is missing.
            maps (Mapping[str, np.ndarray]): ``(h, w)`` uint8 over the image, 255 the
                strongest value, of those images that have one.

        Raises:
            PublishError: If it was not written whole.
        """
        boxes: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(
            lambda: {"ground_truth": [], "predictions": []}
        )
        for own in self._records:
            fields = boxes[own.image]
            if own.kind == MISSED:
                fields["ground_truth"].append(self._detection(own, own.box_xyxy))
                continue
            fields["predictions"].append(self._detection(own, own.box_xyxy, own.score))
            if own.kind == FOUND:
                [(_, object_xyxy)] = own.others
                fields["ground_truth"].append(self._detection(own, object_xyxy))
        make_writable(folder / "fields" / "error_map")
        samples = []
        for name, image in self._images.items():
            sample: dict[str, Any] = {
                "filepath": str(Path(image.path).resolve()),
                "tags": [],
                "metadata": None,
                "image_name": name,
            }
            for field, detections in boxes[name].items():
                sample[field] = {"_cls": "Detections", "detections": detections}
            if name in maps:
                path = f"fields/error_map/{name}.png"
                write_whole(folder / path, encode(".png", maps[name]))
                sample["error_map"] = {"_cls": "Heatmap", "tags": [], "map_path": path}
            samples.append(sample)
        metadata = {"media_type": "image", "info": {}}
        for file, content in (
            ("metadata", metadata),
            ("samples", {"samples": samples}),
        ):
            write_whole(folder / f"{file}.json", json.dumps(content).encode())

    def _coco_box(
        self, image: str, class_name: str, score: float, box_xyxy: Sequence[float]
    ) -> dict[str, Any]:
        x1, y1, x2, y2 = box_xyxy
        return {
            "image_id": self._images[image].id,
            "category_id": self._category_ids.get(class_name, 0),
            "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
            "score": score,
        }

    def _detection(
        self,
        own: ErrorRecord,
        box_xyxy: Sequence[float],
        confidence: float | None = None,
    ) -> dict[str, Any]:
        height, width = self._report.sizes[own.image]
        x1, y1, x2, y2 = box_xyxy
        shares = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        return {
            "_cls": "Detection",
            "label": own.class_name,
            "bounding_box": shares,
            "confidence": confidence,
            "tags": [own.full_kind],
            "attributes": {},
            "why": own.why,
        }
