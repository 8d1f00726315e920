"""What the tests of pages have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.test_publish.browser import Browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """After each test: no message in the console, and no request for the net."""
    yield chromium
    assert chromium.driver.get_log("browser") == []
    urls = chromium.requests()
    assert any(url.startswith("file:") for url in urls)
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
