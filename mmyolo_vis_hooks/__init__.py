"""Shows what an OpenMMLab detector sees, while it runs.

Importing the package registers its hooks in MMEngine's root registry, and the
loaders that read MMEngine's checkpoints safely under today's torch.
"""

from .checkpoint import register_checkpoint_loaders
from .hooks import FeatMapVisHook
from .version import __version__

register_checkpoint_loaders()

__all__ = ["FeatMapVisHook", "__version__"]
