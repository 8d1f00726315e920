"""Options, schedule and alignment of the hook on a real Runner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import DATA_SAMPLERS, HOOKS, MODELS
from mmengine.runner import Runner

from mmyolo_vis_hooks import FeatMapVisHook
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from tests.test_hooks.helpers import log_of, pictures, spy, vis_hooks
from tests.toy import LETTERBOX, META_KEYS, SQUARE, make_pipeline, toy_config

ALIGNMENTS = ("resize", "letterbox", "network")
KEEP_RATIO = (dict(type="mmdet.Resize", scale=(200, 120), keep_ratio=True),)
SQUARE_PAD = (
    dict(type="mmdet.Resize", scale=(128, 128), keep_ratio=True),
    dict(type="mmdet.Pad", pad_to_square=True, pad_val=dict(img=(114, 114, 114))),
)
FIXED = (dict(type="mmdet.FixShapeResize", width=160, height=160, keep_ratio=False),)
GEOMETRIES = dict(
    letterbox=LETTERBOX, keep_ratio=KEEP_RATIO, square_pad=SQUARE_PAD, fixed=FIXED
)


def test_registered_in_the_root_registry():
    assert HOOKS.get("FeatMapVisHook") is FeatMapVisHook


def test_a_bad_value_fails_when_the_runner_is_built(tmp_path, toy_data):
    hook = dict(type="FeatMapVisHook", alpha=1.5)
    with pytest.raises(ValueError, match="alpha") as error:
        Runner.from_cfg(toy_config(tmp_path, [hook], data_root=toy_data))
    assert isinstance(error.value.__cause__ or error.value, VisError)


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("train", dict(target_layers=["nekc"]), "near matches: neck"),
        ("val", dict(image_indices=[6]), "6 images"),
        ("test", dict(image_indices=[6]), "6 images"),
    ],
)
def test_what_does_not_fit_fails_before_the_run(
    tmp_path, toy_data, run, options, message
):
    cfg = toy_config(tmp_path, [spy(**options)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(VisConfigError, match=message):
        getattr(runner, run)()
    assert runner.model.num_forwards == 0


def test_batches_that_do_not_name_their_images_fail_before_the_run(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy()], data_root=toy_data)
    keys = [key for key in META_KEYS if key not in ("img_id", "img_path")]
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = keys
    with pytest.raises(VisConfigError, match="add both"):
        Runner.from_cfg(cfg).test()


@pytest.mark.parametrize("alignment", [None, *ALIGNMENTS])
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


def test_a_second_test_in_one_runner_overwrites_nothing(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy(num_images=1)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.test()
    runner.test()
    assert sorted(pictures(tmp_path)) == [
        "test.featmap.1_image_0.png",
        "test.featmap.1_image_1.png",
    ]


def brightness_of(samples):
    """Maps of the brightness layer, resampled to the drawn image."""
    for sample in samples:
        (activation,) = sample.activations
        yield sample, sample.frame.resample(activation.feature_map.float())[0].numpy()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_maps_lie_on_their_objects(tmp_path, toy_data, alignment, geometry):
    """The map's bright place is at most one cell off the square."""
    hook = spy(target_layers=["brightness"], alignment=alignment, num_images=-1)
    cfg = toy_config(
        tmp_path,
        [hook],
        data_root=toy_data,
        geometry=GEOMETRIES[geometry],
        batch_size=4,
    )
    runner = Runner.from_cfg(cfg)
    runner.test()
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == 6
    for sample, heat in brightness_of(samples):
        assert heat.shape == sample.image_rgb.shape[:2]
        bright = sample.image_rgb.mean(axis=2) > 180  # 114 is padding
        assert bright.sum() >= SQUARE
        weight = np.clip(heat - (heat.min() + heat.max()) / 2, 0, None)
        rows, columns = np.indices(heat.shape)
        centre = [(weight * axis).sum() / weight.sum() for axis in (rows, columns)]
        truth = [np.nonzero(bright)[axis].mean() for axis in (0, 1)]
        for axis in (0, 1):
            cell = 8 / sample.frame.scale_xy[1 - axis]
            assert abs(centre[axis] - truth[axis]) <= cell, (sample.image_id, axis)
    assert len(pictures(tmp_path)) == 6


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_detections_are_drawn_where_the_network_found_them(
    tmp_path, toy_data, alignment
):
    hook = spy(alignment=alignment, num_images=-1)
    cfg = toy_config(tmp_path, [hook], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.test()
    for sample in vis_hooks(runner)[0].samples:
        (box,) = sample.detections.boxes_xyxy
        rows, columns = np.nonzero(sample.image_rgb.mean(axis=2) > 180)
        centre = (box[:2] + box[2:]) / 2
        reach = 16 / np.array(sample.frame.scale_xy)
        assert np.all(np.abs(centre - [columns.mean(), rows.mean()]) <= reach)


def test_letterbox_and_network_need_no_second_forward(tmp_path, toy_data):
    counts = {}
    for alignment in ALIGNMENTS:
        cfg = toy_config(
            tmp_path / alignment, [spy(alignment=alignment)], data_root=toy_data
        )
        runner = Runner.from_cfg(cfg)
        runner.test()
        counts[alignment] = runner.model.num_forwards
        assert len(pictures(tmp_path / alignment)) == 4
    assert counts == dict(resize=3 + 4, letterbox=3, network=3)


@pytest.mark.parametrize("run", ["val", "test"])
def test_a_hook_that_runs_the_model_does_not_disturb_a_recording(
    tmp_path, toy_data, run
):
    """The first hook's forward comes between the loop's and the second's drawing."""
    hooks = [spy(), spy(alignment="letterbox", target_layers=["brightness"])]
    cfg = toy_config(tmp_path / "two", hooks, data_root=toy_data)
    two = Runner.from_cfg(cfg)
    getattr(two, run)()
    cfg = toy_config(tmp_path / "one", hooks[1:], data_root=toy_data)
    one = Runner.from_cfg(cfg)
    getattr(one, run)()
    found, expected = vis_hooks(two)[1].samples, vis_hooks(one)[0].samples
    assert len(found) == len(expected) == 4
    for sample, alone in zip(found, expected):
        assert sample.frame == alone.frame
        maps = [s.activations[0].feature_map for s in (sample, alone)]
        assert torch.equal(*maps)


def test_the_same_images_in_every_validation_with_a_rising_step(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy(num_images=2)], data_root=toy_data, max_epochs=3)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert sorted(pictures(tmp_path)) == sorted(
        f"val.featmap.{i}_image_{epoch}.png" for i in (1, 6) for epoch in (1, 2, 3)
    )
    samples = vis_hooks(runner)[0].samples
    maps = [s.activations[0].feature_map for s in samples if s.image_id == "1_image"]
    assert not torch.equal(maps[0], maps[2])  # the training moved


