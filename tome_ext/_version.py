"""The version, written here and nowhere else (pyproject.toml, setup.py and CMake read it)."""

__version__ = "0.2.0"
