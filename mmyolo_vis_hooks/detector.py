"""Builds a detector, its weights and its test pipeline from a config."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hub import get_config
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from .checkpoint import check_fit, weights_of
from .data.detections import class_names_of, palette_of
from .data.pipeline import ImagePipeline
from .declare import refuse
from .errors import CheckpointError, VisConfigError, one_line


@dataclass(frozen=True)
class DatasetInfo:
    """What a config's test data set says without its annotations.

    Attributes:
        metainfo: Classes and palette, as of MMDetection's data sets.
        pipeline: Steps of the test pipeline, as in the config.
        batch_shapes_cfg: MMYOLO's batch shapes, which name the network's stride.
    """

    metainfo: Mapping[str, Any]
    pipeline: Sequence[Any]
    batch_shapes_cfg: Mapping[str, Any] | None


@contextlib.contextmanager
def default_scope(config: Config) -> Iterator[None]:
    """Look names up in the registries of the config's ``default_scope``."""
    with DefaultScope.overwrite_default_scope(config.get("default_scope", "mmdet")):
        yield


@contextlib.contextmanager
def _building(what: str, config: Config) -> Iterator[None]:
    try:
        with default_scope(config):
            yield
    except (KeyError, TypeError, AttributeError, ImportError, AssertionError) as error:
        raise VisConfigError(
            f"{what} cannot be built: {one_line(error)}; mend the config, or install "
            "the package that it needs"
        ) from error


def read_dataset(config: Config) -> DatasetInfo:
    """Find the test pipeline and the classes of a config; no file is read.

    The pipeline is that of the innermost data set of ``test_dataloader``, of
    ``val_dataloader`` where there is none, or else ``test_pipeline``.

    Raises:
        VisConfigError: If the config has none of them.
    """
    for name in ("test_dataloader", "val_dataloader"):
        dataset = _innermost(config.get(name) or {})
        pipeline = dataset.get("pipeline")
        if pipeline:
            return DatasetInfo(
                _metainfo_of(config, dataset), pipeline, dataset.get("batch_shapes_cfg")
            )
    pipeline = config.get("test_pipeline")
    if not pipeline:
        raise VisConfigError(
            "the config has no test pipeline, neither in test_dataloader nor in "
            "val_dataloader nor as test_pipeline, so it does not say how an image "
            "becomes the detector's input; add test_dataloader=dict(dataset=dict("
            "pipeline=[...]))"
        )
    return DatasetInfo({}, pipeline, None)


def _innermost(dataset: Any) -> Mapping[str, Any]:
    while isinstance(dataset, Mapping) and (
        "dataset" in dataset or "datasets" in dataset
    ):
        parts = dataset.get("datasets")
        dataset = parts[0] if parts else dataset.get("dataset")
    return dataset if isinstance(dataset, Mapping) else {}


def _metainfo_of(config: Config, dataset: Mapping[str, Any]) -> dict[str, Any]:
    known = dataset.get("type")
    if isinstance(known, str):
        # Unlike build(), get() of the root registry does not look into the scope.
        with (
            default_scope(config),
            DATASETS.switch_scope_and_registry(None) as registry,
        ):
            known = registry.get(known)
    return {**getattr(known, "METAINFO", {}), **(dataset.get("metainfo") or {})}


def build_pipeline(
    config: Config, info: DatasetInfo, *, channels: Sequence[int] | None = None
) -> ImagePipeline:
    """Build the test pipeline for images that belong to no data set.

    It takes files and decoded images; annotations are not loaded. ``channels`` are
    those that a picture shows.

    Raises:
        VisConfigError: If the config has a step that cannot be built.
    """
    with _building("the test pipeline", config):
        steps = Compose(list(info.pipeline))
    return ImagePipeline(steps, channels=channels, annotations=False)


