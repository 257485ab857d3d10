"""Perplexity and divergence against straight float64 reckoning, against llama-perplexity's own answers, and on bad input."""

import hashlib
import json
import re
import struct
import sys
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmlab
from llmlab import catalog, quality
from llmlab.errors import BadFile, LabError, UnknownName
from llmlab.quality import corpus, passes, rounding, statistics

WORDS, CONTEXT = 97, 32


def tiny(seed=0, **changes):
    """A llama of two layers with sharp answers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**dict(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3), **changes})).eval()


def noisy(model, share, seed=1):
    """The model with noise of `share` of each matrix's spread on its weights."""
    torch.manual_seed(seed)
    other = type(model)(model.config).eval()
    other.load_state_dict({name: value + share * value.std() * torch.randn_like(value) if value.ndim > 1 else value
                           for name, value in model.state_dict().items()})
    return other


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def other(model):
    return noisy(model, 0.05)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(0, WORDS, CONTEXT * 9 + 7)


def straight(model, ids, context, bos=None):
    """log softmax, float64 [scored, words], and the tokens to predict, of every chunk: no code of llmlab's."""
    probabilities, wanted = [], []
    for start in range(0, len(ids) - context + 1, context):
        chunk = torch.tensor(ids[start:start + context])
        read = chunk.clone()
        if bos is not None:
            read[0] = bos
        with torch.no_grad():
            logits = model(read[None]).logits[0].double().numpy()
        for at in range(context // 2, context - 1):
            row = logits[at] - logits[at].max()
            probabilities.append(row - log(sum(exp(x) for x in row)))
            wanted.append(int(chunk[at + 1]))
    return np.array(probabilities), wanted


# -- perplexity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 3])
def test_perplexity_is_reckoned_as_it_is_defined(model, ids, bos):
    rows, wanted = straight(model, ids, CONTEXT, bos)
    nll = [-row[token] for row, token in zip(rows, wanted, strict=True)]
    n = len(nll)
    middle = sum(nll) / n
    error = sqrt((sum(x * x for x in nll) / n - middle**2) / (n - 1))  # llama-perplexity's own formula
    found = llmlab.perplexity(model, None, quality.Tokens(ids, bos), CONTEXT, progress=False)
    assert found.value == pytest.approx(exp(middle), rel=1e-9)
    assert found.standard_error == pytest.approx(exp(middle) * error, rel=1e-7)
    assert (found.tokens, found.chunks, found.context) == (9 * 15, 9, CONTEXT) and n == found.tokens
    assert found.per_chunk == pytest.approx([np.mean(nll[i * 15:i * 15 + 15]) for i in range(9)], rel=1e-9)
    assert found.running[-1] == pytest.approx(found.value) and found.running[0] == pytest.approx(exp(found.per_chunk[0]))


@pytest.mark.parametrize("context", [3, 4, 17, 33, 130])
def test_any_context_cuts_and_scores_its_second_half(model, ids, context):
    rows, wanted = straight(model, ids, context)
    nll = [-row[token] for row, token in zip(rows, wanted, strict=True)]
    found = quality.perplexity(model, None, ids, context, progress=False)
    assert found.tokens == len(nll) == len(ids) // context * (context - 1 - context // 2)
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-6)  # the head sees other shapes: float32 rounds otherwise


def test_a_uniform_model_hesitates_between_all_words(ids):
    found = quality.perplexity(lambda ids: SimpleNamespace(logits=torch.zeros(1, ids.shape[1], WORDS)), None, ids, CONTEXT,
                               progress=False)
    assert found.value == pytest.approx(WORDS, rel=1e-12) and found.standard_error < 1e-6


def test_chunks_and_stopped_end_early(model, ids):
    whole = quality.perplexity(model, None, ids, CONTEXT, progress=False)
    three = quality.perplexity(model, None, ids, CONTEXT, chunks=3, progress=False)
    asked = iter([False, False, True])
    stopped = quality.perplexity(model, None, ids, CONTEXT, progress=False, stopped=lambda: next(asked))
    assert three == stopped and three.per_chunk == whole.per_chunk[:3] and three.chunks == 3
    assert quality.divergence(noisy(model, 0.1), model, ids, CONTEXT, progress=False, stopped=lambda: True).chunks == 1


