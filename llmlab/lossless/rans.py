"""Range coding of small symbols: thousands of lanes in lock step, so that every step is a handful of numpy's operations.

An asymmetric numeral system (Duda, arXiv:1311.2540; the range variant with 16-bit words): a lane's state x in [2^16, 2^32)
takes a symbol of share f of M in as x -> (x // f) M + start + x % f, and gives it back by the slot x % M. All lanes share one
stream of words: at each step those that have run low take the next ones in the order of their numbers, so that the
stream is read from front to back and no lane needs a pointer.

A step codes four symbols at once, whose shares are the products of each one's. The six commonest values (at most) have a place
of their own; the others are marked, and coded by themselves in a second pass of the same kind, and so on.
"""

import struct
from functools import lru_cache

import numpy as np
import torch

from ..errors import BadFile

BITS = 14                       # M = 2^14: a table of 128 KiB, which a core's cache holds
LOW, WORD = 1 << 16, 16         # the least state, bits of a word
KEPT = 7                        # values with a place of their own, the mark among them: 7^4 symbols in 2^14 slots
SHARES = 1 << 12                # what the values' own shares add up to
SLACK = 1.005                   # of the fewest bits: a thousandth of what a weight takes with its sign and mantissa
STEPS = (256, 64)               # a lane goes on for as many, so that its state (4 bytes) is little; in further, small passes
LANES = 1 << 13
FEW = 1 << 11                   # symbols that a pass of their own does not pay for
_HEAD = struct.Struct("<BBHQQ")         # kind, values, lanes, symbols, words or bytes
_RAW, _ONE, _CODED = 0, 1, 2


