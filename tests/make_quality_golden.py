"""Makes tests/golden/llama_perplexity.npz: what a real llama-perplexity says of two tiny models, and all it takes to check it.

Run as `python tests/make_quality_golden.py LLAMA_PERPLEXITY` with that program, of the version in the extra `peers`. An
installed llama-cpp-python has llama.cpp's libraries; only the program is compiled, from the source in its sdist (seconds):
  g++ -O2 -std=c++17 -Icommon -Iinclude -Iggml/include tools/perplexity/perplexity.cpp tools/perplexity/main.cpp \
      -L SITE-PACKAGES/lib -lllama-common -lllama -lggml -lggml-base -lpthread -o llama-perplexity
Two layers of random weights and the first 300 tokens of SmolLM2's vocabulary, which adds a BOS here; the base in float32, the
other in Q4_0. Kept: the file llama-perplexity wrote of the base, the other's logits, and everything printed of the two.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent / "peers")]

from llama_engine import quantize  # noqa: E402
from llama_model import llama_model  # noqa: E402

from llmlab import fetch, quality  # noqa: E402
from llmlab.gguf import read_gguf, write_gguf  # noqa: E402
from llmlab.places import folder  # noqa: E402
from llmlab.quality import passes  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden" / "llama_perplexity.npz"
CONTEXT, CHUNKS, WORDS, WIDTH, LAYERS = 32, 8, 300, 64, 2


def write_model(path: Path) -> None:
    random = np.random.default_rng(11)
    meta = {name: value for name, value in read_gguf(fetch("smollm2-135m")).typed_metadata().items()
            if name.startswith("tokenizer.ggml")}
    lists = {name: list(meta[f"tokenizer.ggml.{name}"].values()) for name in ("tokens", "token_type", "merges")}
    known = set(lists["tokens"][:WORDS])
    meta |= {"tokenizer.ggml.tokens": lists["tokens"][:WORDS],
             "tokenizer.ggml.token_type": ("array:int32", lists["token_type"][:WORDS]),
             "tokenizer.ggml.merges": [one for one in lists["merges"][:WORDS] if one.replace(" ", "") in known],
             "tokenizer.ggml.add_bos_token": True, "general.architecture": "llama", "llama.block_count": LAYERS,
             "llama.context_length": 512, "llama.embedding_length": WIDTH, "llama.feed_forward_length": 2 * WIDTH,
             "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
             "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 16, "llama.vocab_size": WORDS}

    def matrix(name, cols, rows):
        spread = 0.12 if name.startswith("token") else 1.5 / cols**0.5
        return name + ".weight", (cols, rows), "F32", random.normal(0, spread, (rows, cols)).astype(np.float32).tobytes()

    def norm(name):
        return name + ".weight", (WIDTH,), "F32", np.ones(WIDTH, np.float32).tobytes()

    tensors = [matrix("token_embd", WIDTH, WORDS), norm("output_norm")]
    for i in range(LAYERS):
        sizes = {"attn_q": (64, 64), "attn_k": (64, 32), "attn_v": (64, 32), "attn_output": (64, 64), "ffn_gate": (64, 128),
                 "ffn_up": (64, 128), "ffn_down": (128, 64)}
        tensors += [norm(f"blk.{i}.attn_norm"), norm(f"blk.{i}.ffn_norm")]
        tensors += [matrix(f"blk.{i}.{name}", *size) for name, size in sizes.items()]
    write_gguf(path, meta, tensors)


def main(program: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base, other, kept = (Path(scratch) / name for name in ("base.gguf", "other.gguf", "base.kld"))
        write_model(base)
        assert quantize(base, other, "Q4_0")
        settings = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-t", "1", "--kl-divergence-base", str(kept)]

        def run(*arguments):
            done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300)
            assert not done.returncode, done.stderr
            return done.stdout + done.stderr

        first = run("-m", base, "-f", folder("data") / "alice.txt", "--chunks", CHUNKS, *settings)
        second = run("-m", other, "--kl-divergence", *settings)
        reference = quality.read_reference(kept, bos=1)
        with llama_model(other, CONTEXT) as model:
            chunks = [reference.tokens.chunk(index, CONTEXT) for index in range(CHUNKS)]
            held = passes.Held()
            logits = [np.concatenate([rows.float().numpy() for rows in passes.logits(model, ids, "", held)]) for ids in chunks]
        wanted = [re.search(r"\[1\].*", first), re.search(r"Final estimate.*", first),
                  re.search(r"(?s)chunk  .*Same top p:[^\n]*", second)]
        assert all(wanted), "its log is written by a thread, and now and then the end is lost: run this again"
        printed = "\n".join([run("--version").strip(), *(found.group() for found in wanted)])
        np.savez_compressed(GOLDEN, base=np.frombuffer(kept.read_bytes(), np.uint8), logits=np.array(logits), printed=printed)
        print(printed, GOLDEN.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
