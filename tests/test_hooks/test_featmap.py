"""Options, schedule and alignment of the hooks on a real Runner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import DATA_SAMPLERS, HOOKS, MODELS
from mmengine.runner import Runner

from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.publish.publisher import Publisher
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy, vis_hooks
from tests.toy import LETTERBOX, META_KEYS, SIZES, SQUARE, make_pipeline, toy_config
from tests.toy_boxes import box_config

ALIGNMENTS = ("resize", "letterbox", "network")
KEEP_RATIO = (dict(type="mmdet.Resize", scale=(200, 120), keep_ratio=True),)
GEOMETRIES = dict(letterbox=LETTERBOX, keep_ratio=KEEP_RATIO)
CONFIGS = {spy: toy_config, box_spy: box_config}
both_hooks = pytest.mark.parametrize("hook", CONFIGS, ids=("featmap", "boxam"))


def after_test(cfg) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.test()
    return runner


def names_of(*tags: str) -> list[str]:
    return sorted(f"{tag}.png" for tag in tags)


def test_batches_that_do_not_name_their_images_fail_before_the_run(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy()], data_root=toy_data)
    keys = [key for key in META_KEYS if key not in ("img_id", "img_path")]
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = keys
    with pytest.raises(VisConfigError, match="add both"):
        Runner.from_cfg(cfg).test()


@pytest.mark.parametrize("alignment", [None, "letterbox", "network"])
def test_letterbox_without_its_padding_is_refused(tmp_path, toy_data, alignment):
    """The maps would lie beside their objects, by the padding."""
    cfg = toy_config(tmp_path, [spy(alignment=alignment)], data_root=toy_data)
    keys = [key for key in META_KEYS if key != "pad_param"]
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = keys
    runner = Runner.from_cfg(cfg)
    if alignment == "letterbox":
        with pytest.raises(VisConfigError, match=r"'pad_param'.*LetterResize"):
            runner.test()
    else:  # which do not pad, or draw on the padding
        runner.test()
        assert len(pictures(tmp_path)) == 4


# Where maps and boxes lie.


def heat_of(sample) -> np.ndarray:
    """The map of the brightness layer, or of the best box, over the drawn image."""
    if hasattr(sample, "explanations"):
        (explanation,) = sample.explanations
        box_xyxy = sample.detections.boxes_xyxy[explanation.index]
        return box_saliency(explanation, sample.frame, box_xyxy, smooth=0.0)
    (activation,) = sample.activations
    return sample.frame.resample(activation.feature_map.float())[0].numpy()


def every_image(hook, **options) -> dict:
    """Config of a hook that draws one map of each image."""
    one_map = dict(target_layers=["brightness"]) if hook is spy else dict(topk=1)
    return hook(num_images=-1, score_thr=0.0, **one_map, **options)


def assert_on_objects(work_dir, runner: Runner, *, boxes: bool = True) -> None:
    """Map and box are at most a cell or two off the bright square."""
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == len(pictures(work_dir)) == 6
    for sample in samples:
        heat = heat_of(sample)
        assert heat.shape == sample.image_rgb.shape[:2]
        places = np.nonzero(sample.image_rgb.mean(axis=2) > 180)  # 114 is padding
        assert places[0].size >= SQUARE
        weight = np.clip(heat - (heat.min() + heat.max()) / 2, 0, None)
        box = sample.detections.boxes_xyxy[0]
        for axis, rows in enumerate(np.indices(heat.shape)):
            truth = places[axis].mean()
            cell = 8 / sample.frame.scale_xy[1 - axis]
            # A stretched square has more than one cell that is bright all around.
            reach = max(cell, np.ptp(places[axis]) / 2 - cell)
            off = (weight * rows).sum() / weight.sum() - truth
            assert abs(off) <= reach, (sample.image_id, axis)
            if boxes:
                middle = box[[1 - axis, 3 - axis]].mean()
                assert abs(middle - truth) <= 2 * cell


@both_hooks
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_maps_lie_on_their_objects(tmp_path, toy_data, hook, alignment, geometry):
    options = dict(data_root=toy_data, geometry=GEOMETRIES[geometry], batch_size=4)
    hooks = [every_image(hook, alignment=alignment)]
    assert_on_objects(tmp_path, after_test(CONFIGS[hook](tmp_path, hooks, **options)))


@MODELS.register_module()
class ToyTTA(BaseTTAModel):
    """Gives the predictions of the first view."""

    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]


def augmented(cfg, flip_first: bool):
    """As ``tools/test.py --tta`` builds it."""
    flips = [[dict(type="mmdet.RandomFlip", prob=float(p))] for p in (0, 1)]
    load, *_, annotations, pack = make_pipeline()
    resize = [dict(type="Compose", transforms=list(LETTERBOX))]
    flips = [step for view in flips[:: -1 if flip_first else 1] for step in view]
    views = [resize, flips, [annotations], [pack]]
    cfg.test_dataloader.dataset.pipeline = [
        load,
        dict(type="TestTimeAug", transforms=views),
    ]
    cfg.model = dict(type="ToyTTA", module=cfg.model)
    return cfg


@both_hooks
@pytest.mark.parametrize(
    ("alignment", "flip_first"),
    [("resize", True), ("letterbox", True), ("network", False)],
)
def test_test_time_augmentation(tmp_path, toy_data, hook, alignment, flip_first):
    hooks = [every_image(hook, alignment=alignment)]
    cfg = CONFIGS[hook](tmp_path, hooks, data_root=toy_data)
    runner = after_test(augmented(cfg, flip_first))
    # The toy does not put its boxes back where the first view is flipped.
    assert_on_objects(tmp_path, runner, boxes=not flip_first)


def test_objects_lie_on_the_view_that_is_drawn(tmp_path, toy_data, monkeypatch):
    """Not on the merged one's, which is flipped here."""
    given = []
    publish = lambda self, mode, image, step: given.append(image.boxed)  # noqa: E731
    monkeypatch.setattr(Publisher, "wants_boxes", True)
    monkeypatch.setattr(Publisher, "publish", publish)
    hooks = [every_image(spy, alignment="network")]
    cfg = toy_config(tmp_path, hooks, data_root=toy_data)
    after_test(augmented(cfg, flip_first=True))
    assert len(given) == len(SIZES)
    for boxed in given:
        bright = np.argwhere(boxed.image_rgb.min(axis=2) > 150)[:, ::-1]
        (box,) = boxed.truth.boxes_xyxy
        expected = [*bright.min(0), *(bright.max(0) + 1)]
        np.testing.assert_allclose(box, expected, atol=2)


