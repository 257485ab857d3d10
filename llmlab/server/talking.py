"""One request and the engine: let in, asked, heard to the end, let out; whole or as a stream."""

import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack

from ..errors import LabError
from ..runtime.constraining import FormError
from ..runtime.jobs import Answer, Event, Job
from .answering import Reply
from .asking import Question
from .feeding import Feed
from .refusals import Refusal, not_ready
from .service import Service
from .streaming import DONE, STILL_THERE, event

_log = logging.getLogger("llmlab.server")
OUTCOMES = {429: "busy", 499: "cancelled", 503: "unavailable", 504: "timeout"}


def outcome_of(refusal: Refusal) -> str:
    """As the metrics count it."""
    return OUTCOMES.get(refusal.status, "refused" if refusal.status < 500 else "failed")


class Talk:
    """The answers to a question, from when the engine has it. `close` ends what is not ended and lets the request out; whoever
    makes one closes it. Raises Refusal where there is no room."""

    def __init__(self, service: Service, endpoint: str, question: Question):
        self._service, self._question = service, question
        self._answers: list[Answer | None] = [None] * question.answers
        self._reply = Reply(question, service.engine.words, service.name, service.fingerprint)
        self._outcome = "cancelled"
        with ExitStack() as leaving:
            leaving.enter_context(service.gate.admitted(question.answers))
            self._feed = Feed(self._jobs(), service.limits.seconds)
            leaving.callback(lambda: service.outcomes.add(endpoint, self._outcome))
            leaving.callback(self._feed.cancel)
            service.talks.add(self)
            leaving.callback(service.talks.discard, self)
            self._leaving = leaving.pop_all()

    def close(self) -> None:
        self._leaving.close()

    def cancel(self) -> None:
        """End what is not ended, from any thread; whoever asked is told."""
        self._feed.cancel()

    def _jobs(self) -> list:
        """The engine asked; it reads a prompt once for all of its choices."""
        question, jobs = self._question, []
        if question.asked.max_tokens == 0:
            return [_echoed(prompt) for prompt in question.prompts for _ in range(question.choices)]
        try:
            for prompt, choosers in zip(question.prompts, question.choosers, strict=True):
                jobs += self._service.engine.submit_several(prompt, question.choices, question.options, choosers=choosers,
                                                            logprobs=question.logprobs)
        except LabError as error:
            for job in jobs:
                job.cancel()
            raise Refusal(f"{error}") from None
        return jobs

    async def whole(self) -> dict:
        """The reply in one, when all of its answers have ended. Raises Refusal."""
        try:
            async for at, said in self._heard():
                if said is not None:
                    self._reply.choices[at].hear(said)
        except Refusal as refusal:
            self._outcome = outcome_of(refusal)
            raise
        self._outcome = "ok"
        return self._reply.whole(self._answers)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as it comes, in server-sent events; an error is one of them."""
        try:
            async for at, said in self._heard():
                if said is None:
                    yield STILL_THERE
                    continue
                choice = self._reply.choices[at]
                choice.hear(said)
                for chunk in choice.chunks():
                    yield event(self._reply.chunk(chunk))
        except Refusal as refusal:
            self._outcome = outcome_of(refusal)
            yield event(refusal.body)
            return
        for last in self._reply.last(self._answers):
            yield event(last)
        self._outcome = "ok"
        yield DONE

    async def _heard(self) -> AsyncGenerator[tuple[int, Event | Answer | None], None]:
        """(which answer, its next Event, or its Answer when it has ended); now and then None, where nothing came for long."""
        async for happened in self._feed:
            if not happened:
                yield 0, None
            for at, said in happened:
                if isinstance(said, Exception):
                    raise self._broken(said)
                if said is None:
                    said = self._ended(at)
                yield at, said

    def _ended(self, at: int) -> Answer:
        answer = self._answers[at] = self._feed.jobs[at].result(0)
        if answer.ended == "stopped":           # and not by us, who would not listen any more
            raise not_ready("The server is stopping.")
        self._service.ended(answer)
        return answer

    def _broken(self, error: Exception) -> Refusal:
        if isinstance(error, FormError):        # the model may write nothing more of it: what was asked for is at fault
            return Refusal(f"{error}", param=self._question.holding, code="form_error")
        if isinstance(error, LabError) and error.__cause__ is None:     # else it quotes what is nobody's outside
            return Refusal(f"{error}", 500)
        _log.error("an answer failed", exc_info=error)
        return Refusal("The engine failed over this answer; the server's log says how.", 500)


def _echoed(prompt: list[int]) -> Job:
    """One that has nothing to do: the prompt is all that was asked for."""
    job = Job(lambda job: None)
    job.end(Answer("", (), "limit", len(prompt), 0, None, 0.0))
    return job
