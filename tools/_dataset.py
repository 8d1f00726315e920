"""The detector and the data set that a program looks at, and the arguments for it."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DATASETS, DefaultScope

from _common import ToolError
from _kept import digest, digest_of_weights
from mmyolo_vis_hooks.data.alignment import (
    PlacedImage,
    Placement,
    first_loaded,
    own_placement,
)
from mmyolo_vis_hooks.data.detections import class_names_of
from mmyolo_vis_hooks.data.pipeline import ImagePipeline
from mmyolo_vis_hooks.data.selector import ImageSelector, SelectedImage, leaf_datasets
from mmyolo_vis_hooks.detector import (
    build_detector,
    check_device,
    classes_and_palette,
    load_weights,
)
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth

logger = logging.getLogger("mmyolo_vis_hooks")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the config of the detector and its data set."""
    parser.add_argument(
        "config", help="config file, or mmyolo::FOLDER/FILE.py for one of MMYOLO's"
    )


def add_data_arguments(parser: argparse.ArgumentParser, out_dir: str) -> None:
    """Add which data set is looked at, where, and the folder of what is written."""
    parser.add_argument(
        "--split",
        choices=["val", "test"],
        default="val",
        help="whose data set is looked at (default: val)",
    )
    parser.add_argument(
        "--out-dir",
        default=out_dir,
        help=f"folder of what is written (default: {out_dir})",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where the network runs."""
    parser.add_argument(
        "--device",
        default="cuda:0" if torch.cuda.is_available() else "cpu",
        help="where the network runs: cuda:0 is the first GPU",
    )


def build_dataset(config: Config, split: str, option: str = "--split") -> Any:
    """The data set of a config's dataloader; the option is the one that names it."""
    loader = config.get(f"{split}_dataloader")
    if not loader:
        raise ToolError(f"{option} {split}: the config has no such dataloader")
    scope = DefaultScope.overwrite_default_scope(config.get("default_scope"))
    with scope, contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        return DATASETS.build(loader.dataset)


def warn_of_classes(dataset: Any, names: Sequence[str]) -> None:
    """Say which label is one class in the data set and another for the detector.

    MMDetection numbers the categories of a COCO file in the file's order, without those
    that it lacks, whatever ``metainfo`` says.
    """
    for leaf in leaf_datasets(dataset):
        meant = class_names_of(leaf.metainfo)
        # One that reads another format need not have numbers of categories.
        if isinstance(leaf, CocoDataset) and hasattr(leaf, "cat_ids"):
            content = load(leaf.ann_file, backend_args=leaf.backend_args)
            by_id = {own["id"]: own["name"] for own in content["categories"]}
            meant = tuple(by_id[own] for own in leaf.cat_ids)
        for label, (own, name) in enumerate(zip(meant, names)):
            if own != name:
                logger.warning(
                    f"label {label} is {own!r} in the data set and {name!r} for the "
                    "detector, whose names are shown: errors may be of other classes. "
                    "A data set must have the detector's classes in their order; of a "
                    "COCO file that is the order of its categories"
                )
                break


def objects_of(image: SelectedImage) -> GroundTruth:
    """The objects of an image of a data set that must have some."""
    if "instances" not in image.info:
        raise ToolError(
            f"the data set {type(image.dataset).__name__} has no annotated objects "
            f"(image {image.image_id}); --split val or --cfg-options name one"
        )
    return GroundTruth.of(image.info["instances"])


class DetectorOnDataset:
    """A detector with its weights, and the images of its data set, by their names."""

    def __init__(
        self,
        config: Config,
        checkpoint: str,
        *,
        split: str,
        device: str,
        channels: Sequence[int] | None = None,
    ) -> None:
        self._config, self._channels = config, channels
        self.detector = build_detector(config, check_device(device))
        dataset = build_dataset(config, split)
        images = ImageSelector(dataset, -1, None).images
        self.images = {image.image_id: image for image in images}
        metainfo = load_weights(self.detector, checkpoint)
        self.names, _ = classes_and_palette(metainfo, dataset.metainfo)
        warn_of_classes(dataset, self.names)
        self.truths = {name: objects_of(own) for name, own in self.images.items()}
        self._placements: dict[int, Placement] = {}

    def settings(self) -> dict[str, Any]:
        """What tells a call from one of other weights, settings or objects."""
        truths = self.truths.values()
        return dict(
            config=digest([repr(self._config.to_dict()).encode()]),
            weights=digest_of_weights(self.detector),
            objects=digest(part for truth in truths for part in truth.parts()),
        )

    def placed(self, name: str) -> PlacedImage:
        """Load an image as the evaluation does."""
        image = self.images[name]
        placement = self._placements.get(id(image.dataset))
        if placement is None:
            placement = self._placements[id(image.dataset)] = self._place(image.dataset)
        loaded = image.through(placement.pipeline.load)
        return PlacedImage(name, loaded, placement)

    def _place(self, dataset: Any) -> Placement:
        """Find out on its first images whether maps of a data set lie right."""
        pipeline = ImagePipeline(dataset.pipeline, channels=self._channels)
        own = [image for image in self.images.values() if image.dataset is dataset]
        loads = [partial(image.through, pipeline.load) for image in own]
        placement = own_placement(pipeline, first_loaded(loads), self.detector)
        if not placement.proven:
            self.on_unproven(placement.reason)
        return placement

    def on_unproven(self, reason: str) -> None:
        """Be told, once per data set, why maps would not lie right."""
