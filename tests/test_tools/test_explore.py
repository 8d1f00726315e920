"""The live page, driven and photographed in a browser; it asks nobody for anything."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.models import CSPDarknet

import explore
from tests.test_publish.browser import Browser
from tests.test_tools.helpers import (
    NAMES,
    PHOTO,
    WEIGHTS,
    photo_settings,
    write_small,
)
from tests.test_tools.helpers import NANO as CONFIG

CAT, TABLE, CUP, SPOON = (250, 200), (640, 380), (850, 100), (1000, 290)
BESIDE, NOTHING = (550, 200), (1195, 395)
LOCAL = ("127.0.0.1", "::1", "localhost", None)
OUTSIDE: list[tuple[str, Any]] = []
"""Connections of this process that leave the machine."""


@functools.cache  # no audit hook can be taken away again
def watch_connections() -> None:
    def hook(event: str, args: tuple) -> None:
        if event == "socket.connect" and isinstance(args[1], tuple):
            host = args[1][0]
        elif event == "socket.getaddrinfo":
            host = args[0]
        else:
            return
        if host not in LOCAL:
            OUTSIDE.append((event, host))

    sys.addaudithook(hook)


class Live:
    """A running page in a browser, with words for what the tests do."""

    def __init__(self, browser: Browser, folder: Path, *words: Any) -> None:
        watch_connections()
        OUTSIDE.clear()
        line = [CONFIG, WEIGHTS, *words, "--device", "cpu", "--score-thr", 0.75]
        with pytest.MonkeyPatch.context() as patch:
            line += ["--cfg-options", *photo_settings(folder, 2)]
            patch.setattr(sys, "argv", ["explore", *map(str, line)])
            self.page, self.url = explore.start(explore.parse_args())
        self.browser = browser

    def open(self, width: int = 1400) -> None:
        self.browser.open(self.url, (width, 900))
        self.wait(lambda: self.said() != [""] and self.sources() and self.drawn())

    def said(self, which: int = 0) -> list[str]:
        """The lines beside a picture."""
        said = self.browser.run(
            "return [...document.querySelectorAll('.block.said')].map("
            "e => [...e.querySelectorAll('p')].map(p => p.textContent.trim()))"
        )
        return said[which] if said and said[which] else [""]

    def choices(self) -> list[str]:
        return [text.strip() for text in self.browser.texts(".here label")]

    def wait(self, holds: Callable[[], Any]) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def click(self, x: int, y: int, which: int = 0) -> None:
        """Click a pixel of the image, and wait for the answer."""
        before = self.sources()
        self.press(x, y, which)
        self.wait(lambda: self.sources() != before and self.drawn())

    def press(self, x: int, y: int, which: int = 0) -> None:
        """Click a pixel of the image."""
        left, top, width, height = self.browser.run(
            "const b = document.querySelectorAll('.picture img')[arguments[0]]"
            ".getBoundingClientRect(); return [b.left, b.top, b.width, b.height]",
            which,
        )
        where = dict(x=left + x * width / 1200, y=top + y * height / 400)
        for kind in ("mousePressed", "mouseReleased"):
            event = dict(type=kind, button="left", clickCount=1, **where)
            self.browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def sources(self) -> list[str]:
        return self.browser.run(
            "return [...document.querySelectorAll('.picture img')].map(i => i.src)"
        )

    def drawn(self) -> bool:
        return self.browser.run(
            "return [...document.querySelectorAll('.picture img')]"
            ".every(i => i.complete && i.naturalWidth)"
        )

    def choose(self, label: str, value: str) -> None:
        """Choose what starts so from a list."""
        field = f'input[aria-label="{label}"]'
        option = f'li[role=option][aria-label^="{value}"]'
        shown = f"return document.querySelector('{field}').value"

        def chosen() -> bool:
            if self.browser.run(shown).startswith(value):
                return True
            self.browser.click(field)
            self.wait(lambda: self.browser.texts(option))
            self.browser.click(option)
            return False  # a late answer may have moved the list away

        self.wait(chosen)

    def slide(self, label: str, value: float) -> None:
        self.browser.run(
            "const c = document.querySelector(`input[type=range][aria-label*="
            "'${arguments[0]}']`); c.value = arguments[1];"
            "for (const kind of ['input', 'change', 'pointerup'])"
            " c.dispatchEvent(new Event(kind, {bubbles: true}));",
            label,
            value,
        )

    def settled(self, script: str) -> Any:
        """What a script gives once it has given the same for a second."""
        value, since = self.browser.run(script), time.monotonic()
        while time.monotonic() < since + 1:
            time.sleep(0.1)
            if (now := self.browser.run(script)) != value:
                value, since = now, time.monotonic()
        return value

    def says(self, *lines: str, which: int = 0) -> None:
        """Wait until the lines are these; each may go on."""

        def holds() -> bool:
            said = self.said(which)
            return len(said) == len(lines) and all(map(str.startswith, said, lines))

        self.wait(holds)


def check(live: Live) -> None:
    """It asked this machine alone, and said nothing in the console."""
    log = live.browser.driver.get_log("browser")
    # Gradio logs that it ends its stream when a page is left.
    assert [entry for entry in log if "AbortError" not in entry["message"]] == []
    asked = live.browser.requests("http")
    assert live.url in asked
    assert [url for url in asked if not url.startswith((live.url, "data:"))] == []
    assert OUTSIDE == []


@pytest.fixture(scope="module")
def gradio() -> Any:
    return pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def opened(
    gradio: Any, chromium: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    live = Live(chromium, tmp_path_factory.mktemp("explore"))
    yield live
    live.page.close()


@pytest.fixture
def live(opened: Live) -> Iterator[Live]:
    yield opened
    check(opened)


def colours(picture: np.ndarray, live: Live, box: tuple[int, ...]) -> float:
    """Share of a part of the photo, in a photograph, that is not grey."""
    left, top, width = live.browser.run(
        "const b = document.querySelector('.picture img').getBoundingClientRect();"
        "return [b.left, b.top, b.width]"
    )
    x1, y1, x2, y2 = (round(v * width / 1200) for v in box)
    part = picture[
        round(top) + y1 : round(top) + y2, round(left) + x1 : round(left) + x2
    ]
    return float((np.ptp(part.astype(int), axis=2) > 40).mean())


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Gets an entry with each run of the backbone from now on."""
    run, counted = CSPDarknet.forward, []

    def forward(*inputs: torch.Tensor) -> Any:
        counted.append(None)
        return run(*inputs)

    monkeypatch.setattr(CSPDarknet, "forward", forward)
    return counted


