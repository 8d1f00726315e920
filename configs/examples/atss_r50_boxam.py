"""ATSS, a one-stage detector of MMDetection with ``BoxAMVisHook``."""

_base_ = ["mmdet::atss/atss_r50_fpn_1x_coco.py", "../boxam_vis.py"]

custom_hooks = [_base_.boxam_vis_hook]