@both_hooks
@pytest.mark.parametrize("alignment", ["resize", "letterbox"])
def test_repeated_and_concatenated_datasets(tmp_path, toy_data, hook, alignment):
    hooks = [hook(alignment=alignment, num_images=-1)]
    cfg = CONFIGS[hook](tmp_path, hooks, data_root=toy_data)
    inner = cfg.val_dataloader.dataset
    cfg.test_dataloader.dataset = dict(
        type="ConcatDataset", datasets=[inner, dict(inner, indices=[1, 2])]
    )
    cfg.test_evaluator = []
    after_test(cfg)
    assert len(pictures(tmp_path)) == 6


@both_hooks
def test_data_sets_of_different_classes(tmp_path, toy_data, hook):
    cfg = CONFIGS[hook](tmp_path, [hook(num_images=-1)], data_root=toy_data)
    inner = dict(cfg.val_dataloader.dataset, indices=[1, 2])
    other = dict(inner, indices=[0], metainfo=dict(classes=("lamp",)))
    joined = dict(type="mmdet.ConcatDataset", datasets=[inner, other])
    cfg.test_dataloader.dataset, cfg.test_evaluator = joined, []
    after_test(cfg)
    assert len(pictures(tmp_path)) == 3
    assert "have different classes, so numbers stand" in log_of(tmp_path)


def test_a_training_without_validation_says_that_nothing_is_drawn(tmp_path, toy_data):
    none = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    hooks = [spy(), spy(draw=False, name="off")]
    cfg = toy_config(tmp_path, hooks, data_root=toy_data, max_epochs=1, **none)
    Runner.from_cfg(cfg).train()
    assert "featmap: nothing is drawn in this training" in log_of(tmp_path)
    assert "off: nothing" not in log_of(tmp_path)


