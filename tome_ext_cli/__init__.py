"""The ``tome-ext`` command.

In a package of its own, as importing any part of ``tome_ext`` imports torch, which takes seconds:
help, and mistakes in the options, need none of it.
"""

from __future__ import annotations

import io
import sys

from .options import parser

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 for a mistake, told in a line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be any bytes
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(argv)
    try:
        from . import commands  # which imports torch

        return commands.run(arguments)
    except KeyboardInterrupt:
        return 130
