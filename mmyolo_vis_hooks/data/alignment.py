"""How the maps of a data set's images are laid on pictures, proven on its first images.

``'resize'`` sends an image, stretched so that it needs no padding, through the network
once more; ``'letterbox'`` takes the network's own input and the frame that the pipeline
packed; ``'network'`` draws on that input itself, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from mmengine.dataset import pseudo_collate
from torch import nn

from ..errors import UnsupportedPipelineError, VisConfigError, VisError
from ..geometry import FrameTransform
from .pipeline import ImagePipeline, Loaded
from .proof import Agreement, compare_with_input
from .resize import network_divisor, network_stride

ALIGNMENTS = ("resize", "letterbox", "network")
_MAX_IMAGES = 4


@dataclass(frozen=True)
class Placement:
    """How the images of a data set are drawn.

    Attributes:
        alignment: One of ``ALIGNMENTS``.
        pipeline: What an image goes through; with ``'resize'`` the Resize-only copy.
        proven: Whether the packed frame leads from the picture to the network's input.
        reason: Why it is not ``'resize'`` although none was asked for by name, or why
            the packed frame is not proven.
    """

    alignment: str
    pipeline: ImagePipeline
    proven: bool
    reason: str = ""

    def frame(
        self,
        image_hw: tuple[int, int],
        network_hw: tuple[int, int],
        metainfo: Mapping[str, Any],
    ) -> FrameTransform:
        """Where a picture of the loaded image lies in the network's input.

        Raises:
            VisConfigError: If the pipeline does not say so.
        """
        if self.alignment == "resize":
            planned_hw = self.pipeline.resized_hw(image_hw)
            if planned_hw != network_hw:
                raise VisConfigError(
                    f"a step behind the resize to {planned_hw[0]}x{planned_hw[1]} "
                    f"pixels made {network_hw[0]}x{network_hw[1]} of them"
                )
            return FrameTransform.stretch(image_hw, network_hw)
        return packed_frame(image_hw, network_hw, metainfo)


class PlacedImage(NamedTuple):
    """An image that is looked at, and how it is drawn.

    ``loaded`` is None where it is only drawn on the network's own input.
    """

    image_id: str
    loaded: Loaded | None
    placement: Placement

    def packed(self) -> dict[str, Any]:
        """What the pipeline makes of it, a sample of a batch."""
        assert self.loaded is not None
        return self.placement.pipeline.pack(self.loaded)


def choose_alignment(
    wanted: str | None,
    pipeline: ImagePipeline,
    images: Iterable[Loaded],
    detector: nn.Module,
    dataset: Any = None,
) -> Placement:
    """Choose the alignment of a data set, and prove it on its first images.

    Args:
        wanted (str, optional): One of ``ALIGNMENTS``; None takes ``'resize'`` where
            picture and input agree, and ``'network'`` elsewhere.
        pipeline (ImagePipeline): The test pipeline.
        images (Iterable[Loaded]): At least one; of more the first four are taken.
        detector (nn.Module): Without wrappers; it does not run.
        dataset: The data set, which may name the network's largest stride.

    Raises:
        VisConfigError: If an alignment that is wanted by name cannot be right.
    """
    firsts = list(islice(images, _MAX_IMAGES))
    reason = ""
    if wanted in (None, "resize"):
        try:
            resized = pipeline.resize_only(
                firsts[0],
                divisor=network_divisor(detector),
                stride=network_stride(detector, dataset),
            )
            placement = Placement("resize", resized, True)
            reason = _disagreement(placement, firsts, detector)
        except UnsupportedPipelineError as error:
            reason = str(error)
        except Exception as error:  # a step may need what a replaced one gave
            reason = (
                "without its geometric steps it fails with "
                f"{type(error).__name__}: {error}"
            )
        if not reason:
            return placement
        if wanted is not None:
            raise UnsupportedPipelineError(_refusal("resize", reason))
    own = own_placement(pipeline, firsts, detector)
    if wanted == "letterbox":
        if not own.proven:
            raise UnsupportedPipelineError(_refusal("letterbox", own.reason))
        return own
    return Placement("network", pipeline, own.proven, reason)


def own_placement(
    pipeline: ImagePipeline, images: Iterable[Loaded], detector: nn.Module
) -> Placement:
    """Maps put back through the frame that a pipeline packs, and whether that is right.

    Arguments are those of :func:`choose_alignment`.
    """
    own = Placement("letterbox", pipeline, True)
    reason = _disagreement(own, islice(images, _MAX_IMAGES), detector)
    return replace(own, proven=not reason, reason=reason)


def first_loaded(loads: Iterable[Callable[[], Loaded]]) -> Iterator[Loaded]:
    """Images that can be loaded, one after the other; the first error if none can."""
    error: VisError | None = None
    num_loaded = 0
    for load in loads:
        try:
            loaded = load()
        except VisConfigError:
            raise
        except VisError as failure:
            error = error or failure
        else:
            num_loaded += 1
            yield loaded
    if error is not None and not num_loaded:
        raise error


def network_input(
    detector: nn.Module, data: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What a detector's data preprocessor makes of a packed image.

    Returns:
        tuple: ``(1, C, h, w)`` and the metainfo, with ``batch_input_shape``.
    """
    with torch.no_grad():
        batch = detector.data_preprocessor(  # type: ignore[operator]
            pseudo_collate([data]), False
        )
    inputs = batch["inputs"]
    network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
    metainfo = batch["data_samples"][0].metainfo
    return inputs, {**metainfo, "batch_input_shape": network_hw}


def packed_frame(
    image_hw: tuple[int, int],
    network_hw: tuple[int, int],
    metainfo: Mapping[str, Any],
) -> FrameTransform:
    """The frame that a pipeline packed for an image of a given size.

    Raises:
        VisConfigError: If it did not, or packed one of another image.
    """
    metainfo = {"batch_input_shape": network_hw, **metainfo}
    frame = FrameTransform.from_metainfo(metainfo, image_hw)
    if frame.image_hw != tuple(image_hw):
        raise VisConfigError(
            f"the loading steps gave an image of {image_hw[0]}x{image_hw[1]} pixels, "
            f"but 'ori_shape' says {frame.image_hw[0]}x{frame.image_hw[1]}"
        )
    return frame


def _disagreement(
    placement: Placement, images: Iterable[Loaded], detector: nn.Module
) -> str:
    """Why picture and network input do not fit together; empty if they do."""
    total = Agreement(0, 0)
    for loaded in images:
        try:
            data = placement.pipeline.pack(loaded)
            inputs, metainfo = network_input(detector, data)
            image_hw = loaded.image_rgb.shape[:2]
            network_hw = metainfo["batch_input_shape"]
            frame = placement.frame(image_hw, network_hw, metainfo)
        except VisConfigError as error:
            return str(error)
        found = compare_with_input(loaded.image_rgb, inputs[0], frame)
        # Some steps move only portraits, or only what is large.
        if found.is_clear and not found.holds:
            total = found
            break
        total += found
    if total.holds:
        return ""
    return (
        f"the image and the network's input do not show the same things at the same "
        f"places: {total.num_alike} of {total.num_tiles} parts fit where the test "
        "pipeline says"
    )


def _refusal(alignment: str, reason: str) -> str:
    return (
        f"alignment={alignment!r} cannot work with this test pipeline: {reason}; leave "
        "alignment=None, or use 'network', which draws on the network's own input"
    )
