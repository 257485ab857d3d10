"""CopyBox: a text to take away, with a button that puts it on the clipboard; without one it selects the text."""

import anywidget
import ipywidgets as w
import traitlets as t


class CopyBox(anywidget.AnyWidget):
    """`text` as it is, selectable, with a copy button. Needs no network. A page served over plain http from another
    computer has no clipboard: there the text is selected, and Ctrl+C takes it."""

    text = t.Unicode().tag(sync=True)
    label = t.Unicode("text").tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
        el.classList.add("llmlab-copy");
        const text = document.createElement("pre"), button = document.createElement("button");
        const said = document.createElement("span");
        text.tabIndex = 0;
        text.setAttribute("role", "textbox");
        text.setAttribute("aria-readonly", "true");
        text.setAttribute("aria-multiline", "true");
        said.setAttribute("role", "status");
        button.className = "jupyter-button widget-button";
        button.textContent = "copy";
        const select = () => getSelection().selectAllChildren(text);
        button.onclick = async () => {
            try {
                await navigator.clipboard.writeText(model.get("text"));
                said.textContent = "copied";
            } catch {
                select();
                said.textContent = document.execCommand("copy") ? "copied" : "selected: press Ctrl+C";
            }
        };
        text.addEventListener("keydown", event => {
            if (!(event.ctrlKey || event.metaKey)) return;
            if (event.key === "a") { select(); event.preventDefault(); }
            event.stopPropagation();                   // Ctrl+C and Ctrl+A are the text's own here
        });
        const show = () => {
            text.textContent = model.get("text");
            text.setAttribute("aria-label", model.get("label"));
            button.title = `copy the ${model.get("label")}`;
            said.textContent = "";
        };
        model.on("change:text", show);
        model.on("change:label", show);
        show();
        const bar = document.createElement("div");
        bar.append(button, said);
        el.append(text, bar);
        return () => { model.off("change:text", show); model.off("change:label", show); };
    } };
    """
    _css = """
    .llmlab-copy pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0; padding: 6px 8px; user-select: text;
        font-family: var(--jp-code-font-family, monospace); font-size: var(--jp-code-font-size, 13px);
        color: var(--jp-ui-font-color1); border: 1px solid rgba(128, 128, 128, .5); max-height: 22em; overflow-y: auto; }
    .llmlab-copy button { width: auto; margin: 1px 8px 1px 0; }
    .llmlab-copy span { color: var(--jp-ui-font-color1); font-size: var(--jp-widgets-font-size, 13px); }
    """

    def __init__(self, **more):
        super().__init__(layout=w.Layout(width="100%", min_width="0"), **more)

    def __repr__(self) -> str:
        return f"<{self.label}: {self.text[:60]}>"
