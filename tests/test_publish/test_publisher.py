"""N images leave N files, N TensorBoard images and N W&B images."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.visualization import (
    LocalVisBackend,
    TensorboardVisBackend,
    Visualizer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmyolo_vis_hooks.errors import ErrorPolicy, PublishError, VisConfigError
from mmyolo_vis_hooks.publish import publisher as publisher_module
from mmyolo_vis_hooks.publish.publisher import Publisher
from mmyolo_vis_hooks.publish.writer import Writer
from mmyolo_vis_hooks.records import BoxedImage, Detections, VisImage
from tests import wandb_file
from tests.test_hooks.helpers import box_spy, pictures, spy, vis_hooks
from tests.toy import toy_config
from tests.toy_boxes import box_config

BACKENDS = (
    dict(type="LocalVisBackend"),
    dict(type="TensorboardVisBackend"),
    dict(type="WandbVisBackend", init_kwargs=dict(mode="offline", project="toy")),
)
IDS = ["1_image", "3_image", "6_image"]


@pytest.fixture(autouse=True)
def wandb_offline(monkeypatch, tmp_path_factory):
    # Files of tables wait there until they are sent.
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("wandb")))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def tensorboard_images(work_dir: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in work_dir.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0})
        events.Reload()
        for tag in events.Tags()["images"]:
            found.setdefault(tag, []).extend(e.step for e in events.Images(tag))
    return found


def test_a_training_and_a_test_lose_nothing(tmp_path, toy_data):
    """Every hook, image and step in every backend, also after MMEngine closed them."""
    hooks = [
        box_spy(image_indices=[0, 2, 5], table=True),
        spy(image_indices=[0]),
        spy(image_indices=[0], alignment="network", table=True, score_thr=0.2),
        box_spy(image_indices=[2], method="gradcam"),
    ]
    cfg = box_config(tmp_path, hooks, data_root=toy_data, vis_backends=BACKENDS)
    runner = Runner.from_cfg(cfg)
    runner.train()
    tags = [f"boxam/{i}" for i in IDS]
    tags += ["featmap/1_image", "featmap_2/1_image", "boxam_2/3_image"]
    expected = {f"val.{t.replace('/', '.')}_{e}.png" for t in tags for e in (1, 2)}
    assert set(pictures(tmp_path)) == expected
    assert tensorboard_images(tmp_path) == {f"val/{t}": [1, 2] for t in tags}
    rows = wandb_file.history_rows(tmp_path)
    with_images = [row for row in rows if wandb_file.images(row)]
    assert len(with_images) == 2  # one for each validation
    images = [f"{t}{kind}" for t in tags for kind in ("", "/boxes")]
    for row in with_images:
        assert wandb_file.images(row) == {f"val/{image}" for image in images}
        assert "coco/bbox_mAP" in row  # the row of the metrics
    assert len(list(tmp_path.rglob("files/media/images/**/*.png"))) == 2 * len(tags)
    assert_boxes_lie_on_objects(tmp_path, with_images[1], [f"val/{t}" for t in tags])
    boxam, _, featmap_2, _ = (hook.samples for hook in vis_hooks(runner))
    assert_tables(tmp_path, {"boxam": boxam, "featmap_2": featmap_2})

    # MMEngine has closed the backends. The same run goes on.
    (first,) = tmp_path.rglob("*.wandb")
    runner.test()
    (second,) = set(tmp_path.rglob("*.wandb")) - {first}
    assert first.name == second.name  # the id of the run
    (row,) = wandb_file.history_rows(second.parent)
    assert wandb_file.images(row) == {f"test/{image}" for image in images}
    expected |= {f"test.{t.replace('/', '.')}_0.png" for t in tags}
    assert set(pictures(tmp_path)) == expected
    events = {f"{mode}/{t}" for mode in ("val", "test") for t in tags}
    assert set(tensorboard_images(tmp_path)) == events
    assert len(list(tmp_path.rglob("events.out.tfevents*"))) == 2  # one for each run


def test_a_test_goes_on_in_the_run_of_a_training_without_validation(tmp_path, toy_data):
    cfg = box_config(
        tmp_path,
        [spy(image_indices=[0])],
        data_root=toy_data,
        vis_backends=BACKENDS,
        max_epochs=1,
        **dict.fromkeys(("val_cfg", "val_dataloader", "val_evaluator")),
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    (first,) = tmp_path.rglob("*.wandb")
    runner.test()
    (second,) = set(tmp_path.rglob("*.wandb")) - {first}
    assert first.name == second.name  # the id of the run
    (row,) = wandb_file.history_rows(second.parent)
    assert "test/featmap/1_image" in wandb_file.images(row)


def assert_boxes_lie_on_objects(work_dir: Path, row: dict, tags: list[str]) -> None:
    """The pixels say where the image's bright square is."""
    (file,) = work_dir.rglob("*.wandb")
    for tag in (f"{tag}/boxes" for tag in tags):
        image = cv2.imread(str(file.parent / "files" / row[f"{tag}.path"]), 0)
        assert max(image.shape) == 320  # as in the panel
        groups = wandb_file.boxes(file, row, tag)
        assert groups.keys() == {"predictions", "ground_truth"}
        (found,) = groups["ground_truth"]
        bright = np.argwhere(image > 130)[:, ::-1]
        expected = [*bright.min(0), *(bright.max(0) + 1)]
        assert np.abs(np.subtract(corners(found), expected)).max() <= 2
        assert found["box_caption"] == "square"
        assert groups["predictions"]
        for found in groups["predictions"]:
            assert found["domain"] == "pixel"
            assert found["box_caption"] == f"square {found['scores']['score']:.2f}"
            x1, y1, x2, y2 = corners(found)
            assert 0 <= x1 < x2 <= image.shape[1]
            assert 0 <= y1 < y2 <= image.shape[0]