def test_dropout_is_off_and_the_model_as_it_was(ids):
    model = tiny(attention_dropout=0.5)
    calm = quality.perplexity(model, None, ids, CONTEXT, chunks=2, progress=False)
    model.train()
    assert quality.perplexity(model, None, ids, CONTEXT, chunks=2, progress=False) == calm and model.training
    with pytest.raises(LabError):
        quality.perplexity(model, None, ids + WORDS, CONTEXT, progress=False)
    assert model.training


def test_low_precision_logits_are_summed_in_float64(ids):
    """bfloat16 answers are what they are; what is reckoned from them is not rounded again."""
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(2)).bfloat16()
    before = table.clone()

    def model(ids):
        return SimpleNamespace(logits=table[ids])

    rows, wanted = straight(model, ids, CONTEXT)
    found = quality.perplexity(model, None, ids, CONTEXT, progress=False)
    assert found.nll == pytest.approx(-np.mean([row[token] for row, token in zip(rows, wanted, strict=True)]), rel=1e-12)
    assert torch.equal(table, before)


def test_a_models_own_logits_are_not_written_to(ids):
    kept = torch.randn(1, CONTEXT, WORDS, dtype=torch.float64)
    before = kept.clone()
    quality.perplexity(lambda ids: kept, None, ids, CONTEXT, progress=False)
    assert torch.equal(kept, before)


# -- bounded memory -------------------------------------------------------------------------------------------------


def test_a_long_chunk_is_read_in_pieces_and_no_figure_changes(model, other, ids, monkeypatch):
    whole = quality.perplexity(model, None, ids, 130, progress=False)
    apart = quality.divergence(other, model, ids, 130, progress=False)
    asked = []
    monkeypatch.setattr(passes, "WORKING", 5 * WORDS)
    monkeypatch.setattr(passes, "LOGITS", 21 * WORDS)  # 20 of the 64 rows at once, 5 of them in work
    handle = model.register_forward_hook(lambda module, args, out: asked.append(out.logits.shape[1]))
    try:
        assert quality.perplexity(model, None, ids, 130, progress=False).nll == pytest.approx(whole.nll, rel=1e-6)
        assert asked == [1, 20, 20, 20, 4] * 2
        # Another model that cannot be read in pieces still meets it row by row.
        pieces = quality.divergence(lambda ids: other(ids), model, ids, 130, progress=False)
    finally:
        handle.remove()
    assert np.allclose(pieces.kld, apart.kld, atol=1e-6) and np.allclose(pieces.nll, apart.nll, rtol=1e-5)