def check_device(device: torch.device | str) -> torch.device:
    """The device of a name such as ``'cuda:0'``.

    Raises:
        VisConfigError: If it is not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise VisConfigError(
            f"device={device!r} is no device; use 'cpu' or 'cuda:0'"
        ) from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            there = ", ".join(f"cuda:{i}" for i in range(count)) or "no CUDA device"
            raise VisConfigError(
                f"device={device!r} is not there: this machine has {there}; use "
                + ("one of them" if count else "'cpu'")
            )
    else:
        try:
            torch.empty(1, device=found).cpu()  # 'meta' has no values
        except (RuntimeError, AssertionError, ImportError) as error:
            raise VisConfigError(
                f"device={device!r} is not there: this torch has none; use 'cpu'"
            ) from error
    return found


def read_config(config: Config | str | os.PathLike) -> Config:
    """Read a config file, or one that a package brings: ``mmyolo::yolov5/....py``.

    A Config is given back as it is.

    Raises:
        VisConfigError: If there is no such config, or it cannot be read.
    """
    if isinstance(config, Config):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise refuse("config", config, "give the path of a config, or a Config")
    name = os.fspath(config)
    is_file = os.path.isfile(name)
    if not is_file and "::" not in name:
        raise VisConfigError(f"there is no config file {name}")
    try:
        return Config.fromfile(name) if is_file else get_config(name)
    except AssertionError as error:  # MMEngine's answer for such a package
        raise VisConfigError(
            f"the config {name} cannot be read: {error}; after '::' comes a path in "
            "the configs of an installed package, as in mmyolo::yolov8/FILE.py"
        ) from error
    except Exception as error:  # a config is a program and may fail in any way
        raise VisConfigError(
            f"the config {name} cannot be read: {one_line(error)}"
        ) from error


def build_detector(
    config: Config | str | os.PathLike, device: torch.device | str
) -> nn.Module:
    """Build the detector of a config, without weights, in eval mode.

    Raises:
        VisConfigError: If the config describes no model, or the device is not there.
    """
    config, device = read_config(config), check_device(device)
    if not isinstance(config.get("model"), Mapping):
        raise VisConfigError(
            "the config has no model=dict(type=...); give the config of a detector"
        )
    with _building(f"model={config.model.get('type')!r}", config):
        detector = MODELS.build(config.model)
    if device.type == "cpu":
        detector = revert_sync_batchnorm(detector)
    return detector.to(device).eval()


def load_weights(
    detector: nn.Module, checkpoint: str | os.PathLike
) -> Mapping[str, Any]:
    """Load a checkpoint; a warning counts what the detector does not get from it.

    Returns:
        Mapping: The classes and the palette that the checkpoint names; may be empty.

    Raises:
        CheckpointError: If it cannot be read, or no weight of it fits.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise refuse("checkpoint", checkpoint, "give the path or address of weights")
    source = os.fspath(checkpoint)
    try:
        loaded = CheckpointLoader.load_checkpoint(
            source, map_location="cpu", logger="silent"
        )
    except CheckpointError:
        raise
    except OSError as error:  # of MMEngine's own loaders, under torch < 2.6
        raise CheckpointError(
            f"the checkpoint {source} cannot be read: {error}"
        ) from error
    weights, own = weights_of(loaded, source), detector.state_dict()
    fitting: OrderedDict[str, Any] = OrderedDict(
        (key, value)
        for key, value in weights.items()
        if key not in own or own[key].shape == value.shape
    )
    # With the versions of the modules: some rename what seems to be older.
    versions = getattr(loaded.get("state_dict", loaded), "_metadata", None)
    if isinstance(versions, Mapping):
        fitting._metadata = {  # type: ignore[attr-defined]
            f"{key}.".removeprefix("module.")[:-1]: value
            for key, value in versions.items()
        }
    try:
        result = detector.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{source} does not fit the detector: {one_line(error)}"
        ) from error
    check_fit(own, weights, source, result.missing_keys, result.unexpected_keys)
    meta = _mapping(loaded.get("meta"))
    dataset_meta = _mapping(meta.get("dataset_meta"))
    if not dataset_meta and meta.get("CLASSES"):
        dataset_meta = {"classes": meta["CLASSES"], "palette": meta.get("PALETTE")}
    return {str(key).lower(): value for key, value in dataset_meta.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def classes_and_palette(
    *metainfos: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[int, ...]] | None]:
    """Class names and colours of the first of some metainfos that names classes."""
    for metainfo in metainfos:
        names = class_names_of(metainfo)
        if names:
            return names, palette_of(metainfo)
    return (), None


def unwrap_detector(model: nn.Module) -> nn.Module:
    """The detector inside distributed and test-time-augmentation wrappers."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = cast(nn.Module, model.module)
    return model
