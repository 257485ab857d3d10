"""A conversation: what was said, and the memory that saves reading it again at each turn."""

import json
from collections.abc import Callable, Iterator

from ..errors import LabError
from .generating import Options, Stats, check_tokenizer, has_template, memory_of, stream
from .speculating import proposer_of


class Conversation:
    """Questions and answers of one model (transformers' or a lean decoder), in its chat template; a text that is continued
    where it has none, or where `chat` is False.

    messages: {"role", "content"} each, what was asked and answered in turn. system: comes before them; may be changed.
    text: in plain continuation, what stands so far. stats: of the last answer, None before its end. draft: what guesses tokens,
    as in `generating.stream`. Raises LabError for a context that cannot be, for a system message where there is no template,
    where there is no tokenizer, and for a draft that cannot guess for this model.
    """

    def __init__(self, model, tokenizer, system: str = "", context: int | None = None, chat: bool = True, draft=None):
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.chat, self.system = chat and has_template(tokenizer), system
        self.memory = memory_of(model, context)
        self.draft = proposer_of(draft, self.memory, tokenizer)
        self.clear()
        if system and not self.chat:
            raise LabError(_NO_PLACE)

    def clear(self) -> None:
        """Begin anew, with the system message alone; what the memory took is free again."""
        self.memory.forget()
        self.messages, self.text = [], ""
        self.stats: Stats | None = None

    def answer(self, said: str, options: Options, stopped: Callable[[], bool] | None = None) -> Iterator[str]:
        """Pieces of the answer; afterwards it is part of the conversation, and `stats` says how it went. In plain
        continuation "" goes on with the text as it stands. Where nothing came, the question is taken back. Raises as
        `generating.stream` does, at the first piece."""
        self.stats = None
        asked = [*self.messages, {"role": "user", "content": said}]
        text = said or self.text
        coming = stream(self.model, self.tokenizer, self._first() + asked if self.chat else text, options, stopped, self.memory,
                        self.draft)
        try:
            yield from coming
        finally:
            coming.close()
            self.stats = coming.stats
            if coming.text:
                self.messages, self.text = [*asked, {"role": "assistant", "content": coming.text}], text + coming.text

    def saved(self) -> str:
        """The conversation as JSON, a list of messages; in plain continuation the text."""
        return json.dumps(self._first() + self.messages, ensure_ascii=False, indent=1) + "\n" if self.chat else self.text

    def _first(self) -> list[dict]:
        if self.system and not self.chat:
            raise LabError(_NO_PLACE)
        return [{"role": "system", "content": self.system}] if self.system else []


_NO_PLACE = "a system message needs a chat template; put it at the beginning of the prompt"
