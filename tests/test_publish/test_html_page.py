"""The page holds what it was given, and a browser shows it as promised."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from mmyolo_vis_hooks.errors import PublishError, VisConfigError
from mmyolo_vis_hooks.publish import files
from mmyolo_vis_hooks.publish.html_page import (
    HtmlPage,
    PageBox,
    PageEntry,
    PagePanel,
)
from mmyolo_vis_hooks.render.heatmap import colormap_lut

HOSTILE = '<b>"x"</b>.jpg</script><script>window.broken=1</script><!-- {{data}} &amp;'
# Of the image that the browser tests look at.
HEIGHT, WIDTH = 240, 320
COLOR_BASE = (200, 60, 30)
FULL, NONE, WEAK = (0.25, 0.75), (0.75, 0.75), (0.5, 0.25)
"""Places on the map, as shares of width and height, with level 255, 0 and 64."""


def smooth_levels(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.uniform(0, 1, (5, 6)).astype(np.float32)
    grown = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.normalize(grown, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def entry(name: str = "a", **changes: Any) -> PageEntry:
    fields: dict[str, Any] = dict(
        name=name,
        title=f"{name}.jpg",
        image_rgb=np.full((60, 80, 3), COLOR_BASE, np.uint8),
        image_hw=(480, 640),
        boxes=(PageBox("dog", 0.9, (64, 48, 320, 240)),),
        panels=(PagePanel("dog 0.90", "EigenCAM", smooth_levels(), box=0),),
    )
    return PageEntry(**{**fields, **changes})


def new_page(folder: Path, **changes: Any) -> HtmlPage:
    options = dict(title="Maps", colormap="jet", fade=True)
    return HtmlPage(folder, **{**options, **changes})


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    [data] = re.findall(pattern, text, re.DOTALL)
    return json.loads(data)


def decode(path: Path, flag: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flag)


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "index_files").glob("*.jpg"))


def test_the_assets_are_what_was_given(tmp_path):
    levels = smooth_levels()
    photo = cv2.merge([smooth_levels(60, 80, seed) for seed in (1, 2, 3)])
    own = np.full((30, 40, 3), (10, 200, 90), np.uint8)
    page = new_page(tmp_path)
    panels = (PagePanel("map", "", levels), PagePanel("own", "", own))
    page.add(entry(image_rgb=photo, panels=panels))
    path = page.write()
    stored = decode(tmp_path / "index_files" / "a.0.jpg")
    assert stored.shape == levels.shape
    assert np.abs(stored.astype(int) - levels).max() <= 3
    for part, expected in (("image", photo), ("1", own)):
        found_bgr = decode(tmp_path / "index_files" / f"a.{part}.jpg")
        assert np.abs(found_bgr[..., ::-1].astype(int) - expected).mean() < 6
    [found] = data_of(path)["entries"]
    assert "size" not in found["panels"][0]
    assert found["panels"][1]["size"] == [40, 30]
    assert sorted(os.listdir(tmp_path)) == ["index.html", "index_files"]
    assert pictures(tmp_path) == ["a.0.jpg", "a.1.jpg", "a.image.jpg"]


def test_no_text_breaks_out_of_the_page(tmp_path):
    page = new_page(tmp_path, title=HOSTILE + "\udcff")
    boxes = (PageBox(HOSTILE, 0.5, (0, 0, 10, 10)),)
    panels = (PagePanel(HOSTILE, HOSTILE, smooth_levels()),)
    title = HOSTILE + "\u2028\udcff"
    page.add(entry(title=title, note=HOSTILE, boxes=boxes, panels=panels))
    for i, picture in enumerate(("out/50% #1?.png", "javascript:alert(1)")):
        page.add(entry(f"b{i}", picture=picture))
    path = page.write()
    data = data_of(path)
    assert data["labels"][1]["name"] == HOSTILE
    assert data["entries"][0]["title"] == title
    assert data["entries"][0]["panels"][0]["note"] == HOSTILE
    links = ["", "out/50%25%20%231%3F.png", "javascript%3Aalert%281%29"]
    assert [e["href"] for e in data["entries"]] == links
    text = path.read_text(encoding="utf-8")
    assert "<b>" not in text
    assert text.count("</script>") == 2
    assert "&#56575;" in text  # half a character, as file names may hold


def test_an_entry_knows_its_boxes_in_percent(tmp_path):
    boxes = (
        PageBox("dog", 0.9, (64, 48, 320, 240)),
        PageBox("cat", 0.4, (-50, 0, 320, 960)),
        PageBox("dog", 0.3, (700, 0, 800, 10)),
        PageBox("dog", float("nan"), (0, float("inf"), 1, 1)),
    )
    page = new_page(tmp_path)
    page.add(entry(boxes=boxes))
    data = data_of(page.write())
    labels = [(label["name"], label["count"]) for label in data["labels"]]
    assert labels == [("dog", 3), ("cat", 1)]
    assert data["entries"][0]["boxes"] == [
        [0, 0.9, [10, 10, 40, 40]],
        [1, 0.4, [0, 0, 50, 100]],
        [0, 0.3, None],
        [0, None, None],
    ]


def test_entries_are_in_order_whoever_comes_first(tmp_path):
    page = new_page(tmp_path)
    places = {"b": 2, "img_10": 1, "z": 0, "img_9": 1}
    todo = [entry(name, order=order) for name, order in places.items()]
    todo += [entry(f"i{i}", order=3 + i) for i in range(40)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(page.add, todo))
    names = [e["name"] for e in data_of(page.write())["entries"]]
    assert names == ["z", "img_9", "img_10", "b", *(f"i{i}" for i in range(40))]
    assert len(pictures(tmp_path)) == 2 * len(page) == 2 * 44


# --- files of others ------------------------------------------------------------------


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
            page.add(entry(name))
        page.write()
        with pytest.raises(PublishError, match=r"b\.jpg is not of an earlier run"):
            page.files.write("b.jpg", b"ours")
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
    assert new_page(tmp_path).files.is_free("killed.jpg")


def test_a_page_of_the_user_stays(tmp_path):
    page = tmp_path / "index.html"
    page.write_text("my home page")
    with pytest.raises(PublishError, match=r"index\.html is not of an earlier run"):
        new_page(tmp_path)
    assert page.read_text() == "my home page"


def test_a_page_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    page = new_page(tmp_path)
    page.add(entry())
    before = page.write().read_bytes()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    page.add(entry("b"))
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
        page.add(entry())
    assert os.listdir(tmp_path / "index_files") == []
    assert len(page) == 0
    monkeypatch.undo()
    page.add(entry())
    assert len(page) == 1


# --- what cannot work -----------------------------------------------------------------


def test_a_folder_that_takes_no_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match=r"folder .*file.*deep.*name a folder"):
        new_page(tmp_path / "file" / "deep")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="a/b"), "name='a/b' is not safe"),
        (dict(image_rgb=np.zeros((4, 4), np.uint8)), r"image_rgb has the shape \(4, 4"),
        (dict(image_rgb=np.zeros((4, 4, 3))), "the type float64; give a uint8"),
        (dict(image_rgb=np.zeros((0, 4, 3), np.uint8)), r"shape \(0, 4, 3\)"),
        (dict(image_hw=(0, 640)), r"image_hw=\(0, 640\) is no size"),
        (dict(picture="/tmp/a.png"), "is an absolute path"),
        (
            dict(panels=(PagePanel("", "", np.zeros((4, 4), np.uint8), box=1),)),
            r"panels\[0\]\.box=1 is none of the 1 boxes",
        ),
    ],
)
def test_an_entry_that_cannot_work_is_refused(changes, message):
    with pytest.raises(VisConfigError, match=message):
        entry(**changes)


def test_what_the_page_cannot_take_is_refused(tmp_path):
    page = new_page(tmp_path)
    page.add(entry())
    with pytest.raises(VisConfigError, match="name='a' is on the page already"):
        page.add(entry())
    with pytest.raises(PublishError, match=r"70000x1 pixels .* make it smaller"):
        page.add(entry("b", image_rgb=np.zeros((1, 70000, 3), np.uint8)))
    for option in (dict(alpha=1.5), dict(colormap="jetty")):
        ((name, value),) = option.items()
        with pytest.raises(VisConfigError, match=f"{name}={value!r}"):
            new_page(tmp_path, **option)


# --- in a browser ---------------------------------------------------------------------


class Browser:
    """Chromium, with words for what the tests do."""

    def __init__(self, driver: str, chromium: str, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "headless=new",
            "no-sandbox",  # containers refuse what it needs; the pages are ours
            "disable-gpu",
            "disable-quic",
            "disable-dev-shm-usage",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "hide-scrollbars",
            "force-device-scale-factor=1",
            "force-color-profile=srgb",
            f"user-data-dir={profile}",
        ):
            options.add_argument(f"--{argument}")
        logs = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        service = webdriver.ChromeService(executable_path=driver)
        self.driver = webdriver.Chrome(options, service)

    def open(self, path: Path, size: tuple[int, int] = (1400, 900)) -> None:
        metrics = dict(width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.as_uri())
        self.wait_for(
            "[...document.querySelectorAll('.frame img')].filter("
            "i => i.getBoundingClientRect().top < innerHeight && i.offsetParent)"
            ".every(i => i.complete)"
        )

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """Of what is not hidden."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter(e => !e.closest('[hidden]')).map(e => e.textContent)",
            selector,
        )

    def wait_for(self, condition: str) -> None:
        wait = WebDriverWait(self.driver, 20, poll_frequency=0.05)
        wait.until(lambda _: self.run(f"return {condition}"), condition)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def set(self, control: str, value: float) -> None:
        """Move a slider."""
        self.run(
            "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
            "c.dispatchEvent(new Event('input', {bubbles: true}));",
            control,
            value,
        )

    def screenshot(self) -> np.ndarray:
        """``(h, w, 3)`` uint8, RGB: what is on the screen."""
        # The script returns once the frame before it is drawn.
        self.driver.execute_async_script(
            "const done = arguments[0];"
            "requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        )
        png = b64decode(self.driver.get_screenshot_as_base64())
        return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    def requests(self) -> set[str]:
        """What pages asked for since the last call; Chromium's own tabs ask, too."""
        log = self.driver.get_log("performance")
        messages = [json.loads(line["message"])["message"] for line in log]
        return {
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
            and m["params"]["documentURL"].startswith("file:")
        }


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver in PATH")
    opened = Browser(driver, binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """After each test: no message in the console, and no request for the net."""
    yield chromium
    assert chromium.driver.get_log("browser") == []
    urls = chromium.requests()
    assert any(url.startswith("file:") for url in urls)
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def three_places() -> np.ndarray:
    """Levels with wide areas of 255, 0 and 64; see FULL, NONE and WEAK."""
    levels = np.zeros((HEIGHT, WIDTH), np.uint8)
    levels[: HEIGHT // 2] = 64
    levels[HEIGHT // 2 :, : WIDTH // 2] = 255
    return levels


def make_page(folder: Path, **options: Any) -> Path:
    """Twelve images; every third has no box, the others a dog and some a cat."""
    page = new_page(folder, **options)
    image_rgb = np.full((HEIGHT, WIDTH, 3), COLOR_BASE, np.uint8)
    # Smaller and of another aspect than the image, as maps of networks are.
    small = cv2.resize(three_places(), (64, 64), interpolation=cv2.INTER_AREA)
    for i in range(12):
        boxes = (
            PageBox("dog", 0.3 + i / 20, (80, 60, 400, 300)),
            PageBox("cat", 0.5, (200, 200, 600, 460)),
        )[: (0, 1, 2)[i % 3]]
        panels = (
            PagePanel("whole", "all boxes", three_places()),
            PagePanel("small", "64x64", small),
            *(
                PagePanel(f"{b.label} {b.score:.2f}", "", three_places(), box=k)
                for k, b in enumerate(boxes)
            ),
            PagePanel("own", "", np.full((40, 90, 3), 77, np.uint8)),
        )
        texts = dict(title=f"image {i}" if i else HOSTILE, picture=f"out/{i}.png")
        fields = dict(order=i, image_rgb=image_rgb, boxes=boxes, panels=panels)
        page.add(entry(f"i{i}", **fields, **texts))
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
    captions = ["Image", "whole", "small", "dog 0.40", "cat 0.50", "own"]
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
    # 80, 60, 400 and 300 of 640 and 480 pixels.
    np.testing.assert_allclose(shares, (0.125, 0.125, 0.625, 0.625), atol=0.005)

    corners = [(0, 0), (0, 0), (60, 60), (64, 66), (560, 400), (600, 420)]
    boxes = tuple(
        PageBox("a long name", 0.9 - i / 10, (x, y, min(x + 300, 640), y + 60))
        for i, (x, y) in enumerate(corners)
    )
    page = new_page(tmp_path)
    page.add(entry(boxes=boxes, panels=()))
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
    assert panels == ["Image", "whole", "small", "cat 0.50", "own"]
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
    color = np.array(COLOR_BASE, float)
    base = color
    if fade:
        pixel = np.array([[COLOR_BASE]], np.uint8)
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
        own = color_at(browser, (0.5, 0.5), 3, picture)
        np.testing.assert_allclose(own, 77, atol=4)


def test_pages_without_boxes_or_images_or_a_file(browser, tmp_path):
    page = new_page(tmp_path / "maps", fade=False, title=HOSTILE)
    page.add(entry(boxes=(), panels=(PagePanel("neck[0]", "", smooth_levels()),)))
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
    page.add(entry("a"))
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
