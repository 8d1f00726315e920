"""Pictures of all ranks are published, each once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.runner import Runner

from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.publish.gather import RankSpool
from mmyolo_vis_hooks.records import BoxedImage, Detections, VisImage
from tests import wandb_file
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy
from tests.toy_boxes import box_config

ROOT = Path(__file__).resolve().parents[2]


ALIGNMENTS = ("resize", "letterbox")
FAULTS = ("drawing", "spool", "reading", "arriving", "backend")


def run_on_two_ranks(work_dir: Path, toy_data: Path, *scenarios: str) -> int:
    """The status; a folder per scenario, see ``tests/distributed_run.py``."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
        *("-m", "tests.distributed_run", str(work_dir), str(toy_data), *scenarios),
    ]
    # A rank that waits for ever ends here.
    done = subprocess.run(command, cwd=ROOT, timeout=300)
    return done.returncode


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_data) -> Path:
    """All scenarios, in one start of the two processes."""
    work_dir = tmp_path_factory.mktemp("ranks")
    scenarios = [f"{alignment}:none:log" for alignment in ALIGNMENTS]
    scenarios += [f"resize:{fault}:log" for fault in FAULTS]
    scenarios += [f"resize:{fault}:raise" for fault in ("drawing", "backend")]
    assert run_on_two_ranks(work_dir, toy_data, *scenarios) == 0
    return work_dir


def names(*image_ids: int) -> list[str]:
    hooks = ("boxam", "featmap")
    return [f"test.{hook}.{i}_image_0.png" for hook in hooks for i in image_ids]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_two_ranks_give_the_pictures_of_one(runs, tmp_path, toy_data, alignment):
    """Five images on two ranks: the sampler repeats one of them."""
    found = pictures(runs / f"{alignment}:none:log")
    options = dict(alignment=alignment, num_images=-1)
    hooks = [spy(**options), box_spy(**options)]
    cfg = box_config(tmp_path, hooks, data_root=toy_data, batch_size=1)
    cfg.test_dataloader.dataset.indices = 5
    cfg.test_evaluator = []
    Runner.from_cfg(cfg).test()
    expected = pictures(tmp_path)
    assert sorted(expected) == names(1, 2, 3, 4, 5)
    assert found.keys() == expected.keys()
    for name, image in expected.items():
        np.testing.assert_array_equal(found[name], image)
    log = log_of(runs / f"{alignment}:none:log")
    assert log.count(": 5 picture(s) published") == 2


@pytest.mark.parametrize(
    ("fault", "there", "says"),
    [
        ("drawing", (1, 3, 5), ["rank 1: Could not draw 2_image", "3 x OSError"]),
        ("spool", (1, 2, 3, 5), ["rank 1: Could not keep 4_image", "1 x OSError"]),
        ("reading", (1, 3, 5), ["rank 1: Could not gather", "3 picture(s) did not ar"]),
        ("arriving", (1, 3, 5), ["3 picture(s) did not arrive at rank 0 (MemoryErr"]),
        ("backend", (1, 3, 4, 5), ["publish test/featmap/2_image", "1 x OSError"]),
    ],
)
def test_a_rank_that_fails_holds_nobody_up(runs, fault, there, says):
    """What another rank could not do is in the one log that is read."""
    work_dir = runs / f"resize:{fault}:log"
    assert sorted(pictures(work_dir)) == names(*there)
    log = log_of(work_dir)
    for text in says:
        assert text in log
    # A closing line for each hook.
    assert log.count("visualization step(s) failed") == 2


@pytest.mark.parametrize(("fault", "failed"), [("drawing", 1), ("backend", 0)])
def test_raise_ends_all_ranks(runs, fault, failed):
    work_dir = runs / f"resize:{fault}:raise"
    own, other = (
        (work_dir / f"rank{rank}.txt").read_text() for rank in (failed, 1 - failed)
    )
    assert own == "ended by OSError: [Errno 28] No space left on device"
    assert other.startswith(f"ended by VisError: rank {failed} failed: OSError")


