"""The Python API: a detector and an image in, results out.

>>> from mmyolo_vis_hooks import explain, feature_maps, load
>>> detector = load('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', 'weights.pth')
>>> result = explain(detector, 'cat.jpg', topk=5)
>>> result.save('out/')
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from logging import Logger
from pathlib import PurePath
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from .attribution.attribute import BoxAttributor
from .data.alignment import Placement, choose_alignment
from .data.pipeline import Loaded
from .data.samples import labels_of
from .data.selector import make_image_id, unique_name
from .declare import read_options, takes_options
from .detector import (
    build_detector,
    build_pipeline,
    check_device,
    classes_and_palette,
    load_weights,
    read_config,
    read_dataset,
    unwrap_detector,
)
from .errors import VisConfigError
from .network.layer_path import resolve_layers
from .network.state import frozen
from .options import BoxAMOptions, FeatMapOptions
from .results import Explanations, FeatureMaps, Gallery, Look
from .samples import BoxSampleMaker, SampleMaker

Image = Any
"""A path or address, ``(H, W, 3)`` RGB numbers, ``(H, W)`` grey ones, or of Pillow."""

logger = logging.getLogger("mmyolo_vis_hooks")

# Modes and hooks are the detector's, random states the process's: one look at a time.
_LOOKING = threading.RLock()


def load(
    config: str | os.PathLike | Config,
    checkpoint: str | os.PathLike,
    *,
    device: str | None = None,
) -> nn.Module:
    """Build a detector and load its weights.

    Args:
        config (str | Config): Path of a config, ``'mmyolo::FOLDER/FILE.py'`` or
            ``'mmdet::FOLDER/FILE.py'`` for one that a package brings, or a config.
        checkpoint (str): Path or address of its weights. Nothing in the file is run.
        device (str, optional): Such as ``'cuda:0'``. Defaults to None: the first GPU,
            or the processor where there is none.

    Returns:
        nn.Module: In eval mode, with the config as ``cfg`` and classes and palette as
        ``dataset_meta``, as of ``mmdet.apis.init_detector``.

    Raises:
        VisConfigError: If config or device cannot be used.
        CheckpointError: If the weights cannot be read or do not fit.
    """
    config = read_config(config)
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    detector = build_detector(config, check_device(device))
    metainfo = load_weights(detector, os.fspath(checkpoint))
    names, palette = classes_and_palette(metainfo, read_dataset(config).metainfo)
    detector.cfg = config
    detector.dataset_meta = dict(classes=names, palette=palette)  # type: ignore
    return detector


@takes_options(BoxAMOptions)
def explain(
    detector: nn.Module,
    images: Image | Sequence[Image],
    *,
    layers: Sequence[str] | str | None = None,
    config: str | os.PathLike | Config | None = None,
    **options: Any,
) -> Any:
    """Explain the detections of an image, or of several.

    The detector is afterwards what it was, also in the middle of a training: modes,
    weights, buffers, gradients and random states. It runs where its parameters are.

    Args:
        detector (nn.Module): As of :func:`load` or ``mmdet.apis.init_detector``, or
            any detector of OpenMMLab; wrappers are taken off.
        images: A path or address, read by the loading steps of the config's test
            pipeline; ``(H, W, 3)`` RGB numbers, ``(H, W)`` grey ones, or an image of
            Pillow, which enter after these steps; or a list of them.
        layers (Sequence[str] | str, optional): Short for ``target_layers``.
        config (str | Config, optional): Config of the detector. Defaults to None: its
            ``cfg``.
        {options}

    Returns:
        Explanations: With one :class:`Explanation` per box; of several images a
        :class:`Gallery` of them.

    Raises:
        VisConfigError: If an option has a value that cannot work, or does not fit the
            detector or its pipeline.
        VisError: If an image cannot be read, or its detections cannot be explained.
    """
    (given,) = read_options("explain", _with_layers(options, layers), BoxAMOptions)

    def make(detector: nn.Module, class_names: Sequence[str]) -> SampleMaker:
        mapper = make_box_mapper(detector, given, class_names, logger)
        return BoxSampleMaker(detector, mapper, channels=given.image_channels)

    return _look(detector, images, config, given, make, Explanations)


@takes_options(FeatMapOptions)
def feature_maps(
    detector: nn.Module,
    images: Image | Sequence[Image],
    *,
    layers: Sequence[str] | str | None = None,
    config: str | os.PathLike | Config | None = None,
    **options: Any,
) -> Any:
    """Record what layers put out for an image, or for several.

    Args:
        detector (nn.Module): As for :func:`explain`.
        images: As for :func:`explain`.
        layers (Sequence[str] | str, optional): Short for ``target_layers``.
        config (str | Config, optional): As for :func:`explain`.
        {options}

    Returns:
        FeatureMaps: With one :class:`FeatureMap` per map; of several images a
        :class:`Gallery` of them.

    Raises:
        VisConfigError, VisError: As of :func:`explain`.
    """
    (given,) = read_options(
        "feature_maps", _with_layers(options, layers), FeatMapOptions
    )

    def make(detector: nn.Module, class_names: Sequence[str]) -> SampleMaker:
        targets = resolve_layers(detector, given.target_layers)
        return SampleMaker(detector, targets, channels=given.image_channels)

    return _look(detector, images, config, given, make, FeatureMaps)


def _with_layers(options: dict[str, Any], layers: Any) -> dict[str, Any]:
    if layers is None:
        return options
    if "target_layers" in options:
        raise VisConfigError(
            f"layers={layers!r} and target_layers={options['target_layers']!r} cannot "
            "work together: they are one option; leave one of them out"
        )
    return {**options, "target_layers": layers}


def _look(
    detector: nn.Module,
    images: Any,
    config: Any,
    options: Any,
    make: Callable[[nn.Module, Sequence[str]], SampleMaker],
    kind: Callable[[Any, Look], Any],
) -> Any:
    detector = unwrap_detector(detector)
    _check_parameters(detector)
    config = _config_of(detector, config)
    info = read_dataset(config)
    meta: Any = getattr(detector, "dataset_meta", None) or {}
    names, palette = classes_and_palette(meta, info.metainfo)
    maker = make(detector, names)
    pipeline = build_pipeline(config, info, channels=options.image_channels)
    several = isinstance(images, (list, tuple, Iterator))
    given = list(images) if several else [images]
    paths = [_path_of(image) for image in given]
    results: list[Any] = []
    taken: set[str] = set()
    placement: Placement | None = None

    def load(number: int) -> Loaded:
        return pipeline.load(given[number], img_id=number, img_path=paths[number])

    with _LOOKING, frozen(detector, parameters=False):
        for number, path in enumerate(paths):
            loaded = load(number)
            if placement is None:
                first = chain([loaded], map(load, range(1, len(given))))
                placement = choose_alignment(
                    options.alignment, pipeline, first, detector, info
                )
                if placement.reason:
                    logger.warning(
                        "drawn on the network's own input, as alignment='network' "
                        f"does: {placement.reason}"
                    )
            stem = PurePath(path).stem if path else f"image_{number}"
            image_id = unique_name(make_image_id(stem, None, number), taken)
            sample = maker.run(image_id, loaded, placement)
            results.append(kind(sample, Look(options, names, palette)))
    return Gallery(results) if several else results[0]


def _check_parameters(detector: nn.Module) -> None:
    parameters = list(detector.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise VisConfigError(
            f"the parameters of this {type(detector).__name__} cannot take part in "
            "gradients: they were made under torch.inference_mode(); build and load "
            "the detector outside of it"
        )
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if dtypes and torch.float32 not in dtypes:
        raise VisConfigError(
            f"a {type(detector).__name__} of {dtypes.pop()} cannot work: images are "
            "given to it as torch.float32; use detector.float()"
        )


def _path_of(image: Image) -> str | None:
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return getattr(image, "filename", None) or None  # of Pillow


def _config_of(detector: nn.Module, config: Any) -> Config:
    if config is not None:
        return read_config(config)
    own = getattr(detector, "cfg", None)
    if not isinstance(own, Mapping) and not isinstance(own, Config):
        raise VisConfigError(
            f"config=None cannot work: {type(detector).__name__} carries no config; "
            "give the config that it was built from, or a detector made by "
            "mmyolo_vis_hooks.load or mmdet.apis.init_detector"
        )
    return own if isinstance(own, Config) else Config(own)


def make_box_mapper(
    detector: nn.Module,
    options: BoxAMOptions,
    class_names: Sequence[str],
    logger: Logger,
    *,
    show_progress: bool = False,
) -> BoxAttributor:
    """Make what explains the boxes of a detector without wrappers.

    Args:
        detector (nn.Module): The detector.
        options (BoxAMOptions): What is explained and how.
        class_names (Sequence[str]): Names that ``options.classes`` may use.
        logger (Logger): Told what a user should know.
        show_progress (bool): Show a bar while masks or channels are tried.

    Raises:
        VisError: If the options do not fit the detector or the classes.
    """
    wanted: Any = options.classes
    return BoxAttributor(
        detector,
        options,
        labels=None if wanted is None else labels_of(wanted, class_names),
        logger=logger,
        show_progress=show_progress,
    )