def test_interval_counts_validation_runs(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path, [spy(num_images=1, interval=2)], data_root=toy_data, max_epochs=4
    )
    Runner.from_cfg(cfg).train()
    assert sorted(pictures(tmp_path)) == [
        "val.featmap.1_image_1.png",
        "val.featmap.1_image_3.png",
    ]


def test_iterations_are_the_step_of_an_iteration_based_training(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path,
        [spy(num_images=1)],
        data_root=toy_data,
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=2),
        log_processor=dict(by_epoch=False),
    )
    cfg.train_dataloader.sampler = dict(type="InfiniteSampler")
    Runner.from_cfg(cfg).train()
    assert sorted(pictures(tmp_path)) == [
        "val.featmap.1_image_2.png",
        "val.featmap.1_image_4.png",
    ]


def test_a_pure_validation_does_not_build_the_training_loop(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy()], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.val()
    assert isinstance(runner._train_loop, dict)
    assert len(pictures(tmp_path)) == 4


@pytest.mark.parametrize("palette", ["random", (220, 20, 60)])
def test_palettes_without_a_list_of_colours(tmp_path, toy_data, palette):
    cfg = toy_config(tmp_path, [spy()], data_root=toy_data)
    cfg.test_dataloader.dataset.metainfo.palette = palette
    Runner.from_cfg(cfg).test()
    assert len(pictures(tmp_path)) == 4


def test_draw_false_does_nothing(tmp_path, toy_data):
    hook = spy(draw=False, target_layers=["no.such.layer"])
    cfg = toy_config(tmp_path, [hook], data_root=toy_data)
    Runner.from_cfg(cfg).test()
    assert pictures(tmp_path) == {}


