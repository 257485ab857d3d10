"""Workloads: the published means, the same every time, Poisson arrivals, prefixes that are shared and nothing else."""

import math
from statistics import fmean, median, stdev

import pytest

from llmlab.errors import LabError
from llmlab.workloads import ALPACA, LONGEST, SHAREGPT, alpaca_like, drawn, even, shared_prefix, sharegpt_like


@pytest.mark.parametrize(("make", "means"), [(sharegpt_like, SHAREGPT), (alpaca_like, ALPACA)])
@pytest.mark.parametrize("count", [40, 500])
def test_mean_lengths_are_the_papers(make, means, count):
    found = make(count)
    assert len(found) == count
    for mean, lengths, longest in zip(means, ([a.prompt for a in found], [a.output for a in found]), LONGEST, strict=True):
        assert fmean(lengths) == pytest.approx(mean, rel=0.01)
        assert 1 <= min(lengths) and max(lengths) <= longest
        assert median(lengths) < 0.9 * mean and max(lengths) > 2.5 * mean                    # a long tail


def test_the_same_seed_gives_the_same_requests_and_another_others():
    assert sharegpt_like(50, seed=3, rate=2.0) == sharegpt_like(50, seed=3, rate=2.0)
    assert sharegpt_like(50, seed=3) != sharegpt_like(50, seed=4)
    lengths = [(a.prompt, a.output) for a in sharegpt_like(50, seed=3)]
    assert [(a.prompt, a.output) for a in sharegpt_like(50, seed=3, rate=9.0)] == lengths
    assert [a.prompt for a in sharegpt_like(200)] != sorted(a.prompt for a in sharegpt_like(200))


def test_prompts_and_answers_are_not_told_apart_by_each_other():
    found = sharegpt_like(2000)
    x, y = [math.log(a.prompt) for a in found], [math.log(a.output) for a in found]
    together = sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y, strict=True)) / (len(x) * stdev(x) * stdev(y))
    assert abs(together) < 0.1


def test_scaled_lengths():
    found = sharegpt_like(400, scale=0.25)
    assert fmean(a.prompt for a in found) == pytest.approx(SHAREGPT[0] / 4, rel=0.01)
    assert max(a.output for a in found) <= LONGEST[1] // 4


def test_poisson_arrivals():
    found = sharegpt_like(4000, rate=5.0)
    gaps = [b.at - a.at for a, b in zip(found, found[1:], strict=False)]
    assert min(gaps) > 0
    assert fmean(gaps) == pytest.approx(0.2, rel=0.06)
    assert stdev(gaps) == pytest.approx(0.2, rel=0.1)           # of exponential gaps both are the same
    assert {a.at for a in sharegpt_like(5)} == {0.0}


def test_tokens_are_the_same_every_time_and_only_a_group_shares_them():
    found = shared_prefix(30, prefix=40, groups=3, seed=1)
    texts = [a.tokens(1000, 5) for a in found]
    assert all(5 <= t < 1000 for text in texts for t in text)
    assert [a.tokens(1000, 5) for a in found] == texts
    assert [len(text) for text in texts] == [a.prompt for a in found]
    groups = {a.group: text[:40] for a, text in zip(found, texts, strict=True)}
    assert len(groups) == 3 and len({tuple(text) for text in groups.values()}) == 3
    assert all(text[:40] == groups[a.group] for a, text in zip(found, texts, strict=True))
    rest = [tuple(text[40:48]) for text in texts if len(text) >= 48]
    assert len(rest) > 10 and len(set(rest)) == len(rest)


def test_even_lengths_and_none():
    assert [(a.prompt, a.output, a.shared) for a in even(3, 256, 128)] == [(256, 128, 0)] * 3
    assert sharegpt_like(0) == even(0, 1, 1) == []
    assert len(sharegpt_like(1)) == 1


@pytest.mark.parametrize("call", [
    lambda: sharegpt_like(-1), lambda: sharegpt_like(2.5), lambda: sharegpt_like(3, scale=0), lambda: sharegpt_like(3, rate=0),
    lambda: sharegpt_like(3, rate=math.inf), lambda: drawn(3, 2000, 10), lambda: even(3, 0, 1), lambda: shared_prefix(3, -1),
    lambda: shared_prefix(3, 5, groups=0), lambda: sharegpt_like(3, scale=0.001), lambda: sharegpt_like(10, scale=math.nan)])
def test_what_cannot_be_is_said_in_one_line(call):
    with pytest.raises(LabError) as caught:
        call()
    assert "\n" not in str(caught.value) and "give" in str(caught.value)

