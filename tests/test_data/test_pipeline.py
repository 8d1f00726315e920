from __future__ import annotations

import http.server
import threading
from urllib.parse import urlparse

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmyolo.datasets import YOLOv5CocoDataset

from mmyolo_vis_hooks.data.pipeline import ImagePipeline
from mmyolo_vis_hooks.data.resize import AlignedResize
from mmyolo_vis_hooks.data.selector import SelectedImage
from mmyolo_vis_hooks.errors import (
    UnsupportedPipelineError,
    VisConfigError,
    VisError,
)
from tests.toy import LETTERBOX, make_pipeline, write_dataset


@pytest.fixture(autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def build(steps):
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


def resized(pipeline, image_hw=(96, 128), divisor=32, stride=32) -> ImagePipeline:
    """The Resize-only copy, found on an image without texture."""
    pipeline = ImagePipeline(pipeline)
    loaded = pipeline.load(np.full((*image_hw, 3), 90, np.uint8))
    return pipeline.resize_only(loaded, divisor=divisor, stride=stride)


def aligned(geometry, divisor=32, stride=32) -> AlignedResize:
    pipeline = resized(build(make_pipeline(geometry)), divisor=divisor, stride=stride)
    (step,) = [s for s in pipeline.steps if isinstance(s, AlignedResize)]
    return step


YOLOX = (
    dict(type="Resize", scale=(416, 416), keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
)
PPYOLOE = (dict(type="FixShapeResize", width=640, height=640, keep_ratio=False),)
FASTER = (dict(type="Resize", scale=(1333, 800), keep_ratio=True),)
SMALL = (dict(type="mmyolo.LetterResize", scale=(640, 640), allow_scale_up=False),)
STRETCH = (dict(type="Resize", scale=(1333, 800), keep_ratio=False),)
STRETCH_PAD = (
    dict(type="Resize", scale=(500, 300), keep_ratio=False),
    dict(type="Pad", size_divisor=32),
)
SHORTEST = (dict(type="ResizeShortestEdge", scale=800, max_size=1333),)


@pytest.mark.parametrize(
    ("geometry", "image_hw", "size_hw"),
    [
        (LETTERBOX, (480, 640), (96, 128)),
        (YOLOX, (427, 640), (288, 416)),
        (PPYOLOE, (480, 640), (640, 640)),
        (FASTER, (640, 427), (1184, 800)),
        (SHORTEST, (640, 427), (1184, 800)),
        (STRETCH, (640, 480), (1344, 800)),
        (STRETCH_PAD, (480, 640), (288, 512)),
        (SMALL, (90, 200), (96, 192)),
        (SMALL, (320, 1280), (160, 640)),
        ((), (333, 500), (320, 512)),
    ],
)
def test_size_keeps_orientation_and_is_a_multiple(geometry, image_hw, size_hw):
    assert aligned(geometry).size_hw(image_hw) == size_hw
    multiples = {"divisor": 64, "stride": 1}, {"divisor": 1, "stride": 64}
    for found in (aligned(geometry, **m).size_hw(image_hw) for m in multiples):
        assert found[0] % 64 == found[1] % 64 == 0 or geometry in (PPYOLOE, STRETCH)


def test_batch_shapes_do_not_matter(tmp_path):
    write_dataset(tmp_path)
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
    pipeline = ImagePipeline(data.pipeline)
    for i in range(len(data)):
        loaded = SelectedImage("", None, None, data, i).through(pipeline.load)
        aligned = pipeline.resize_only(loaded, divisor=1, stride=32)
        height, width = loaded.image_rgb.shape[:2]
        scale = 128 / max(height, width)
        expected = tuple(max(1, round(n * scale / 32)) * 32 for n in (height, width))
        assert tuple(aligned.pack(loaded)["inputs"].shape[1:]) == expected


# What loads, and how.


class Step:
    """A step of a user's own, of a function of the results."""

    def __init__(self, change) -> None:
        self.change = change

    def __call__(self, results):
        return {**results, **self.change(results)}


class ReadTiff(Step):
    """A loader that no name betrays."""


class AddBand(Step):
    """Brings a fourth channel."""


PICTURE = np.random.RandomState(0).randint(0, 256, (60, 100, 3)).astype(np.uint8)


def own_loader(image_bgr):
    def change(results):
        size_hw = image_bgr.shape[:2]
        return dict(img=image_bgr, img_shape=size_hw, ori_shape=size_hw)

    return ReadTiff(change)


def add_band(results):
    band = np.full((*results["img"].shape[:2], 1), 77, np.uint8)
    return dict(img=np.concatenate([results["img"], band], axis=2))


def invert(results):
    return dict(img=255 - results["img"])


def mirror(results):
    return dict(img=np.ascontiguousarray(results["img"][:, ::-1]))


def packed(*steps) -> ImagePipeline:
    resize = build(list(FASTER)).transforms
    return ImagePipeline([*steps, *resize, *build(make_pipeline(())[-1:]).transforms])


INFO = dict(img_path="x.tif", img_id=3, instances=[])


def test_the_picture_is_what_a_users_own_loader_gives():
    pipeline = packed(own_loader(PICTURE[..., ::-1]), Step(invert))
    for _ in range(2):
        loaded = pipeline.load(INFO)
        np.testing.assert_array_equal(loaded.image_rgb, PICTURE)
    # What only changes colours stays out of the picture, not out of the input.
    inputs = pipeline.pack(loaded)["inputs"].float()
    assert abs(inputs.mean() - (255 - PICTURE.mean())) < 2


def test_several_loaders_in_a_row():
    pipeline = packed(own_loader(PICTURE), Step(invert), AddBand(add_band))
    loaded = pipeline.load(INFO)
    assert loaded.results["img"].shape == (60, 100, 4)
    assert "of 4" in loaded.note
    for aligned in (False, True):
        if aligned:
            pipeline = pipeline.resize_only(loaded, divisor=32, stride=32)
        inputs = pipeline.pack(loaded)["inputs"]
        assert inputs.shape[0] == 4
        assert (inputs[3] == 77).all()
    other = packed(own_loader(PICTURE), own_loader(PICTURE[::-1]))
    np.testing.assert_array_equal(other.load(INFO).image_rgb, PICTURE[::-1, :, ::-1])


def test_a_step_that_moves_pixels_is_no_loader_and_no_resize():
    pipeline = packed(own_loader(PICTURE[..., ::-1]), Step(mirror), AddBand(add_band))
    loaded = pipeline.load(INFO)
    np.testing.assert_array_equal(loaded.image_rgb, PICTURE)
    with pytest.raises(UnsupportedPipelineError, match="'Step' moves pixels"):
        pipeline.resize_only(loaded, divisor=32, stride=32)


def test_packing_changes_nothing_that_was_loaded():
    def paint(results):
        results["img"][:] = 0
        return {}

    pipeline = packed(own_loader(PICTURE.copy()), Step(paint))
    loaded = pipeline.load(INFO)
    before = loaded.results["img"].copy()
    for _ in range(2):
        assert not pipeline.pack(loaded)["inputs"].any()
    np.testing.assert_array_equal(loaded.results["img"], before)


@pytest.mark.parametrize(
    ("options", "values", "dtype"),
    [
        (dict(color_type="grayscale"), PICTURE[..., :1], np.uint8),
        (dict(to_float32=True), PICTURE[..., ::-1], np.float32),
        (dict(color_type="unchanged"), PICTURE[..., ::-1].astype(np.uint16) * 9, None),
    ],
)
def test_files_are_read_as_the_loader_reads_them(tmp_path, options, values, dtype):
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, values)
    loader = TRANSFORMS.build(dict(type="LoadImageFromFile", **options))
    loaded = packed(loader).load(path)
    np.testing.assert_array_equal(loaded.results["img"], values.squeeze())
    assert loaded.results["img"].dtype == (dtype or values.dtype)
    if dtype is None:
        return
    # An image that is decoded already becomes what the loader would have given.
    image_rgb = values.repeat(3, 2) if values.shape[2] == 1 else PICTURE
    entered = packed(loader).load(image_rgb)
    assert entered.results["img"].dtype == dtype
    np.testing.assert_array_equal(entered.results["img"], values.squeeze())


def test_local_files_do_not_come_from_the_storage_of_the_data_set(tmp_path):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), PICTURE)
    loader = TRANSFORMS.build(
        dict(type="LoadImageFromFile", backend_args=dict(backend="http"))
    )
    assert packed(loader).load(path).image_rgb.shape == PICTURE.shape
    with pytest.raises(VisError, match=r"gone\.png is no image that LoadImage"):
        packed(loader).load("gone.png")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if path == "/loop.png":
            self.send_response(302)
            self.send_header("Location", path)
            self.end_headers()
            return
        if path == "/gone.png":
            self.send_error(404)
            return
        bits = PICTURE.astype(np.uint16) * 9
        content = cv2.imencode(".png", bits)[1].tobytes()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>log in</html>" if path == "/page.png" else content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read_with_opencv(results):
    """As many loaders of users do, which know no addresses."""
    return dict(img=cv2.imread(results["img_path"], cv2.IMREAD_UNCHANGED))


