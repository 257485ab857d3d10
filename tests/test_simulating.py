"""Simulated serving: the cost of a step against the speed of one sequence, the events against sums done by hand, the claims of
the paper on PagedAttention, costs learnt from steps, and what people measured."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest

import llmlab
from llmlab.errors import LabError
from llmlab.simulating import (
    WAYS,
    Cost,
    Load,
    Matrices,
    Setup,
    Step,
    bearable_rate,
    beside_published,
    compare_policies,
    cost_of,
    fit_cost,
    load_of,
    serve,
    setup,
    simulate,
    simulate_setup,
    throughput_of,
)
from llmlab.simulating.fitted import _not_negative
from llmlab.simulating.published import published
from llmlab.workloads import Arrival, alpaca_like, even, shared_prefix, sharegpt_like, timed

NOTHING = (0.0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch):
    """What was measured of the computer that runs the tests says nothing of catalogued cards."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))


def constant(seconds: float) -> Cost:
    """Every step takes as long as any other."""
    return Cost(Matrices(NOTHING, NOTHING), Matrices(NOTHING, NOTHING), step=(2 * seconds, seconds, seconds / 2))


# ---- the load and the cost of a step ----------------------------------------------------------------------------------

@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_a_load_counts_what_every_row_looks_at(window):
    random = Random(window)
    for _ in range(60):
        parts = [(random.randrange(60), random.choice((1, 1, 2, 7, 30)), random.random() < 0.5) for _ in range(4)]
        load, seen = load_of(parts, window), Counter()
        for first, count, _ in parts:
            for row in range(first, first + count):
                kind = "cells" if count == 1 else "pairs"
                seen[kind] += row + 1
                seen[f"window_{kind}"] += min(row + 1, window)
        assert load.rows == sum(count for _, count, _ in parts) and load.sequences == 4
        assert load.wanted == sum(last for *_, last in parts) and load.looked == sum(f + c for f, c, _ in parts)
        assert (load.cells, load.pairs) == (seen["cells"], seen["pairs"])
        assert (load.window_cells, load.window_pairs) == (seen["window_cells"], seen["window_pairs"])


@pytest.mark.parametrize(("model", "cards", "quant"), [
    ("llama-3-8b", "rtx-4090-24gb", None), ("llama-2-13b", "a100-sxm4-40gb", None), ("qwen3-14b", "h100-sxm5-80gb", "FP8"),
    ("llama-3-70b", ["h100-sxm5-80gb"] * 2, "FP8"), ("qwen3-30b-a3b", "h100-sxm5-80gb", "FP8"),
    ("gemma-3-12b", "a100-sxm4-80gb", None), ("qwen3.5-9b", "a100-sxm4-80gb", None),
    ("llama-3-8b", "rtx-3090-24gb", "AWQ_INT4")])
@pytest.mark.parametrize("context", [512, 8192])
def test_one_sequence_alone_is_as_fast_as_speed_says(model, cards, quant, context):
    report = llmlab.fit(model, cards, quant=quant, context=context, engine="vllm")
    cost = cost_of(report)
    full = [1 / cost.seconds(load_of([(context - 1, 1, True)], cost.window), band) for band in range(3)]
    assert full[:2] == pytest.approx(report.speed.decode_tps[:2], rel=1e-6)
    assert full[0] < full[1] < full[2]
    if not any(layer.ssm_state for layer in report.spec.layers):        # a recurrent state is never empty
        empty = [1 / cost.seconds(load_of([(0, 1, True)], cost.window), band) for band in range(3)]
        assert empty == pytest.approx(report.speed.start_tps, rel=0.003)


def test_many_rows_share_the_weights_until_arithmetic_takes_over():
    cost = setup("llama-3-8b", "rtx-4090-24gb").cost
    steps = [cost.seconds(load_of([(100, 1, True)] * n)) for n in (1, 8, 64, 512, 2048)]
    assert steps == sorted(steps)
    assert steps[1] < 1.1 * steps[0]                         # eight for little more than one
    assert steps[4] / steps[3] == pytest.approx(4, rel=0.1)  # and from some number on each costs what it costs
    for rows in (1, 10, 100, 1000):
        assert cost.blocks.seconds(rows, 1) == max(cost.blocks.read[1], rows * cost.blocks.row[1])
    assert cost.blocks.seconds(0, 1) == 0


