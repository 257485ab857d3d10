"""The words of a report: why it may spill, who holds a card's memory, what the context means."""

from dataclasses import replace

import pytest

from llmlab import catalog
from llmlab.fitting import fit
from llmlab.hardware import machine
from llmlab.shapes import from_config
from llmlab.units import GIB, MIB
from llmlab.wording import hint, others, stretch, trust

CARD = catalog.gpu("rtx-3060-12gb")


def sized(used_of, **more):
    """A report of Llama 3 8B with just the context with which the card is almost full."""
    return fit("llama-3-8b", CARD, kv="f16", context=used_of, **more)


def test_a_desktop_is_named_where_it_decides():
    contexts = [c for c in range(40960, 65536, 1024) if sized(c).verdict == "may spill"]
    named = [c for c in contexts if "unless a desktop on the card takes up to" in sized(c).answer]
    assert named and set(named) < set(contexts)          # with still more context it is no longer the desktop alone
    for context in named:
        assert sized(context, display=False).fits
    assert not sized(contexts[-1], display=False).fits


def test_a_chip_that_shares_its_ram_is_asked_for_what_the_model_needs():
    fits = fit("llama-3-8b", "apple-m4-10c")
    kept = fits.cards[0].reserved[1]
    assert f": {(fits.devices['gpu0'].used - kept) / GIB:.2f} GiB of {(16 * GIB - kept) / GIB:.2f} GiB." in fits.answer
    report = fit("qwen3-30b-a3b", "radeon-780m-igpu")
    most = report.devices["gpu0"].high - report.cards[0].reserved[2]
    assert report.verdict == "may spill" and "between" not in report.answer
    assert report.answer.endswith(f"; it fits where the system lets the card have {most / GIB:.2f} GiB.")
    assert "lets the card" not in sized(45056).answer


def test_vllm_may_need_a_smaller_quant_and_a_smaller_share():
    report = fit("llama-3-8b", CARD, engine="vllm", quant="BF16")
    assert "in GPTQ_INT4, reserving 88% of the card (utilization=0.88)" in hint(report)
    assert report.with_(quant="GPTQ_INT4", utilization=0.88).fits and not report.with_(quant="GPTQ_INT4").fits


def test_windows_spills_without_a_word():
    report = sized(45056, display="windows")
    assert report.verdict == "may spill" and "shared GPU memory" in trust(report)
    assert "shared GPU memory" not in trust(sized(45056)) and "shared GPU memory" not in trust(sized(8192, display="windows"))
    here = replace(machine(), cards=(replace(CARD, free=4 * GIB),), system="Windows 11 AMD64", wsl=False)
    assert "shared GPU memory" in trust(fit("llama-3-8b", here))
    assert "shared GPU memory" in trust(fit("llama-3-8b", replace(here, system="Linux", wsl=True)))


def test_other_programs_are_named_with_what_they_hold():
    busy = replace(CARD, free=5 * GIB)
    report = fit("llama-3-8b", busy)
    held = CARD.memory - 5 * GIB - CARD.reserved[2]
    assert others(report) == held and f"hold {held / GIB:.2f} GiB of the card now; without them it fits" in report.answer
    large = fit("llama-3-70b", busy)
    assert "Other programs hold" in large.answer and "without them" not in large.answer
    assert others(fit("llama-3-8b", replace(CARD, free=CARD.memory - 300 * MIB))) == 0
    assert "Other programs" not in fit("smollm2-135m", busy).answer


@pytest.mark.parametrize("name, context, says", [
    ("llama-3-8b", 16384, "trained for 8,192 tokens; beyond"),
    ("llama-3.1-8b", 200000, "trained for 131,072 tokens (rope scaled 8-fold, llama3); beyond"),
    ("phi-3.5-mini", 200000, "(rope scaled, longrope)")])
def test_context_beyond_training(name, context, says):
    report = fit(name, "h100-sxm5-80gb", context=context)
    assert says in report.answer and report.beyond_training == context - report.spec.context_train > 0
    assert report.with_(context=4096).beyond_training == 0 and "trained" not in report.with_(context=4096).answer
    shared = report.with_(context=context, sequences=32)
    assert shared.beyond_training == 0                       # each of 32 has its own, shorter context


def test_stretched_positions():
    config = dict(catalog.entry("qwen2.5-7b").config)
    assert stretch(from_config(config, "plain")) == ""
    yarn = config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    assert stretch(from_config(yarn, "yarn")) == "rope scaled 4-fold, yarn"
    assert stretch(from_config(config | {"rope_scaling": {"rope_type": "default"}}, "none")) == ""


def test_answers_stay_short():
    for model, card, more in (("llama-3-8b", CARD, {}), ("llama-3-70b", CARD, {}),
                              ("qwen3-30b-a3b", CARD, {"n_cpu_moe": "auto"}),
                              ("llama-3-8b", "rtx-4090-24gb", {"engine": "vllm", "quant": "BF16"}),
                              ("llama-3-8b", None, {"host": "4 GiB"})):
        answer = fit(model, card, **more).answer
        assert answer.count(". ") <= 2 and len(answer) < 420 and "\n" not in answer


def test_hints_speak_of_requests_and_blocks():
    shared = fit("llama-3-8b", "rtx-4090-24gb", sequences=4, context=8192)
    assert "32,768 tokens of context for 4 requests together, all it was trained for" in hint(shared)
    moe = hint(fit("qwen3-30b-a3b", CARD))
    assert "experts of 25 of 48 blocks in RAM" in moe or "of 48 blocks in RAM" in moe
    assert hint(fit("qwen3-30b-a3b", CARD, n_cpu_moe="auto")) == ""
