"""ChatState: a conversation with a model, and how its answers are chosen. An answer comes in a thread of its own."""

import time

import traitlets as t

from ..errors import LabError
from ..runtime.conversing import Conversation
from ..runtime.generating import Options, Stats
from .background import PAUSE, Background, said_of
from .settable import settable

SAMPLING = tuple(Options.__dataclass_fields__)


class ChatState(settable({name: getattr(Options(), name) for name in SAMPLING}), Background):
    """The options of generating.Options as traits, and `system`, the system message; `messages` follows, what was asked
    and answered, and `coming`, the answer as far as it has come while `running`; `stats` of the last answer; `error`.

    `send(text)` begins an answer and returns at once, `end()` ends it, `wait()` waits for it; `ask(text)` is all of it in
    code and returns the answer. An option that cannot be used leaves the last good ones in place and says why in `error`.
    Raises LabError for settings that cannot be used.
    """

    SETTINGS, WHOSE = (*SAMPLING, "system"), " of a chat"
    system = t.Unicode()
    messages = t.List(read_only=True)
    coming = t.Unicode(read_only=True)
    stats = t.Instance(Stats, allow_none=True, read_only=True)

    def __init__(self, model, tokenizer, context: int | None = None, chat: bool = True, **settings):
        self._conversation = Conversation(model, tokenizer, settings.get("system", ""), context, chat)
        self._asking = ""
        super().__init__(**self._known(settings))
        self.options = Options(**self._sampling)

    @property
    def chat(self) -> bool:
        """Whether the model's chat template is used; otherwise texts are continued as they are."""
        return self._conversation.chat

    @property
    def asking(self) -> str:
        """What was asked and is being answered."""
        return self._asking

    @property
    def answer(self) -> str:
        """The last answer in words, or what is wrong."""
        if self.error or not self.messages:
            return self.error or "Nothing was asked yet."
        asked, said = (message["content"] for message in self.messages[-2:])
        how = f" ({self.stats.tokens} tokens, {self.stats.ended})" if self.stats else ""
        return f"Asked “{asked}”, the model says: {said}{how}" if self.chat else f"{self._conversation.text}{how}"

    # ---- talking ----------------------------------------------------------------------------------------

    def send(self, text: str) -> None:
        """Ask, and return at once. Raises LabError while an answer is coming, and where there is nothing to ask."""
        if self.running:
            raise LabError("an answer is coming; end it or wait for it first")
        if not text.strip() and (self.chat or not self.messages):
            raise LabError("there is nothing to ask; type a text first")
        self._asking = text
        self._set(error="", stats=None, coming="", running=True)
        self._begin("chat", self._answer, text, self.options)

    def ask(self, text: str) -> str:
        """Ask, wait, and return the answer. Raises LabError where none could be given."""
        self.send(text)
        self._finish()
        return self.messages[-1]["content"] if self.stats.tokens else ""

    def clear(self) -> None:
        """Begin a new conversation. Raises LabError while an answer is coming."""
        if self.running:
            raise LabError("an answer is coming; end it or wait for it first")
        self._conversation.clear()
        self._set(error="", stats=None, messages=[])

    def _answer(self, text: str, options: Options) -> None:
        said, error, shown = "", "", time.monotonic()
        try:
            for piece in self._conversation.answer(text, options, self._stopping.is_set):
                said += piece
                if time.monotonic() - shown >= PAUSE:
                    self.set_trait("coming", said)
                    shown = time.monotonic()
        except Exception as wrong:
            error = said_of(wrong, "answering")
        finally:
            self._set(messages=list(self._conversation.messages), stats=self._conversation.stats, coming="", error=error,
                      running=False)

    # ---- settings ---------------------------------------------------------------------------------------

    @property
    def _sampling(self) -> dict:
        return {name: getattr(self, name) for name in SAMPLING}

    @t.observe(*SAMPLING)
    def _follow(self, _=None) -> None:
        try:
            self.options = Options(**self._sampling)
        except LabError as error:
            self.set_trait("error", str(error))
        else:
            self.set_trait("error", "")

    @t.observe("system")
    def _follow_system(self, change) -> None:
        self._conversation.system = change["new"]
