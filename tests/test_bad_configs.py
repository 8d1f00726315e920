"""Whatever stands in a config works, or ends in an error of ours with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mmengine.dataset import Compose
from mmengine.runner import Runner

from mmyolo_vis_hooks import BoxAMVisHook, FeatMapVisHook
from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.saliency import FUSIONS
from mmyolo_vis_hooks.attribution.targets import TARGETS
from mmyolo_vis_hooks.declare import fields_of
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.options import (
    SCOPES,
    BoxAMOptions,
    FeatMapOptions,
    RunOptions,
)
from tests.toy import META_KEYS, make_pipeline
from tests.toy_boxes import box_config

NIGHTLY = pytest.mark.nightly
many = pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=NIGHTLY)])
fewer = pytest.mark.parametrize("number", [30, pytest.param(1_000, marks=NIGHTLY)])


def holds(number: int, check: Callable[..., None], *given_by: Any) -> None:
    """Check a number of examples; the same ones in each quick run."""
    chosen = settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=number <= 300,
        phases=[Phase.explicit, Phase.generate],  # shrinking runs many more
    )
    chosen(given(*given_by)(check))()


class Odd:
    """Neither compares nor converts."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("these cannot be compared")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Odd()"


NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([-(10**30), 10**30, 2**63, 10**400]),
    st.floats(),
    st.booleans(),
    st.sampled_from([np.float32(0.5), np.int64(2), np.bool_(True), np.nan, 1j]),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from(["neck", "backbone", "jet", "score", "gradcam", "resize", "box"]),
)
ARRAYS = st.builds(
    lambda shape, kind: np.ones(shape, kind),
    st.sampled_from([(), (0,), (1,), (2,), (3,), (2, 2)]),
    st.sampled_from([float, int, bool, object, "U3"]),
)
ODD = st.one_of(
    st.none(), st.builds(Odd), st.just(torch.ones(2)), st.just(range(3)), st.just(int)
)
ATOMS = st.one_of(NUMBERS, WORDS, ARRAYS, ODD)
VALUES = st.one_of(
    ATOMS,
    st.lists(ATOMS, max_size=3),
    st.lists(ATOMS, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), ATOMS, max_size=2),
    st.frozensets(st.integers(0, 3)),
)


@many
@pytest.mark.parametrize("hook", [FeatMapVisHook, BoxAMVisHook])
def test_any_value_of_any_option_is_taken_or_refused(hook, number) -> None:
    kind = FeatMapOptions if hook is FeatMapVisHook else BoxAMOptions
    names = [own.name for own in (*fields_of(kind), *fields_of(RunOptions))]

    def check(options: dict[str, Any]) -> None:
        try:
            built = hook(**options)
        except VisConfigError as error:
            said = str(error)
            assert any(name in said for name in options)
            assert len(said) < 2000
        else:
            hash(built.options)
            hash(built.run_options)

    holds(number, check, st.dictionaries(st.sampled_from(names), VALUES, max_size=2))


NAMES = ("backbone", "neck", "maps", "out_layers", "shared", "bbox_head", "unused")
PARTS = st.sampled_from([*NAMES, "0", "1", "-1", "forward", "__class__", "training"])
PATHS = st.one_of(
    st.text(max_size=12),
    st.text("neckmaps.[]0123-_ ", max_size=12),
    st.lists(PARTS, min_size=1, max_size=4).map(".".join),
    st.builds("{}[{}]".format, PARTS, st.integers(-3, 10**9)),
)


@many
def test_any_layer_path_is_found_or_refused(number, tmp_path, toy_data) -> None:
    cfg = box_config(tmp_path, [], data_root=toy_data)
    detector = Runner.from_cfg(cfg).model

    def check(path: str) -> None:
        try:
            FeatMapVisHook(target_layers=[path])
            layers = resolve_layers(detector, [path])
        except VisConfigError as error:
            said = str(error)
            assert said.startswith("target_layers")
        else:
            assert set(layers.values()) <= set(detector.modules())

    holds(number, check, PATHS)


LOAD, PACK = make_pipeline()[0], make_pipeline()[-1]
SIZES = st.integers(20, 200)
STEPS = st.one_of(
    st.just(LOAD),
    st.just(dict(type="mmdet.LoadAnnotations", with_bbox=True)),
    st.builds(
        lambda w, h, keep: dict(type="mmdet.Resize", scale=(w, h), keep_ratio=keep),
        SIZES,
        SIZES,
        st.booleans(),
    ),
    st.builds(lambda s: dict(type="mmyolo.LetterResize", scale=(s, s)), SIZES),
    st.builds(lambda s: dict(type="mmdet.Pad", size_divisor=s), st.integers(1, 64)),
    st.builds(lambda p: dict(type="mmdet.RandomFlip", prob=float(p)), st.booleans()),
    st.builds(
        # Else it gives no image at all where there is no object in it, now and then.
        lambda s: dict(
            type="mmdet.RandomCrop", crop_size=(s, s), allow_negative_crop=True
        ),
        SIZES,
    ),
    st.just(dict(type="mmdet.PhotoMetricDistortion")),
    st.just(dict(type="mmdet.RandomShift", prob=1.0)),
)
KEYS = st.lists(st.sampled_from(META_KEYS), unique=True)
PIPELINES = st.one_of(
    st.builds(lambda steps: [LOAD, *steps, PACK], st.lists(STEPS, max_size=3)),
    st.builds(lambda keys: [*make_pipeline()[:-1], dict(PACK, meta_keys=keys)], KEYS),
    st.lists(STEPS, max_size=3),
)


