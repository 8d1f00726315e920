"""Mask R-CNN of MMDetection, which also gives masks, with ``BoxAMVisHook``."""

_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "../boxam_vis.py"]

custom_hooks = [_base_.boxam_vis_hook]
