from __future__ import annotations

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope

from mmyolo_vis_hooks.data.pipeline import (
    AlignedResize,
    build_resize_only_pipeline,
    moves_pixels,
    prepare_data,
)
from mmyolo_vis_hooks.errors import UnsupportedPipelineError
from tests.toy import LETTERBOX, make_pipeline, write_dataset


@pytest.fixture(autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def build(steps):
    from mmengine.dataset import Compose

    return Compose([TRANSFORMS.build(dict(step)) for step in steps])


def dataset(root, geometry, **kwargs) -> CocoDataset:
    return CocoDataset(
        data_root=str(root),
        ann_file="annotations.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("square",)),
        test_mode=True,
        pipeline=make_pipeline(geometry),
        **kwargs,
    )


def aligned(geometry, divisor=32, stride=32) -> AlignedResize:
    pipeline = build_resize_only_pipeline(
        build(make_pipeline(geometry)), divisor=divisor, stride=stride
    )
    (step,) = [s for s in pipeline.transforms if isinstance(s, AlignedResize)]
    return step


YOLOX = (
    dict(type="Resize", scale=(416, 416), keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
)
PPYOLOE = (dict(type="FixShapeResize", width=640, height=640, keep_ratio=False),)
FASTER = (dict(type="Resize", scale=(1333, 800), keep_ratio=True),)
STRETCH = (dict(type="Resize", scale=(1333, 800), keep_ratio=False),)
SHORTEST = (dict(type="ResizeShortestEdge", scale=800, max_size=1333),)


@pytest.mark.parametrize(
    ("geometry", "image_hw", "size_hw"),
    [
        (LETTERBOX, (480, 640), (96, 128)),
        (LETTERBOX, (640, 480), (128, 96)),
        (YOLOX, (480, 640), (320, 416)),
        (YOLOX, (427, 640), (288, 416)),
        (PPYOLOE, (480, 640), (640, 640)),
        (FASTER, (480, 640), (800, 1056)),
        (FASTER, (640, 427), (1184, 800)),
        (SHORTEST, (640, 427), (1184, 800)),
        (STRETCH, (480, 640), (800, 1344)),
        (STRETCH, (640, 480), (1344, 800)),
        ((), (480, 640), (480, 640)),
        ((), (333, 500), (320, 512)),
    ],
)
def test_size_keeps_orientation_and_is_a_multiple(geometry, image_hw, size_hw):
    found = aligned(geometry).size_hw(image_hw)
    assert found == size_hw
    assert found[0] % 32 == found[1] % 32 == 0


def test_large_divisors_and_strides():
    assert aligned(LETTERBOX, divisor=64).size_hw((480, 640)) == (128, 128)
    assert aligned(PPYOLOE, divisor=1).size_hw((480, 640)) == (640, 640)
    assert aligned(FASTER, divisor=1, stride=64).size_hw((480, 640)) == (768, 1088)


@pytest.mark.parametrize("geometry", [LETTERBOX, YOLOX, PPYOLOE, FASTER, STRETCH, ()])
def test_the_image_fills_the_input_and_nothing_else_moves(tmp_path, geometry):
    write_dataset(tmp_path)
    data = dataset(tmp_path, geometry)
    before = data[1]
    pipeline = build_resize_only_pipeline(data.pipeline, divisor=32, stride=32)
    resized = prepare_data(data, 1, pipeline)
    meta = resized["data_samples"].metainfo
    assert "pad_param" not in meta
    assert tuple(resized["inputs"].shape[1:]) == tuple(meta["img_shape"][:2])
    height, width = meta["ori_shape"]
    assert meta["scale_factor"][0] == pytest.approx(meta["img_shape"][1] / width)
    assert meta["scale_factor"][1] == pytest.approx(meta["img_shape"][0] / height)
    # The picture is the original one, only larger or smaller.
    original = cv2.imread(meta["img_path"])
    back = cv2.resize(resized["inputs"].numpy().transpose(1, 2, 0), (width, height))
    assert np.abs(back.astype(int) - original).mean() < 12
    # The dataset's own pipeline is what it was.
    after = data[1]
    assert after["inputs"].shape == before["inputs"].shape
    assert (after["inputs"] == before["inputs"]).all()


def test_an_aligned_pipeline_gives_the_same_pipeline_again():
    once = build_resize_only_pipeline(
        build(make_pipeline(FASTER)), divisor=32, stride=32
    )
    twice = build_resize_only_pipeline(once, divisor=32, stride=32)
    (step,) = [s for s in twice.transforms if isinstance(s, AlignedResize)]
    assert step.size_hw((480, 640)) == (800, 1056)


def test_batch_shapes_do_not_matter(tmp_path):
    import mmyolo.datasets  # noqa: F401

    write_dataset(tmp_path)
    from mmyolo.datasets import YOLOv5CocoDataset

    data = YOLOv5CocoDataset(
        data_root=str(tmp_path),
        ann_file="annotations.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("square",)),
        test_mode=True,
        pipeline=make_pipeline(LETTERBOX),
        batch_shapes_cfg=dict(
            type="mmyolo.BatchShapePolicy",
            batch_size=2,
            img_size=128,
            size_divisor=32,
            extra_pad_ratio=0.5,
        ),
    )
    assert tuple(data[0]["inputs"].shape[1:]) != (96, 128)
    pipeline = build_resize_only_pipeline(data.pipeline, divisor=1, stride=32)
    for i in range(len(data)):
        resized = prepare_data(data, i, pipeline)
        height, width = resized["data_samples"].ori_shape
        expected = AlignedResize(pipeline.transforms[1]._steps, 1, 32)
        assert tuple(resized["inputs"].shape[1:]) == expected.size_hw((height, width))


@pytest.mark.parametrize("flips_first", [True, False])
def test_first_view_of_test_time_augmentation(tmp_path, flips_first):
    write_dataset(tmp_path)
    flips = [
        [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)],
        [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
    ][not flips_first]
    views = dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Compose", transforms=list(LETTERBOX))],
            flips,
            make_pipeline(())[1:2],
            make_pipeline(())[2:],
        ],
    )
    data = dataset(tmp_path, ())
    data.pipeline = build([dict(type="LoadImageFromFile"), views])
    pipeline = build_resize_only_pipeline(data.pipeline, divisor=32, stride=32)
    resized = prepare_data(data, 0, pipeline)
    assert tuple(resized["inputs"].shape[1:]) == (64, 128)
    assert not resized["data_samples"].metainfo.get("flip")


