"""Folds: what not everybody needs at first, behind a row of buttons; made when it is opened, brought up to date only while
it is open."""

from collections.abc import Callable, Mapping

import ipywidgets as w

from .panel import Panel, visible


class Folds(w.VBox):
    """A row of buttons, and below it what those hold that are pressed. `made`: {title: function that makes a widget with
    a method `show()`, given the panel}; `why`: {title: tooltip}."""

    def __init__(self, panel: Panel, made: Mapping[str, Callable[[Panel], w.Widget]], why: Mapping[str, str]):
        self._panel, self._made, self.content = panel, made, {}
        self.buttons = {title: w.ToggleButton(description=f"▸ {title}", tooltip=why[title],
                                              layout=w.Layout(width="auto", flex="0 0 auto")) for title in made}
        for title, button in self.buttons.items():
            button.observe(panel.guarded(lambda change, title=title: self._turned(title, change["new"])), "value")
        row = w.HBox(list(self.buttons.values()), layout=w.Layout(flex_flow="row wrap", width="100%"))
        # A place for each from the beginning: views of charts that moved to another one would go on listening.
        self._places = {title: w.VBox(layout=w.Layout(width="100%")) for title in made}
        super().__init__([row, *self._places.values()], layout=w.Layout(width="100%", margin="4px 0 0"))

    def unfold(self, title: str) -> w.Widget:
        """Open a fold, as its button does; what is in it."""
        self.buttons[title].value = True
        return self.content[title]

    def show(self) -> None:
        """Bring what is open up to date."""
        with self._panel.showing():
            for title, content in self.content.items():
                if self.buttons[title].value:
                    content.show()

    def _turned(self, title: str, opened: bool) -> None:
        self.buttons[title].description = f"{'▾' if opened else '▸'} {title}"
        if opened and title not in self.content:
            self.content[title] = self._made[title](self._panel)
            self._places[title].children = (self.content[title],)
        if title in self.content:
            visible(self.content[title], opened)
        if opened:
            with self._panel.showing():
                self.content[title].show()