def test_train_then_test_in_one_runner(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path, [spy(alignment="letterbox", num_images=1)], data_root=toy_data
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.test()
    runner.val()
    assert runner.model.num_forwards == 2 * (3 + 3) + 3 + 3
    # The last validation is of the second epoch too.
    assert sorted(pictures(tmp_path)) == [
        "test.featmap.1_image_0.png",
        "val.featmap.1_image_1.png",
        "val.featmap.1_image_2.png",
    ]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_repeated_and_concatenated_datasets(tmp_path, toy_data, alignment):
    cfg = toy_config(
        tmp_path, [spy(alignment=alignment, num_images=-1)], data_root=toy_data
    )
    inner = cfg.val_dataloader.dataset
    cfg.test_dataloader.dataset = dict(
        type="ConcatDataset", datasets=[inner, dict(inner, indices=[1, 2])]
    )
    cfg.test_evaluator = dict(type="DumpResults", out_file_path=str(tmp_path / "o.pkl"))
    Runner.from_cfg(cfg).test()
    assert len(pictures(tmp_path)) == 6


def test_override_runs_the_loop_on_the_resize_only_pipeline(tmp_path, toy_data):
    hook = spy(override_loop_pipeline=True, target_layers=["brightness"])
    cfg = toy_config(tmp_path, [hook], data_root=toy_data, batch_size=1)
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert runner.model.num_forwards == 6  # nothing besides the loop's own
    assert "metrics are of that pipeline" in log_of(tmp_path)
    (picture_hook,) = vis_hooks(runner)
    for sample in picture_hook.samples:
        assert sample.frame.offset_xy == (0.0, 0.0)
        height, width = sample.frame.network_hw
        scale = np.array([width, height]) / sample.image_rgb.shape[1::-1]
        np.testing.assert_allclose(sample.frame.scale_xy, scale)


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
    runner = Runner.from_cfg(cfg)
    runner.test()
    first, second = (
        [sample.frame.network_hw for sample in hook.samples]
        for hook in vis_hooks(runner)
    )
    assert first == second == [(256, 384), (224, 384), (256, 256), (384, 256)]


@MODELS.register_module()
class ToyTTA(BaseTTAModel):
    """Gives the predictions of the first view."""

    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]


def tta_config(tmp_path, toy_data, hook, flip_first):
    cfg = toy_config(tmp_path, [hook], data_root=toy_data)
    first, second = (1.0, 0.0) if flip_first else (0.0, 1.0)
    pipeline = make_pipeline()
    cfg.test_dataloader.dataset.pipeline = [
        pipeline[0],
        dict(
            type="TestTimeAug",
            transforms=[
                [dict(type="Compose", transforms=list(LETTERBOX))],
                [
                    dict(type="mmdet.RandomFlip", prob=first),
                    dict(type="mmdet.RandomFlip", prob=second),
                ],
                [pipeline[-2]],
                [pipeline[-1]],
            ],
        ),
    ]
    cfg.model = dict(type="ToyTTA", module=cfg.model)
    return cfg


@pytest.mark.parametrize(
    ("alignment", "flip_first"),
    [("resize", True), ("letterbox", True), ("network", False)],
)
def test_test_time_augmentation(tmp_path, toy_data, alignment, flip_first):
    hook = spy(alignment=alignment, target_layers=["brightness"], num_images=-1)
    runner = Runner.from_cfg(tta_config(tmp_path, toy_data, hook, flip_first))
    runner.test()
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == 6
    for sample, heat in brightness_of(samples):
        bright = np.nonzero(sample.image_rgb.mean(axis=2) > 180)
        peak = np.unravel_index(heat.argmax(), heat.shape)
        for axis in (0, 1):
            reach = SQUARE / 2 + 8 / sample.frame.scale_xy[1 - axis]
            assert abs(peak[axis] - bright[axis].mean()) <= reach


def test_override_is_refused_under_test_time_augmentation(tmp_path, toy_data):
    cfg = tta_config(tmp_path, toy_data, spy(override_loop_pipeline=True), True)
    with pytest.raises(VisConfigError, match="test-time augmentation"):
        Runner.from_cfg(cfg).test()


def test_selected_images_that_never_come_are_reported(tmp_path, toy_data):
    class HalfSampler(torch.utils.data.Sampler):
        def __init__(self, dataset, seed=None):
            self.dataset = dataset

        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            return 3

    cfg = toy_config(tmp_path, [spy(image_indices=[1, 4])], data_root=toy_data)
    cfg.test_evaluator = dict(type="DumpResults", out_file_path=str(tmp_path / "o.pkl"))
    DATA_SAMPLERS.register_module(module=HalfSampler, force=True)
    cfg.test_dataloader.sampler = dict(type="HalfSampler")
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert len(pictures(tmp_path)) == 1
    assert "1 selected image(s) never came through the test loop: 5_image" in log_of(
        tmp_path
    )


def test_a_visualizer_without_backends_is_reported(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy()], data_root=toy_data, vis_backends=())
    Runner.from_cfg(cfg).test()
    assert "no picture will be kept" in log_of(tmp_path)
    assert pictures(tmp_path) == {}
