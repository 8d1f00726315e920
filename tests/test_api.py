"""The Python API on a toy detector that finds bright squares, and on a real one."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import save_checkpoint
from PIL import Image
from torch import nn

from mmyolo_vis_hooks import explain, feature_maps, load
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.results import Gallery
from tests.toy_boxes import box_detector

LAYER = ["neck"]


@pytest.fixture
def detector(tmp_path: Path, toy_data: Path) -> nn.Module:
    return box_detector(tmp_path, toy_data)


@pytest.fixture
def config(detector: nn.Module) -> Config:
    return detector.cfg


@pytest.fixture
def photo(toy_data: Path) -> Path:
    return toy_data / "folder0" / "image.png"


def rgb_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def bright_xyxy(image_rgb: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(image_rgb.mean(axis=2) > 200)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_box_says_what_it_is_and_its_map_lies_on_its_object(detector, photo) -> None:
    result = explain(detector, photo, topk=2, score_thr=0.0)
    assert len(result) == 2
    best = result[0]
    assert best.class_name == "square"
    assert best.score == pytest.approx(float(result.detections.scores.max()))
    assert best.layer.startswith("neck")
    (raw,) = best.raw_maps.values()
    assert raw.ndim == 2
    assert raw.min() >= 0
    image_rgb = rgb_of(photo)
    np.testing.assert_array_equal(result.image_rgb, image_rgb)
    assert best.saliency.shape == image_rgb.shape[:2]
    assert best.saliency.dtype == np.float32
    assert best.saliency.max() == 1
    x1, y1, x2, y2 = bright_xyxy(image_rgb)
    row, column = np.unravel_index(best.saliency.argmax(), best.saliency.shape)
    assert x1 - 8 <= column < x2 + 8
    assert y1 - 8 <= row < y2 + 8
    # The drawn detections are in pixels of the image.
    overlap = np.minimum(best.box_xyxy[2:], (x2, y2)) - np.maximum(
        best.box_xyxy[:2], (x1, y1)
    )
    assert (overlap > 0).all()


def test_a_path_numbers_and_pillow_are_the_same_image(detector, photo) -> None:
    image_rgb = rgb_of(photo)
    by_path = explain(detector, photo, score_thr=0.0)
    for given in (str(photo), image_rgb, Image.fromarray(image_rgb)):
        other = explain(detector, given, score_thr=0.0)
        np.testing.assert_array_equal(other.image_rgb, image_rgb)
        assert [e.score for e in other] == [e.score for e in by_path]
        np.testing.assert_array_equal(other[0].saliency, by_path[0].saliency)


def test_several_images_give_a_gallery_with_names_of_their_own(
    detector, toy_data, tmp_path
) -> None:
    paths = [toy_data / f"folder{i}" / "image.png" for i in range(3)]
    results = explain(detector, paths, score_thr=0.0, topk=1)
    assert isinstance(results, Gallery)
    assert len({result.image_id for result in results}) == 3
    for path, result in zip(paths, results):
        alone = explain(detector, path, score_thr=0.0, topk=1)
        np.testing.assert_array_equal(alone[0].saliency, result[0].saliency)
    files = results.save(tmp_path / "out")
    assert files[0].name == "index.html"
    assert len(files) == 10
    assert all(file.stat().st_size for file in files)
    of_iterator = feature_maps(detector, iter(paths[:2]), layers=LAYER)
    assert isinstance(of_iterator, Gallery)
    assert (tmp_path / "index.html") in of_iterator[:1].save(tmp_path)


def test_results_filter_by_class_and_slice(detector, photo) -> None:
    given = dict(score_thr=0.0, topk=3, classes=[np.int64(0)])
    result = explain(nn.DataParallel(detector), photo, **given)
    for label in ("square", 0, np.int64(0)):
        assert len(result.of_class(label)) == len(result) == 3
    assert [e.score for e in result[1:]] == [e.score for e in list(result)[1:]]
    assert result[:0].draw().ndim == 3
    for unknown in ("round", 7):
        with pytest.raises(VisConfigError, match="no class of the data set"):
            result.of_class(unknown)
    with pytest.raises(VisConfigError, match="use names or indices"):
        result.of_class(["square"])


def test_results_print_in_one_line_without_numbers_of_maps(detector, photo) -> None:
    result = explain(detector, photo, score_thr=0.0, topk=1)
    maps = feature_maps(detector, photo, layers=LAYER)
    for shown in map(repr, (result, result[0], result.detections, maps, maps[0])):
        assert "\n" not in shown
        assert "array" not in shown
    assert repr(result).startswith("Explanations(image, ")
    assert repr(result[0]).startswith("Explanation(square 0.")
    assert repr(maps[0]).startswith("FeatureMap(neck[0], 9 x ")
    assert repr(result[:0]).endswith("px: no box)")
    assert repr(maps[:0]).endswith("px: no map)")


def test_feature_maps_are_what_the_layer_puts_out(detector, photo) -> None:
    found: list[Any] = []
    handle = detector.neck.register_forward_hook(lambda m, a, out: found.append(out))
    maps = feature_maps(detector, photo, layers="neck")
    handle.remove()
    assert [m.layer for m in maps] == ["neck[0]", "neck[1]"]
    for own, output in zip(maps, found[-1]):
        np.testing.assert_array_equal(own.values, output[0].detach().numpy())
    assert maps.draw().shape[2] == 3


def test_a_result_is_drawn_again_in_another_way(detector, photo) -> None:
    result = explain(detector, photo, score_thr=0.0, topk=2)
    joint, boxes = result.draw(scope="image"), result.draw(scope="box")
    assert joint.shape[0] < boxes.shape[0]
    assert joint.dtype == np.uint8
    with pytest.raises(VisConfigError, match=r"method='odam' cannot work in draw"):
        result.draw(method="odam")
    with pytest.raises(VisConfigError, match="no option 'scop'; use scope"):
        result.draw(scop="box")
    with pytest.raises(VisConfigError, match="no option 'foo'") as unknown:
        result.draw(foo=1)
    assert "scope" in str(unknown.value)
    assert "method" not in str(unknown.value)
    with pytest.raises(VisConfigError, match="scope='boxes'"):
        result.draw(scope="boxes")
    maps = feature_maps(detector, photo, layers=LAYER)
    assert (maps.draw(colormap="gray") != maps.draw()).any()


def test_saved_numbers_are_those_of_the_result(detector, photo, tmp_path) -> None:
    result = explain(detector, photo, score_thr=0.0, topk=2)
    names = {file.name for file in result.save(tmp_path)}
    assert names == {"index.html", "image.jpg", "image.npz", "image.json"}
    with np.load(tmp_path / "image.npz") as saved:
        np.testing.assert_array_equal(saved["saliency"][1], result[1].saliency)
        np.testing.assert_array_equal(saved["boxes_xyxy"][0], result[0].box_xyxy)
        assert list(saved["class_names"]) == ["square", "square"]
    first, second = json.loads((tmp_path / "image.json").read_text())
    for row, own in ((first, result[0]), (second, result[1])):
        x1, y1, x2, y2 = own.box_xyxy
        assert row["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)
    assert first["category_name"] == "square"
    assert first["category_id"] == 0
    picture = cv2.imread(str(tmp_path / "image.jpg"))
    assert picture.shape == result.draw().shape
    maps = feature_maps(detector, photo, layers=LAYER)
    assert maps.save(tmp_path / "maps.npz") == [tmp_path / "maps.npz"]
    with np.load(tmp_path / "maps.npz") as saved:
        np.testing.assert_array_equal(saved["neck[1]"], maps[1].values)
    with pytest.raises(VisConfigError, match=r"'out\.txt' cannot work: use a folder"):
        result.save("out.txt")
    for name in ("a.NPZ", "new/a.npz", "new/b.json", "new/c.png"):
        assert result.save(tmp_path / name) == [tmp_path / name]
        assert (tmp_path / name).stat().st_size


def test_a_notebook_shows_a_result_by_itself(detector, photo) -> None:
    result = explain(detector, photo, score_thr=0.0, topk=1)
    shown = cv2.imdecode(np.frombuffer(result._repr_jpeg_(), np.uint8), -1)
    assert np.abs(shown[..., ::-1].astype(int) - result.draw()).mean() < 2
    gallery = explain(detector, [photo, photo], score_thr=0.0, topk=1)
    assert gallery._repr_html_().count("<img ") == 2


def test_a_model_in_the_middle_of_a_training_is_afterwards_what_it_was(
    detector, photo
) -> None:
    detector.train()
    detector.neck.eval()  # a part that somebody froze
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.1)
    loss = detector(torch.randn(1, 3, 64, 64), None, mode="loss")["loss"]
    loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in detector.parameters()]
    state = {key: value.clone() for key, value in detector.state_dict().items()}
    modes = [module.training for module in detector.modules()]
    random = torch.get_rng_state()
    evaluated = explain(copy.deepcopy(detector).eval(), photo, score_thr=0.0)
    with torch.autocast("cpu", torch.bfloat16):  # which rounds gradients away
        trained = explain(detector, photo, score_thr=0.0)
    np.testing.assert_array_equal(trained[0].saliency, evaluated[0].saliency)
    explain(detector, photo, score_thr=0.0, method="ablationcam", topk=1)
    feature_maps(detector, photo, layers=LAYER)
    assert [module.training for module in detector.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad for p in detector.parameters())
    for parameter, grad in zip(detector.parameters(), grads):
        assert grad is None or torch.equal(parameter.grad, grad)
        assert (grad is None) == (parameter.grad is None)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in detector.modules())
    optimizer.step()


def test_load_gives_what_explain_takes(config, detector, photo, tmp_path) -> None:
    checkpoint = str(tmp_path / "weights.pth")
    names = dict(classes=("square",), palette=[(1, 2, 3)])
    save_checkpoint(
        dict(state_dict=detector.state_dict(), meta=dict(dataset_meta=names)),
        checkpoint,
    )
    file = tmp_path / "config.py"
    config.dump(str(file))
    for given in (config, str(file), file):
        loaded = load(given, checkpoint, device="cpu")
        assert not loaded.training
        assert loaded.dataset_meta["classes"] == ("square",)
        again = explain(loaded, photo, score_thr=0.0, topk=1)
        own = explain(detector, photo, score_thr=0.0, topk=1)
        np.testing.assert_array_equal(again[0].saliency, own[0].saliency)


def test_a_detector_without_a_config_is_given_one(detector, config, photo) -> None:
    del detector.cfg
    with pytest.raises(VisConfigError, match=r"config=None.*carries no config"):
        explain(detector, photo)
    assert len(explain(detector, photo, config=config, score_thr=0.0))


def with_step(config: Config) -> Config:
    """A config whose test pipeline begins with a step that there is not."""
    changed = copy.deepcopy(config)
    changed.test_dataloader.dataset.pipeline.insert(0, dict(type="Z"))
    return changed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, p: explain(d, p, topk=0), "topk=0"),
        (
            lambda d, p: explain(d, p, methode="boxam"),
            "no option 'methode'; use method",
        ),
        (lambda d, p: explain(d, p, draw=False), "explain has no option 'draw'"),
        (lambda d, p: explain(d, p, layers="nekc"), "near matches: neck"),
        (lambda d, p: explain(d, p, layers="neck", target_layers="neck"), "one option"),
        (lambda d, p: explain(d, p, classes=["dog"]), "'dog' is no class"),
        (lambda d, p: feature_maps(d, p, layers=[]), "target_layers="),
        (lambda d, p: explain(d, p, layers=[d.neck]), r"^[^\n]{,300}by their paths"),
        (lambda d, p: explain(d, np.zeros((4, 4, 3, 1))), r"\(4, 4, 3, 1\)"),
        (lambda d, p: explain(d, p.with_name("none.png")), "none.png"),
        (lambda d, p: explain(d, __file__), r"test_api\.py is no image"),
        (lambda d, p: explain(d, {p}), "an image of type set"),
        (lambda d, p: explain(d, BytesIO(p.read_bytes())), "an image of type BytesIO"),
        (lambda d, p: explain(str(p), p), "detector=str is no detector"),
        (lambda d, p: load(d.cfg, "gone.pth"), "there is no checkpoint gone.pth"),
        (lambda d, p: load(d.cfg, None), "checkpoint=None cannot work"),
        (lambda d, p: load(None, p), "config=None cannot work"),
        (lambda d, p: explain(d, p, config=with_step(d.cfg)), "pipeline cannot be .*Z"),
        (lambda d, p: explain(d, [p]).save("all.png"), "several results need a folder"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(detector, photo, call, message):
    with pytest.raises(VisError, match=message):
        call(detector, photo)


def test_detectors_that_cannot_work_are_refused(config, detector, photo) -> None:
    with pytest.raises(VisConfigError, match=r"float16 .* use detector.float\(\)"):
        explain(detector.half(), photo)
    with torch.inference_mode():
        built = MODELS.build(copy.deepcopy(config.model))
    with pytest.raises(VisConfigError, match="inference_mode"):
        explain(built, photo, config=config)


def test_threads_take_turns(detector, photo) -> None:
    alone = explain(detector, photo, topk=2, score_thr=0.0)
    with ThreadPoolExecutor(4) as pool:
        looks = [
            pool.submit(explain, detector, photo, topk=2, score_thr=0.0)
            for _ in range(8)
        ]
        for result in (look.result() for look in looks):
            np.testing.assert_array_equal(result[0].saliency, alone[0].saliency)
    assert all(p.requires_grad for p in detector.parameters())
