"""Addresses of all kinds of servers: whole within a bearable time, or an error."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmyolo_vis_hooks import fetch as fetching
from mmyolo_vis_hooks.fetch import fetch

CONTENT = bytes(range(256)) * 400


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as its path says."""

    done = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/silent":
            self.done.wait(20)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
            return
        if self.headers["User-Agent"].startswith("Python"):
            self.send_error(403)
            return
        self.send_response(200)
        if self.path != "/unknown_length":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        half = CONTENT[: len(CONTENT) // 2]
        self.wfile.write(
            CONTENT if self.path in ("/whole", "/unknown_length") else half
        )
        self.wfile.flush()
        if self.path == "/stops":
            self.done.wait(20)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "PATIENCE", 0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.done.clear()
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Handler.done.set()
        server.shutdown()


@pytest.mark.parametrize("path", ["whole", "moved", "unknown_length"])
def test_a_file_is_whole(address: str, tmp_path: Path, path: str) -> None:
    fetch(f"{address}/{path}", tmp_path / "a", show_progress=True)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("silent", "timed out"),
        ("stops", "timed out"),
        ("breaks", f"{len(CONTENT) // 2} bytes before its end"),
    ],
)
def test_half_a_file_is_an_error(
    address: str, tmp_path: Path, path: str, reason: str
) -> None:
    with pytest.raises(OSError, match=reason):
        fetch(f"{address}/{path}", tmp_path / "a")
