"""What a request that cannot be answered gets: a status and one clear line, in the shape OpenAI's clients read."""

from collections.abc import Mapping


class Refusal(Exception):
    """Why a request is not answered. `status`: of HTTP; `param`: the parameter that is wrong; `code`: for programs; `headers`:
    what the response carries besides. OpenAI's error object: https://platform.openai.com/docs/guides/error-codes."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None,
                 type: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def too_long(tokens: int, context: int, param: str) -> Refusal:
    """A prompt that leaves no room for an answer."""
    return Refusal(f"This model's maximum context length is {context} tokens here, for a prompt and its answer, and the prompt "
                   f"is {tokens} tokens; shorten it.", param=param, code="context_length_exceeded")


def too_busy(seconds: int) -> Refusal:
    """As many requests are running and waiting as there may be."""
    return Refusal(f"The server is busy: as many requests wait as it takes. Try again in {seconds} s.", 429,
                   type="requests", code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def out_of_time(seconds: float) -> Refusal:
    """An answer that took longer than a request may; OpenAI's client is told that a second try would take as long."""
    return Refusal(f"The answer was not complete after {seconds:g} s, the longest a request may take here; ask for fewer "
                   "tokens.", 504, code="timeout", headers={"x-should-retry": "false"})


def not_ready(why: str) -> Refusal:
    """The model is still being loaded, the server is being stopped, or its engine has failed."""
    return Refusal(why, 503, code="unavailable", headers={"Retry-After": "5"})
