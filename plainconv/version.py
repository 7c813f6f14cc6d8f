"""The version: the one place where it is written (pyproject.toml and `plainconv --version` read it here)."""

__version__ = "0.1.0"