@pytest.mark.parametrize("storage", [None, dict(backend="local")])
def test_addresses_are_read_as_files_are(address, storage):
    image = f"{address}/a.png?of=http://example.org/b.png"
    loader = dict(type="LoadImageFromFile", color_type="unchanged")
    loader = TRANSFORMS.build(dict(loader, backend_args=storage))
    for step in (loader, ReadTiff(read_with_opencv)):
        pipeline = packed(step)
        for _ in range(2):  # what loads is known the second time
            results = pipeline.load(image).results
            np.testing.assert_array_equal(results["img"], PICTURE.astype(int) * 9)
            assert results["img"].dtype == np.uint16
            assert results["img_path"] == image
    for url, message in {
        f"{address}/gone.png": "cannot read .*404",
        f"{address}/loop.png": "^cannot read .*redirect.* Found$",
        f"{address}/page.png": "is no image that LoadImageFromFile can read",
        "http://127.0.0.1:1/a.png": "cannot read .*refused",
        "http://example.org/a b.png": "cannot read .*control characters",
    }.items():
        with pytest.raises(VisError, match=message) as caught:
            packed(loader).load(url)
        assert url in str(caught.value)


def test_what_only_a_data_set_has_is_left_out(tmp_path):
    class LoadPoints(Step):
        pass

    path = tmp_path / "image.png"
    cv2.imwrite(str(path), PICTURE)
    steps = build(make_pipeline(FASTER)).transforms
    points = LoadPoints(lambda results: dict(points=results["points_path"]))
    for image in (path, PICTURE):
        pipeline = ImagePipeline([steps[0], points, *steps[1:]], annotations=False)
        assert "inputs" in pipeline.pack(pipeline.load(image))