TABLE_MISSED = "Missed dining table, below threshold: 0.69 for 'dining table'"
TABLE_LOW = "dining table 0.69: below the threshold of 0.75 · IoU 0.94"


def test_a_click_on_a_box_shows_what_made_it(live, monkeypatch):
    live.open()
    live.says("1 found, 2 missed, 1 false")
    assert colours(live.browser.screenshot(), live, (600, 100, 1100, 300)) > 0.3
    live.click(*CAT)
    live.says("cat 0.84: found, IoU 0.94", "Map: boxam of its score at neck[1]")
    forwards = count_forwards(monkeypatch)
    live.click(*CUP)
    assert len(forwards) == 1
    live.says(
        TABLE_MISSED,
        "cup 0.77: false positive, both: greatest IoU with any object 0.35",
        "Map: boxam of its score at neck[0], 100% of it in the box",
    )
    # The map is on the cup, and on nothing else.
    picture = live.browser.screenshot()
    assert colours(picture, live, (800, 40, 1000, 250)) > 0.3
    assert colours(picture, live, (30, 100, 470, 300)) == 0


def test_a_click_on_any_place_says_what_was_considered_there(live):
    live.open()
    live.click(*BESIDE)
    sink = "below the threshold of 0.75 · IoU 0.83 with the object 'cat'"
    live.says(f"sink 0.07: {sink}", "Map: boxam of its score at neck[2]")
    live.wait(lambda: live.choices()[0].startswith(f"sink 0.07 · {sink}"))
    live.click(*NOTHING)
    live.says("Nothing here scores above 0.05, for any class.")
    live.wait(lambda: live.choices() == [])
    live.click(*SPOON)
    spoon = "Missed spoon, not seen: no candidate for 'spoon'"
    live.says(spoon, TABLE_MISSED)
    # What there was is a choice away.
    live.wait(lambda: live.choices()[1].startswith("dining table 0.69 · below"))
    live.browser.click(".here label:nth-of-type(2)")
    live.says(spoon, TABLE_MISSED, TABLE_LOW, "Map: boxam of its score at neck[2]")