def test_a_batch_touches_the_experts_that_its_rows_choose():
    spec = llmlab.model("qwen3-30b-a3b")                     # 8 of 128
    cost = setup(spec, "h100-sxm5-80gb", "FP8").cost
    assert cost.experts.share == pytest.approx(8 / 128)
    for rows in (1, 4, 32):
        assert cost.experts.seconds(rows, 1) == pytest.approx(cost.experts.read[1] * (1 - (1 - 8 / 128) ** rows))
    random, chosen = Random(0), []
    for _ in range(400):                                     # the formula is of even and independent choices
        chosen.append(len({e for _ in range(16) for e in random.sample(range(128), 8)}) / 128)
    assert sum(chosen) / len(chosen) == pytest.approx(1 - (1 - 8 / 128) ** 16, rel=0.01)
    assert setup("llama-3-8b", "h100-sxm5-80gb").cost.experts.seconds(100, 1) == 0


def test_a_window_hides_the_rest():
    cost = setup("gemma-3-12b", "a100-sxm4-80gb", context=8192).cost
    assert cost.window == 1024
    near, far, farther = (cost.seconds(load_of([(n, 1, True)], cost.window)) for n in (900, 3000, 6000))
    every = cost.cell[1] + cost.window_cell[1]
    assert farther - far == pytest.approx(3000 * cost.cell[1]) and cost.cell[1] < every / 4
    assert far - near < 2100 * every