class Colours:
    def __call__(self, results):
        results["img"] = (255 - results["img"] * 0.8).astype(np.uint8)[..., ::-1]
        return results


class Mirror:
    def __call__(self, results):
        results["img"] = results["img"][:, ::-1]
        return results


class Shift(Mirror):
    def __call__(self, results):
        results["img"] = np.roll(results["img"], 5, axis=1)
        return results


class Crop(Mirror):
    def __call__(self, results):
        results["img"] = results["img"][8:-8, 8:-8]
        return results


class NeedsMore(Mirror):
    def __call__(self, results):
        results["img"] = results["img"] * results["secret"]
        return results


def test_unknown_steps_are_tried():
    assert not moves_pixels(Colours())
    for step in (Mirror(), Shift(), Crop(), NeedsMore()):
        assert moves_pixels(step), step


@pytest.mark.parametrize(
    "step",
    [
        dict(type="mmcv.CenterCrop", crop_size=640),
        dict(
            type="mmcv.RandomChoiceResize",
            scales=[(128, 128)],
            keep_ratio=True,
            resize_type="mmdet.Resize",
        ),
    ],
)
def test_a_step_that_leaves_some_sizes_alone_is_geometric(step):
    assert moves_pixels(TRANSFORMS.build(step))


@pytest.mark.parametrize("step", [Mirror(), Crop()])
def test_unknown_geometry_is_refused_with_the_alternative(step):
    from mmengine.dataset import Compose

    pipeline = Compose([*build(make_pipeline()).transforms[:2], step])
    with pytest.raises(
        UnsupportedPipelineError,
        match=rf"'{type(step).__name__}'.*alignment='network'",
    ):
        build_resize_only_pipeline(pipeline, divisor=32, stride=32)


def test_unknown_colour_step_is_kept():
    from mmengine.dataset import Compose

    step = Colours()
    steps = [*build(make_pipeline()).transforms[:2], step]
    kept = build_resize_only_pipeline(Compose(steps), divisor=32, stride=32)
    assert [type(s).__name__ for s in kept.transforms] == [
        "LoadImageFromFile",
        "AlignedResize",
        "Colours",
    ]
    assert kept.transforms[2] is not step
