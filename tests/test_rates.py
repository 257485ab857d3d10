"""Rates: what a host's words mean, and how a calibrated machine's own figures take the place of a class's."""

from dataclasses import replace

import pytest

from llmlab import catalog, fit
from llmlab.calibrated import Calibration, Figure
from llmlab.errors import LabError
from llmlab.hardware import Cpu, Machine
from llmlab.rates import USUAL, beside, host_named, kind_of, of_machine, ram_named
from llmlab.units import GB, GIB


@pytest.mark.parametrize(("words", "peak", "cores"), [
    ("DDR5-4800", 76.8, 8), ("ddr4 3200", 51.2, 8), ("DDR4", 51.2, 8), ("DDR5", 89.6, 8), ("DDR4-3200 quad", 102.4, 8),
    ("DDR4-3200, 4 channels", 102.4, 8), ("LPDDR5X-8000 quad-channel", 256.0, 8), ("DDR5-4800 12ch", 460.8, 8),
    ("DDR4-2666, 6 cores", 42.656, 6), ("64 GB DDR5-6000", 96.0, 8), ("DDR4-2133 single", 17.064, 8),
    ("ddr4-3200-quad", 102.4, 8),
])
def test_ram_in_words(words, peak, cores):
    rates = ram_named(words)
    assert rates.peak == pytest.approx(peak * GB) and rates.cores == cores
    assert rates.ram[2] <= rates.peak and rates.ram[2] <= 2 * rates.ram[0]


def test_a_host_says_how_much_ram_and_which():
    assert host_named("96 GB DDR5-4800")[0] == "96 GB"
    assert host_named("DDR5-4800, 96GiB, 16 cores")[0] == "96GiB"
    assert host_named("DDR5-4800")[0] is None
    assert host_named("32 GiB") == ("32 GiB", None)
    assert fit("llama-3-8b", None, host="96 GB DDR5-4800").host == 96 * GB
    assert fit("llama-3-8b", "rtx-3060-12gb", host="DDR5-4800").host is None


@pytest.mark.parametrize("words", ["DDR4-99999", "DDR5-100", "DDR4-3200 99 channels", "much", "DDR", "0 cores",
                                   "DDR4 " + "1" * 5000])