def test_override_runs_the_loop_on_the_resize_only_pipeline(tmp_path, toy_data):
    hook = spy(override_loop_pipeline=True, target_layers=["brightness"])
    runner = after_test(toy_config(tmp_path, [hook], data_root=toy_data, batch_size=1))
    assert runner.model.num_forwards == 1 + 6  # the trial, and the loop's own
    assert "metrics are of that pipeline" in log_of(tmp_path)
    for sample in vis_hooks(runner)[0].samples:
        assert sample.frame.offset_xy == (0.0, 0.0)
        height, width = sample.frame.network_hw
        scale = np.array([width, height]) / sample.image_rgb.shape[1::-1]
        np.testing.assert_allclose(sample.frame.scale_xy, scale)
    cfg = toy_config(tmp_path / "tta", [hook], data_root=toy_data)
    with pytest.raises(VisConfigError, match="test-time augmentation"):
        Runner.from_cfg(augmented(cfg, True)).test()


@pytest.mark.parametrize("second_overrides", [False, True])
def test_a_second_hook_keeps_the_size_of_an_overridden_pipeline(
    tmp_path, toy_data, second_overrides
):
    hooks = [
        spy(override_loop_pipeline=True),
        spy(override_loop_pipeline=second_overrides),
    ]
    geometry = (dict(type="mmdet.Resize", scale=(400, 240), keep_ratio=True),)
    cfg = toy_config(tmp_path, hooks, data_root=toy_data, geometry=geometry)
    cfg.test_dataloader.batch_size = 1
    first, second = (
        [sample.frame.network_hw for sample in hook.samples]
        for hook in vis_hooks(after_test(cfg))
    )
    assert first == second == [(256, 384), (224, 384), (256, 256), (384, 256)]


# Whose forward is drawn.


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_letterbox_and_network_need_no_second_forward(tmp_path, toy_data, alignment):
    cfg = toy_config(tmp_path, [spy(alignment=alignment)], data_root=toy_data)
    # With the trial, which finds out whether padding counts in boxes.
    num_own = 1 + 4 if alignment == "resize" else 3
    assert after_test(cfg).model.num_forwards == 3 + num_own
    assert len(pictures(tmp_path)) == 4


@pytest.mark.parametrize("run", ["val", "test"])
def test_a_hook_that_runs_the_model_does_not_disturb_a_recording(
    tmp_path, toy_data, run
):
    """The first hook's forward comes between the loop's and the second's drawing."""
    hooks = [spy(), spy(alignment="letterbox", target_layers=["brightness"])]
    found = []
    for number in (0, 1):
        cfg = toy_config(tmp_path / f"{number}", hooks[number:], data_root=toy_data)
        runner = Runner.from_cfg(cfg)
        getattr(runner, run)()
        found.append(vis_hooks(runner)[-1].samples)
    assert len(found[0]) == len(found[1]) == 4
    for sample, alone in zip(*found):
        assert sample.frame == alone.frame
        maps = [s.activations[0].feature_map for s in (sample, alone)]
        assert torch.equal(*maps)


# When pictures are made, and how they are called.


def test_the_same_images_in_every_validation_with_a_rising_step(tmp_path, toy_data):
    hooks = [spy(num_images=2), box_spy(num_images=1, interval=2)]
    cfg = box_config(tmp_path, hooks, data_root=toy_data, max_epochs=3)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert sorted(pictures(tmp_path)) == names_of(
        *(f"val.featmap.{i}_image_{epoch}" for i in (1, 6) for epoch in (1, 2, 3)),
        *(f"val.boxam.1_image_{epoch}" for epoch in (1, 3)),
    )
    samples = vis_hooks(runner)[0].samples
    maps = [s.activations[0].feature_map for s in samples if s.image_id == "1_image"]
    assert not torch.equal(maps[0], maps[2])  # the training moved


