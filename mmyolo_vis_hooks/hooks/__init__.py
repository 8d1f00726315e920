"""The registered hooks."""

from .boxam import BoxAMVisHook
from .featmap import FeatMapVisHook

__all__ = ["BoxAMVisHook", "FeatMapVisHook"]
