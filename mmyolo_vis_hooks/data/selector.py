"""Chooses the images that are shown, and finds them again in the batches."""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..errors import VisConfigError

ALL_IMAGES = -1
_MAX_ID_LENGTH = 80


@dataclass(frozen=True)
class SelectedImage:
    """One image that is shown in every run.

    Attributes:
        image_id: Unique within the selection; letters, digits, ``_`` and ``-``.
        img_id: What the dataset calls it.
        img_path: Its file, or files, or None for a dataset that holds images in memory.
        dataset: The dataset that loads it, below all wrappers.
        index: Its index in ``dataset``.
    """

    image_id: str
    img_id: Any
    img_path: Any
    dataset: Any
    index: int


class ImageSelector:
    """The same images of a dataset in every run.

    Args:
        dataset: The dataset of the loop, wrapped or not.
        num_images (int): How many images, spread evenly over the dataset;
            -1 takes all of them.
        image_indices (Sequence[int], optional): Explicit indices into the
            (wrapped) dataset; ``num_images`` is then not looked at.

    Raises:
        VisConfigError: If an index lies outside the dataset.
    """

    def __init__(
        self, dataset: Any, num_images: int, image_indices: Sequence[int] | None
    ) -> None:
        if image_indices is None:
            indices: Sequence[int] = spread_indices(len(dataset), num_images)
        else:
            outside = [i for i in image_indices if i >= len(dataset)]
            if outside:
                raise VisConfigError(
                    f"image_indices={list(image_indices)} but the dataset has "
                    f"{len(dataset)} images; remove {outside}"
                )
            indices = image_indices
        self._by_key: dict[tuple[Any, Any], SelectedImage] = {}
        taken: set[str] = set()
        for index in indices:
            leaf, leaf_index = resolve_index(dataset, index)
            info = leaf.get_data_info(leaf_index)
            img_id, img_path = info.get("img_id"), info.get("img_path")
            # Multispectral images have a list of files.
            key = (img_id, _hashable(img_path))
            if key in self._by_key:  # an image that a wrapper repeats
                continue
            image_id = _unique(make_image_id(img_id, img_path, index), taken)
            self._by_key[key] = SelectedImage(
                image_id, img_id, img_path, leaf, leaf_index
            )

    @property
    def images(self) -> tuple[SelectedImage, ...]:
        """The selected images in the order of their indices."""
        return tuple(self._by_key.values())

    def find(self, metainfo: Mapping[str, Any]) -> SelectedImage | None:
        """Find the selected image that a data sample holds.

        Args:
            metainfo (Mapping): Of the data sample; ``img_path`` and ``img_id``,
                or one of them.
        """
        if "img_id" in metainfo and "img_path" in metainfo:
            return self._by_key.get(
                (metainfo["img_id"], _hashable(metainfo["img_path"]))
            )
        for position, key in enumerate(("img_id", "img_path")):
            if key in metainfo:
                for known, image in self._by_key.items():
                    if known[position] == _hashable(metainfo[key]):
                        return image
        return None


def spread_indices(num_total: int, num_images: int) -> list[int]:
    """Spread ``num_images`` indices evenly over a dataset, ends included.

    Args:
        num_total (int): Size of the dataset.
        num_images (int): How many; -1 for all.
    """
    if num_images == ALL_IMAGES or num_images >= num_total:
        return list(range(num_total))
    if num_images == 1:
        return [0]
    return [round(i * (num_total - 1) / (num_images - 1)) for i in range(num_images)]


def resolve_index(dataset: Any, index: int) -> tuple[Any, int]:
    """Follow an index through dataset wrappers to the dataset that loads it.

    Args:
        dataset: Any nesting of MMEngine's, MMDetection's and torch's wrappers.
        index (int): Index into the outermost one.

    Returns:
        tuple: The innermost dataset and the index into it.
    """
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):
        which = bisect.bisect_right(dataset.cumulative_sizes, index)
        start = dataset.cumulative_sizes[which - 1] if which else 0
        return resolve_index(dataset.datasets[which], index - start)
    if hasattr(dataset, "dataset"):
        if hasattr(dataset, "_get_ori_dataset_idx"):
            index = dataset._get_ori_dataset_idx(index)
        elif hasattr(dataset, "indices"):
            index = dataset.indices[index]
        return resolve_index(dataset.dataset, index)
    if not hasattr(dataset, "get_data_info"):
        raise VisConfigError(
            f"the dataset {type(dataset).__name__} has no get_data_info(idx); derive "
            "it from mmengine.dataset.BaseDataset, so that its images can be named"
        )
    return dataset, int(index)


def leaf_datasets(dataset: Any) -> list[Any]:
    """All datasets below the wrappers, each once."""
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    if hasattr(dataset, "datasets"):
        children = list(dataset.datasets)
    elif hasattr(dataset, "dataset"):
        children = [dataset.dataset]
    else:
        return [dataset]
    leaves: list[Any] = []
    for child in children:
        leaves += [d for d in leaf_datasets(child) if not any(d is x for x in leaves)]
    return leaves


def make_image_id(img_id: Any, img_path: Any, index: int) -> str:
    """Name an image for tags and file names.

    The name holds the dataset's id and the file's stem. Characters that a file
    name or a tag cannot hold are replaced and a short hash keeps it unique.
    """
    if isinstance(img_path, (list, tuple)):
        img_path = img_path[0] if img_path else None
    parts = [
        str(part)
        for part in (img_id, img_path and PurePath(img_path).stem)
        if part not in (None, "")
    ]
    name = "_".join(parts) or str(index)
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_MAX_ID_LENGTH]
    if safe != name:
        safe += "-" + hashlib.sha1(name.encode()).hexdigest()[:8]
    return safe


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    taken.add(candidate)
    return candidate