def test_the_memory_of_a_card_is_cut_into_blocks():
    report = llmlab.fit("llama-3-8b", "rtx-4090-24gb", context=2048, engine="vllm")
    found = setup("llama-3-8b", "rtx-4090-24gb")
    assert found.cell_bytes == 2 * 2 * 8 * 128 * 32          # K and V in half precision, 8 heads of 128, 32 layers
    pool = report.reserved[0].pool
    assert [int(b / found.cell_bytes) // 16 for b in pool] == list(found.blocks)
    assert found.blocks[0] <= found.blocks[1] <= found.blocks[2] and found.tokens == 16 * found.blocks[1]
    assert setup("llama-3-8b", "rtx-4090-24gb", "AWQ_INT4").blocks[1] > 2 * found.blocks[1]
    assert setup("llama-3-8b", "rtx-4090-24gb", kv="fp8").blocks[1] > 1.9 * found.blocks[1]
    assert (found.rows, found.sequences) == (2048, 256)
    large = setup("llama-3-8b", "h100-sxm5-80gb")
    assert (large.rows, large.sequences) == (8192, 1024)
    assert setup("llama-3-8b", "a100-sxm4-80gb").rows == 2048


@pytest.mark.parametrize("ask", [
    lambda: setup("llama-3-70b", "rtx-4090-24gb"),                                   # nothing is left for a cache
    lambda: setup("llama-3-8b", "rtx-4090-24gb", context=131072),                    # not one whole sequence
    lambda: cost_of(llmlab.fit("llama-3-8b", "rtx-4090-24gb", quant="Q4_K_M")),      # another engine
    lambda: cost_of(llmlab.fit("llama-3-8b", None, host="64 GB DDR5", engine="vllm")),
    lambda: simulate(even(1, 4, 4), constant(1.0), 4, band="middle"),
    lambda: simulate(even(1, 4, 4), constant(1.0), 4, clients=0),
    lambda: simulate(even(1, 4, 4), constant(1.0), 0),
    lambda: simulate(even(1, 4, 4), constant(1.0), 4, policy="none"),
    lambda: simulate(even(1, 4, 4), constant(1.0), 4).percentile("speed", 50),
    lambda: simulate(even(1, 4, 4), constant(1.0), 4).percentile("latency", 101),
    lambda: serve(setup("llama-3-8b", "rtx-4090-24gb"), even(1, 4, 4), "any"),
    lambda: throughput_of(setup("llama-3-8b", "rtx-4090-24gb"), even(1, 4, 4)),
    lambda: fit_cost([]), lambda: fit_cost([Step(1, 1, 5, 0.1)] * 100)])
def test_what_cannot_be_is_said_in_one_line(ask):
    with pytest.raises(LabError) as caught:
        ask()
    assert "\n" not in str(caught.value)


# ---- events, by hand --------------------------------------------------------------------------------------------------

def test_steps_counted_by_hand():
    two = [Arrival(0.0, 3, 2, number=1), Arrival(0.0, 5, 4, number=2)]
    run = simulate(two, constant(1.0), 8, 4, sequences=4)
    assert [m.rows for m in run.history] == [8, 2, 1, 1] and [m.sequences for m in run.history] == [2, 2, 1, 1]
    assert [(r.first, r.ended) for r in run.requests] == [(1.0, 2.0), (1.0, 4.0)]
    assert run.seconds == 4 and run.requests_per_second == 0.5 and run.tokens_per_second == 1.5
    assert run.all_tokens_per_second == (5 + 9) / 4
    assert run.requests[1].each == 1.0 and run.requests[1].normalized == 1.0 and run.requests[0].first_seconds == 1.0
    assert run.history[0].used == 3 and run.history[0].wasted == 12 - 8
    assert (run.percentile("latency", 50), run.percentile("latency", 100), run.mean("latency")) == (2.0, 4.0, 3.0)
    assert [simulate(two, constant(1.0), 8, 4, band=band).seconds for band in ("low", "high")] == [8, 2]


def test_alone_and_static_by_hand():
    two = [Arrival(0.0, 3, 2, number=1), Arrival(0.0, 5, 4, number=2)]
    assert simulate(two, constant(1.0), 8, 4, policy="alone").seconds == 2 + 4
    static = simulate(two, constant(1.0), 8, 4, policy="static", context=16)
    assert static.seconds == 4 and [m.padded for m in static.history] == [2, 0, 1, 1]
    assert static.history[0].used == 8 and static.computing_share == 12 / 16
    assert simulate(two, constant(1.0), 4, 4, policy="static", context=16).seconds == 2 + 4        # room for one at a time


def test_requests_are_waited_for():
    late = [Arrival(0.0, 2, 1, number=1), Arrival(10.0, 2, 1, number=2)]
    run = simulate(late, constant(1.0), 8, 4)
    assert [(r.arrived, r.first) for r in run.requests] == [(0.0, 1.0), (10.0, 11.0)] and run.seconds == 11
    assert run.over_time("running") == 0.0                   # each ended with its step
    assert simulate([], constant(1.0), 8).seconds == 0 and simulate([], constant(1.0), 8).requests_per_second == 0


def test_what_can_never_be_served_is_refused():
    run = simulate([Arrival(0.0, 100, 5, number=1), Arrival(0.0, 5, 5, number=2)], constant(1.0), 4, 16, clients=1)
    assert run.refused == 1 and len(run.requests) == 1


def test_every_token_is_computed_once_and_every_request_ends_once():
    asked = sharegpt_like(60, scale=0.5, rate=20.0)
    run = simulate(asked, constant(0.01), 4000, rows=128, share=False)
    assert sorted((r.prompt, r.output) for r in run.requests) == sorted((a.prompt, a.output) for a in asked)
    assert sum(m.rows for m in run.history) == sum(a.prompt + a.output - 1 for a in asked) and not run.preemptions
    assert max(m.rows for m in run.history) <= 128 and all(m.used + m.cached + m.free == 4000 for m in run.history)
    assert all(r.arrived < r.first <= r.ended for r in run.requests)
    begins = [m.at for m in run.history]
    assert all(b >= a.at + a.seconds - 1e-9 for a, b in zip(run.history, begins[1:], strict=False))


def test_too_little_memory_preempts_and_everyone_still_ends():
    asked = even(20, 20, 100)
    tight, ample = (simulate(asked, constant(1.0), n, 4) for n in (120, 4000))
    assert tight.preemptions > 0 == ample.preemptions
    assert len(tight.requests) == len(ample.requests) == 20 and tight.seconds > ample.seconds
    assert max(m.used for m in tight.history) <= 120


def test_clients_ask_one_after_another():
    asked = sharegpt_like(40, scale=0.2)
    runs = {n: simulate(asked, constant(0.02), 4000, clients=n) for n in (1, 4, 16)}
    for n, run in runs.items():
        assert max(m.sequences for m in run.history) <= n and len(run.requests) == 40
    assert runs[1].seconds == pytest.approx(simulate(asked, constant(0.02), 4000, policy="alone").seconds)
    assert runs[1].seconds > runs[4].seconds > runs[16].seconds


def test_a_shared_prefix_is_read_once():
    asked = shared_prefix(50, prefix=320, seed=2)
    cost = setup("llama-3-8b", "rtx-4090-24gb").cost
    shared, apart = (simulate(asked, cost, 2800, rows=2048, sequences=256, share=share) for share in (True, False))
    assert apart.reused == 0 and shared.reused == 320 * 49
    assert sum(m.rows for m in apart.history) - sum(m.rows for m in shared.history) == shared.reused
    assert shared.requests_per_second > 1.3 * apart.requests_per_second
    assert max(m.used for m in shared.history) < 0.3 * max(m.used for m in apart.history)


# ---- what paging is worth ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def paper():
    """The paper's first setting, as near as it can be had: 13 billion parameters in half precision on an A100 of 40 GB."""
    return compare_policies(setup("llama-2-13b", "a100-sxm4-40gb"), sharegpt_like(200), ("paged", "reserved", "static"))


def test_the_papers_waste(paper):
    """Figure 2: 96.3 % of vLLM's cache hold tokens, 20.4 % where each sequence reserves the longest; the blog: under 4 %
    wasted, and 60 to 80 % before."""
    assert 0.005 < paper.runs["paged"].wasted_share < 0.04
    assert paper.runs["reserved"].wasted_share == pytest.approx(1 - 0.204, abs=0.05)
    assert paper.runs["static"].wasted_share > 0.6


def test_the_papers_batches_and_throughput(paper):
    """Figure 13a: 30.42 requests at once (OPT-13B), 7.00 where each reserves the longest. Section 6.2: 2.7 to 8 times the rate
    of that; the abstract: 2 to 4 times of what there was."""
    assert paper.runs["paged"].over_time("running") == pytest.approx(30.42, rel=0.25)
    assert paper.runs["reserved"].over_time("running") == pytest.approx(7.0, rel=0.25)
    assert 2.0 < paper.times("paged", "reserved") < 8.0
    assert paper.times("paged", "static") > paper.times("paged", "reserved") > 1
    assert len(paper.table) == 3
    assert "modelled" in repr(paper) and all(len(run.requests) == 200 for run in paper.runs.values())


def test_short_requests_gain_less(paper):
    short = compare_policies(setup("llama-2-13b", "a100-sxm4-40gb"), alpaca_like(60), WAYS)
    assert list(short.runs) == list(WAYS) and short.times("alone", "static") < 0.5
    assert short.times("paged", "reserved") < paper.times("paged", "reserved")


def test_throughput_grows_with_load_and_latency_too():
    on = setup("llama-3-8b", "rtx-4090-24gb")
    by_clients = throughput_of(on, sharegpt_like(40, scale=0.3), clients=(1, 4, 16), bands=True)
    speeds = [row["tokens/s"] for row in by_clients]
    assert speeds == sorted(speeds) and speeds[2] > 6 * speeds[0]
    assert all(row["tokens/s low"] < row["tokens/s"] < row["tokens/s high"] for row in by_clients)
    assert by_clients[2]["s per token"] > by_clients[0]["s per token"]
    by_rate = throughput_of(on, sharegpt_like(60, scale=0.3), rates=(0.5, 200.0))
    assert by_rate[0]["requests/s"] == pytest.approx(0.5, rel=0.3) and by_rate[1]["requests/s"] < 100
    assert by_rate[0]["latency s"] < by_rate[1]["latency s"]


def test_the_bearable_rate_is_where_latency_reaches_the_limit():
    on = Setup("a toy", constant(0.1), (200, 200, 200), 64, 8, 256, 1.0)      # eight at a time, eight steps each: ten a second
    asked = even(400, 8, 8)
    rates = [bearable_rate(on, asked, normalized=limit) for limit in (0.11, 0.13, 0.2)]
    assert 0 < rates[0] < rates[1] < rates[2] < 10
    assert serve(on, timed(asked, rates[1])).mean("normalized") <= 0.13
    assert serve(on, timed(asked, 1.03 * rates[1])).mean("normalized") > 0.13
    assert bearable_rate(on, asked, normalized=1e6) == pytest.approx(10, rel=0.02)


def test_no_rate_is_bearable_where_a_request_alone_takes_longer():
    on, asked = Setup("a toy", constant(0.1), (200, 200, 200), 64, 8, 256, 1.0), even(40, 8, 8)
    assert bearable_rate(on, asked, normalized=0.099) == 0.0         # a step takes 0.1 s for however few
    assert 0 < bearable_rate(on, asked, normalized=0.1 + 1e-9) < 0.5        # only where no two meet
    assert bearable_rate(on, asked, normalized=0.0) == bearable_rate(on, asked, normalized=-1.0) == 0.0
    assert bearable_rate(on, []) == bearable_rate(on, even(4, 400, 8)) == 0.0       # none there, none that fits


def test_what_is_bearable_lies_in_its_band():
    """Steps that take longer bear less, and where the slow ones bear nothing that is 0, not more than the usual ones."""
    on, asked = Setup("a toy", constant(0.1), (200, 200, 200), 64, 8, 256, 1.0), even(100, 8, 8)
    for limit in (0.04, 0.15, 0.3):
        rates = [bearable_rate(on, asked, normalized=limit, band=band) for band in ("low", "best", "high")]
        assert rates == sorted(rates) and (rates[0] == 0) == (limit < 0.2) and (rates[1] == 0) == (limit < 0.1), rates


def test_a_large_model_is_simulated_step_by_step_in_few_steps():
    """500 requests of a 70B model: what it takes grows with steps times sequences in them, some 170,000 here."""
    run = simulate_setup(setup("llama-3-70b", ["h100-sxm5-80gb"] * 2, "FP8"), sharegpt_like(500))
    assert len(run.requests) == 500 and len(run.history) < 3000
    assert sum(m.sequences for m in run.history) == pytest.approx(500 * 338, rel=0.05)


# ---- costs learnt from steps ------------------------------------------------------------------------------------------

def truth(rows: int, wanted: int, looked: int) -> float:
    """A machine that reads weights once and multiplies from eight rows on."""
    return 0.004 + max(0.010, 0.0012 * rows) + 0.0002 * wanted + 2e-7 * looked


def measured_steps(count: int, noise: float, seed: int = 0) -> list[Step]:
    random = Random(seed)
    found = []
    for _ in range(count):
        rows = random.choice((1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 100, 150, 200, 256))
        wanted, looked = random.randint(0, min(rows, 48)), random.randint(rows, 20000)
        found.append(Step(rows, wanted, looked, truth(rows, wanted, looked) * random.lognormvariate(0, noise)))
    return found


def test_a_cost_is_learnt_from_noisy_steps():
    fitted = fit_cost(measured_steps(600, 0.05))
    assert min(fitted.factors) >= 0
    for rows, wanted, looked in ((1, 1, 100), (8, 8, 3000), (48, 48, 15000), (256, 10, 5000)):
        assert fitted.predicted(rows, wanted, looked) == pytest.approx(truth(rows, wanted, looked), rel=0.05)
    assert fitted.error == pytest.approx(0.034, rel=0.35)          # the median of |lognormal(0, 0.05) - 1|
    assert fitted.total == pytest.approx(1.0, abs=0.01) and 0.88 < fitted.low < 0.96 < 1.04 < fitted.high < 1.12
    assert fitted.kind == "measured" and fitted.steps + fitted.dropped == 600 and fitted.dropped < 6
    assert f"{fitted.steps}" in fitted.why
    load = load_of([(99, 1, True)] * 8)
    assert fitted.seconds(load, 0) > fitted.seconds(load) > fitted.seconds(load, 2)


def test_steps_that_something_else_held_up_are_left_out():
    steps = measured_steps(400, 0.03)
    held_up = [s._replace(seconds=8 * s.seconds) if i % 25 == 0 else s for i, s in enumerate(steps)]
    fitted = fit_cost(held_up)
    assert 16 <= fitted.dropped < 24 and fitted.total < 0.85          # and what they took is owned up to
    assert fitted.predicted(16, 16, 4000) == pytest.approx(truth(16, 16, 4000), rel=0.05)


def test_factors_are_the_best_of_those_not_negative():
    """Karush, Kuhn and Tucker: where a factor is free the gradient is nothing, where it is zero it would have to go below."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        a, b = random.normal(size=(40, 9)), random.normal(size=40)
        a[:, 8] = a[:, 0] + a[:, 1] + 1e-9                  # and where they depend on each other
        x = _not_negative(a, b)
        gradient = a.T @ (a @ x - b)
        assert (x >= 0).all() and (gradient > -1e-6).all() and abs(gradient @ x) < 1e-6


def test_a_learnt_cost_repeats_the_run_it_was_learnt_from_and_foretells_another():
    class Machine:
        window = 0

        def seconds(self, load: Load, band: int = 1) -> float:
            return truth(load.rows, load.wanted, load.looked)

    first = simulate(sharegpt_like(60, scale=0.25, seed=1), Machine(), 600, rows=256, sequences=48)
    fitted = fit_cost(first.history)
    assert fitted.error < 0.02
    for seed, policy in ((1, "paged"), (2, "paged"), (2, "static"), (2, "alone")):
        asked = sharegpt_like(40, scale=0.25, seed=seed)
        real, said = (simulate(asked, cost, 600, rows=256, sequences=48, policy=policy, context=512)
                      for cost in (Machine(), fitted))
        assert said.seconds == pytest.approx(real.seconds, rel=0.06), policy
        assert said.percentile("latency", 90) == pytest.approx(real.percentile("latency", 90), rel=0.1)


# ---- what people measured ---------------------------------------------------------------------------------------------

def test_published_rows_say_what_they_are():
    rows = published()
    assert len(rows) >= 50 and len({r.id for r in rows}) == len(rows)
    assert {r.kind for r in rows} == {"measured", "derived"} and {r.use for r in rows} == {"fit", "check"}
    assert {r.measure for r in rows} == {"requests/s", "s/token"} and {r.lengths for r in rows} == {"even", "sharegpt"}
    assert all(math.isfinite(r.value) and r.value > 0 and r.requests > 0 for r in rows)
    for row in rows:
        llmlab.model(row.model)
        for card in row.cards.split("|"):
            llmlab.gpu(card)


def test_what_people_measured_of_few_requests_lies_inside_the_band():
    """The rows that are quick to simulate; tests/bench/bench_simulating.py does all of them."""
    quick = [r for r in published() if r.requests * r.output < 12_000 and r.use == "check"]
    found = beside_published(quick)
    assert len(found) >= 4 and all(row["inside"] for row in found), found
    ratios = sorted(row["measured / best"] for row in found)
    assert 0.8 < ratios[len(ratios) // 2] < 1.25


def test_steps_are_read_from_dicts_too():
    run = simulate(sharegpt_like(20, scale=0.2), setup("llama-3-8b", "rtx-4090-24gb").cost, 400)
    assert fit_cost([m._asdict() for m in run.history]) == fit_cost(run.history)
