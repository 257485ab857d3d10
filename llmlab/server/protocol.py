"""The requests of OpenAI's API as pydantic models: what a chat or a completion may ask for, within which ranges.

Fields and ranges are those of OpenAI's reference (platform.openai.com/docs/api-reference, chat/create and completions/create).
A parameter that would change the answer and that we do not have is refused by name; one that changes nothing is ignored. Beyond
OpenAI's there are `top_k`, `min_p` and `repeat_penalty`, as other local servers have them.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .refusals import Refusal

# They change no answer here: labels, storage, billing, hints that only make OpenAI's servers quicker.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                     "prompt_cache_retention", "prediction"})
# They would change it, but for these values, which ask for what is done anyway; and what to do instead.
REFUSED: dict[str, tuple[tuple, str]] = {
    "functions": (([],), "give tools"), "function_call": (("none", "auto"), "give tool_choice"),
    "modalities": ((["text"],), "this server writes text only"), "audio": ((), "this server writes text only"),
    "web_search_options": ((), "this server has no web search"), "suffix": (("",), "this server continues a prompt at its end"),
    "reasoning_effort": (("none",), "this server sets no effort of reasoning"),
    "verbosity": (("medium",), "ask for it in a message"), "best_of": ((1,), "ask for n answers and choose"),
}


class Part(BaseModel):
    """A part of a message; of those OpenAI has only text can be read here."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: str = Field(max_length=40)
    text: str | None = None


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    name: str = Field(min_length=1, max_length=256)
    arguments: str = ""


class Call(BaseModel):
    """A tool call the model made in an earlier turn."""

    model_config = ConfigDict(strict=True, extra="ignore")
    id: str = Field(default="", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = Field(default=None, max_length=256)
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")      # include_obfuscation: padding, which is never sent here
    include_usage: bool | None = None


class JSONSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)
    name: str = Field(default="answer", max_length=256)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None          # otherwise keywords that cannot be followed are passed over


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    right = isinstance(stops, list) and len(stops) <= 16
    if not right or not all(isinstance(one, str) and 0 < len(one) <= 1000 for one in stops):
        raise ValueError("give a text, or up to 16 of them, none empty or longer than 1,000 characters")
    return stops


def _prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four ways to give prompts, as a list of prompts."""
    def is_tokens(one) -> bool:
        return isinstance(one, list) and bool(one) and all(type(token) is int for token in one)

    prompts = [value] if isinstance(value, str) or is_tokens(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) or is_tokens(one) for one in prompts):
        raise ValueError("give a text, a list of texts, a list of tokens, or a list of lists of tokens")
    return prompts


class Asked(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str = Field(max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=-2**63, le=2**63 - 1)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    response_format: ResponseFormat | None = None
    top_k: int = Field(default=0, ge=0, le=2**31 - 1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repeat_penalty: float = Field(default=1.0, ge=0.01, le=100)


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = Field(default=None, max_length=128)
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class Completion(Asked):
    """POST /v1/completions. A prompt that is left out would be OpenAI's <|endoftext|>; here there must be one."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts), Field(max_length=128)]
    max_tokens: int | None = Field(default=16, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False


Kind = TypeVar("Kind", bound=Asked)


def request_of(kind: type[Kind], body: dict) -> Kind:
    """A body as `kind`; null is as if it were not there. Raises Refusal, naming the parameter."""
    given = {name: value for name, value in body.items() if value is not None}
    if "model" not in given:
        raise Refusal("you must provide a model parameter", param="model")
    if given.get("best_of") == given.get("n", 1):
        given.pop("best_of", None)
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    for name, value in (asked.model_extra or {}).items():
        _check_extra(name, value)
    return asked


def _check_extra(name: str, value: Any) -> None:
    if name in IGNORED:
        return
    if name not in REFUSED:
        raise Refusal(f"Unrecognized request argument supplied: {name[:100]}", param=name[:100], code="unknown_parameter")
    neutral, instead = REFUSED[name]
    if value not in neutral:
        raise Refusal(f"{name} is not supported here; {instead}.", param=name, code="unsupported_parameter")


def _refusal(error: ValidationError) -> Refusal:
    """The first thing that is wrong, by OpenAI's way of naming places: messages[0].content."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    place = ""
    for at in first["loc"]:
        if isinstance(at, int):
            place += f"[{at}]"
        elif at not in ("str", "list[Part]", "bool", "dict[str,any]", "[key]"):         # pydantic's names of a union's sides
            place += f".{at[:100]}" if place else at[:100]
    said = "it is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return Refusal(f"Invalid value for '{place}': {said[:300]}", param=place,
                   code="missing_required_parameter" if first["type"] == "missing" else "invalid_value")
