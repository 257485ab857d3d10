"""What each thing takes in seconds: bytes over bandwidth, operations over rate. Every figure here is modelled.

Decode on a card is close to 3.3 ms + bytes read per token / bandwidth, fitted on two of the measured speeds in
data/measured_speeds.csv (Llama 3 8B Q4_K_M on an RTX 3070 and an RTX 4080) and within 10 % of the others of its kind;
layers on the host add their own bytes over the host's bandwidth, because layers run one after another.
"""

import math
from dataclasses import dataclass

from .catalog import Gpu, links

TOKEN_OVERHEAD = 3.3e-3                       # seconds a token, kernels started and logits fetched
DECODE_BAND = (0.75, 1.0, 1.2)                # share of the formula's rate that engines reach: low, best, high
PREFILL_SHARE = (0.3, 0.6, 0.95)              # of the card's half-precision rate: Llama 3 8B on a 3070, 3090 and 4090
                                              # reaches 0.69 to 0.95 at 512 prompt tokens, 0.39 to 0.57 at 8192 (public runs)
LINK_SHARE = (0.4, 0.8, 1.0)                  # of the card's link that weights sent over for a prompt reach
USUAL_LINK = 12e9                             # bytes per second where a card's link is not in the catalogue (PCIe 3.0 x16)
HOST_FLOPS = (1e11, 3e11, 1e12)               # half-precision operations a second of a desktop processor


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second: (low, best, high), modelled. None where the catalogue lacks the card's rates."""

    decode_tps: tuple[float, float, float] | None
    prefill_tps: tuple[float, float, float] | None


def host_bandwidth() -> tuple[float, float, float]:
    """Bytes per second a desktop's RAM delivers: DDR4-2400 to DDR5-4800, two channels; usual DDR4-3200."""
    rows = links()
    return tuple(rows[name].rate for name in ("ddr4-2133-dual", "ddr4-3200-dual", "ddr5-4800-dual"))


def speed(cards: tuple[Gpu, ...], card_bytes: tuple[int, ...], host_bytes: int, active_params: int,
          host_share: float, host_held: int, ubatch: int) -> Speed:
    """Tokens per second where one token reads `card_bytes[i]` on card i and `host_bytes` on the host.

    `active_params`: weights multiplied for a token; `host_share`: the part of them on the host, which holds `host_held`
    bytes of weights; prompts are taken in by `ubatch` tokens.
    """
    if any(not card.bandwidth or math.isnan(card.bandwidth) for card in cards):
        return Speed(None, None)
    on_cards = sum(b / card.bandwidth for b, card in zip(card_bytes, cards, strict=True))
    low_ram, usual_ram, high_ram = host_bandwidth()
    decode = tuple(
        share / (TOKEN_OVERHEAD + on_cards + host_bytes / ram)
        for share, ram in zip(DECODE_BAND, (low_ram, usual_ram, high_ram), strict=True))
    return Speed(decode, _prefill(cards, active_params, host_share, host_held, ubatch))


def _prefill(cards: tuple[Gpu, ...], active_params: int, host_share: float, host_held: int,
             ubatch: int) -> tuple[float, float, float] | None:
    """Prompt tokens per second: two operations a weight, over the rate of whatever multiplies it.

    Beside a card, weights on the host are sent over for every ubatch (llama.cpp's op offload) where that is faster than
    multiplying them on the host.
    """
    rates = [max(card.fp16_flops or 0, card.fp32_flops or 0) for card in cards]   # Pascal computes in fp32: 64 times faster
    if not all(rates):
        return None
    slowest = min(rates) if rates else None
    found = []
    link = min(((c.link.rate if c.link else None) or USUAL_LINK for c in cards), default=0)
    for share, host, sent in zip(PREFILL_SHARE, HOST_FLOPS, LINK_SHARE, strict=True):
        seconds = 2 * active_params * host_share / host
        if slowest:
            over = host_held / (link * sent) / ubatch + 2 * active_params * host_share / (slowest * share)
            seconds = min(seconds, over) + 2 * active_params * (1 - host_share) / (slowest * share)
        found.append(1 / seconds if seconds else 0.0)
    return tuple(found)
