"""Running the ``tome-ext`` command inside a test."""

from __future__ import annotations

import pytest

import tome_ext_cli

__all__ = ["fails"]


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must fail; returns its one line."""
    try:
        code = tome_ext_cli.main([str(a) for a in argv])
    except SystemExit as stop:  # of argparse
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    lines = [n for n in capsys.readouterr().err.splitlines() if n.startswith("tome-ext")]
    assert len(lines) == 1
    return lines[0]
