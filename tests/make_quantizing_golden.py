"""Makes tests/golden/quantized.json: what llama.cpp's own C writes for some numbers, so that a test needs no llama.cpp.

Run as `PYTHONPATH=. python tests/make_quantizing_golden.py`, with llama-cpp-python installed.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden" / "quantized.json"
NAMES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def numbers(rows: int = 2, cols: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails and importances, from whole numbers alone: the same everywhere."""
    word = np.arange(1, rows * cols + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word ^= word >> np.uint64(29)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    share = (word >> np.uint64(40)).astype(np.float64) / 2 ** 24 - 0.5      # -0.5 to 0.5
    weights = (share / (0.55 - abs(share)) * 0.02).astype(np.float32).reshape(rows, cols)
    return weights, (share[:cols] ** 2 + 0.001).astype(np.float32)


def main() -> None:
    sys.path.insert(0, str(TESTS / "peers"))
    import llama_quantize
    weights, importance = numbers()
    found = {name: {weighed: base64.b64encode(llama_quantize.quantize(weights, name, given).tobytes()).decode()
                    for weighed, given in (("plain", None), ("weighed", importance))} for name in NAMES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
