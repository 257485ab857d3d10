"""What quants get right: the tasks that come with llmlab, through real models as their files are and quantized further.

    python tests/bench/bench_evaluating.py [--model NAME=FILE ...] [--quants LIST] [--tasks LIST] [--every N] [--fast]

Appends to data/evaluations.csv, a row a model, quant and task as soon as it is measured, and writes every item's outcome to
results/evaluations-NAME.json; what is there already, of the same items, is not measured again. SmolLM2 135M Instruct is
fetched; other models are given as files. A file is evaluated as it is and then in each of --quants that is not its own; those
are made of the file, whose weights are quantized already, so `twice` says that they lost twice. Weights are multiplied in
float32; with --fast in bfloat16, in a third of the time (`how` says which). --every 3 asks every third item of each task, some
of each kind, under the same ids. At the end each quant stands beside its file, item by item.
"""

import argparse
import csv
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import llmlab  # noqa: E402
from llmlab.evaluation import Evaluation, Outcome, shipped  # noqa: E402
from llmlab.evaluation.items import NEEDLES, task_items  # noqa: E402
from llmlab.quality.remembered import write_whole  # noqa: E402

pytestmark = pytest.mark.bench

QUANTS = ("Q4_K_M", "Q3_K_S", "Q2_K")
COLUMNS = ("model", "quant", "twice", "task", "items", "n", "right", "share", "low", "high", "chance", "acc", "logprob",
           "tokens", "seconds", "how", "date", "torch", "source")
OF = ("model", "quant", "task", "items")        # what tells rows apart
SHORT = 80      # characters of what was said that are kept
KEPT = ("id", "kind", "digest", "right", "chance", "said", "verdict", "logprob", "plain")


def stamp(task: str) -> str:
    """Of a task's items: rows of other items are other rows. Needles depend on the vocabulary, and are ours to make."""
    told = "".join(item.digest for item in task_items(task)) if task != NEEDLES else NEEDLES
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def some(task: str, every: int, folder: Path) -> str | Path:
    """Every so many items of a task, in a file of its name: the same items, so that runs with more of them can be paired."""
    if every == 1 or task == NEEDLES:
        return task
    lines = (TOP / "data" / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(lines[::every]), encoding="utf-8")
    return path


class Rows:
    """A table on disk that grows a row at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    def has(self, **values) -> bool:
        return any(all(row[name] == values[name] for name in OF) for row in self.rows)

    def add(self, row: dict) -> None:
        new = not self.path.exists()
        self.rows.append({name: str(value) for name, value in row.items()})
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


class Outcomes:
    """Every item's outcome of one model, by quant and task, in a file that is whole at any time."""

    def __init__(self, path: Path):
        self.path = path
        self.told = json.loads(path.read_text()) if path.exists() else {}

    def add(self, quant: str, task: str, items: str, found: Evaluation) -> None:
        rows = [[getattr(one, name) for name in KEPT] for one in found.of(task)]
        for row in rows:
            row[KEPT.index("said")] = row[KEPT.index("said")][:SHORT]
            if row[KEPT.index("logprob")] is not None:
                row[KEPT.index("logprob")] = round(row[KEPT.index("logprob")], 5)
        self.told.setdefault(quant, {})[task] = {"items": items, "how": found.how, "notes": found.notes, "date": found.date,
                                                 "columns": KEPT, "outcomes": rows}
        write_whole(self.path, _lines(self.told))

    def of(self, name: str, quant: str) -> Evaluation:
        parts = self.told.get(quant, {})
        return Evaluation(f"{name} in {quant}", "", tuple(
            Outcome(task, **dict(zip(part["columns"], row, strict=True)))
            for task, part in parts.items() for row in part["outcomes"]))


def _lines(told: dict) -> str:
    """JSON with an outcome a line; texts that models wrote may look like JSON themselves."""
    say = partial(json.dumps, ensure_ascii=False)
    quants = []
    for quant, tasks in told.items():
        parts = [f"{say(task)}: {say(part | {'outcomes': []})[:-2]}\n" + ",\n".join(map(say, part["outcomes"])) + "]}"
                 for task, part in tasks.items()]
        quants.append(f"{say(quant)}: {{" + ",\n".join(parts) + "}")
    return "{" + ",\n".join(quants) + "}\n"


def file_quant(path: Path) -> str:
    """A file's own quant, as its name says it."""
    return path.stem.replace(".", "-").rpartition("-")[2].upper()


