"""A figure as a file of its own: one HTML page that needs no network, or a PNG by the browser."""

import os
import re
import secrets
from html import escape
from pathlib import Path

import anywidget
import ipywidgets as w
import plotly.graph_objects as go

from ..errors import LabError
from .style import on_paper

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 24px auto; color: #222; }}</style>
</head><body>
{words}
{chart}
</body></html>
"""


def save_page(path: str | os.PathLike, picture: dict, words: list[str], overwrite: bool = False) -> Path:
    """A page with the words and the chart, plotly's script inside it (5 MB); it appears under its name when it is whole.

    Raises LabError where it cannot be written, and where it is there already and `overwrite` is false.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        raise LabError(f"{path.name[:80]!r} is no page; give a name that ends in .html (a PNG: by the chart's camera)")
    if path.exists() and not overwrite:
        raise LabError(f"{path.name[:80]} is there already; give another name, or overwrite=True")
    said = [f"<p>{escape(line)}</p>" for line in words if line]
    chart = go.Figure(on_paper(picture)).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    page = _PAGE.format(title=escape(words[0][:120]), words="\n".join(said), chart=chart)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LabError(f"{path.name[:80]} cannot be written there ({error.strerror}); give a folder you can write to") from None
    return path


def free_name(stem: str) -> Path:
    """A name in the present folder that no file has: stem.html, stem-2.html..."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:80] or "chart"
    names = (Path(f"{stem}{f'-{n}' * (n > 1)}.html") for n in range(1, 1000))
    return next((name for name in names if not name.exists()), Path(f"{stem}-{secrets.token_hex(4)}.html"))


class PictureButton(anywidget.AnyWidget):
    """Saves the panel's chart as a PNG: presses the camera of its tool bar, which keyboards cannot reach."""

    _esm = """
    export default { render({ el }) {
        const button = el.appendChild(document.createElement("button"));
        button.className = "jupyter-button widget-button";
        button.style.width = "auto";
        button.textContent = "save the chart as PNG";
        button.title = "the browser downloads it";
        button.onclick = () => el.closest(".llmlab-panel")
            .querySelector(".js-plotly-plot .modebar-btn[data-title*='ownload']")?.click();
    } };
    """

    def __init__(self):
        super().__init__(layout=w.Layout(width="auto"))

    def __repr__(self) -> str:
        return "<button: save the chart as PNG>"
