"""Mix-in: adds ``FeatMapVisHook`` to a detector's config.

Inherit it next to the detector and add its hook to the hooks that are there:

    _base_ = ['mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
              '../featmap_vis.py']
    custom_hooks = [*_base_.custom_hooks, _base_.featmap_vis_hook]

or, where the detector's config has no ``custom_hooks``,
``custom_hooks = [_base_.featmap_vis_hook]``. Other options of the hook go in with
``featmap_vis_hook = dict(target_layers=['neck'])`` and
``{**_base_.featmap_vis_hook, 'target_layers': ['neck']}``.

The pictures go to every backend of the visualizer. For TensorBoard and W&B too:

    visualizer = dict(vis_backends=[
        dict(type='LocalVisBackend'),
        dict(type='TensorboardVisBackend'),
        dict(type='WandbVisBackend')])
"""

custom_imports = dict(imports=["mmyolo_vis_hooks"], allow_failed_imports=False)

# It is not called `custom_hooks`: two bases must not define the same name.
featmap_vis_hook = dict(type="FeatMapVisHook", target_layers=["backbone", "neck"])
