"""Every option of the hooks, the programs and the Python API, declared once.

Constructors, command lines and the tables in the documents are made of these fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .attribution.evidence import BASELINES
from .attribution.methods import METHODS, validate
from .attribution.saliency import FUSIONS
from .attribution.targets import TARGETS
from .checks import (
    checked_by,
    choice,
    class_list,
    count,
    flag,
    grid,
    indices,
    layers,
    map_limit,
    metric_list,
    number,
    optional,
    tag,
)
from .data.alignment import ALIGNMENTS
from .declare import Options, option
from .errors import ErrorPolicy, VisConfigError
from .featmap import CHANNEL_REDUCTIONS
from .metrics.metric import METRICS
from .render.heatmap import colormap_lut

SCOPES = ("box", "class", "image")

_SHARE = number("use 0 to 1")
_COLORMAP = checked_by(colormap_lut)
_COLORMAP_HELP = "any name of OpenCV or matplotlib"


@dataclass(frozen=True)
class _Shown(Options):
    image_channels: Sequence[int] | None = option(
        None,
        optional(indices("name three channels, counted from 0, as R, G and B", 3)),
        "of an image with more than three channels those that are shown as red, "
        "green and blue; `None` takes the first three",
        nargs=3,
        type=int,
    )


@dataclass(frozen=True)
class _Seen(_Shown):
    score_thr: float = option(
        0.3, number("use 0 to 1; 1 draws no box"), "boxes with a higher score are drawn"
    )
    alignment: str | None = option(
        None,
        optional(choice(ALIGNMENTS)),
        "what the network looks at: `'resize'`, the image scaled so that it needs no "
        "padding; `'letterbox'`, the pipeline's own input, with the maps put back to "
        "the image; `'network'`, the same, drawn on the padded input; `None` takes "
        "`'resize'` where it can be had, else `'network'`",
        choices=ALIGNMENTS,
    )


@dataclass(frozen=True)
class FeatMapOptions(_Seen):
    """What is drawn of a detector's feature maps."""

    target_layers: Sequence[str] | str = option(
        ("backbone", "neck"),
        layers("give at least one module path, such as 'backbone' or 'neck'"),
        "module paths such as `'backbone'`, `'backbone.stage4'` or "
        "`'neck.out_layers[2]'`; each map of a layer that gives several is shown",
        nargs="+",
    )
    channel_reduction: str | None = option(
        "squeeze_mean",
        choice((*CHANNEL_REDUCTIONS, None)),
        "`'squeeze_mean'` averages the channels, `'select_max'` takes the one with "
        "the largest sum, `None` shows the `topk` channels with the largest sums",
        choices=(*CHANNEL_REDUCTIONS, None),
        type=lambda text: None if text == "None" else text,
    )
    topk: int = option(
        4,
        count("use a positive number of channels, or -1", special=-1),
        "how many channels for `None`; `-1` draws a map of 1 or 3 channels as a "
        "picture",
    )
    arrangement: Sequence[int] = option(
        (2, 2),
        grid,
        "rows and columns of those channels",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
    )
    alpha: float = option(0.5, _SHARE, "share of the heat map in the blend")
    colormap: str | int = option("jet", _COLORMAP, _COLORMAP_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.arrangement
        if self.channel_reduction is None and self.topk > rows * columns:
            raise VisConfigError(
                f"topk={self.topk} tiles do not fit arrangement={self.arrangement}, "
                f"which has {rows * columns} places; set a larger arrangement such as "
                f"({rows}, {-(-self.topk // rows)}), or topk={rows * columns}"
            )


@dataclass(frozen=True)
class BoxAMOptions(_Seen):
    """What is explained of a detector's boxes, and how it is drawn."""

    method: str = option(
        "boxam",
        checked_by(validate),
        "how a map is made: " + ", ".join(f"`{name!r}`" for name in METHODS),
        metavar="METHOD",
    )
    target: str = option(
        "score",
        choice(TARGETS),
        "what is explained: the final `'score'`, the raw class `'logit'`, the raw "
        "`'objectness'` (centerness counts), the mean raw score inside the predicted "
        "`'mask'`, or a side `'x1'`, `'y1'`, `'x2'`, `'y2'` of the box",
        metavar="TARGET",
    )
    target_layers: Sequence[str] | str | None = option(
        None,
        optional(layers("give module paths, or None for the layer that made a box")),
        "module paths; `None` takes for each box the map on which it was decided",
        nargs="+",
    )
    scope: str = option(
        "box",
        choice(SCOPES),
        "panels per `'box'` or per `'class'`; `'image'` draws only the joint map",
        choices=SCOPES,
    )
    fusion: str = option(
        "sum",
        choice(FUSIONS),
        "how maps of several layers become one: "
        + ", ".join(f"`{f!r}`" for f in FUSIONS),
        choices=FUSIONS,
    )
    normalize_layers: bool = option(
        False, flag, "divide each layer's map by its maximum first"
    )
    smooth: float | None = option(
        None,
        optional(number("use a share of the box's size, 0 (not smoothed) to 1")),
        "sigma of a Gaussian over the map, in units of the square root of the box's "
        "area; `None` takes the method's own: 0.1 for `'boxam'`, 0.05 for "
        "`'evidence'`, 0 for the others",
        type=float,
    )
    norm_in_bbox: bool = option(
        False, flag, "show and normalise a map inside its box only"
    )
    eigen_smooth: bool = option(
        False,
        flag,
        "first principal component of the weighted activations instead of their sum",
    )
    aug_smooth: bool = option(
        False, flag, "mean over the mirrored image and three brightnesses"
    )
    topk: int = option(
        10,
        count("use a positive number, or -1 for all", special=-1),
        "explain at most so many boxes of an image, the best first; `-1` all",
        program_default=-1,  # as the guide has it
    )
    classes: Sequence[str | int] | str | int | None = option(
        None,
        optional(class_list),
        "explain boxes of these classes only, by name or index",
        nargs="+",
        type=lambda text: int(text) if text.isdecimal() else text,
    )
    max_shape: int | Sequence[int] = option(
        -1,
        map_limit,
        "reduce activations to this height and width first; `-1` does not",
        nargs="+",
        type=int,
    )
    batch_size: int | None = option(
        None,
        optional(count("use a positive number, or None")),
        "how many changed activations or images run at once; `None` takes what suits "
        "the network",
        type=int,
    )
    ratio_channels_to_ablate: float = option(
        1.0,
        number("use more than 0 and at most 1, all channels", above_0=True),
        "share of the channels that `'ablationcam'` tries, the most active ones",
    )
    num_masks: int = option(
        1000, count("use a positive number of masks"), "masks of `'drise'`"
    )
    steps: int = option(
        4,
        count("use a positive number of steps"),
        "steps of `'evidence'` from the baseline to the image",
    )
    masks: int = option(
        4,
        count("use an even number: masks have complements", least=0, step=2),
        "coarse random masks of `'evidence'`; `0` takes the steps alone",
    )
    cells: int = option(
        0,
        count("use 2 or more, or 0 for none", special=0, least=2),
        "cells in a row of a grid on each box that `'evidence'` also hides and shows "
        "alone, in 2 forwards each: `5` takes 50 per box; `0` none",
    )
    baseline: str = option(
        "blur",
        choice(BASELINES),
        "the image without content of `'evidence'`: blurred, black, or of its mean "
        "colour",
        choices=BASELINES,
    )
    signed: bool = option(
        True,
        flag,
        "show what speaks against a box too, of methods that know it (`'evidence'`)",
    )
    alpha: float = option(
        0.6,
        _SHARE,
        "share of the heat map in the blend where the map is strong",
    )
    colormap: str | int = option("plasma", _COLORMAP, _COLORMAP_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        method = validate(self.method, eigen_smooth=self.eigen_smooth)
        wrong: dict[str, str] = {}
        compares = method.kind in ("ablation", "masking", "pixels")
        if compares and not TARGETS[self.target].compares:
            wrong["target"] = "it compares scores; use 'score', 'logit' or 'objectness'"
        if method.targets and self.target != "score":
            wrong["target"] = "it joins several targets by itself; leave target='score'"
        if method.kind == "black_box" and self.target != "score":
            wrong["target"] = "it sees what is found, not how; leave target='score'"
        if method.kind == "attention" and self.target != "score":
            wrong["target"] = "it follows the query of a box; leave target='score'"
        if method.kind in ("black_box", "pixels", "attention"):
            if self.aug_smooth:
                wrong["aug_smooth"] = "it looks at the image as it is; leave it False"
            if self.target_layers is not None:
                wrong["target_layers"] = "it looks at no layer; leave it out"
        for name, remedy in wrong.items():
            raise VisConfigError(
                f"{name}={getattr(self, name)!r} cannot work with "
                f"method={self.method!r}: {remedy}"
            )

    @property
    def is_signed(self) -> bool:
        """Whether maps have negative values too, what speaks against a box."""
        return self.signed and METHODS[self.method].kind == "pixels"

    @property
    def sigma(self) -> float:
        """The smoothing that is meant: the method's own where none is named."""
        own = METHODS[self.method].default_smooth
        return own if self.smooth is None else self.smooth


@dataclass(frozen=True)
class DiagnosisOptions(_Shown):
    """Which detections count, and what hits an object."""

    # As evaluated; what there is to explain is where the box was decided.
    alignment: ClassVar[str] = "letterbox"
    target_layers: ClassVar[None] = None

    score_thr: float = option(
        0.3, number("use 0 to 1"), "detections with a higher score count"
    )
    iou_thr: float = option(
        0.5,
        number("use more than 0 and at most 1", above_0=True),
        "from which IoU on an object of its class is hit",
    )
    topk: int = option(
        10,
        count("use a number of errors, 0 for none, or -1 for all", -1, least=0),
        "at most so many errors of an image get a map, missed objects first; `-1` all",
    )


@dataclass(frozen=True)
class RunOptions(Options):
    """When a hook draws in a run, and what happens to its pictures."""

    draw: bool = option(True, flag, "`False` switches the hook off")
    interval: int = option(
        1,
        count("use a positive number of validation runs"),
        "every how many validation (or test) runs, starting with the first",
    )
    num_images: int = option(
        4,
        count("use a positive number, or -1 for all images", special=-1),
        "how many images, spread evenly over the data set; `-1` all",
    )
    image_indices: Sequence[int] | None = option(
        None,
        optional(indices("use a list of indices, counted from 0, or None")),
        "explicit indices instead, also through wrapped data sets",
    )
    override_loop_pipeline: bool = option(
        False,
        flag,
        "let the loop itself run on the Resize-only pipeline; its metrics are then of "
        "that pipeline",
    )
    name: str | None = option(
        None,
        optional(tag),
        "part of the tags; `None` is `'featmap'`, `'boxam'` or `'errors'`, and a "
        "second hook of one name gets a number",
    )
    table: bool = option(
        False,
        flag,
        "a `wandb.Table` of each run, with image, boxes, scores, layers and maps; "
        "needs a `'WandbVisBackend'`",
    )
    show: bool = option(False, flag, "show pictures in a window and publish none")
    wait_time: float = option(
        0.0,
        number("use seconds, at most a day; 0 waits for a key", 86_400),
        "seconds per window; 0 waits for a key",
    )
    on_error: str = option(
        "log",
        choice(ErrorPolicy.CHOICES),
        "`'log'`: a failure while drawing is logged and counted, and the run goes on; "
        "`'raise'` ends it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show and self.table:
            raise VisConfigError(
                "table=True cannot work with show=True, which publishes nothing; leave "
                "one of them False"
            )


@dataclass(frozen=True)
class ErrorRunOptions(RunOptions):
    """The same of a hook that counts the errors of every image."""

    select: str = option(
        "fixed",
        choice(("fixed", "worst")),
        "which images are drawn: `'fixed'`, the same in every run, or `'worst'`, "
        "`num_images` of those that lose most AP in this one",
    )
    mechanisms: str = option(
        "drawn",
        choice(("drawn", "all")),
        "why objects were missed is found out for the `'drawn'` images, or for `'all'` "
        "of them, counted and logged, at a forward more for each",
    )


@dataclass(frozen=True)
class BoxRunOptions(RunOptions):
    """The same of a hook whose maps can be measured."""

    metrics: Sequence[str] = option(
        (),
        metric_list,
        "scalars of each run, means over the explained boxes of the drawn images: "
        + ", ".join(f"`{name!r}`" for name in METRICS)
        + "; see [what they are](docs/faithfulness.md)",
    )
