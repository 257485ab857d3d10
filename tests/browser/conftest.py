"""One JupyterLab and one Chromium for all tests of this room."""

import os
from pathlib import Path

import labpage
import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    with labpage.lab(tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = labpage.chromium(playwright)
        yield started
        started.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where screenshots go: LLMLAB_SHOTS, else a temporary folder."""
    folder = Path(os.environ.get("LLMLAB_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
