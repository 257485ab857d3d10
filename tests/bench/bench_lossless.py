"""The lossless codec: how near the floor, and how fast beside memory, a copy and general compressors.

    python tests/bench/bench_lossless.py [--json FILE] [--weights 16] [MODEL ...]

Normally distributed weights (spread 0.02), `--weights` millions, and the models given (.safetensors, folders, .gguf, rounded to
BF16; a GGUF's blocks are dequantized first, which is said). Bits a weight beside the floor: the entropy of the exponents and
8 bits. Rates are of the plain tensor's bytes, the fastest of rounds, all ways taking turns; `of a copy` is over what copying
the same tensor moves. zlib (level 1) and, where they are installed, zstandard and lz4 get the same bytes, and the same
bytes with low and high ones apart, which is what helps them most. Decoding checks every byte against a checksum.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from datetime import date
from importlib import import_module
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import lossless  # noqa: E402

pytestmark = pytest.mark.bench

ROUNDS, LIMIT = 5, 1 << 25      # weights of a model that are timed


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def others() -> dict[str, tuple[Callable, Callable]]:
    """name -> (compress, decompress) of what is installed."""
    found = {"zlib -1": (lambda data: zlib.compress(data, 1), zlib.decompress)}
    for name, module, level in (("zstd -3", "zstandard", 3), ("lz4", "lz4.frame", None)):
        try:
            loaded = import_module(module)
        except ImportError:
            continue
        if level is None:
            found[name] = loaded.compress, loaded.decompress
        else:
            found[name] = loaded.ZstdCompressor(level).compress, loaded.ZstdDecompressor().decompress
    return found


def one_tensor(name: str, tensor: torch.Tensor) -> dict:
    """Sizes and rates of a bfloat16 tensor."""
    floor, coded = lossless.entropy(tensor, name), lossless.encode(tensor)
    assert torch.equal(lossless.decode(coded).view(torch.int16), tensor.view(torch.int16))
    plain = tensor.reshape(-1).view(torch.uint8).numpy()
    apart = plain.reshape(-1, 2).T.copy().tobytes()
    into = torch.empty_like(tensor)
    ways: dict[str, tuple[Callable, Callable, int]] = {
        "llmlab": (lambda: lossless.encode(tensor), lambda: lossless.decode(coded), coded.data.nbytes)}
    for way, (pack, unpack) in others().items():
        for kind, data in ((way, plain.tobytes()), (f"{way}, bytes apart", apart)):
            made = pack(data)
            ways[kind] = lambda d=data, p=pack: p(d), lambda m=made, u=unpack: u(m), len(made)
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        times.setdefault("copy", []).append((seconds(lambda: into.copy_(tensor)),) * 2)
        for way, (pack, unpack, _) in ways.items():
            times.setdefault(way, []).append((seconds(pack), seconds(unpack)))
    rates = {way: [len(plain) / min(column) for column in zip(*taken, strict=True)] for way, taken in times.items()}
    return {"name": name, "weights": tensor.numel(), "floor": floor.bits, "exponent": floor.exponent, "sign": floor.sign,
            "mantissa": floor.mantissa, "bits": {way: 8 * size / tensor.numel() for way, (*_, size) in ways.items()},
            "rates": rates}


def weights_of(model: str) -> torch.Tensor:
    """The first weights of a model's large tensors in a row, bfloat16."""
    from llmlab.lossless import measuring
    from llmlab.stores import place_of
    place = place_of(model)
    found, parts = 0, []
    source = measuring._of_gguf(place, True) if place.suffix == ".gguf" else measuring._of_safetensors(place)
    for _, tensor, _ in source:
        if tensor is not None and tensor.is_floating_point() and tensor.ndim > 1 and found < LIMIT:
            parts.append(tensor.bfloat16().reshape(-1))
            found += tensor.numel()
    return torch.cat(parts)[:LIMIT]


def measure(millions: int, models: list[str]) -> dict:
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    normal = (torch.randn(millions << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    cases = [one_tensor("normal", normal), *(one_tensor(Path(model).name, weights_of(model)) for model in models)]
    return {"date": date.today().isoformat(), "cpu": llmlab.machine().cpu.name, "threads": torch.get_num_threads(),
            "load_before": before, "cases": cases}


def show(found: dict) -> None:
    print(f"{found['date']}, {found['cpu']}, {found['threads']} threads, load {found['load_before']} before")
    for case in found["cases"]:
        copy = case["rates"]["copy"][0]
        print(f"{case['name']}: {case['weights'] / 1e6:.0f} M weights; sign {case['sign']:.3f}, "
              f"exponent {case['exponent']:.3f}, mantissa {case['mantissa']:.3f} bits; floor {case['floor']:.3f}; "
              f"a copy {copy / 1e9:.1f} GB/s")
        print("                         bits  of floor   encode   decode  MB/s   of a copy: encode  decode   s/GB decoded")
        for way, bits in case["bits"].items():
            encode, decode = case["rates"][way]
            print(f"  {way:<21}{bits:7.3f}  {bits / case['floor']:8.4f}  {encode / 1e6:7.0f}  {decode / 1e6:7.0f}        "
                  f"{encode / copy:17.3f} {decode / copy:7.3f}  {1e9 / decode:12.2f}", flush=True)


def test_lossless_beside_other_compressors():
    show(measure(2, []))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--weights", type=int, default=16)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = measure(asked.weights, asked.models)
    show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
