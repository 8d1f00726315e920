"""What the programs share that look for the errors of a whole data set."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from mmengine.config import Config

from _common import ToolError, add_cfg_options, check_checkpoint, read_merged
from _dataset import DetectorOnDataset, add_data_arguments
from _kept import Kept, progress
from mmyolo_vis_hooks.declare import add_arguments, options_from
from mmyolo_vis_hooks.diagnosis.compare import Change
from mmyolo_vis_hooks.diagnosis.diagnose import Diagnoser
from mmyolo_vis_hooks.diagnosis.export import ImageFile
from mmyolo_vis_hooks.diagnosis.report import ErrorRecord, ErrorReport, ImageErrors
from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.options import DiagnosisOptions
from mmyolo_vis_hooks.publish.errors_page import PageImages

logger = logging.getLogger("mmyolo_vis_hooks")


def add_shared_arguments(parser: argparse.ArgumentParser, out_dir: str) -> None:
    """Add the arguments that these programs have alike."""
    add_data_arguments(parser, out_dir)
    parser.add_argument(
        "--num-pictures",
        type=int,
        default=100,
        help="maps and pictures of so many images, those that lose most; -1 all "
        "(default: 100)",
    )
    add_arguments(parser, DiagnosisOptions)
    add_cfg_options(parser)


def read_checked(
    args: argparse.Namespace, name: str, checkpoint: str, option: str
) -> Config:
    """Read a config, and make sure that its checkpoint is there."""
    if args.num_pictures < -1:
        raise ToolError(f"--num-pictures {args.num_pictures}: use 0 or more, or -1")
    check_checkpoint(checkpoint, option)
    return read_merged(name, args)


def check_classes(names_a: Sequence[str], names_b: Sequence[str]) -> None:
    """Make sure that two detectors have the same classes."""
    for label, (own, other) in enumerate(zip_longest(names_a, names_b)):
        if own != other:
            raise ToolError(
                f"class {label} is {own or 'none'} of A and {other or 'none'} of B; "
                "compare checkpoints of the same classes in the same order"
            )


class Errors(DetectorOnDataset):
    """Looks at the images of a data set with one checkpoint."""

    def __init__(
        self, args: argparse.Namespace, config: Config, checkpoint: str
    ) -> None:
        self.options = options_from(args, DiagnosisOptions)
        super().__init__(
            config,
            checkpoint,
            split=args.split,
            device=args.device,
            channels=self.options.image_channels,
        )
        self.num_objects: Counter[int] = Counter()
        for truth in self.truths.values():
            self.num_objects.update(truth.labels[~truth.ignored].tolist())
        self.thresholds = {
            "score_thr": self.options.score_thr,
            "iou_thr": self.options.iou_thr,
        }
        self._diagnoser = Diagnoser(self.detector, self.options, self.names, logger)

    def settings(self) -> dict[str, Any]:
        """Those of all programs, and the thresholds."""
        return {**super().settings(), **self.thresholds}

    def on_unproven(self, reason: str) -> None:
        """Warn: errors are counted all the same."""
        logger.warning(f"no maps will be drawn: {reason}")

    @property
    def files(self) -> dict[str, ImageFile]:
        """Where the images come from, with the data set's own numbers if it has any."""
        ids = [image.img_id for image in self.images.values()]
        if len(set(ids)) < len(ids) or not all(isinstance(own, int) for own in ids):
            ids = list(range(1, len(ids) + 1))
        return {
            name: ImageFile(number, str(image.img_path or name))
            for number, (name, image) in zip(ids, self.images.items())
        }

    @property
    def category_ids(self) -> dict[str, int]:
        """Numbers of the classes: those of COCO's file if there is one, else from 1."""
        first = next(iter(self.images.values()), None)
        ids = getattr(first and first.dataset, "cat_ids", None)
        return dict(zip(self.names, ids or range(1, len(self.names) + 1)))

    def key(self, name: str) -> str:
        """What the maps of an image are kept under."""
        return f"{name}, {self.options.topk} maps"

    def diagnose(self, name: str, *, maps: bool) -> Diagnosis:
        """Look at one image."""
        look = self._diagnoser.look(self.placed(name), self.truths[name])
        return self._diagnoser.diagnose(look, maps=maps)

    def look(
        self,
        kept: Kept,
        shown: PageImages,
        *,
        every: bool = False,
        what: str = "images",
    ) -> list[ImageErrors]:
        """Diagnose the images that an earlier call did not come to.

        What a page needs is written: the images that have errors, or every one.
        """
        for name in progress((n for n in self.images if n not in kept), what):
            diagnosis = self.diagnose(name, maps=False)
            if every or diagnosis.missed or diagnosis.false_positives:
                shown.write_image(name, diagnosis.image_rgb)
            kept.add(name, asdict(ImageErrors.of(diagnosis)))
        return [ImageErrors.from_dict(kept.known[name]) for name in self.images]

    def report(self, found: Iterable[ImageErrors]) -> ErrorReport:
        """Add up what was found."""
        report = ErrorReport(self.names, self.num_objects, **self.thresholds)
        for own in found:
            report.add(own, self.truths[own.image])
        return report


def commonest(records: Iterable[ErrorRecord | Change]) -> list[str]:
    """Names of the classes of records, the commonest first."""
    return [name for name, _ in Counter(r.class_name for r in records).most_common()]
