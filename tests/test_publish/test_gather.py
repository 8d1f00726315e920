"""Pictures of all ranks are published, each once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.runner import Runner

from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.publish import gather
from mmyolo_vis_hooks.publish.gather import RankSpool
from mmyolo_vis_hooks.records import VisImage
from tests.test_hooks.helpers import box_spy, pictures, spy
from tests.toy_boxes import box_config

ROOT = Path(__file__).resolve().parents[2]


def run_on_two_ranks(work_dir: Path, toy_data: Path, alignment: str, failing: int):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
        *("-m", "tests.distributed_run"),
        *(str(work_dir), str(toy_data), alignment, str(failing)),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return pictures(work_dir)


@pytest.mark.parametrize("alignment", ["resize", "letterbox"])
def test_two_ranks_give_the_pictures_of_one(tmp_path, toy_data, alignment):
    """Five images on two ranks: the sampler repeats one of them."""
    found = run_on_two_ranks(tmp_path / "two", toy_data, alignment, failing=-1)
    options = dict(alignment=alignment, num_images=-1)
    hooks = [spy(**options), box_spy(**options)]
    cfg = box_config(tmp_path / "one", hooks, data_root=toy_data, batch_size=1)
    cfg.test_dataloader.dataset.indices = 5
    cfg.test_evaluator = []
    Runner.from_cfg(cfg).test()
    expected = pictures(tmp_path / "one")
    assert len(expected) == 2 * 5
    assert found.keys() == expected.keys()
    for name, image in expected.items():
        np.testing.assert_array_equal(found[name], image)


def test_a_rank_that_cannot_draw_holds_nobody_up(tmp_path, toy_data):
    found = run_on_two_ranks(tmp_path, toy_data, "resize", failing=1)
    # Rank 0 had the first, third and fifth image.
    assert sorted(found) == [
        f"test.{name}.{i}_image_0.png"
        for name in ("boxam", "featmap")
        for i in (1, 3, 5)
    ]


def test_spool_is_emptied_and_needs_no_other_rank():
    spool = RankSpool()
    image = np.random.RandomState(0).randint(0, 255, (9, 7, 3)).astype(np.uint8)
    spool.add(VisImage("a", image))
    folder = Path(spool._folder.name)
    assert len(list(folder.iterdir())) == 1
    assert list(spool.gather()) == []  # rank 0 publishes its own at once
    assert not folder.exists()


@pytest.mark.parametrize("damage", [lambda png: png[:100], lambda png: b"", None])
def test_a_damaged_picture_of_another_rank_does_not_stop_the_others(
    monkeypatch, damage
):
    """Rank 0 takes part in every broadcast, or the other ranks would hang."""
    image = np.random.RandomState(0).randint(0, 255, (40, 30, 3)).astype(np.uint8)
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    sent = [damage and ("bad", damage(png)), ("good", png)]

    def broadcast(payload, src):
        payload[0] = sent.pop(0)

    monkeypatch.setattr(gather, "all_gather_object", lambda count: [0, 2])
    monkeypatch.setattr(gather, "get_world_size", lambda: 2)
    monkeypatch.setattr(gather, "broadcast_object_list", broadcast)
    pictures_of_others = RankSpool().gather()
    received = next(pictures_of_others)
    with pytest.raises(VisError, match=r"1 picture\(s\) of other ranks"):
        next(pictures_of_others)
    assert sent == []
    assert received.image_id == "good"
    np.testing.assert_array_equal(received.image_rgb, image)
