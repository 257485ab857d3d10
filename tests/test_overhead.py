"""What a card loses beside the model: parts that add up, rows before rules, a measured context before either."""

from dataclasses import replace

import pytest

from llmlab import catalog
from llmlab.calibrated import Calibration, Figure
from llmlab.fitting import fit
from llmlab.hardware import machine
from llmlab.overhead import Measured, desktop, overhead_term, parts
from llmlab.units import GIB, MIB
from llmlab.wording import trust


def card(name: str, **changes) -> catalog.Gpu:
    return replace(catalog.gpu(name), **changes)


def test_a_term_is_the_sum_of_its_parts_for_every_card_and_engine():
    for row in catalog.gpus():
        for engine in ("llama.cpp", "transformers", "vllm"):
            found, term = parts(catalog.gpu(row["id"]), engine, 2), overhead_term(catalog.gpu(row["id"]), "gpu0", engine, 2)
            sums = [sum(getattr(p, what) for p in found) for what in ("low", "best", "high")]
            assert sums == [term.low, term.bytes, term.high]
            assert all(0 <= p.low <= p.best <= p.high for p in found) and all(str(p) in term.why for p in found)


@pytest.mark.parametrize("id, mib", [("ctx-llamacpp-3090", 264), ("ctx-llamacpp-4090", 472), ("ctx-bare-rtx-4060-ti", 107),
                                     ("llamacpp-unaccounted-rtx-pro-6000", 749), ("ctx-llamacpp-4070-laptop", 259)])
def test_what_was_measured_on_a_card_lies_in_its_interval(id, mib):
    for name in catalog.overheads()[id].cards:
        context = parts(catalog.gpu(name))[0]
        assert "measured on such a card" in context.name and context.low <= mib * MIB <= context.high


def test_other_cards_take_after_the_nearest_of_their_generation():
    assert "RTX 4070 Laptop" in parts(catalog.gpu("rtx-4060-laptop-8gb"))[0].name
    assert "RTX 3090" in parts(catalog.gpu("rtx-3060-12gb"))[0].name
    assert "the range" in parts(catalog.gpu("gtx-1060-6gb"))[0].name
    wide = parts(catalog.gpu("rtx-3060-12gb"))[0]
    assert wide.low <= 120 * MIB and wide.high >= 550 * MIB


def test_a_live_card_has_no_desktop_and_no_framebuffer_left_to_count():
    live = overhead_term(card("rtx-3060-12gb", free=11 * GIB), "gpu0", display="windows")
    assert live.high < 700 * MIB and "desktop" not in live.why and "driver" not in live.why


def test_desktops():
    none, linux, windows, unknown = (overhead_term(catalog.gpu("rtx-3060-12gb"), "gpu0", display=d)
                                     for d in (False, "linux", "windows", None))
    assert none.high < unknown.high < linux.high < windows.high
    assert "kept by the driver" not in windows.why            # Windows shows all of a card, and uses it
    assert desktop(catalog.gpu("h100-sxm5-80gb"), None) is None and desktop(catalog.gpu("h100-sxm5-80gb"), "linux").high
    assert desktop(catalog.gpu("apple-m4-10c"), "linux") is None


def test_libraries_by_engine():
    one, two = (overhead_term(catalog.gpu("rtx-3090-24gb"), "gpu0", "vllm", n) for n in (1, 2))
    assert "NCCL" in two.why and "NCCL" not in one.why and two.low > one.low
    assert "cuBLAS workspaces 33 MiB (32" in overhead_term(catalog.gpu("h100-sxm5-80gb"), "gpu0", "transformers").why
    assert "cuBLAS" not in overhead_term(catalog.gpu("rtx-3090-24gb"), "gpu0").why


def test_a_measured_context_takes_the_place_of_the_modelled_one():
    live = card("rtx-3060-12gb", free=11 * GIB)
    figures = tuple(Figure("context", "gpu0", name, size * MIB, size * MIB, size * MIB, "B", 1, "watched")
                    for name, size in (("context", 200), ("kernels", 31)))
    measured = Calibration("id", "2026-01-01T00:00:00+00:00", 1.0, {}, {"cards": [live.name]}, 2, None, None, figures)
    size = measured.context_bytes[live.name]
    assert 200 * MIB <= size <= 231 * MIB
    here = replace(machine(), cards=(live,))
    object.__setattr__(here, "calibration", measured)
    term = next(t for t in fit("llama-3-8b", here).terms if t.name == "overhead")
    assert term.kind == "measured" and term.bytes == term.low == size and term.high < size + 100 * MIB
    assert "measured on this computer" in term.why and "measured" in trust(fit("llama-3-8b", here))
    assert next(t for t in fit("llama-3-8b", live).terms if t.name == "overhead").kind == "modelled"


def test_what_was_measured_here_replaces_the_tables():
    card = catalog.gpu("rtx-3090-24gb")
    term = overhead_term(card, "gpu0", "transformers", measured=Measured(300 * MIB, 9 * MIB))
    for part in ("context measured on this computer 300 MiB", "cuBLAS workspace measured on this computer 9 MiB"):
        assert part in term.why
    without = overhead_term(card, "gpu0", "transformers", measured=Measured(300 * MIB))
    assert "cuBLAS workspaces" in without.why and without.low <= term.bytes
