"""Results as bytes: they come back as they were, and bytes of a stranger run nothing."""

import json
import math
from collections import namedtuple
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlab import sweep
from llmlab.quality.statistics import Estimate
from llmlab.sweeps.plain import decoded, encoded


class Colour(Enum):
    RED = 1


Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Careful:
    x: int
    made: list = field(default_factory=list, compare=False)

    def __post_init__(self):
        raise RuntimeError("its __init__ was run")


VALUES = [None, True, 0, -(10**30), 0.1, -math.inf, "ü\ud800\n", b"\0\xff", 1 + 2j, (1, (2,)), [], [[1]], {1, 2},
          frozenset({"a"}), {1: "a", (1, 2): {"b": None}, None: 1}, range(1, 9, 2), Path("a/b"), Colour.RED, Point(1, (2,)),
          Estimate(1.5, 0.1), {"array": 1}, {"dict": [[1, 2]]}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_kept_comes_back(value):
    found = decoded(encoded(value))
    assert found == value and type(found) is type(value)


def test_numbers_that_are_none_and_arrays_come_back():
    assert math.isnan(decoded(encoded(math.nan)))
    for array in (np.arange(6).reshape(2, 3), np.float32(1.5), np.array(2.0), np.array(["a", "b"]), np.zeros((0, 3), "f2")):
        found = decoded(encoded(array))
        assert type(found) is type(array) and found.dtype == array.dtype and np.array_equal(found, array)
    for tensor in (torch.arange(6).reshape(2, 3), torch.ones(2, 2).bfloat16().T, torch.zeros(0, 3), torch.tensor(1.5)):
        found = decoded(encoded(tensor))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("value", [object(), len, lambda: 1, np.array([object()]), [1, {2: object()}], Exception("x")],
                         ids=repr)
def test_what_cannot_be_kept_is_said(value):
    with pytest.raises((TypeError, ValueError)):
        encoded(value)


def test_a_sweep_says_what_cannot_be_kept():
    done = sweep(lambda x: object() if x else 1, {"x": [0, 1]}, key="objects", progress=False)
    assert done.results == (1, None) and "object cannot be kept; return numbers" in done.failures[0].error


@pytest.mark.parametrize("text", [
    '{"dataclass": ["subprocess", "Popen", {"args": "true"}]}', '{"enum": ["os", "system", "true"]}',
    '{"named": ["os", "system", []]}', '{"dataclass": ["antigravity", "x", {}]}', '{"enum": ["llmlab.__main__", "main", "x"]}',
    '{"call": ["os", "system"]}',
    '{"tensor": ["load", [], ""]}', "{}", "[", "{", '{"a": 1, "b": 2}',
    json.dumps({"dataclass": ["llmlab.quality.statistics", "Estimate", {"value": 1}]})])
def test_bytes_of_a_stranger_are_refused(text):
    import sys

    with pytest.raises(Exception) as error:
        decoded(text.encode())
    assert isinstance(error.value, ValueError | TypeError | AttributeError | KeyError | EOFError)
    assert "antigravity" not in sys.modules


def test_no_code_of_a_class_is_run():
    held = object.__new__(Careful)
    object.__setattr__(held, "x", 3)
    object.__setattr__(held, "made", [1])
    found = decoded(encoded(held))
    assert type(found) is Careful and (found.x, found.made) == (3, [1])
