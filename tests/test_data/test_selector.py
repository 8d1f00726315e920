from __future__ import annotations

import pytest
from mmdet.datasets import CocoDataset
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.runner.runner import _SlicedDataset
from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import Subset

from mmyolo_vis_hooks.data.selector import (
    ImageSelector,
    leaf_datasets,
    make_image_id,
    resolve_index,
    spread_indices,
)
from mmyolo_vis_hooks.errors import VisConfigError
from tests.toy import SIZES, write_dataset


def coco(root, kind=CocoDataset, **kwargs) -> CocoDataset:
    return kind(
        data_root=str(root),
        ann_file="annotations.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("square",)),
        test_mode=True,
        pipeline=[],
        **kwargs,
    )


@pytest.fixture
def root(tmp_path):
    write_dataset(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("total", "wanted", "indices"),
    [
        (128, 4, [0, 42, 85, 127]),
        (10, 1, [0]),
        (3, 4, [0, 1, 2]),
        (5, -1, [0, 1, 2, 3, 4]),
    ],
)
def test_spread(total, wanted, indices):
    assert spread_indices(total, wanted) == indices


def test_find_by_metainfo(root):
    selector = ImageSelector(coco(root), 4, [1, 3])
    wanted = selector.images[1]
    full = dict(img_id=wanted.img_id, img_path=wanted.img_path)
    assert selector.find(full) is wanted
    assert selector.find(dict(img_id=wanted.img_id)) is wanted
    assert selector.find(dict(img_path=wanted.img_path)) is wanted
    assert selector.find(dict(img_id=1, img_path="elsewhere")) is None
    assert selector.find({}) is None


def test_wrappers_lead_to_the_dataset_that_loads_the_image(root, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    write_dataset(second)
    one, two = coco(root), coco(second, indices=[4, 2])
    n = len(SIZES)
    assert resolve_index(ConcatDataset([one, two]), n + 1) == (two, 1)
    # MMEngine nests wrappers through configs only; torch's takes any of them.
    concat = TorchConcatDataset([RepeatDataset(one, 2), two])
    assert resolve_index(concat, n + 1) == (one, 1)
    leaf, index = resolve_index(concat, 2 * n)
    assert leaf is two
    assert leaf.get_data_info(index)["img_id"] == 5  # the fifth image
    assert resolve_index(Subset(concat, [3, 2 * n + 1]), 1) == (two, 1)
    balanced = ClassBalancedDataset(one, oversample_thr=1e-3)
    assert resolve_index(balanced, 2) == (one, 2)
    assert leaf_datasets(concat) == [one, two]
    # What a loader with num_batch_per_epoch has around its data set.
    assert resolve_index(_SlicedDataset(one, 3), 2) == (one, 2)
    assert leaf_datasets(_SlicedDataset(concat, 3)) == [one, two]
    # Equal ids and equal file names in two datasets, and repeated images.
    selector = ImageSelector(concat, -1, None)
    images = selector.images
    assert len(images) == n + 2
    assert len({image.image_id for image in images}) == n + 2
    assert selector.find(dict(img_id=5)) is None  # of which?
    assert selector.find(dict(img_id=4)).dataset is one


def test_image_ids_are_safe_and_unique():
    assert make_image_id(139, "a/000000000139.jpg", 0) == "139_000000000139"
    assert make_image_id(None, None, 7) == "7"
    # As VOC, OpenImages and CrowdHuman name theirs.
    assert make_image_id("000139", "a/000139.jpg", 0) == "000139"
    strange = [
        make_image_id(0, f"a/{name}.jpg", 0) for name in ("ü/ö", "x y", "x?y", "x.y")
    ]
    assert len(set(strange)) == 4
    long = [make_image_id(0, "n" * 300 + end, 0) for end in "ab"]
    assert long[0] != long[1]
    for name in strange + long:
        assert len(name) < 100
        assert not set(name) - set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
        )


@pytest.mark.parametrize("paths", [list, lambda paths: dict(zip("ab", paths))])
def test_images_of_several_files(root, paths):
    class Bands(CocoDataset):
        def get_data_info(self, idx):
            info = super().get_data_info(idx)
            return {**info, "img_path": paths([info["img_path"], "nir.tif"])}

    data = coco(root, kind=Bands)
    (first, _) = ImageSelector(data, 2, None).images
    assert first.image_id == "1_image"
    metainfo = dict(img_id=1, img_path=type(first.img_path)(first.img_path))
    assert ImageSelector(data, 2, None).find(metainfo) == first


def test_an_image_that_is_loaded_from_memory_is_found_by_its_id(root):
    """Where ``LoadImageFromNDArray`` puts None for the path."""
    selector = ImageSelector(coco(root), 2, None)
    first, _ = selector.images
    assert selector.find(dict(img_id=first.img_id, img_path=None)) == first
    assert selector.find(dict(img_id=None, img_path=None)) is None


def test_images_without_a_name_are_refused(root):
    class Nameless(CocoDataset):
        def get_data_info(self, idx):
            return {**super().get_data_info(idx), "img_id": None, "img_path": None}

    with pytest.raises(VisConfigError, match="Nameless names its images neither"):
        ImageSelector(coco(root, kind=Nameless), 2, None)


def test_dataset_without_data_info_is_named():
    with pytest.raises(VisConfigError, match="list has no get_data_info"):
        ImageSelector([1, 2, 3], 2, None)
