"""A sweep watched as it runs: give it as `progress`."""

import ipywidgets as w

from ..sweeps import Sweep
from .live import Chart, Words
from .sweep_figures import sweep_picture


class SweepChart(w.VBox):
    """A line of a result (`y`) along a parameter (`x`) for each value of another (`by`), and the sweep's answer below it.

    >>> chart = SweepChart("context", "GiB", by="kv")
    >>> llmlab.sweep(function, grid, progress=chart)
    """

    def __init__(self, x: str, y: str, by: str | None = None, logarithmic: bool = False):
        self._axes, self._logarithmic, self._chart, self._words = (x, y, by), logarithmic, None, Words()
        self.sweep: Sweep | None = None
        super().__init__([self._words])

    def __call__(self, sweep: Sweep) -> None:
        """What is done so far. Raises LabError for an axis there is not."""
        picture = sweep_picture(sweep, *self._axes, self._logarithmic)
        self.sweep = sweep
        if self._chart is None:
            self._chart = Chart(picture, f"chart: {self._axes[1]} along {self._axes[0]}")
            self.children = [self._chart, self._words]
        else:
            self._chart.present(picture)
        self._words.say(sweep.answer)

    @property
    def answer(self) -> str:
        return self.sweep.answer if self.sweep else "nothing is done yet"

    def __repr__(self) -> str:
        return f"<chart of a sweep: {self._axes[1]} along {self._axes[0]}>"
