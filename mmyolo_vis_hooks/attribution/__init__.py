"""What made a detection: from a forward to one map per box.

``attribute.py`` tells the story. The modules that are imported here register methods.
"""

from . import gradient  # noqa: F401

# isort: split
from . import activation, attention, blackbox, evidence, perturb  # noqa: F401
