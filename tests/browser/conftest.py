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


@pytest.fixture(scope="module")
def book(lab, browser, request):
    """A module's notebook, open, all of it run; what the console said is checked at the end. BOOK: {"name", "seconds" that all
    cells may take together, "height" of the page}."""
    given = request.module.BOOK
    notebook = labpage.Notebook(browser, lab, given["name"], height=given.get("height", 1000)).open()
    notebook.all_run(given["seconds"])
    yield notebook
    notebook.page.close()
    assert notebook.errors == []
