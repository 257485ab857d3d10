"""Results as bytes: they come back as they were, and bytes of a stranger run nothing."""

import json
import math
import re
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum, Flag, IntFlag
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np
import pytest
import torch

import llmlab
from llmlab.catalog import Table
from llmlab.quality.statistics import Estimate
from llmlab.sweeps.plain import decoded, encoded

T = TypeVar("T")


class Colour(Enum):
    RED = 1


class Switch(Flag):
    A = 1
    B = 2


class Bits(IntFlag):
    A = 1


Point = namedtuple("Point", "x y")


class Spoken(Point):
    """A named tuple with a __dict__."""


spoken = Spoken(1, 2)
spoken.word = "one"


@dataclass(frozen=True)
class Careful:
    x: int
    made: list = field(default_factory=list, compare=False)

    def __post_init__(self):
        raise RuntimeError("its __init__ was run")


@dataclass
class Counted:
    """Has more than its fields."""

    x: int

    def __post_init__(self):
        self.twice, self._hidden = 2 * self.x, [self.x]

    @cached_property
    def opened(self):
        return object()


@dataclass
class Titled(dict):
    title: str = ""


@dataclass
class Box(Generic[T]):
    inside: T


class Slotted:
    __slots__ = ("lost",)


@dataclass
class OfSlotted(Slotted):
    x: int


VALUES = [None, True, 0, -(10**30), 0.1, -math.inf, "ü\ud800\n", b"\0\xff", 1 + 2j, (1, (2,)), [], [[1]], {1, 2},
          frozenset({"a"}), {1: "a", (1, 2): {"b": None}, None: 1}, range(1, 9, 2), Path("a/b"), Colour.RED, Point(1, (2,)),
          Estimate(1.5, 0.1), Box[int](1), {"array": 1}, {"dict": [[1, 2]]}, MappingProxyType({"a": 1}), Counter("aab"),
          OrderedDict(b=1, a=2), date(2024, 2, 29), datetime(2024, 1, 1, 2, 3, 4, 5), datetime(2024, 1, 1, tzinfo=UTC),
          timedelta(-1, 5, 7), PurePosixPath("a"), PureWindowsPath("C:/a"), np.str_("ab\0"), np.bytes_(b"ab\0"),
          Switch.A | Switch.B, Switch(0), Bits(5), re.I | re.M, Table([{"a": 1}])]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_kept_comes_back(value):
    found = decoded(encoded(value))
    assert found == value and type(found) is type(value)


def test_numbers_that_are_none_and_arrays_come_back():
    assert math.isnan(decoded(encoded(math.nan)))
    for array in (np.arange(6).reshape(2, 3), np.float32(1.5), np.array(2.0), np.array(["a", "b"]), np.zeros((0, 3), "f2")):
        found = decoded(encoded(array))
        assert type(found) is type(array) and found.dtype == array.dtype and np.array_equal(found, array)
    turned = torch.ones(2, dtype=torch.complex64).conj().imag                  # negative once it is read
    for tensor in (torch.tensor([1 + 2j]).conj(), turned, torch.tensor(1.5), torch.arange(6).reshape(2, 3),
                   torch.ones(2, 2).bfloat16().T, torch.zeros(0, 3)):
        found = decoded(encoded(tensor))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize(("value", "said"), [
    (object(), "return numbers"), (len, "return numbers"), (lambda: 1, "return numbers"), ([1, {2: object()}], "object cannot"),
    (Exception("x"), "return numbers"), (np.array([object()]), "an array of Python objects"), (Titled(), "Titled cannot"),
    (spoken, "Spoken cannot"), (torch.eye(2).to_sparse(), "return a dense tensor"),
    (torch.nn.Parameter(torch.ones(1)), "Parameter cannot"), (defaultdict(int), "return dict"),
    (datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "X")), "in UTC"),
    (llmlab.gpus(), "return list(table)")], ids=lambda value: type(value).__name__)
def test_what_cannot_be_kept_is_said(value, said):
    with pytest.raises(TypeError) as error:
        encoded(value)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_data_frame_is_told_what_to_return():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r'DataFrame cannot be kept; return its .to_dict\("list"\)'):
        encoded(pandas.DataFrame({"a": [1]}))


