"""DETR, a transformer of MMDetection with ``BoxAMVisHook``."""

_base_ = ["mmdet::detr/detr_r50_8xb2-150e_coco.py", "../boxam_vis.py"]

custom_hooks = [_base_.boxam_vis_hook]
