"""Shows what an OpenMMLab detector sees, while it runs.

Importing the package registers its hooks in MMEngine's root registry, and the
loaders that read MMEngine's checkpoints safely under today's torch.
"""

from .dependencies import require_openmmlab

require_openmmlab()  # before the imports that would fail in the middle of MMDetection

from .api import diagnose, explain, feature_maps, load  # noqa: E402
from .checkpoint import register_checkpoint_loaders  # noqa: E402
from .hooks import BoxAMVisHook, ErrorVisHook, FeatMapVisHook  # noqa: E402
from .version import __version__  # noqa: E402

register_checkpoint_loaders()

__all__ = [
    "BoxAMVisHook",
    "ErrorVisHook",
    "FeatMapVisHook",
    "__version__",
    "diagnose",
    "explain",
    "feature_maps",
    "load",
]