def corners(found: dict) -> list[int]:
    return [found["position"][name] for name in ("minX", "minY", "maxX", "maxY")]


def assert_tables(work_dir: Path, samples: dict[str, list]) -> None:
    """One for each validation and hook that asks for it, a row for each image."""
    tables = wandb_file.tables(work_dir)
    assert [name for name, _ in tables] == [f"val/{hook}/table" for hook in samples] * 2
    for (_, rows), (hook, drawn) in zip(tables[len(samples) :], samples.items()):
        for row, sample in zip(rows, drawn[-len(rows) :], strict=True):
            scores = [score for score in sample.detections.scores if score > 0.2]
            assert row["image id"] == sample.image_id
            assert row["scores"] == pytest.approx(scores, abs=1e-4)
            assert row["classes"] == ["square"] * len(scores)
            assert row["layers"] == list(sample.layers)
            shown, size_wh = row["image"]["boxes"], [320, row["image"]["height"]]
            assert len(shown["ground_truth"]) == 1
            for found, box in zip(shown["predictions"], row["boxes"], strict=True):
                inside = np.clip(box, 0, size_wh * 2)
                assert np.abs(corners(found) - inside).max() <= 0.56  # whole pixels
            assert row["maps"]["caption"] == f"val/{hook}/{sample.image_id} @ 2"


