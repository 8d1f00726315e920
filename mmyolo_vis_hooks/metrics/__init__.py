"""What maps are worth, as numbers; the modules that are imported here register them."""

from . import faithfulness, pointing_game  # noqa: F401
