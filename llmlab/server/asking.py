"""From a checked request to what the engine takes: prompts in tokens, options, the form an answer must have."""

from dataclasses import dataclass, replace

from ..errors import LabError
from ..runtime.constraining import constraint
from ..runtime.generating import prompt_tokens
from ..runtime.sampling import Chooser, Constraint, Options
from .protocol import Asked, Chat, Completion, Message
from .refusals import Refusal, too_long
from .tools import Tools, conversation_tokens, tools_of


@dataclass(frozen=True)
class Question:
    """What a request asks of the engine. prompts: in tokens; texts: as they were given, for `echo`; choices: answers to each.
    logprobs: how many of the likeliest tokens beside each (None: no chances at all). form: what answers must be. tools: what
    they may call. asked: the request itself."""

    asked: Asked
    prompts: tuple[list[int], ...]
    texts: tuple[str, ...]
    options: Options
    bias: dict[int, float]
    logprobs: int | None = None
    form: Constraint | None = None
    tools: Tools | None = None

    @property
    def choices(self) -> int:
        return self.asked.n

    @property
    def answers(self) -> int:
        """How many there will be of all prompts."""
        return self.choices * len(self.prompts)

    def chooser(self, choice: int) -> Chooser:
        """For one answer. With a seed each choice draws by its own: the seed, the next, and so on."""
        seed = self.options.seed
        options = self.options if seed is None else replace(self.options, seed=(seed + choice) % 2**63)
        return Chooser(options, mask=self.form and self.form.fork(), bias=self.bias,
                       presence_penalty=self.asked.presence_penalty, frequency_penalty=self.asked.frequency_penalty)


def question_of(asked: Asked, words, context: int) -> Question:
    """What `asked` comes to, for a tokenizer and so many tokens of context. Raises Refusal, naming the parameter."""
    chat = isinstance(asked, Chat)
    tools = tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls) if chat else None
    prompts, texts = _conversation(asked, words, tools) if chat else _texts(asked, words)
    for tokens in prompts:
        if len(tokens) >= context:
            raise too_long(len(tokens), context, "messages" if chat else "prompt")
    logprobs = _chances(asked) if chat else asked.logprobs
    if not chat and asked.echo and logprobs is not None:
        raise Refusal("logprobs of an echoed prompt are not computed here; leave echo or logprobs out.", param="echo",
                      code="unsupported_parameter")
    form = _form(asked, words)
    if form is not None and tools is not None and tools.forced:
        raise Refusal("response_format is for answers, and tool_choice asks for a call; leave one of them out.",
                      param="response_format")
    if form is None and tools is not None:
        form = tools.mask(words)
    return Question(asked, prompts, texts, _options(asked), _bias(asked, len(words)), logprobs, form, tools)


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


def _form(asked: Asked, words) -> Constraint | None:
    format = asked.response_format
    if format is None or format.type == "text":
        return None
    if format.type == "json_schema" and (format.json_schema is None or format.json_schema.schema_ is None):
        raise Refusal("response_format of type json_schema needs json_schema with a schema.", param="response_format")
    try:
        if format.type == "json_object":
            return constraint(words, "json")
        return constraint(words, format.json_schema.schema_, lenient=not format.json_schema.strict)
    except LabError as error:
        raise Refusal(f"{error}", param="response_format") from None
