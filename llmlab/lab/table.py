"""Rows: a table the page draws from plain texts, with a button in a row that does something; one message a change."""

from collections.abc import Callable

import anywidget
import ipywidgets as w
import traitlets as t


class Rows(anywidget.AnyWidget):
    """A table. `columns`: texts; `rows`: [{"cells": texts, "key": text, "action": a button's text or "", "why": its
    tooltip}]. `on_action(key)` is called for a button's key, as long as a row still has it."""

    caption = t.Unicode().tag(sync=True)
    columns = t.List(t.Unicode()).tag(sync=True)
    rows = t.List(t.Dict()).tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
        el.classList.add("llmlab-rows");
        const add = (parent, kind, text) => {
            const made = parent.appendChild(document.createElement(kind));
            if (text !== undefined) made.textContent = text;
            return made; };
        const show = () => {
            const held = el.contains(document.activeElement) ? document.activeElement.dataset.at : null;
            const table = document.createElement("table");
            if (model.get("caption")) add(table, "caption", model.get("caption"));
            const rows = model.get("rows"), acts = rows.some(row => row.action);
            const head = add(add(table, "thead"), "tr");
            if (acts) add(head, "td");                 // buttons come first: a wide table is cut on the right
            for (const text of model.get("columns")) add(head, "th", text).scope = "col";
            const body = add(table, "tbody");
            rows.forEach((row, at) => {
                const line = add(body, "tr"), first = acts ? add(line, "td") : null;
                row.cells.forEach((text, i) => {
                    const cell = add(line, i ? "td" : "th", text);
                    if (!i) cell.scope = "row";
                    if (text.length < 25) cell.style.whiteSpace = "nowrap"; });
                if (!row.action) return;
                const button = add(first, "button", row.action);
                button.className = "jupyter-button widget-button";
                button.title = row.why || row.action;
                button.dataset.at = at;
                button.setAttribute("aria-label", `${row.action}: ${row.cells[0]}`);
                button.onclick = () => model.send({ key: row.key });
            });
            el.replaceChildren(table);
            if (held !== null) {
                const buttons = [...el.querySelectorAll("button")];
                (buttons.find(b => b.dataset.at === held) || buttons[buttons.length - 1])?.focus();
            }
        };
        const names = ["rows", "columns", "caption"];
        for (const name of names) model.on(`change:${name}`, show);
        show();
        return () => names.forEach(name => model.off(`change:${name}`, show));
    } };
    """
    _css = """
    .llmlab-rows { overflow-x: auto; color: var(--jp-ui-font-color1); }
    .llmlab-rows table { border-collapse: collapse; font-size: var(--jp-widgets-font-size, 13px); margin: 4px 0; }
    .llmlab-rows caption { text-align: left; padding: 2px 0; }
    .llmlab-rows th, .llmlab-rows td { text-align: left; font-weight: normal; padding: 2px 12px 2px 0; vertical-align: middle;
        border-bottom: 1px solid rgba(128, 128, 128, .25); }
    .llmlab-rows thead th { font-weight: 600; }
    .llmlab-rows td { font-variant-numeric: tabular-nums; }
    .llmlab-rows button { width: auto; margin: 1px 0; }
    """

    def __init__(self, on_action: Callable[[str], object] | None = None, **more):
        self._on_action = on_action
        super().__init__(layout=w.Layout(width="100%", min_width="0"), **more)
        self.on_msg(lambda _, content, __: self._asked(content))

    def _asked(self, content) -> None:
        key = content.get("key") if isinstance(content, dict) else None
        if self._on_action and any(row["key"] == key and row["action"] for row in self.rows):
            self._on_action(key)

    def show(self, rows: list[dict], action: Callable[[dict], tuple[str, str, str]] | None = None) -> None:
        """Show dicts with the same keys; `action(row)` gives (key, button, tooltip) of a row, ("", "", "") for none."""
        columns = list(rows[0]) if rows else []
        lines = []
        for row in rows:
            key, label, why = action(row) if action else ("", "", "")
            lines.append({"cells": [str(row[c]) for c in columns], "key": key, "action": label, "why": why})
        with self.hold_sync():
            self.columns, self.rows = columns, lines

    def __repr__(self) -> str:
        return f"<table of {len(self.rows)} rows>"
