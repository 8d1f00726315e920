"""The page of errors: filters, order, keys, maps, and thousands of images."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from mmyolo_vis_hooks.errors import PublishError
from mmyolo_vis_hooks.publish.errors_page import (
    ASSETS,
    PageError,
    PageImages,
    PageMap,
    write_errors_page,
)
from mmyolo_vis_hooks.publish.files import OwnFiles
from mmyolo_vis_hooks.render.heatmap import colormap_lut
from tests.test_publish.pages import HOSTILE, plain

BOX = (160, 120, 240, 180)
MAP, SIGNED = PageMap("0", "dog"), PageMap("1", "difference", "a note", signed=True)
TITLES = "return [...document.querySelectorAll('h2')].map(e => e.textContent)"
CURRENT = "return document.querySelector('[aria-current] h2').textContent"


def error(title: str, kind: str = "missed", **changes: Any) -> PageError:
    given = dict(image="a", why="", score=0.5, lost=0.0, boxes=(("object", BOX),))
    no_map = PageMap("", "No map", "not drawn")
    given = dict(groups=(kind, "dog", "small"), maps=(no_map,), **given)
    return PageError(title=title, **{**given, **changes})


def write(folder: Path, errors: list[PageError], **changes: Any) -> Path:
    files = OwnFiles(folder, ASSETS)
    images = PageImages(files)
    half = np.zeros((240, 320), np.float32)
    half[:, :160] = 1
    for name in ("a", "b"):
        images.write_image(name, plain(240, 320))
        images.write_map(name, MAP, half)
        images.write_map(name, SIGNED, half * 1.5 - 1)
    texts = dict(
        title="Errors", lead=HOSTILE, noun=("error", "errors"), order="Lost", columns=3
    )
    groups = {
        "Kind": ("missed", "false"),
        "Class": ("dog", "cat", HOSTILE),
        "Size": ("small", "large"),
    }
    options = dict(
        images={"a": (240, 320), "b": (240, 320)},
        pictures={"a": "out/a #1.jpg"},
        groups=groups,
        roles={"object": (255, 176, 0), HOSTILE: (220, 38, 127)},
        colors={"missed": (255, 176, 0), "false": (220, 38, 127)},
    )
    return write_errors_page(files, errors, **{**texts, **options, **changes})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    errors = [
        error("one", lost=0.1, score=0.2, why=HOSTILE),
        error("two", "false", image="b", lost=0.3, score=0.9, maps=(MAP, SIGNED)),
        error("three", groups=("missed", HOSTILE, "small"), lost=0.2, score=0.4),
        error("four", groups=("false", "cat", "large"), lost=0.05, score=0.6),
    ]
    return write(tmp_path_factory.mktemp("mixed"), errors, title=HOSTILE)


def test_a_box_without_numbers_leaves_the_page_whole(browser, tmp_path):
    nowhere, endless = (np.nan,) * 4, (-np.inf, 0, np.inf, 9)
    errors = [error("one", boxes=(("object", nowhere),))]
    errors += [error("two", boxes=(("object", nowhere), ("object", endless)))]
    browser.open(write(tmp_path, errors))
    assert browser.run(TITLES) == ["one", "two"]


def test_filters_and_order(browser, mixed):
    browser.open(mixed)
    assert browser.run(TITLES) == ["two", "three", "one", "four"]
    assert browser.texts("#found") == ["4 errors"]
    for order, titles in (
        ("high", ["two", "four", "three", "one"]),
        ("low", ["one", "three", "four", "two"]),
        ("image", ["three", "one", "four", "two"]),
        ("lost", ["two", "three", "one", "four"]),
    ):
        browser.set("sort", order)
        assert browser.run(TITLES) == titles
    browser.click("#menu-0 summary")
    assert browser.texts("#menu-0 label") == ["missed2", "false2"]
    browser.click("#menu-0 li:nth-child(2) input")
    assert browser.run(TITLES) == ["two", "four"]
    assert browser.texts("#found") == ["2 of 4 errors"]
    browser.press(Keys.ESCAPE)
    browser.click("#menu-2 summary")
    browser.click("#menu-2 li:nth-child(2) input")
    assert browser.run(TITLES) == ["four"]
    browser.press(Keys.ESCAPE)
    browser.click("#clear")
    browser.set("least", 0.4)
    browser.set("most", 0.6)
    assert browser.run(TITLES) == ["three", "four"]
    browser.set("least", 0.7)
    assert browser.texts(".empty") == ["Nothing passes the filters."]
    browser.click("#clear")
    assert len(browser.run(TITLES)) == 4


def test_keys_go_through_what_is_shown(browser, mixed):
    left, right = Keys.ARROW_LEFT, Keys.ARROW_RIGHT
    browser.open(mixed)
    assert browser.run(CURRENT) == "two"
    browser.press(left, right, right)
    assert browser.run(CURRENT) == "one"
    assert browser.texts("#position") == ["3 / 4"]
    browser.press(*[right] * 5, left)
    assert browser.run(CURRENT) == "one"
    browser.set("least", 0.5)
    browser.press(right)
    assert browser.run(CURRENT) == "four"


def test_texts_are_texts(browser, mixed):
    browser.open(mixed)
    assert browser.run("return window.broken") is None
    assert browser.run("return document.title") == HOSTILE
    assert browser.texts("h1, #lead") == [HOSTILE, HOSTILE]
    assert HOSTILE in browser.texts(".why")
    assert browser.texts(".no-map") == ["not drawn"] * 3
    assert browser.texts("#menu-1 .name") == ["dog", "cat", HOSTILE]
    assert browser.texts("#legend li") == ["object", HOSTILE]
    link = browser.run("return document.querySelector('.place a').href")
    assert link.endswith("/out/a%20%231.jpg")


@pytest.mark.parametrize("whole", [False, True])
def test_maps_and_boxes_lie_on_the_image(browser, mixed, whole):
    """1 is at the left and 0 at the right, of signed maps 0.5 and -1."""
    browser.open(mixed)
    if whole:
        browser.click("#whole")
    browser.set("strength", 1)
    picture = browser.screenshot()
    frames, boxes = browser.run(
        "const r = e => { const b = e.getBoundingClientRect();"
        " return [b.left, b.top, b.right, b.bottom]; };"
        "const card = document.querySelector('.entry');"
        "return ['.window', '.box'].map(s => [...card.querySelectorAll(s)].map(r))"
    )
    assert len(frames) == 3
    part = (0.5, 0.5, 0.75, 0.75) if whole else (0.25, 0.25, 0.75, 0.75)
    for (left, top, right, bottom), box in zip(frames, boxes):
        shares = (np.array(box) - (left, top) * 2) / ((right - left, bottom - top) * 2)
        np.testing.assert_allclose(shares, part, atol=0.01)

    def color(frame: int, x: float) -> np.ndarray:
        left, top, right, bottom = frames[frame]
        row, column = (
            round(top + 0.9 * (bottom - top)),
            round(left + x * (right - left)),
        )
        return picture[row, column].astype(int)

    edge = 0.5 if whole else 0.25  # the crop is the middle half
    plasma, signed = colormap_lut("plasma")[:, 0], colormap_lut("bwr")[:, 0]
    np.testing.assert_allclose(color(1, edge - 0.05), plasma[255], atol=8)
    grey = color(1, edge + 0.05)
    assert np.ptp(grey) <= 2  # where the map is zero
    np.testing.assert_allclose(color(2, edge - 0.05), signed[191], atol=8)
    np.testing.assert_allclose(color(2, edge + 0.05), signed[0], atol=8)


def test_five_thousand_images_are_built_only_where_one_looks(browser, tmp_path):
    names = [f"i{i}" for i in range(5000)]
    errors = [
        error(name, image=name, lost=i, groups=("missed", f"class {i % 80}", "small"))
        for i, name in enumerate(names)
    ]
    classes = [f"class {i}" for i in range(80)]
    page = write(
        tmp_path,
        errors,
        images=dict.fromkeys(names, (240, 320)),
        groups={"Kind": ("missed",), "Class": classes, "Size": ("small",)},
    )
    written = tmp_path / ASSETS / "a.image.jpg"
    for name in names:
        os.link(written, tmp_path / ASSETS / f"{name}.image.jpg")

    def seconds() -> float:
        """Until all pictures that one sees first are there."""
        start = time.monotonic()
        browser.open(page)
        return time.monotonic() - start

    tries = [seconds() for _ in range(3)]  # of which the machine may hold up some
    print(f"the first pictures are there within {min(tries):.2f} s")
    assert min(tries) < 1
    assert browser.texts("#found") == ["5000 errors"]
    built = "document.querySelectorAll('.entry').length"
    assert browser.run(f"return {built}") < 150
    assert browser.run(TITLES)[0] == "i4999"
    before = browser.run(f"return {built}")
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.wait_for(f"{built} > {before}")
    browser.run("scrollTo(0, 0)")
    browser.press(*[Keys.ARROW_RIGHT] * 150)
    assert browser.run(CURRENT) == "i4849"
    browser.press("\t")
    browser.click("#menu-1 summary")
    browser.click("#menu-1 li:nth-child(80) input")
    assert browser.texts("#found") == ["62 of 5000 errors"]
    assert browser.run(TITLES)[0] == "i4959"


def test_an_empty_page_and_the_page_of_somebody_else(browser, tmp_path):
    browser.open(write(tmp_path, []))
    assert browser.texts(".empty") == ["There is nothing to show."]
    browser.press(Keys.ARROW_RIGHT)
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    with pytest.raises(PublishError, match="not of an earlier run"):
        write(other, [])
    assert (other / "index.html").read_text() == "mine"
