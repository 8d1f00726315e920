"""YOLOX-tiny with ``BoxAMVisHook``."""

_base_ = ["mmyolo::yolox/yolox_tiny_fast_8xb8-300e_coco.py", "../boxam_vis.py"]

custom_hooks = [*_base_.custom_hooks, _base_.boxam_vis_hook]

# Written anew: MMEngine marks what comes from 'mmyolo::' with a scope, and would
# pass the mark on to this function, which does not know it.
train_dataloader = dict(collate_fn=dict(_delete_=True, type="yolov5_collate"))
