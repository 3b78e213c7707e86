"""A pytest plug-in that fails a run in which a test was skipped, unless the test is marked ``gpu``.

A skipped test looks like a passed one in a summary nobody reads. Load it with ``-p no_skips``.
"""

from __future__ import annotations

import pytest

GPU = "gpu"


class NoSkips:
    """Collects skipped tests and files and turns them into a failed run."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a skipped test; an expected failure also reports as skipped and is not one."""
        # markers are read from the report: with pytest-xdist the item itself stays in another process
        if report.skipped and not hasattr(report, "wasxfail") and GPU not in report.keywords:
            self.skipped.append(f"{report.nodeid}: {report.longreprtext}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file skipped as a whole, which takes its markers with it."""
        if report.skipped:
            self.skipped.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Make the exit status say that tests were skipped."""
        if self.skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what was skipped and what to do about it."""
        if self.skipped:
            terminalreporter.section("skipped without the marker gpu: the run fails", red=True)
            for line in self.skipped:
                terminalreporter.line(line)
            terminalreporter.line("Provide what these tests need, or mark them gpu if they need a CUDA device.")


def pytest_configure(config: pytest.Config) -> None:
    """Register one collector for the run."""
    config.pluginmanager.register(NoSkips(), "no_skips_collector")
