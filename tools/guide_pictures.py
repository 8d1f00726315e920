"""Draw the pictures of the guide anew: ``python tools/guide_pictures.py``.

Each picture is what the command above it in ``docs/visualization.md`` gives, scaled to
the width at which a page shows it. That of the page needs Chromium.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "visualization.md"
IMAGES = ROOT / "docs" / "images"
MOST_WIDTH, MOST_HEIGHT, QUALITY = 1200, 900, 85
_BLOCK = re.compile(r"```shell\n(.*?)```|!\[[^]]*\]\(images/(\w+\.jpg)\)", re.S)


def commands() -> dict[str, list[str]]:
    """By picture the words of its command, without an option that says where to."""
    variables: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    words: list[str] = []
    for block, picture in _BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        for name, value in re.findall(r"^([A-Z]+)=(\S+)", block, re.M):
            variables.setdefault(name, value)  # the first ones made the pictures
        if "python tools" in block:
            line = re.sub(r"\$([A-Z]+)", lambda name: variables[name[1]], block)
            words = shlex.split(line.replace("\\\n", " "))[1:]
        elif alignment := re.fullmatch(r"guide_align_(\w+)\.jpg", picture):
            found[picture] = [*words[:-1], alignment[1]]
        elif picture != "guide_page.jpg":
            found.setdefault(picture, words)
    del found[""]
    return found


def draw(words: list[str], picture: Path, folder: str) -> None:
    for option in ("--out-file", "--out-dir"):
        if option in words:
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
    out = Path(folder, "picture.png")
    run([sys.executable, *words, "--out-file", str(out)])
    keep(out, picture)


def photograph_page(picture: Path, folder: str) -> None:
    """The page of the two photos that the image is made of."""
    photo = cv2.imread(str(IMAGES / "cat.jpg"))
    assert photo is not None
    middle = photo.shape[1] // 2
    cv2.imwrite(str(Path(folder, "cat.jpg")), photo[:, :middle])
    cv2.imwrite(str(Path(folder, "coffee.jpg")), photo[:, middle:])
    words = next(words for words in commands().values() if "boxam" in words[0])
    tool, config, weights = (str(ROOT / words[i]) for i in (0, 2, 3))
    photos, detector = ("cat.jpg", "coffee.jpg"), (config, weights)
    run([sys.executable, tool, *photos, *detector, "--out-dir", "pages"], folder)
    out, page = Path(folder, "page.png"), Path(folder, "pages", "index.html").as_uri()
    browser = "chromium --headless --no-sandbox --hide-scrollbars"
    options = ("--window-size=1500,800", "--virtual-time-budget=10000")
    run([*browser.split(), *options, f"--screenshot={out}", page], folder)
    keep(out, picture)


def run(words: list[str], folder: Path | str = ROOT) -> None:
    subprocess.run(words, cwd=folder, check=True)


def keep(drawn: Path, picture: Path) -> None:
    image = cv2.imread(str(drawn))
    assert image is not None
    height, width = image.shape[:2]
    scale = min(1, MOST_WIDTH / width, MOST_HEIGHT / height)
    size_wh = round(width * scale), round(height * scale)
    small = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(picture), small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for picture, words in commands().items():
            print(picture, shlex.join(words))
            draw(words, IMAGES / picture, folder)
        photograph_page(IMAGES / "guide_page.jpg", folder)


if __name__ == "__main__":
    main()
