"""Loops of other kinds, and pipelines that do other things, on a real Runner."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import TRANSFORMS, BaseTransform
from mmengine.model import BaseModel
from mmengine.registry import LOOPS, MODELS
from mmengine.runner import BaseLoop, Runner, ValLoop

from mmyolo_vis_hooks.errors import VisConfigError
from tests.test_hooks.helpers import log_of, pictures, spy, vis_hooks
from tests.test_hooks.test_nothing_changes import hooks_left
from tests.toy import LETTERBOX, SQUARE, ToyDetector, toy_config, write_dataset

ALIGNMENTS = ("resize", "letterbox", "network")


@MODELS.register_module()
class ToyTeacherStudent(BaseModel):
    """Two detectors, of which the loop says which one predicts."""

    def __init__(self, data_preprocessor: dict) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.teacher = ToyDetector(data_preprocessor)
        self.student = ToyDetector(data_preprocessor)
        self.semi_test_cfg = dict(predict_on="teacher")

    def forward(self, inputs, data_samples=None, mode="tensor"):
        part = getattr(self, self.semi_test_cfg["predict_on"])
        return part(inputs, data_samples, mode=mode)


def teacher_student(tmp_path, toy_data, *hooks):
    cfg = toy_config(tmp_path, list(hooks), data_root=toy_data)
    cfg.model.type = "ToyTeacherStudent"
    cfg.val_cfg = dict(type="mmdet.TeacherStudentValLoop")
    runner = Runner.from_cfg(cfg)
    with torch.no_grad():
        # Else both would draw the same maps.
        runner.model.student.neck.shared.weight.mul_(3)
    return runner


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_both_passes_are_drawn_each_of_its_model(tmp_path, toy_data, alignment):
    hook = spy(num_images=2, alignment=alignment, target_layers=["neck"])
    runner = teacher_student(tmp_path, toy_data, hook)
    runner.val()
    assert sorted(pictures(tmp_path)) == [
        f"val.featmap.{i}_image_{part}_0.png"
        for i in (1, 6)
        for part in ("student", "teacher")
    ]
    (hook,) = vis_hooks(runner)
    by_id = {sample.image_id: sample for sample in hook.samples}
    for i in (1, 6):
        strength = [
            by_id[f"{i}_image_{part}"].activations[0].feature_map.abs().mean()
            for part in ("teacher", "student")
        ]
        assert strength[1] != strength[0]
    assert "never came" not in log_of(tmp_path)


def test_layers_of_one_model_are_drawn_in_its_pass(tmp_path, toy_data):
    hooks = [
        spy(num_images=1, target_layers=["student.neck"]),
        spy(num_images=1, target_layers=["teacher.neck", "student.backbone"], name="b"),
    ]
    teacher_student(tmp_path, toy_data, *hooks).val()
    assert sorted(pictures(tmp_path)) == [
        "val.b.1_image_student_0.png",
        "val.b.1_image_teacher_0.png",
        "val.featmap.1_image_student_0.png",
    ]
    wrong = spy(target_layers=["student.nekc"])
    with pytest.raises(VisConfigError, match="nekc"):
        teacher_student(tmp_path / "wrong", toy_data, wrong).val()


@LOOPS.register_module()
class TwoPassLoop(ValLoop):
    """Passes over the data with two sets of weights, and tells nobody."""

    def run(self):
        self.runner.call_hook("before_val_epoch")
        for factor in (1, 3):
            with torch.no_grad():
                self.runner.model.neck.shared.weight.mul_(factor)
            for idx, data_batch in enumerate(self.dataloader):
                self.run_iter(idx, data_batch)
        self.runner.call_hook("after_val_epoch", metrics={})


def test_passes_of_which_nobody_tells(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy(num_images=1)], data_root=toy_data)
    cfg.val_cfg = dict(type="TwoPassLoop")
    Runner.from_cfg(cfg).val()
    names = ["val.featmap.1_image_0.png", "val.featmap.1_image_pass2_0.png"]
    assert sorted(pictures(tmp_path)) == names


@LOOPS.register_module()
class SeveralLoop(BaseLoop):
    """Validates on several data sets, one after the other."""

    def __init__(self, runner, dataloader, evaluator):
        self._runner = runner
        self.dataloaders = [dataloader]

    def run(self):
        """Nothing."""


@pytest.mark.parametrize("hook", ["FeatMapVisHook", "ErrorVisHook"])
def test_a_loop_of_no_single_data_set_is_refused(tmp_path, toy_data, hook):
    cfg = toy_config(tmp_path, [dict(type=hook)], data_root=toy_data)
    cfg.val_cfg = dict(type="SeveralLoop")
    with pytest.raises(VisConfigError, match="SeveralLoop has no data set"):
        Runner.from_cfg(cfg).val()
    cfg.custom_hooks[0].draw = False
    Runner.from_cfg(cfg).val()


@pytest.mark.parametrize("outcome", [None, RuntimeError, KeyboardInterrupt])
def test_the_loop_is_put_back(tmp_path, toy_data, outcome):
    hooks = [spy(alignment=a, name=a) for a in ("letterbox", "network", "resize")]
    runner = Runner.from_cfg(toy_config(tmp_path, hooks, data_root=toy_data))
    loop = runner.val_loop
    if outcome is None:
        runner.val()
    else:
        runner.model.fail_at, runner.model.fail_with = 3 + 2, outcome("a layer failed")
        with pytest.raises(outcome):
            runner.val()
    assert "run_iter" not in vars(loop)
    assert hooks_left(runner.model) == []


# --------------------------------------------------------------- pipelines of all kinds


@TRANSFORMS.register_module()
class ToyCanvas(BaseTransform):
    """Puts the image on a larger canvas, and says so in a key of its own."""

    def transform(self, results):
        image = results["img"]
        height, width = image.shape[:2]
        canvas = np.full((height + 64, width + 48, 3), 30, image.dtype)
        canvas[32 : 32 + height, 24 : 24 + width] = image
        results["img"] = canvas
        results["img_shape"] = canvas.shape[:2]
        results["scale_factor"] = (1.0, 1.0)
        return results


@TRANSFORMS.register_module()
class ToyNoise(BaseTransform):
    """Changes every pixel and moves none."""

    def transform(self, results):
        noise = np.random.RandomState(0).randn(*results["img"].shape) * 20
        changed = (255 - results["img"] + noise).clip(0, 255)
        results["img"] = changed.astype(results["img"].dtype)
        return results


@pytest.fixture(scope="module")
def textured(tmp_path_factory):
    """The toy's data with a texture, by which places are known."""
    root = tmp_path_factory.mktemp("textured")
    write_dataset(root, ((220, 300), (300, 210)))
    rng = np.random.RandomState(3)
    for path in root.rglob("*.png"):
        image = cv2.imread(str(path))
        blobs = cv2.GaussianBlur(
            rng.rand(*image.shape[:2]).astype(np.float32), (0, 0), 3
        )
        blobs = cv2.normalize(blobs, None, 0, 110, cv2.NORM_MINMAX)[..., None]
        cv2.imwrite(str(path), np.where(image > 200, image, blobs.astype(np.uint8)))
    return root


