"""The registered hooks."""

from .boxam import BoxAMVisHook
from .errors import ErrorVisHook
from .featmap import FeatMapVisHook

__all__ = ["BoxAMVisHook", "ErrorVisHook", "FeatMapVisHook"]
