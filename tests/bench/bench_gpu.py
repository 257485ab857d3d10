"""An 8B-shaped model on a card, one token after another: tokens per second and the share of the card's bandwidth that is used.

    python tests/bench/bench_gpu.py [--json FILE] [--quants Q4_K_M,IQ4_XS,Q3_K_S] [--context 4096] [--no-peers] [--no-compile]

The shapes are those of Llama 3 8B; the weights are random valid blocks, written to a GGUF as llama-quantize would mix their
types, and opened by the lean decoder in bfloat16, "fast". Beside them bitsandbytes NF4 and bfloat16: in the same decoder
(another multiplication, everything else alike) and in transformers' own modules. Each matrix alone is timed too.

Bandwidth is what a copy of a large buffer moves, read and written. Two shares are given: of the bytes that the file holds for
the matrices a token reads ("file", what a perfect kernel would have to read), and of the bytes that were laid down for this
card ("held", how well what is there is streamed). KLD is the mean divergence from the same file in float32, over 32 tokens.

Without a card it says so and ends. Nothing here fails for being slow.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import memory  # noqa: E402
from llmlab.formats import FORMATS, dequantize  # noqa: E402
from llmlab.gguf import write_gguf  # noqa: E402
from llmlab.kernels import Packed  # noqa: E402
from llmlab.runtime.decoder import Decoder  # noqa: E402
from llmlab.runtime.graphing import Replay  # noqa: E402
from llmlab.units import GIB, MIB  # noqa: E402

pytestmark = pytest.mark.bench

LLAMA_3_8B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
              "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
              "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False}
QUANTS = ("Q4_K_M", "IQ4_XS", "Q3_K_S")
PEERS = ("bf16", "nf4")
BF16 = torch.bfloat16
POOL = 4099             # random blocks of a type; a prime, so that rows differ
STD = 0.02              # of the weights, as trained ones have it about
PROMPT, SCORED = 16, 32


# -- the model ---------------------------------------------------------------------------------------------------------


def write_model(path: Path, shape: dict, quant: str) -> None:
    """A GGUF of random weights in the types that llama-quantize gives `quant`; the same bytes each time."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        spec = llmlab.model(Path(folder))
    heads = shape["num_attention_heads"]
    keys = {"context_length": shape["max_position_embeddings"], "embedding_length": shape["hidden_size"],
            "block_count": shape["num_hidden_layers"], "feed_forward_length": shape["intermediate_size"],
            "attention.head_count": heads, "attention.head_count_kv": shape["num_key_value_heads"],
            "attention.layer_norm_rms_epsilon": shape["rms_norm_eps"], "rope.freq_base": shape["rope_theta"],
            "rope.dimension_count": shape["hidden_size"] // heads, "vocab_size": shape["vocab_size"]}
    random = np.random.default_rng(0)
    pools: dict[str, np.ndarray] = {}
    write_gguf(path, {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in keys.items()},
               [(t.name, t.shape, type, lambda t=t, type=type: tensor(t.elements, type, pools, random))
                for t, type in zip(spec.tensors, memory.types(spec, quant), strict=True)])


def tensor(elements: int, type: str, pools: dict[str, np.ndarray], random: np.random.Generator) -> bytes:
    """So many weights of a type: ones for norms, random blocks, repeated from a pool of them, for the others."""
    if type == "F32":
        return np.ones(elements, np.float32).tobytes()
    if type not in pools:
        pools[type] = blocks(type, random)
    count = elements // FORMATS[type].block
    return np.take(pools[type], np.arange(count) + random.integers(POOL), axis=0, mode="wrap").tobytes()


def blocks(type: str, random: np.random.Generator) -> np.ndarray:
    """Random valid blocks whose weights spread as STD says: random bytes, with the block's own numbers set."""
    if type in ("F16", "BF16"):
        numbers = torch.from_numpy(random.normal(0, STD, (POOL, 1))).to({"F16": torch.float16, "BF16": BF16}[type])
        return numbers.view(torch.uint8).numpy()
    layout = FORMATS[type]
    found = random.integers(0, 256, (POOL, layout.block_bytes), dtype=np.uint8)
    numbers = [field for field in layout.fields if "float16" in field.what and field.stop - field.start == 2]

    def scaled(by: float) -> float:
        for field in numbers:
            found[:, field.start:field.stop] = np.frombuffer(np.float16(by).tobytes(), np.uint8)
        return float(dequantize(torch.from_numpy(found), type).std())

    scaled(0.01 * STD / scaled(0.01))
    return found


# -- bytes -------------------------------------------------------------------------------------------------------------


def matrices(decoder: Decoder) -> list[tuple[dict, str, Packed]]:
    """The matrices that every token reads: (where it is kept, by what name, the matrix)."""
    return [(part, name, value) for part in (*decoder.weights.layers, decoder.weights.head) for name, value in part.items()
            if isinstance(value, Packed)]


def file_bytes(decoder: Decoder) -> int:
    """Bytes of the file that a token cannot do without."""
    return sum(packed.blocks.nbytes for _, _, packed in matrices(decoder))


def held_bytes(decoder: Decoder) -> int:
    """Bytes of what is multiplied by instead."""
    return sum(_held(packed) for _, _, packed in matrices(decoder))


def _held(packed: Packed) -> int:
    return packed.kernels[0].bytes() or packed.blocks.nbytes


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the best of some."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**28
    source = torch.ones(min(GIB, free // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


# -- what takes part ---------------------------------------------------------------------------------------------------


class Bf16:
    """Numbers, as torch multiplies them."""

    def __init__(self, weights: torch.Tensor):
        self.weights = weights.to(BF16)

    def bytes(self) -> int:
        return self.weights.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weights)


class Nf4:
    """bitsandbytes' 4-bit matmul, scales in float32 as transformers asks for them: 4.5 bits a weight."""

    def __init__(self, weights: torch.Tensor):
        from bitsandbytes.nn import Params4bit
        self.weights = Params4bit(weights.to(BF16), requires_grad=False, quant_type="nf4",
                                  compress_statistics=False).to(weights.device)

    def bytes(self) -> int:
        return self.weights.nbytes + self.weights.quant_state.absmax.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import matmul_4bit
        return matmul_4bit(x, self.weights.t(), quant_state=self.weights.quant_state)


def other_kernels(decoder: Decoder, kind: str) -> None:
    """Every matrix by a peer's multiplication; NF4 leaves the output matrix in bfloat16, as bitsandbytes does."""
    for part, name, packed in matrices(decoder):
        weights = packed.kernels[0].dense(BF16)
        made = Nf4(weights) if kind == "nf4" and name != "output" else Bf16(weights)
        part[name] = replace(packed, kernels=(made,), blocks=packed.blocks[:0])


class Modules:
    """transformers' own modules with random weights, their Linears by bitsandbytes or as they are; a Decoder's protocol."""

    def __init__(self, shape: dict, kind: str, device: torch.device):
        from transformers import AutoConfig, AutoModelForCausalLM
        fields = {key: value for key, value in shape.items() if key != "model_type"}
        with device:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape["model_type"], **fields), dtype=BF16)
        for name, module in list(model.named_modules()):
            if kind == "nf4" and isinstance(module, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, Linear(Nf4(module.weight.data)))
        self.model, self.device = model.requires_grad_(False).eval(), device
        self.forget()

    def forget(self) -> None:
        from transformers import DynamicCache
        self.cache = DynamicCache(config=self.model.config)

    def read(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            out = self.model(torch.tensor([tokens], device=self.device), past_key_values=self.cache, use_cache=True,
                             logits_to_keep=1)
        return out.logits[0, -1]

    def bytes(self) -> int:
        linear = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        return sum(m.weight.nbytes for m in linear) + sum(
            m.held.bytes() for m in self.model.modules() if isinstance(m, Linear))


class Linear(torch.nn.Module):
    """A peer's multiplication in the place of a module."""

    def __init__(self, held: Nf4):
        super().__init__()
        self.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held.matmul(x)


# -- measuring ---------------------------------------------------------------------------------------------------------


def decode(model, vocabulary: int, device: torch.device, tokens: int, rounds: int, context: int) -> list[float]:
    """Seconds a token of each round: greedy, after a prompt; the first tokens, when graphs are captured, are not counted."""
    random, took = np.random.default_rng(1), []
    model.forget()
    token = int(model.read(random.integers(0, vocabulary, max(PROMPT, context)).tolist()).argmax())
    for _ in range(3):
        token = int(model.read([token]).argmax())

    def some():
        nonlocal token
        for _ in range(tokens):
            token = int(model.read([token]).argmax())

    for _ in range(rounds):
        took.append(seconds(some, device) / tokens)
    return took


@torch.inference_mode()
def divergence(decoder: Decoder, true: torch.Tensor, tokens: list[int]) -> float:
    """Mean KL divergence (nats) of the logits after each of the tokens, read one by one as when it decodes, from `true`."""
    decoder.forget()
    mine = torch.stack([decoder.read([token]) for token in tokens])
    p, q = (logits.double().log_softmax(-1) for logits in (true, mine))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.inference_mode()
def each_matrix(decoder: Decoder, rate: float, rounds: int) -> list[dict]:
    """Every kind of matrix alone at one token, as many copies after each other as no cache holds, in one graph."""
    kinds: dict[tuple, list[Packed]] = {}
    for _, name, packed in matrices(decoder):
        kinds.setdefault((name, packed.format, packed.rows, packed.cols), []).append(packed)
    lines = []
    for (name, format, height, width), all_of in kinds.items():
        some = all_of[:max(1, -(-256 * MIB // _held(all_of[0])))]
        x = torch.ones(1, width, dtype=BF16, device=decoder.device)

        def run(x, some=some):
            for packed in some:
                y = packed.kernels[0].matmul(x)
            return y

        replay = Replay(run, x)
        replay(x)
        best = min(seconds(lambda replay=replay, x=x: replay(x), decoder.device) for _ in range(max(3, rounds))) / len(some)
        lines.append({"matrix": name, "format": format, "rows": height, "cols": width, "copies": len(some), "seconds": best,
                      "held": _held(some[0]) / rate / best, "file": some[0].blocks.nbytes / rate / best, "why": some[0].why})
    return lines


def report(device: torch.device, shape: dict = LLAMA_3_8B, quants=QUANTS, peers=PEERS, tokens: int = 64, rounds: int = 5,
           context: int = 0, fused=(False, True), folder: Path | None = None) -> dict:
    """Measures all, prints a table, and gives both back with what ran them."""
    rate, lines, ops, vocabulary = copy_rate(device), [], [], shape["vocab_size"]
    head = about(device) | {"bandwidth": rate, "shape": shape, "context": max(PROMPT, context), "tokens": tokens}
    print(f"\n{head['card']}, torch {head['torch']}, a copy moves {rate / 1e9:.0f} GB/s", flush=True)
    scored = np.random.default_rng(2).integers(0, vocabulary, SCORED).tolist()

    def line(name: str, way: str, took: list[float], file: int, held: int, kld: float | None, why: str) -> None:
        lines.append({"name": name, "way": way, "seconds": min(took), "median": median(took), "rounds": took,
                      "tokens_per_second": 1 / min(took), "file_bytes": file, "held_bytes": held,
                      "file": file / rate / min(took), "held": held / rate / min(took), "kld": kld, "why": why})
        print(row(lines[-1]), flush=True)

    with tempfile.TemporaryDirectory(dir=folder) as place:
        print(TITLE, flush=True)
        for quant in quants:
            path = Path(place) / f"{quant}.gguf"
            write_model(path, shape, quant)
            true = Decoder.open(path, dtype=torch.float32, strategy="compact", device=device).logits(scored)
            ours = Decoder.open(path, dtype=BF16, strategy="fast", device=device)
            for ours.fused in fused:
                ours.forget()
                kld = divergence(ours, true, scored)
                took = decode(ours, vocabulary, device, tokens, rounds, context)
                step = ours.step.why if ours.step else "no graph"
                line(quant, "llmlab compiled" if ours.fused else "llmlab fast", took, file_bytes(ours), held_bytes(ours), kld,
                     f"{step}; {ours.why}")
            ops += [one | {"quant": quant} for one in each_matrix(ours, rate, rounds)]
            del ours, true
            if quant == quants[-1]:
                for kind in peers:
                    theirs = Decoder.open(path, dtype=BF16, strategy="compact", device=device)
                    other_kernels(theirs, kind)
                    took = decode(theirs, vocabulary, device, tokens, rounds, context)
                    step = theirs.step.why if theirs.step else "no graph"
                    line(kind, "in this decoder", took, held_bytes(theirs), held_bytes(theirs), None, step)
                    del theirs
            path.unlink()
        for kind in peers:
            theirs = Modules(shape, kind, device)
            took = decode(theirs, vocabulary, device, tokens, rounds, context)
            line(kind, "transformers", took, theirs.bytes(), theirs.bytes(), None, "its own modules, DynamicCache")
            del theirs
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for one in ops:
        print(f"{one['quant']:8}{one['matrix']:10}{one['format']:8}{one['rows']:>7}x{one['cols']:<6}"
              f"{one['seconds'] * 1e6:>9.1f} us{one['held']:>7.2f} held{one['file']:>7.2f} file  {one['why']}")
    return head | {"lines": lines, "ops": ops}


TITLE = f"{'model':9}{'way':16}{'tokens/s':>9}{'median':>8}{'file':>7}{'held':>7}{'GB file':>9}{'GB held':>9}{'KLD':>9}  why"


def row(line: dict) -> str:
    kld = "" if line["kld"] is None else f"{line['kld']:.1e}"
    return (f"{line['name']:9}{line['way']:16}{line['tokens_per_second']:>9.1f}{1 / line['median']:>8.1f}{line['file']:>7.2f}"
            f"{line['held']:>7.2f}{line['file_bytes'] / 1e9:>9.2f}{line['held_bytes'] / 1e9:>9.2f}{kld:>9}  {line['why']}")


def about(device: torch.device) -> dict:
    """What ran it."""
    found = {"date": date.today().isoformat(), "torch": torch.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "memory": card.total_memory,
                  "cuda": torch.version.cuda, "driver": llmlab.machine().versions.get("NVIDIA driver")}
    else:
        found |= {"card": device.type}
    try:
        import bitsandbytes
        import transformers
        found |= {"bitsandbytes": bitsandbytes.__version__, "transformers": transformers.__version__}
    except ImportError:
        pass
    return found


def test_a_card():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    found = report(torch.device("cuda"), tokens=32, rounds=3)
    print(json.dumps({line["name"] + ", " + line["way"]: round(line["tokens_per_second"], 1) for line in found["lines"]}))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to keep what was measured")
    parser.add_argument("--quants", default=",".join(QUANTS))
    parser.add_argument("--context", type=int, default=0, help="tokens read before the first that is timed")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs Triton on a card")
    asked = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing is measured", file=sys.stderr)
        return 1
    answer = report(torch.device("cuda"), quants=tuple(asked.quants.split(",")), peers=() if asked.no_peers else PEERS,
                    context=asked.context, fused=(False,) if asked.no_compile else (False, True))
    if asked.json:
        asked.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
