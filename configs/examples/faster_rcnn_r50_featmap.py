"""Faster R-CNN, a two-stage detector of MMDetection with ``FeatMapVisHook``."""

_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "../featmap_vis.py"]

custom_hooks = [
    {**_base_.featmap_vis_hook, "target_layers": ["backbone.layer4", "neck"]},
]
