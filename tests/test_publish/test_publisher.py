"""N images leave N files, N TensorBoard images and N W&B images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend, Visualizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmyolo_vis_hooks.errors import ErrorPolicy, PublishError
from mmyolo_vis_hooks.publish.publisher import Publisher
from mmyolo_vis_hooks.records import VisImage
from tests import wandb_file
from tests.test_hooks.helpers import box_spy, pictures, spy
from tests.toy import toy_config
from tests.toy_boxes import box_config

BACKENDS = (
    dict(type="LocalVisBackend"),
    dict(type="TensorboardVisBackend"),
    dict(type="WandbVisBackend", init_kwargs=dict(mode="offline", project="toy")),
)
IDS = ["1_image", "3_image", "6_image"]


@pytest.fixture(autouse=True)
def wandb_offline(monkeypatch):
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
        box_spy(image_indices=[0, 2, 5]),
        spy(image_indices=[0]),
        spy(image_indices=[0], alignment="network"),
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
    for row in with_images:
        assert wandb_file.images(row) == {f"val/{t}" for t in tags}
        assert "coco/bbox_mAP" in row  # the row of the metrics
    assert len(list(tmp_path.rglob("files/media/images/**/*.png"))) == 2 * len(tags)

    # MMEngine has closed the backends. The same run goes on.
    (first,) = tmp_path.rglob("*.wandb")
    runner.test()
    (second,) = set(tmp_path.rglob("*.wandb")) - {first}
    assert first.name == second.name  # the id of the run
    (row,) = wandb_file.history_rows(second.parent)
    assert wandb_file.images(row) == {f"test/{t}" for t in tags}
    expected |= {f"test.{t.replace('/', '.')}_0.png" for t in tags}
    assert set(pictures(tmp_path)) == expected
    events = {f"{mode}/{t}" for mode in ("val", "test") for t in tags}
    assert set(tensorboard_images(tmp_path)) == events


def test_pure_validation_without_logger_hook_ends_its_row(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path, [spy(num_images=3)], data_root=toy_data, vis_backends=BACKENDS[2:]
    )
    cfg.default_hooks.logger = None
    runner = Runner.from_cfg(cfg)
    runner.val()
    runner.visualizer.close()
    rows = wandb_file.history_rows(tmp_path)
    assert [len(wandb_file.images(row)) for row in rows] == [3]


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
    return Publisher(visualizer, name="featmap", policy=policy), policy


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

        def Image(self, image, caption):
            return caption

        def log(self, row, commit):
            self.rows.append((row, commit))
            if len(self.rows) > 1:
                raise OSError("no route to the tracking server")

    class WandbVisBackend(Keeping):
        experiment = Experiment()

    publisher, policy = make_publisher({"W&B": WandbVisBackend()})
    publisher.publish("val", PICTURE, 3)
    assert publisher.num_published == 0
    publisher.finish(commit=False)
    publisher.publish("val", PICTURE, 4)
    publisher.finish(commit=True)
    assert (publisher.num_published, policy.num_failures) == (1, 1)
    expected = [({TAG: f"{TAG} @ 3"}, False), ({TAG: f"{TAG} @ 4"}, True)]
    assert Experiment.rows == expected


def test_local_file_that_was_not_written_is_an_error(tmp_path):
    backend = LocalVisBackend(save_dir=str(tmp_path))
    publisher, _ = make_publisher({"Local": backend}, on_error="raise")
    publisher.publish("val", PICTURE, 2)
    path = tmp_path / "vis_image" / "val.featmap.7_x_3.png"
    # A folder in the place of the file: imwrite gives False and says nothing.
    path.mkdir()
    with pytest.raises(PublishError, match=rf"did not write {path}.*free space"):
        publisher.publish("val", PICTURE, 3)
    # A full disk: imwrite says nothing either.
    backend.add_image = lambda name, image, step: path.write_bytes(b"half a PNG")
    path.rmdir()
    with pytest.raises(PublishError, match="it is not whole"):
        publisher.publish("val", PICTURE, 3)
    assert not path.exists()
    assert publisher.num_published == 1


def test_visualizer_that_stores_pictures_itself():
    class OwnVisualizer(Visualizer):
        def add_image(self, name, image, step=0):
            self.kept = (name, step)

    visualizer = OwnVisualizer()
    make_publisher({}, "raise", visualizer)[0].publish("val", PICTURE, 2)
    assert visualizer.kept == (TAG, 2)
