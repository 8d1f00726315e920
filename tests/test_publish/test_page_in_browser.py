"""A browser shows a page as promised, and asks nobody for anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from mmyolo_vis_hooks.records import OverlayMap
from mmyolo_vis_hooks.render.heatmap import colormap_lut
from tests.test_publish.browser import Browser
from tests.test_publish.pages import (
    COLOR,
    HOSTILE,
    add,
    data_of,
    new_page,
    plain,
    smooth_levels,
)

FULL, NONE, WEAK = (0.25, 0.75), (0.75, 0.75), (0.5, 0.25)
"""Places on the map, as shares of width and height, with level 255, 0 and 64."""


def make_page(folder: Path, **options: Any) -> Path:
    """Twelve images; every third has no box, the others a dog and some a cat."""
    page = new_page(folder, **options)
    levels = np.zeros((240, 320), np.uint8)
    levels[:120] = 64
    levels[120:, :160] = 255
    # Smaller and of another aspect than the image, as maps of networks are.
    small = cv2.resize(levels, (64, 64), interpolation=cv2.INTER_AREA)
    for i in range(12):
        boxes = (
            ("dog", 0.3 + i / 20, (40, 30, 200, 150)),
            ("cat", 0.5, (100, 100, 300, 230)),
        )[: (0, 1, 2)[i % 3]]
        maps = [OverlayMap("whole", "all boxes", levels)]
        maps.append(OverlayMap("small", "64x64", small))
        for k, (label, score, _) in enumerate(boxes):
            maps.append(OverlayMap(f"{label} {score:.2f}", "", levels, k))
        texts = dict(title=f"image {i}" if i else HOSTILE, picture=f"out/{i}.png")
        image_rgb = plain(240, 320)
        add(
            page, f"i{i}", boxes=boxes, maps=maps, image_rgb=image_rgb, order=i, **texts
        )
    return page.write()


@pytest.fixture(scope="module")
def faded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("faded"))


VISIBLE = (
    "return [...document.querySelectorAll('.entry')].filter(s => !s.hidden)"
    ".map(s => s.dataset.name)"
)
CURRENT = "return document.querySelector('[aria-current]').dataset.name"
RECTS = (
    "const r = e => { const b = e.getBoundingClientRect();"
    " return [b.left, b.top, b.right, b.bottom]; };"
)


def test_the_page_shows_all_it_was_given(browser, faded):
    browser.open(faded)
    assert browser.run(VISIBLE) == [f"i{i}" for i in range(12)]
    assert browser.texts("#found") == ["12 of 12 images"]
    assert browser.texts("h2") == [HOSTILE, *(f"image {i}" for i in range(1, 12))]
    assert browser.run("return window.broken") is None
    captions = ["Image", "whole", "small", "dog 0.40", "cat 0.50"]
    assert browser.texts("#image-i2 figcaption b") == captions
    assert sorted(browser.texts("#image-i2 .box span")) == ["cat 0.50", "dog 0.40"]
    link = browser.run("return document.querySelector('#image-i2 a').href")
    assert link == (faded.parent / "out" / "2.png").as_uri()
    # Images have a text or are decoration; controls have a label.
    assert browser.run(
        "return [...document.querySelectorAll('.frame img')].every("
        "i => i.classList.contains('overlay') ? i.alt === '' : i.alt.length > 0)"
        " && [...document.querySelectorAll('input')].every(i => i.labels.length)"
    )


@pytest.mark.parametrize("size", [(1400, 900), (420, 800)])
def test_overlays_boxes_and_labels_lie_on_the_image(browser, faded, tmp_path, size):
    browser.open(faded, size)
    pairs = browser.run(
        f"{RECTS} return [...document.querySelectorAll('img.overlay')].map("
        "o => [r(o), r(o.parentElement.querySelector('img.base'))])"
    )
    assert len(pairs) >= 5
    for overlay, base in pairs:
        np.testing.assert_allclose(overlay, base, atol=1)
        assert (base[2] - base[0]) / (base[3] - base[1]) == pytest.approx(4 / 3, 0.02)
    assert browser.run(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    )
    frame, box = np.array(
        browser.run(
            f"{RECTS} const f = document.querySelector('#image-i1 .frame');"
            "return [r(f), r(f.querySelector('.box'))]"
        )
    )
    shares = (box - np.tile(frame[:2], 2)) / np.tile(frame[2:] - frame[:2], 2)
    # 40, 30, 200 and 150 of 320 and 240 pixels.
    np.testing.assert_allclose(shares, (0.125, 0.125, 0.625, 0.625), atol=0.005)

    corners = [(0, 0), (0, 0), (60, 60), (64, 66), (560, 400), (600, 420)]
    boxes = [
        ("a long name", 0.9 - i / 10, (x, y, min(x + 300, 640), y + 60))
        for i, (x, y) in enumerate(corners)
    ]
    page = new_page(tmp_path)
    add(page, boxes=boxes, maps=())
    browser.open(page.write(), size)
    browser.screenshot()
    frame, *labels = browser.run(
        f"{RECTS} const f = document.querySelector('.frame');"
        "return [r(f), ...[...f.querySelectorAll('.box span')].map(r)]"
    )
    assert len(labels) == len(corners)
    for i, one in enumerate(labels):
        assert min(one[0] - frame[0], one[1] - frame[1]) >= -1
        assert min(frame[2] - one[2], frame[3] - one[3]) >= -1
        for other in labels[:i]:
            wide = min(one[2], other[2]) - max(one[0], other[0])
            high = min(one[3], other[3]) - max(one[1], other[1])
            assert min(wide, high) <= 1


def test_classes_and_scores_hide_what_is_not_of_them(browser, faded):
    browser.open(faded)
    browser.click("#classes-control summary")
    assert browser.texts("#classes label") == ["dog8", "cat4"]
    browser.click("#classes li:nth-child(2) input")
    assert browser.run(VISIBLE) == ["i2", "i5", "i8", "i11"]
    assert browser.texts("#found") == ["4 of 12 images"]
    assert browser.texts("#classes-value") == ["cat"]
    browser.wait_for("document.querySelectorAll('#image-i2 figure').length")
    panels = browser.texts("#image-i2 figure b")
    assert panels == ["Image", "whole", "small", "cat 0.50"]
    assert set(browser.texts("#image-i2 .box span")) == {"cat 0.50"}
    (meta,) = browser.texts("#image-i2 .meta")
    assert "1 of 2 boxes" in meta
    browser.press(Keys.ESCAPE)
    browser.click("#clear")
    assert len(browser.run(VISIBLE)) == 12
    # The dogs' scores are 0.35, 0.40, 0.50, ...; that of every cat is 0.5.
    browser.set("score", 0.7)
    assert browser.run(VISIBLE) == ["i8", "i10", "i11"]
    assert browser.texts("#score-value") == ["0.70"]
    browser.set("score", 1)
    assert browser.run(VISIBLE) == []
    assert "No image" in browser.texts("#empty")[0]
    browser.set("score", 0)
    assert len(browser.run(VISIBLE)) == 12


def test_arrow_keys_go_through_what_is_visible(browser, faded):
    left, right = Keys.ARROW_LEFT, Keys.ARROW_RIGHT
    browser.open(faded)
    assert browser.run(CURRENT) == "i0"
    browser.press(right, right, left, right)
    assert browser.run(CURRENT) == "i2"
    assert browser.texts("#position") == ["3 / 12"]
    browser.set("score", 0.5)
    assert browser.run(VISIBLE) == ["i2", "i4", "i5", "i7", "i8", "i10", "i11"]
    browser.press(right, right)
    assert browser.run(CURRENT) == "i5"
    browser.press(*[right] * 9)
    assert browser.run(CURRENT) == "i11"
    top = "document.querySelector('[aria-current]').getBoundingClientRect().top"
    browser.wait_for(f"{top} > 0 && {top} < innerHeight")
    browser.press(*[left] * 9)
    assert browser.run(CURRENT) == "i2"
    bar = "document.getElementById('bar').getBoundingClientRect().bottom"
    browser.wait_for(f"{top} > {bar} && {top} < {bar} + 80")
    # A click chooses where they start from.
    browser.click("#image-i8 figcaption")
    browser.press(right)
    assert browser.run(CURRENT) == "i10"
    # A slider keeps its arrow keys until it is left.
    browser.run("document.getElementById('strength').focus()")
    browser.press(right)
    assert browser.run(CURRENT) == "i10"
    assert browser.texts("#strength-value") == ["61 %"]
    browser.press(Keys.ESCAPE, right)
    assert browser.run(CURRENT) == "i11"
    assert browser.texts("#strength-value") == ["61 %"]


def color_at(
    browser: Browser, place: tuple[float, float], figure: int, picture: np.ndarray
) -> np.ndarray:
    """Mean colour around a place of a figure of the first image."""
    left, top, right, bottom = browser.run(
        f"{RECTS} const frames = document.querySelectorAll('#image-i0 .frame');"
        "return r(frames[arguments[0]])",
        figure,
    )
    x = round(left + place[0] * (right - left))
    y = round(top + place[1] * (bottom - top))
    return picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(axis=0)


@pytest.mark.parametrize(("fade", "colormap"), [(True, "viridis"), (False, "jet")])
def test_the_colours_are_those_of_the_blend(browser, tmp_path, fade, colormap):
    browser.open(make_page(tmp_path, fade=fade, colormap=colormap))
    lut = colormap_lut(colormap)[:, 0].astype(float)
    color = np.array(COLOR, float)
    base = color
    if fade:
        pixel = np.array([[COLOR]], np.uint8)
        base = np.full(3, float(cv2.cvtColor(pixel, cv2.COLOR_RGB2GRAY)[0, 0]))
    assert browser.texts("#strength-value") == ["60 %"]
    for strength in (0.6, 0.0, 1.0):
        browser.set("strength", strength)
        picture = browser.screenshot()
        np.testing.assert_allclose(color_at(browser, FULL, 0, picture), color, atol=4)
        for place, level in ((FULL, 255), (NONE, 0), (WEAK, 64)):
            share = min(level / 255 / 0.5, 1) * strength if fade else strength
            expected = base + (lut[level] - base) * share
            for figure in (1, 2):
                found = color_at(browser, place, figure, picture)
                atol = 4 if fade and level == 0 else 12
                np.testing.assert_allclose(found, expected, atol=atol)


def test_pages_without_boxes_or_images_or_a_file(browser, tmp_path):
    page = new_page(tmp_path / "maps", fade=False, title=HOSTILE)
    add(page, boxes=(), maps=[OverlayMap("neck[0]", "", smooth_levels())])
    path = page.write()
    browser.open(path)
    assert browser.run(VISIBLE) == ["a"]
    assert browser.texts("#score-control, #pair") == []
    assert browser.run("return document.title") == HOSTILE
    browser.open(new_page(tmp_path / "empty").write())
    assert browser.texts("#empty") == ["There are no images."]
    browser.press(Keys.ARROW_RIGHT)
    (tmp_path / "maps" / "index_files" / "a.0.jpg").unlink()
    browser.open(path)
    browser.wait_for("document.querySelector('.missing')")
    assert "index_files/a.0.jpg is missing" in browser.texts(".missing")[0]
    # Chromium says so too.
    messages = [line["message"] for line in browser.driver.get_log("browser")]
    assert all("ERR_FILE_NOT_FOUND" in message for message in messages)


def test_thousands_of_images_are_built_only_where_one_looks(browser, tmp_path):
    page = new_page(tmp_path)
    add(page)
    path = page.write()
    data = data_of(path)
    [record] = data["entries"]
    many = {**data, "entries": [{**record, "name": f"a{i}"} for i in range(3000)]}
    text = path.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    rest = text[text.index("</script>", start) :]
    path.write_text(text[:start] + json.dumps(many) + rest, encoding="utf-8")
    for i in (*range(12), *range(2988, 3000)):
        for part in ("image", "0"):
            picture = tmp_path / "index_files" / f"a.{part}.jpg"
            os.link(picture, picture.with_name(f"a{i}.{part}.jpg"))
    browser.open(path)
    assert len(browser.run(VISIBLE)) == 3000
    assert browser.run("return document.querySelectorAll('figure').length") < 100
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.wait_for("document.querySelectorAll('#image-a2999 figure').length === 2")
    browser.press(Keys.ARROW_LEFT)
    assert int(browser.run(CURRENT)[1:]) > 2980
