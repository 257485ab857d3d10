"""What the engine says as OpenAI's JSON: whole answers and chunks of one, of chats and of completions.

Shapes are those of OpenAI's reference: the chat completion object, its chunk, and the (legacy) completion object.
"""

import secrets
import time
from collections.abc import Sequence

from ..runtime.jobs import Answer, Event
from ..runtime.sampling import Logprobs
from .asking import Question
from .protocol import Chat

REASONS = {"end of turn": "stop", "stop string": "stop", "limit": "length", "context full": "length"}


class Choice:
    """One answer as it grows: hears what the engine says, and tells it, a chunk at a time (`chunks`) or in one (`whole`)."""

    def __init__(self, question: Question, words, number: int):
        self.question, self.words, self.number = question, words, number
        self.chances: list[Logprobs] = []           # of its tokens, in a stream of those that no chunk has told yet
        self.text, self.reason, self._sent = "", None, 0

    def hear(self, said: Event | Answer) -> None:
        """An event, or the end."""
        if isinstance(said, Answer):
            self.reason = REASONS[said.ended]
            return
        if said.logprobs is not None:
            self.chances.append(said.logprobs)
        self.text += said.text

    def chunks(self) -> list[dict]:
        """What has come since the last time."""
        new, self._sent = self.text[self._sent:], len(self.text)
        return [self._chunk(new, self.reason)] if new or self.reason else []


class ChatChoice(Choice):
    """An answer of a chat: a message, or deltas of it; with tools their reader says which."""

    def __init__(self, question: Question, words, number: int):
        super().__init__(question, words, number)
        self._reader, self._deltas, self._begun = question.tools and question.tools.reader(words), [], False

    def hear(self, said: Event | Answer) -> None:
        super().hear(said)
        if self._reader is not None:
            self._deltas += self._reader.end() if isinstance(said, Answer) else self._reader.add(said.text, said.token)
            # A call that a limit cut off is there, and so is why: "length", as OpenAI's answers have it.
            if self._reader.calls and self.reason == "stop":
                self.reason = "tool_calls"

    def chunks(self) -> list[dict]:
        first = [] if self._begun else [{"role": "assistant", "content": "", "refusal": None}]
        self._begun = True
        if self._reader is None:
            return [self._chosen({"delta": delta}, None, None) for delta in first] + super().chunks()
        deltas, self._deltas = first + self._deltas, []
        last = [self._chunk("", self.reason)] if self.reason else []
        return [self._chosen({"delta": delta}, self._told(), None) for delta in deltas] + last

    def _chunk(self, text: str, reason: str | None = None) -> dict:
        return self._chosen({"delta": {"content": text} if text else {}}, self._told(), reason)

    def whole(self) -> dict:
        message = self._reader.message if self._reader else {"role": "assistant", "content": self.text}
        message = message | {"refusal": None}
        return self._chosen({"message": message}, self._told(), self.reason)

    def _chosen(self, said: dict, chances: dict | None, reason: str | None) -> dict:
        return {"index": self.number, **said, "logprobs": chances, "finish_reason": reason}

    def _told(self) -> dict | None:
        if self.question.logprobs is None:
            return None
        chances, self.chances = self.chances, []
        return {"content": [self._one(chance.token, chance.logprob) | {
            "top_logprobs": [self._one(*pair) for pair in chance.top]} for chance in chances], "refusal": None}

    def _one(self, token: int, logprob: float) -> dict:
        piece = _piece(self.words, token)
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}


class TextChoice(Choice):
    """An answer that continues a text, which `echo` puts before it."""

    def __init__(self, question: Question, words, number: int):
        super().__init__(question, words, number)
        echoed = question.texts[number // question.choices] if question.asked.echo else ""
        self.text, self._at = echoed, len(echoed)

    def _chunk(self, text: str, reason: str | None = None) -> dict:
        return self._chosen(text, reason, self._told())

    def whole(self) -> dict:
        return self._chosen(self.text, self.reason, self._told())

    def _chosen(self, text: str, reason: str | None, chances: dict | None = None) -> dict:
        return {"text": text, "index": self.number, "logprobs": chances, "finish_reason": reason}

    def _told(self) -> dict | None:
        if self.question.logprobs is None:
            return None
        chances, self.chances = self.chances, []
        names, offsets = [self._named(chance.token) for chance in chances], []
        for chance in chances:
            offsets.append(self._at)
            self._at += len(_piece(self.words, chance.token).decode(errors="ignore"))
        # The chosen one is among the best whatever its chance: up to one more than was asked for, as OpenAI's reference says.
        best = [{self._named(token): logprob for token, logprob in (*chance.top, (chance.token, chance.logprob))}
                for chance in chances]
        return {"tokens": names, "token_logprobs": [chance.logprob for chance in chances], "text_offset": offsets,
                "top_logprobs": best}

    def _named(self, token: int) -> str:
        """A token's text; bytes that are no character by themselves as OpenAI writes them, bytes:\\xe2\\x80."""
        piece = _piece(self.words, token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _piece(words, token: int) -> bytes:
    """The bytes of a token; none of a number beyond the vocabulary, which some models have logits for."""
    return words.piece(token) if token < len(words) else b""


class Reply:
    """What all objects of one reply share: its id, when, of which model."""

    def __init__(self, question: Question, words, name: str, fingerprint: str):
        self.question, self._chat = question, isinstance(question.asked, Chat)
        kind = ChatChoice if self._chat else TextChoice
        self.choices: list[Choice] = [kind(question, words, at) for at in range(question.answers)]
        self._shared = {"id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12), "created": int(time.time()),
                        "model": name, "system_fingerprint": fingerprint}

    def whole(self, answers: Sequence[Answer]) -> dict:
        """The reply in one."""
        return self._object("chat.completion" if self._chat else "text_completion", [one.whole() for one in self.choices],
                            usage=self._usage(answers))

    def chunk(self, choice: dict) -> dict:
        """One event of a stream; `usage` is there, and null, where the last one will tell it."""
        return self._object(self._kind, [choice], **({"usage": None} if self._tells_usage else {}))

    def last(self, answers: Sequence[Answer]) -> list[dict]:
        """What a stream ends with: the usage, where it was asked for."""
        return [self._object(self._kind, [], usage=self._usage(answers))] if self._tells_usage else []

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    @property
    def _tells_usage(self) -> bool:
        options = self.question.asked.stream_options
        return bool(options and options.include_usage)

    def _object(self, kind: str, choices: list[dict], **more) -> dict:
        return {"id": self._shared["id"], "object": kind} | self._shared | {"choices": choices} | more

    def _usage(self, answers: Sequence[Answer]) -> dict:
        """Tokens: a prompt counts once however many answers it gets; of it those that were in the cache when it was first
        read."""
        firsts = answers[::self.question.choices]
        read, made = sum(one.prompt_tokens for one in firsts), sum(len(one.tokens) for one in answers)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
                "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in firsts)}}
