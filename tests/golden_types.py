"""golden/snapshot_types.json: which type llama.cpp gives each tensor of a dozen large models, in 33 file types.

For every model and file type it holds the default type and the exceptions, by tensor name without the block and by
ranges of blocks: {"Q4_K_M": {"default": "Q4_K", "attn_v.weight": {"Q6_K": "0-6,9-60/3"}}}. Tensors outside blocks
have their whole name and no range ("").
"""

from functools import cache
from json import loads
from pathlib import Path

from llmlab.catalog import entry
from llmlab.formats.mixes import quantizable
from llmlab.shapes import ModelSpec, from_config

PATH = Path(__file__).parent / "golden" / "snapshot_types.json"


@cache
def golden() -> dict:
    return loads(PATH.read_text("utf-8"))


def spec_of(model: dict) -> ModelSpec:
    """The spec a snapshot was made of: a model of the catalogue (or none), its config changed."""
    base = dict(entry(model["catalogue"]).config) if "catalogue" in model else {}
    return from_config({**base, **model["changes"]}, model.get("catalogue", "snapshot"))


def expand(ranges: str) -> list[int]:
    """Block numbers of "0-6,9-60/3"."""
    found: list[int] = []
    for part in ranges.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def contract(blocks: list[int]) -> str:
    """The ranges of ascending block numbers, greedily with any step."""
    parts, i = [], 0
    while i < len(blocks):
        j = i + 1
        step = blocks[j] - blocks[i] if j < len(blocks) else 1
        while j < len(blocks) and blocks[j] - blocks[j - 1] == step:
            j += 1
        if j - i == 2 and step > 1:       # two of a kind are no pattern
            j = i + 1
        parts.append(str(blocks[i]) if j == i + 1 else f"{blocks[i]}-{blocks[j - 1]}{f'/{step}' if step > 1 else ''}")
        i = j
    return ",".join(parts)


def exceptions(coded: dict) -> dict[str, str]:
    """{tensor name: type} of one file type's exceptions."""
    found = {}
    for name, by_type in coded.items():
        if name == "default":
            continue
        for type, ranges in by_type.items():
            for full in ([name] if not ranges else [f"blk.{i}.{name}" for i in expand(ranges)]):
                assert full not in found, full
                found[full] = type
    return found


def differences(spec: ModelSpec, chosen: dict[str, str], default: str, other: dict[str, str]) -> tuple[int, list[str]]:
    """(cells compared, a line for each that differs) of one file type: only what llama-quantize touches has a cell."""
    names = [t.name for t in spec.tensors if quantizable(t)]
    lines = [f"{name} is unknown to us" for name in sorted(set(other) - set(names))]
    lines += [f"{name} is {other.get(name, default)}, we say {chosen[name]}"
              for name in names if chosen[name] != other.get(name, default)]
    return len(names), lines
