"""How fast llama.cpp is on this processor, beside what llmlab says before and after the machine was measured.

    python tests/bench/bench_speed.py [--json FILE] [--calibrate]

Decode and prefill of SmolLM2 and of a written model of a billion weights, the fastest of several rounds, and their ratio to
the prediction: from what a machine of this class usually does, and from this machine's stored calibration (--calibrate
measures it first, 25 seconds). Nothing here fails for being slow. Needs the extra `peers`.
"""

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests", TOP / "tests" / "peers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; install the extra `peers`")
import llama_cpp  # noqa: E402
from llama_engine import loaded  # noqa: E402
from tiny_gguf import write_hollow  # noqa: E402

import llmlab  # noqa: E402
from llmlab import memory  # noqa: E402

pytestmark = pytest.mark.bench

PROMPT, GENERATED, ROUNDS, PROMPT_ROUNDS = 512, 16, 6, 3
ENOUGH = 8.0          # seconds after which no further round is begun: on a busy machine threads wait for each other


def run(path, threads: int) -> dict[str, float]:
    """{"decode", "prefill"}: tokens per second of the fastest round."""
    with loaded(path, use_extra_bufts=True) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = PROMPT, PROMPT, PROMPT
        params.n_threads = params.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, params)
        tokens = (llama_cpp.llama_token * PROMPT)(*(i % 1000 for i in range(PROMPT)))

        def seconds(count: int, times: int) -> float:
            start = time.perf_counter()
            for _ in range(times):
                if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, ctypes.c_int32(count))):
                    raise RuntimeError("llama.cpp could not decode")
                llama_cpp.llama_synchronize(context)
            return time.perf_counter() - start

        def forget():
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

        try:
            decode, prefill = [], []
            while len(decode) < ROUNDS and sum(GENERATED / rate for rate in decode) < ENOUGH:
                forget()
                seconds(8, 1)
                decode.append(GENERATED / seconds(1, GENERATED))
            while len(prefill) < PROMPT_ROUNDS and sum(PROMPT / rate for rate in prefill) < ENOUGH:
                forget()
                prefill.append(PROMPT / seconds(PROMPT, 1))
        finally:
            llama_cpp.llama_free(context)
    return {"decode": max(decode), "prefill": max(prefill)}


def written(folder: Path, quant: str) -> Path:
    """Llama 3.2 1B's shapes, every weight zero: a processor multiplies them no faster."""
    spec = llmlab.model("llama-3.2-1b")
    path = folder / f"llama-3.2-1b-{quant}.gguf"
    write_hollow(spec, path, memory.types(spec, quant))
    return path


def compare(calibrate: bool = False) -> list[dict]:
    here = llmlab.machine()
    if calibrate:
        here.calibrate(store=False)
    threads = max(1, min(here.cpu.cores or here.cpu.usable, here.cpu.usable))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = [("SmolLM2 135M", llmlab.fetch("smollm2-135m"))]
        models += [(f"1 B in {quant}", written(Path(folder), quant)) for quant in ("Q4_K_M", "Q8_0", "IQ4_XS")]
        for name, path in models:
            measured = run(path, threads)
            for rates, machine in (("of its class", replace(here, calibration=None)), ("measured", here)):
                if rates == "measured" and here.calibration is None:
                    continue
                for what, context in (("decode", 256), ("prefill", PROMPT)):
                    said = llmlab.fit(path, machine, context=context).speed
                    band = said.decode_tps if what == "decode" else said.prefill_tps
                    rows.append({"model": name, "what": what, "rates": rates, "measured": measured[what], "band": band,
                                 "ratio": measured[what] / band[1], "inside": band[0] <= measured[what] <= band[2]})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'model':<14}{'what':<9}{'rates':<14}{'llama.cpp':>10}{'said':>9}{'band':>19}{'ratio':>7}"]
    for r in rows:
        low, best, high = r["band"]
        lines.append(f"{r['model']:<14}{r['what']:<9}{r['rates']:<14}{r['measured']:>10.1f}{best:>9.1f}"
                     f"{f'{low:.1f} to {high:.1f}':>19}{r['ratio']:>7.2f}{'' if r['inside'] else '  outside'}")
    return "\n".join(lines)


def test_speed_beside_llama_cpp(capsys):
    rows = compare()
    assert rows and all(r["measured"] > 0 for r in rows)
    with capsys.disabled():
        print(f"\nload {os.getloadavg()[0]:.1f}\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first (25 seconds)")
    asked = parser.parse_args()
    before = os.getloadavg()[0]
    rows = compare(asked.calibrate)
    print(f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after\n{table(rows)}")
    if asked.json:
        asked.json.write_text(json.dumps({"load": [before, os.getloadavg()[0]], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
