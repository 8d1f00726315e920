"""Version of the package; read by setup.cfg without importing anything else."""

__version__ = "0.2.0"