CANVAS = (dict(type="ToyCanvas"),)


def test_an_unknown_canvas_is_noticed_and_drawn_on(tmp_path, textured):
    cfg = toy_config(tmp_path, [spy()], data_root=textured, geometry=CANVAS)
    runner = Runner.from_cfg(cfg)
    runner.test()
    (hook,) = vis_hooks(runner)
    log = log_of(tmp_path)
    assert log.count("drawn on the network's own input") == 1
    assert "'ToyCanvas' moves pixels" in log
    for sample in hook.samples:
        bright = np.argwhere(sample.image_rgb.min(axis=2) > 200)
        (top, left), (bottom, right) = bright.min(0), bright.max(0) + 1
        assert bottom - top == right - left == SQUARE
        box = sample.detections.boxes_xyxy[0]
        centre = [(left + right) / 2, (top + bottom) / 2]
        assert np.abs((box[:2] + box[2:]) / 2 - centre).max() < 12
    for alignment in ("resize", "letterbox"):
        hooks = [spy(alignment=alignment)]
        cfg = toy_config(tmp_path, hooks, data_root=textured, geometry=CANVAS)
        runner = Runner.from_cfg(cfg)
        refusal = rf"alignment='{alignment}' cannot work"
        with pytest.raises(VisConfigError, match=refusal):
            runner.test()
        assert runner.model.num_forwards == 0


@pytest.mark.parametrize("alignment", [None, *ALIGNMENTS])
def test_noise_is_no_trouble(tmp_path, textured, alignment):
    geometry = (dict(type="ToyNoise"), *LETTERBOX, dict(type="ToyNoise"))
    hook = spy(alignment=alignment)
    cfg = toy_config(tmp_path, [hook], data_root=textured, geometry=geometry)
    runner = Runner.from_cfg(cfg)
    runner.test()
    (hook,) = vis_hooks(runner)
    assert len(hook.samples) == 2
    if alignment != "network":
        for sample in hook.samples:
            assert sample.image_rgb.shape[:2] in ((220, 300), (300, 210))
    assert "drawn on" not in log_of(tmp_path)


def test_the_first_image_may_not_be_there_before_the_run(tmp_path, textured):
    cfg = toy_config(tmp_path, [spy(on_error="log")], data_root=textured)
    runner = Runner.from_cfg(cfg)
    dataset = runner.test_loop.dataloader.dataset
    load = dataset.pipeline.transforms[0]
    seen = []

    class FailsOnce(BaseTransform):
        def transform(self, results):
            seen.append(results["img_path"])
            if len(seen) == 1:
                raise OSError("the disk was busy")
            return load(results)

    dataset.pipeline.transforms[0] = FailsOnce()
    runner.test()
    assert len(pictures(tmp_path)) == 2
