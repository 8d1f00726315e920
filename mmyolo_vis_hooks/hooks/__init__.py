"""The registered hooks."""

from .featmap_vis_hook import FeatMapVisHook

__all__ = ["FeatMapVisHook"]
