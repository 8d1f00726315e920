"""Shows what an OpenMMLab detector sees, while it runs.

Importing the package registers its hooks in MMEngine's root registry.
"""

from .hooks import FeatMapVisHook
from .version import __version__

__all__ = ["FeatMapVisHook", "__version__"]
