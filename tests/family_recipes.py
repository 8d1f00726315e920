"""How the families of detectors are built from the configs that their makers ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_CLASSES = 6

# How the pipelines of the families place an image in the network's input: what is
# packed, and the rows and columns that the image fills.
GEOMETRIES: dict[str, tuple[dict, tuple[slice, slice]]] = {
    # MMYOLO's LetterResize pads on both sides.
    "letterbox": (
        dict(
            img_shape=(128, 160),
            ori_shape=(140, 200),
            scale_factor=(0.8, 0.8),
            pad_param=(8, 8, 0, 0),
        ),
        (slice(8, 120), slice(0, 160)),
    ),
    # mmdet.Pad in the pipeline: the padding counts as image.
    "pad": (
        dict(img_shape=(128, 160), ori_shape=(150, 190), scale_factor=(0.8, 0.8)),
        (slice(0, 120), slice(0, 152)),
    ),
    # The data preprocessor pads: it does not.
    "divisor": (
        dict(img_shape=(120, 152), ori_shape=(150, 190), scale_factor=(0.8, 0.8)),
        (slice(0, 120), slice(0, 152)),
    ),
    "stretch": (
        dict(img_shape=(128, 160), ori_shape=(200, 200), scale_factor=(0.8, 0.64)),
        (slice(0, 128), slice(0, 160)),
    ),
}


@dataclass(frozen=True)
class Tuning:
    """The mean and spread that each output channel of layers shall have."""

    layers: str  # pattern of the full names
    means: tuple[float, ...] = (0.0,)  # repeated until there is one for each channel
    std: float = 1.0  # of one channel, over cells or queries, and calls


@dataclass(frozen=True)
class Recipe:
    """How to make a family; tunings are in the order in which the layers run."""

    config: str
    geometry: str
    seed: int  # of the weights and the image
    tunings: Sequence[Tuning]
    options: dict
    # Widens the query embedding: untrained queries look everywhere, and see the same.
    query_scale: float = 1.0


# Rarer on fine levels, which have more cells, so that each level finds something.
_LEVEL_MEANS = (-2.5, -2.0, -1.5)


def _per_level(layer: str, means: Sequence[float] = _LEVEL_MEANS) -> list[Tuning]:
    """Class logits of heads with a layer for each level, its number in ``layer``."""
    return [Tuning(layer.format(i), (mean,)) for i, mean in enumerate(means)]


def _yolo(layer: str) -> list[Tuning]:
    """One convolution gives the box, the objectness and the classes."""
    return [
        Tuning(layer.format(i), (0.0, 0.0, 0.0, 0.0, 0.5, *[mean + 0.5] * NUM_CLASSES))
        for i, mean in enumerate(_LEVEL_MEANS)
    ]


# Distances that are sums over bins: without a slope a box is 15 strides wide.
_BINS_16, _BINS_17 = (tuple(-0.6 * bin_ for bin_ in range(n)) for n in (16, 17))
_DETR_BOX = (0.0, 0.0, -1.0, -1.0)
_SOFTMAX = (*[0.0] * NUM_CLASSES, 0.5)
_R18 = dict(backbone=dict(depth=18))
_FPN = dict(neck=dict(in_channels=[64, 128, 256, 512]))
_YOLO_ANCHORS = [
    [(10, 13), (16, 30), (33, 23)],
    [(24, 32), (36, 28), (30, 50)],
    [(48, 40), (64, 80), (96, 64)],
]
_YOLO = dict(test_cfg=dict(score_thr=0.2, max_per_img=20))
_ANCHORED = dict(
    bbox_head=dict(prior_generator=dict(base_sizes=_YOLO_ANCHORS)), **_YOLO
)
_DENSE = {**_R18, **_FPN, **_YOLO}
# Else the maps fade from level to level, and with them the logits of a shared head.
_FPN_TUNING = Tuning(r"neck.fpn_convs.\d.conv")
_RPN = (
    _FPN_TUNING,
    Tuning("rpn_head.rpn_cls"),
    Tuning("rpn_head.rpn_reg", std=0.3),
)
_TWO_STAGE = dict(
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    # Boxes of 32 pixels take the second level, not only those of 112.
    roi_head=dict(bbox_roi_extractor=dict(finest_scale=16)),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=_YOLO["test_cfg"]),
    **_R18,
    **_FPN,
)
_TRANSFORMER = dict(
    num_queries=30,
    encoder=dict(num_layers=2),
    decoder=dict(num_layers=2),
    test_cfg=dict(max_per_img=10),
    **_R18,
)
_THREE_MAPS = {**_TRANSFORMER, "neck": dict(in_channels=[128, 256, 512])}


def _rcnn(layer: str, std: float) -> list[Tuning]:
    return [Tuning(f"{layer}.fc_cls", _SOFTMAX, std), Tuning(f"{layer}.fc_reg")]


def _anchors(scale: int) -> dict:
    return {**_DENSE, "bbox_head": dict(anchor_generator=dict(octave_base_scale=scale))}


_YOLO_HEAD, _ROI_HEAD = "bbox_head.head_module.", "roi_head.bbox_head"
RECIPES: dict[str, Recipe] = {
    "yolov5": Recipe(
        "mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py",
        "letterbox",
        26,
        _yolo(_YOLO_HEAD + "convs_pred.{}"),
        _ANCHORED,
    ),
    "yolov6": Recipe(
        "mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco.py",
        "letterbox",
        50,
        (
            *_per_level(_YOLO_HEAD + "cls_preds.{}", (-3.5, -2.2, -1.5)),
            Tuning(_YOLO_HEAD + r"reg_preds.\d", (1.1,), 0.3),
        ),
        _YOLO,
    ),
    "yolov7": Recipe(
        "mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py",
        "letterbox",
        13,
        _yolo(_YOLO_HEAD + "convs_pred.{}.1"),
        _ANCHORED,
    ),
    "yolov8": Recipe(
        "mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py",
        "letterbox",
        19,
        (
            *_per_level(_YOLO_HEAD + "cls_preds.{}.2"),
            Tuning(_YOLO_HEAD + r"reg_preds.\d.2", _BINS_16),
        ),
        _YOLO,
    ),
    "yolox": Recipe(
        "mmyolo::yolox/yolox_nano_fast_8xb8-300e_coco.py",
        "pad",
        28,
        (
            *_per_level(_YOLO_HEAD + "multi_level_conv_cls.{}", (-2.0, -1.5, -1.0)),
            Tuning(_YOLO_HEAD + r"multi_level_conv_reg.\d", (0.0, 0.0, 0.8, 0.8), 0.4),
            Tuning(_YOLO_HEAD + r"multi_level_conv_obj.\d", (0.5,)),
        ),
        # It has no upper limit for the number of boxes.
        dict(test_cfg=dict(score_thr=0.4)),
    ),
    "rtmdet": Recipe(
        "mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py",
        "letterbox",
        16,
        (
            *_per_level(_YOLO_HEAD + "rtm_cls.{}"),
            Tuning(_YOLO_HEAD + r"rtm_reg.\d", (1.5,), 0.3),
        ),
        _YOLO,
    ),
    "ppyoloe": Recipe(
        "mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py",
        "stretch",
        20,
        (
            *_per_level(_YOLO_HEAD + "cls_preds.{}"),
            Tuning(_YOLO_HEAD + r"reg_preds.\d", _BINS_17),
        ),
        _YOLO,
    ),
    "retinanet": Recipe(
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        "divisor",
        1,
        (
            _FPN_TUNING,
            Tuning("bbox_head.retina_cls", (-2.5,)),
            Tuning("bbox_head.retina_reg", std=0.3),
        ),
        _anchors(2),
    ),
    "fcos": Recipe(
        "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        "divisor",
        0,
        (
            _FPN_TUNING,
            Tuning("bbox_head.conv_cls", (-2.0,)),
            Tuning("bbox_head.conv_reg", (2.8,), 0.3),
            Tuning("bbox_head.conv_centerness", (1.0,)),
        ),
        _DENSE,
    ),
    "atss": Recipe(
        "mmdet::atss/atss_r50_fpn_1x_coco.py",
        "divisor",
        9,
        (
            _FPN_TUNING,
            Tuning("bbox_head.atss_cls", (-2.0,)),
            Tuning("bbox_head.atss_reg"),
            Tuning("bbox_head.atss_centerness", (1.0,)),
        ),
        _anchors(3),
    ),
    "rtmdet_ins": Recipe(
        "mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
        "pad",
        23,
        (
            *_per_level("bbox_head.rtm_cls.{}"),
            Tuning(r"bbox_head.rtm_reg.\d", (1.5,), 0.3),
        ),
        _YOLO,
    ),
    "faster_rcnn": Recipe(
        "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "divisor",
        0,
        (*_RPN, *_rcnn(_ROI_HEAD, 1.5)),
        _TWO_STAGE,
    ),
    "cascade_rcnn": Recipe(
        "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
        "divisor",
        7,
        (*_RPN, *(t for i in range(3) for t in _rcnn(f"{_ROI_HEAD}.{i}", 2.5))),
        _TWO_STAGE,
    ),
    "mask_rcnn": Recipe(
        "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        "divisor",
        5,
        (*_RPN, *_rcnn(_ROI_HEAD, 1.5)),
        _TWO_STAGE,
    ),
    "detr": Recipe(
        "mmdet::detr/detr_r50_8xb2-150e_coco.py",
        "divisor",
        21,
        (
            Tuning("bbox_head.fc_cls", _SOFTMAX, 1.5),
            Tuning("bbox_head.fc_reg", _DETR_BOX),
        ),
        {**_TRANSFORMER, "neck": dict(in_channels=[512])},
        query_scale=8.0,
    ),
    "deformable_detr": Recipe(
        "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
        "divisor",
        9,
        (
            Tuning(r"bbox_head.cls_branches.\d", (-1.5,)),
            Tuning(r"bbox_head.reg_branches.\d.4", _DETR_BOX, 0.5),
        ),
        _THREE_MAPS,
    ),
    "dino": Recipe(
        "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py",
        "divisor",
        7,
        (
            # The last branch looks at the encoder and chooses the queries.
            Tuning("bbox_head.cls_branches.2", (-1.5,)),
            Tuning("bbox_head.reg_branches.2.4", std=0.5),
            Tuning("bbox_head.cls_branches.0", (-1.5,)),
            Tuning("bbox_head.reg_branches.0.4", (0.0, 0.0, 0.3, 0.3), 0.3),
            Tuning("bbox_head.cls_branches.1", (-1.5,)),
            Tuning("bbox_head.reg_branches.1.4", std=0.3),
        ),
        _THREE_MAPS,
    ),
}