def encode(symbols: np.ndarray, steps: int = STEPS[0]) -> bytes:
    """uint8 [n] -> bytes that say all that is needed to get them back."""
    counts = torch.bincount(torch.from_numpy(symbols), minlength=256).numpy()       # four times as fast as numpy's
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    if len(order) == 1:
        return _HEAD.pack(_ONE, 1, 0, len(symbols), 0) + bytes([order[0]])
    if len(symbols) < FEW:
        return _HEAD.pack(_RAW, 0, 0, len(symbols), len(symbols)) + symbols.tobytes()
    values, shares = _chosen(order, counts[order])
    place = np.full(256, len(values) - 1, np.uint8)
    place[values] = np.arange(len(values))
    places = np.frombuffer(symbols.tobytes().translate(place.tobytes()), np.uint8)
    quads = -(-len(symbols) // 4)
    steps = -(-quads // max(1, min(LANES, quads // steps)))
    lanes = -(-quads // steps)
    padded = np.zeros((steps * lanes, 4), np.uint8)
    padded.reshape(-1)[:len(symbols)] = places
    states, words = _encode_quads(_joined(padded, len(values)).reshape(steps, lanes), *_slots(tuple(shares)))
    head = _HEAD.pack(_CODED, len(values), lanes, len(symbols), len(words))
    parts = [head, values.astype(np.uint8).tobytes(), shares.astype("<u2").tobytes(), states.astype("<u4").tobytes(),
             words.astype("<u2").tobytes()]
    if len(order) > len(values):        # the last value is the mark of all that have no place
        parts.append(encode(symbols.compress(places == len(values) - 1), STEPS[1]))
    else:
        parts.append(_HEAD.pack(_RAW, 0, 0, 0, 0))
    return b"".join(parts)


def decode(data: memoryview, count: int) -> np.ndarray:
    """uint8 [count] from what `encode` made of them. Raises BadFile where the bytes are not that."""
    symbols, used = _decode(data, count)
    if used != len(data):
        raise BadFile(f"coded exponents are {used} bytes long and {len(data)} are there: they are damaged")
    return symbols


def _decode(data: memoryview, most: int, depth: int = 0) -> tuple[np.ndarray, int]:
    """The symbols at the head of `data`, `most` at most, and how many bytes they took."""
    kind, kept, lanes, count, length = _HEAD.unpack(_part(data, 0, _HEAD.size))
    at = _HEAD.size
    if count > most or kind > _CODED or depth > 255:        # a pass gives one value its place, at least
        raise BadFile("coded exponents begin with no header that was ever written: they are damaged")
    if kind == _ONE:
        return np.full(count, _part(data, at, 1)[0], np.uint8), at + 1
    if kind == _RAW:
        return np.frombuffer(_part(data, at, count), np.uint8), at + count
    values = np.frombuffer(_part(data, at, kept), np.uint8)
    shares = np.frombuffer(_part(data, at + kept, 2 * kept), "<u2").astype(np.int64)
    at += 3 * kept
    if not 2 <= kept <= KEPT or shares.sum() != SHARES or shares.min() < 1 or not lanes:
        raise BadFile("coded exponents have shares that do not add up: they are damaged")
    states = np.frombuffer(_part(data, at, 4 * lanes), "<u4").astype(np.int64)
    words = np.frombuffer(_part(data, at + 4 * lanes, 2 * length), "<u2")
    at += 4 * lanes + 2 * length
    quads = -(-count // 4)
    symbols = _decode_quads(states, words, -(-quads // lanes), _table(values, tuple(shares.tolist())))[:count]
    marked, used = _decode(data[at:], count, depth + 1)
    if len(marked):
        places = np.flatnonzero(symbols == values[-1])
        if len(places) != len(marked):
            raise BadFile(f"{len(places)} rare exponents are marked and {len(marked)} are there: they are damaged")
        symbols[places] = marked
    return symbols, at + used


def _part(data: memoryview, start: int, length: int) -> memoryview:
    if start + length > len(data):
        raise BadFile("coded exponents end too early: they are cut short")
    return data[start:start + length]


# ---- shares -------------------------------------------------------------------------------------------------

def _chosen(order: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that get a place, the mark last, and their shares of SHARES: as many as cost hardly more bits than fewer do,
    because every further pass takes time."""
    found, total = [], counts.sum()
    for kept in range(2, min(KEPT, len(order)) + 1):
        mine = counts[:kept].copy()
        mine[-1] = counts[kept - 1:].sum()
        shares = _apportioned(mine, SHARES)
        slots, _ = _slots(tuple(shares))
        wanted = mine / total
        cost = -(_product(wanted) * np.log2(slots / (1 << BITS))).sum() / 4
        if kept < len(order):
            rest = counts[kept - 1:] / mine[-1]
            cost -= wanted[-1] * (rest * np.log2(rest)).sum()
        found.append((cost, order[:kept], shares))
    enough = min(cost for cost, *_ in found) * SLACK
    return next((values, shares) for cost, values, shares in reversed(found) if cost <= enough)


def _apportioned(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers from 1 up that add up to `total`, in the proportions of `weights` (whole numbers): reckoned in whole
    numbers only, so that every machine gets the same."""
    weights, whole = weights.astype(np.int64), int(weights.sum())
    low, high = 0, total
    while low < high:           # the most that can be shared out where everyone gets at least 1
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.maximum(1, weights * middle // whole).sum() <= total else (low, middle - 1)
    shares, left = np.maximum(1, weights * low // whole), weights * low % whole
    shares[np.argsort(-left, kind="stable")[:total - int(shares.sum())]] += 1
    return shares


def _product(shares: np.ndarray) -> np.ndarray:
    """Of every four values, the first one's the slowest: [n^4]."""
    pairs = np.multiply.outer(shares, shares).reshape(-1)
    return np.multiply.outer(pairs, pairs).reshape(-1)


@lru_cache(maxsize=64)
def _slots(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of every four values: how many of the 2^BITS slots they have, and the first of them."""
    slots = _apportioned(_product(np.array(shares, np.int64)), 1 << BITS)     # SHARES^4 times 2^14 is below 2^63
    return slots, np.cumsum(slots) - slots


def _joined(places: np.ndarray, kept: int) -> np.ndarray:
    """[n, 4] places -> [n] numbers of the four together."""
    found = places[:, 0].astype(np.int16)
    for column in range(1, 4):
        found *= kept
        found += places[:, column]
    return found


def _table(values: np.ndarray, shares: tuple[int, ...]) -> np.ndarray:
    """int64 [2^BITS]: slot -> its symbol's slots | its number among them << 14 | the four values << 28."""
    slots, starts = _slots(shares)
    each = np.repeat(np.arange(len(slots)), slots)
    four = np.stack(np.meshgrid(*[values] * 4, indexing="ij"), -1).reshape(-1, 4).view("<u4").reshape(-1).astype(np.int64)
    return slots[each] | (np.arange(1 << BITS) - starts[each]) << BITS | four[each] << 2 * BITS


# ---- lanes --------------------------------------------------------------------------------------------------

def _encode_quads(symbols: np.ndarray, slots: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[steps, lanes] symbols -> states [lanes] that a decoder begins with, and its words: coded from the last one back."""
    state, words = np.full(symbols.shape[1], LOW, np.int64), []
    for row in symbols[::-1]:
        slot = slots[row]
        full = np.flatnonzero(state >> (2 * WORD - BITS) >= slot)
        if len(full):
            words.append(state[full].astype(np.uint16))         # the low half
            state[full] >>= WORD
        whole = (state / slot).astype(np.int64)                 # exact: a quotient of less than 32 bits by 14
        state += whole * ((1 << BITS) - slot)
        state += starts[row]
    return state, np.concatenate(words[::-1]) if words else np.empty(0, np.uint16)


def _decode_quads(state: np.ndarray, words: np.ndarray, steps: int, table: np.ndarray) -> np.ndarray:
    """uint8 [4 * steps * lanes]. Raises BadFile where the states do not end as an encoder begins."""
    lanes, mask, at = len(state), (1 << BITS) - 1, 0
    out = np.empty((steps, lanes), "<u4")
    entry, part, low = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, bool)
    for row in out:
        np.bitwise_and(state, mask, out=part)
        table.take(part, out=entry, mode="clip")                # "raise" would copy
        np.right_shift(entry, 2 * BITS, out=part)
        row[:] = part
        state >>= BITS
        np.bitwise_and(entry, mask, out=part)
        state *= part
        entry >>= BITS
        entry &= mask
        state += entry
        np.less(state, LOW, out=low)
        (need,) = low.nonzero()
        taken = words[at:at + len(need)]
        if len(taken) < len(need):
            raise BadFile("coded exponents end too early: they are damaged")
        state[need] = state[need] << WORD | taken
        at += len(need)
    if at != len(words) or (state != LOW).any():
        raise BadFile("coded exponents do not end as they began: they are damaged")
    return out.reshape(-1).view(np.uint8)
