"""A pytest plugin that prints failures as they come: a run that is killed in the end has said why."""

import os

import pytest

LINES = 25


@pytest.hookimpl(trylast=True)  # after the line that says which test it was
def pytest_runtest_logreport(report) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        text = report.longreprtext.splitlines()
        print("", f"-- {report.nodeid}", *text[-LINES:], "--", sep="\n", flush=True)
