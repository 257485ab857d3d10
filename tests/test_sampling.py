"""The next token of one text or of many at once: cuts, penalties, bias, masks, draws, logarithms of chances."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmlab.errors import LabError
from llmlab.runtime.sampling import Chooser, Options, Stops, choose_each, logprobs

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
WAYS = ({"temperature": 0}, {}, PLAIN, PLAIN | {"top_p": 0.9}, PLAIN | {"min_p": 0.02}, PLAIN | {"top_p": 0.999999},
        {"temperature": 2.5, "top_k": 7}, {"top_k": 7, "top_p": 1.0}, PLAIN | {"repeat_penalty": 1.3},
        PLAIN | {"temperature": 1e-30}, PLAIN | {"top_k": 3, "temperature": 1e-300})


class Only:
    """A mask that lets the same tokens come always, and remembers what came."""

    def __init__(self, tokens, count, came=()):
        self.tokens, self.count, self.came = tokens, count, list(came)

    ended = property(lambda self: len(self.came) > 2)

    def allowed(self):
        if not self.tokens:
            raise LabError("nothing fits")
        found = torch.zeros(self.count, dtype=torch.bool)
        found[list(self.tokens)] = True
        return found

    def take(self, token):
        self.came.append(token)

    def fork(self):
        return Only(self.tokens, self.count, self.came)


def chooser(seed=5, mask=None, bias=None, presence_penalty=0.0, frequency_penalty=0.0, **options):
    return Chooser(Options(**{"seed": seed} | options), mask=mask, bias=bias, presence_penalty=presence_penalty,
                   frequency_penalty=frequency_penalty)


def logits(rows, vocabulary, seed=0, scale=3.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


# ---- many at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_rows_together_are_what_each_is_alone(vocabulary):
    """All ways of choosing in one call, against each row alone; the logits stay as they were."""
    def everyone():
        ways = [chooser(seed, **way) for seed, way in enumerate(WAYS * 2)]
        return [*ways, chooser(1, Only({3, 4}, vocabulary)), chooser(2, bias={7: 100.0}, **PLAIN),
                chooser(3, presence_penalty=1.0, frequency_penalty=0.5), chooser(4, temperature=0, bias={9: 1e6})]
    together, alone = everyone(), everyone()
    prompts, news = [[at, 1, 2] for at in range(len(alone))], [[] for _ in alone]
    for step in range(8):
        rows = logits(len(alone), vocabulary, step)
        before = rows.clone()
        found = choose_each(together, rows, prompts, news)
        assert found == [one(rows[at], prompts[at], news[at]) for at, one in enumerate(alone)]
        assert torch.equal(rows, before)
        for new, token in zip(news, found, strict=True):
            new.append(token)
    assert {*news[-4]} == {3, 4} and {*news[-3]} == {7} and {*news[-1]} == {9}
    assert len({tuple(new) for new in news}) > len(WAYS)


def test_a_row_that_cannot_be_chosen_harms_no_other():
    rows = logits(6, 60)
    rows[1], rows[2, 5], rows[4] = torch.nan, torch.inf, -torch.inf
    asked = [chooser(), chooser(temperature=0), chooser(), chooser(mask=Only((), 60)), chooser(**PLAIN), chooser(**PLAIN)]
    found = choose_each(asked, rows, [[]] * 6, [[]] * 6)
    assert found[0] == chooser()(rows[0], [], []) and found[5] == chooser(**PLAIN)(rows[5], [], [])
    assert all(isinstance(found[at], LabError) for at in (1, 2, 3, 4))
    assert "not numbers" in str(found[1]) and "nothing fits" in str(found[3])
    with pytest.raises(LabError, match="not numbers"):
        chooser(**PLAIN)(rows[1], [], [])


def test_no_rows_are_no_tokens():
    assert choose_each([], torch.empty(0, 50), [], []) == []


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"min_p": 0.05}, {"top_p": 0.8, "min_p": 0.01}, {"top_p": 0.99999}, {}])
def test_draws_from_a_large_vocabulary_follow_the_chances(options):
    """The short way (the likeliest 512 first, or no sorting at all) draws from the very chances of the long one."""
    scores = logits(1, 1200, scale=2.0)[0]
    chances = scores.softmax(-1)
    order = chances.argsort(descending=True)
    kept = chances[order]
    if "top_p" in options:
        kept = kept.where(kept.cumsum(-1) - kept < options["top_p"], 0)
    kept = kept.where(kept >= options.get("min_p", 0) * kept[0], 0)
    expected = torch.zeros(1200).index_put((order,), kept / kept.sum())
    choose, draws = chooser(11, **PLAIN | options), 1000
    found = torch.bincount(torch.tensor([choose(scores, [], []) for _ in range(draws)]), minlength=1200) / draws
    assert not found[expected == 0].any()
    # The twenty likeliest each, and the sum of all differences, as far as so many draws can tell.
    assert torch.allclose(found[order[:20]], expected[order[:20]], atol=4 * (0.25 / draws) ** 0.5)
    assert (found - expected).abs().sum() < 1.6 * (2 / 3.1416 * expected * (1 - expected) / draws).sqrt().sum()


def test_equal_tokens_are_cut_off_together_and_the_likeliest_stays():
    """Whatever the share, also where sums are wrong in their last bit."""
    flat, steep = torch.zeros(1200), torch.arange(1200.0)
    for top_p in (1e-6, 0.5, 1 - 1e-9, 1 - 1e-16):
        drawn = chooser(3, **PLAIN | {"top_p": top_p})
        assert len({drawn(flat, [], []) for _ in range(40)}) > 30
        assert chooser(3, **PLAIN | {"top_p": min(top_p, 0.5)})(steep, [], []) == 1199
    assert chooser(3, **PLAIN | {"min_p": 1.0, "top_p": 0.9})(steep, [], []) == 1199
    ends = torch.full((1200,), -torch.inf)
    ends[[7, 900]] = 1.0
    assert {chooser(seed, **PLAIN | {"top_p": 0.9})(ends, [], []) for seed in range(20)} == {7, 900}


@pytest.mark.parametrize("options", [PLAIN, PLAIN | {"top_p": 0.9}, PLAIN | {"min_p": 0.01}])
def test_many_rows_are_no_more_work_shared_among_threads(options):
    """torch has several threads do whatever goes over 32,768 numbers or more, and on a busy computer waits for each."""
    class Shared(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if any(isinstance(one, torch.Tensor) and one.numel() >= 32_768 for one in args):
                counted.append(func)
            return found

    found = []
    for rows in (1, 8):
        counted, asked, scores = [], [chooser(at, **options) for at in range(rows)], logits(rows, 40_000)
        with Shared():
            choose_each(asked, scores, [[]] * rows, [[]] * rows)
        found.append(len(counted))
    assert found[0] == found[1], counted


# ---- what changes the logits -------------------------------------------------------------------------------


def test_penalties_are_openais():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, of the new tokens alone."""
    scores = torch.tensor([3.0, 2.9, 2.4, 0.0])
    greedy = {"temperature": 0}
    assert chooser(presence_penalty=0.2, **greedy)(scores, [0, 0], []) == 0
    assert chooser(presence_penalty=0.2, **greedy)(scores, [], [0]) == 1
    assert chooser(presence_penalty=0.2, **greedy)(scores, [], [0, 0, 0, 1]) == 0
    assert chooser(frequency_penalty=0.2, **greedy)(scores, [], [0, 0, 0, 1]) == 1
    assert chooser(frequency_penalty=0.3, **greedy)(scores, [], [0, 0, 0, 1, 1, 1]) == 2
    assert chooser(presence_penalty=-2, **greedy)(scores, [], [1]) == 1
    choose = chooser(presence_penalty=0.5, frequency_penalty=0.25, **greedy)
    changed = scores.clone()
    choose.change(changed, [], [2, 2, 3])
    assert changed.tolist() == pytest.approx([3.0, 2.9, 2.4 - 0.5 - 0.5, -0.75])


