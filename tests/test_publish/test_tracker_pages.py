"""A tracker's own page shows the pictures of two hooks, step by step."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mmengine.visualization import TensorboardVisBackend
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from mmyolo_vis_hooks.publish.backends import adapter_for
from tests.test_publish.test_page_in_browser import Browser, chromium

__all__ = ["chromium"]  # a fixture

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


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """TensorBoard's server on plain pictures, whose grey says hook and step."""
    backend = TensorboardVisBackend(str(tmp_path))
    for step in STEPS:
        for tag in TAGS:
            image = np.full((60, 90, 3), grey(tag, step), np.uint8)
            adapter_for(backend).add(tag, image, step)
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