def test_files_are_read_also_where_a_loader_of_arrays_was_left_behind(tmp_path):
    """As ``mmdet.apis.inference_detector`` does with the config of its detector."""
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), PICTURE[..., ::-1])
    loader = dict(type="LoadImageFromNDArray", to_float32=True)
    steps = [loader, *make_pipeline(FASTER)[1:]]
    for image in (path, PICTURE, PICTURE[..., 0]):
        pipeline = ImagePipeline(build(steps), annotations=False)
        loaded = pipeline.load(image)
        expected = PICTURE if image is path or image is PICTURE else PICTURE[..., :1]
        assert (loaded.image_rgb == expected).all()
        assert loaded.results["img"].dtype == np.float32
        assert len(pipeline.pack(loaded)["inputs"]) == 3


def test_a_pipeline_that_does_not_pack():
    pipeline = ImagePipeline(build(make_pipeline(FASTER)[:-1]))
    loaded = pipeline.load(PICTURE)
    with pytest.raises(VisConfigError, match="end it with PackDetInputs"):
        pipeline.pack(loaded)
    pipeline.steps.append(lambda results: dict(results, inputs="packed otherwise"))
    assert pipeline.pack(loaded)["inputs"] == "packed otherwise"


def test_a_pipeline_that_loads_no_image():
    pipeline = ImagePipeline(build(make_pipeline(FASTER)[1:]))
    with pytest.raises(VisConfigError, match="no step that loads an image"):
        pipeline.load(PICTURE)
