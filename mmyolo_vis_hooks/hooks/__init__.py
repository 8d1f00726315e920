"""The registered hooks."""

from .boxam_vis_hook import BoxAMVisHook
from .featmap_vis_hook import FeatMapVisHook

__all__ = ["BoxAMVisHook", "FeatMapVisHook"]