def test_only_scored_positions_are_asked_for(model, ids):
    seen = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append((out.logits.shape[1], out.past_key_values)))
    try:
        quality.perplexity(model, None, ids, CONTEXT, chunks=1, progress=False)
    finally:
        handle.remove()
    assert seen == [(CONTEXT // 2, None)]


def test_what_is_worked_on_stays_small():
    assert passes.rows_at_once(49152) * 49152 * 8 <= 4 * 2**20
    assert passes.rows_at_once(256000) == 2 and passes.rows_at_once(10**9) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_bounded(monkeypatch):
    """Logits of the whole chunk would take 250 MiB a model, and twice that in float64."""
    one, two = tiny(0, vocab_size=32000, max_position_embeddings=4096), tiny(1, vocab_size=32000, max_position_embeddings=4096)
    ids = np.random.default_rng(6).integers(0, 32000, 8192)
    monkeypatch.setattr(passes, "LOGITS", 2**21)
    quality.divergence(one, two, ids, 64, chunks=1, progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    assert quality.divergence(one, two, ids, 4096, chunks=1, progress=False).tokens == 2047
    assert resident("VmHWM") - before < 120


def resident(which):
    """MiB this process holds now (VmRSS) or held at most (VmHWM)."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


# -- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_is_reckoned_as_it_is_defined(model, other, ids):
    theirs, wanted = straight(model, ids, CONTEXT)
    ours, _ = straight(other, ids, CONTEXT)
    kld = [sum(exp(p) * (p - q) for p, q in zip(a, b, strict=True)) for a, b in zip(theirs, ours, strict=True)]
    a = np.array([-row[token] for row, token in zip(ours, wanted, strict=True)])
    b = np.array([-row[token] for row, token in zip(theirs, wanted, strict=True)])
    dp, n = np.exp(-a) - np.exp(-b), len(a)
    found = llmlab.divergence(other, model, ids, CONTEXT, progress=False)

    def error(values):  # as llama-perplexity's mean_and_uncertainty
        return sqrt((np.sum(values**2) / n - (np.sum(values) / n)**2) / (n - 1))

    assert found.tokens == n == 135 and found.chunks == 9
    assert found.mean_kld.value == pytest.approx(np.mean(kld), rel=1e-9)
    assert found.mean_kld.error == pytest.approx(error(np.array(kld)), rel=1e-7)
    assert found.max_kld == pytest.approx(max(kld), rel=1e-9) and found.median_kld == pytest.approx(sorted(kld)[n // 2])
    assert found.perplexity.value == pytest.approx(exp(a.mean()))
    assert found.perplexity.error == pytest.approx(exp(a.mean()) * error(a))
    assert found.reference_perplexity.value == pytest.approx(exp(b.mean()))
    covariance = (np.sum(a * b) / n - a.mean() * b.mean()) / (n - 1)
    assert found.ratio.value == pytest.approx(exp(a.mean() - b.mean()))
    assert found.log_ratio.error == pytest.approx(sqrt(error(a)**2 + error(b)**2 - 2 * covariance), rel=1e-6)
    assert found.correlation == pytest.approx(covariance / error(a) / error(b))
    assert found.difference.value == pytest.approx(exp(a.mean()) - exp(b.mean()))
    assert found.mean_dp.value == pytest.approx(dp.mean()) and found.rms_dp.value == pytest.approx(sqrt(np.mean(dp**2)))
    assert found.rms_dp.error == pytest.approx(0.5 / sqrt(np.mean(dp**2)) * error(dp**2))
    same = np.mean(ours.argmax(1) == theirs.argmax(1))
    assert 0 < same < 1 and found.top1.value == same and found.top1.error == pytest.approx(sqrt(same * (1 - same) / (n - 1)))
    assert found.per_chunk == pytest.approx(np.reshape(kld, (9, 15)).mean(1))


def test_a_model_does_not_differ_from_itself(model, ids):
    found = quality.divergence(model, model, ids, CONTEXT, progress=False)
    assert found.max_kld == 0 and found.top1.value == 1 and found.rms_dp.value == 0 and found.ratio.value == 1
    assert found.correlation == pytest.approx(1)


def test_noise_in_the_weights_moves_the_figures(model, ids):
    """One percent shows, ten times as much shows some hundred times as strongly: KLD goes with the square."""
    little, much = (quality.divergence(noisy(model, share), model, ids, CONTEXT, progress=False) for share in (0.01, 0.1))
    assert little.mean_kld.value > 3 * little.mean_kld.error > 0 and little.rms_dp.value > 0 and little.log_ratio.value != 0
    assert 30 < much.mean_kld.value / little.mean_kld.value < 300
    assert much.top1.value < little.top1.value <= 1 and much.rms_dp.value > 3 * little.rms_dp.value
    plain = quality.perplexity(model, None, ids, CONTEXT, progress=False)
    assert little.perplexity.value != plain.value and little.reference_perplexity.value == pytest.approx(plain.value, rel=1e-12)


def test_a_word_the_reference_rules_out_adds_nothing(ids):
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(3))
    ruled_out = table.clone()
    ids = ids % (WORDS - 1)
    ruled_out[:, WORDS - 1] = -torch.inf

    def base(ids):
        return ruled_out[ids][None, 0]

    found = quality.divergence(lambda ids: table[ids], base, ids, CONTEXT, progress=False)
    rows = torch.log_softmax(table.double(), -1)
    expected = -torch.log1p(-rows[:, -1].exp())  # all it says is: not that word
    at = [int(ids[start + i]) for start in range(0, CONTEXT * 9, CONTEXT) for i in range(CONTEXT // 2, CONTEXT - 1)]
    assert np.allclose(found.kld, expected[at].numpy(), rtol=1e-6)
    back = quality.divergence(base, lambda ids: table[ids], ids, CONTEXT, progress=False)
    assert np.isinf(back.mean_kld.value)  # and a word the model rules out, though it comes: infinitely surprised


def test_percentiles_are_as_there():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert [statistics.percentile(values, p) for p in (0, 50, 25, 100)] == [1, 4, 2, 16]
    assert statistics.percentile(values, 90) == pytest.approx(8 + 0.6 * 8, abs=1e-5)
    assert statistics.percentile(np.array([3.0]), 99.9) == 3
    assert np.isnan(statistics.mean(np.array([1.0])).error)


def test_it_says_what_it_found(model, other, ids):
    found = quality.divergence(other, model, ids, CONTEXT, progress=False)
    assert f"{found.mean_kld.value:.4g}" in str(found) and "measured" in str(found) and f"{found.top1.value:.2%}" in str(found)
    rows = {row["figure"]: row["measured"] for row in found.table()}
    assert rows["median KLD"] == f"{found.median_kld:.4g}" and rows["RMS Δp"] == f"{100 * found.rms_dp.value:.3f} %"
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["mean_kld"] == {"value": found.mean_kld.value, "error": found.mean_kld.error}
    assert plain["kld_percentiles"]["99"] == found.p99_kld == plain["p99_kld"]
    assert "perplexity" in str(quality.perplexity(model, None, ids, CONTEXT, progress=False))


# -- saved references -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "near"), [("16-bit", 2e-4), ("float32", 1e-6)])
def test_a_saved_reference_stands_in_for_its_model(model, other, ids, tmp_path, precision, near):
    live = quality.divergence(other, model, quality.Tokens(ids, 3), CONTEXT, progress=False)
    kept = quality.save_reference(model, quality.Tokens(ids, 3), tmp_path / "kept", CONTEXT, precision=precision,
                                  name="the model", progress=False)
    assert (kept.model, kept.context, kept.chunks, kept.vocabulary, kept.precision, kept.tokens.bos) == (
        "the model", CONTEXT, 9, WORDS, precision, 3)
    found = quality.divergence(other, tmp_path / "kept", progress=False)
    assert np.allclose(found.reference_nll, live.reference_nll, atol=near, rtol=0)
    assert np.allclose(found.kld, live.kld, atol=near, rtol=0) and np.allclose(found.nll, live.nll, rtol=1e-12)
    assert (found.same == live.same).mean() > 0.99 and found.reference == "the model"
    given = quality.divergence(other, str(tmp_path / "kept"), quality.Tokens(ids, 3), progress=False)
    assert np.array_equal(given.kld, found.kld)
    size = {"16-bit": 2, "float32": 4}[precision] * 9 * 15 * WORDS
    assert size < (tmp_path / "kept").stat().st_size < size + 5000
    first = quality.divergence(other, kept, chunks=2, progress=False)
    assert np.array_equal(first.kld, found.kld[:30])


def test_a_reference_is_plain_safetensors(model, ids, tmp_path):
    from safetensors.numpy import load_file

    quality.save_reference(model, ids, tmp_path / "kept", CONTEXT, progress=False)
    parts = load_file(tmp_path / "kept")
    assert parts["codes"].shape == (9, 15, WORDS) and parts["codes"].dtype == np.uint16
    assert np.array_equal(parts["tokens"], ids[:9 * CONTEXT])
    rows, _ = straight(model, ids, CONTEXT)
    kept = (parts["codes"] * parts["scale"][..., None] + parts["floor"][..., None]).reshape(-1, WORDS)
    reached = rows > rows.max(1, keepdims=True) - 16
    assert np.abs(kept - rows)[reached].max() < 8 / 65535 + 1e-5  # half a step of 16 nats, and float32's rounding


def test_sixteen_bits_leave_out_what_they_do_not_reach(ids, tmp_path):
    """As llama-perplexity: what the reference gives less than e^-16 adds nothing, whatever the model says of it."""
    far = torch.zeros(WORDS, WORDS)
    far[:, 50:] = -20.0
    ids = ids % 50
    kept = quality.save_reference(lambda ids: far[ids], ids, tmp_path / "kept", CONTEXT, progress=False)
    odd = far.clone()
    odd[:, 50:] = -30.0
    found = quality.divergence(lambda ids: odd[ids], kept, progress=False)
    assert found.max_kld < 1e-6  # log-probabilities differ by 10 there
    exact = quality.save_reference(lambda ids: far[ids], ids, tmp_path / "exact", CONTEXT, precision="float32", progress=False)
    found = quality.divergence(lambda ids: odd[ids], exact, progress=False)
    assert kept.least == -16 and found.mean_kld.value == pytest.approx(47 / 50 * exp(-20) * 9, rel=0.01)


def test_an_interrupted_reference_leaves_nothing(model, ids, tmp_path):
    calls = []

    def interrupted(ids):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(ids)

    with pytest.raises(KeyboardInterrupt):
        quality.save_reference(interrupted, ids, tmp_path / "kept", CONTEXT, progress=False)
    assert not list(tmp_path.iterdir())


def test_another_text_or_context_is_refused(model, ids, tmp_path):
    kept = quality.save_reference(model, ids, tmp_path / "kept", CONTEXT, progress=False)
    changed = ids.copy()
    changed[40] = (changed[40] + 1) % WORDS
    for bad, says in ((dict(tokens=changed), "number 41"), (dict(tokens=ids[:100]), "number 101"),
                      (dict(context=16), "context of 32"), (dict(chunks=10), "9 chunks")):
        with pytest.raises(LabError, match=says):
            quality.divergence(model, kept, progress=False, **bad)
    headed = quality.save_reference(model, quality.Tokens(ids, 3), tmp_path / "headed", CONTEXT, progress=False)
    with pytest.raises(LabError, match="token 3 at each chunk's head"):
        quality.divergence(model, headed, ids, progress=False)


def test_another_vocabulary_is_refused(model, ids, tmp_path):
    with pytest.raises(LabError, match="97 tokens and the reference's 96"):
        quality.divergence(model, tiny(vocab_size=96), ids % 96, CONTEXT, progress=False)
    kept = quality.save_reference(tiny(vocab_size=96), ids % 96, tmp_path / "kept", CONTEXT, progress=False)
    with pytest.raises(LabError, match="97 tokens and the reference's 96"):
        quality.divergence(model, kept, progress=False)


def test_damaged_references_are_refused(model, ids, tmp_path):
    from safetensors.numpy import save_file

    whole = quality.save_reference(model, ids, tmp_path / "kept", CONTEXT, progress=False).path.read_bytes()
    cases = {"empty": b"", "short": whole[:-1], "text": b"not a reference at all", "head": whole[:20],
             "llama": b"_logits_", "llama cut": b"_logits_" + struct.pack("<Iii", 32, 97, 2) + bytes(100),
             "llama odd": b"_logits_" + struct.pack("<Iii", 1, -5, 2)}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadFile, match=str(tmp_path)):
            quality.read_reference(tmp_path / name)
    save_file({"a": np.zeros(3)}, tmp_path / "other")
    save_file({"codes": np.zeros((2, 3, 4), np.uint16), "tokens": np.zeros(5, np.int32)}, tmp_path / "parts", {
        "format": "llmlab-reference-1", "precision": "16-bit", "context": "32", "bos": "", "model": "m"})
    for name in ("other", "parts", "missing"):
        with pytest.raises(BadFile):
            quality.read_reference(tmp_path / name)
    with pytest.raises(LabError, match="16-bit"):
        quality.save_reference(model, ids, tmp_path / "x", CONTEXT, precision="int4", progress=False)
    with pytest.raises(LabError, match="cannot write"):
        quality.save_reference(model, ids, tmp_path / "nowhere" / "x", CONTEXT, progress=False)


def test_a_full_disk_is_said_before_the_work(model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.quality.references.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LabError, match="takes 25.58 KiB and 1000 B are free"):
        quality.save_reference(model, ids, tmp_path / "kept", CONTEXT, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_card_gives_the_same_figures(ids):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card here")
    here, there = tiny(), tiny().cuda()
    found = quality.divergence(there, here, ids, CONTEXT, progress=False)
    assert found.max_kld < 1e-6 and found.perplexity.value == pytest.approx(found.reference_perplexity.value, rel=1e-4)


# -- a real llama-perplexity's own files and answers ----------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """What tests/make_quality_golden.py kept: a base file that llama-perplexity wrote, another model's logits, its words."""
    kept = np.load(Path(__file__).parent / "golden" / "llama_perplexity.npz", allow_pickle=False)
    path = tmp_path_factory.mktemp("golden") / "base.kld"
    path.write_bytes(kept["base"].tobytes())
    return SimpleNamespace(path=path, logits=torch.from_numpy(kept["logits"]), printed=str(kept["printed"]))


def replayed(logits):
    """A model that answers one chunk after the other with logits that were kept, [chunks, scored, words]."""
    left = iter(logits)

    def model(ids):
        answer = torch.zeros(1, ids.shape[1], logits.shape[-1])
        answer[0, ids.shape[1] // 2:-1] = next(left)
        return SimpleNamespace(logits=answer)

    return model


def test_llama_perplexitys_own_file_is_read(golden):
    kept = quality.read_reference(golden.path, bos=1)
    assert (kept.context, kept.chunks, kept.vocabulary, kept.precision, kept.least) == (32, 8, 300, "16-bit", -16)
    assert kept.tokens.ids[0] == 1 and len(kept.tokens) == 256 and kept.tokens.chunk(3, 32)[0] == 1
    rows = torch.cat([part.clone() for part in kept.rows(2, passes.Held(), passes.Held())])
    assert rows.shape == (15, 300) and (rows.exp().sum(-1) - 1).abs().max() < 1e-3


def test_every_figure_is_llama_perplexitys(golden):
    """All it printed of a Q4_0 against its float32, to the last digit, give or take one, or to what float32 holds: a token's
    negative log-likelihood is float32 there."""
    found = quality.divergence(replayed(golden.logits), golden.path, progress=False)
    words = golden.printed

    def same(label, value, error=None, scale=1.0):
        said = re.search(rf"^\s*{re.escape(label)}\s*:\s*(-?[\d.]+)(?: ± *([\d.]+))?", words, re.M)
        for printed, ours in zip(said.groups(), (value, error), strict=True):
            assert (printed is None) == (ours is None), label
            if printed:
                last = 10.0 ** -len(printed.partition(".")[2])
                assert float(printed) == pytest.approx(ours * scale, rel=1e-6, abs=1.5 * last), label

    for label, one in (("Mean PPL(Q)", found.perplexity), ("Mean PPL(base)", found.reference_perplexity),
                       ("Mean ln(PPL(Q)/PPL(base))", found.log_ratio), ("Mean PPL(Q)/PPL(base)", found.ratio),
                       ("Mean PPL(Q)-PPL(base)", found.difference), ("Mean    KLD", found.mean_kld)):
        same(label, one.value, one.error)
    for label, one in (("Mean    Δp", found.mean_dp), ("RMS Δp", found.rms_dp), ("Same top p", found.top1)):
        same(label, one.value, one.error, 100)
    same("Cor(ln(PPL(Q)), ln(PPL(base)))", found.correlation, scale=100)
    for percent in (99.9, 99, 95, 90, 10, 5, 1, 0.1):
        same(f"{percent:.1f}%   KLD", found.kld_percentile(percent))
        same(f"{percent:.1f}%   Δp", found.dp_percentile(percent), scale=100)
    same("Maximum KLD", found.max_kld), same("Median  KLD", found.median_kld), same("Minimum KLD", float(found.kld.min()))
    same("Maximum Δp", float(found.dp.max()), scale=100), same("Median  Δp", found.dp_percentile(50), scale=100)


def test_every_chunks_running_figures_are_llama_perplexitys(golden):
    lines = re.findall(r"^ *(\d+) +(\S+) ± +(\S+) +(\S+) ± +(\S+) +(\S+) ± +(\S+) +(\S+) ± +(\S+) % +(\S+) ± +(\S+) %$",
                       golden.printed, re.M)
    assert len(lines) == 8
    for count, *printed in lines:
        found = quality.divergence(replayed(golden.logits), golden.path, chunks=int(count), progress=False)
        whole = [found.perplexity, found.log_ratio, found.mean_kld]
        shares = [statistics.Estimate(100 * one.value, 100 * one.error) for one in (found.rms_dp, found.top1)]
        for said, ours in zip(printed, [number for one in whole + shares for number in (one.value, one.error)], strict=True):
            assert float(said) == pytest.approx(ours, abs=1.5 * 10.0 ** -len(said.partition(".")[2]))


def test_perplexity_of_replayed_logits_is_llama_perplexitys(golden):
    tokens = quality.read_reference(golden.path, bos=1).tokens
    found = quality.perplexity(replayed(golden.logits), None, tokens, 32, progress=False)
    said = re.search(r"Mean PPL\(Q\) +: +(\S+) ± +(\S+)", golden.printed).groups()
    assert (f"{found.value:.4f}", f"{found.standard_error:.4f}") == tuple(f"{float(one):.4f}" for one in said)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), [
    (dict(context=200), "at least 400"), (dict(context=2), "from 3 up"), (dict(context=33.5), "from 3 up"),
    (dict(chunks="x"), "1 chunk or more"), (dict(chunks=0), "1 chunk or more"),
    (dict(text=[]), "0 tokens|whole numbers"), (dict(text=[0.5] * 100), "whole numbers"), (dict(text=""), "empty"),
    (dict(text=[WORDS] * 100), "vocabulary 97 tokens"), (dict(text=[-1] * 100), "vocabulary 97 tokens")])
def test_bad_input_is_said(model, ids, change, says):
    with pytest.raises(LabError, match=says):
        quality.perplexity(model, None, change.pop("text", ids), **{"context": CONTEXT, "progress": False, **change})


@pytest.mark.parametrize("nothing", [None, 5])
def test_what_is_no_model_is_said(model, ids, nothing):
    with pytest.raises(LabError, match="is no model; give what llmlab.load returned"):
        quality.perplexity(nothing, None, ids, CONTEXT, progress=False)
    with pytest.raises(LabError, match="is no model; give what llmlab.load returned"):
        quality.divergence(model, nothing, ids, CONTEXT, progress=False)


def test_bad_answers_are_said(ids):
    def nan(ids):
        return torch.full((1, ids.shape[1], WORDS), torch.nan)

    with pytest.raises(LabError, match="chunk 1: the model's logits are not numbers"):
        quality.perplexity(nan, None, ids, CONTEXT, progress=False)
    with pytest.raises(LabError, match="chunk 1 of the reference"):
        quality.divergence(lambda ids: torch.zeros(1, ids.shape[1], WORDS), nan, ids, CONTEXT, progress=False)
    for bad in (lambda ids: torch.zeros(2, ids.shape[1], WORDS), lambda ids: torch.zeros(1, 5, WORDS), lambda ids: "no"):
        with pytest.raises(LabError, match=r"not .logits \[1, 32, vocabulary\]"):
            quality.perplexity(bad, None, ids, CONTEXT, progress=False)
    with pytest.raises(LabError, match="tokens is missing"):
        quality.divergence(nan, nan, progress=False)
    with pytest.raises(LabError, match="tokens_of"):
        quality.divergence(nan, nan, "a text", progress=False)


# -- text and tokens ------------------------------------------------------------------------------------------------


def test_the_text_is_the_same_everywhere():
    text = quality.text()
    assert hashlib.sha256(text.encode()).hexdigest() == "1cf767d0d571332a32d9dee3a18398c29bf826cb544aa32be648b3009b87401c"
    assert text.isascii() and "\r" not in text and len(text) == 97133
    assert "97,133" in quality.text.__doc__


class Letters:
    """A tokenizer of bytes, with or without a BOS of its own."""

    def __init__(self, bos, adds):
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False, verbose=True):
        head = [self.bos_token_id] if add_special_tokens and self.adds else []
        return SimpleNamespace(input_ids=head + [letter % 64 for letter in text.encode()])


def test_bos_stands_at_every_chunks_head_where_the_vocabulary_adds_one(model):
    added, known = quality.tokens_of(Letters(65, True), "some text"), quality.tokens_of(Letters(65, False), "some text")
    assert added.bos == 65 and added.ids[0] == 65 and len(added) == 10 and known.bos is None and len(known) == 9
    tokens = quality.tokens_of(Letters(65, True))
    assert [int(tokens.chunk(i, 16)[0]) for i in (0, 1, 5)] == [65] * 3 and tokens.ids[16] != 65
    read = []

    def watched(ids):
        read.append(ids[0].tolist())
        return model(ids)

    quality.perplexity(watched, Letters(65, True), None, 16, chunks=3, progress=False)
    assert [ids[0] for ids in read] == [65] * 3 and read[1][1:] == tokens.ids[17:32].tolist()


def test_a_text_takes_a_tokenizer(model):
    with pytest.raises(LabError, match="takes a tokenizer"):
        quality.perplexity(model, None, "some text", progress=False)


def test_ids_come_in_any_shape(ids):
    same = [corpus.as_tokens(given).ids.tolist() for given in (ids, ids.tolist(), torch.tensor(ids), torch.tensor(ids)[None])]
    assert all(one == ids.tolist() for one in same)


# -- 8-bit activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [32, 256])
def test_rounded_is_what_blocks_of_8_bits_hold(block):
    x = torch.randn(3, 5, 2 * block + 7, generator=torch.Generator().manual_seed(4)) * 10
    x[0, 0, :block] = 0
    found = rounding.rounded(x, block)
    assert found.shape == x.shape and found.dtype == x.dtype and found[0, 0, :block].eq(0).all()
    for part in range(0, x.shape[-1], block):
        largest = x[..., part:part + block].abs().amax(-1, keepdim=True)
        off = (found - x)[..., part:part + block].abs()
        assert (off <= largest / 127 * 0.5 + largest * 2**-11 + 1e-9).all() and off.max() > 0
    assert rounding.rounded(x.bfloat16(), block).dtype == torch.bfloat16


def test_rounded_activations_last_as_long_as_asked(model, ids):
    before = quality.perplexity(model, None, ids, CONTEXT, chunks=2, progress=False)
    kept = model(torch.tensor(ids[:CONTEXT])[None]).logits
    with quality.rounded_activations(model) as inside:
        moved = (inside(torch.tensor(ids[:CONTEXT])[None]).logits - kept).abs().max()
    assert 0 < moved < 1
    assert quality.perplexity(model, None, ids, CONTEXT, chunks=2, progress=False) == before


# -- published ------------------------------------------------------------------------------------------------------


def test_published_quality_is_one_call_away():
    rows = {(row["what"], row["importance"]): row for row in catalog.published_quality()}
    assert len(rows) == len(catalog.quality())
    q4 = rows["Q4_K_M", False]
    assert q4["loss"] == pytest.approx(6.407115 / 6.233160 - 1) and 0.02 < rows["Q4_K_M", True]["loss"] < q4["loss"] < 0.03
    assert q4["bits"] == 4.8944 and q4["bytes"] == int(4.58 * 2**30) and q4["rms_dp"] == pytest.approx(0.05519)
    assert rows["F16", False]["loss"] == 0 and rows["Q4_0", False]["bits"] == 4.64 and all(row["bits"] for row in rows.values())
    losses = [row["mean_kld"] for row in catalog.published_quality()]
    assert losses == sorted(losses)
    cache = catalog.published_quality("cache")
    assert cache[0]["what"] == "f16/f16" and cache[0]["loss"] == 0 and cache[-1]["loss"] is None and "bytes" not in cache[0]
    assert "+2.79%" in str(catalog.published_quality())
    with pytest.raises(UnknownName, match="weights"):
        catalog.published_quality("speed")


def test_estimates_can_be_written():
    found = statistics.Estimate(0.03125, 0.0005)
    assert f"{found:.4f}" == "0.0312 ± 0.0005" and str(replace(found, value=2.0)) == "2 ± 0.0005"
