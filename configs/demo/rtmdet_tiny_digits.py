"""RTMDet-tiny on the handwritten digits of the demo, trained from nothing.

    python tools/digits_dataset.py work_dirs/demo/digits
    python tools/train.py configs/demo/rtmdet_tiny_digits.py

It learns slower than the demo's YOLOv8-n and needs 40 epochs.
"""

_base_ = "yolov8_n_digits.py"

max_epochs = 40
widen_factor = 0.375
strides = [8, 16, 32]
norm_and_act = dict(norm_cfg=dict(type="BN"), act_cfg=dict(type="SiLU", inplace=True))
size = dict(deepen_factor=0.167, widen_factor=widen_factor)

model = dict(
    backbone=dict(
        _delete_=True, type="CSPNeXt", channel_attention=True, **size, **norm_and_act
    ),
    neck=dict(
        _delete_=True,
        type="CSPNeXtPAFPN",
        in_channels=[256, 512, 1024],
        out_channels=256,
        num_csp_blocks=3,
        expand_ratio=0.5,
        **size,
        **norm_and_act,
    ),
    bbox_head=dict(
        _delete_=True,
        type="RTMDetHead",
        head_module=dict(
            type="RTMDetSepBNHeadModule",
            num_classes=_base_.num_classes,
            in_channels=256,
            feat_channels=256,
            stacked_convs=2,
            share_conv=True,
            pred_kernel_size=1,
            featmap_strides=strides,
            widen_factor=widen_factor,
            **norm_and_act,
        ),
        prior_generator=dict(
            type="mmdet.MlvlPointGenerator", offset=0, strides=strides
        ),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(
            type="mmdet.QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0
        ),
        loss_bbox=dict(type="mmdet.GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(
            type="BatchDynamicSoftLabelAssigner",
            num_classes=_base_.num_classes,
            topk=13,
            iou_calculator=dict(type="mmdet.BboxOverlaps2D"),
        ),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
)

# Heads of all levels share their convolutions, which come up once for each.
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))
param_scheduler = [
    _base_.param_scheduler[0],
    {**_base_.param_scheduler[1], "end": max_epochs, "T_max": max_epochs - 1},
]
custom_hooks = [
    _base_.custom_hooks[0],
    dict(type="FeatMapVisHook"),
    *_base_.custom_hooks[2:],
]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
train_cfg = dict(max_epochs=max_epochs, val_interval=10, dynamic_intervals=None)
