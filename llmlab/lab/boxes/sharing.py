"""The configuration as a string, and the chart as a file."""

import ipywidgets as w

from ...errors import LabError
from .. import saving
from ..copying import CopyBox
from ..live import Words
from ..panel import described
from .box import Box, line


class ShareBox(Box):
    """The string to copy, a place to paste one, and the chart saved as HTML or PNG."""

    def make(self) -> list[w.Widget]:
        self.shared = CopyBox(label="configuration")
        self.paste = self.panel.entered(described(
            w.Text, "open", "a shared configuration: paste it and press Enter", placeholder="llmlab:model@card?…"),
            self.state.open_shared)
        self.page = self.panel.button("save the chart as HTML", "one file, beside the notebook, that needs no network",
                                      self._save)
        self.picture = saving.PictureButton()
        self.words = Words(layout=w.Layout(width="100%"))
        return [self.shared, self.paste, line(self.page, self.picture), self.words]

    def show(self) -> None:
        try:
            self.shared.text = self.state.share()
        except LabError as error:
            self.shared.text = str(error)
        self.words.say("")

    def _save(self) -> None:
        report = self.state.report
        path = self.panel.export(saving.free_name(f"{report.spec.name}-{report.settings.quant}"))
        self.words.say(f"Saved as {path.name}, beside the notebook.")
