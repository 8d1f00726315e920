"""What ``eval_boxam.py`` writes: tables, curves and pictures of cases."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from _common import table_of
from _evaluation import Explained
from mmyolo_vis_hooks.diagnosis.report import csv_text
from mmyolo_vis_hooks.metrics.baselines import BASELINES
from mmyolo_vis_hooks.metrics.comparison import SIZES, Compared, Comparison
from mmyolo_vis_hooks.metrics.faithfulness import SHARES
from mmyolo_vis_hooks.metrics.metric import METRICS
from mmyolo_vis_hooks.publish.files import write_whole
from mmyolo_vis_hooks.render.box_layout import crop_window
from mmyolo_vis_hooks.render.boxes import outline_boxes
from mmyolo_vis_hooks.render.heatmap import diverge_heatmap, fade_heatmap
from mmyolo_vis_hooks.render.montage import (
    Cell,
    cell_size_hw,
    montage,
    resize_image,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = ("ms", "forwards")
_WAYS = (("ins", "insertion", "shown"), ("del", "deletion", "replaced"))


@dataclass(frozen=True)
class Case:
    """A detection of an image, and the values of its maps by name."""

    image: str
    number: int
    size: float
    maps: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TextTable:
    """Cells that can be printed and written."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        return table_of(self.title, self.columns, self.rows)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"**{self.title}**\n\n{table}\n"


@dataclass(frozen=True)
class Tables:
    """Everything that was compared, and tables of it: all values, then each by size."""

    records: list[Compared]
    costs: dict[str, dict[str, float]]
    overview: TextTable
    by_size: dict[str, TextTable]

    def csv(self) -> str:
        names = [field.name for field in fields(Compared)]
        return csv_text(names, map(astuple, self.records))

    def json(self, settings: dict[str, Any]) -> str:
        records = [
            {k: None if v != v else v for k, v in asdict(r).items()}
            for r in self.records
        ]
        return json.dumps(
            dict(settings=settings, costs=self.costs, values=records), indent=1
        )

    def markdown(self) -> str:
        tables = self.overview, *self.by_size.values()
        return "\n".join(table.markdown() for table in tables)


def tables_of(cases: Sequence[Case], against: str) -> Tables:
    """Compare the maps of all detections with one of them."""
    comparison = Comparison(against)
    spent: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        found = {name: _numbers(values) for name, values in case.maps.items()}
        comparison.update(case.image, case.size, found)
        for name, values in case.maps.items():
            for key in COSTS:
                if key in values:
                    spent[name][key].append(values[key])
    records = comparison.compute()
    # The first image takes longer.
    costs = {
        name: {key: statistics.median(own) for key, own in of_map.items()}
        for name, of_map in spent.items()
    }
    num_images = len({case.image for case in cases})
    title = f"{len(cases)} detections of {num_images} images"
    overview = _overview(title, len(cases), records, costs)
    by_size = {
        value: _details(value, records, against)
        for value in dict.fromkeys(r.value for r in records)
        if not value.endswith(("_ins", "_del"))
    }
    return Tables(records, costs, overview, by_size)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if name not in COSTS and not isinstance(value, list)
    }


def _overview(
    title: str,
    num_cases: int,
    records: list[Compared],
    costs: dict[str, dict[str, float]],
) -> TextTable:
    """The means of all values over all boxes that have them, and what a map cost."""
    values = list(dict.fromkeys(r.value for r in records))
    rows = {r.map: [r.map, *[""] * (len(values) + 2)] for r in records}
    for record in records:
        if record.size == "all":
            of = f" (of {record.count})" if record.count < num_cases else ""
            rows[record.map][1 + values.index(record.value)] = f"{record.mean:.3f}{of}"
    for name, own in costs.items():
        rows[name][-2:] = f"{own['ms']:.0f}", f"{own['forwards']:.1f}"
    columns = ["map", *values, "ms a box", "forwards a box"]
    return TextTable(title, columns, list(rows.values()))


def _details(value: str, records: list[Compared], against: str) -> TextTable:
    """A value by the size of the box, with the paired difference to another map."""
    own = {(r.map, r.size): r for r in records if r.value == value}
    counts = {
        size: max((r.count for r in own.values() if r.size == size), default=0)
        for size in SIZES
    }
    sizes = [size for size, count in counts.items() if count]
    columns = ["map"]
    for size in sizes:
        columns += [f"{size} ({counts[size]})", f"minus {against}, 95 %"]
    rows = []
    for name in dict.fromkeys(name for name, _ in own):
        row = [name]
        for size in sizes:
            record = own.get((name, size))
            row += [f"{record.mean:.3f}", _difference(record)] if record else ["", ""]
        rows.append(row)
    return TextTable(f"{value} by size; * is clear of zero", columns, rows)


def _difference(record: Compared) -> str:
    low, high = record.difference_low, record.difference_high
    if math.isnan(low) or low == high:
        return ""
    mark = " *" if record.is_clear else ""
    return f"{record.difference:+.3f} [{low:+.3f}, {high:+.3f}]{mark}"


