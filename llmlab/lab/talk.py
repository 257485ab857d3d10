"""Talk: a conversation on the page, the answer growing as it comes. What a model writes is text there, never HTML."""

import anywidget
import ipywidgets as w
import traitlets as t


class Talk(anywidget.AnyWidget):
    """`turns`: [who, text] each; `coming`: [who, text] of what is not finished, or empty. Finished turns are read out by
    screen readers once; the view stays at the end unless the reader has scrolled away from it."""

    turns = t.List().tag(sync=True)
    coming = t.List().tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
        el.classList.add("llmlab-talk");
        el.tabIndex = 0;
        const past = document.createElement("div"), now = document.createElement("div");
        past.setAttribute("role", "log");
        past.setAttribute("aria-label", "conversation");
        now.setAttribute("aria-live", "off");
        el.append(past, now);
        const turn = ([who, text]) => {
            const block = document.createElement("div"), name = document.createElement("b");
            const words = document.createElement("div");
            block.className = "llmlab-turn";
            name.textContent = who;
            words.textContent = text;
            block.append(name, words);
            return block;
        };
        const staying = change => {
            const atEnd = el.scrollHeight - el.scrollTop - el.clientHeight < 24;
            change();
            if (atEnd) el.scrollTop = el.scrollHeight;
        };
        let shown = [];
        const showPast = () => staying(() => {
            const turns = model.get("turns");
            if (JSON.stringify(turns.slice(0, shown.length)) !== JSON.stringify(shown)) {
                past.replaceChildren();
                shown = [];
            }
            past.append(...turns.slice(shown.length).map(turn));
            shown = turns;
        });
        const showNow = () => staying(() => {
            const coming = model.get("coming");
            const words = now.querySelector(".llmlab-turn > div");
            if (words && coming.length) words.textContent = coming[1];
            else now.replaceChildren(...(coming.length ? [turn(coming)] : []));
        });
        model.on("change:turns", showPast);
        model.on("change:coming", showNow);
        showPast();
        showNow();
        return () => { model.off("change:turns", showPast); model.off("change:coming", showNow); };
    } };
    """
    _css = """
    .llmlab-talk { max-height: 26em; overflow-y: auto; color: var(--jp-ui-font-color1); line-height: 1.45;
        border: 1px solid rgba(128, 128, 128, .5); padding: 6px 10px; min-height: 3em; box-sizing: border-box; }
    .llmlab-turn { margin: 0 0 8px; }
    .llmlab-turn b { font-size: .85em; opacity: .75; }
    .llmlab-turn > div { white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; }
    """

    def __init__(self, **more):
        super().__init__(layout=w.Layout(width="100%", min_width="0"), **more)

    def __repr__(self) -> str:
        return f"<conversation of {len(self.turns)} turns>"
