"""Deformable DETR, a transformer of MMDetection with ``BoxAMVisHook``."""

_base_ = [
    "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "../boxam_vis.py",
]

custom_hooks = [_base_.boxam_vis_hook]
