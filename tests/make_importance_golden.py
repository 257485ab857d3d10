"""Makes tests/golden/imatrix_*.dat: what a real llama-imatrix collects of a tiny mixture, as GGUF and in its old format.

Run as `python tests/make_importance_golden.py LLAMA_IMATRIX` with that program, of the version in the extra `peers`. An
installed llama-cpp-python has llama.cpp's libraries; only the program is compiled, from the source in its sdist (seconds):
  g++ -O2 -std=c++17 -Icommon -Iinclude -Iggml/include tools/imatrix/imatrix.cpp \
      -L SITE-PACKAGES/lib -lllama-common -lllama -lggml -lggml-base -lpthread -o llama-imatrix
The model is made anew by the test: two layers of random weights, four experts of which the last is never chosen, a token a
byte.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from llmlab.gguf import write_gguf  # noqa: E402
from llmlab.places import folder  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden"
CONTEXT, CHUNKS, WIDTH, EXPERTS, LAYERS = 64, 3, 32, 4, 2


def write_text(path: Path) -> Path:
    """Some more bytes, a token each, than CHUNKS chunks take."""
    path.write_bytes((folder("data") / "alice.txt").read_bytes()[:CONTEXT * CHUNKS + 20])
    return path


def write_model(path: Path) -> Path:
    random = np.random.default_rng(17)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"]
    meta = {"general.architecture": "llama", "llama.block_count": LAYERS, "llama.embedding_length": WIDTH,
            "llama.feed_forward_length": WIDTH, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 512, "llama.rope.dimension_count": 8,
            "llama.expert_count": EXPERTS, "llama.expert_used_count": 2, "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ("array:string", tokens),
            "tokenizer.ggml.token_type": ("array:int32", [1] * 256 + [3]), "tokenizer.ggml.merges": ("array:string", []),
            "tokenizer.ggml.bos_token_id": ("uint32", 256), "tokenizer.ggml.eos_token_id": ("uint32", 256),
            "tokenizer.ggml.add_bos_token": True}

    def tensor(name, values):
        return f"{name}.weight", values.shape[::-1], "F32", values.astype(np.float32).tobytes()

    def matrix(name, *shape):
        return tensor(name, random.normal(0, 1.5 / shape[-1] ** 0.5, shape))

    embedding = random.normal(0, 1, (len(tokens), WIDTH))
    embedding[:, 0] = 4         # the same for every token, and what the last expert's router is against
    tensors = [tensor("token_embd", embedding), tensor("output_norm", np.ones(WIDTH)), matrix("output", len(tokens), WIDTH)]
    for block in (f"blk.{i}." for i in range(LAYERS)):
        tensors += [tensor(f"{block}{name}_norm", np.ones(WIDTH)) for name in ("attn", "ffn")]
        tensors += [matrix(f"{block}attn_{name}", rows, WIDTH)
                    for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("output", WIDTH))]
        router = random.normal(0, 0.5, (EXPERTS, WIDTH))
        router[:, 0] = [0, 0, 0, -10]
        tensors.append(tensor(f"{block}ffn_gate_inp", router))
        tensors += [matrix(f"{block}ffn_{name}_exps", EXPERTS, WIDTH, WIDTH) for name in ("gate", "up", "down")]
    write_gguf(path, meta, tensors)
    return path


def main(program: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        write_text(Path(place, "alice.txt"))
        model = write_model(Path(place, "tiny.gguf"))
        for name, kind in (("gguf", "gguf"), ("old", "dat")):
            done = subprocess.run([Path(program).resolve(), "-m", model, "-f", "alice.txt", "-c", str(CONTEXT), "--no-ppl",
                                   "-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--process-output",
                                   "--output-format", kind, "-o", GOLDEN / f"imatrix_{name}.dat"], cwd=place,
                                  capture_output=True, text=True)
            print(done.stderr[-2000:])
            done.check_returncode()


if __name__ == "__main__":
    main(sys.argv[1])
