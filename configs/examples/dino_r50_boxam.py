"""DINO, a transformer of MMDetection with ``BoxAMVisHook``."""

_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../boxam_vis.py"]

custom_hooks = [_base_.boxam_vis_hook]
