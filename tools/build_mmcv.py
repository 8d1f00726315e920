#!/usr/bin/env python
"""Builds mmcv with compiled ops and installs it; see the package mmcv_builder."""

from __future__ import annotations

import sys

from mmcv_builder.program import main

if __name__ == "__main__":
    sys.exit(main())