@pytest.fixture
def runner(tmp_path, toy_data) -> Runner:
    """Its test loop runs on two images of which all are drawn."""
    # Nothing is written, which takes longer than all the rest.
    options = dict(batch_size=1, vis_backends=())
    cfg = box_config(tmp_path, [], data_root=toy_data, **options)
    cfg.test_dataloader.dataset.indices = 2
    cfg.test_evaluator = []
    cfg.default_hooks.logger = None  # it needs a whole run
    made = Runner.from_cfg(cfg)
    made.test_loop  # noqa: B018  builds it
    return made


def assert_refused_or_drawn(
    runner: Runner, kind: type, options: dict[str, Any], usable: bool = True
) -> None:
    """What passes before the run loses no picture in it."""
    try:
        hook = kind(**options)
        runner._hooks = [hook]
        hook.before_run(runner)
    except VisError as error:
        said = str(error)
        assert "; " in said or "cannot work: " in said, said  # the remedy follows
        return
    if usable:
        runner.test_loop.run()
        failures = [f.report for f in hook._policy._failures.values()]
        assert not failures, failures


@many
@pytest.mark.parametrize("kind", [FeatMapVisHook, BoxAMVisHook])
def test_any_pipeline_that_runs_is_drawn_or_refused_before(
    runner, kind, number, monkeypatch
) -> None:
    """What the loop itself cannot use is the loop's to complain about."""
    # A picture depends on the options, and on the pipeline its sample alone.
    blank = np.zeros((9, 9, 3), np.uint8)
    monkeypatch.setattr(kind, "panel_kind", lambda *args: lambda sample: blank)
    loader = runner.test_loop.dataloader
    batch = loader.collate_fn

    def check(steps: list[dict]) -> None:
        loader.dataset.pipeline = Compose(steps)
        try:
            runner.model.eval()
            with torch.no_grad():
                usable = bool(runner.model.test_step(batch([loader.dataset[0]])))
        except Exception:
            usable = False
        assert_refused_or_drawn(runner, kind, {}, usable)

    holds(number, check, PIPELINES)


SHARED = dict(
    alignment=st.sampled_from([None, "resize", "letterbox", "network"]),
    image_channels=st.sampled_from([None, (2, 1, 0), (0, 0, 9)]),
    score_thr=st.floats(0, 1),
    num_images=st.sampled_from([-1, 1, 7]),
    image_indices=st.sampled_from([None, (1,), (0, 5)]),
    alpha=st.floats(0, 1),
    colormap=st.sampled_from(["jet", "magma", 2, np.int64(11)]),
)
SOME = "backbone backbone.stages[3] neck neck[1] neck[2] neck.maps.out_layers unused "
SOME += "bbox_head bbox_head.cls[0]"
LAYERS = st.lists(st.sampled_from(SOME.split()), min_size=1, max_size=3)
OPTIONS = {
    FeatMapVisHook: dict(
        SHARED,
        target_layers=LAYERS,
        channel_reduction=st.sampled_from([None, "squeeze_mean", "select_max"]),
        topk=st.integers(-1, 12),
        arrangement=st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 5, 60, 600])),
    ),
    BoxAMVisHook: dict(
        SHARED,
        method=st.sampled_from(sorted(METHODS)),
        target=st.sampled_from(sorted(TARGETS)),
        target_layers=st.one_of(st.none(), LAYERS),
        scope=st.sampled_from(SCOPES),
        fusion=st.sampled_from(FUSIONS),
        normalize_layers=st.booleans(),
        smooth=st.one_of(st.none(), st.floats(0, 1)),
        norm_in_bbox=st.booleans(),
        eigen_smooth=st.booleans(),
        aug_smooth=st.booleans(),
        topk=st.sampled_from([-1, 1, 3]),
        classes=st.sampled_from([None, "square", 0, 1, ["lamp"]]),
        max_shape=st.sampled_from([-1, 1, (2, -1), (3, 500)]),
        batch_size=st.sampled_from([None, 1, 64]),
        ratio_channels_to_ablate=st.floats(0.01, 1),
        num_masks=st.integers(1, 20),
    ),
}


@fewer
@pytest.mark.parametrize("kind", [FeatMapVisHook, BoxAMVisHook])
def test_any_options_are_drawn_or_refused_before(runner, kind, number) -> None:
    def check(options: dict[str, Any]) -> None:
        assert_refused_or_drawn(runner, kind, options)

    holds(number, check, st.fixed_dictionaries({}, optional=OPTIONS[kind]))
