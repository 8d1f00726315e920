"""Chromium, with words for what the tests of pages do."""

from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait


class Browser:
    """Chromium, with words for what the tests do."""

    def __init__(self, driver: str, chromium: str, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "headless=new",
            "no-sandbox",  # containers refuse what it needs; the pages are ours
            "disable-dev-shm-usage",
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

    def open(self, page: Path | str, size: tuple[int, int] = (1400, 900)) -> None:
        """Open a file, or an address."""
        metrics = dict(width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(page if isinstance(page, str) else page.as_uri())
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
        wait = WebDriverWait(self.driver, 60, poll_frequency=0.05)
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

    def requests(self, of: str = "file:") -> set[str]:
        """What pages of these addresses asked for since the last call.

        Chromium's own tabs ask, too.
        """
        log = self.driver.get_log("performance")
        messages = [json.loads(line["message"])["message"] for line in log]
        return {
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
            and m["params"]["documentURL"].startswith(of)
        }