def test_a_bias_forces_bans_and_passes_over_what_is_none():
    scores = torch.tensor([3.0, 2.0, 1.0])
    assert chooser(temperature=0, bias={2: 100})(scores, [], []) == 2
    assert chooser(temperature=0, bias={0: -100, 17: 100})(scores, [], []) == 1
    assert {chooser(seed, **PLAIN, bias={0: -100, 1: -100.0})(scores, [], []) for seed in range(20)} == {2}


@pytest.mark.parametrize("wrong", [{"bias": {-1: 1.0}}, {"bias": {"5": 1.0}}, {"bias": {5: float("nan")}}, {"bias": {True: 1}},
                                   {"presence_penalty": float("inf")}, {"frequency_penalty": "1"}])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(LabError, match="logit_bias|penalty"):
        chooser(**wrong)


def test_a_mask_holds_and_hears_what_came():
    """Also where the model has more logits than there are tokens."""
    mask = Only({1, 3}, 4)
    for options in WAYS:
        mask = Only({1, 3}, 4)
        choose = chooser(mask=mask, **options)
        found = [choose(logits(1, 700, step)[0] + torch.arange(700), [], []) for step in range(3)]
        assert {*found} <= {1, 3} and mask.came == found and choose.ended
    assert not chooser().ended


def test_a_fork_draws_the_same_and_leaves_the_numbers():
    choose = chooser(mask=Only(range(50), 50), **PLAIN)
    ahead = choose.fork()
    rows = logits(6, 50)
    drawn = [ahead(row, [], []) for row in rows]
    assert choose.mask.came == [] and ahead.mask.came == drawn
    assert [choose(row, [], []) for row in rows] == drawn and len({*drawn}) > 1