def test_what_an_object_has_beyond_its_fields_comes_back_or_is_named():
    held = Counted(3)
    assert held.opened is held.opened
    found = decoded(encoded(held))
    assert found == held and vars(found) == {"x": 3, "twice": 6, "_hidden": [3]}
    held.file = open
    with pytest.raises(TypeError, match="Counted.file: .* cannot be kept"):
        encoded(held)
    slotted = OfSlotted(1)
    assert decoded(encoded(slotted)) == slotted
    slotted.lost = 1
    with pytest.raises(TypeError, match="lost is a slot and no field of it"):
        encoded(slotted)


def test_one_object_stays_one():
    one = Counted(1)
    first, [second], other = decoded(encoded((one, [one], Counted(1))))
    assert first is second and first is not other and first == other


def answers() -> dict:
    """What llmlab's own functions return."""
    fit = llmlab.fit("llama-3-8b", "rtx-3060-12gb", context=8192)
    plan = llmlab.plan("llama-3-8b", gpu="rtx-3060-12gb")
    hosts = llmlab.fit_hosts("llama-3-8b", [["rtx-3060-12gb"], ["rtx-3060-12gb"]])
    return {"model": llmlab.model("llama-3-8b"), "gpu": llmlab.gpu("rtx-3060-12gb"), "size": llmlab.size("llama-3-8b"),
            "mix": llmlab.mix("llama-3-8b", "Q4_K_M"), "fit": fit, "levers": fit.levers(), "command": fit.command(),
            "map": llmlab.fit_map(["llama-3-8b"], ["rtx-3060-12gb"]), "hosts": hosts, "plan": plan, "steps": plan.levers(),
            "machine": llmlab.machine(), "claims": llmlab.claims()[:2],
            "best": llmlab.best("rtx-3060-12gb", models=["llama-3-8b", "qwen2.5-7b"])}


def test_what_llmlab_answers_comes_back():
    for name, value in answers().items():
        getattr(value, "answer", "")                     # which some remember
        found = decoded(data := encoded(value))
        assert type(found) is type(value) and repr(found) == repr(value) and encoded(found) == data, name
        for said in ("answer", "table", "notes"):
            assert getattr(found, said, 0) == getattr(value, said, 0), (name, said)
        if "__eq__" in vars(type(value)) and name not in ("fit", "hosts", "plan", "map"):      # which have a model
            assert found == value, name


@pytest.mark.parametrize("text", [
    '{"enum": ["os", "system", "true"]}',
    '{"named": ["os", "system", []]}', '{"object": ["antigravity", "x", {}, {}]}', '{"enum": ["llmlab.__main__", "main", "x"]}',
    '{"call": ["os", "system"]}', '{"object": ["subprocess", "Popen", {"args": "true"}, {}]}', '{"again": 0}',
    '{"object": ["llmlab.catalog", "Table", {}, {}]}', '{"flag": ["os", "system", "true"]}',
    '{"tensor": ["_inductor", [1], ""]}', '{"array": "UEsDBBQAAAAIAA=="}',
    '{"tensor": ["load", [], ""]}', "{}", "[", "{", '{"a": 1, "b": 2}',
    json.dumps({"object": ["llmlab.quality.statistics", "Estimate", {"value": 1}, {}]})])
def test_bytes_of_a_stranger_are_refused(text):
    with pytest.raises(Exception) as error:
        decoded(text.encode())
    assert isinstance(error.value, ValueError | TypeError | AttributeError | LookupError | EOFError)
    assert "antigravity" not in sys.modules


def test_a_file_makes_torch_import_nothing():
    code = """if True:
        import sys, torch
        from llmlab.sweeps.plain import decoded
        before = set(sys.modules)
        try:
            decoded(b'{"tensor": ["_inductor", [1], ""]}')
        except Exception as error:
            print(error, len(set(sys.modules) - before))"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert said.stdout == "'_inductor' is no dtype 0\n", said.stderr


def test_no_code_of_a_class_is_run():
    held = object.__new__(Careful)
    object.__setattr__(held, "x", 3)
    object.__setattr__(held, "made", [1])
    found = decoded(encoded(held))
    assert type(found) is Careful and (found.x, found.made) == (3, [1])


def test_a_sweep_of_fits_is_kept_and_found_again(tmp_path):
    grid = {"spec": ["llama-3-8b"], "gpu": ["rtx-3060-12gb"], "context": [8192, 16384]}
    done = llmlab.sweep(llmlab.fit, grid, folder=tmp_path, progress=False)
    again = llmlab.sweep(llmlab.fit, grid, folder=tmp_path, progress=False)
    assert not done.failures and again.found == 2 and not again.notes
    assert [one.answer for one in again.results] == [llmlab.fit(**point).answer for point in done.points]
