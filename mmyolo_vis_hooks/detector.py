"""Builds a detector, its weights and its test pipeline from a config."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from .checkpoint import CheckpointError
from .data.pipeline import (
    build_resize_only_pipeline,
    flatten_steps,
    network_divisor,
    network_stride,
)
from .data.samples import class_names_of, palette_of
from .errors import VisConfigError

_MAX_KEYS = 4
# Buffers without which a network gives nonsense.
_NORM_STATISTICS = ("running_mean", "running_var")


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


def read_dataset(config: Config) -> DatasetInfo:
    """Find the test pipeline and the classes of a config; no file is read.

    Args:
        config (Config): Of a detector. The pipeline is that of the innermost
            data set of ``test_dataloader``, of ``val_dataloader`` where there is
            none, or else ``test_pipeline``.

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
    config: Config, info: DatasetInfo, detector: nn.Module, alignment: str
) -> Compose:
    """Build the test pipeline for images that are decoded already.

    Args:
        config (Config): Of the detector.
        info (DatasetInfo): What :func:`read_dataset` found.
        detector (nn.Module): The detector.
        alignment (str): ``'resize'`` gives its Resize-only version; the other ways
            keep its geometry.

    Returns:
        Compose: Takes ``dict(img=(H, W, 3) uint8 BGR, img_id=..., img_path=...)``.

    Raises:
        VisConfigError: If no step of the pipeline loads an image.
        UnsupportedPipelineError: If a step may move pixels in an unknown way.
    """
    with default_scope(config):
        steps = flatten_steps(Compose(list(info.pipeline)))
        loaders = [step for step in steps if _name(step).startswith("LoadImage")]
        if not loaders:
            raise VisConfigError(
                "the test pipeline has no step that loads an image, such as "
                f"LoadImageFromFile, but {', '.join(map(_name, steps)) or 'no step'}"
            )
        from mmdet.datasets.transforms import LoadImageFromNDArray

        decoded = LoadImageFromNDArray(
            to_float32=bool(getattr(loaders[0], "to_float32", False))
        )
    kept = [decoded]
    for step in steps[steps.index(loaders[0]) + 1 :]:
        # There are no annotations, and some loaders insist on their files.
        if not (_name(step).startswith("Load") and "Proposals" not in _name(step)):
            kept.append(step)
    pipeline = Compose(kept)
    if alignment != "resize":
        return pipeline
    return build_resize_only_pipeline(
        pipeline,
        divisor=network_divisor(detector),
        stride=network_stride(detector, info),
    )


def _name(step: Any) -> str:
    return type(step).__name__


def check_device(device: str) -> torch.device:
    """Make sure that a device is there.

    Args:
        device (str): As for :class:`torch.device`, such as ``'cuda:0'``.

    Raises:
        VisConfigError: If it is not.
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
    return found


def build_detector(config: Config, device: torch.device) -> nn.Module:
    """Build the detector of a config, without weights, in eval mode.

    Args:
        config (Config): Of a detector.
        device (torch.device): Where it will run.

    Raises:
        VisConfigError: If the config describes no model.
    """
    if not isinstance(config.get("model"), Mapping):
        raise VisConfigError(
            "the config has no model=dict(type=...); give the config of a detector"
        )
    try:
        with default_scope(config):
            detector = MODELS.build(config.model)
    except (KeyError, TypeError, AttributeError, ImportError) as error:
        raise VisConfigError(
            f"model={config.model.get('type')!r} cannot be built: {error}; mend the "
            "config, or install the package that it needs"
        ) from error
    if device.type == "cpu":
        detector = revert_sync_batchnorm(detector)
    return detector.to(device).eval()


def load_weights(detector: nn.Module, checkpoint: str) -> Mapping[str, Any]:
    """Load a checkpoint, which must hold every parameter of the detector.

    Args:
        detector (nn.Module): The detector.
        checkpoint (str): Path or URL.

    Returns:
        Mapping: The classes and the palette that the checkpoint names; may be empty.

    Raises:
        CheckpointError: If it is of another architecture; names the keys.
    """
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{checkpoint} holds a {type(loaded).__name__}, no weights"
        )
    saved = loaded.get("state_dict", loaded)
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"{checkpoint} has a {type(saved).__name__} as state_dict, no weights"
        )
    weights: OrderedDict[str, Any] = OrderedDict(
        (_bare(key), value)
        for key, value in saved.items()
        if isinstance(value, torch.Tensor)
    )
    # With the versions of the modules: some rename what seems to be older.
    versions = getattr(saved, "_metadata", None)
    if isinstance(versions, Mapping):
        weights._metadata = {  # type: ignore[attr-defined]
            _bare(f"{key}.")[:-1]: value for key, value in versions.items()
        }
    own = detector.state_dict()
    wrong = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    parameters = {name for name, _ in detector.named_parameters()}
    try:
        result = detector.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} is of another architecture than the config: other shapes "
            f"of {_some(wrong) or error}; give the config that it was trained with"
        ) from error
    missing = [
        key
        for key in result.missing_keys
        if key in parameters or key.endswith(_NORM_STATISTICS)
    ]
    unknown = [k for k in result.unexpected_keys if not k.startswith("data_preproc")]
    if missing:
        unknown_to_it = f", and has {_some(unknown)} instead" if unknown else ""
        raise CheckpointError(
            f"{checkpoint} is of another architecture than the config: it lacks "
            f"{len(missing)} of {len(own)} weights, {_some(missing)}"
            f"{unknown_to_it}; give the config that it was trained with"
        )
    if unknown:
        print_log(
            f"{checkpoint}: {len(unknown)} weights belong to no part of the detector: "
            f"{_some(unknown)}",
            logger="current",
            level=30,
        )
    meta = loaded.get("meta") or {}
    dataset_meta = meta.get("dataset_meta") or {}
    if not dataset_meta and meta.get("CLASSES"):
        dataset_meta = {"classes": meta["CLASSES"], "palette": meta.get("PALETTE")}
    return {str(key).lower(): value for key, value in dataset_meta.items()}


def _bare(key: str) -> str:
    return key[len("module.") :] if key.startswith("module.") else key


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_MAX_KEYS])
    return shown + (
        f" and {len(keys) - _MAX_KEYS} more" if len(keys) > _MAX_KEYS else ""
    )


def classes_and_palette(
    *metainfos: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[int, ...]] | None]:
    """Class names and colours of the first of some metainfos that names classes."""
    for metainfo in metainfos:
        names = class_names_of(metainfo)
        if names:
            return names, palette_of(metainfo)
    return (), None
