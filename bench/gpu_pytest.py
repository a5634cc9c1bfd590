"""A pytest plugin for tests on a GPU: `-p gpu_pytest --results FILE`, with xdist.

A CUDA error takes the context of its process, so the worker that met one exits and xdist starts
another; a test that hangs is ended with its worker. The other tests run on. Every result is
appended to FILE as it comes, a line of JSON each.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

LOST = ("CUDA error", "CUDA out of memory", "illegal memory access", "launch failure")
EXIT_STATUS = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--results", type=Path, default=None, help="append a line for each test here")
    group.addoption("--seconds-per-test", type=float, default=0.0, help="end a longer one")


def reason(report: pytest.TestReport) -> str:
    """Why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    return f"xfail {report.wasxfail}" if hasattr(report, "wasxfail") else str(report.longrepr)


class Results:
    """In the process that the workers report to, or the only one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.collected = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        if report.outcome != "passed":
            line["when"] = report.when  # "???": its worker died
            line["why"] = reason(report)[-3000:]
        self._append(line)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._collected(len(ids))

    def _collected(self, count: int) -> None:
        """How many tests there are, which every worker says."""
        if count > self.collected:
            self.collected = count
            self._append({"collected": count})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            why = str(report.longrepr)[-3000:]
            self._append(
                {"test": report.nodeid, "outcome": "failed", "when": "collect", "why": why}
            )

    def _append(self, line: dict[str, object]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Worker:
    """In a process that runs tests."""

    def __init__(self, seconds: float, replaced: bool) -> None:
        self.seconds = seconds
        self.replaced = replaced  # by xdist, if it exits
        self.lost = False
        # While a test runs, pytest has stderr; what is written there goes with the process.
        self.stderr = os.dup(2)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "failed":
            text = str(report.longrepr)
            self.lost |= any(sign in text for sign in LOST)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        if self.seconds > 0 and self.replaced:
            # A thread of its own ends the process: a wait inside CUDA hears no signal.
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self.lost and self.replaced:
                os._exit(EXIT_STATUS)


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    path = config.getoption("--results")
    if path is not None and not is_worker:
        config.pluginmanager.register(Results(path), "gpu_results")
    config.pluginmanager.register(
        Worker(config.getoption("--seconds-per-test"), is_worker), "gpu_worker"
    )
