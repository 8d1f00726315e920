"""YOLOX-nano of COCO's 80 classes, whose weights lie in ``docs/weights``.

    python tools/boxam_vis_demo.py docs/images/cat.jpg \
        configs/examples/yolox_nano_coco.py docs/weights/yolox_nano_coco.pth
"""

_base_ = "mmyolo::yolox/yolox_nano_fast_8xb8-300e_coco.py"

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
train_dataloader = dict(collate_fn=dict(_delete_=True, type="yolov5_collate"))
