"""What the Python API gives: records that print, draw, save and show themselves."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .checks import class_list
from .data.detections import labels_of
from .declare import read_options
from .errors import VisConfigError
from .publish.files import RESULT_SUFFIXES, encode, write_result
from .publish.html_page import HtmlPage
from .records import Activation, BoxExplanation, BoxSample, Detections, VisSample
from .render.boxam_panel import BoxAMPanel
from .render.boxes import class_name
from .render.featmap_panel import FeatMapPanel

# A notebook keeps what it shows.
_SHOWN_QUALITY = 90


@dataclass(frozen=True, eq=False)
class Explanation:
    """What made one detection.

    Attributes:
        class_name: Of the detection; its index as text where names are unknown.
        label: Index of the class.
        score: Final score, 0 to 1.
        box_xyxy: ``(4,)`` float32, in pixels of the image.
        layer: The layers whose maps are shown, such as ``'neck[1]'``; '' for none.
        raw_maps: Map of each layer on its own grid, ``(h, w)`` float32, not
            normalised, over the network's input; ``'image'`` is a map of its pixels.
        note: Why the maps are missing or not to be trusted; '' where they are.
    """

    class_name: str
    label: int
    score: float
    box_xyxy: np.ndarray
    layer: str
    raw_maps: Mapping[str, np.ndarray]
    note: str
    _record: BoxExplanation = field(repr=False)
    _sample: BoxSample = field(repr=False)
    _panel: BoxAMPanel = field(repr=False)

    @property
    def points(self) -> np.ndarray | None:
        """Where the query of the box sampled, ``(n, 3)``: x, y in pixels of the image
        and the weight; None but for ``'attention'`` of deformable decoders."""
        if self._record.points is None:
            return None
        xy, weights = np.split(self._record.points, [2], axis=1)
        return np.hstack([self._sample.frame.points_to_image(xy), weights])

    @cached_property
    def saliency(self) -> np.ndarray:
        """The map over the image, ``(H, W)`` float32, 0 to 1: 1 is its maximum.

        A signed one, as of ``method='evidence'``, is -1 to 1.

        As it is drawn: smoothed, fused and normalised as the options say. All zero
        where nothing has any influence.
        """
        return self._panel.box_map(self._record, self._sample.frame, self.box_xyxy)

    def __repr__(self) -> str:
        x1, y1, x2, y2 = (round(float(v)) for v in self.box_xyxy)
        where = f" at {self.layer}" if self.layer else f" ({self.note})"
        return (
            f"Explanation({self.class_name} {self.score:.2f}{where}, "
            f"box {x1} {y1} {x2} {y2})"
        )


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """One map of one layer.

    Attributes:
        layer: Path of the layer and place in its output: ``'neck[1]'``.
        values: ``(C, h, w)``, in the layer's dtype where NumPy has it, else float32;
            cells over the network's input.
    """

    layer: str
    values: np.ndarray

    def __repr__(self) -> str:
        channels, height, width = self.values.shape
        return f"FeatureMap({self.layer}, {channels} x {height} x {width})"


class _Result(Sequence):
    """What explanations and feature maps of an image share.

    Args:
        sample (Sample): The image and its maps.
        panel: What draws it, with everything that was asked for.
    """

    panel_kind: type

    _items: tuple[Any, ...]
    _page_title: str
    # Where the sample has what the items are made of.
    _parts: str
    # Options that a finished result can still be drawn with.
    _drawing: tuple[str, ...]

    def __init__(self, sample: Any, panel: Any) -> None:
        self._sample = sample
        self._panel = panel

    @property
    def image_id(self) -> str:
        """Name of the image, safe in file names."""
        return self._sample.image_id

    @property
    def image_rgb(self) -> np.ndarray:
        """The image as it was loaded, ``(H, W, 3)`` uint8, RGB."""
        return self._sample.image_rgb

    @property
    def note(self) -> str:
        """How the picture was made of an image that is not three 8-bit channels."""
        return self._sample.note

    @property
    def detections(self) -> Detections:
        """All final detections, in pixels of the image."""
        return self._sample.detections

    @property
    def options(self) -> Any:
        """Everything that was asked for."""
        return self._panel.options

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._subset(range(len(self))[index])
        return self._items[index]

    def draw(self, **options: Any) -> np.ndarray:
        """Draw the image and its maps.

        Args:
            **options: Options of the drawing that differ from those that the result
                was made with, such as ``scope`` or ``alpha``.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB.

        Raises:
            VisConfigError: If an option cannot work, or would need another look.
        """
        owner, kind = f"{type(self).__name__}.draw", type(self.options)
        read_options(owner, options, kind, offered=self._drawing)
        other = sorted(set(options) - set(self._drawing))
        if other:
            raise VisConfigError(
                f"{other[0]}={options[other[0]]!r} cannot work in draw(): the image "
                "must be looked at again; give it to explain() or feature_maps()"
            )
        changed = dataclasses.replace(self.options, **options)
        return dataclasses.replace(self._panel, options=changed)(self._sample)

    def save(self, path: str | os.PathLike) -> list[Path]:
        """Write the picture, the numbers and a page to look through.

        Args:
            path: A folder gets all of them: a picture, NPZ and JSON named after the
                image, and ``index.html``; those of an earlier call are replaced, and
                nothing else. A name that ends in ``.npz``, ``.json`` or as pictures
                do gets that one. A file of that name is replaced.

        Returns:
            list[Path]: The files, the page first.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if path.is_dir() or not suffix:
            return Gallery([self]).save(path)
        write_result(path, self.draw, self.arrays, self.to_coco)
        return [path]

    def to_coco(self) -> list[dict[str, Any]]:
        """Detections as COCO's results are written, with names of the classes.

        Returns:
            list[dict]: ``image_id``, ``category_id`` (the label), ``category_name``,
            ``bbox`` as x, y, width, height in pixels of the image, and ``score``.
        """
        return [self._coco(i) for i in range(len(self.detections))]

    def _coco(self, index: int) -> dict[str, Any]:
        label = int(self.detections.labels[index])
        x1, y1, x2, y2 = self.detections.boxes_xyxy[index].tolist()
        return {
            "image_id": self.image_id,
            "category_id": label,
            "category_name": class_name(label, self._panel.class_names),
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(self.detections.scores[index]), 5),
        }

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into the NPZ file."""

    @abstractmethod
    def _words(self) -> list[str]:
        """What a result is made of, for its ``repr``."""

    def _subset(self, indices: Sequence[int]) -> Any:
        parts = getattr(self._sample, self._parts)
        kept = {self._parts: tuple(parts[n] for n in indices)}
        return type(self)(dataclasses.replace(self._sample, **kept), self._panel)

    def _repr_jpeg_(self) -> bytes:
        return encode(".jpg", self.draw(), _SHOWN_QUALITY)

    def __repr__(self) -> str:
        height, width = self.image_rgb.shape[:2]
        shown = ", ".join(self._words())
        return f"{type(self).__name__}({self.image_id}, {width} x {height} px: {shown})"


class Explanations(_Result):
    """What made the detections of an image, the highest score first.

    It has a length, is indexed by number, and shows itself in a notebook.
    """

    panel_kind = BoxAMPanel
    _page_title, _parts = "Box activation maps", "explanations"
    _drawing = (
        "scope", "fusion", "normalize_layers", "smooth", "norm_in_bbox", "alpha",
        "colormap", "score_thr",
    )  # fmt: skip

    def __init__(self, sample: BoxSample, panel: BoxAMPanel) -> None:
        super().__init__(sample, panel)
        self._items = tuple(self._explanation(e) for e in sample.explanations)

    def of_class(self, *names: str | int) -> Explanations:
        """Those of some classes, by name or index.

        Raises:
            VisConfigError: If the data set has no such class.
        """
        wanted = class_list("of_class", names)
        labels = labels_of(wanted, self._panel.class_names)
        return self._subset([n for n, e in enumerate(self) if e.label in labels])

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into the NPZ file: one row per explained box.

        Returns:
            dict: ``boxes_xyxy`` ``(K, 4)``, ``scores`` ``(K,)``, ``labels`` ``(K,)``,
            ``class_names`` ``(K,)``, ``layers`` ``(K,)`` and ``saliency`` ``(K, H, W)``
            float32.
        """
        height, width = self.image_rgb.shape[:2]
        maps = [e.saliency for e in self]
        return {
            "boxes_xyxy": np.array([e.box_xyxy for e in self]).reshape(-1, 4),
            "scores": np.array([e.score for e in self], np.float32),
            "labels": np.array([e.label for e in self], np.int64),
            "class_names": np.array([e.class_name for e in self], np.str_),
            "layers": np.array([e.layer for e in self], np.str_),
            "saliency": np.array(maps, np.float32).reshape(-1, height, width),
        }

    def to_coco(self) -> list[dict[str, Any]]:
        """The explained detections as COCO's results, with ``layer`` and ``note``."""
        return [
            {**self._coco(e._record.index), "layer": e.layer, "note": e.note}
            for e in self
        ]

    def _explanation(self, record: BoxExplanation) -> Explanation:
        found = self.detections
        label = int(found.labels[record.index])
        return Explanation(
            class_name=class_name(label, self._panel.class_names),
            label=label,
            score=float(found.scores[record.index]),
            box_xyxy=found.boxes_xyxy[record.index],
            layer=record.layer,
            raw_maps={m.layer: m.saliency for m in record.maps},
            note=record.warning,
            _record=record,
            _sample=self._sample,
            _panel=self._panel,
        )

    def _words(self) -> list[str]:
        return [f"{e.class_name} {e.score:.2f}" for e in self] or ["no box"]


