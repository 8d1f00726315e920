"""Shows what an OpenMMLab detector sees, while it runs.

Importing the package registers its hooks in MMEngine's root registry.
"""

from .version import __version__

__all__ = ["__version__"]