def measure(name: str, path: Path, table: Rows, kept: Outcomes, quants: Sequence[str], tasks: Sequence[str],
            limit: int | None = None, every: int = 1, fast: bool = False) -> list[str]:
    """Rows of every quant and task that the table lacks; the quants, the file's own first."""
    own = file_quant(path)
    quants = [own, *(quant for quant in quants if quant != own)]
    for quant in quants:
        part = (f"-every{every}" if every > 1 else "") + (f"-{limit}" if limit else "")
        stamps = {task: stamp(task) + part for task in tasks}
        missing = [task for task in tasks if not table.has(model=name, quant=quant, task=task, items=stamps[task])]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            target = path
            if quant != own:
                target = Path(folder) / f"{name}-{quant}.gguf"
                llmlab.quantize_gguf(path, target, quant, allow_requantize=True)
            way = {"dtype": "bfloat16", "strategy": "fast"} if fast else {"dtype": "float32"}
            decoder, words = llmlab.decoder(target, **way)
            for task in missing:
                found = llmlab.evaluate(decoder, words, some(task, every, Path(folder)), limit=limit, progress=False)
                kept.add(quant, task, stamps[task], found)
                table.add(row_of(name, quant, quant != own, task, stamps[task], found))
                print(f"{name} in {quant}: {task} {found.scores[task]}, {found.seconds[task]:.0f} s", flush=True)
            del decoder
    return quants


def row_of(name: str, quant: str, twice: bool, task: str, items: str, found: Evaluation) -> dict:
    """A row of the table: all of it measured but for the intervals, which follow."""
    score = found.scores[task]
    return {"model": name, "quant": quant, "twice": "yes" if twice else "", "task": task, "items": items, "n": score.n,
            "right": score.right, "share": f"{score.share:.4f}", "low": f"{score.low:.4f}", "high": f"{score.high:.4f}",
            "chance": f"{score.chance:.4f}", "acc": "" if score.plain is None else f"{score.plain:.4f}",
            "logprob": "" if score.logprob is None else f"{score.logprob:.4f}", "tokens": found.tokens[task],
            "seconds": f"{found.seconds[task]:.1f}", "how": found.how, "date": found.date, "torch": found.versions["torch"],
            "source": "tests/bench/bench_evaluating.py"}


def compare(name: str, kept: Outcomes, quants: Sequence[str]) -> list:
    """Each quant beside the file as it is."""
    own = kept.of(name, quants[0])
    return [kept.of(name, quant).beside(own) for quant in quants[1:]]


def test_texts_that_look_like_json_come_back(tmp_path):
    one = Outcome("coding", "a", "choice", "d", False, said=" [[1, 0], [1, 0]] [[")
    kept = Outcomes(tmp_path / "outcomes.json")
    for quant in ("Q4_1", "Q2_K"):
        kept.add(quant, "coding", "", Evaluation("m", "", (one, one)))
    again = Outcomes(tmp_path / "outcomes.json")
    assert [found.said for found in again.of("m", "Q2_K").outcomes] == [one.said] * 2
    assert len((tmp_path / "outcomes.json").read_text().splitlines()) == 6


def test_two_quants_of_one_task(tmp_path):
    table, kept = Rows(tmp_path / "rows.csv"), Outcomes(tmp_path / "outcomes.json")
    path = llmlab.fetch("smollm2-135m")
    for _ in range(2):          # the second time there is nothing to do
        quants = measure("smollm2-135m", path, table, kept, ["Q2_K"], [NEEDLES], limit=3)
        assert quants == ["Q4_1", "Q2_K"] and len(table.rows) == 2
    again = Outcomes(tmp_path / "outcomes.json")
    found, = compare("smollm2-135m", again, quants)
    assert found.n == 3 and found.logprob.value < 0 and Rows(tmp_path / "rows.csv").rows == table.rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="again for several; default: SmolLM2")
    parser.add_argument("--quants", default=",".join(QUANTS), help=f"made of each file (default {','.join(QUANTS)}), or none")
    parser.add_argument("--tasks", default=",".join([*shipped(), NEEDLES]))
    parser.add_argument("--limit", type=int, help="only the first items of each task, to try it out")
    parser.add_argument("--every", type=int, default=1, help="every so many items, where all would take too long")
    parser.add_argument("--fast", action="store_true", help="in bfloat16, with more memory")
    parser.add_argument("--csv", type=Path, default=TOP / "data" / "evaluations.csv")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    models = dict(one.split("=", 1) for one in given.model) or {"smollm2-135m": llmlab.fetch("smollm2-135m")}
    for model, file in models.items():
        outcomes = Outcomes(given.results / f"evaluations-{model}.json")
        made = measure(model, Path(file), Rows(given.csv), outcomes, [q for q in given.quants.split(",") if q != "none"],
                       given.tasks.split(","), given.limit, given.every, given.fast)
        for comparison in compare(model, outcomes, made):
            print(f"\n{comparison}", flush=True)