def test_what_the_controls_change(live):
    live.open()
    live.click(*TABLE)
    live.says(TABLE_MISSED, TABLE_LOW, "Map: boxam of its score at neck[2]")
    live.choose("Map by", "layercam")
    live.says(TABLE_MISSED, TABLE_LOW, "Map: layercam of its score at neck[2]")
    live.choose("Of its", "logit")
    live.says(TABLE_MISSED, TABLE_LOW, "Map: layercam of its logit at neck[2]")
    live.choose("Layer", "neck.out_convs[2]")
    live.says(
        TABLE_MISSED, TABLE_LOW, "Map: layercam of its logit at neck.out_convs[2]"
    )
    live.choose("Map by", "drise")
    refused = "No map: target='logit' cannot work with method='drise'"
    live.says(TABLE_MISSED, TABLE_LOW, refused)
    live.choose("Class", "sink")
    live.wait(lambda: not any("table 0" in text for text in live.choices()))
    live.choose("Class", "every class")
    live.choose("Map by", "boxam")
    live.slide("Score", 0.5)
    live.says("dining table 0.69: found, IoU 0.94", "Map: boxam of its logit")
    live.open()
    live.says("1 found, 2 missed, 1 false")
    live.slide("NMS", 0.95)  # it hides three boxes less
    live.says("1 found, 2 missed, 4 false")
    live.slide("NMS", 0.65)  # the detector's own
    live.says("1 found, 2 missed, 1 false")


def test_what_was_used_last_counts(live, monkeypatch):
    import _explore_page

    seconds, answered = iter([1.0]), []

    def late(*inputs: Any) -> Any:
        side = side_of(*inputs)
        time.sleep(next(seconds, 0))  # the first answer only
        answered.append(None)
        return side

    def wait(count: int) -> None:
        live.wait(lambda: len(answered) == count)
        time.sleep(0.3)  # no answer is on its way then

    side_of = _explore_page.side_of
    live.open()
    live.click(*TABLE)
    live.says(TABLE_MISSED, TABLE_LOW, "Map: ")
    monkeypatch.setattr(_explore_page, "side_of", late)
    live.choose("Map by", "layercam")
    live.slide("Score", 0.5)
    wait(2)
    live.says("dining table 0.69: found, IoU 0.94", "Map: layercam")
    seconds = iter([1.0])
    live.press(*CAT)
    live.press(*CUP)
    wait(4)
    live.says("cup 0.77: false positive", "Map: layercam")


def test_the_next_error(live):
    live.open()

    def shows(name: str) -> None:
        image = "return document.querySelector('#image input').value"
        live.wait(lambda: live.browser.run(image) == name)

    live.choose("Kind of error", "missed: not seen")
    for name in ("1_cat", "2_cat", "1_cat"):
        live.browser.click("#next-error")
        shows(name)
        live.says("Missed spoon, not seen", TABLE_MISSED)
    live.choose("Kind of error", "false: duplicate")
    live.browser.click("#next-error")
    live.wait(lambda: "There is no such error" in live.browser.texts("body")[0])
    live.browser.click("#next")
    shows("2_cat")


def test_a_narrow_window_cuts_no_button(live):
    live.open(1200)
    cut = live.browser.run(
        "return [...document.querySelectorAll('.bar button')]"
        ".filter(e => e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight)"
        ".map(e => e.textContent)"
    )
    assert cut == []


def test_two_checkpoints_and_configs_side_by_side(gradio, chromium, tmp_path):
    weights = torch.load(WEIGHTS, weights_only=True)
    for name, value in weights["state_dict"].items():
        if "conv_obj" in name and name.endswith("bias"):
            value -= 2
    torch.save(weights, tmp_path / "worse.pth")
    config = tmp_path / "open.py"
    weaker = "model = dict(test_cfg=dict(nms=dict(iou_threshold=0.95)))"
    config.write_text(f"_base_ = {str(CONFIG)!r}\n{weaker}\n")
    second = "--compare", tmp_path / "worse.pth", "--compare-config", config
    live = Live(chromium, tmp_path, *second)
    live.open()
    live.says("1 found, 2 missed, 1 false")
    live.says("0 found, 3 missed, 0 false", which=1)
    live.click(*CAT, which=1)
    live.says("cat 0.84: found, IoU 0.94", "Map: ")
    missed = "Missed cat, below threshold: 0.63 for 'cat', threshold 0.75"
    live.says(missed, "cat 0.63: below the threshold", "Map: ", which=1)
    assert colours(live.browser.screenshot(), live, (30, 100, 470, 300)) > 0.2
    live.browser.click("#next")
    live.says("1 found, 2 missed, 1 false")
    live.slide("Score", 0.5)  # each has its own NMS
    live.says("2 found, 1 missed, 1 false")
    live.says("1 found, 2 missed, 1 false", which=1)
    live.slide("NMS", 0.8)  # both have this one
    live.says("2 found, 1 missed, 2 false")
    live.says("1 found, 2 missed, 0 false", which=1)
    check(live)
    live.page.close()


