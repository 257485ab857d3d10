"""The command, the file or the code that runs exactly this configuration, to copy."""

import ipywidgets as w

from ...errors import LabError
from ...exports import WRITERS
from ..copying import CopyBox
from ..live import Words
from ..panel import described, put
from .box import Box

_NAMES = {"llama.cpp": "llama.cpp (llama-server)", "llama-cli": "llama.cpp (llama-cli)", "ollama": "Ollama", "vllm": "vLLM",
          "lmstudio": "LM Studio"}


class CommandBox(Box):
    """A list of programs; the text for the one chosen. It follows the panel's engine until another is chosen."""

    def make(self) -> list[w.Widget]:
        self._engine = None
        self.engine = described(w.Dropdown, "for", "the program that shall run it",
                                options=[(_NAMES.get(name, name), name) for name in WRITERS])
        self.engine.observe(self.panel.guarded(lambda _: self._write()), "value")
        self.text = CopyBox(label="command")
        self.problem = Words(layout=w.Layout(width="100%"))
        return [self.engine, self.problem, self.text]

    def show(self) -> None:
        if self.state.report.settings.engine != self._engine:
            self._engine = self.state.report.settings.engine
            put(self.engine, value=self._engine)
        self._write()

    def _write(self) -> None:
        try:
            text, problem = str(self.state.report.command(self.engine.value)), ""
        except LabError as error:
            text, problem = "", str(error)
        put(self.text, text=text)
        put(self.text.layout, display=None if text else "none")
        self.problem.say(problem)