@pytest.mark.nightly
def test_boxes_and_tables_of_all_ranks_are_one(tmp_path, toy_data, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    assert run_on_two_ranks(tmp_path, toy_data, "letterbox:table:log") == 0
    tables = dict(wandb_file.tables(tmp_path))
    assert tables.keys() == {"test/boxam/table", "test/featmap/table"}
    (row,) = filter(wandb_file.images, wandb_file.history_rows(tmp_path))
    (file,) = tmp_path.rglob("*.wandb")
    for name, rows in tables.items():
        found = {row["image id"]: row for row in rows}
        assert found.keys() == {f"{i}_image" for i in (1, 2, 3, 4, 5)}
        for image_id, of_image in found.items():
            boxes = wandb_file.boxes(
                file, row, name.replace("table", f"{image_id}/boxes")
            )
            assert boxes == of_image["image"]["boxes"]
            assert len(boxes["predictions"]) == len(of_image["scores"])
            assert len(boxes["ground_truth"]) == 1


@pytest.mark.nightly
def test_two_ranks_draw_the_worst_of_both_and_count_each_image_once(tmp_path, toy_data):
    assert run_on_two_ranks(tmp_path / "two", toy_data, "letterbox:worst:raise") == 0
    worst = dict(select="worst", num_images=-1, score_thr=0.6, mechanisms="all")
    hooks = [dict(type="ErrorVisHook", on_error="raise", **worst)]
    cfg = box_config(tmp_path / "one", hooks, data_root=toy_data, batch_size=1)
    cfg.test_dataloader.dataset.indices = 5
    cfg.test_evaluator = []
    Runner.from_cfg(cfg).test()
    found, expected = pictures(tmp_path / "two"), pictures(tmp_path / "one")
    assert found.keys() == expected.keys()
    for name, image in expected.items():
        np.testing.assert_array_equal(found[name], image)
    first, second = (
        path.read_text().split() for path in sorted(tmp_path.rglob("drawn*.txt"))
    )
    assert min(len(first), len(second)) > 0  # each draws its own
    assert sorted(first + second) == sorted(n.split(".")[2][:-2] for n in expected)
    # MMEngine has both ranks write this file at once: the end of the longer may stay.
    read = json.JSONDecoder().raw_decode
    metrics = [
        {k: v for k, v in read(path.read_text())[0].items() if "errors/" in k}
        for folder in ("one", "two")
        for path in (tmp_path / folder).rglob("[0-9]*.json")
    ]
    assert metrics[0] == metrics[1] != {}


def test_a_killed_rank_leaves_no_file(tmp_path, toy_data):
    assert run_on_two_ranks(tmp_path, toy_data, "resize:killed:log") != 0
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    # The other rank may have had the time to say that this one is gone.
    assert {path.suffix for path in left} - {".txt"} == {".log", ".py", ".png"}
    drawn = [path.name for path in left if path.suffix == ".png"]
    assert set(drawn) <= set(names(1, 3, 5))


def test_a_spool_keeps_all_of_a_picture_is_emptied_and_needs_no_other_rank(tmp_path):
    spool = RankSpool(str(tmp_path / "new"))
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (9, 7, 3), np.uint8) for name in ("a", "b")}
    corners, names = rng.random((2, 4)).astype(np.float32), ("Auto", "自行车")
    found = Detections(corners, corners[:, 0], np.array([1, 0]))
    boxed = {
        "a": BoxedImage(images["a"] // 2, found, Detections(), names, ("neck[0]",)),
        "b": BoxedImage(images["b"] // 2, Detections()),
    }
    for name, image in images.items():
        spool.add(VisImage(name, image, boxed[name]))
    spool.add(VisImage("c", images["a"]))
    spool.gather()
    kept = {image.image_id: image for image in spool.images()}
    assert kept.keys() == {"a", "b", "c"}
    assert kept["c"].boxed is None
    for name, image in images.items():
        np.testing.assert_array_equal(kept[name].image_rgb, image)
        again = kept[name].boxed
        np.testing.assert_array_equal(again.image_rgb, image // 2)
        for part in ("predictions", "truth"):
            one, other = getattr(again, part), getattr(boxed[name], part)
            assert (one is None) == (other is None)
            for field in vars(other) if other else ():
                np.testing.assert_array_equal(vars(one)[field], vars(other)[field])
        assert again.class_names == boxed[name].class_names
        assert again.layers == boxed[name].layers
    spool.clear()
    assert list(spool.images()) == []
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_takes_nothing_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    spool = RankSpool(str(tmp_path / "file"))
    with pytest.raises(VisError, match=r"the picture a cannot be kept in .*file"):
        spool.add(VisImage("a", np.zeros((9, 7, 3), np.uint8)))
    assert len(spool) == 0