def test_a_resumed_training_draws_what_an_uninterrupted_one_would(tmp_path, toy_data):
    """Intervals count in the training's validations, not in the process's."""
    begun = dict(by_epoch=True, max_epochs=2, val_interval=1)
    going_on = dict(
        resume=True,
        train_cfg=dict(by_epoch=True, max_epochs=6, val_begin=2, val_interval=2),
    )
    for settings in (dict(train_cfg=begun), going_on):
        hooks = [spy(num_images=1, interval=2)]
        cfg = toy_config(tmp_path, hooks, data_root=toy_data, **settings)
        Runner.from_cfg(cfg).train()
    # Of 1 and 2, the first; of 2, 4 and 6 at the new interval, 2 and 6.
    assert sorted(pictures(tmp_path)) == names_of(
        "val.featmap.1_image_1", "val.featmap.1_image_6"
    )


@pytest.mark.parametrize(
    ("interval", "settings"),
    [
        (1, dict(max_iters=4, val_interval=2)),
        # Of 2, 3, 4 and 5 every second.
        (2, dict(max_iters=5, val_interval=2, dynamic_intervals=[(4, 1)])),
    ],
)
def test_iterations_are_the_step_of_an_iteration_based_training(
    tmp_path, toy_data, interval, settings
):
    cfg = toy_config(
        tmp_path,
        [spy(num_images=1, interval=interval)],
        data_root=toy_data,
        train_cfg=dict(by_epoch=False, **settings),
        log_processor=dict(by_epoch=False),
    )
    cfg.train_dataloader.sampler = dict(type="InfiniteSampler")
    Runner.from_cfg(cfg).train()
    found = sorted(pictures(tmp_path))
    assert found == names_of("val.featmap.1_image_2", "val.featmap.1_image_4")


def test_three_hooks_in_a_second_test(tmp_path, toy_data):
    hooks = [
        spy(num_images=1),
        box_spy(num_images=1),
        box_spy(num_images=1, alignment="letterbox"),
        spy(draw=False, target_layers=["no.such.layer"]),
        box_spy(draw=False, classes=["nothing"]),
    ]
    runner = after_test(box_config(tmp_path, hooks, data_root=toy_data))
    assert isinstance(runner._train_loop, dict)  # nobody built it
    runner.test()
    assert sorted(pictures(tmp_path)) == names_of(
        *(
            f"test.{name}.1_image_{run}"
            for name in ("boxam", "boxam_2", "featmap")
            for run in (0, 1)
        )
    )


def test_one_hook_in_two_runners_draws_for_each(tmp_path, toy_data):
    shared = HOOKS.build(spy(num_images=1))
    for name in ("first", "second"):
        cfg = toy_config(tmp_path / name, [], data_root=toy_data)
        runner = Runner.from_cfg(cfg)
        runner.register_hook(shared)
        runner.test()
        assert list(pictures(tmp_path / name)) == ["test.featmap.1_image_0.png"]


def test_train_then_test_in_one_runner(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path, [spy(alignment="letterbox", num_images=1)], data_root=toy_data
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.test()
    runner.val()
    trials = 2 * 3  # of the validation's data, and the test's, with their padding
    assert runner.model.num_forwards == trials + 2 * (3 + 3) + 3 + 3
    # The validation after the training does not overwrite that of its second epoch.
    assert sorted(pictures(tmp_path)) == names_of(
        "test.featmap.1_image_0", *(f"val.featmap.1_image_{n}" for n in (1, 2, 3))
    )


def test_selected_images_that_never_come_are_reported(tmp_path, toy_data):
    @DATA_SAMPLERS.register_module(force=True)
    class HalfSampler(torch.utils.data.Sampler):
        def __init__(self, dataset, seed=None):
            self.dataset = dataset

        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            return 3

    cfg = toy_config(tmp_path, [spy(image_indices=[1, 4])], data_root=toy_data)
    cfg.test_evaluator = []
    cfg.test_dataloader.sampler = dict(type="HalfSampler")
    cfg.test_dataloader.dataset.metainfo.palette = "random"  # no list of colours
    after_test(cfg)
    assert len(pictures(tmp_path)) == 1
    log = log_of(tmp_path)
    assert "1 selected image(s) never came through the test loop: 5_image" in log


def test_a_visualizer_without_backends_is_reported(tmp_path, toy_data):
    after_test(toy_config(tmp_path, [spy()], data_root=toy_data, vis_backends=()))
    assert "no picture will be kept" in log_of(tmp_path)
    assert pictures(tmp_path) == {}
