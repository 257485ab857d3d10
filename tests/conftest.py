"""Under CI=true a test that is skipped has failed, unless it is a graphics card that is missing."""

import os
import signal
import sys

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)     # whoever starts this in the background may have it ignored
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see the Makefile


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _fail_skipped(report, excused: bool) -> None:
    """Turn a skip into a failure that prints the skip's reason."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not excused and not reason.startswith("no GPU"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI, where nothing may be missing but a GPU: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if _in_ci():
        _fail_skipped(report, excused=item.get_closest_marker("gpu") is not None)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A whole file that skips itself (importorskip) counts too."""
    report = yield
    if _in_ci():
        _fail_skipped(report, excused=False)
    return report


@pytest.fixture
def plain_depth():
    """As deep as Python goes by itself: compilers raise it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)