def main_value(cases: Sequence[Case], metrics: Sequence[str]) -> str | None:
    """The value by which cases are good or bad: what lives on forwards, if anything."""
    asking = [name for name in metrics if METRICS[name].asks]
    known = dict.fromkeys(
        v for case in cases for own in case.maps.values() for v in own
    )
    values = [v for v in (*asking, *known) if v in known and v not in COSTS]
    return values[0] if values else None


def _figure(**options: Any) -> Figure:
    # Only those who ask for curves pay for the import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def _colors() -> np.ndarray:
    """Twenty that can be told apart, the light ones last."""
    from matplotlib import colormaps

    return colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])


def _write_figure(path: Path, figure: Figure) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(path, content.getvalue())


def draw_budget(tables: Tables, value: str, path: Path) -> None:
    """A value against the forwards that maps took; a method's budgets are joined."""
    budgets: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    free: dict[str, float] = {}
    for record in tables.records:
        if (record.value, record.size) != (value, "all"):
            continue
        if (cost := tables.costs.get(record.map)) is not None:
            name, _, words = record.map.partition(":")
            budgets[name].append((cost["forwards"], record.mean, words))
        else:
            free[record.map] = record.mean
    figure = _figure(figsize=(7.5, 4.5))
    ax = figure.subplots()
    ax.set_xscale("log")
    labels = []
    for color, (name, points) in zip(cycle(_colors()), budgets.items()):
        forwards, means, options = zip(*sorted(points))
        ax.plot(forwards, means, "o-", color=color, label=name)
        labels += [(m, f, text, color) for f, m, text in zip(forwards, means, options)]
    for color, (name, mean) in zip(_colors()[::-1], free.items()):
        ax.axhline(mean, color=color, linestyle="--", linewidth=1, label=name)
    ax.set(xlabel="forwards a box", ylabel=value)
    ax.autoscale_view()
    above = -np.inf
    for mean, cost, text, color in sorted(labels):
        y = ax.transData.transform((cost, mean))[1] * 72 / figure.dpi  # in points
        above = max(y, above + 7 * bool(text))  # no label on another
        style = dict(ha="right", va="center", fontsize=6, color=color)
        offset = (-6, above - y)
        ax.annotate(text, (cost, mean), offset, textcoords="offset points", **style)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    _write_figure(path, figure)


def draw_curves(cases: Sequence[Case], path: Path) -> None:
    """Mean curves of insertion and deletion, a row per metric; none without any."""
    curves: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for name, key, curve in _all_curves(cases):
        curves[key][name].append(curve)
    names = [name for name in SHARES if f"{name}_ins_curve" in curves]
    if not names:
        return
    figure = _figure(figsize=(11, 4.2 * len(names)))
    axes = figure.subplots(len(names), 2, squeeze=False, sharey=True)
    for row, name in zip(axes, names):
        for ax, (way, kind, word) in zip(row, _WAYS):
            ax.set_prop_cycle(color=_colors())
            for label, own in curves[f"{name}_{way}_curve"].items():
                style = "--" if label in BASELINES else "-"
                ax.plot(SHARES[name], np.mean(own, axis=0), style, label=label)
            ax.set(title=f"{name}: {kind}", xlabel=f"share of the pixels {word}")
            ax.grid(alpha=0.3)
        row[0].set_ylabel("share of the score")
    axes[0][1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    _write_figure(path, figure)


def _all_curves(cases: Sequence[Case]) -> Iterator[tuple[str, str, list[float]]]:
    for case in cases:
        for name, values in case.maps.items():
            for key, value in values.items():
                if isinstance(value, list):
                    yield name, key, value


def case_picture(
    picture_rgb: np.ndarray, explained: Explained, case: Case, value: str
) -> np.ndarray:
    """The detection, and each map with what it is worth, ``(H, W, 3)`` uint8."""
    box = explained.subject.box_xyxy
    left, top, right, bottom = crop_window(box, picture_rgb.shape[:2])
    size_hw = cell_size_hw((bottom - top, right - left))
    scale = size_hw[0] / (bottom - top)
    shown_box = (box - np.array([left, top] * 2)) * scale

    def cell(image_rgb: np.ndarray, title: str, note: str) -> Cell:
        part = resize_image(image_rgb[top:bottom, left:right], size_hw).copy()
        outline_boxes(part, [shown_box])
        return Cell(part, title, note)

    cells = [cell(picture_rgb, explained.title, "as the network sees it")]
    for name, saliency in explained.maps.items():
        peak = max(float(np.abs(saliency).max()), 1e-12)
        draw = diverge_heatmap if saliency.min() < 0 else fade_heatmap
        drawn = draw((saliency / peak).astype(np.float32), picture_rgb)
        worth = case.maps.get(name, {}).get(value)
        note = "" if worth is None else f"{value} {worth:.3f}"
        cells.append(cell(drawn, name, note))
    return montage(cells)
