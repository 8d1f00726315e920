"""The page holds what it was given, and no file of a user is lost."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmyolo_vis_hooks.errors import PublishError
from mmyolo_vis_hooks.publish import files
from mmyolo_vis_hooks.records import OverlayMap
from tests.test_publish.pages import DOG, HOSTILE, add, data_of, new_page, smooth_levels


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "index_files").glob("*.jpg"))


def test_the_assets_are_what_was_given(tmp_path):
    levels = smooth_levels()
    photo = cv2.merge([smooth_levels(60, 80, seed) for seed in (1, 2, 3)])
    page = new_page(tmp_path)
    add(page, image_rgb=photo, maps=[OverlayMap("map", "", levels)])
    page.write()
    stored, stored_bgr = (
        cv2.imread(str(tmp_path / "index_files" / f"a.{part}.jpg"), -1)
        for part in ("0", "image")
    )
    assert np.abs(stored.astype(int) - levels).max() <= 3
    assert np.abs(stored_bgr[..., ::-1].astype(int) - photo).mean() < 6
    assert sorted(os.listdir(tmp_path)) == ["index.html", "index_files"]
    assert pictures(tmp_path) == ["a.0.jpg", "a.image.jpg"]


def test_no_text_breaks_out_of_the_page(tmp_path):
    page = new_page(tmp_path, title=HOSTILE + "\udcff")
    title = HOSTILE + "\u2028\udcff"
    maps = [OverlayMap(HOSTILE, HOSTILE, smooth_levels())]
    add(
        page, boxes=[(HOSTILE, 0.5, (0, 0, 9, 9))], maps=maps, title=title, note=HOSTILE
    )
    for i, picture in enumerate(("out/50% #1?.png", "javascript:alert(1)")):
        add(page, f"b{i}", picture=picture)
    path = page.write()
    data = data_of(path)
    assert data["labels"][1]["name"] == HOSTILE
    assert data["entries"][0]["title"] == title
    assert data["entries"][0]["note"] == HOSTILE
    assert data["entries"][0]["panels"] == [{"title": HOSTILE, "note": HOSTILE}]
    links = ["", "out/50%25%20%231%3F.png", "javascript%3Aalert%281%29"]
    assert [e["href"] for e in data["entries"]] == links
    text = path.read_text(encoding="utf-8")
    assert "<b>" not in text
    assert text.count("</script>") == 2
    assert "&#56575;" in text  # half a character, as file names may hold


def test_an_entry_knows_its_boxes_in_percent(tmp_path):
    boxes = [
        ("dog", 0.25, (0, 0, 9, 9)),
        DOG,
        ("cat", 0.4, (-50, 0, 320, 960)),
        ("dog", 0.3, (700, 0, 800, 10)),
        ("dog", 0.3, (0, np.inf, 1, 1)),
    ]
    levels = smooth_levels()
    maps = [OverlayMap(str(i), "", levels, i) for i in (None, 0, 2)]
    page = new_page(tmp_path)
    add(page, boxes=boxes, maps=maps, score_thr=0.25)
    add(page, "b", boxes=boxes, score_thr=0.95, note="one channel, grey")
    data = data_of(page.write())
    labels = [(label["name"], label["count"]) for label in data["labels"]]
    assert labels == [("dog", 3), ("cat", 1)]
    first, second = data["entries"]
    assert first["boxes"] == [
        [0, 0.9, [10, 10, 40, 40]],
        [1, 0.4, [0, 0, 50, 100]],
        [0, 0.3, None],
        [0, 0.3, None],
    ]
    # By its place among the boxes that are shown.
    assert [panel.get("box") for panel in first["panels"]] == [None, None, 1]
    assert second["note"] == "no box with score > 0.95 · one channel, grey"


def test_entries_are_in_order_whoever_comes_first(tmp_path):
    page = new_page(tmp_path)
    places = {"b": 1, "z": 0}
    places.update({f"i{i}": 2 + i for i in range(20)})
    with ThreadPoolExecutor(4) as threads:
        for name, order in places.items():
            threads.submit(add, page, name, order=order)
    names = [e["name"] for e in data_of(page.write())["entries"]]
    assert names == ["z", "b", *(f"i{i}" for i in range(20))]
    assert len(pictures(tmp_path)) == 2 * len(page) == 2 * 22


def test_files_of_the_user_stay(tmp_path):
    (tmp_path / "index_files").mkdir()
    users = ("B.jpg", "b-2.png", "index_files/a.0.jpg", "index_files/mine.jpg")
    for name in users:
        (tmp_path / name).write_text("mine")
    for _ in range(2):  # the second run replaces its own files, by the same names
        page = new_page(tmp_path)
        names = [page.files.free_name(name) for name in ("a", "b", "c", "b-2", "c")]
        assert names == ["a-2", "b-2", "c", "b-2-2", "c-2"]
        for name in names:
            page.files.write(f"{name}.jpg", name.encode())
            add(page, name)
        page.write()
        for name in ("b.jpg", "B.jpg"):
            with pytest.raises(PublishError, match=r"\.jpg is not of an earlier run"):
                page.files.write(name, b"ours")
    assert all((tmp_path / name).read_text() == "mine" for name in users)
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == sorted(
        ["B.jpg", *(f"{name}.jpg" for name in names)]
    )
    # What the user changed is the user's. A run that was killed leaves its record.
    (tmp_path / "c.jpg").write_text("with an arrow on it")
    assert new_page(tmp_path).files.free_name("c") == "c-2"
    new_page(tmp_path).files.write("killed.jpg", b"ours")
    with open(tmp_path / "index_files" / files.OwnFiles.RECORD, "a") as record:
        record.write('["cut o')
    new_page(tmp_path).files.check_free("killed.jpg")


def test_a_page_of_the_user_stays(tmp_path):
    page = tmp_path / "index.html"
    page.write_text("my home page")
    with pytest.raises(PublishError, match=r"index\.html is not of an earlier run"):
        new_page(tmp_path)
    assert page.read_text() == "my home page"


def test_a_page_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    page = new_page(tmp_path)
    add(page)
    before = page.write().read_bytes()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    add(page, "b")
    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PublishError, match=r"index\.html.*No space left.*free space"):
        page.write()
    assert (tmp_path / "index.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["index.html", "index_files"]
    monkeypatch.undo()
    assert page.write().read_bytes() != before


def test_an_entry_whose_files_are_not_whole_is_not_on_the_page(tmp_path, monkeypatch):
    page = new_page(tmp_path)

    class Cut(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    monkeypatch.setattr(files, "open", Cut, raising=False)
    with pytest.raises(PublishError, match=r"a\.image\.jpg was not written .* bytes"):
        add(page)
    assert os.listdir(tmp_path / "index_files") == []
    assert len(page) == 0


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match=r"folder .*file.*deep.*name a folder"):
        new_page(tmp_path / "file" / "deep")
    with pytest.raises(PublishError, match=r"70000x1 pixels .* make it smaller"):
        new_page(tmp_path).write_picture("b", np.zeros((1, 70000, 3), np.uint8))
