"""FCOS, a one-stage detector of MMDetection with ``BoxAMVisHook``."""

_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "../boxam_vis.py"]

custom_hooks = [_base_.boxam_vis_hook]
