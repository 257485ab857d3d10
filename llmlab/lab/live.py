"""What needs the page's help: Chart (stays true, fills its width), Words (read aloud), Keys (a panel's keys are its own)."""

from collections.abc import Iterator
from html import escape

import anywidget
import ipywidgets as w
import numpy as np
import plotly
import plotly.graph_objects as go
import traitlets as t


class _Library(anywidget.AnyWidget):
    """plotly's own script, sent to a page once for all its figures: 5 MB each otherwise, and half a second of the page's
    only thread each, while anywidget gives every widget two seconds to be there."""

    _esm = "export default {};"
    script = t.Unicode().tag(sync=True)


_libraries: list[_Library] = []


def _library() -> _Library:
    """The one of this kernel, made anew where somebody closed all widgets."""
    if not _libraries or _libraries[-1].comm is None:
        _libraries[:] = [_Library(script=str(go.FigureWidget._esm))]
    return _libraries[-1]


# A figure is there at once; plotly's part of it begins when the library has been read. plotly applies what the kernel says
# to what is drawn and forgets it otherwise, so that what is drawn later (Run All says much before the first picture) would
# begin with the figure as it was constructed: `keep` writes it down in the model.
_FIGURE = """
const name = "llmlab-plotly-VERSION";
const put = (into, path, value) => {
    const keys = path.split("."), last = keys.pop();
    for (const key of keys) into = into[key] ??= {};
    if (value === null) delete into[last];
    else if (value !== "_undefined_") into[last] = value;
};
const keep = model => {
    const { style_data, style_traces, layout_data } = model.get("_py2js_update") || {};
    for (const [path, values] of Object.entries(style_data || {}))
        style_traces.forEach((at, i) => put(model.get("_widget_data")[at], path, values[i % values.length]));
    for (const [path, value] of Object.entries(layout_data || {})) put(model.get("_widget_layout"), path, value);
};
const library = async model => {
    const holder = await model.widget_manager.get_model(model.get("_library").slice("IPY_MODEL_".length));
    const place = URL.createObjectURL(new Blob([holder.get("script")], { type: "text/javascript" }));
    try { return (await import(place)).default; } finally { URL.revokeObjectURL(place); }
};
export default () => {
    let figure;
    return {
        initialize({ model }) {
            model.on("change:_py2js_update", () => keep(model));
            globalThis[name] ??= library(model).catch(error => { delete globalThis[name]; throw error; });
            figure = globalThis[name].then(plotly => {
                const made = plotly();
                made.initialize({ model });
                return made;
            });
        },
        async render(context) {
            const over = (await figure).render(context), { el } = context;
            // plotly keeps the width a chart had when its height changed, and may draw before its place has one
            el.on("plotly_afterplot", () => {
                if (el.layout.width) {
                    delete el.layout.width;
                    el.layout.autosize = true;
                }
                if (el.clientWidth && el.clientWidth !== el._fullLayout.width) window.dispatchEvent(new Event("resize"));
            });
            return over;
        },
    };
};
""".replace("VERSION", plotly.__version__)


class LiveFigure(go.FigureWidget):
    """A FigureWidget shown from a figure (or its dict) and brought up to date with `present`.

    plotly hands its figure to the page once, as it was constructed, and from then on sends edits only. A page that is
    reloaded asks for the state and would be handed that first picture, so `get_state` hands out the present one. It
    leans on plotly's inner names (`_widget_data`, `_widget_layout`, `_config`); the browser test watches them.
    """

    _esm = _FIGURE
    _library = t.Unicode().tag(sync=True)      # where the page finds plotly

    @t.default("_library")
    def _where(self) -> str:
        return f"IPY_MODEL_{_library().model_id}"

    def __init__(self, figure: dict | go.Figure):
        self._last = figure if isinstance(figure, dict) else figure.to_dict()
        super().__init__(figure)
        self._built = True
        self._config = {**self._config, "responsive": True, "displaylogo": False, "modeBarButtons": [["toImage"]],
                        "toImageButtonOptions": {"format": "png", "scale": 2, "filename": "llmlab"}}

    def present(self, figure: dict) -> None:
        """Bring the chart to `figure`, {"data", "layout"} with the same traces in the same order, in one message.

        Only what differs from the figure presented before is touched: plotly takes 40 ms to compare it all.
        """
        before, self._last = self._last, figure
        with self.batch_update():
            for trace, old, new in zip(self.data, before["data"], figure["data"], strict=True):
                for path, value in _changes(old, new):
                    trace[path] = value
            for path, value in _changes(before["layout"], figure["layout"]):
                self.layout[path] = value

    def get_state(self, key=None, drop_defaults=False):
        state = super().get_state(key, drop_defaults)
        if key is None and self.__dict__.get("_built"):      # before that there is no figure to hand out
            # plotly forgets what the page reports as its own default, "showlegend": False too; so over what was presented
            now = _over(_plain(self._last), self.to_dict())
            state["_widget_data"], state["_widget_layout"] = now["data"], now["layout"]
        return state

    def __repr__(self) -> str:
        return f"<LiveFigure of {len(self.data)} traces>"


