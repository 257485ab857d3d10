"""The chat panel in a real browser: an answer grows on the page while the kernel is free, and is stopped there."""

import json
import urllib.request

import labpage
import pytest

pytestmark = pytest.mark.browser

CELLS = (f"""\
import sys; sys.path.insert(0, {str(labpage.TOP / "tests")!r})
import tiny_chat
from llmlab.lab import ChatPanel
tokenizer = tiny_chat.tokenizer()
tricky = "Fine. <img src=x onerror=window.hacked=1><|im_end|>"
model = tiny_chat.Scripted(tokenizer, tricky, "for ever ", context=100_000)
""", "panel = ChatPanel(model, tokenizer, temperature=0)\npanel")


def write(address: str, name: str, cells) -> None:
    """A notebook in the running JupyterLab."""
    content = {"nbformat": 4, "nbformat_minor": 5, "cells": [
        {"cell_type": "code", "id": f"c{at}", "metadata": {}, "source": text, "outputs": [], "execution_count": None}
        for at, text in enumerate(cells)], "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}}}
    body = json.dumps({"type": "notebook", "format": "json", "content": content}).encode()
    asked = urllib.request.Request(f"{address}/api/contents/{name}?token={labpage.TOKEN}", body, method="PUT")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=20)


@pytest.fixture(scope="module")
def book(lab, browser):
    write(lab, "chat.ipynb", CELLS)
    notebook = labpage.Notebook(browser, lab, "chat.ipynb").open()
    notebook.run_all()
    notebook.alone()
    notebook.page.locator(".llmlab-chat").wait_for(timeout=60_000)
    yield notebook
    notebook.page.close()
    assert notebook.errors == []


def test_an_answer_comes_is_text_and_can_be_stopped(book, shots):
    page, panel = book.page, book.page.locator(".llmlab-chat")
    ask, log = panel.get_by_label("ask", exact=True), panel.get_by_role("log")
    assert panel.get_by_role("button", name="stop").is_disabled()
    ask.focus()
    page.keyboard.insert_text("How are you?")
    page.keyboard.press("Enter")
    log.get_by_text("Fine. <img src=x onerror=window.hacked=1>").wait_for()
    assert page.evaluate("() => window.hacked") is None and panel.locator("img").count() == 0
    panel.get_by_role("status").get_by_text("end of turn [measured]").wait_for()
    assert ask.input_value() == "" and log.locator(".llmlab-turn").count() == 2

    page.keyboard.insert_text("Talk")
    panel.get_by_role("button", name="send").click()
    coming = panel.locator("[aria-live=off] .llmlab-turn")
    coming.get_by_text("for ever for ever for").wait_for()
    book.run("assert panel.state.running, 'the kernel is free meanwhile'")
    first = coming.inner_text()
    assert first.startswith("model\nfor ever")
    page.wait_for_function("first => document.querySelector('[aria-live=off] .llmlab-turn').innerText.length > first + 200",
                           arg=len(first))
    assert page.evaluate("""() => { const talk = document.querySelector('.llmlab-talk');
        return talk.scrollHeight - talk.scrollTop - talk.clientHeight < 24; }"""), "the end is in view"
    panel.screenshot(path=shots / "chat.png")
    panel.get_by_role("button", name="stop").click()
    panel.get_by_role("status").get_by_text("stopped [measured]").wait_for()
    assert coming.count() == 0 and log.locator(".llmlab-turn").count() == 4
    assert book.overflow(".llmlab-chat") == []


def test_options_and_errors_and_a_new_page(book, shots):
    page, panel = book.page, book.page.locator(".llmlab-chat")
    panel.get_by_role("button", name="▸ sampling").click()
    panel.get_by_label("at most", exact=True).fill("3")
    panel.get_by_label("at most", exact=True).press("Enter")
    panel.get_by_label("seed", exact=True).fill("x")
    panel.get_by_label("seed", exact=True).press("Enter")
    panel.get_by_role("status").get_by_text("seed is 'x'; give a whole number").wait_for()
    panel.get_by_label("seed", exact=True).fill("")
    panel.get_by_label("seed", exact=True).press("Enter")
    book.settle()
    assert "seed is" not in panel.get_by_role("status").first.inner_text()
    panel.get_by_label("ask", exact=True).fill("More")
    panel.get_by_label("ask", exact=True).press("Enter")
    panel.get_by_role("status").get_by_text("3 new tokens").wait_for()
    for theme in labpage.THEMES:
        book.theme(theme)
        panel.screenshot(path=shots / f"chat-{theme.split()[1].lower()}.png")
        assert [found for found in book.contrast(".llmlab-chat") if found[1] < labpage.READABLE] == []
    book.save()
    book.settle()
    book.reload()
    again = page.locator(".llmlab-chat .llmlab-turn")
    again.first.wait_for(timeout=60_000)
    assert again.count() == 6 and again.last.inner_text().endswith("for")
