"""YOLOX-nano on the first 128 images of COCO train2017, with ``FeatMapVisHook``.

    python tools/test.py configs/coco128/yolox_nano_coco128.py \
        docs/weights/yolox_nano_coco.pth

The images lie in the folder ``shared`` beside the checkout; ``MMVIS_SHARED`` names
another place. Expect bbox mAP 0.343 and mAP50 0.510.
"""

_base_ = ["../examples/yolox_nano_coco.py", "../featmap_vis.py"]

# After `_base_`: MMEngine tells its two kinds of configs apart by what comes first.
import os  # noqa: E402

data_root = os.path.join(
    os.environ.get("MMVIS_SHARED")
    or os.path.normpath(os.path.join("{{fileDirname}}", "../../../shared")),
    "data/coco128/",
)
del os
ann_file = "annotations/instances_train2017.json"

train_dataloader = dict(
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
