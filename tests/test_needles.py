"""Haystacks are what they say, and a search is what reading the prompt and each answer anew gives."""

import re

import pytest
import tiny_chat
import torch

from llmlab import quality
from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.quality import find_needles, haystack, needles
from llmlab.runtime.decoder import Decoder
from llmlab.vocabulary import words_of

DEPTHS = (0.5, 0.0, 1.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("needles") / "tiny.gguf", **{"llama.context_length": 4096})


@pytest.fixture(scope="module")
def words(path):
    return words_of(read_gguf(path))


@pytest.mark.parametrize("kind", ["number", "name"])
def test_a_haystack_holds_its_needles_where_it_says(words, kind):
    hay = haystack(words, 2000, DEPTHS, kind, seed=4)
    assert 1700 < hay.tokens <= 2000 and hay.tokens == len(words(hay.text)["input_ids"])
    middle, first, last = hay.needles
    assert hay.text.startswith(first.sentence) and hay.text.endswith(last.sentence)
    assert 0.35 < hay.text.index(middle.sentence) / len(hay.text) < 0.65
    for needle in hay.needles:
        assert hay.text.count(needle.sentence) == 1 and needle.sentence.endswith(f"{needle.answer}.")
        assert set(needle.wrong) == {other.answer for other in hay.needles} - {needle.answer} and len(needle.wrong) == 2
        assert re.fullmatch(r"[1-9]\d{4}" if kind == "number" else "[A-Z][a-z]+", needle.answer)
        assert needle.sentence.startswith(needle.lead)
    left = " ".join(re.split("|".join(re.escape(one.sentence) for one in hay.needles), hay.text)).split()
    book = quality.text().split()
    start = next(at for at in range(len(book)) if book[at:at + 20] == left[:20])
    assert left == (book[start:] + book)[:len(left)]        # nothing of the hay is changed or left out


def test_a_seed_makes_the_same_again(words):
    assert haystack(words, 900, DEPTHS, seed=1) == haystack(words, 900, DEPTHS, seed=1) != haystack(words, 900, DEPTHS, seed=2)


def test_a_prompt_asks_in_the_template_and_begins_the_answer(words):
    hay = haystack(words, 600, DEPTHS)
    text = words.decode(hay.prompt(words, hay.needles[0]))
    assert text.startswith("<|im_start|>user\n" + hay.text)
    assert text.endswith(f"\n\n{hay.needles[0].question}<|im_end|>\n<|im_start|>assistant\n{hay.needles[0].lead}")
    plain = tiny_chat.tokenizer(template=None)
    text = plain.decode(hay.prompt(plain, hay.needles[0]))
    assert text == f"{hay.text}\n\n{hay.needles[0].question}\n\n{hay.needles[0].lead}"


def test_a_search_is_what_reading_all_anew_gives(path, words):
    found = find_needles(path, "f16", 500, DEPTHS, trials=2, seed=7)
    assert len(found.searches) == 6 and found.found == 0 and "0% of 6 needles" in repr(found)
    decoder = Decoder.open(path, torch.float32, "reference")
    for hay, searches in ((haystack(words, 500, DEPTHS, seed=7 + trial), found.searches[3 * trial:3 * trial + 3])
                          for trial in (0, 1)):
        for needle, search in zip(hay.needles, searches, strict=True):
            assert search.needle == needle
            prompt, odds = hay.prompt(words, needle), []
            rows = {}
            for answer in (needle.answer, *needle.wrong):
                tokens = words(" " + answer)["input_ids"]
                decoder.forget()
                rows[answer] = decoder.logits(prompt + tokens)[len(prompt) - 1:-1].double().log_softmax(-1)
            right = words(" " + needle.answer)["input_ids"]
            likely = [float(row[token]) for row, token in zip(rows[needle.answer], right, strict=True)]
            for wrong in needle.wrong:      # numbers begin with different digits: they part at the second token
                assert needle.answer[0] != wrong[0]
                odds.append(likely[1] - float(rows[wrong][1][words(" " + wrong)["input_ids"][1]]))
            assert search.log_likelihood == pytest.approx(sum(likely), abs=0.02)
            assert search.margin == pytest.approx(min(odds), abs=0.02) and search.preferred == (search.margin > 0)
    depths = list(found.by_depth())
    assert [row["depth"] for row in depths] == [0, 0.5, 1] and all(row["needles"] == 2 for row in depths)
    assert sum(row["margin"] for row in depths) / 3 == pytest.approx(found.margin)


class Knows:
    """A decoder that goes on with one answer after a prompt, and with nothing but zeros elsewhere."""

    def __init__(self, answer):
        self.answer, self.tokens = answer, []

    def keep(self, tokens):
        self.tokens = tokens[:-1]
        return len(self.tokens)

    def logits(self, tokens):
        rows = torch.zeros(len(tokens), 259)
        rows[range(len(tokens)), self.answer[:len(tokens)]] = 5.0
        return rows


def test_found_is_what_greedy_generation_says(words):
    hay = haystack(words, 500, DEPTHS)
    right, other = (words(" " + needle.answer)["input_ids"] for needle in hay.needles[:2])
    yes, no = (needles._search(Knows(said), words, hay, hay.needles[0]) for said in (right, other))
    assert yes.found and yes.preferred and yes.margin == pytest.approx(5)
    assert not no.found and not no.preferred and no.margin == pytest.approx(-5)
    half = needles._search(Knows([*right[:-1], right[-1] + 1]), words, hay, hay.needles[0])
    assert not half.found and half.preferred       # all but the last digit


def test_what_cannot_be_is_said_in_a_line(path, words):
    for call in (lambda: haystack(words, 500, kind="colour"), lambda: haystack(words, 500, ()),
                 lambda: haystack(words, 500, (0.5, 1.5)), lambda: haystack(words, 500, [0.1] * 13),
                 lambda: haystack(words, 60, DEPTHS), lambda: haystack(words, 10**6, DEPTHS),
                 lambda: haystack(words, 500, text=" "), lambda: haystack(words, 500, seed=-1),
                 lambda: find_needles(path, "f16", 500, trials=0), lambda: find_needles(path, "q9", 500)):
        with pytest.raises(LabError) as error:
            call()
        assert "\n" not in str(error.value)
