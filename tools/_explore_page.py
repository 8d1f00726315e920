"""The live page: its controls, and what is shown when one of them is used."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from _explore import (
    DETECTION,
    KINDS,
    Settings,
    Spot,
    View,
    clicked,
    drawn_hw,
    next_error,
    side_of,
)
from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.targets import TARGETS
from mmyolo_vis_hooks.diagnosis.candidates import FLOOR
from mmyolo_vis_hooks.diagnosis.picture import ROLE_COLORS as COLORS
from mmyolo_vis_hooks.network.layer_table import survey_layers
from mmyolo_vis_hooks.options import DiagnosisOptions
from mmyolo_vis_hooks.publish.files import write_image

TITLE = "Why did it find that, and why not that?"
HINT = (
    "**Click a box** to see what made it. **Click any other place** to see what the "
    "detector considered there, and why it became no box."
)
DECIDED = "where it was decided"
EVERY = "every class"
CSS = """
main { max-width: 1400px !important; width: 100%; }
.key { margin-right: 1.4em; color: #475569; font-size: .9em; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; vertical-align: -.05em; box-shadow: 0 0 0 1px #94a3b8; }
.bar { align-items: flex-end; }
.bar button { height: 42px; margin-bottom: 1px; padding: 0 12px;
  white-space: nowrap; }
.picture img { cursor: crosshair; }
.said { font-size: 1.05em; }
.here label { width: 100%; }
"""


class Page:
    """Builds the page, and answers what is clicked on it."""

    def __init__(
        self, args: Namespace, views: Sequence[View], class_names: Sequence[str]
    ) -> None:
        self._args, self._views, self._names = args, views, class_names
        self._options = DiagnosisOptions(
            score_thr=args.score_thr, iou_thr=args.iou_thr, topk=0
        )
        self._first = views[0].look(0)

    def build(self) -> gr.Blocks:
        """The page; every event ends in :meth:`show`."""
        photos = self._views[0].photos
        knows = any(photo.truth is not None for photo in photos)
        with gr.Blocks(title=TITLE, delete_cache=(600, 600)) as page:
            spot = gr.State(Spot())
            gr.Markdown(f"## {TITLE}\n{HINT}")
            with gr.Row(elem_classes="bar"):
                choices = [(photo.name, i) for i, photo in enumerate(photos)]
                image = gr.Dropdown(
                    choices, value=0, label="Image", scale=4, elem_id="image"
                )
                back = gr.Button("‹ Previous", elem_id="previous", min_width=110)
                on = gr.Button("Next ›", elem_id="next", min_width=110)
                kind = gr.Dropdown(
                    KINDS, label="Kind of error", scale=4, visible=knows, elem_id="kind"
                )
                seek = gr.Button(
                    "Next error" if len(self._views) == 1 else "Next error of A",
                    variant="primary",
                    elem_id="next-error",
                    min_width=160,
                    visible=knows,
                )
            sides = self._sides()
            gr.HTML(_legend(knows))
            controls = self._controls()
            outputs = [spot, image, *(part for side in sides for part in side)]

            def on_event(listen: Any, function: Any, *inputs: Any, **more: Any) -> None:
                usual = dict(
                    # One after another, or else an early answer could come last.
                    concurrency_id="page",
                    # What is used before an answer is there counts, too.
                    trigger_mode="multiple",
                    show_progress="hidden",
                    api_visibility="private",
                )
                listen(function, [spot, *controls, *inputs], outputs, **(usual | more))

            on_event(page.load, self.show)
            for control in controls[:2]:
                on_event(control.change, self.show, trigger_mode="always_last")
            for control in controls[2:-1]:
                on_event(control.input, self.show)
            on_event(controls[-1].input, self.choose_again)
            on_event(image.input, self.go_to, image)
            on_event(back.click, self.step(-1))
            on_event(on.click, self.step(1))
            # It may take minutes, in which the rest goes on.
            own = dict(concurrency_id="seek", trigger_mode="once")
            on_event(seek.click, self.seek, kind, show_progress="full", **own)
            for which, (picture, _, here) in enumerate(sides):
                on_event(picture.select, self.click)
                on_event(here.input, self.choose(which), here)
        return page

    def _sides(self) -> list[tuple[Any, Any, Any]]:
        """Picture, words and candidates of each view: beside it if there is one."""
        paths = [*filter(None, [self._args.checkpoint, self._args.compare])]
        if len(paths) == 1:
            with gr.Row():
                with gr.Column(scale=8):
                    picture = _picture()
                with gr.Column(scale=5, min_width=320):
                    return [(picture, *_answer())]
        sides = []
        with gr.Row():
            for letter, path in zip("AB", paths):
                with gr.Column():
                    gr.Markdown(f"**{letter}** {os.path.basename(path)}")
                    sides.append((_picture(), *_answer()))
        return sides

    def _controls(self) -> list[Any]:
        closing = self._first.closing
        start = max(self._options.score_thr, FLOOR)
        quick = ("gradient", "activation", "attention")
        methods = [
            (name if method.kind in quick else f"{name} (takes seconds)", name)
            for name, method in METHODS.items()
        ]
        with gr.Row():
            score_thr = gr.Slider(FLOOR, 1, start, step=0.01, label="Score threshold")
            nms = gr.Slider(
                0.05,
                1,
                0.5 if closing is None else closing.iou_thr,
                step=0.01,
                label="NMS: IoU threshold",
                visible=closing is not None,
            )
        with gr.Row():
            method = gr.Dropdown(methods, value="boxam", label="Map by")
            target = gr.Dropdown([*TARGETS], value="score", label="Of its")
            layer = gr.Dropdown(
                [(DECIDED, DECIDED), *self._layers()],
                value=DECIDED,
                label="Layer",
                allow_custom_value=True,
            )
            label = gr.Dropdown(
                [(EVERY, -1), *((name, i) for i, name in enumerate(self._names))],
                value=-1,
                label="Class",
            )
        return [score_thr, nms, method, target, layer, label]

    def _layers(self) -> list[tuple[str, str]]:
        detector = self._views[0].detector
        rows = survey_layers(detector, self._first.inputs, self._first.metainfo)
        return [
            (f"{row.path} · {len(row.shapes)} maps", row.path)
            if len(row.shapes) > 1
            else (f"{row.path} · {' x '.join(map(str, row.shapes[0]))}", row.path)
            for row in rows
            if row.depth <= 3 and row.shapes
        ]

    def _settings(self, score_thr: float, nms: float, *rest: Any) -> Settings:
        method, target, layer, label = rest
        closing = self._first.closing
        return Settings(
            replace(self._options, score_thr=score_thr),
            None if closing is None or nms == closing.iou_thr else nms,
            None if label < 0 else label,
            method,
            target,
            None if layer == DECIDED else layer,
        )

    # What events do: all take the spot and the controls, and give all that is shown.

    def show(self, spot: Spot, *controls: Any) -> list[Any]:
        settings = self._settings(*controls)
        shown: list[Any] = [spot, spot.image]
        for which, view in enumerate(self._views):
            side = side_of(view, spot, settings, which)
            here = gr.Radio(
                choices=side.choices, value=side.chosen, visible=bool(side.choices)
            )
            shown += [stored(side.picture_rgb), "\n\n".join(side.lines), here]
        return shown

    def choose_again(self, spot: Spot, *controls: Any) -> list[Any]:
        if spot.point_xy is not None:
            spot = clicked(self._views, spot, self._settings(*controls))
        return self.show(spot, *controls)

    def go_to(self, spot: Spot, *rest: Any) -> list[Any]:
        *controls, number = rest
        return self.show(Spot(number), *controls)

    def step(self, by: int) -> Any:
        def step(spot: Spot, *controls: Any) -> list[Any]:
            number = (spot.image + by) % len(self._views[0].photos)
            return self.show(Spot(number), *controls)

        return step

    def seek(self, progress: gr.Progress = gr.Progress(), *args: Any) -> list[Any]:  # noqa: B008
        """Gradio fills the bar in that it finds as a default."""
        spot, *controls, kind = args

        def numbers(order: Sequence[int]) -> Any:
            return progress.tqdm(order, desc="looking", unit="images")

        settings = self._settings(*controls)
        found = next_error(self._views, spot, settings, kind, numbers)
        if found is None:
            gr.Info("There is no such error at these thresholds.")
        return self.show(found or spot, *controls)

    def click(self, event: gr.SelectData, spot: Spot, *controls: Any) -> list[Any]:
        image_hw = self._views[0].look(spot.image).image_rgb.shape[:2]
        drawn_h, drawn_w = drawn_hw(image_hw)
        x, y = event.index
        point = x * image_hw[1] / drawn_w, y * image_hw[0] / drawn_h
        spot = replace(spot, point_xy=point)
        return self.choose_again(spot, *controls)

    def choose(self, which: int) -> Any:
        def choose(spot: Spot, *rest: Any) -> list[Any]:
            *controls, candidate = rest
            chosen = tuple(
                candidate if number == which else own
                for number, own in enumerate(spot.chosen)
            )
            return self.show(replace(spot, chosen=chosen), *controls)

        return choose


def stored(picture_rgb: np.ndarray) -> str:
    """The file of a picture among Gradio's, which is written once.

    Gradio names files after what they hold. A picture given as an array it would write
    again whenever it is shown again, also while a browser is reading it.
    """
    with TemporaryDirectory() as folder:
        file = os.path.join(folder, "picture.jpg")
        write_image(file, picture_rgb)
        return save_file_to_cache(file, get_upload_folder())


def _picture() -> gr.Image:
    return gr.Image(
        interactive=False,
        show_label=False,
        buttons=[],
        elem_classes="picture",
    )


def _answer() -> tuple[gr.Markdown, gr.Radio]:
    said = gr.Markdown(elem_classes="said")
    label = "Considered here, the highest score first"
    return said, gr.Radio(label=label, elem_classes="here", visible=False)


def _legend(knows: bool) -> str:
    keys = {"detection": DETECTION}
    if knows:
        keys = {
            "found": COLORS["found"],
            "missed": COLORS["missed"],
            "false positive": COLORS["detection"],
        }
    keys["chosen candidate"] = COLORS["candidate"]
    return "".join(
        f'<span class="key"><i style="background:rgb{color}"></i>{text}</span>'
        for text, color in keys.items()
    )
