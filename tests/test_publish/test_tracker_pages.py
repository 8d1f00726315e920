"""A tracker's own page shows the pictures of two hooks, step by step."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.visualization import (
    AimVisBackend,
    BaseVisBackend,
    MLflowVisBackend,
    TensorboardVisBackend,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from mmyolo_vis_hooks.publish.backends import adapter_for
from tests.test_publish.browser import Browser

TAGS = ("val/boxam/1_x", "val/featmap/1_x")
STEPS = (1, 2, 3)
# Its page is made of nested shadow roots.
LOADERS = """
const found = [], look = root => root.querySelectorAll('*').forEach(e => {
    if (e.localName === 'tf-image-loader') found.push(e);
    if (e.shadowRoot) look(e.shadowRoot);
});
look(document);
return found;
"""
CARD = """
const root = arguments[0].shadowRoot, image = root.querySelector('img');
const text = root.querySelector('tf-card-heading').textContent;
if (!image || !image.complete || !image.naturalWidth) return [text, null];
const context = document.createElement('canvas').getContext('2d');
context.drawImage(image, 0, 0);
return [text, context.getImageData(9, 9, 1, 1).data[0]];
"""


def grey(tag: str, step: int) -> int:
    return 40 * step + 100 * TAGS.index(tag)


def add_pictures(backend: BaseVisBackend) -> None:
    """Plain ones, whose grey says hook and step."""
    for step in STEPS:
        for tag in TAGS:
            image = np.full((60, 90, 3), grey(tag, step), np.uint8)
            adapter_for(backend).add(tag, image, step)


@contextlib.contextmanager
def served(command: list[str], status: str) -> Iterator[str]:
    """The address of a server, once it answers to a path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [*command, f"--port={port}"]
    with subprocess.Popen(command, start_new_session=True) as server:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/{status}").close()
                break
            time.sleep(0.2)
        try:
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """TensorBoard's server on the pictures."""
    backend = TensorboardVisBackend(str(tmp_path))
    add_pictures(backend)
    backend.close()
    command = [sys.executable, "-m", "tensorboard.main", "--host=localhost"]
    command += ["--port=0", f"--logdir={tmp_path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        found = (re.search(r"http://\S+", line) for line in server.stderr)
        yield next(match[0] for match in found if match)
        server.terminate()


def test_tensorboard_shows_every_step_of_every_hook(chromium: Browser, address: str):
    driver = chromium.driver
    driver.get(f"{address}#images")
    wait = WebDriverWait(driver, 30, poll_frequency=0.1)
    wait.until(lambda _: len(chromium.run(LOADERS)) == len(TAGS))
    for loader in chromium.run(LOADERS):
        tag = chromium.run("return arguments[0].tag", loader)
        for index, step in enumerate(STEPS):
            move = "arguments[0].shadowRoot.querySelector('paper-slider').value = "
            chromium.run(f"{move}{index}", loader)
            wait.until(lambda _, sought=(loader, tag, step): shows(chromium, *sought))


def shows(browser: Browser, loader: WebElement, tag: str, step: int) -> bool:
    """Whether the card of a tag names the step and has its picture."""
    said, level = browser.run(CARD, loader)
    named = re.search(rf"step\s+{step}\b", said)
    return bool(named) and level is not None and abs(level - grey(tag, step)) < 3


CHARTS = """
const images = [...document.querySelectorAll('img')].filter(
    i => i.src.includes('get-artifact') && i.complete && i.naturalWidth);
return images.map(image => {
    const context = document.createElement('canvas').getContext('2d');
    context.drawImage(image, 0, 0);
    return [decodeURIComponent(image.src), context.getImageData(9, 9, 1, 1).data[0]];
});
"""


@pytest.fixture
def mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a run's charts on MLflow's server, of the same pictures."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    store = "sqlite:///mlflow.db"
    backend = MLflowVisBackend(str(tmp_path), tracking_uri=store)
    backend.add_config(Config(dict(work_dir=str(tmp_path))))
    add_pictures(backend)
    run_id = backend.experiment.active_run().info.run_id
    backend.close()
    command = [sys.executable, "-m", "mlflow", "server", "--workers=1"]
    with served([*command, f"--backend-store-uri={store}"], "health") as address:
        yield f"{address}/#/experiments/0/runs/{run_id}/model-metrics"


def test_mlflow_shows_every_step_of_every_hook(chromium: Browser, mlflow_run: str):
    driver = chromium.driver
    # High enough for both charts: the page empties those that are out of sight.
    metrics = dict(width=1400, height=2400, deviceScaleFactor=1, mobile=False)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(mlflow_run)
    wait = WebDriverWait(driver, 30, poll_frequency=0.2)
    slider = (By.CSS_SELECTOR, "[role=slider][aria-valuemax='3']")
    for step in STEPS:
        wait.until(lambda _: len(driver.find_elements(*slider)) == len(TAGS))
        for index in range(len(TAGS)):
            thumb = driver.find_elements(*slider)[index]
            thumb.send_keys(Keys.ARROW_RIGHT)  # it begins before the first
        wait.until(lambda _, step=step: charts(chromium) == {(t, step) for t in TAGS})


def charts(browser: Browser) -> set[tuple[str, int]]:
    """Tag and step of the pictures in the charts, whose greys must be theirs."""
    found = set()
    for source, level in browser.run(CHARTS):
        tag, step = re.findall(r"images/([^+]+)\+step\+(\d+)", source)[0]
        found.add((tag.replace("~", "/"), int(step)))
        assert abs(level - grey(tag.replace("~", "/"), int(step))) < 4  # it is WebP
    return found


SHOWN = """
const images = [...document.querySelectorAll('[class*=imageWrapper] img')].filter(
    i => i.complete && i.naturalWidth);
return images.map(image => {
    const context = document.createElement('canvas').getContext('2d');
    context.drawImage(image, 0, 0);
    return context.getImageData(9, 9, 1, 1).data[0];
});
"""


@pytest.fixture
def aim_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a run's images on Aim's server, of the same pictures."""
    pytest.importorskip("aim", reason="aim is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    own = dict(repo=str(tmp_path), capture_terminal_logs=False)
    backend = AimVisBackend(init_kwargs=own)
    add_pictures(backend)
    run_id = backend.experiment.hash
    backend.close()
    start = "from aim.cli.cli import cli_entry_point as up; up()"
    command = [sys.executable, "-c", start, "up", f"--repo={tmp_path}"]
    with served(command, "api/projects/") as address:
        yield f"{address}/runs/{run_id}/images"


def test_aim_shows_every_step_of_every_hook(chromium: Browser, aim_run: str):
    driver = chromium.driver
    metrics = dict(width=1500, height=1600, deviceScaleFactor=1, mobile=False)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wait = WebDriverWait(driver, 60, poll_frequency=0.5)
    for tag in TAGS:
        driver.get(aim_run)
        wait.until(lambda _: chromium.run(SHOWN))
        if tag != TAGS[0]:  # that of the first is open
            driver.find_element(By.XPATH, f"//*[text()='{tag}']").click()
        for last in reversed(STEPS):
            # The newest stands first; the page lays out others as it has room.
            newest = grey(tag, last)
            wait.until(lambda _, newest=newest: chromium.run(SHOWN)[:1] == [newest])
            slider = driver.find_element(
                By.CSS_SELECTOR, "[role=slider][data-index='1']"
            )
            slider.send_keys(Keys.ARROW_LEFT)
            driver.find_element(By.CSS_SELECTOR, ".ApplyButton").click()
