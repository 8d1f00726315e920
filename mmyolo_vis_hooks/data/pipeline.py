"""A test pipeline in two parts: what loads an image, and what becomes of it.

What the loading steps give is drawn, and goes on through the rest: the pipeline's own
geometry, or one resize to a size that the network takes without padding.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlparse

import cv2
import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile

from ..errors import UnsupportedPipelineError, VisConfigError, VisError
from ..fetch import fetch
from .decoded import array_bgr, as_decoded, num_channels
from .pictures import picture_of
from .proof import compare_places
from .resize import FRAMING_STEPS, RESIZING_STEPS, AlignedResize, step_name

# A step may do something only now and then.
_NUM_TRIES = 3
_MIN_TRIED_SIDE, _MAX_TRIED_SIDE = 160, 1000
_STOCK = ("mmcv", "mmdet", "mmyolo", "mmengine")


@dataclass(frozen=True)
class Loaded:
    """An image as the loading steps of a pipeline gave it.

    Attributes:
        results: What goes on through the other steps; ``results['img']`` is the image.
        image_rgb: ``(H, W, 3)`` uint8, RGB: the picture of it.
        note: How it was made of what has not three channels of 8 bits; else empty.
    """

    results: dict[str, Any]
    image_rgb: np.ndarray
    note: str = ""


class ImagePipeline:
    """A test pipeline whose loading steps and other steps run one after the other.

    Args:
        pipeline: ``Compose``, list of built transforms, or a transform. Of test-time
            augmentation the first view is taken, unflipped.
        channels (Sequence[int], optional): Which channels the picture shows.
        annotations (bool): False leaves out the steps that load anything but images,
            where it is not there.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        channels: Sequence[int] | None = None,
        annotations: bool = True,
    ) -> None:
        self.steps = flatten_steps(pipeline, flips=False)
        if not annotations:
            self.steps = [
                _reading_files(s) for s in self.steps if not _loads_annotations(s)
            ]
        self._annotations = annotations
        self._channels = channels
        # Known after the first image: only then can be seen which steps load.
        self._num_loading: int | None = None

    def load(
        self, image: Any, *, img_id: Any = 0, img_path: str | None = None
    ) -> Loaded:
        """Run the loading steps.

        Args:
            image: What a data set knows of an image; or a file or address; or an image
                that is decoded already, which enters after these steps and is made
                what they would give: ``(H, W, 3)`` RGB, ``(H, W)``, ``(H, W, C)`` or
                of Pillow.
            img_id: Of a file or a decoded image.
            img_path (str, optional): Of a decoded image.

        Raises:
            VisError: If they give nothing for it.
            VisConfigError: If no step loads an image.
        """
        if isinstance(image, Mapping):
            results = self._read(dict(image), self.steps)
        elif isinstance(image, (str, os.PathLike)):
            results = self._read_file(os.fspath(image), img_id)
        else:
            pixels = self._as_loaded(image)
            size_hw = pixels.shape[:2]
            results = dict(img=pixels, img_shape=size_hw, ori_shape=size_hw)
            results.update(img_id=img_id, img_path=img_path, instances=[])
            if self._num_loading is None:
                if not self._annotations:
                    self.steps = [s for s in self.steps if not _loads_more(s)]
                self._num_loading = self._named_loading()
        return Loaded(results, *picture_of(results["img"], self._channels))

    def pack(self, loaded: Loaded) -> dict[str, Any]:
        """Run the other steps on an image, which is not changed.

        Raises:
            VisError: If they give nothing.
            VisConfigError: If they do not pack it.
        """
        results = _copied_results(loaded.results)
        for step in self.steps[self._num_loading or 0 :]:
            results = _run(step, results)
        if "inputs" not in results and "ori_shape" in results:  # which a sample holds
            raise VisConfigError(
                f"the test pipeline does not pack what it loads, but has "
                f"{', '.join(map(step_name, self.steps))}; end it with PackDetInputs"
            )
        return results

    def resize_only(
        self, loaded: Loaded, *, divisor: int, stride: int
    ) -> ImagePipeline:
        """Copy the pipeline with its geometry reduced to one :class:`AlignedResize`.

        Args:
            loaded (Loaded): An image, on whose like every unknown step is tried.
            divisor (int): ``pad_size_divisor`` of the data preprocessor.
            stride (int): Largest stride of the network.

        Raises:
            UnsupportedPipelineError: If a step moves pixels in an unknown way.
        """
        start = self._num_loading or 0
        geometric: list[int] = []
        results: Any = _copied_results(loaded.results)
        for number, step in enumerate(self.steps[start:], start):
            if _is_known_geometry(step):
                geometric.append(number)
            elif moves_pixels(step, results):
                raise UnsupportedPipelineError(
                    f"its step {step_name(step)!r} moves pixels in a way that this "
                    "package does not know"
                )
            if number + 1 < len(self.steps):
                results = step(results)
        replaced = [self.steps[number] for number in geometric]
        # Without geometry of its own only padding is avoided: before the packing.
        place = geometric[0] if geometric else len(self.steps) - 1
        changed = copy.copy(self)
        changed.steps = []
        for number, step in enumerate(self.steps):
            if number == place:
                changed.steps.append(AlignedResize(replaced, divisor, stride))
            if number not in geometric:
                changed.steps.append(_copied(step))
        return changed

    def resized_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Size to which a Resize-only pipeline brings an image, pixels."""
        (resize,) = [step for step in self.steps if isinstance(step, AlignedResize)]
        return resize.size_hw(image_hw)

    def _read_file(self, path: str, img_id: Any) -> dict[str, Any]:
        info = dict(img_path=path, img_id=img_id, instances=[])
        # Not of the storage that the data set lies in.
        steps = [_reading_here(step) for step in self.steps]
        if path.startswith(("http://", "https://")):
            with _fetched(path) as file:
                try:
                    results = self._read({**info, "img_path": file}, steps)
                except VisError as error:
                    error.args = (str(error).replace(file, path),)
                    raise
            return {**results, "img_path": path}
        return self._read(info, steps if os.path.isfile(path) else self.steps)

    def _read(self, results: dict[str, Any], steps: list[Any]) -> dict[str, Any]:
        if self._num_loading is None:
            return self._find_loading(results, steps)
        for step in steps[: self._num_loading]:
            results = _run(step, results)
        return results

    def _find_loading(self, info: dict[str, Any], steps: list[Any]) -> dict[str, Any]:
        """Find out on an image how many steps load, and give what they do.

        The step that brings the image loads, and so do those behind it that bring
        another image or more channels, up to the first one that moves pixels.
        """
        left_out: list[int] = []
        count, loaded, results = 0, info, info
        for number, step in enumerate(steps, 1):
            later = "img" in results and not _loads_image(step)
            if later and _is_known_geometry(step):
                break
            try:
                after = _run(step, _copied_results(results))
            except VisError:
                if self._annotations or not _loads_more(step):
                    raise
                left_out.append(number)  # what it loads is not there for this image
                continue
            if later:
                if "img" not in after:
                    break
                brings = _brings_image(step, results, after)
                if not brings and moves_pixels(step, results):
                    break
                results = after
                if not brings:
                    continue
            count, loaded, results = number - len(left_out), after, after
        if "img" not in loaded:
            raise _no_loader(self.steps)
        self.steps = [s for n, s in enumerate(self.steps, 1) if n not in left_out]
        self._num_loading = count
        return loaded

    def _named_loading(self) -> int:
        """How many steps load, guessed by their names where no file is read."""
        loaders = [n for n, s in enumerate(self.steps, 1) if _loads_image(s)]
        if loaders:
            return loaders[-1]
        if self.steps and type(self.steps[0]).__module__.split(".")[0] not in _STOCK:
            return 1
        raise _no_loader(self.steps)

    def _as_loaded(self, image: Any) -> np.ndarray:
        """A decoded image in the dtype and with the channels that the loader gives."""
        loaders = [s for s in self.steps if _loads_image(s)]
        plain = len(loaders) == 1 and type(loaders[0]) is LoadImageFromFile
        if not plain or loaders[0].imdecode_backend == "tifffile":
            return array_bgr(image)
        return as_decoded(image, loaders[0].color_type, loaders[0].to_float32)


def moves_pixels(step: Callable, results: Mapping[str, Any]) -> bool:
    """Whether a transform changes where things are, found out by trying.

    The step runs on a texture like the image in ``results``, or larger, with channels
    that are alike: so whatever it does to colours, contrast or noise, the edges stay
    unless it moves them. True also if it cannot be tried.
    """
    if "img" not in results:
        return False
    texture = _texture_like(results["img"])
    size = {"img_shape": texture.shape[:2]} if "img_shape" in results else {}
    for _ in range(_NUM_TRIES):
        given = {**_copied_results(results), **size, "img": texture.copy()}
        try:
            after = step(given)
        except Exception:  # nobody knows, so the picture must not rely on it
            return True
        if not after or "img" not in after:
            return False  # it packs
        image = np.asarray(after["img"])
        if image.shape[:2] != texture.shape[:2]:
            return True
        if np.array_equal(image, texture):
            continue
        if not compare_places(texture, image).holds:
            return True
    return False


def flatten_steps(pipeline: Any, *, flips: bool = True) -> list[Any]:
    """Transforms of a pipeline in a row; of an augmented one those of the first view.

    Args:
        pipeline: ``Compose``, list, ``TestTimeAug`` or a transform.
        flips (bool): False leaves out flips in augmented views.
    """
    if hasattr(pipeline, "subroutines"):  # TestTimeAug
        steps = flatten_steps(pipeline.subroutines[0])
        return [s for s in steps if flips or step_name(s) != "RandomFlip"]
    if step_name(pipeline) == "Compose":
        pipeline = list(pipeline.transforms)
    if isinstance(pipeline, (list, tuple)):
        return [s for part in pipeline for s in flatten_steps(part, flips=flips)]
    return [pipeline]


def _run(step: Callable, results: dict[str, Any]) -> dict[str, Any]:
    path = results.get("img_path")
    try:
        after = step(results)
    except Exception as error:  # each loader and storage has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"{path} is no image that {step_name(step)} can read"
        if "img" in results:
            size = results["img"].shape
            what = f"{step_name(step)} fails for {path or 'an image'} of shape {size}"
        raise VisError(f"{what}: {reason}") from error
    if after is None:
        raise VisError(
            f"the test pipeline gave nothing for {path}, at its step {step_name(step)}"
        )
    return after


def _no_loader(steps: Sequence[Any]) -> VisConfigError:
    return VisConfigError(
        "the test pipeline has no step that loads an image, but "
        f"{', '.join(map(step_name, steps)) or 'no step'}; begin it with one such as "
        "LoadImageFromFile"
    )


def _is_known_geometry(step: Any) -> bool:
    names = RESIZING_STEPS | FRAMING_STEPS
    return isinstance(step, AlignedResize) or step_name(step) in names


def _loads_image(step: Any) -> bool:
    return isinstance(step, LoadImageFromFile) or _is_named(step, "Image")


def _loads_annotations(step: Any) -> bool:
    return isinstance(step, LoadAnnotations) or _is_named(step, "Annotations")


def _loads_more(step: Any) -> bool:
    """Whether a step loads what only a data set has, perhaps."""
    return (
        _is_named(step, "")
        and not _loads_image(step)
        and not _is_named(step, "Proposals")
    )


def _is_named(step: Any, what: str) -> bool:
    return step_name(step).startswith("Load") and what in step_name(step)


def _brings_image(
    step: Callable, before: Mapping[str, Any], after: Mapping[str, Any]
) -> bool:
    """Whether a step loads: it adds channels, or does not look at the image it gets."""
    given, image = np.asarray(before["img"]), np.asarray(after["img"])
    if num_channels(image) > num_channels(given):
        return True
    if np.array_equal(image, given):
        return False
    blank = step({**_copied_results(before), "img": np.zeros_like(given)})
    return bool(blank) and np.array_equal(blank.get("img"), image)


def _reading_files(step: Any) -> Any:
    """A loader of files for one of arrays, which ``inference_detector`` left behind."""
    if step_name(step) != "LoadImageFromNDArray":
        return step
    names = ("to_float32", "color_type", "imdecode_backend", "backend_args")
    return LoadImageFromFile(**{name: getattr(step, name) for name in names})


def _reading_here(step: Any) -> Any:
    """A loader that reads this machine's files, like one that reads elsewhere."""
    if not getattr(step, "backend_args", None):
        return step
    step = copy.copy(step)
    step.backend_args = None
    return step


