"""A plan's split as other engines say it: llama.cpp's options, accelerate's device_map, vLLM's --cpu-offload-gb.

None of them streams as a plan does: llama.cpp computes in place what it keeps in RAM and leaves the SSD to page faults,
accelerate loads layer by layer in 16 bits, vLLM copies from RAM. What they cannot say stands in a note.
"""

import os
from typing import TYPE_CHECKING

from ..errors import UnknownName
from ..exports import Command
from ..units import GB, GIB, format_bytes

if TYPE_CHECKING:
    from .planning import Plan


def export(plan: "Plan", engine: str) -> Command:
    """The split for an engine: "llama.cpp", "accelerate" or "vllm". Raises UnknownName for another."""
    if not isinstance(engine, str) or engine not in WRITERS:
        raise UnknownName(f"{str(engine)[:40]!r} takes no split here; there are {', '.join(WRITERS)}")
    notes: list[str] = []
    text = WRITERS[engine](plan, notes)
    notes = [" ".join(note.split()) for note in notes]
    return Command("".join(f"# {note}\n" for note in notes) + text, engine, tuple(notes))


def _file(p: "Plan", notes: list[str]) -> str:
    if p.spec.source == "gguf" and p.spec.path and p.quant == p.spec.stored:
        return os.path.abspath(p.spec.path)
    notes.append(f"Put the path of your GGUF of {p.spec.title} in {p.quant}.")
    return f"{p.spec.name.replace('/', '-')}-{p.quant}.gguf"


def _blocks(p: "Plan", *tiers: str) -> list[int]:
    """Numbers of the blocks whose own matrices lie there."""
    found = []
    for layer, tier in zip(p.shape.layers[:-1], p.arrangement.tiers, strict=False):
        if tier in tiers and layer.bytes:
            found.append(int(layer.name.split(".")[1]))
    return found


def _pattern(numbers: list[int], rest: str) -> str:
    return rf"blk\.({'|'.join(map(str, numbers))})\.{rest}"


def _llama(p: "Plan", notes: list[str]) -> str:
    """Every block on the card but those that the plan keeps elsewhere: named by --override-tensor, or, of experts, by the
    number of blocks with --n-cpu-moe."""
    a, blocks = p.arrangement, len(p.shape.layers) - 1
    lines = [["llama-server", "--model", _quoted(_file(p, notes))],
             ["--ctx-size", str(p.context), "--parallel", "1", "--batch-size", "2048", "--ubatch-size", "512"],
             ["--flash-attn", "on", "--cache-type-k", p.kv[0], "--cache-type-v", p.kv[1]]]
    away = _blocks(p, "ram", "ssd")
    head_away = a.tiers[-1] != "device"
    if p.site.card is None:
        lines.append(["--gpu-layers", "0", "--device", "none"])
        notes.append("On a processor llama.cpp maps the file: what does not fit RAM is read again by page faults.")
    else:
        lines.append(["--gpu-layers", str(blocks + 1)])
        patterns = [_pattern(away, r".*=CPU")] * bool(away)
        if head_away and p.spec.tied:
            notes.append("Not the same: the output matrix is the embedding, of which llama.cpp puts a copy on the card.")
        elif head_away:
            patterns.append(r"output\.weight=CPU")
        if patterns:
            lines.append(["--override-tensor", _quoted(",".join(patterns))])
        if p.shape.experts and not a.resident_experts:
            within = int(a.expert_slots / p.shape.experts * sum(1 for layer in p.shape.layers if layer.experts))
            first = max(blocks - within, 0)
            lines.append(["--n-cpu-moe", str(first)])
            notes.append(f"Not the same: llama.cpp has no cache of experts; the room of {a.expert_slots:,} holds those of the "
                         f"last {within} blocks, the others are computed by the processor.")
        if a.kv == "ram":
            lines.append(["--no-kv-offload"])
    if (away or head_away) and p.site.card is not None:
        notes.append("Not the same: what is not on the card llama.cpp computes on the processor, where the plan streams it.")
    if p.used("ssd"):
        lines.append(["--load-mode", "mmap"])
        notes.append(f"The plan keeps {format_bytes(p.used('ssd'))} on the SSD; here the mapped file and the system's page "
                     "cache stand for it, by page faults.")
    lines.append(["--fit", "off"])
    return " \\\n  ".join(" ".join(line) for line in lines) + "\n"


