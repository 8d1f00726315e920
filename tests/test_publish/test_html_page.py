"""The page holds what it was given, and a browser shows it as promised."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mmyolo_vis_hooks.errors import PublishError, VisConfigError
from mmyolo_vis_hooks.publish import html_page
from mmyolo_vis_hooks.publish.html_page import (
    HtmlPage,
    PageBox,
    PageEntry,
    PagePanel,
)
from mmyolo_vis_hooks.render.heatmap import colormap_lut

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<b>"x"</b>.jpg</script><script>window.broken=1</script><!-- {{data}} &amp;'
# Of the image that the browser tests look at.
HEIGHT, WIDTH = 240, 320
GREY_BASE, COLOR_BASE = (90, 90, 90), (200, 60, 30)
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
    return HtmlPage(
        folder, **{**dict(title="Maps", colormap="jet", fade=True), **changes}
    )


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    [data] = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL
    )
    return json.loads(data)


def decode(path: Path, flag: int) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flag)


def test_the_assets_are_what_was_given(tmp_path):
    levels = smooth_levels()
    photo = cv2.merge([smooth_levels(60, 80, seed) for seed in (1, 2, 3)])
    own = np.full((30, 40, 3), (10, 200, 90), np.uint8)
    page = new_page(tmp_path)
    panels = (PagePanel("map", "", levels), PagePanel("own", "", own))
    page.add(entry(image_rgb=photo, panels=panels))
    path = page.write()

    assets = tmp_path / "index_files"
    stored = decode(assets / "a.0.jpg", cv2.IMREAD_UNCHANGED)
    assert stored.shape == levels.shape
    assert np.abs(stored.astype(int) - levels).max() <= 3
    image_bgr = decode(assets / "a.image.jpg", cv2.IMREAD_COLOR)
    assert np.abs(image_bgr[..., ::-1].astype(int) - photo).mean() < 6
    picture_bgr = decode(assets / "a.1.jpg", cv2.IMREAD_COLOR)
    assert np.abs(picture_bgr[..., ::-1].astype(int) - own).max() <= 4
    [found] = data_of(path)["entries"]
    assert "size" not in found["panels"][0]
    assert found["panels"][1]["size"] == [40, 30]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "index_files"]
    assert len(list(assets.iterdir())) == 3


def test_no_text_breaks_out_of_the_page(tmp_path):
    page = new_page(tmp_path, title=HOSTILE)
    boxes = (PageBox(HOSTILE, 0.5, (0, 0, 10, 10)),)
    panels = (PagePanel(HOSTILE, HOSTILE, smooth_levels()),)
    title = HOSTILE + "\u2028\udcff"
    page.add(entry(title=title, note=HOSTILE, boxes=boxes, panels=panels))
    path = page.write()
    data = data_of(path)
    assert data["title"] == HOSTILE
    assert data["labels"][0]["name"] == HOSTILE
    assert data["entries"][0]["title"] == title
    assert data["entries"][0]["panels"][0]["note"] == HOSTILE
    text = path.read_text(encoding="utf-8")
    assert "<b>" not in text
    assert text.count("</script>") == 2


def test_a_page_title_that_is_no_text_can_be_written(tmp_path):
    assert "&#56575;" in new_page(tmp_path, title="\udcff").write().read_text("utf-8")


def test_links_are_paths_and_nothing_else(tmp_path):
    page = new_page(tmp_path)
    pictures = ("out/50% #1?.png", "javascript:alert(1)", "")
    for i, picture in enumerate(pictures):
        page.add(entry(f"a{i}", picture=picture))
    found = [e["href"] for e in data_of(page.write())["entries"]]
    assert found == ["out/50%25%20%231%3F.png", "javascript%3Aalert%281%29", ""]


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
    assert [(label["name"], label["count"]) for label in data["labels"]] == [
        ("dog", 3),
        ("cat", 1),
    ]
    assert data["entries"][0]["boxes"] == [
        [0, 0.9, [10, 10, 40, 40]],
        [1, 0.4, [0, 0, 50, 100]],
        [0, 0.3, None],
        [0, None, None],
    ]


def test_entries_are_in_order_whoever_comes_first(tmp_path):
    page = new_page(tmp_path)
    for name, order in (("b", 2), ("img_10", 1), ("z", 0), ("img_9", 1)):
        page.add(entry(name, order=order))
    names = [e["name"] for e in data_of(page.write())["entries"]]
    assert names == ["z", "img_9", "img_10", "b"]


def test_threads_lose_no_entry(tmp_path):
    page = new_page(tmp_path)
    todo = [entry(f"i{i}", order=i, title=f"{i} of 50") for i in range(50)]
    failures: list[Exception] = []

    def work() -> None:
        try:
            while True:
                page.add(todo.pop())
        except IndexError:
            pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(page) == 50
    found = data_of(page.write())["entries"]
    assert [e["title"] for e in found] == [f"{i} of 50" for i in range(50)]
    assets = list((tmp_path / "index_files").iterdir())
    assert len(assets) == 100
    assert all(decode(path, cv2.IMREAD_UNCHANGED) is not None for path in assets)


def test_arrays_are_not_kept(tmp_path):
    page = new_page(tmp_path)
    page.add(entry(image_rgb=np.zeros((900, 1200, 3), np.uint8)))
    assert len(json.dumps(page._records)) < 1000


def test_a_page_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    page = new_page(tmp_path)
    page.add(entry())
    before = page.write().read_bytes()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    page.add(entry("b"))
    monkeypatch.setattr(html_page.os, "replace", refuse)
    with pytest.raises(PublishError, match=r"index\.html.*No space left.*free space"):
        page.write()
    assert (tmp_path / "index.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "index_files"]
    monkeypatch.undo()
    assert page.write().read_bytes() != before


def test_an_entry_whose_files_are_not_whole_is_not_on_the_page(tmp_path, monkeypatch):
    page = new_page(tmp_path)

    class Cut(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    monkeypatch.setattr(html_page, "open", Cut, raising=False)
    with pytest.raises(PublishError, match=r"a\.image\.jpg was not written .* bytes"):
        page.add(entry())
    assert list((tmp_path / "index_files").iterdir()) == []
    assert len(page) == 0
    monkeypatch.undo()
    page.add(entry())
    assert len(page) == 1


def test_files_of_the_user_stay(tmp_path):
    (tmp_path / "index_files").mkdir()
    mine = tmp_path / "index_files" / "mine.jpg"
    mine.write_text("mine")
    (tmp_path / "index_files" / "a.0.jpg").write_text("of an earlier run")
    page = new_page(tmp_path)
    page.add(entry())
    page.write()
    assert mine.read_text() == "mine"
    assert decode(tmp_path / "index_files" / "a.0.jpg", cv2.IMREAD_UNCHANGED).any()


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match=r"folder='.*file.*deep'.*name a folder"):
        new_page(tmp_path / "file" / "deep")


def test_a_folder_that_takes_no_file_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    # Not by its mode: whoever may do anything can write to it all the same.
    monkeypatch.setattr(html_page.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PublishError, match=r"Permission denied.*name a folder"):
        new_page(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="a/b"), "name='a/b' is not safe"),
        (dict(name=""), "name='' is not safe"),
        (dict(image_rgb=np.zeros((4, 4), np.uint8)), r"image_rgb has the shape \(4, 4"),
        (dict(image_rgb=np.zeros((4, 4, 3))), "the type float64; give a uint8"),
        (dict(image_rgb=np.zeros((0, 4, 3), np.uint8)), r"shape \(0, 4, 3\)"),
        (dict(image_hw=(0, 640)), r"image_hw=\(0, 640\) is no size"),
        (dict(picture="/tmp/a.png"), "is an absolute path"),
        (
            dict(panels=(PagePanel("", "", np.zeros((4, 4, 4), np.uint8)),)),
            r"panels\[0\]\.levels has the shape",
        ),
        (
            dict(panels=(PagePanel("", "", np.zeros((4, 4), np.uint8), box=1),)),
            r"panels\[0\]\.box=1 is none of the 1 boxes",
        ),
    ],
)
def test_an_entry_that_cannot_work_is_refused(tmp_path, changes, message):
    page = new_page(tmp_path)
    with pytest.raises(VisConfigError, match=message):
        page.add(entry(**changes))
    assert list((tmp_path / "index_files").iterdir()) == []


def test_a_name_is_given_once(tmp_path):
    page = new_page(tmp_path)
    page.add(entry())
    with pytest.raises(VisConfigError, match="name='a' is on the page already"):
        page.add(entry())


def test_a_picture_too_large_for_jpeg_is_refused(tmp_path):
    page = new_page(tmp_path)
    with pytest.raises(PublishError, match=r"70000x1 pixels .* make it smaller"):
        page.add(entry(image_rgb=np.zeros((1, 70000, 3), np.uint8)))


@pytest.mark.parametrize(
    ("option", "message"),
    [(dict(alpha=1.5), "alpha=1.5"), (dict(colormap="jetty"), "colormap='jetty'")],
)
def test_an_option_that_cannot_work_is_refused(tmp_path, option, message):
    with pytest.raises(VisConfigError, match=message):
        new_page(tmp_path, **option)


def test_the_template_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options.package_data"]["mmyolo_vis_hooks.publish"].split()
    assert listed == [html_page._TEMPLATE]


# --- in a browser -----------------------------------------------------------------


class Browser:
    """Drives Chromium by the WebDriver protocol."""

    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

    def __init__(self, driver: str, chromium: str, profile: Path) -> None:
        self._process = subprocess.Popen(
            [driver, "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        found = None
        for line in self._process.stdout:
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                break
        assert found, "chromedriver did not start"
        # Nobody reads on; a full pipe would stop the driver.
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        self._base = f"http://127.0.0.1:{found[1]}/session"
        arguments = [
            "--headless=new",
            "--no-sandbox",  # containers refuse what it needs; the pages are ours
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
        ]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/{session['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path,
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        # Without a proxy that the environment may name.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, path: Path, size: tuple[int, int] = (1400, 900)) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=False,
        )
        self._call("POST", "/url", {"url": path.as_uri()})
        self.wait_for_images()

    def run(self, script: str, *arguments: Any) -> Any:
        body = {"script": script, "args": list(arguments)}
        return self._call("POST", "/execute/sync", body)

    def wait_for(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"return {condition}"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def wait_for_images(self) -> None:
        self.wait_for(
            "[...document.querySelectorAll('.frame img')].filter("
            "i => i.getBoundingClientRect().top < innerHeight && i.offsetParent)"
            ".every(i => i.complete)"
        )

    def press(self, *keys: str) -> None:
        actions = [
            {"type": kind, "value": key}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        body = {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        self._call("POST", "/actions", body)

    def click(self, selector: str) -> None:
        using = {"using": "css selector", "value": selector}
        element = self._call("POST", "/element", using)[self.ELEMENT]
        self._call("POST", f"/element/{element}/click", {})

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
        self._call(
            "POST",
            "/execute/async",
            {
                "script": "const done = arguments[0];"
                "requestAnimationFrame(() => requestAnimationFrame(() => done()))",
                "args": [],
            },
        )
        png = b64decode(self._call("GET", "/screenshot"))
        return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    def command(self, name: str, **parameters: Any) -> Any:
        body = {"cmd": name, "params": parameters}
        return self._call("POST", "/goog/cdp/execute", body)

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("POST", "/se/log", {"type": kind})

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._call("DELETE", "")
        self._process.terminate()
        self._process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver in PATH")
    opened = Browser(driver, chromium, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def quiet_browser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that opens a page: no console message, no request for the net."""
    yield
    if "browser" not in request.fixturenames:
        return
    opened = request.getfixturevalue("browser")
    assert opened.log("browser") == []
    messages = [json.loads(m["message"])["message"] for m in opened.log("performance")]
    urls = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
        # Chromium's own first tab makes requests too.
        and m["params"]["documentURL"].startswith("file:")
    }
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
        title = HOSTILE if i == 0 else f"image {i}"
        page.add(
            entry(
                f"i{i}",
                title=title,
                order=i,
                image_rgb=image_rgb,
                boxes=boxes,
                panels=panels,
                picture=f"out/{i}.png",
            )
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
RIGHT, LEFT, ESCAPE = "\ue014", "\ue012", "\ue00c"


def text_of(browser: Browser, control: str) -> str:
    return browser.run(
        "return document.getElementById(arguments[0]).textContent", control
    )


def test_the_page_shows_all_it_was_given(browser, faded):
    browser.open(faded)
    assert browser.run(VISIBLE) == [f"i{i}" for i in range(12)]
    assert text_of(browser, "found") == "12 of 12 images"
    titles = browser.run(
        "return [...document.querySelectorAll('h2')].map(h => h.textContent)"
    )
    assert titles == [HOSTILE, *(f"image {i}" for i in range(1, 12))]
    assert browser.run("return window.broken") is None
    captions = browser.run(
        "return [...document.querySelectorAll('#image-i2 figcaption b')]"
        ".map(c => c.textContent)"
    )
    assert captions == ["Image", "whole", "small", "dog 0.40", "cat 0.50", "own"]
    labels = browser.run(
        "return [...document.querySelectorAll('#image-i2 .box span')]"
        ".map(s => s.textContent)"
    )
    assert sorted(labels) == ["cat 0.50", "dog 0.40"]
    assert (
        browser.run("return document.querySelector('#image-i2 a').href")
        == (faded.parent / "out" / "2.png").as_uri()
    )


def test_images_have_a_text_or_are_decoration(browser, faded):
    browser.open(faded)
    assert browser.run(
        "return [...document.querySelectorAll('.frame img')].every("
        "i => i.classList.contains('overlay') ? i.alt === '' : i.alt.length > 0)"
    )
    assert browser.run(
        "return [...document.querySelectorAll('input')].every(i => i.labels.length)"
    )


@pytest.mark.parametrize("size", [(1400, 900), (420, 800)])
def test_overlays_and_boxes_lie_on_the_image(browser, faded, size):
    browser.open(faded, size)
    pairs = browser.run(
        "const r = e => { const b = e.getBoundingClientRect();"
        " return [b.left, b.top, b.right, b.bottom]; };"
        "return [...document.querySelectorAll('img.overlay')].map("
        "o => [r(o), r(o.parentElement.querySelector('img.base'))])"
    )
    assert len(pairs) >= 5
    for overlay, base in pairs:
        np.testing.assert_allclose(overlay, base, atol=1)
        assert (base[2] - base[0]) / (base[3] - base[1]) == pytest.approx(4 / 3, 0.02)
    assert browser.run(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    )
    shares = browser.run(
        "const f = document.querySelector('#image-i1 .frame');"
        "const a = f.getBoundingClientRect();"
        "const b = f.querySelector('.box').getBoundingClientRect();"
        "return [(b.left - a.left) / a.width, (b.top - a.top) / a.height,"
        " b.width / a.width, b.height / a.height]"
    )
    # 80, 60, 400 and 300 of 640 and 480 pixels.
    np.testing.assert_allclose(shares, (0.125, 0.125, 0.5, 0.5), atol=0.005)


@pytest.mark.parametrize("size", [(1400, 900), (420, 800)])
def test_labels_hide_no_other_and_stay_in_the_image(browser, tmp_path, size):
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
        "const r = e => { const b = e.getBoundingClientRect();"
        " return [b.left, b.top, b.right, b.bottom]; };"
        "const f = document.querySelector('.frame');"
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


def test_the_slider_sets_the_strength(browser, faded):
    browser.open(faded)
    opacity = (
        "return Number(getComputedStyle(document.querySelector('.overlay')).opacity)"
    )
    assert browser.run(opacity) == pytest.approx(0.6)
    assert text_of(browser, "strength-value") == "60 %"
    browser.set("strength", 0.25)
    assert browser.run(opacity) == pytest.approx(0.25)
    assert text_of(browser, "strength-value") == "25 %"


def test_a_class_hides_what_is_not_of_it(browser, faded):
    browser.open(faded)
    browser.click("#classes-control summary")
    assert browser.run(
        "return [...document.querySelectorAll('#classes label')]"
        ".map(l => l.textContent)"
    ) == ["dog8", "cat4"]
    browser.click("#classes li:nth-child(2) input")
    assert browser.run(VISIBLE) == ["i2", "i5", "i8", "i11"]
    assert text_of(browser, "found") == "4 of 12 images"
    assert text_of(browser, "classes-value") == "cat"
    browser.wait_for("document.querySelectorAll('#image-i2 figure').length")
    panels = browser.run(
        "return [...document.querySelectorAll('#image-i2 figure')]"
        ".filter(f => !f.hidden).map(f => f.querySelector('b').textContent)"
    )
    assert panels == ["Image", "whole", "small", "cat 0.50", "own"]
    shown = browser.run(
        "return [...document.querySelectorAll('#image-i2 .box')]"
        ".filter(b => !b.hidden).map(b => b.dataset.box)"
    )
    assert set(shown) == {"1"}
    assert "1 of 2 boxes" in browser.run(
        "return document.querySelector('#image-i2 .meta').textContent"
    )
    browser.press(ESCAPE)
    browser.click("#clear")
    assert len(browser.run(VISIBLE)) == 12


def test_a_score_hides_what_is_below(browser, faded):
    browser.open(faded)
    # The dogs' scores are 0.35, 0.40, 0.50, ...; that of every cat is 0.5.
    browser.set("score", 0.7)
    assert browser.run(VISIBLE) == ["i8", "i10", "i11"]
    assert text_of(browser, "score-value") == "0.70"
    assert text_of(browser, "found") == "3 of 12 images"
    browser.set("score", 1)
    assert browser.run(VISIBLE) == []
    assert "No image" in text_of(browser, "empty")
    browser.set("score", 0)
    assert len(browser.run(VISIBLE)) == 12


def test_arrow_keys_go_through_what_is_visible(browser, faded):
    browser.open(faded)
    assert browser.run(CURRENT) == "i0"
    browser.press(RIGHT, RIGHT, LEFT, RIGHT)
    assert browser.run(CURRENT) == "i2"
    assert text_of(browser, "position") == "3 / 12"
    browser.set("score", 0.5)
    assert browser.run(VISIBLE) == ["i2", "i4", "i5", "i7", "i8", "i10", "i11"]
    browser.press(RIGHT, RIGHT)
    assert browser.run(CURRENT) == "i5"
    browser.press(*[RIGHT] * 9)
    assert browser.run(CURRENT) == "i11"
    top = "document.querySelector('[aria-current]').getBoundingClientRect().top"
    browser.wait_for(f"{top} > 0 && {top} < innerHeight")
    browser.press(*[LEFT] * 9)
    assert browser.run(CURRENT) == "i2"
    bar = "document.getElementById('bar').getBoundingClientRect().bottom"
    browser.wait_for(f"{top} > {bar} && {top} < {bar} + 80")


def test_a_slider_keeps_its_arrow_keys_until_it_is_left(browser, faded):
    browser.open(faded)
    browser.run("document.getElementById('strength').focus()")
    browser.press(RIGHT)
    assert browser.run(CURRENT) == "i0"
    assert text_of(browser, "strength-value") == "61 %"
    browser.press(ESCAPE, RIGHT)
    assert browser.run(CURRENT) == "i1"
    assert text_of(browser, "strength-value") == "61 %"


def test_a_click_chooses_the_image_that_arrow_keys_start_from(browser, faded):
    browser.open(faded)
    browser.click("#image-i1 figcaption")
    assert browser.run(CURRENT) == "i1"
    browser.press(RIGHT)
    assert browser.run(CURRENT) == "i2"


def test_arrow_keys_go_on_from_what_is_on_the_screen(browser, faded):
    browser.open(faded)
    browser.run("document.getElementById('image-i8').scrollIntoView()")
    browser.wait_for(
        "document.querySelectorAll('#image-i8 figure').length > 0"
        " && Math.abs(document.getElementById('image-i8')"
        ".getBoundingClientRect().top) < innerHeight"
    )
    browser.press(RIGHT)
    assert browser.run(CURRENT) in ("i7", "i8", "i9")


def color_at(
    browser: Browser, place: tuple[float, float], figure: int, picture: np.ndarray
) -> np.ndarray:
    """Mean colour around a place of a figure of the first image."""
    left, top, width, height = browser.run(
        "const b = document.querySelectorAll('#image-i0 .frame')[arguments[0]]"
        ".getBoundingClientRect(); return [b.left, b.top, b.width, b.height]",
        figure,
    )
    x, y = round(left + place[0] * width), round(top + place[1] * height)
    return picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(axis=0)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("colormap", ["jet", "viridis"])
@pytest.mark.parametrize("fade", [True, False])
def test_the_colours_are_those_of_the_blend(
    browser, tmp_path, fade, colormap, strength
):
    path = make_page(tmp_path, fade=fade, colormap=colormap)
    browser.open(path)
    browser.set("strength", strength)
    picture = browser.screenshot()
    lut = colormap_lut(colormap)[:, 0].astype(float)
    base = np.array(COLOR_BASE, float)
    np.testing.assert_allclose(color_at(browser, FULL, 0, picture), base, atol=4)
    if fade:
        pixel = np.array([[COLOR_BASE]], np.uint8)
        base = np.full(3, float(cv2.cvtColor(pixel, cv2.COLOR_RGB2GRAY)[0, 0]))
    for place, level in ((FULL, 255), (NONE, 0), (WEAK, 64)):
        share = min(level / 255 / 0.5, 1) * strength if fade else strength
        expected = base + (lut[level] - base) * share
        for figure in (1, 2):
            found = color_at(browser, place, figure, picture)
            atol = 4 if fade and level == 0 else 12
            np.testing.assert_allclose(found, expected, atol=atol)
    own = color_at(browser, (0.5, 0.5), 3, picture)
    np.testing.assert_allclose(own, 77, atol=4)


def test_a_page_without_boxes_has_no_filters_of_boxes(browser, tmp_path):
    page = new_page(tmp_path, fade=False, title=HOSTILE)
    layer = PagePanel("neck[0]", "256x80x80", smooth_levels())
    page.add(entry(boxes=(), panels=(layer,)))
    browser.open(page.write())
    assert browser.run(VISIBLE) == ["a"]
    for control in ("score-control", "pair"):
        assert browser.run(
            "return document.getElementById(arguments[0]).hidden", control
        )
    assert browser.run("return document.title") == HOSTILE
    assert text_of(browser, "low") == "minimum"


def test_an_empty_page_says_so(browser, tmp_path):
    browser.open(new_page(tmp_path).write())
    assert text_of(browser, "empty") == "There are no images."
    assert text_of(browser, "found") == "0 of 0 images"
    browser.press(RIGHT)


def test_thousands_of_images_are_built_only_where_one_looks(browser, tmp_path):
    page = new_page(tmp_path)
    page.add(entry("a"))
    record = page._records[0]
    page._records = [{**record, "name": f"a{i}", "order": i} for i in range(3000)]
    assets = tmp_path / "index_files"
    for i in (*range(12), *range(2988, 3000)):
        for part in ("image", "0"):
            os.link(assets / f"a.{part}.jpg", assets / f"a{i}.{part}.jpg")
    start = time.monotonic()
    browser.open(page.write())
    assert time.monotonic() - start < 30
    assert len(browser.run(VISIBLE)) == 3000
    assert browser.run("return document.querySelectorAll('figure').length") < 100
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.wait_for("document.querySelectorAll('#image-a2999 figure').length === 2")
    browser.press(LEFT)
    assert int(browser.run(CURRENT)[1:]) > 2980


def test_a_missing_picture_is_named(browser, tmp_path):
    page = new_page(tmp_path)
    page.add(entry())
    path = page.write()
    (tmp_path / "index_files" / "a.0.jpg").unlink()
    browser.open(path)
    browser.wait_for("document.querySelector('.missing')")
    assert "index_files/a.0.jpg is missing" in browser.run(
        "return document.querySelector('.missing').textContent"
    )
    # Chromium says so too.
    assert all("ERR_FILE_NOT_FOUND" in m["message"] for m in browser.log("browser"))
