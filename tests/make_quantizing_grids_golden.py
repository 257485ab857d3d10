"""Makes tests/golden/quantized_grids.json: what llama.cpp's own C writes in codebook types, so that a test needs no llama.cpp.

Run as `PYTHONPATH=. python tests/make_quantizing_grids_golden.py`, with llama-cpp-python installed.
"""

import base64
import json
import sys
from pathlib import Path

from make_quantizing_golden import numbers

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden" / "quantized_grids.json"
CASES = (*((name, True) for name in ("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")),
         ("IQ3_XXS", False), ("IQ3_S", False))


def key(name: str, weighed: bool) -> str:
    return f"{name} {'weighed' if weighed else 'plain'}"


def main() -> None:
    sys.path.insert(0, str(TESTS / "peers"))
    import llama_quantize
    weights, importance = numbers()
    found = {key(name, weighed): llama_quantize.quantize(weights, name, importance if weighed else None)
             for name, weighed in CASES}
    GOLDEN.write_text(json.dumps({k: base64.b64encode(v.tobytes()).decode() for k, v in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