class FeatureMaps(_Result):
    """Feature maps of an image, in the order of the layers and their calls."""

    panel_kind = FeatMapPanel
    _page_title, _parts = "Feature maps", "activations"
    _drawing = (
        "channel_reduction", "topk", "arrangement", "alpha", "colormap", "score_thr",
    )  # fmt: skip

    def __init__(self, sample: VisSample, panel: FeatMapPanel) -> None:
        super().__init__(sample, panel)
        self._items = tuple(FeatureMap(a.title, _numpy(a)) for a in sample.activations)

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into the NPZ file: ``(C, h, w)`` by the name of the layer."""
        return {feature_map.layer: feature_map.values for feature_map in self}

    def _words(self) -> list[str]:
        shapes = [f"{m.layer} {' x '.join(map(str, m.values.shape))}" for m in self]
        return shapes or ["no map"]


class Gallery(list):
    """Results of several images, of one kind and with names of their own."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Gallery(found) if isinstance(index, slice) else found

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write all of them and one page to look through, as a single result does.

        Returns:
            list[Path]: The files, the page first.
        """
        if not self:
            raise VisConfigError("there is no result to save; look at an image first")
        folder, first = Path(folder), self[0]
        if folder.suffix.lower() in RESULT_SUFFIXES and not folder.is_dir():
            raise VisConfigError(
                f"folder={str(folder)!r} cannot work: several results need a folder; "
                "save one of them, such as [0], to a file"
            )
        page = HtmlPage(
            folder,
            title=first._page_title,
            colormap=first._panel.colormap,
            fade=first._panel.fades,
            alpha=first.options.alpha,
        )
        files: list[Path] = []
        for order, result in enumerate(self):
            name = page.files.free_name(result.image_id)
            for suffix in (".jpg", ".npz", ".json"):
                files += result.save(folder / f"{name}{suffix}")
                page.files.adopt(f"{name}{suffix}")
            page.add(
                result._sample,
                result._panel,
                name=name,
                title=result.image_id,
                picture=f"{name}.jpg",
                order=order,
            )
        return [page.write(), *files]

    def _repr_html_(self) -> str:
        pictures = (b64encode(result._repr_jpeg_()).decode() for result in self)
        return "".join(f'<img src="data:image/jpeg;base64,{p}">' for p in pictures)


def _numpy(activation: Activation) -> np.ndarray:
    values = activation.feature_map.detach().cpu()
    try:
        return values.numpy()
    except TypeError:  # bfloat16
        return values.float().numpy()
