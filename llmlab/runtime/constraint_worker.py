"""A process of its own that tries grammars: JSON on its input, a line {"error": ...} for each on its output, empty where
nothing is wrong. Started by constraining.py, imports no llmlab.

A grammar is written by strangers. llguidance bounds most of what one can cost, but not all (an intersection of patterns doubles
with each of them); how long a trial takes and how much memory can only be bounded from outside.
"""

import json
import random
import sys

STEPS = 200              # bytes of texts that are made up by the grammars, of all together
SECONDS = 1              # of processor time; a sound grammar takes some hundredths
MEMORY = 1 << 30         # bytes of address space


def _limit() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):      # Windows has none, macOS refuses some
        pass


class Bytes:
    """The smallest vocabulary: every byte, the end, and a special token."""

    is_tokenizer_wrapper, bos_token_id, eos_token_id = True, None, 256
    tokens = [bytes([one]) for one in range(256)] + [b"<|end|>", b"<|special|>"]
    special_token_ids = [256, 257]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def tried(words, grammar: str, limits, steps: int) -> str:
    """What is wrong with a grammar, or nothing."""
    from llguidance import LLMatcher

    matcher = LLMatcher(words, grammar, log_level=0, limits=limits)
    draw = random.Random(0)
    for _ in range(steps):
        if matcher.is_stopped() or matcher.is_error():
            break
        allowed = [at for at, one in enumerate(matcher.compute_logit_bias()) if one]
        if not allowed or not matcher.consume_token(draw.choice(allowed)):
            break
    return matcher.get_error() or ""


def main() -> None:
    _limit()
    from llguidance import LLParserLimits, LLTokenizer

    task = json.load(sys.stdin)
    words, limits = LLTokenizer(Bytes(), n_vocab=len(Bytes.tokens), eos_token=[256]), LLParserLimits(**task["limits"])
    for grammar in task["grammars"]:
        try:
            error = tried(words, grammar, limits, max(1, STEPS // len(task["grammars"])))
        except MemoryError:
            error = "it takes too much memory"
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    main()
