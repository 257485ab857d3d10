"""A plan over hosts against llama.cpp's RPC itself: two workers in network namespaces, every byte between them counted."""

import os
from dataclasses import replace

import pytest
from llama_engine import llama_cpp
from rpc_hosts import hosts, namespaces

import llmlab
from llmlab.clustering import wire
from llmlab.clustering.planning import _owners
from llmlab.memory import weights
from llmlab.placing import assignment, request

pytestmark = pytest.mark.peers

CONTEXT = 2048
QUESTION = 3269, 16            # how large is such a tensor in your memory? asked once for every new shape, and the answer
OTHERS = 2000                  # bytes of everything asked as a model loads that is no such question: devices, alignments, bases


@pytest.fixture(scope="module", autouse=True)
def built_with_rpc():
    if not llama_cpp.llama_supports_rpc():
        assert os.environ.get("CI") != "true", "llama-cpp-python was built without RPC; `make peers` builds it anew"
        pytest.skip("llama-cpp-python was built without RPC; `make peers` builds it anew")


@pytest.fixture(scope="module")
def plan(smollm2):
    """As the test starts it: a head without a card, two workers that share the layers evenly."""
    card = replace(llmlab.gpu("rtx-3090-24gb"), name="a worker's processor")
    return llmlab.fit_hosts(smollm2, [[], [card], [card]], context=CONTEXT, split=(1, 1), batch=512)


class Predicted:
    """The plan's messages, step by step."""

    def __init__(self, plan):
        self.spec, self.request, self.owner = plan.spec, request(plan.settings), _owners(plan.hosts, "llama.cpp")
        self.where = tuple(assignment(plan.spec, plan.cards, plan.settings, plan.gpu_layers))

    def step(self, used: int, tokens: int = 1, new: bool = False) -> list[tuple[int, int]]:
        found = wire.step(self.spec, self.request, self.where, self.owner, used, tokens, new)[1:]
        return [(t.sent, t.received) for t in found]


def summed(*steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(sum(s for s, _ in each), sum(r for _, r in each)) for each in zip(*steps, strict=True)]


def questions(counted: list[tuple[int, int]], expected: list[tuple[int, int]]) -> list[int]:
    """How many sizes were asked beside what was expected, of matrices and attention of a new batch; nothing else was sent but
    a buffer's address."""
    found = []
    for (sent, received), (at_least, back) in zip(counted, expected, strict=True):
        asked, more = divmod(sent - at_least, QUESTION[0])
        assert 0 <= more < 100 and 0 <= received - back - asked * QUESTION[1] < 100
        found.append(asked)
    return found


def test_every_byte_of_decode_and_the_same_text(smollm2, plan):
    apart = namespaces()
    print("workers in network namespaces" if apart else "no network namespaces here (they take CAP_NET_ADMIN and iproute2): "
          "workers on loopback, behind proxies that count")
    with hosts(2, smollm2, CONTEXT, apart=apart) as head:
        counted = {line: head.ask(line)[1] for line in ("load", "context", "prompt 250")}
        first = head.ask("decode 1")[1]
        few = head.ask("decode 5")[1]
        said, crossing = head.ask("decode 20")
    with hosts(0, smollm2, CONTEXT) as alone:
        for line in ("load", "context", "prompt 250", "decode 1", "decode 5"):
            alone.ask(line)
        assert said["text"] == alone.ask("decode 20")[0]["text"]

    expected = Predicted(plan)
    assert first == expected.step(251, new=True)                               # another batch than the prompt's: a new graph
    assert few == summed(*(expected.step(252 + i) for i in range(5)))          # which is only named from then on
    assert crossing == summed(*(expected.step(257 + i, new=i == 0) for i in range(20)))      # until 256 cells are not enough

    assert all(0 < n < 10 for n in questions(counted["prompt 250"], expected.step(250, 250, new=True)))

    for (sent, received), worker in zip(counted["load"], plan.loading.values(), strict=True):
        asked = sent - worker.sent
        assert 0 < asked < 5 * QUESTION[0] + OTHERS and 0 < received - worker.received < OTHERS
        assert asked < worker.sent / 1000


def test_a_worker_with_a_cache_is_sent_large_tensors_once(smollm2, plan, tmp_path):
    (tmp_path / "kept").mkdir()
    loads = []
    for _ in range(2):
        with hosts(2, smollm2, CONTEXT, apart=False, cache=str(tmp_path / "kept")) as head:
            loads.append(head.ask("load")[1])
    for load, traffic in zip(loads, (plan.loading, plan.loading_again), strict=True):
        for (sent, _), worker in zip(load, traffic.values(), strict=True):
            assert 0 <= sent - worker.sent < 5 * QUESTION[0] + OTHERS
    assert loads[1][1][0] < loads[0][1][0] / 1.8                               # the output matrix is half of it


def test_the_loading_counted_is_the_weights_placed(smollm2, plan):
    """What travels is the file's bytes of those layers, and less than one in a hundred beside."""
    w = weights(plan.spec, plan.settings.quant)
    travels = sum(size for tensor, size in zip(plan.spec.tensors, w.bytes, strict=True))      # tied: the table goes as output
    assert travels < sum(t.sent for t in plan.loading.values()) < travels * 1.01


@pytest.mark.parametrize("shares", ["3,1", "1,4"])
def test_other_splits(smollm2, plan, shares):
    """Where one worker holds more: other graphs, the same hidden states."""
    card = plan.hosts[1].cards
    uneven = llmlab.fit_hosts(smollm2, [[], card, card], context=CONTEXT, split=shares, batch=512)
    with hosts(2, smollm2, CONTEXT, shares, apart=False) as head:
        for line in ("load", "context", "prompt 8", "decode 1"):
            head.ask(line)
        few = head.ask("decode 3")[1]
        new = head.ask("prompt 9")[1]
    expected = Predicted(uneven)
    assert few == summed(*(expected.step(10 + i) for i in range(3)))
    assert all(0 < n < 10 for n in questions(new, expected.step(21, 9, new=True)))
    even = Predicted(plan)
    assert [r for _, r in few] == [3 * r for _, r in even.step(10)] and new != even.step(21, 9, new=True)