def test_what_is_no_ram_is_said_in_one_line(words):
    with pytest.raises(LabError) as caught:
        fit("llama-3-8b", "rtx-3060-12gb", host=words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_no_rate_is_uncertain_by_more_than_two():
    for card in map(catalog.gpu, (row["id"] for row in catalog.gpus())):
        kind = kind_of(card)
        for band in (kind.stream, kind.unpack, kind.prefill, kind.launch[::-1]):
            assert band[0] <= band[1] <= band[2] <= 2 * band[0] * (1 + 1e-9)
        assert kind.stream[2] <= 1


def test_memory_that_a_card_shares_is_the_hosts_memory():
    card = catalog.gpu("apple-m2-max-38c")
    shared = beside((card,), USUAL)
    assert shared.ram[2] < card.bandwidth and "M2 Max" in shared.words
    assert beside((catalog.gpu("rtx-3060-12gb"),), USUAL) is USUAL


def machine(calibration=None, cards=(), cores=8, features=("avx2",)):
    return Machine(name="here", system="Linux", wsl=False, cpu=Cpu("a processor", cores, 2 * cores, 2 * cores, features),
                   ram_total=64 * GIB, ram_available=60 * GIB, ram_limit=None, swap_total=0, cards=cards, disks=(), versions={},
                   torch_build=None, missing=(), **({"calibration": calibration} if calibration else {}))


def calibrated(*figures, cards=()):
    return Calibration(machine_id="x", date="2026-11-22T12:00:00+00:00", seconds=1.0, versions={}, cores=8, load=0.0,
                       others=0.0, facts={"cards": [card.name for card in cards]}, figures=figures)


RAM = Figure("ram", "cpu", "read", 48e9, 50e9, 51e9, "B/s", 5, "how", threads=8)
MATMUL = Figure("matmul", "cpu", "bfloat16", 0.9e12, 1e12, 1.1e12, "op/s", 5, "how", threads=8)


def test_a_machine_that_was_not_measured_counts_its_cores():
    few, many = of_machine(machine(cores=2)), of_machine(machine(cores=16))
    assert few.day is None and many.matmul[1] == 8 * few.matmul[1]
    wide = of_machine(machine(features=("avx2", "avx512f")))
    assert wide.matmul[1] == 2 * of_machine(machine()).matmul[1]


def test_measured_ram_is_used_said_and_kept():
    here = machine(calibrated(RAM, MATMUL))
    report = fit("llama-3-8b", here, quant="Q4_K_M", context=512)
    guess = fit("llama-3-8b", machine(), quant="Q4_K_M", context=512)
    assert "measured on 2026-11-22" in report.speed.why and "measured" not in guess.speed.why.replace("not measured", "")
    low, best, high = report.speed.decode_tps
    assert high / low < guess.speed.decode_tps[2] / guess.speed.decode_tps[0]
    read = 4.30 * GIB
    assert 0.6 * 50e9 / read < low < best < 50e9 / read
    later = report.with_(context=1024)
    assert later.rates == report.rates and "measured on 2026-11-22" in later.speed.why


def test_a_fast_multiplication_counts_and_a_slow_one_says_nothing_of_other_kernels():
    """llama.cpp's own kernels are no slower for torch's being so: 92 tokens/s where torch's rate alone said 38."""
    def prefill(*figures):
        return fit("llama-3-8b", machine(calibrated(*figures)), quant="Q4_K_M", context=512).speed.prefill_tps[1]
    slow, fast = (replace(MATMUL, low=r, best=r, high=r) for r in (1e11, 9e12))
    assert prefill(fast) > 2 * prefill() == 2 * prefill(slow)


def test_figures_of_a_busy_machine_are_not_below_its_class():
    slow = replace(RAM, low=2.9e9, best=3e9, high=3.1e9)
    busy = replace(calibrated(slow), others=7.0)
    report, guess = (fit("llama-3-8b", machine(c), context=512).speed for c in (busy, None))
    assert report.decode_tps == guess.decode_tps and "while the machine was busy" in report.why
    assert fit("llama-3-8b", machine(calibrated(slow)), context=512).speed.decode_tps[2] < guess.decode_tps[0]


def test_a_cards_own_figures_are_used():
    card = replace(catalog.gpu("rtx-4090-24gb"), free=23 * GIB)
    slow = Figure("memory", "gpu0", "read", 480e9, 500e9, 505e9, "B/s", 5, "how")
    link = Figure("copy", "gpu0", "h2d_pinned", 5e9, 6e9, 6.1e9, "B/s", 5, "how")
    here = machine(calibrated(RAM, slow, link, cards=(card,)), cards=(card,))
    report, usual = fit("llama-3-8b", here, context=512), fit("llama-3-8b", card, context=512)
    assert report.speed.decode_tps[2] < usual.speed.decode_tps[1] and "Rates measured here on 2026-11-22" in report.speed.why
    unlinked = machine(calibrated(RAM), cards=(card,))
    big, plain = fit("llama-3-70b", here, context=4096), fit("llama-3-70b", unlinked, context=4096)
    assert big.speed.prefill_tps[1] < plain.speed.prefill_tps[1]          # a slow link holds a prompt's weights up


def test_a_measured_disk_is_used():
    disk = Figure("disk", "disk", "mmap", 2.8e9, 3.0e9, 3.1e9, "B/s", 3, "how", threads=1, cold=True)
    fast = fit("llama-3-70b", machine(calibrated(RAM, disk)), quant="F16", context=512).speed
    slow = fit("llama-3-70b", machine(calibrated(RAM)), quant="F16", context=512).speed
    assert "again from disk" in fast.why and fast.decode_tps[1] > 2 * slow.decode_tps[1]
