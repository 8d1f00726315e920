#!/usr/bin/env python
"""Builds mmcv with compiled ops and installs it; see the package mmcv_builder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmcv_builder.program import main

if __name__ == "__main__":
    sys.exit(main())
