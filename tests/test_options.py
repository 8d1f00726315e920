"""Options: what can never work is refused where it is written, with the remedy."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest

from mmyolo_vis_hooks import BoxAMVisHook, ErrorVisHook, FeatMapVisHook
from mmyolo_vis_hooks.declare import add_arguments, fields_of, options_from
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.options import (
    BoxAMOptions,
    BoxRunOptions,
    FeatMapOptions,
    RunOptions,
)

NAN = float("nan")
BOTH: list[tuple[dict[str, Any], str]] = [
    (dict(score_thr=1.5), r"score_thr=1\.5 .*0 to 1"),
    (dict(score_thr=NAN), "score_thr=nan"),
    (dict(score_thr="high"), "score_thr='high'"),
    (dict(alignment="pad"), "alignment='pad'.*'letterbox'"),
    (dict(alignment=np.zeros(2)), "alignment="),
    (dict(image_channels=[0, 1]), r"image_channels=\[0, 1\].*three"),
    (dict(target_layers=[]), r"target_layers=\[\]"),
    (dict(target_layers=["neck["]), r"target_layers: cannot read 'neck\['"),
    (dict(target_layers=3), "target_layers=3"),
    (dict(alpha=True), "alpha=True"),
    (dict(colormap="jett"), "colormap='jett'"),
    (dict(draw="yes"), "draw='yes'.*True or False"),
    (dict(interval=0), "interval=0"),
    (dict(num_images=0), "num_images=0.*-1"),
    (dict(num_images=True), "num_images=True"),
    (dict(image_indices=[]), r"image_indices=\[\]"),
    (dict(image_indices=[-1]), r"image_indices=\[-1\]"),
    (dict(alignment="network", override_loop_pipeline=True), "override_loop_pipeline"),
    (dict(name="a/b"), "name='a/b'"),
    (dict(name="n" * 65), "name='nnn"),
    (dict(show=1), "show=1"),
    (dict(wait_time=-1), "wait_time=-1"),
    (dict(wait_time=False), "wait_time=False"),
    (dict(wait_time=10**30), "wait_time=1000"),
    (dict(on_error="ignore"), "on_error='ignore'.*'log', 'raise'"),
    (dict(backend_args=None), "backend_args.* any more.*leave it out"),
]
FEATMAP: list[tuple[dict[str, Any], str]] = [
    (dict(target_layers=None), "target_layers=None"),
    (dict(channel_reduction="mean"), "channel_reduction='mean'"),
    (dict(channel_reduction=np.zeros(2)), "channel_reduction="),
    (dict(channel_reduction=None, topk=0), "topk=0"),
    (dict(channel_reduction=None, topk=5), r"topk=5 .* 4 places.*\(2, 3\)"),
    (dict(arrangement=(2,)), r"arrangement=\(2,\).*rows and columns"),
    (dict(arrangement=(2, 0)), r"arrangement=\(2, 0\)"),
    (dict(arrangement="22"), "arrangement='22'"),
    (dict(arrangement=(1000, 1000)), "arrangement.*at most 1024"),
]
BOXAM: list[tuple[dict[str, Any], str]] = [
    (dict(method="gradcam+"), r"method='gradcam\+'.*did you mean 'gradcam\+\+'"),
    (dict(method=None), "method=None"),
    (dict(method=["gradcam"]), r"method=\['gradcam'\]"),
    (dict(target="scores"), "target='scores'.*did you mean 'score'"),
    (dict(target=None), "target=None"),
    (dict(scope="boxes"), "scope='boxes'.*did you mean 'box'"),
    (dict(fusion="avg"), "fusion='avg' is unknown; use one of 'max'.*'product'"),
    (dict(colormap="plazma"), "did you mean 'plasma' or 'plasma_r'[^']*Set a name"),
    (dict(normalize_layers=1), "normalize_layers=1"),
    (dict(smooth=-0.1), r"smooth=-0\.1"),
    (dict(smooth=NAN), "smooth=nan"),
    (dict(norm_in_bbox="no"), "norm_in_bbox='no'"),
    (dict(eigen_smooth=1), "eigen_smooth=1"),
    (dict(method="eigencam", eigen_smooth=True), "eigen_smooth=True.*eigencam"),
    (dict(aug_smooth="yes"), "aug_smooth='yes'"),
    (dict(topk=0), "topk=0.*-1 for all"),
    (dict(topk=2.0), r"topk=2\.0"),
    (dict(classes=[]), r"classes=\[\].*None for all"),
    (dict(classes=[True]), r"classes=\[True\]"),
    (dict(classes={"square": 0}), "classes=.*names or indices"),
    (dict(max_shape=0), "max_shape=0.*-1 sets no limit"),
    (dict(max_shape=(8, 8, 8)), "max_shape="),
    (dict(batch_size=0), "batch_size=0"),
    (dict(ratio_channels_to_ablate=0), "ratio_channels_to_ablate=0"),
    (dict(num_masks=0), "num_masks=0"),
    (dict(method="drise", target_layers=["neck"]), "target_layers=.*'drise'"),
    (dict(method="drise", aug_smooth=True), "aug_smooth=True.*'drise'"),
    (dict(method="drise", target="logit"), "target='logit'.*'drise'"),
    (dict(method="scorecam", target="x1"), "target='x1'.*'scorecam'"),
    (dict(method="odam_combined", target="x1"), "target='x1'.*'odam_combined'"),
]


# What hits any object of its class, wherever, says nothing.
ERRORS: list[tuple[dict[str, Any], str]] = [(dict(iou_thr=0), "iou_thr=0.*more than 0")]


@pytest.mark.parametrize(
    ("hook", "options", "message"),
    [(FeatMapVisHook, *case) for case in BOTH + FEATMAP]
    + [(BoxAMVisHook, *case) for case in BOTH + BOXAM]
    + [(ErrorVisHook, *case) for case in ERRORS],
)
def test_a_value_that_cannot_work_is_refused(hook, options, message) -> None:
    with pytest.raises(VisConfigError, match=message):
        hook(**options)


def test_what_is_no_option_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"no option 'target_layer'; use target_layers$"
    ):
        FeatMapVisHook(target_layer="neck")
    with pytest.raises(VisConfigError, match=r"'zzz'; use method, .*, on_error$"):
        BoxAMVisHook(zzz=1)
    with pytest.raises(TypeError):
        FeatMapVisHook("neck")  # type: ignore[call-arg]


def test_values_are_kept_in_one_form() -> None:
    options = BoxAMOptions(target_layers="neck", classes="dog", max_shape=8, alpha=1)
    assert options.target_layers == ("neck",)
    assert options.classes == ("dog",)
    assert options.max_shape == (8, 8)
    assert options.sigma == 0.1
    assert BoxAMOptions(method="layercam").sigma == 0
    assert BoxAMOptions(method="layercam", smooth=0.3).sigma == 0.3
    assert dataclasses.replace(options, topk=3).topk == 3


@pytest.mark.parametrize("hook", [FeatMapVisHook, BoxAMVisHook])
def test_a_hook_shows_its_options_in_signature_and_docstring(hook) -> None:
    kind = FeatMapOptions if hook is FeatMapVisHook else BoxAMOptions
    run = RunOptions if hook is FeatMapVisHook else BoxRunOptions
    declared = [*fields_of(kind), *fields_of(run)]
    parameters = inspect.signature(hook).parameters
    assert list(parameters) == [own.name for own in declared]
    for own in declared:
        assert parameters[own.name].default == own.default
        assert f"\n    {own.name}: " in hook.__doc__


def parsed(kind: type, *words: str) -> Any:
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    return options_from(parser.parse_args(words), kind)


def test_a_command_line_without_words_has_the_defaults_of_the_hooks() -> None:
    assert parsed(FeatMapOptions) == FeatMapOptions()
    # The guide draws every box unless --topk says otherwise.
    assert parsed(BoxAMOptions) == BoxAMOptions(topk=-1)


def test_a_command_line_says_what_keywords_say() -> None:
    words = "--channel-reduction None --topk 5 --arrangement 2 3 --target-layers a b[1]"
    assert parsed(FeatMapOptions, *words.split()) == FeatMapOptions(
        channel_reduction=None,
        topk=5,
        arrangement=(2, 3),
        target_layers=["a", "b[1]"],
    )
    words = "--max-shape 20 30 --classes dog 3 --norm-in-bbox --smooth 0.2 --topk 2 "
    words += "--normalize-layers --image-channels 4 2 0 --batch-size 3"
    assert parsed(BoxAMOptions, *words.split()) == BoxAMOptions(
        max_shape=(20, 30),
        classes=["dog", 3],
        norm_in_bbox=True,
        smooth=0.2,
        topk=2,
        normalize_layers=True,
        image_channels=(4, 2, 0),
        batch_size=3,
    )