def test_several_share_the_bias_and_draw_by_seeds_of_their_own():
    rows = logits(6, 50)

    def drawn(one):
        return [one(row, [], []) for row in rows]

    found = chooser(7, mask=Only(range(50), 50), bias={3: 2.0}, **PLAIN).several(3)
    assert [one.seed for one in found] == [7, 8, 9] and len({id(one._biases) for one in found}) == 1
    assert [drawn(one) for one in found] == [drawn(chooser(seed, bias={3: 2.0}, **PLAIN)) for seed in (7, 8, 9)]
    assert [len(one.mask.came) for one in found] == [6, 6, 6]
    assert [one.seed for one in chooser(2**63 - 1).several(2)] == [2**63 - 1, 0]
    free = chooser(None, **PLAIN).several(2)
    assert free[0].seed != free[1].seed and drawn(free[1]) == drawn(chooser(free[1].seed, **PLAIN))
    assert {one.seed for one in chooser(temperature=0).several(2)} == {None}


# ---- logarithms of chances ---------------------------------------------------------------------------------


def test_logprobs_are_of_the_model_itself():
    row = logits(1, 400)[0]
    expected = row.double().log_softmax(-1)
    found = logprobs(row, 17, 5)
    assert found.token == 17 and found.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    best = expected.topk(5)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert logprobs(row, 3).top == () and len(logprobs(row[:3], 0, 20).top) == 3
    row[3] = -torch.inf
    assert logprobs(row, 3).logprob == -9999


# ---- stop strings ------------------------------------------------------------------------------------------


def test_a_stop_string_is_found_however_the_text_is_cut():
    text, stops = "one stop two ##END## three", ("##END##", "##X")
    for size in range(1, 12):
        reader = Stops(stops)
        said = ""
        for at in range(0, len(text), size):
            said += reader.pass_on(text[at:at + size])
            if reader.found:
                break
        assert said == "one stop two " and reader.found and reader.rest() == ""
    reader = copy.copy(Stops(("ab",)))
    assert reader.pass_on("xa") == "x" and reader.rest() == "a"
