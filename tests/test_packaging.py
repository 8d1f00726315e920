"""What setup.cfg installs is what the checkout holds."""

from __future__ import annotations

import configparser
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    found = find_packages(str(ROOT), include=["mmyolo_vis_hooks*"])
    found += find_packages(str(ROOT / "tools"), include=["mmcv_builder*"])
    assert sorted(listed) == sorted(found)
