"""A map must lie on what made it: measured in pixels, for every family's pipeline.

The network of these tests gives the brightness of its input at strides 8, 16 and 32,
so where a map has to lie is known without any of the package's geometry: on the
bright square that was painted into the image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import nn

from mmyolo_vis_hooks.data.alignment import (
    ALIGNMENTS,
    PlacedImage,
    Placement,
    choose_alignment,
)
from mmyolo_vis_hooks.detector import (
    build_pipeline,
    default_scope,
    read_dataset,
)
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.options import FeatMapOptions
from mmyolo_vis_hooks.records import VisSample
from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel
from mmyolo_vis_hooks.samples import SampleMaker

CONFIGS = {
    "yolov5": "mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py",
    "yolov5_p6": "mmyolo::yolov5/yolov5_s-p6-v62_syncbn_fast_8xb16-300e_coco.py",
    "yolov8": "mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py",
    "yolox": "mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py",
    "rtmdet": "mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py",
    "ppyoloe": "mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py",
    "retinanet": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "faster_rcnn": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
}
# The rest is the grid of the pixels of the map; half a cell of shift is an error.
MAX_CELLS_OFF = 0.3
BRIGHT = 250
# Grey padding is 114, the ground at most 20.
THRESHOLD = 180
MAX_SIZE = 320


@dataclass(frozen=True)
class Scene:
    """A dark image with a bright rectangle; pixels."""

    image_hw: tuple[int, int]
    box_xyxy: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        height, width = self.image_hw
        return f"{height}x{width}at{self.box_xyxy[0]},{self.box_xyxy[1]}"

    def image_bgr(self) -> np.ndarray:
        image = np.random.RandomState(0).randint(0, 20, (*self.image_hw, 3))
        x1, y1, x2, y2 = self.box_xyxy
        image[y1:y2, x1:x2] = BRIGHT
        return image.astype(np.uint8)


SCENES = (
    Scene((480, 640), (451, 37, 571, 157)),
    Scene((333, 1001), (797, 201, 957, 321)),
    Scene((917, 311), (11, 61, 121, 211)),
)


class Levels(nn.Module):
    """Brightness on grids of some strides; partial cells count, as in a backbone."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            nn.functional.avg_pool2d(x, stride, ceil_mode=True)
            for stride in self.strides
        )


class Brightness(BaseModel):
    """Finds the square in what it sees, and takes padding off its place or does not."""

    takes_off = True

    def __init__(self, data_preprocessor: nn.Module, strides: tuple[int, ...]) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = nn.Identity()
        self.neck = Levels(strides)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor"):
        assert mode == "predict"
        self.neck(self.backbone(inputs))
        (image,), (sample,) = inputs.numpy().transpose(0, 2, 3, 1), data_samples
        box_xyxy = bright_box(255 * (image - image.min()) / np.ptp(image))
        if self.takes_off and "pad_param" in sample:
            box_xyxy -= np.tile(sample.pad_param[[2, 0]], 2)
        box_xyxy /= np.array(sample.scale_factor * 2)
        box_xyxy = box_xyxy.clip(0, sample.ori_shape[1::-1] * 2)  # as MMYOLO's heads do
        sample.pred_instances = InstanceData(
            bboxes=torch.tensor(box_xyxy[None], dtype=torch.float32),
            scores=torch.tensor([0.9]),
            labels=torch.tensor([0]),
        )
        return data_samples


@cache
def family_config(name: str) -> Config:
    return get_config(CONFIGS[name])


def make_detector(config: Config) -> Brightness:
    with default_scope(config):
        preprocessor = MODELS.build(config.model.data_preprocessor)
    strides = config.get("strides") or (8, 16, 32)
    return Brightness(preprocessor, tuple(strides)).eval()


@dataclass(frozen=True)
class Drawn:
    """A sample, and where things are in it, measured in its pixels.

    Attributes:
        box_xyxy: The bright square in ``sample.image_rgb``.
        cell_xy: Size of a network pixel in ``sample.image_rgb``.
    """

    sample: VisSample
    strides: tuple[int, ...]
    box_xyxy: np.ndarray
    cell_xy: np.ndarray
    network_hw: tuple[int, int]


def draw(config: Config, scene: Scene, alignment: str) -> Drawn:
    """Run the network on a scene as the programs do."""
    detector = make_detector(config)
    maker = SampleMaker(
        detector, resolve_layers(detector, ["neck"]), logger=logging.getLogger()
    )
    dataset = read_dataset(config)
    pipeline = build_pipeline(config, dataset)
    loaded = pipeline.load(scene.image_bgr()[..., ::-1], img_path="x.png")
    placement = choose_alignment(
        alignment,
        pipeline,
        [loaded],
        detector,
        dataset,
    )
    data = placement.pipeline.pack(loaded)
    sample = maker.run(PlacedImage(scene.name, loaded, placement))
    box = bright_box(sample.image_rgb)
    in_network = bright_box(data["inputs"].numpy().transpose(1, 2, 0))
    batch = detector.data_preprocessor(dict(inputs=[data["inputs"]], data_samples=None))
    return Drawn(
        sample,
        detector.neck.strides,
        box,
        (box[2:] - box[:2]) / (in_network[2:] - in_network[:2]),
        tuple(batch["inputs"].shape[-2:]),
    )


