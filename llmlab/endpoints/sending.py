"""What may be sent: JSON and nothing else, so that what was looked through, counted and shown is what leaves."""

import math
from collections.abc import Mapping

from ..errors import LabError

# What is billed by other counts than the tokens of a text: a cap cannot know it before.
_BESIDE = ("audio", "modalities", "prediction", "service_tier", "web_search_options")


def as_json(value):
    """The same in dicts, lists, texts and numbers; OpenAI's own objects as its client writes them. An iterator would be empty
    the second time, and an object unknown here would leave unread. Raises LabError for what is neither."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise LabError("a text has half a character (a lone surrogate), which cannot be sent; take it out")
        return str(value)
    if value is None or isinstance(value, (bool, int)) or isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {as_json(name): as_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return as_json(value.model_dump(mode="json", exclude_unset=True))
    raise LabError(f"a {type(value).__name__} cannot be sent ({value!r:.40}); give texts, numbers, lists and dicts")


def beside_text(body: dict) -> str:
    """What of a body costs more than its text does, in a word; "" where nothing does."""
    for name in _BESIDE:
        if body.get(name) is not None:
            return name
    for one in body["messages"]:
        content = one.get("content")
        parts = content if isinstance(content, list) else [] if content is None or isinstance(content, str) else [content]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                return str(part.get("type") if isinstance(part, dict) else "content")[:40]
        if one.get("audio") is not None:
            return "audio"
    tools = body.get("tools") or []
    kinds = [one.get("type") if isinstance(one, dict) else None for one in (tools if isinstance(tools, list) else [tools])]
    return next((f"tool {kind}"[:40] for kind in kinds if kind not in ("function", "custom")), "")
