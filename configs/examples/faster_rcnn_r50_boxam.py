"""Faster R-CNN, a two-stage detector of MMDetection with ``BoxAMVisHook``."""

_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "../boxam_vis.py"]

custom_hooks = [_base_.boxam_vis_hook]
