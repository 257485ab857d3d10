"""The endpoints: what is asked, answered by the engine, in OpenAI's words; every error an error object, never a stack trace."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import LabError
from . import metrics
from .asking import Question, has_form, question_of
from .bodies import body_of, object_of
from .guarding import Guard
from .protocol import Asked, Chat, Completion, request_of
from .refusals import Refusal
from .service import READY, Service
from .streaming import Events, Gone, unless_gone
from .talking import Talk, outcome_of

_RESPONSES = re.compile(r"/v1/responses(/|$)")      # not 501: OpenAI's clients ask again after whatever is above 499


def app_of(service: Service, host: str, key: str | None = None, hosts: tuple[str, ...] = (),
           origins: tuple[str, ...] = ()) -> ASGIApp:
    """The ASGI app of a service bound to `host`; key, hosts and origins as `guarding.Guard` has them."""
    ends = Endpoints(service)
    app = Starlette(routes=[
        Route("/health", ends.health), Route("/metrics", ends.metrics), Route("/v1/models", ends.models),
        Route("/v1/models/{name:path}", ends.model),
        Route("/v1/chat/completions", partial(ends.answer, Chat, "chat"), methods=["POST"]),
        Route("/v1/completions", partial(ends.answer, Completion, "completions"), methods=["POST"]),
    ], exception_handlers={Refusal: _refused, HTTPException: _no_such, Exception: _failed})
    guarded = Guard(app, host, key, hosts, origins)
    if not origins:
        return guarded
    return CORSMiddleware(guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])


async def _refused(request: Request, error: Refusal) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _no_such(request: Request, error: HTTPException) -> Response:
    nothing = ("OpenAI's Responses are not served here; ask POST /v1/chat/completions." if _RESPONSES.match(request.url.path)
               else "There is nothing at this address; here are /v1/chat/completions, /v1/completions and /v1/models.")
    said = {404: nothing, 405: "This address takes another method."}.get(error.status_code, str(error.detail))
    return await _refused(request, Refusal(said, error.status_code, code="unknown_url", headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal("The server made a mistake over this request; its log says which.", 500))


class Endpoints:
    """What answers each address."""

    def __init__(self, service: Service):
        self.service = service
        # Templates and tokenizers take milliseconds, long prompts seconds: others must not wait for them, nor take all cores.
        # A form that strangers wrote may take longer still: who asks for none does not stand behind those who do.
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="llmlab-preparing")
        self._forming = ThreadPoolExecutor(2, thread_name_prefix="llmlab-forming")

    async def health(self, request: Request) -> Response:
        stands = self.service.stands
        return JSONResponse({"status": stands}, 200 if stands == READY else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.service.text), headers={"content-type": metrics.CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        self.service.check()
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.service.check()
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict:
        service = self.service
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "llmlab",
                "max_model_len": service.engine.longest}

    def _check_name(self, name: str) -> None:
        if name != self.service.name:
            raise Refusal(f"The model '{name[:200]}' does not exist here; this server has '{self.service.name}'.", 404,
                          param="model", code="model_not_found")

    async def answer(self, kind: type, endpoint: str, request: Request) -> Response:
        """A chat's or a completion's answers, whole or as events."""
        try:
            self.service.check()
            with self.service.gate.reading():           # before the body is read: it takes memory, and time to understand
                body, run = await body_of(request, self.service.limits), asyncio.get_running_loop().run_in_executor
                asked = await run(self._preparing, self._asked, kind, body)
                question = await run(self._forming if has_form(asked) else self._preparing, self._question, asked)
            self.service.check()            # it may have been told to stop meanwhile
            talk = Talk(self.service, endpoint, question)
        except Refusal as refusal:
            self.service.outcomes.add(endpoint, outcome_of(refusal))
            raise
        if question.asked.stream:
            return Events(talk.events(), self.service.limits.send_seconds, talk.close)
        try:
            return JSONResponse(await unless_gone(request.receive, talk.whole()))
        except Gone:
            return Response(status_code=499)
        finally:
            talk.close()

    # ---- in a thread: everything about a request that takes time before the engine sees it ---------------------------

    def _asked(self, kind: type, body: bytes) -> Asked:
        asked = request_of(kind, object_of(body))
        self._check_name(asked.model)
        return asked

    def _question(self, asked: Asked) -> Question:
        engine, most = self.service.engine, min(self.service.limits.choices, self.service.gate.room)
        try:
            return question_of(asked, engine.words, engine.longest, most)
        except LabError as error:
            raise Refusal(f"{error}") from None