def test_of_files_no_box_is_right_or_wrong(gradio, chromium, tmp_path):
    live = Live(chromium, tmp_path, PHOTO)
    live.open()
    live.says("2 boxes")
    live.click(*CAT)
    live.says("cat 0.84: a detection", "Map: ")
    assert not live.browser.run("return document.querySelector('#next-error')")
    assert live.browser.texts(".key") == ["detection", "chosen candidate"]
    check(live)
    live.page.close()


def test_each_of_many_quick_clicks_counts(gradio, chromium, tmp_path):
    for number in range(9):
        write_small(tmp_path / f"{number}.png", number)
    live = Live(chromium, tmp_path, *sorted(tmp_path.glob("*.png")))
    live.open()
    for button in ("#next",) * 6 + ("#previous", "#next") * 2 + ("#next",):
        live.browser.click(button)
    image = "return document.querySelector('#image input').value"
    assert live.settled(image).endswith("7")
    check(live)
    live.page.close()


def test_a_click_on_a_panorama_is_where_it_was_clicked(gradio, tmp_path, monkeypatch):
    """Its sides are scaled by 3.636 and 3.623, since a picture has whole pixels."""
    from _explore import Spot
    from _explore_page import DECIDED, Page

    write_small(tmp_path / "wide.png", hw=(500, 4000))
    line = ["explore", CONFIG, WEIGHTS, tmp_path / "wide.png", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, line)])
    args = explore.parse_args()
    page = Page(args, *explore.open_views(args))
    controls = 0.3, 0.65, "boxam", "score", DECIDED, -1
    spot, *_ = page.click(SimpleNamespace(index=(1000, 100)), Spot(), *controls)
    assert spot.point_xy == pytest.approx((1000 * 4000 / 1100, 100 * 500 / 138))


def test_a_picture_that_is_shown_again_stays_whole(gradio):
    from _explore_page import stored

    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    file = Path(stored(noise))
    size = file.stat().st_size
    again = threading.Thread(target=lambda: [stored(noise) for _ in range(50)])
    again.start()
    while again.is_alive():
        assert file.stat().st_size == size
    assert stored(noise) == str(file)


def test_a_machine_without_display_says_how_to_come_to_it(monkeypatch, capsys):
    page = SimpleNamespace(server_port=7861, block_thread=lambda: None)
    monkeypatch.setattr(explore, "start", lambda args: (page, "http://127.0.0.1:7861/"))
    monkeypatch.setattr(sys, "argv", ["explore", "config", "weights"])
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    explore.main()
    printed = capsys.readouterr().out
    assert printed.startswith("http://127.0.0.1:7861/ ")
    assert "\n  ssh -L 7861:127.0.0.1:7861 " in printed
    assert shown == []
    monkeypatch.setenv("DISPLAY", ":0")
    explore.main()
    assert "ssh" not in capsys.readouterr().out
    assert shown == ["http://127.0.0.1:7861/"]


def test_what_cannot_work_ends_in_one_line(mistake, monkeypatch, tmp_path):
    line = explore, CONFIG, WEIGHTS
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -r requirements/explore.txt" in mistake(*line)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "_explore_page", SimpleNamespace(CSS="", Page=None)
    )
    assert "there is no checkpoint" in mistake(explore, CONFIG, tmp_path / "none.pth")
    assert "--compare: there is no" in mistake(*line, "--compare", tmp_path / "no.pth")
    assert "of --compare: name them" in mistake(*line, "--compare-config", CONFIG)
    assert "--port 65536: use 1 to" in mistake(*line, "--port", 65536)
    assert "--host 192.0.2.1: " in mistake(*line, "--host", "192.0.2.1")
    weights = torch.load(WEIGHTS, weights_only=True)
    weights["meta"] = dict(dataset_meta=dict(classes=("cat", *NAMES[1:])))
    torch.save(weights, tmp_path / "other.pth")
    others = "--compare", tmp_path / "other.pth"
    assert "class 0 is person of A and cat of B" in mistake(*line, PHOTO, *others)
    assert "there is no image" in mistake(*line, tmp_path / "none.jpg")
    (tmp_path / "film.mp4").write_bytes(b"")
    assert "film.mp4" in mistake(*line, tmp_path / "film.mp4")
    assert "device='gpu'" in mistake(*line, PHOTO, "--device", "gpu")
