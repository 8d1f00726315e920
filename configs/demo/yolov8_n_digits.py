"""YOLOv8-n on handwritten digits at 192x192, trained from nothing on two cores.

    python tools/digits_dataset.py work_dirs/demo/digits
    python tools/train.py configs/demo/yolov8_n_digits.py

``python tools/demo.py`` does both and shows what comes out.
"""

_base_ = ["mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py", "../featmap_vis.py"]

data_root = "work_dirs/demo/digits/"
classes = tuple("0123456789")
num_classes = len(classes)
img_scale = (192, 192)
max_epochs = 12
base_lr = 0.004

model = dict(
    bbox_head=dict(head_module=dict(num_classes=num_classes)),
    train_cfg=dict(assigner=dict(num_classes=num_classes)),
)

# No mirror images: they are no digits.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="YOLOv5KeepRatioResize", scale=img_scale),
    dict(
        type="LetterResize",
        scale=img_scale,
        allow_scale_up=True,
        pad_val=dict(img=114.0),
    ),
    dict(
        type="YOLOv5RandomAffine",
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        max_translate_ratio=0.1,
        scaling_ratio_range=(0.8, 1.2),
        max_aspect_ratio=100,
        border_val=(114, 114, 114),
    ),
    dict(type="YOLOv5HSVRandomAug"),
    dict(
        type="mmdet.PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape"),
    ),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="YOLOv5KeepRatioResize", scale=img_scale),
    dict(
        type="LetterResize",
        scale=img_scale,
        allow_scale_up=False,
        pad_val=dict(img=114),
    ),
    dict(type="LoadAnnotations", with_bbox=True, _scope_="mmdet"),
    dict(
        type="mmdet.PackDetInputs",
        meta_keys=(
            "img_id",
            "img_path",
            "ori_shape",
            "img_shape",
            "scale_factor",
            "pad_param",
        ),
    ),
]

tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(
                    type="Compose",
                    transforms=[
                        dict(type="YOLOv5KeepRatioResize", scale=scale),
                        dict(
                            type="LetterResize",
                            scale=scale,
                            allow_scale_up=False,
                            pad_val=dict(img=114),
                        ),
                    ],
                )
                for scale in (img_scale, (256, 256))
            ],
            [dict(type="mmdet.RandomFlip", prob=0.0)],
            [dict(type="mmdet.LoadAnnotations", with_bbox=True)],
            [
                dict(
                    type="mmdet.PackDetInputs",
                    meta_keys=(
                        "img_id",
                        "img_path",
                        "ori_shape",
                        "img_shape",
                        "scale_factor",
                        "pad_param",
                        "flip",
                        "flip_direction",
                    ),
                )
            ],
        ],
    ),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    pin_memory=False,
    # Written anew: MMEngine marks what comes from 'mmyolo::' with a scope, and
    # would pass the mark on to this function, which does not know it.
    collate_fn=dict(_delete_=True, type="yolov5_collate"),
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    pin_memory=False,
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/val.json")
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=base_lr, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(
        type="CosineAnnealingLR",
        eta_min=base_lr * 0.02,
        begin=1,
        end=max_epochs,
        T_max=max_epochs - 1,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]

default_hooks = dict(
    param_scheduler=dict(_delete_=True, type="ParamSchedulerHook"),
    logger=dict(interval=10),
    checkpoint=dict(
        interval=max_epochs, save_best="coco/bbox_mAP_50", max_keep_ckpts=1
    ),
)
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExpMomentumEMA",
        momentum=0.001,
        gamma=100,
        update_buffers=True,
        priority=49,
    ),
    # Where this detector looks for digits: they are too small for coarser maps.
    {
        **_base_.featmap_vis_hook,
        "target_layers": ["backbone.stage2", "backbone.stage3", "neck.out_layers[0]"],
    },
    dict(type="BoxAMVisHook", topk=6, metrics=["energy"]),
    dict(type="ErrorVisHook", num_images=1),
]
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(vis_backends=vis_backends)

# The maps change most in the first epochs.
train_cfg = dict(max_epochs=max_epochs, val_interval=1, dynamic_intervals=[(5, 2)])
randomness = dict(seed=0)
