"""Which experts a cache should keep: hit rates of policies on made traces that repeat themselves as published ones do.

    python tests/bench/bench_experts.py [--tokens 400] [--only qwen,olmoe,...] [--tune]

No trained mixture of experts is at hand, so the traces are made: a token takes the experts with the largest sum of popularity
(Zipf: -skew * ln(rank)), what the text is about (drifts, with a memory of so many tokens) and chance. `skew`, `about` and
`memory` of each kind are fitted so that the trace repeats itself, and simple policies find, as was published of real models;
"random" is what random routers do, the worst case. The last quarter of a trace is counted. Hit rates are counts: how busy the
machine is plays no part.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

from llmlab.offload import hits  # noqa: E402

pytestmark = pytest.mark.bench

Trace = list[list[list[int]]]       # [token][layer] -> experts, rising


@dataclass(frozen=True)
class Kind:
    """A model's routers. layers are fewer than the model's, to be quick: hit rates depend on slots a layer."""

    experts: int
    used: int
    layers: int
    skew: float
    about: float        # how much the text decides, beside chance (whose spread is 1.28)
    memory: float       # tokens after which what the text is about has changed
    slots: tuple[float, ...]        # a layer
    published: str = ""


KINDS = {
    "random": Kind(64, 8, 16, 0.0, 0.0, 1.0, (4, 8, 16, 32, 48)),
    # github kekzl/imp #1359, 48 layers, LRU a layer
    "qwen3-30b-a3b": Kind(128, 8, 16, 0.7, 2.5, 80.0, (4, 8, 16, 32, 51, 77),
                          "45 % repeat at once, 80 % within eight; LRU a layer at 51 slots 90-95 %"),
    # github JustVugg/colibri #1092, 704 tokens of English
    "olmoe": Kind(64, 8, 16, 0.6, 1.2, 12.0, (4, 8, 16, 32, 48), "LRU a layer at 16 slots 51 %"),
    # github FlashML-org/FreeToken #174, 61 layers; its LRU had prompts and many texts between
    "deepseek-v4-flash": Kind(256, 6, 16, 1.05, 0.3, 10.0, (3, 8.2, 11.5, 14.8, 32, 64),
                              "popular at 8.2, 11.5, 14.8 slots 40, 46, 52 %; LRU at 11.5 8-18 %"),
}


def trace(kind: Kind, tokens: int, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    popular = -kind.skew * np.log(np.argsort(rng.random((kind.layers, kind.experts)), -1) + 1.0)
    stays = np.exp(-1 / kind.memory)
    about, made = rng.standard_normal((kind.layers, kind.experts)), []
    for _ in range(tokens):
        about = stays * about + np.sqrt(1 - stays * stays) * rng.standard_normal(about.shape)
        scores = popular + kind.about * about + rng.gumbel(size=about.shape)
        made.append(np.sort(np.argpartition(-scores, kind.used, -1)[:, :kind.used], -1).tolist())
    return made


def repeats(made: Trace) -> tuple[float, float]:
    """Of choices the share that the token before made too, and any of the eight before."""
    next, within, count = 0, 0, 0
    for at in range(8, len(made)):
        for layer, wanted in enumerate(made[at]):
            last = set(made[at - 1][layer])
            eight = set().union(*(made[at - back][layer] for back in range(1, 9)))
            next, within, count = next + len(last & set(wanted)), within + len(eight & set(wanted)), count + len(wanted)
    return next / count, within / count


# ---- policies: [layers, experts], what is largest goes first -----------------------------------------------------

class LRU:
    """What was used longest ago goes."""

    def __init__(self, made: Trace, shape: tuple[int, int]):
        self.last, self.now = np.full(shape, -1), 0

    def chose(self, token, layer, wanted):
        self.now += 1
        self.last[layer, wanted] = self.now

    def goes(self, layer):
        return -self.last


class LFU:
    """What was used least often since the beginning goes."""

    def __init__(self, made: Trace, shape: tuple[int, int]):
        self.count = np.zeros(shape)

    def chose(self, token, layer, wanted):
        self.count[layer, wanted] += 1

    def goes(self, layer):
        return -self.count


class Popular(LFU):
    """As if it were known what is popular in the whole trace."""

    def __init__(self, made: Trace, shape: tuple[int, int]):
        super().__init__(made, shape)
        for layers in made:
            for layer, wanted in enumerate(layers):
                self.count[layer, wanted] += 1

    def chose(self, token, layer, wanted):
        pass


class Stale:
    """Of what the last pass used that goes first which this one has gone by, then what comes latest (after Least-Stale, arXiv
    2602.03921)."""

    def __init__(self, made: Trace, shape: tuple[int, int]):
        self.last, self.layers, self.token = np.full(shape, -1), shape[0], 0

    def chose(self, token, layer, wanted):
        self.token = token
        self.last[layer, wanted] = token

    def goes(self, layer):
        distance = (np.arange(self.layers) - layer - 1) % self.layers
        stale = self.last < self.token
        return np.where(stale & (distance[:, None] >= self.layers - 1 - layer), 1000, 0) + distance[:, None] - self.last * 1e-6


class Ours:
    """hits.Rates."""

    def __init__(self, made: Trace, shape: tuple[int, int]):
        self.rates, self.at, self.shape = hits.Rates(*shape), np.indices(shape).reshape(2, -1), shape

    def chose(self, token, layer, wanted):
        self.rates.chose(layer, wanted, [1] * len(wanted), 1)

    def goes(self, layer):
        return self.rates.until(layer, *self.at).reshape(self.shape)


class Belady:
    """What is used latest goes, as if the future were known."""

    def __init__(self, made: Trace, shape: tuple[int, int]):
        self.layers, self.uses = shape[0], defaultdict(list)
        for token in range(len(made) - 1, -1, -1):
            for layer, wanted in enumerate(made[token]):
                for expert in wanted:
                    self.uses[layer, expert].append(token)
        self.next = np.full(shape, 10**9)
        for (layer, expert), uses in self.uses.items():
            self.next[layer, expert] = uses[-1] * self.layers + layer

    def chose(self, token, layer, wanted):
        for expert in wanted:
            uses = self.uses[layer, expert]
            while uses and uses[-1] <= token:
                uses.pop()
            self.next[layer, expert] = uses[-1] * self.layers + layer if uses else 10**9

    def goes(self, layer):
        return self.next


def rate(policy, made: Trace, experts: int, slots: int, each: bool = False) -> float:
    """Hits of the last quarter of a trace. each: every layer has its share of the slots to itself."""
    shape = len(made[0]), experts
    policy = policy(made, shape)
    there, held = np.zeros(shape, dtype=bool), 0
    room = slots // shape[0] if each else slots
    found = wanted_in_all = 0
    for token, layers in enumerate(made):
        for layer, wanted in enumerate(layers):
            policy.chose(token, layer, wanted)
            counted = token >= len(made) * 3 // 4
            wanted_in_all += len(wanted) * counted
            found += int(there[layer, wanted].sum()) * counted
            for expert in [expert for expert in wanted if not there[layer, expert]]:
                held = int(there[layer].sum()) if each else held
                if held >= room:
                    may = there.copy()
                    may[layer, wanted] = False
                    if each:
                        may[:layer], may[layer + 1:] = False, False
                    if not may.any():
                        may = there.copy()
                    goes = np.where(may, policy.goes(layer), -np.inf)
                    there[np.unravel_index(goes.argmax(), shape)] = False
                    held -= 1
                there[layer, expert] = True
                held += 1
    return found / wanted_in_all


POLICIES = {"LRU": (LRU, False), "LRU a layer": (LRU, True), "LFU": (LFU, False), "stale": (Stale, False),
            "ours": (Ours, False), "popular": (Popular, False), "Belady": (Belady, False)}


def compare(name: str, tokens: int) -> list[dict]:
    kind = KINDS[name]
    made, rows = trace(kind, tokens), []
    next, within = repeats(made)
    print(f"\n{name}: {kind.used} of {kind.experts}, {kind.layers} layers; skew {kind.skew}, about {kind.about}, memory "
          f"{kind.memory:.0f}; of choices {next:.0%} repeat at once, {within:.0%} within eight. "
          f"Published: {kind.published or '-'}")
    print(f"{'slots a layer':>14}" + "".join(f"{policy:>13}" for policy in POLICIES))
    for each in kind.slots:
        slots = round(each * kind.layers)
        found = {policy: rate(how, made, kind.experts, slots, alone) for policy, (how, alone) in POLICIES.items()}
        rows.append({"kind": name, "slots": slots, "layers": kind.layers, **found})
        print(f"{each:>14}" + "".join(f"{one:>13.1%}" for one in found.values()), flush=True)
    return rows


TRIED = ((4,), (16,), (64,), (4, 64), (2, 16, 128), (4, 32, 256), (2, 8, 32, 128))


def tune(tokens: int, names: list[str]) -> None:
    """Hit rates by `hits.LIVES`; and misses over those of the best of the same trace and slots."""
    before, worse, cases = hits.LIVES, Counter(), 0
    for name in names:
        kind = KINDS[name]
        made = trace(kind, tokens)
        for each in kind.slots:
            found = {}
            for hits.LIVES in TRIED:
                found[hits.LIVES] = 1 - rate(Ours, made, kind.experts, round(each * kind.layers))
            cases += 1
            for lives, misses in found.items():
                worse[lives] += misses / max(min(found.values()), 1e-3)
            print(name, each, {lives: f"{1 - misses:.1%}" for lives, misses in found.items()}, flush=True)
    hits.LIVES = before
    print("misses over the best's, mean:", {lives: f"{sum_ / cases:.3f}" for lives, sum_ in worse.items()})


def test_policies():
    """Ours is never far from the better of recency and popularity."""
    for row in (row for name in KINDS for row in compare(name, 200)):
        assert row["Belady"] >= row["ours"] >= max(row["LRU a layer"], row["LFU"]) - 0.03, row


if __name__ == "__main__":
    asked = argparse.ArgumentParser()
    asked.add_argument("--tokens", type=int, default=400)
    asked.add_argument("--only", default=",".join(KINDS))
    asked.add_argument("--tune", action="store_true")
    asked.add_argument("--json")
    options = asked.parse_args()
    if options.tune:
        tune(options.tokens, options.only.split(","))
        sys.exit()
    done = [row for name in options.only.split(",") for row in compare(name, options.tokens)]
    if options.json:
        Path(options.json).write_text(json.dumps(done, indent=1))
