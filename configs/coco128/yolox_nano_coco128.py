"""YOLOX-nano on the first 128 images of COCO train2017, with ``FeatMapVisHook``.

    python tools/test.py configs/coco128/yolox_nano_coco128.py \
        shared/weights/yolox_nano_coco.pth

Images and weights lie in the folder ``shared`` beside the checkout;
``MMVIS_SHARED`` names another place. Expect bbox mAP 0.343 and mAP50 0.510.
"""

_base_ = ["mmyolo::yolox/yolox_nano_fast_8xb8-300e_coco.py", "../featmap_vis.py"]

# After `_base_`: MMEngine tells its two kinds of configs apart by what comes first.
import os  # noqa: E402

data_root = os.path.join(
    os.environ.get("MMVIS_SHARED")
    or os.path.normpath(os.path.join("{{fileDirname}}", "../../../shared")),
    "data/coco128/",
)
del os
ann_file = "annotations/instances_train2017.json"

norm_cfg = dict(type="BN", momentum=0.03, eps=0.001)
act_cfg = dict(type="Swish")

# The weights were trained with MMDetection's depthwise backbone and neck; those of
# MMYOLO ignore `use_depthwise` in their CSP blocks.
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        _delete_=True,
        type="mmdet.CSPDarknet",
        deepen_factor=0.33,
        widen_factor=0.25,
        out_indices=(2, 3, 4),
        use_depthwise=True,
        spp_kernal_sizes=(5, 9, 13),
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
    ),
    neck=dict(
        _delete_=True,
        type="mmdet.YOLOXPAFPN",
        in_channels=[64, 128, 256],
        out_channels=64,
        num_csp_blocks=1,
        use_depthwise=True,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
    ),
    bbox_head=dict(head_module=dict(in_channels=256)),
)

train_dataloader = dict(
    collate_fn=dict(_delete_=True, type="yolov5_collate"),
    dataset=dict(
        data_root=data_root, ann_file=ann_file, data_prefix=dict(img="train2017/")
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root, ann_file=ann_file, data_prefix=dict(img="train2017/")
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + ann_file)
test_evaluator = val_evaluator

custom_hooks = [
    *_base_.custom_hooks,
    {**_base_.featmap_vis_hook, "target_layers": ["backbone.stage4", "neck"]},
]
