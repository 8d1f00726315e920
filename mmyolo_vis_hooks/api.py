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
from pathlib import PurePath
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from .data.alignment import (
    PlacedImage,
    Placement,
    choose_alignment,
    own_placement,
)
from .data.pipeline import Loaded
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
from .diagnosis.diagnose import Diagnoser
from .diagnosis.matching import GroundTruth
from .errors import VisConfigError
from .network.state import frozen
from .options import BoxAMOptions, DiagnosisOptions, FeatMapOptions
from .results import Explanations, FeatureMaps, Gallery
from .samples import make_sample_maker

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
    metainfo = load_weights(detector, checkpoint)
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
    scene = _Scene(detector, images, config, given.image_channels)
    return _look(scene, given, Explanations)


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
    scene = _Scene(detector, images, config, given.image_channels)
    return _look(scene, given, FeatureMaps)


@takes_options(DiagnosisOptions)
def diagnose(
    detector: nn.Module,
    images: Image | Sequence[Image],
    ground_truth: Any,
    *,
    config: str | os.PathLike | Config | None = None,
    **options: Any,
) -> Any:
    """Say which objects a detector missed, which it invented, and why.

    The detector runs on the config's own test pipeline, as when it is evaluated, and a
    second time with its threshold, limits and NMS opened, for the candidates. It is
    afterwards what it was, as of :func:`explain`.

    Args:
        detector (nn.Module): As of :func:`explain`.
        images: As of :func:`explain`.
        ground_truth: Objects of the image, in its own pixels: ``instances`` of a data
            set (``dataset.get_data_info(i)['instances']``), or a mapping with
            ``boxes_xyxy`` ``(M, 4)``, ``labels`` ``(M,)`` and, if need be, ``ignored``
            ``(M,)``. Of several images a list with one of these for each.
        config (str | Config, optional): As of :func:`explain`.
        {options}

    Returns:
        Diagnosis: Of several images a list of them.

    Raises:
        VisConfigError: If an option or the ground truth cannot be used.
        VisError: If an image cannot be read.
    """
    (given,) = read_options("diagnose", options, DiagnosisOptions)
    scene = _Scene(detector, images, config, given.image_channels)
    each = ground_truth if scene.several else [ground_truth]
    if not isinstance(each, (list, tuple)):
        raise VisConfigError(
            f"ground_truth={type(each).__name__} cannot work with several images: give "
            "a list, with the objects of each"
        )
    if len(each) != len(scene.paths):
        raise VisConfigError(
            f"ground_truth has {len(each)} entries for {len(scene.paths)} images: give "
            "one for each"
        )
    truths = [GroundTruth.of(truth) for truth in each]
    for truth in truths:
        truth.check(len(scene.class_names))
    diagnoser = Diagnoser(scene.detector, given, scene.class_names, logger)

    def place(loaded: Iterator[Loaded]) -> Placement:
        return own_placement(scene.pipeline, loaded, scene.detector)

    with _LOOKING, frozen(scene.detector):
        placed = zip(scene.placed(place), truths)
        looks = (diagnoser.look(image, truth) for image, truth in placed)
        results = list(map(diagnoser.diagnose, looks))
    return results if scene.several else results[0]


def _with_layers(options: dict[str, Any], layers: Any) -> dict[str, Any]:
    if layers is None:
        return options
    if "target_layers" in options:
        raise VisConfigError(
            f"layers={layers!r} and target_layers={options['target_layers']!r} cannot "
            "work together: they are one option; leave one of them out"
        )
    return {**options, "target_layers": layers}


class _Scene:
    """A detector that was given, and the images that it shall look at."""

    def __init__(
        self,
        detector: nn.Module,
        images: Any,
        config: Any,
        channels: Sequence[int] | None,
    ) -> None:
        if not isinstance(detector, nn.Module):
            raise VisConfigError(
                f"detector={type(detector).__name__} is no detector: use load(config, "
                "checkpoint), or a torch.nn.Module of your own"
            )
        self.detector = unwrap_detector(detector)
        _check_parameters(self.detector)
        config = _config_of(self.detector, config)
        self.info = read_dataset(config)
        meta: Any = getattr(self.detector, "dataset_meta", None) or {}
        self.class_names, self.palette = classes_and_palette(meta, self.info.metainfo)
        self.pipeline = build_pipeline(config, self.info, channels=channels)
        # An open file is an iterator of its lines.
        is_iterator = isinstance(images, Iterator) and not hasattr(images, "read")
        self.several = isinstance(images, (list, tuple)) or is_iterator
        self._images = list(images) if self.several else [images]
        self.paths = [_path_of(image) for image in self._images]

    def placed(
        self, place: Callable[[Iterator[Loaded]], Placement]
    ) -> Iterator[PlacedImage]:
        """Name, content and placement of each image; ``place`` is given all of them."""
        taken: set[str] = set()
        placement: Placement | None = None
        for number, path in enumerate(self.paths):
            loaded = self._load(number)
            if placement is None:
                others = map(self._load, range(1, len(self.paths)))
                placement = place(chain([loaded], others))
            stem = PurePath(path).stem if path else f"image_{number}"
            name = unique_name(make_image_id(stem, None, number), taken)
            yield PlacedImage(name, loaded, placement)

    def _load(self, number: int) -> Loaded:
        return self.pipeline.load(
            self._images[number], img_id=number, img_path=self.paths[number]
        )


def _look(
    scene: _Scene,
    options: Any,
    kind: type[Explanations] | type[FeatureMaps],
) -> Any:
    maker = make_sample_maker(scene.detector, options, scene.class_names, logger)
    panel: Any = kind.panel_kind(options, scene.class_names, scene.palette)

    def place(loaded: Iterator[Loaded]) -> Placement:
        placement = choose_alignment(
            options.alignment, scene.pipeline, loaded, scene.detector, scene.info
        )
        if placement.reason:
            logger.warning(
                "drawn on the network's own input, as alignment='network' does: "
                f"{placement.reason}"
            )
        return placement

    with _LOOKING, frozen(scene.detector):
        results = [kind(maker.run(image), panel) for image in scene.placed(place)]
    return Gallery(results) if scene.several else results[0]


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