def _changes(old: dict, new: dict, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of every leaf of `new` that is not so in `old`."""
    for key, value in new.items():
        if isinstance(value, dict):
            yield from _changes(old.get(key) or {}, value, f"{path}{key}.")
        elif key not in old or not _same(old[key], value):
            yield f"{path}{key}", value


def _same(one, other) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one == other


def _plain(value):
    """Arrays as lists, which a new page can read."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


def _over(under, top):
    """`top`, and of `under` what `top` does not say: dicts by key, lists of dicts by place. An array that plotly has written
    in its own way is as it was presented."""
    if isinstance(top, np.ndarray) or isinstance(top, dict) and "bdata" in top:
        return under
    if isinstance(under, dict) and isinstance(top, dict):
        return {**under, **{key: _over(under.get(key), value) for key, value in top.items()}}
    if isinstance(top, (list, tuple)) and isinstance(under, (list, tuple)) and len(top) == len(under) and all(
            isinstance(one, dict) for one in top):
        return [_over(*pair) for pair in zip(under, top, strict=True)]
    return top


class _Width(anywidget.AnyWidget):
    """plotly draws a chart before it is on the page, 700 pixels wide, and looks again only when the window is resized:
    so the window is told whenever the chart's place has a new width."""

    _esm = """
    export default { render({ el }) {
        let width = 0;
        const watch = new ResizeObserver(([entry]) => {
            const now = Math.round(entry.contentRect.width);
            if (now && now !== width) requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
            width = now;
        });
        watch.observe(el);
        return () => watch.disconnect();
    } };
    """


class Chart(w.VBox):
    """A LiveFigure as wide as the page allows. `words` say what it shows where it cannot be drawn."""

    def __init__(self, figure, words: str = "a chart"):
        self.figure, self._words = LiveFigure(figure), words
        full = w.Layout(width="100%", min_width="0", overflow="hidden")
        super().__init__([self.figure, _Width(layout=w.Layout(width="100%", height="0", margin="0"))], layout=full)

    def present(self, figure: dict) -> None:
        """See LiveFigure.present."""
        self.figure.present(figure)

    def __repr__(self) -> str:
        return f"<{self._words}>"


class Words(anywidget.AnyWidget):
    """HTML that screen readers read out as it changes: the region stays, its content is replaced (an HTML widget
    replaces the region too, and is silent)."""

    html = t.Unicode().tag(sync=True)

    def say(self, text: str) -> None:
        """Plain text, whatever it has in it."""
        self.html = escape(text)

    _esm = """
    export default { render({ model, el }) {
        el.setAttribute("role", "status");
        el.setAttribute("aria-live", "polite");
        const show = () => { el.innerHTML = model.get("html"); };
        model.on("change:html", show);
        show();
        return () => model.off("change:html", show);
    } };
    """


class Keys(anywidget.AnyWidget):
    """Keys pressed in a panel's lists, buttons and sliders stay there. JupyterLab would take them for commands: typing
    "x" to find a card in a list cuts the cell. Works on every widget with the class `llmlab-panel`."""

    _esm = """
    export default { render() {
        const keep = ({ target }) => {
            if (target.closest(".llmlab-panel") && target.matches("select, button, [role=slider]"))
                target.dataset.lmSuppressShortcuts = "true";
        };
        document.addEventListener("focusin", keep);
        return () => document.removeEventListener("focusin", keep);
    } };
    """
