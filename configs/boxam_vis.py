"""Mix-in: adds ``BoxAMVisHook`` to a detector's config.

Inherit it next to the detector and add its hook to the hooks that are there:

    _base_ = ['mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
              '../boxam_vis.py']
    custom_hooks = [*_base_.custom_hooks, _base_.boxam_vis_hook]

or, where the detector's config has no ``custom_hooks``,
``custom_hooks = [_base_.boxam_vis_hook]``. Other options of the hook go in with
``{**_base_.boxam_vis_hook, 'method': 'gradcam'}``.

Inherit either this file or ``featmap_vis.py``: MMEngine refuses two bases with the same
names. For both hooks, write the other one out:
``custom_hooks = [_base_.boxam_vis_hook, dict(type='FeatMapVisHook')]``.
"""

custom_imports = dict(imports=["mmyolo_vis_hooks"], allow_failed_imports=False)

# It is not called `custom_hooks`: two bases must not define the same name.
boxam_vis_hook = dict(type="BoxAMVisHook")
