"""A box in a fold: widgets in a column, over the panel that it is part of."""

import ipywidgets as w


class Box(w.VBox):
    """`panel` is the FitExplorer around it: its state is shown and changed, its `guarded` catches errors."""

    def __init__(self, panel):
        self.panel, self.state = panel, panel.state
        super().__init__(self.make(), layout=w.Layout(width="100%", margin="4px 0 8px"))

    def make(self) -> list[w.Widget]:
        """The widgets, once."""
        raise NotImplementedError

    def show(self) -> None:
        """Bring them up to date with the state. Called while the box is open."""
        raise NotImplementedError


def line(*widgets: w.Widget) -> w.HBox:
    """Side by side, going on below where there is no room."""
    return w.HBox(widgets, layout=w.Layout(flex_flow="row wrap", align_items="center", width="100%"))