def test_a_table_without_a_backend_that_makes_one_is_refused(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [spy(table=True)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(VisConfigError, match=r"table=True .*type='WandbVisBackend'"):
        runner.train()
    assert runner.model.num_forwards == 0
    with pytest.raises(VisConfigError, match="table=True cannot work with show=True"):
        Runner.from_cfg(
            toy_config(tmp_path, [spy(table=True, show=True)], data_root=toy_data)
        )


def test_pure_validation_without_logger_hook_ends_its_row(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path, [spy(num_images=3)], data_root=toy_data, vis_backends=BACKENDS[2:]
    )
    cfg.default_hooks.logger = None
    runner = Runner.from_cfg(cfg)
    runner.val()
    runner.visualizer.close()
    rows = wandb_file.history_rows(tmp_path)
    assert [len(wandb_file.images(row)) for row in rows] == [6]  # with their boxes


class Broken:
    def add_image(self, name, image, step):
        raise OSError("no route to the tracking server")

    @property
    def _env_initialized(self):
        raise OSError("no route to the tracking server")


class Keeping:
    def __init__(self):
        self.images = []

    def add_image(self, name, image, step):
        self.images.append((name, image, step))


def make_publisher(backends, on_error="log", visualizer=None):
    visualizer = visualizer or Visualizer()
    visualizer._vis_backends = backends
    policy = ErrorPolicy(on_error, MMLogger.get_instance("publisher_test"), "featmap")
    options = dict(name="featmap", policy=policy, writer=Writer())
    return Publisher(visualizer, **options), policy


TAG = "val/featmap/7_x"
PICTURE = VisImage(
    "7_x", np.random.RandomState(0).randint(0, 255, (20, 30, 3)).astype(np.uint8)
)


def test_a_broken_backend_keeps_nothing_from_the_others():
    backends = {"Broken": Broken(), "Keeping": Keeping()}
    publisher, policy = make_publisher(backends)
    publisher.publish("val", PICTURE, 3)
    ((name, image, step),) = backends["Keeping"].images
    assert (name, step) == (TAG, 3)
    np.testing.assert_array_equal(image, PICTURE.image_rgb)
    assert policy.num_failures == 1
    publisher.finish(commit=True)
    assert publisher.num_published == 1
    publisher.reopen()
    assert policy.num_failures == 2
    publisher, _ = make_publisher(backends, on_error="raise")
    with pytest.raises(OSError, match="tracking server"):
        publisher.publish("val", PICTURE, 3)


@pytest.mark.parametrize("backends", [{}, {"Broken": Broken()}])
def test_what_no_backend_took_is_not_published(backends):
    publisher, _ = make_publisher(backends)
    publisher.publish("val", PICTURE, 3)
    publisher.finish(commit=True)
    assert publisher.num_published == 0
    assert publisher.has_destination == bool(backends)


def test_what_waits_for_a_row_is_published_with_it():
    class Experiment:
        run, rows = None, []

        def Image(self, image, caption, **boxes):
            return caption

        def log(self, row, commit):
            self.rows.append((row, commit))
            if len(self.rows) > 1:
                raise OSError("no route to the tracking server")

    class WandbVisBackend(Keeping):
        experiment = Experiment()

    publisher, policy = make_publisher({"W&B": WandbVisBackend()})
    boxed = BoxedImage(PICTURE.image_rgb, Detections())
    publisher.publish("val", replace(PICTURE, boxed=boxed), 3)
    assert publisher.num_published == 0
    publisher.finish(commit=False)
    publisher.publish("val", PICTURE, 4)
    publisher.finish(commit=True)
    assert (publisher.num_published, policy.num_failures) == (1, 1)
    first = {tag: f"{tag} @ 3" for tag in (TAG, f"{TAG}/boxes")}
    assert Experiment.rows == [(first, False), ({TAG: f"{TAG} @ 4"}, True)]


def test_files_are_written_beside_the_loop(tmp_path, monkeypatch):
    """In the order of the pictures, whole, and all before a run is finished."""
    add, calls = LocalVisBackend.add_image, []

    def slow(self, name, image, step=0):
        time.sleep(0.02)
        # A file has another name until it is whole.
        calls.append((name.lstrip("."), step, threading.current_thread().name))
        add(self, name, image, step)

    monkeypatch.setattr(LocalVisBackend, "add_image", slow)
    monkeypatch.setattr(publisher_module, "PATIENCE", 0.002)
    backend, keeping = LocalVisBackend(save_dir=str(tmp_path)), Keeping()
    publisher, policy = make_publisher({"Local": backend, "Keeping": keeping}, "raise")
    said: list[str] = []
    monkeypatch.setattr(policy, "warn", said.append)
    ids = [f"{number}_x" for number in range(7)]
    for number, image_id in enumerate(ids):
        picture = VisImage(image_id, PICTURE.image_rgb + np.uint8(number))
        publisher.publish("val", picture, 3)
    assert len(calls) < len(ids)
    # Nobody knows in which threads another backend may be asked.
    assert [name for name, *_ in keeping.images] == [f"val/featmap/{i}" for i in ids]
    publisher.finish(commit=True)
    names = [f"val.featmap.{image_id}" for image_id in ids]
    assert [(name, step) for name, step, _ in calls] == [(name, 3) for name in names]
    assert not any("MainThread" in thread for *_, thread in calls)
    for number, name in enumerate(names):
        image = cv2.imread(str(tmp_path / "vis_image" / f"{name}_3.png"))
        np.testing.assert_array_equal(
            image[..., ::-1], PICTURE.image_rgb + np.uint8(number)
        )
    assert publisher.num_published == len(ids)
    assert any(text.startswith("waiting for Local: it has not") for text in said)


def test_tensorboard_shows_the_very_pixels(tmp_path):
    backend = TensorboardVisBackend(save_dir=str(tmp_path))
    publisher, _ = make_publisher({"TensorBoard": backend}, "raise")
    publisher.publish("val", PICTURE, 3)
    publisher.finish(commit=True)
    backend.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    (event,) = events.Images(TAG)
    assert (event.step, event.height, event.width) == (3, 20, 30)
    png = np.frombuffer(event.encoded_image_string, np.uint8)
    image = cv2.imdecode(png, cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(image[..., ::-1], PICTURE.image_rgb)


def test_local_file_that_was_not_written_is_an_error(tmp_path):
    backend = LocalVisBackend(save_dir=str(tmp_path))
    publisher, _ = make_publisher({"Local": backend}, on_error="raise")
    publisher.publish("val", PICTURE, 2)
    publisher.finish(commit=True)
    assert publisher.num_published == 1
    path = tmp_path / "vis_image" / "val.featmap.7_x_3.png"
    # A folder in the place of the file: imwrite gives False and says nothing.
    path.mkdir()
    publisher.publish("val", PICTURE, 3)
    with pytest.raises(PublishError, match=rf"did not write {path}.*free space"):
        publisher.finish(commit=True)
    # A full disk: imwrite says nothing either.
    backend.add_image = lambda name, image, step: path.with_name(
        f"{name}_{step}.png"
    ).write_bytes(b"half a PNG")
    path.rmdir()
    publisher.publish("val", PICTURE, 3)
    with pytest.raises(PublishError, match="it is not whole"):
        publisher.finish(commit=True)
    assert [file.name for file in path.parent.iterdir()] == ["val.featmap.7_x_2.png"]
    assert publisher.num_published == 1


def test_visualizer_that_stores_pictures_itself():
    class OwnVisualizer(Visualizer):
        def add_image(self, name, image, step=0):
            self.kept = (name, step)

    visualizer = OwnVisualizer()
    make_publisher({}, "raise", visualizer)[0].publish("val", PICTURE, 2)
    assert visualizer.kept == (TAG, 2)