def bright_box(image: np.ndarray) -> np.ndarray:
    bright = image.min(axis=2) > THRESHOLD
    xs, ys = (np.flatnonzero(bright.any(axis=axis)) for axis in (0, 1))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], dtype=np.float64)


def centre_of_mass(levels: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """Where the strong half of a map lies, ``(x, y)`` in pixels of the image."""
    mass = np.where(levels > 127, levels.astype(np.float64), 0.0)
    scale = np.array(image_hw[::-1]) / np.array(levels.shape[::-1])
    centre = [
        (mass.sum(axis=axis) * (np.arange(levels.shape[1 - axis]) + 0.5)).sum()
        for axis in (0, 1)
    ]
    return np.array(centre) / mass.sum() * scale


def cells_off(drawn: Drawn) -> np.ndarray:
    """How far each level's map is off, ``(levels, 2)`` in its cells, x and y."""
    sample = drawn.sample
    options = FeatMapOptions(alpha=1.0, colormap="gray", score_thr=1.0)
    overlays = FeatMapPanel(options).overlay_maps(sample, max_size=MAX_SIZE)
    titles = [f"neck[{i}]" for i in range(len(drawn.strides))]
    assert [overlay.title for overlay in overlays] == titles
    truth = (drawn.box_xyxy[:2] + drawn.box_xyxy[2:]) / 2
    image_hw = sample.image_rgb.shape[:2]
    return np.array(
        [
            np.abs(centre_of_mass(o.levels, image_hw) - truth) / stride / drawn.cell_xy
            for o, stride in zip(overlays, drawn.strides)
        ]
    )


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
@pytest.mark.parametrize(
    ("family", "alignment"),
    [
        *product(CONFIGS, ALIGNMENTS),
        ("no_divisor", "letterbox"),
        ("no_divisor", "network"),
    ],
)
def test_maps_and_boxes_lie_on_the_square(family, alignment, scene):
    if family == "no_divisor":
        # Sides that no stride divides: the last cells lie partly outside the input.
        config = get_config(CONFIGS["faster_rcnn"])
        config.model.data_preprocessor.pad_size_divisor = 1
    else:
        config = family_config(family)
    drawn = draw(config, scene, alignment)
    sample = drawn.sample
    if alignment == "network":
        assert sample.image_rgb.shape[:2] == drawn.network_hw
    else:
        assert sample.image_rgb.shape[:2] == scene.image_hw
        assert drawn.box_xyxy.tolist() == list(scene.box_xyxy)
    if alignment == "resize":
        assert not any(side % max(drawn.strides) for side in drawn.network_hw)
    off = cells_off(drawn)
    assert off.max() <= MAX_CELLS_OFF, f"cells off, per level (x, y):\n{off.round(2)}"
    (box_xyxy,) = sample.detections.boxes_xyxy
    assert np.abs(box_xyxy - drawn.box_xyxy).max() <= 1.5


@pytest.mark.parametrize("scene", SCENES[1:], ids=lambda scene: scene.name)
@pytest.mark.parametrize("family", ["yolov5", "yolox"])
def test_a_misaligned_map_does_not_pass(family, scene):
    """The padded input drawn as if it were the image stretched: OpenMMLab's bug."""
    drawn = draw(family_config(family), scene, "letterbox")
    frame = FrameTransform.stretch(scene.image_hw, drawn.network_hw)
    wrong = replace(drawn, sample=replace(drawn.sample, frame=frame))
    off = cells_off(wrong).max(axis=1)
    assert (off > 3 * MAX_CELLS_OFF).all(), f"cells off, per level: {off.round(2)}"
    x, y = drawn.sample.frame.offset_xy
    shifted = replace(drawn.sample.frame, offset_xy=(x + drawn.strides[0] / 2, y))
    off = cells_off(replace(drawn, sample=replace(drawn.sample, frame=shifted)))
    assert off[0, 0] > MAX_CELLS_OFF  # half a cell


def place(config: Config, image: Any, alignment: str | None) -> Placement:
    detector = make_detector(config)
    pipeline = build_pipeline(config, read_dataset(config))
    return choose_alignment(alignment, pipeline, [pipeline.load(image)], detector)


class Changing(nn.Module):
    """A data preprocessor that does something to the inputs that it does not tell."""

    def __init__(self, plain: nn.Module, change: Callable) -> None:
        super().__init__()
        self.plain, self.change = plain, change

    def forward(self, data: dict, training: bool = False) -> dict:
        batch = self.plain(data, training)
        return {**batch, "inputs": self.change(batch["inputs"])}


def test_what_a_data_preprocessor_does_in_silence_is_noticed():
    """Also where the first image tells nothing of it."""
    config = family_config("yolov8")
    detector = make_detector(config)
    plain = detector.data_preprocessor
    pipeline = build_pipeline(config, read_dataset(config))
    spots = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    images = np.full((640, 800, 3), 90, np.uint8), cv2.resize(spots, (800, 640))
    blank, textured = map(pipeline.load, images)
    assert choose_alignment("letterbox", pipeline, [blank, textured], detector).proven
    detector.data_preprocessor = Changing(plain, lambda x: x.roll(8, -1))
    for alignment in ("letterbox", "resize"):
        with pytest.raises(VisConfigError, match="do not show the same things"):
            choose_alignment(alignment, pipeline, [blank, textured], detector)
    detector.data_preprocessor = Changing(plain, lambda x: nn.functional.pad(x, (0, 8)))
    with pytest.raises(VisConfigError, match="a step behind the resize to 512x640"):
        choose_alignment("resize", pipeline, [blank], detector)


def test_what_a_step_does_to_portraits_alone_is_noticed():
    def lay_down(results):
        if results["img"].shape[0] > results["img"].shape[1]:
            results["img"] = np.ascontiguousarray(np.rot90(results["img"]))
        return results

    config = family_config("yolov8")
    detector = make_detector(config)
    spots = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    landscape = cv2.resize(spots, (800, 640))

    def choose(alignment):
        pipeline = build_pipeline(config, read_dataset(config))
        pipeline.steps.insert(1, lay_down)
        loads = [landscape, landscape, landscape.transpose(1, 0, 2)]
        images = map(pipeline.load, loads)
        return choose_alignment(alignment, pipeline, images, detector)

    placement = choose(None)
    assert (placement.alignment, placement.proven) == ("network", False)
    for alignment in ("letterbox", "resize"):
        with pytest.raises(VisConfigError, match=f"{alignment}.*cannot work"):
            choose(alignment)


def test_a_picture_of_another_size_than_was_packed_is_refused():
    config = family_config("yolov8")
    pipeline = build_pipeline(config, read_dataset(config))
    loaded = pipeline.load(np.full((320, 400, 3), 90, np.uint8))
    loaded.results["ori_shape"] = (640, 800)
    with pytest.raises(VisConfigError, match="'ori_shape' says 640x800"):
        choose_alignment("letterbox", pipeline, [loaded], make_detector(config))


@pytest.mark.parametrize("takes_off", [True, False])
def test_boxes_lie_on_the_square_whatever_a_head_does_about_padding(
    takes_off, caplog, monkeypatch
):
    """Heads of MMDetection know nothing of MMYOLO's ``pad_param``."""
    monkeypatch.setattr(Brightness, "takes_off", takes_off)
    # The last one's padding moves the square to the border, where it is cut off.
    for scene in (*SCENES, Scene((917, 311), (11, 61, 31, 211))):
        drawn = draw(family_config("yolov8"), scene, "network")
        (box_xyxy,) = drawn.sample.detections.boxes_xyxy
        assert np.abs(box_xyxy - drawn.box_xyxy).max() <= 0.1
    said = "boxes of Brightness count from the edge of the padding" in caplog.text
    assert said is not takes_off


def test_an_image_that_cannot_be_read_is_no_trouble_of_the_alignment():
    config = family_config("yolov8")
    pipeline = build_pipeline(config, read_dataset(config))
    images = map(pipeline.load, ["gone.png", np.full((320, 400, 3), 90, np.uint8)])
    with pytest.raises(VisError, match=r"^gone\.png is no image"):
        choose_alignment(None, pipeline, images, make_detector(config))


@pytest.mark.real_data
@pytest.mark.parametrize("family", CONFIGS)
def test_no_photo_is_refused(shared_dir, family):
    photos = sorted((shared_dir / "data/coco128/train2017").glob("*.jpg"))[::64]
    for photo in photos:
        assert place(family_config(family), photo, None).alignment == "resize"
        assert place(family_config(family), photo, "letterbox").proven


@pytest.mark.real_data
def test_what_the_pipeline_packs_wrongly_is_noticed(shared_dir, monkeypatch):
    """Half a cell of stride 8, or 2 % of the size, on the network's input."""
    config = family_config("yolov8")
    packed = FrameTransform.from_metainfo
    changes = [
        lambda f: replace(f, offset_xy=(f.offset_xy[0] + 4, f.offset_xy[1])),
        lambda f: replace(f, offset_xy=(f.offset_xy[0], f.offset_xy[1] - 4)),
        lambda f: replace(f, scale_xy=(f.scale_xy[0] * 1.02, f.scale_xy[1])),
    ]
    for change in changes:
        monkeypatch.setattr(
            FrameTransform,
            "from_metainfo",
            lambda *args, change=change: change(packed(*args)),
        )
        photo = shared_dir / "data" / "dog.jpg"
        with pytest.raises(VisConfigError, match="do not show the same things"):
            place(config, photo, "letterbox")
        # Drawn on the network's input, nothing relies on what was packed.
        assert not place(config, photo, "network").proven
