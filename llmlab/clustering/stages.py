"""vLLM over several hosts: cards of a host share every block (tensor parallel), stages of layers follow each other (pipeline).

Read in vLLM 0.33: get_pp_indices (distributed/utils.py) deals the layers out; a stage hands over the hidden state and the
residual beside it, each card its share (send_tensor_dict), in the activations' 16 bits; a block ends attention and
feed-forward with one sum over the cards each (all-reduce).
"""

from collections.abc import Sequence
from math import gcd

from ..catalog import Gpu, Link
from ..errors import LabError
from ..reserving import Stage
from ..shapes import ModelSpec
from ..speed import Part
from .hosts import Host
from .wire import Traffic

SUM = (36e-6, 25e-6, 18e-6)         # seconds one sum over cards takes before its bytes do (NCCL, or vLLM's own over PCIe)
CARD_TO_CARD = (0.45, 0.65, 0.90)   # of the slot's rate: consumer cards pass through the host's memory
HANDED = 2                          # tensors of the model's width from stage to stage: hidden state and residual


def parallel(spec: ModelSpec, hosts: Sequence[Host]) -> tuple[int, int]:
    """(cards that share a block, stages): the most cards that every host's number and the heads divide into."""
    heads = max((b.heads for b in spec.blocks if b.attends), default=0)
    counts = [len(host.cards) for host in hosts]
    share = gcd(*counts)
    if heads:
        share = next(n for n in range(share, 0, -1) if share % n == 0 and heads % n == 0)
    return share, sum(counts) // share


def dealt(layers: int, stages: int) -> list[int]:
    """Layers of each stage: alike, and what is left over one each to the last stages but the very last (it has the output)."""
    if stages > layers:
        raise LabError(f"{stages} stages for {layers} layers; use fewer hosts or cards")
    each, more = divmod(layers, stages)
    found = [each] * stages
    for i in range(2, more + 2):
        found[-i] += 1
    return found


def stages_of(spec: ModelSpec, share: int, count: int) -> list[Stage]:
    """The stages in order; multi-token-prediction blocks are not dealt out."""
    found, first = [], 0
    sizes = dealt(len(spec.blocks), count)
    for i, size in enumerate(sizes):
        last = first + size if i < count - 1 else len(spec.layers)
        found.append(Stage(first, last, share, i == 0, i == count - 1))
        first += size
    return found


def hop(spec: ModelSpec, tokens: int) -> int:
    """Bytes from one stage to the next."""
    return HANDED * spec.width * 2 * tokens


def traffic(spec: ModelSpec, owner: Sequence[int], share: int, hosts: int, tokens: int) -> list[Traffic]:
    """Bytes each host sends and receives for `tokens` tokens: `owner` is the host of each card, in order of stages."""
    found = [Traffic() for _ in range(hosts)]
    at = [owner[i] for i in range(0, len(owner), share)]
    for a, b in zip(at, at[1:], strict=False):
        if a != b:
            found[a] += Traffic(hop(spec, tokens), 0, 0)
            found[b] += Traffic(0, hop(spec, tokens), 1)
    return found


def exchange_parts(spec: ModelSpec, names: Sequence[str], stages: Sequence[Stage], links: Sequence[Link | None],
                   tokens: int) -> list[Part]:
    """What the sums over a stage's cards take for one of `tokens` tokens computed together: a ring sends 2 (n-1)/n of the
    bytes through every card."""
    parts = []
    for name, stage, link in zip(names, stages, links, strict=True):
        n = stage.cards
        if n == 1:
            continue
        sums = 2 * (stage.last - stage.first)
        bytes = sums * 2 * (n - 1) / n * spec.width * 2
        rate = link.rate if link else 12e9
        seconds = tuple(sums * wait / tokens + bytes / (rate * part) for wait, part in zip(SUM, CARD_TO_CARD, strict=True))
        parts.append(Part(name, "exchange", bytes, seconds))
    return parts


def slowest(cards: Sequence[Gpu]) -> Gpu:
    return min(cards, key=lambda card: card.bandwidth)