@contextlib.contextmanager
def _fetched(address: str) -> Iterator[str]:
    """A file, for a while, of what lies at an address."""
    with tempfile.TemporaryDirectory() as folder:
        # Some loaders look at the suffix.
        file = Path(folder, f"image{PurePath(urlparse(address).path).suffix}")
        try:
            fetch(address, file)
        except (OSError, HTTPException, ValueError) as error:
            reason = " ".join(str(error).split())
            raise VisError(f"cannot read {address}: {reason}") from error
        yield str(file)


def _copied_results(results: Mapping[str, Any]) -> dict[str, Any]:
    # MMYOLO's data sets hand themselves over for augmentations that mix images.
    return {
        key: value if key == "dataset" else _copied(value)
        for key, value in results.items()
    }


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except (TypeError, pickle.PicklingError):  # it holds a file or a connection
        return value


def _texture_like(image: np.ndarray) -> np.ndarray:
    """Blobs of many sizes, at places that are alike in no other way of looking."""
    sides = image.shape[:2]
    # A small one has too few edges to tell what a threshold leaves from what moves.
    grow = min(_MIN_TRIED_SIDE / min(sides), _MAX_TRIED_SIDE / max(sides))
    height, width = (round(side * max(1.0, grow)) for side in sides)
    shrink = min(1.0, _MAX_TRIED_SIDE / max(height, width))
    size_hw = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    rng = np.random.RandomState(0)
    grey = np.zeros(size_hw, np.float32)
    for sigma in (1.5, 4, 10):
        noise = rng.rand(*size_hw).astype(np.float32)
        grey += cv2.GaussianBlur(noise, (0, 0), sigmaX=sigma) * sigma
    grey = cv2.resize(grey, (width, height))
    low, high = np.percentile(grey, (1, 99))
    grey = ((grey - low) / max(high - low, 1e-6)).clip(0, 1)
    values = image[np.isfinite(image)].astype(np.float64)
    darkest, brightest = np.percentile(values, (1, 99)) if values.size else (0, 0)
    if brightest - darkest < 1e-6:  # one colour says nothing about the range
        darkest, brightest = 0, 255
    texture = (grey * (brightest - darkest) + darkest).astype(image.dtype)
    if image.ndim == 2:
        return texture
    return texture[..., None].repeat(image.shape[2], axis=2)
