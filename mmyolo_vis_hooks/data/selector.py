"""Chooses the images that are shown, and finds them again in the batches."""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..errors import VisConfigError

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

    @property
    def info(self) -> Mapping[str, Any]:
        """What the data set knows of it."""
        return self.dataset.get_data_info(self.index)

    def through(self, pipeline: Callable) -> Any:
        """Send it through another pipeline than that of its data set.

        The data set itself is not changed, and its workers see nothing of it.
        """
        # Not copy.copy: BaseDataset's own copying leaves out the annotations.
        view = object.__new__(type(self.dataset))
        view.__dict__.update(vars(self.dataset))
        view.pipeline = pipeline
        return view.prepare_data(self.index)


class ImageSelector:
    """The same images of a dataset in every run.

    Args:
        dataset: The dataset of the loop, wrapped or not.
        num_images (int): How many, spread evenly over the dataset; -1 takes all.
        image_indices (Sequence[int], optional): Explicit indices instead.

    Raises:
        VisConfigError: If an index lies outside the dataset, or images have no name.
    """

    def __init__(
        self, dataset: Any, num_images: int, image_indices: Sequence[int] | None
    ) -> None:
        outside = [i for i in image_indices or () if i >= len(dataset)]
        if image_indices is None:
            image_indices = spread_indices(len(dataset), num_images)
        elif outside:
            raise VisConfigError(
                f"image_indices={list(image_indices)} but the dataset has "
                f"{len(dataset)} images; remove {outside}"
            )
        self._by_key: dict[tuple[Any, str | None], SelectedImage] = {}
        taken: set[str] = set()
        for index in image_indices:
            leaf, leaf_index = resolve_index(dataset, index)
            info = leaf.get_data_info(leaf_index)
            key = _key_of(info)
            if key == (None, None):
                raise VisConfigError(
                    f"the dataset {type(leaf).__name__} names its images neither by "
                    "'img_id' nor by 'img_path', so none can be found again; give one "
                    "of them in get_data_info(idx)"
                )
            if key in self._by_key:  # an image that a wrapper repeats
                continue
            img_id, img_path = info.get("img_id"), info.get("img_path")
            name = make_image_id(img_id, img_path, index)
            self._by_key[key] = SelectedImage(
                unique_name(name, taken), img_id, img_path, leaf, leaf_index
            )

    @property
    def images(self) -> tuple[SelectedImage, ...]:
        """The selected images in the order of their indices."""
        return tuple(self._by_key.values())

    def find(self, metainfo: Mapping[str, Any]) -> SelectedImage | None:
        """Find the selected image that a data sample holds.

        Args:
            metainfo (Mapping): With ``img_path`` and ``img_id``, or one of them.
        """
        wanted = _key_of(metainfo)
        if None not in wanted:
            return self._by_key.get(wanted)
        if wanted == (None, None):
            return None
        alike = [
            image
            for key, image in self._by_key.items()
            if all(w in (None, known) for w, known in zip(wanted, key))
        ]
        # Joined data sets may count alike; a wrong image is worse than none.
        return alike[0] if len(alike) == 1 else None


def _key_of(info: Mapping[str, Any]) -> tuple[Any, str | None]:
    path = info.get("img_path")
    # Multispectral images have several files, in a list or by name.
    return info.get("img_id"), None if path is None else str(path)


def spread_indices(num_total: int, num_images: int) -> list[int]:
    """Spread indices evenly over a dataset, ends included; -1 gives all."""
    if num_images == -1 or num_images >= num_total:
        return list(range(num_total))
    if num_images == 1:
        return [0]
    return [round(i * (num_total - 1) / (num_images - 1)) for i in range(num_images)]


def resolve_index(dataset: Any, index: int) -> tuple[Any, int]:
    """Follow an index through any nesting of dataset wrappers.

    Returns:
        tuple: The innermost dataset, which loads the image, and the index into it.
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
    return _itself(dataset), int(index)


def leaf_datasets(dataset: Any) -> list[Any]:
    """All datasets below the wrappers, each once."""
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    if hasattr(dataset, "datasets"):
        children = list(dataset.datasets)
    elif hasattr(dataset, "dataset"):
        children = [dataset.dataset]
    else:
        return [_itself(dataset)]
    leaves = [leaf for child in children for leaf in leaf_datasets(child)]
    return list({id(leaf): leaf for leaf in leaves}.values())


def _itself(dataset: Any) -> Any:
    """The data set behind one that only passes its attributes on.

    MMEngine puts such a one around it where a loader has ``num_batch_per_epoch``.
    """
    return getattr(getattr(dataset, "get_data_info", None), "__self__", dataset)


def make_image_id(img_id: Any, img_path: Any, index: int) -> str:
    """Name an image for tags and file names: the dataset's id and the file's stem.

    Other characters are replaced, and a short hash then keeps the name unique.
    """
    if isinstance(img_path, Mapping):
        img_path = list(img_path.values())
    if isinstance(img_path, (list, tuple)):
        img_path = img_path[0] if img_path else None
    parts = [
        str(part)
        for part in (img_id, img_path and PurePath(img_path).stem)
        if part not in (None, "")
    ]
    name = "_".join(dict.fromkeys(parts)) or str(index)
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_MAX_ID_LENGTH]
    if safe != name:
        safe += "-" + hashlib.sha1(name.encode()).hexdigest()[:8]
    return safe


def unique_name(name: str, taken: set[str]) -> str:
    """A name with a number where it was taken; it is taken then."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    taken.add(candidate)
    return candidate
