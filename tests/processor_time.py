"""Processor seconds of each test, those of its child processes included.

Wall time tells little of a test on a machine that does other things besides. What a fixture takes
to build counts for the first test that uses it.
"""

import collections
import contextlib
import json
import pathlib

import psutil
import pytest

LIMIT = 10.0  # processor seconds that a test may take without the mark `slow`, on a quiet machine
SHOWN = 15


def spent():
    """Returns the processor seconds of this process and all its descendants so far."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        # What a process counts of its children are those that have ended; the others are listed. If
        # it has ended meanwhile, its parent counts it.
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


class ProcessorTime:
    """Measures in the process that runs the tests, and reports in the one that was started."""

    def __init__(self, config):
        self._path = config.getini("durations_json")
        self._is_strict = config.getoption("--strict-durations")
        self._last = None
        self._seconds = collections.Counter()
        self._slow = set()

    def pytest_runtest_logstart(self):
        if self._last is None:  # the first test: imports and collection are no part of it
            self._last = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "teardown":
            now = spent()
            report.processor_seconds = now - self._last
            self._last = now
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self._seconds[report.nodeid] += report.processor_seconds
            if "slow" in report.keywords:
                self._slow.add(report.nodeid)

    def _too_long(self):
        return [
            (name, seconds)
            for name, seconds in self._seconds.most_common()
            if seconds > LIMIT and name not in self._slow
        ]

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return  # a process of pytest-xdist, which sends its reports to the one that was started
        if self._path:
            found = {name: round(s, 2) for name, s in self._seconds.most_common()}
            pathlib.Path(self._path).write_text(json.dumps(found, indent=1) + "\n")
        if self._is_strict and self._too_long() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"processor seconds: {self._seconds.total():.0f} in tests")
        for name, seconds in self._seconds.most_common(SHOWN):
            terminalreporter.line(f"{seconds:6.1f}  {name}")
        for name, seconds in self._too_long():
            terminalreporter.line(
                f"ERROR: a test without the mark `slow` must take at most {LIMIT:.0f} processor "
                f"seconds; found {seconds:.1f} in {name}. Share what it builds, or mark it.",
                red=True,
            )
