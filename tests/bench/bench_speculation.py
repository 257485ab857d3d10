"""What guessed tokens bring: tokens a pass, and seconds beside those without, the text being the same.

    python tests/bench/bench_speculation.py [--tasks summary,edit,story] [--lanes memory,disk] [--layout gguf|words]
                                            [--tokens 96] [--rounds 2] [--count 10] [--draft] [--json FILE]

SmolLM2 writes a summary of a text, edits some code, and tells a story, greedily. *memory*: all of it is there, where a token
more in a pass costs nearly as much as a pass. *disk*: nothing but two layers is, and each pass reads the whole model anew, past
the page cache. --draft: the model is SmolLM2's own weights written as Q8_0, and the file as it comes, half of that, guesses for
it. Each lane goes without guesses, with prompt lookup at its own pace, and with `--count` guesses whenever there are some; all
take turns, and each answer is compared. Ratios are of seconds after the first token in the same round: above 1 guessing is
quicker; the table has their median, and that of the fastest of each. Nothing here fails for being slow.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import llmlab  # noqa: E402
from llmlab.catalog import Table  # noqa: E402
from llmlab.formats import dequantize, quantize  # noqa: E402
from llmlab.gguf import read_gguf, write_gguf  # noqa: E402
from llmlab.offload.opening import open_decoder  # noqa: E402
from llmlab.offload.placement import Placement  # noqa: E402
from llmlab.runtime.generating import Options, Stats, stream  # noqa: E402
from llmlab.runtime.speculating import Draft, PromptLookup  # noqa: E402

pytestmark = pytest.mark.bench

PASSAGE = """The harbour of Lindholm was built in 1894, when the herring came close to the shore and the town had money. It
has two piers of granite, a lighthouse of cast iron, and a crane that was once the largest in the province. In 1931 the herring
stayed away, and the fishing fleet was sold. For thirty years the harbour stood empty, until the ferry company moved its winter
quarters from the capital to Lindholm. Today the crane is a museum, the lighthouse is lit by a single lamp of forty watts, and
every summer some nine thousand sailors tie up their boats at the two piers of granite.""".replace("\n", " ")
CODE = '''def area(width, height):
    """The area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("sides must not be negative")
    return width * height


def perimeter(width, height):
    """The perimeter of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("sides must not be negative")
    return 2 * (width + height)
'''
TASKS = {"summary": f"Sum up this text, in its own words.\n\n{PASSAGE}",
         "edit": f"Rewrite this code with the name `w` in place of `width`. Give all of the code.\n\n{CODE}",
         "story": "Tell me a story about a fox and a lighthouse."}
CONTEXT = 1024


def opened(lane: str, path: Path, layout: str):
    """(decoder, words), all in memory or all but two layers on the disk."""
    if lane == "memory":
        return llmlab.decoder(path, device="cpu", strategy="compact", context=CONTEXT, compile=layout == "words")
    _, words = llmlab.decoder(path, device="cpu", strategy="compact", context=CONTEXT)
    return open_decoder(path, Placement(slots=2, readers=2, direct=True, context=CONTEXT, layout=layout)), words


def in_eight_bits(path: Path, target: Path) -> Path:
    """The same weights in a larger file: no smaller model has the vocabulary, so what guesses is the same one in fewer bits."""
    file = read_gguf(path)
    tensors = []
    for name, tensor in file.tensors.items():
        type, data = tensor.type, file.data(name)
        if type != "F32":
            type, data = "Q8_0", quantize(dequantize(data, type), "Q8_0").numpy()
        tensors.append((name, tensor.shape, type, data.tobytes()))
    write_gguf(target, file.typed_metadata(), tensors)
    return target


def answer(decoder, words, task: str, tokens: int, draft) -> tuple[str, Stats, float]:
    """(the text, its stats, seconds after the first token)."""
    decoder.forget()
    began = time.perf_counter()
    got = stream(decoder, words, [{"role": "user", "content": TASKS[task]}], Options(temperature=0, max_tokens=tokens),
                 memory=decoder, draft=draft)
    text = "".join(got)
    return text, got.stats, time.perf_counter() - began - got.stats.first_seconds


def race(decoder, words, tasks: list[str], tokens: int, rounds: int, ways: dict, say=lambda text: None) -> list[dict]:
    """A row for each task and way of guessing."""
    rows = []
    for task in tasks:
        seconds, stats, texts = {name: [] for name in ways}, {}, set()
        for number in range(rounds):
            order = list(ways)[number % len(ways):] + list(ways)[:number % len(ways)]
            for name in order:
                text, stats[name], took = answer(decoder, words, task, tokens, ways[name])
                seconds[name].append(took)
                texts.add(text)
                say(f"{task}, {name}: {stats[name]}")
        plain = seconds["alone"]
        for name in ways:
            if name != "alone":
                rows.append({"task": task, "guesses": name, "tokens": stats[name].tokens,
                             "right": f"{stats[name].accepted} of {stats[name].proposed}",
                             "tokens a pass": stats[name].tokens_a_pass, "s a pass alone": min(plain) / stats["alone"].passes,
                             "median": median(a / b for a, b in zip(plain, seconds[name], strict=True)),
                             "fastest": min(plain) / min(seconds[name]), "same text": len(texts) == 1})
    return rows


def measured(lanes: list[str], tasks: list[str], layout: str = "gguf", tokens: int = 96, rounds: int = 2, count: int = 10,
             draft: bool = False, say=lambda text: None) -> list[dict]:
    """All lanes' rows."""
    small, rows = Path(llmlab.fetch("smollm2-135m", progress=False)), []
    with tempfile.TemporaryDirectory() as folder:
        path = in_eight_bits(small, Path(folder) / "smollm2-q8_0.gguf") if draft else small
        for lane in lanes:
            decoder, words = opened(lane, path, layout)
            ways = {"alone": None, "lookup": PromptLookup(count=count)}
            ways[f"lookup, {count}"] = PromptLookup(count=count, steady=True)
            if draft:
                guesser = llmlab.decoder(small, device="cpu", context=CONTEXT, compile=True)
                ways |= {"draft": Draft(*guesser), "draft, 6": Draft(*guesser, count=6, steady=True)}
            rows += [{"lane": lane, **row} for row in race(decoder, words, tasks, tokens, rounds, ways,
                                                           lambda text, lane=lane: say(f"{lane}, {text}"))]
            if lane == "disk":
                decoder.close()
    return rows


def table(rows: list[dict]) -> Table:
    return Table(rows, dict.fromkeys(("tokens a pass", "median", "fastest"), "{:.2f}".format)
                 | {"s a pass alone": "{:.4f}".format})


def test_guesses(capsys):
    rows = measured(["memory", "disk"], ["edit"], tokens=40, rounds=1)
    assert all(row["same text"] for row in rows)
    with capsys.disabled():
        print(f"\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--lanes", default="memory,disk")
    parser.add_argument("--layout", default="gguf", help="gguf, or words: compiled for this processor")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--draft", action="store_true")
    parser.add_argument("--json", type=Path, help="keep it there")
    a = parser.parse_args()
    rows = measured(a.lanes.split(","), a.tasks.split(","), a.layout, a.tokens, a.rounds, a.count, a.draft,
                    lambda text: print(text, file=sys.stderr, flush=True))
    print(table(rows))
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
