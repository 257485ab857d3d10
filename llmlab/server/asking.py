"""From a checked request to what the engine takes: prompts in tokens, options, the form an answer must have."""

from dataclasses import dataclass

from ..errors import LabError
from ..runtime.constraining import ANY_OBJECT, constraint
from ..runtime.generating import prompt_tokens
from ..runtime.sampling import Chooser, Constraint, Options
from .protocol import Asked, Chat, Completion, Message
from .refusals import Refusal, too_long
from .tools import Answer, Tools, conversation_tokens, tools_of


@dataclass(frozen=True)
class Question:
    """What a request asks of the engine. prompts: in tokens; texts: as they were given, for `echo`; choosers: of each prompt
    one for each answer. logprobs: how many of the likeliest tokens beside each (None: no chances at all). tools: what answers
    may call. asked: the request itself."""

    asked: Asked
    prompts: tuple[list[int], ...]
    texts: tuple[str, ...]
    options: Options
    choosers: tuple[list[Chooser], ...]
    logprobs: int | None = None
    tools: Tools | None = None

    @property
    def choices(self) -> int:
        return self.asked.n

    @property
    def answers(self) -> int:
        """How many there will be of all prompts."""
        return self.choices * len(self.prompts)

    @property
    def holding(self) -> str:
        """The parameter that holds answers to a form."""
        return "response_format" if _has_format(self.asked) else "tools"


def has_form(asked: Asked) -> bool:
    """Whether answers are held to a form, which may take a second to make out."""
    return _has_format(asked) or bool(isinstance(asked, Chat) and asked.tools)


def _has_format(asked: Asked) -> bool:
    return asked.response_format is not None and asked.response_format.type != "text"


def question_of(asked: Asked, words, context: int, most: int) -> Question:
    """What `asked` comes to, for a tokenizer, so many tokens of context, and up to `most` answers. Raises Refusal, naming the
    parameter."""
    chat = isinstance(asked, Chat)
    if (answers := asked.n * (1 if chat else len(asked.prompt))) > most:
        raise Refusal(f"The request asks for {answers} answers, and this server gives {most} at once.", param="n")
    tools = tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls) if chat else None
    prompts, texts = _conversation(asked, words, tools) if chat else _texts(asked, words)
    for tokens in prompts:
        if len(tokens) >= context:
            raise too_long(len(tokens), context, "messages" if chat else "prompt")
    logprobs = _chances(asked) if chat else asked.logprobs
    if not chat and asked.echo and logprobs is not None:
        raise Refusal("logprobs of an echoed prompt are not computed here; leave echo or logprobs out.", param="echo",
                      code="unsupported_parameter")
    if not chat and asked.max_tokens == 0 and not asked.echo:
        raise Refusal("max_tokens is 0, and without echo that asks for nothing; give 1 at least.", param="max_tokens",
                      code="invalid_value")
    options = _options(asked)
    # Made here, in a thread, once for all of them: a bias of a whole vocabulary takes a while.
    chooser = Chooser(options, mask=_form(asked, words, tools), bias=_bias(asked, len(words)),
                      presence_penalty=asked.presence_penalty, frequency_penalty=asked.frequency_penalty)
    choosers = tuple(chooser.several(asked.n) for _ in prompts)
    return Question(asked, prompts, texts, options, choosers, logprobs, tools)


def _texts(asked: Completion, words) -> tuple[tuple[list[int], ...], tuple[str, ...]]:
    prompts, texts = [], []
    for prompt in asked.prompt:
        if not isinstance(prompt, str) and not all(0 <= token < len(words) for token in prompt):
            raise Refusal(f"prompt has tokens that are none; this model's are 0 to {len(words) - 1}.", param="prompt")
        tokens = prompt_tokens(words, prompt) if isinstance(prompt, str) else prompt
        if not tokens:
            raise Refusal("prompt is empty; give a text to continue.", param="prompt")
        prompts.append(tokens)
        texts.append(prompt if isinstance(prompt, str) else words.decode(prompt))
    return tuple(prompts), tuple(texts)


def _conversation(asked: Chat, words, tools: Tools | None) -> tuple[tuple[list[int], ...], tuple[str, ...]]:
    messages = [_message(message, f"messages[{at}]") for at, message in enumerate(asked.messages)]
    try:
        tokens = conversation_tokens(words, messages, tools)
    except LabError as error:
        raise Refusal(f"{error}", param="messages") from None
    if not tokens:
        raise Refusal("messages come to an empty prompt.", param="messages")
    return (tokens,), ("",)


def _message(message: Message, place: str) -> dict:
    """A message as chat templates know them: text, and system for OpenAI's newer developer."""
    found = {"role": "system" if message.role == "developer" else message.role, "content": _content(message, place)}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return found


def _content(message: Message, place: str) -> str:
    """The text of a message; of several parts each on lines of its own."""
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise Refusal(f"Invalid value for '{place}.content': it is missing", param=f"{place}.content")
    if isinstance(message.content, str):
        return message.content
    for at, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            said = "its text is missing" if part.type == "text" else f"this model reads text only, and this is {part.type!r}"
            raise Refusal(f"Invalid value for '{place}.content[{at}]': {said}.", param=f"{place}.content[{at}].type")
    return "\n".join(part.text for part in message.content)


def _chances(asked: Chat) -> int | None:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return asked.top_logprobs or 0 if asked.logprobs else None


def _options(asked: Asked) -> Options:
    most = asked.max_tokens
    if isinstance(asked, Chat) and asked.max_completion_tokens is not None:
        most = asked.max_completion_tokens
    seed = None if asked.seed is None else asked.seed % 2**63
    most = most or None         # 0 is no limit of a text's: nothing is asked of the engine then
    return Options(temperature=asked.temperature, top_k=asked.top_k, top_p=max(asked.top_p, 1e-6), min_p=asked.min_p,
                   repeat_penalty=asked.repeat_penalty, seed=seed, max_tokens=most, stop=tuple(asked.stop))


def _bias(asked: Asked, many: int) -> dict[int, float]:
    bias = {}
    for token, value in asked.logit_bias.items():
        if not token.isascii() or not token.isdecimal() or len(token) > 10 or int(token) >= many:
            raise Refusal(f"logit_bias has {token[:40]!r}, which is no token of this model; they are 0 to {many - 1}.",
                          param="logit_bias")
        bias[int(token)] = value
    return bias


def _form(asked: Asked, words, tools: Tools | None) -> Constraint | None:
    answer = _answer(asked)
    if tools is not None:
        return tools.mask(words, answer)
    try:
        return answer and constraint(words, answer.schema, lenient=answer.lenient)
    except LabError as error:
        raise Refusal(f"{error}", param="response_format") from None


def _answer(asked: Asked) -> Answer | None:
    if not _has_format(asked):
        return None
    if asked.response_format.type == "json_object":
        return Answer(ANY_OBJECT)
    given = asked.response_format.json_schema
    if given is None or given.schema_ is None:
        raise Refusal("response_format of type json_schema needs json_schema with a schema.", param="response_format")
    return Answer(given.schema_, not given.strict)
