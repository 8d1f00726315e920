from __future__ import annotations

import pytest

from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.targets import TARGETS


@pytest.fixture
def registry():
    """Methods and targets that a test registers are gone after it."""
    methods, targets = dict(METHODS), dict(TARGETS)
    yield
    for known, before in ((METHODS, methods), (TARGETS, targets)):
        known.clear()
        known.update(before)
