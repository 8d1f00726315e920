"""RTMDet-Ins-tiny of MMDetection, which also gives masks, with ``BoxAMVisHook``."""

_base_ = ["mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", "../boxam_vis.py"]

custom_hooks = [*_base_.custom_hooks, _base_.boxam_vis_hook]