def _quoted(text: str) -> str:
    from shlex import quote
    return quote(text)


def _accelerate(p: "Plan", notes: list[str]) -> str:
    """A device_map by module names as transformers' decoders have them."""
    places = {"device": "0" if p.site.card is not None else '"cpu"', "ram": '"cpu"', "ssd": '"disk"'}
    rows = {"model.embed_tokens": '"cpu"' if p.site.card is not None else places["device"]}
    a, seen = p.arrangement, 0
    for layer, tier in zip(p.shape.layers[:-1], a.tiers, strict=False):
        if layer.experts and not a.resident_experts:              # whole layers, as many as the plan's room holds experts of
            seen += layer.experts
            tier = "device" if seen <= a.expert_slots else "ram" if seen <= a.expert_slots + a.ram_experts else "ssd"
        rows[f"model.layers.{layer.name.split('.')[1]}"] = places[tier]
    rows |= {"model.norm": places["device"], "model.rotary_emb": places["device"], "lm_head": places[p.arrangement.tiers[-1]]}
    if p.spec.tied:
        rows["model.embed_tokens"] = rows["lm_head"]
        notes.append("Embedding and output are one tensor: both must have the same place.")
    notes.append("accelerate offloads 16-bit weights only: several times the bytes of the plan, so the same budgets hold fewer "
                 "layers. Its disk offload writes all of them to the folder first, which wears a drive a little.")
    if p.shape.experts and not p.arrangement.resident_experts:
        notes.append("Not the same: accelerate moves whole layers, every expert for each token.")
    body = "".join(f"    {name!r}: {place},\n" for name, place in rows.items())
    name = p.spec.path if p.spec.source == "config" and p.spec.path else _hub(p, notes)
    return ("from transformers import AutoModelForCausalLM\n\ndevice_map = {\n" + body + "}\n"
            f"model = AutoModelForCausalLM.from_pretrained(\n    {name!r},\n    device_map=device_map,\n"
            "    offload_folder=\"offload\",\n    dtype=\"auto\",\n)\n")


def _hub(p: "Plan", notes: list[str]) -> str:
    from ..catalog import entries
    if p.spec.source == "catalogue" and p.spec.name in entries():
        return entries()[p.spec.name].hub_id
    notes.append(f"Put the folder or the hub name of the checkpoint of {p.spec.title}.")
    return p.spec.name


def _vllm(p: "Plan", notes: list[str]) -> str:
    size = -(-p.streamed // GIB)
    notes.append("vLLM 0.33 loads no GGUF: give a checkpoint quantized as tightly (AWQ, GPTQ); --cpu-offload-gb is in GiB and "
                 f"counts what stays in RAM, here {p.streamed / GB:.1f} GB.")
    if p.used("ssd"):
        notes.append(f"Not the same: vLLM has no SSD tier; {format_bytes(p.used('ssd'))} more of RAM are needed than the plan "
                     "has.")
    if p.arrangement.kv == "ram":
        notes.append("Not the same: the KV cache stays on the card.")
    lines = [["vllm", "serve", _quoted(_hub(p, notes))], ["--max-model-len", str(p.context), "--max-num-seqs", "1"],
             ["--cpu-offload-gb", str(size)]]
    return " \\\n  ".join(" ".join(line) for line in lines) + "\n"


WRITERS = {"llama.cpp": _llama, "accelerate": _accelerate, "vllm": _vllm}
"""What export() knows."""

__all__ = ["WRITERS", "export"]
