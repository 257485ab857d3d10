"""Importance matrices: reckoned straight, equal to a real llama-imatrix's, their files and sums, and bad input."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from make_importance_golden import CHUNKS, CONTEXT, EXPERTS, GOLDEN, LAYERS, WIDTH, write_model, write_text
from runtime_models import CASES, VOCAB, make, random_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import llmlab
from llmlab import quality
from llmlab.cli import main
from llmlab.errors import BadFile, LabError, UnknownName
from llmlab.gguf import read_gguf, write_gguf
from llmlab.quality import passes, weighing
from llmlab.quality.imatrix import Importance
from llmlab.runtime.decoder import Decoder

IDS = np.random.default_rng(4).integers(3, VOCAB, 130)


def collect(model, ids=IDS, context=40, **settings):
    return llmlab.importance(model, None, ids, context, False, **settings)


def apart(ours: Importance, theirs: Importance) -> float:
    """The largest difference of any tensor, as a share of its sums; names, order aside, and counts are the same."""
    assert set(ours) == set(theirs)
    assert all(ours.counts[name].tolist() == theirs.counts[name].tolist() for name in theirs)
    return max(np.abs(ours.sums[name] - theirs.sums[name]).sum() / theirs.sums[name].sum() for name in theirs)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(model, tokenizer, text) that a real llama-imatrix was run on."""
    folder = tmp_path_factory.mktemp("golden")
    return *llmlab.load(write_model(folder / "tiny.gguf"), device="cpu", dtype="float32"), write_text(folder / "t").read_text()


# -- collecting -----------------------------------------------------------------------------------------------------


def test_a_real_llama_imatrix_collected_the_same(golden):
    """BOS at each chunk's head, experts apart, one that was never chosen, the output matrix."""
    model, tokenizer, text = golden
    theirs = llmlab.read_importance(GOLDEN / "imatrix_gguf.dat")
    found = llmlab.importance(model, tokenizer, text, CONTEXT, progress=False, output=True, dataset="alice.txt")
    assert apart(found, theirs) < 2e-6
    assert (found.chunks, found.context, found.datasets) == (CHUNKS, CONTEXT, ("alice.txt",)) == (
        theirs.chunks, theirs.context, theirs.datasets)
    assert found.counts["blk.0.ffn_up_exps.weight"].sum() == 2 * CHUNKS * CONTEXT
    assert {"output.weight", "blk.1.ffn_gate_inp.weight"} < set(found)
    assert set(llmlab.importance(model, tokenizer, text, CONTEXT, False)) == set(found) - {"output.weight"}


def straight(model, ids, context, bos=None):
    """Means of squares, float64, of every nn.Linear by its own name: no code of llmlab's."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))))
    for start in range(0, len(ids) - context + 1, context):
        chunk = torch.tensor(ids[start:start + context])
        if bos is not None:
            chunk[0] = bos
        with torch.no_grad():
            model(chunk[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().square().mean(0).numpy() for name, parts in seen.items()}


@pytest.mark.parametrize(("bos", "context"), [(None, 40), (1, 33)])
def test_the_mean_of_squares_as_it_is_defined(bos, context):
    model = random_model(CASES["llama"])
    wanted = straight(model, IDS, context, bos)
    found = llmlab.importance(model, None, quality.Tokens(IDS, bos), context, False, output=True)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
    assert len(found) == 2 * 7 + 1 and found.chunks == 3
    for layer in range(2):
        for module, stem in names.items():
            mine = found[f"blk.{layer}.{stem}.weight"]
            assert mine.dtype == np.float32 and mine.shape == wanted[f"model.layers.{layer}.{module}"].shape
            assert np.allclose(mine, wanted[f"model.layers.{layer}.{module}"], rtol=1e-6)
    assert np.allclose(found["output.weight"], wanted["lm_head"], rtol=1e-6)
    assert all(count.tolist() == [3 * context] for count in found.counts.values())


@pytest.mark.parametrize("name", ["llama-biased", "mixtral", "qwen2moe", "gemma3", "phi3", "gpt-oss"])
def test_packed_lean_and_transformers_own_collect_the_same(tmp_path, name):
    dense = make(name, tmp_path / "tiny.gguf", "F32")
    packed, _ = llmlab.load(tmp_path / "tiny.gguf", device="cpu", dtype="float32", strategy="compact")
    decoder = Decoder.open(tmp_path / "tiny.gguf", torch.float32, "fast")
    theirs = collect(dense, output=True)
    assert {name for name, t in read_gguf(tmp_path / "tiny.gguf").tensors.items()
            if len(t.shape) > 1 and name.startswith("blk.") and name.endswith("weight")} <= set(theirs)
    assert apart(collect(packed, output=True), theirs) < 1e-5 and apart(collect(decoder, output=True), theirs) < 1e-5
    assert apart(collect(packed), collect(decoder)) < 1e-5 and set(collect(decoder)) < set(theirs)


@pytest.mark.parametrize("kind", ["mistral", "gemma", "olmo2"])
def test_models_whose_modules_have_the_same_names(kind):
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
                                  num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    found = collect(AutoModelForCausalLM.from_config(config).eval(), output=True)
    stems = {f"blk.0.{stem}.weight" for stem in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    assert set(found) == stems | {"token_embd.weight" if kind == "gemma" else "output.weight"}


def test_experts_and_their_router_belong_together(golden):
    """Every token goes to two of four experts: their counts and sums are twice the router's."""
    model, tokenizer, text = golden
    found = llmlab.importance(model, tokenizer, text, CONTEXT, False)
    for layer in range(LAYERS):
        router, gate = (f"blk.{layer}.ffn_gate_{part}.weight" for part in ("inp", "exps"))
        assert found[gate].shape == (EXPERTS, WIDTH) and found[router].shape == (WIDTH,)
        assert found.counts[gate].sum() == 2 * found.counts[router][0] == 2 * CHUNKS * CONTEXT
        assert np.allclose(found.sums[gate].sum(0), 2 * found.sums[router][0])


def test_tensors_that_a_file_holds_as_one_have_its_names(tmp_path):
    from test_runtime import _joined

    make("qwen3moe", tmp_path / "apart.gguf", "F32")
    file = read_gguf(tmp_path / "apart.gguf")
    wholes = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
    parts = {part for several in wholes.values() for part in several}
    tensors = [(n, t.shape, t.type, file.data(n).tobytes()) for n, t in file.tensors.items()
               if n.removesuffix(".weight").rpartition(".")[2] not in parts]
    tensors += [_joined(file, f"blk.{i}", several, whole) for i in range(2) for whole, several in wholes.items()]
    write_gguf(tmp_path / "fused.gguf", file.typed_metadata(), tensors)
    one, other = (collect(llmlab.load(tmp_path / f"{name}.gguf", device="cpu", dtype="float32")[0])
                  for name in ("apart", "fused"))
    assert apart(collect(Decoder.open(tmp_path / "fused.gguf", torch.float32, "fast")), other) < 1e-5
    assert len(one) - len(other) == 2 * 3 and not {name.split(".")[2] for name in other} & parts
    for whole, several in wholes.items():
        assert np.allclose(other[f"blk.1.{whole}.weight"], one[f"blk.1.{several[0]}.weight"], rtol=1e-5)


def test_a_long_chunk_goes_through_in_pieces(monkeypatch):
    model = random_model(CASES["gemma2"])
    whole = collect(model, context=130)
    monkeypatch.setattr(weighing, "PIECE", 50)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert apart(collect(model, context=130), whole) < 1e-5 and seen == [50, 50, 30]
    handle.remove()


@pytest.mark.parametrize("at_once", [1, 16, 2**20])
def test_one_input_is_squared_once_some_rows_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(passes, "WORKING", at_once)
    sums, x = weighing._Sums(), torch.randn(3, 5, 8)
    sums.add("q", x)
    squares = sums._squares
    sums.add("k", x.view(15, 8))
    assert sums._squares is squares and torch.equal(sums.sums["q"], sums.sums["k"]) and sums.counts == {"q": [15], "k": [15]}
    sums.add("o", x[:, :2])
    assert sums._squares is not squares
    assert torch.allclose(sums.sums["o"][0], x[:, :2].double().square().sum((0, 1)))


def test_low_precision_inputs_are_squared_as_they_are():
    exact, model = random_model(CASES["qwen2"]), random_model(CASES["qwen2"]).bfloat16()
    found = collect(model)
    assert found.sums["blk.0.attn_q.weight"].dtype == np.float64
    assert 1e-4 < apart(found, collect(exact)) < 0.05


def test_chunks_progress_and_stopping():
    model, told = random_model(CASES["llama"]), []
    first = collect(model, chunks=1)
    assert first.chunks == 1 and first.counts["blk.0.attn_q.weight"].tolist() == [40]
    found = llmlab.importance(model, None, IDS, 40, lambda *done: told.append(done), stopped=lambda: len(told) == 2)
    assert told == [(1 / 3, "chunk 1 of 3"), (2 / 3, "chunk 2 of 3")]
    assert found.chunks == 2 and apart(found, collect(model, chunks=2)) == 0
    halves = collect(model, IDS[:40]) + collect(model, IDS[40:120])
    assert apart(halves, collect(model)) < 1e-12 and halves.chunks == 3


def test_the_model_is_as_it_was(golden, tmp_path):
    """Also after an error, and what it answers; dropout is off meanwhile."""
    make("mixtral", tmp_path / "tiny.gguf", "F32")
    packed, _ = llmlab.load(tmp_path / "tiny.gguf", device="cpu", dtype="float32")
    dense = random_model(CASES["mixtral"], attention_dropout=0.5)
    dense.train()
    calm = collect(dense)
    for model in (packed, dense):
        before = [dict(vars(module)) for module in model.modules()]
        assert apart(collect(model), collect(model)) == 0
        with pytest.raises(LabError):
            collect(model, np.append(IDS[:40], np.full(90, VOCAB)))
        for module, then in zip(model.modules(), before, strict=True):
            now = vars(module)
            assert now.keys() == then.keys() and all(now[key] is then[key] for key in now), type(module)
            assert not module._forward_pre_hooks or module is model.base_model
    assert dense.training and apart(calm, collect(dense.eval())) == 0


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "says"), [
    ({"ids": IDS[:30]}, "30 tokens, and one chunk takes 40"), ({"ids": IDS + VOCAB}, "vocabulary"), ({"context": 0}, "context"),
    ({"context": "512"}, "context"), ({"chunks": 0}, "chunks"), ({"ids": []}, "tokens are whole numbers"),
    ({"ids": "a text", "context": 4}, "tokenizer")])
def test_bad_settings_get_one_line(settings, says):
    with pytest.raises(LabError, match=says) as refused:
        collect(random_model(CASES["llama"]), **settings)
    assert "\n" not in str(refused.value)


def test_an_empty_text_is_refused(golden):
    model, tokenizer, _ = golden
    with pytest.raises(LabError, match="empty"):
        llmlab.importance(model, tokenizer, "")
    with pytest.raises(LabError, match="7 tokens, and one chunk takes 512"):
        llmlab.importance(model, tokenizer, "Alice.")


def test_what_is_no_model_with_layers_is_refused():
    with pytest.raises(LabError, match="no model whose layers"):
        collect(lambda ids: ids)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(LabError, match="GPT2"):
        collect(other)
    odd = random_model(CASES["llama"])
    odd.model.layers[1].mlp.odd_proj = torch.nn.Linear(8, 8)
    with pytest.raises(LabError, match=r"layers\.1\.mlp\.odd_proj"):
        collect(odd)


def test_a_compiled_model_is_run_by_its_modules(golden, monkeypatch):
    """`llmlab.load(..., compile=True)` gives a model with a decoder, which is not asked."""
    model, tokenizer, text = golden
    monkeypatch.setattr(model, "decoder", object(), raising=False)
    monkeypatch.setattr(model, "forward", None)
    assert len(llmlab.importance(model, tokenizer, text, CONTEXT, False)) == 2 * 8


def test_a_compiled_decoder_is_refused(golden):
    decoder = Decoder.open(golden[0].llmlab.path, torch.float32)
    decoder.compiled = object()
    with pytest.raises(LabError, match="without compile=True"):
        collect(decoder)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_inputs_that_are_no_numbers_name_the_tensor(wrong):
    model = random_model(CASES["llama"])
    model.model.layers[1].self_attn.v_proj.weight.data[3, 5] = wrong
    with pytest.raises(LabError, match=r"chunk 1: what blk\.1\.attn_output\.weight is multiplied by is not a number"):
        collect(model)


# -- the matrix -----------------------------------------------------------------------------------------------------


def plain(**changes) -> Importance:
    return replace(Importance({"a": np.array([[2.0, 4.0, 0.0, 6.0]]), "e": np.array([[3.0, 9.0], [0.0, 0.0]])},
                              {"a": np.array([2]), "e": np.array([3, 0])}, 1, 2, ("one",)), **changes)


def test_it_maps_names_to_means():
    one = plain()
    assert one["a"].tolist() == [1, 2, 0, 3] and one["a"].dtype == np.float32
    assert one["e"].tolist() == [[1, 3], [1, 1]]        # an expert of which nothing is known: all columns alike
    assert list(one) == ["a", "e"] and len(one) == 2 and "a" in one and "b" not in one and one.get("b") is None
    assert one == one and one != plain() and one in {one}
    assert one.unseen == {"e": 1} and "1 expert" in repr(one)
    with pytest.raises(UnknownName, match="no tensor 'b'; it has 2, such as 'a'"):
        one["b"]


def test_several_are_joined():
    both = plain() + plain(sums={"a": np.ones((1, 4)), "n": np.ones((1, 3))}, counts={"a": np.array([2]), "n": np.array([2])},
                           datasets=("two",))
    assert both["a"].tolist() == [0.75, 1.25, 0.25, 1.75] and set(both) == {"a", "e", "n"}
    assert (both.chunks, both.context, both.datasets) == (2, 2, ("one", "two"))
    assert Importance.merge([plain(), plain(), plain()])["a"].tolist() == plain()["a"].tolist()
    stacked = plain() + plain(sums={"e": np.ones((1, 4))}, counts={"e": np.array([5])})      # one count for a whole stack
    assert stacked.counts["e"].tolist() == [8, 5] and stacked.sums["e"].tolist() == [[4, 10], [1, 1]]
    with pytest.raises(LabError, match="'a' has 4 columns .* two models"):
        plain() + plain(sums={"a": np.ones((1, 5))})
    with pytest.raises(LabError, match="give one"):
        Importance.merge([])
    with pytest.raises(TypeError):
        plain() + 1


def test_how_concentrated_it_is():
    sums = {"even": np.ones((1, 200)), "one": np.eye(1, 200), "two": np.repeat([[99.0, 1.0]], [2, 198], 1),
            "stack": np.array([[1.0] * 100, [1.0] + [0.0] * 99]), "dead": np.zeros((1, 100))}
    counts = {name: np.full(len(one), 4) for name, one in sums.items()} | {"stack": np.array([3, 1])}
    found = Importance(sums, counts, 1)
    shares = found.concentration()
    assert shares["even"] == pytest.approx(0.01) and shares["one"] == 1 and shares["two"] == pytest.approx(0.5)
    assert shares["stack"] == pytest.approx(0.75 * 0.01 + 0.25) and shares["dead"] == pytest.approx(0.01)
    assert found.concentration(1)["two"] == pytest.approx(1)
    assert [row["tensor"] for row in found.table()][0] == "one" and "top 1%" in found.table()[0]
    for wrong in (0, 1.5, -1):
        with pytest.raises(LabError, match="top="):
            found.concentration(wrong)


# -- files ----------------------------------------------------------------------------------------------------------


def test_llama_imatrixs_file_is_written_as_it_writes_it(tmp_path):
    """Read and saved again it is the same to the byte."""
    llmlab.read_importance(GOLDEN / "imatrix_gguf.dat").save(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (GOLDEN / "imatrix_gguf.dat").read_bytes()


def test_the_older_format_says_the_same():
    old, new = llmlab.read_importance(GOLDEN / "imatrix_old.dat", CONTEXT), llmlab.read_importance(GOLDEN / "imatrix_gguf.dat")
    assert set(old) == set(new) and (old.chunks, old.datasets) == (CHUNKS, ("alice.txt",))
    for name in new:
        assert np.allclose(old[name].reshape(new[name].shape), new[name], rtol=1e-6)
    assert (old + new).sums["blk.0.ffn_up_exps.weight"].shape == (EXPERTS, WIDTH)


def test_a_saved_file_is_what_gguf_py_reads(tmp_path):
    one = plain()
    one.save(tmp_path / "x.gguf")
    file = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {t.name: (t.shape.tolist(), t.tensor_type.name, np.array(t.data).flatten().tolist()) for t in file.tensors}
    assert found == {"a.in_sum2": ([4], "F32", [2, 4, 0, 6]), "a.counts": ([1], "F32", [2]),
                     "e.in_sum2": ([2, 2], "F32", [3, 9, 0, 0]), "e.counts": ([1, 2], "F32", [3, 0])}
    fields = {name: file.fields[name].contents() for name in file.fields if not name.startswith("GGUF.")}
    assert fields == {"general.type": "imatrix", "imatrix.datasets": ["one"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 2}
    back = llmlab.read_importance(tmp_path / "x.gguf")
    assert apart(back, one) == 0 and (back.chunks, back.context, back.datasets) == (1, 2, ("one",))
    plain(datasets=()).save(str(tmp_path / "none.gguf"))
    assert llmlab.read_importance(tmp_path / "none.gguf").datasets == ()


def test_the_texts_names_may_lack_or_be_many(tmp_path):
    for names, found in ((5, ()), (("array:string", ["x"] * 5000), ("x",) * 5000)):
        assert llmlab.read_importance(broken(tmp_path / "x.gguf", **{"imatrix.datasets": names})).datasets == found


def test_where_it_cannot_be_written(tmp_path):
    for target in (tmp_path, tmp_path / "gone" / "x.gguf"):
        with pytest.raises(LabError) as refused:
            plain().save(target)
        assert "\n" not in str(refused.value) and not (tmp_path / "gone").exists()


def broken(path: Path, **changes) -> Path:
    """An importance matrix's GGUF with other tensors or keys; None leaves one out."""
    tensors = {"a.in_sum2": np.ones(4), "a.counts": np.ones(1)} | {k: v for k, v in changes.items() if k.startswith("a.")}
    keys = {"general.type": "imatrix", "imatrix.datasets": ("array:string", []), "imatrix.chunk_count": 1,
            "imatrix.chunk_size": 2} | {k: v for k, v in changes.items() if not k.startswith("a.")}
    write_gguf(path, {k: v for k, v in keys.items() if v is not None}, [
        (k, v.shape[::-1], "F32", v.astype(np.float32).tobytes()) for k, v in tensors.items() if v is not None])
    return path


@pytest.mark.parametrize(("changes", "says"), [
    ({"a.counts": None}, "'a.counts'"), ({"a.in_sum2": None}, "'a.in_sum2'"), ({"a.counts": np.ones(3)}, "do not belong"),
    ({"a.in_sum2": np.array([1, np.nan, 1, 1])}, "'a' has numbers that are no sums"), ({"a.counts": np.array([-1])}, "'a' has"),
    ({"a.in_sum2": np.array([1.0, -1.0])}, "'a' has numbers"), ({"a.counts": np.array([np.inf])}, "do not belong"),
    ({"a.in_sum2": None, "a.counts": None}, "no importance matrix"), ({"general.type": "model"}, "GGUF 'model'"),
    ({"imatrix.chunk_size": None}, "imatrix.chunk_size"), ({"imatrix.chunk_count": "3"}, "imatrix.chunk_count")])
def test_a_damaged_gguf_is_refused(tmp_path, changes, says):
    with pytest.raises(BadFile, match=says) as refused:
        llmlab.read_importance(broken(tmp_path / "x.gguf", **changes))
    assert "\n" not in str(refused.value) and "x.gguf" in str(refused.value)


@pytest.mark.parametrize("kind", ["gguf", "old"])
def test_a_file_that_ends_too_early_is_refused(tmp_path, kind):
    whole = (GOLDEN / f"imatrix_{kind}.dat").read_bytes()
    for size in {0, 3, 4, 7, 9, 40, len(whole) // 2, len(whole) - 40}:
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(BadFile, match="cut"):
            llmlab.read_importance(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["gguf", "old"])
def test_damaged_bytes_are_refused_or_read_but_nothing_else(tmp_path, kind):
    whole, random = (GOLDEN / f"imatrix_{kind}.dat").read_bytes(), np.random.default_rng(8)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for at in random.integers(0, 2000 if random.random() < 0.9 else len(data), random.integers(1, 4)):
            data[at] = random.integers(0, 256)
        (tmp_path / "x").write_bytes(data)
        try:
            llmlab.read_importance(tmp_path / "x")
        except BadFile:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("content", [
    b"", b"a text that is no matrix at all", struct.pack("<i", -1), struct.pack("<ii", 1, 2**31 - 1), bytes(100),
    struct.pack("<ii1sii", 1, 1, b"a", 1, -4)])
def test_what_is_no_importance_matrix_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadFile, match="no importance matrix"):
        llmlab.read_importance(tmp_path / "x")


def test_a_model_or_nothing_in_its_place_is_refused(tmp_path, golden):
    with pytest.raises(BadFile, match="no importance matrix but a GGUF 'llama'"):
        llmlab.read_importance(golden[0].llmlab.path)
    for path in (tmp_path / "gone.gguf", tmp_path):
        with pytest.raises(BadFile, match="cannot read"):
            llmlab.read_importance(path)
    with pytest.raises(LabError, match="context"):
        llmlab.read_importance(GOLDEN / "imatrix_old.dat", 0)


# -- from a shell ---------------------------------------------------------------------------------------------------


def test_from_a_shell(golden, tmp_path, capsys):
    model, tokenizer, text = golden
    (tmp_path / "some.txt").write_text(text)
    words = ["importance", model.llmlab.path, str(tmp_path / "some.txt"), "-o", str(tmp_path / "x.gguf"), "-c", str(CONTEXT),
             "--output", "--dtype", "float32", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "x.gguf"), "tensors": 2 * 8 + 1, "chunks": CHUNKS,
                                                   "context": CONTEXT, "unseen_experts": 2 * 3}
    assert apart(llmlab.read_importance(tmp_path / "x.gguf"), llmlab.read_importance(GOLDEN / "imatrix_gguf.dat")) < 2e-6
    assert main([*words, "--chunks", "1", "--add", str(tmp_path / "x.gguf")]) == 0
    assert "importance of 17 matrices (measured: 4 chunks of 64 tokens of 'some.txt'" in capsys.readouterr().out
    for option, wrong, says in (("--add", "gone", "gone"), ("-o", "gone/x", "--out"), ("--chunks", "0", "chunks")):
        assert main([*words, option, wrong]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    words[2] = str(tmp_path / "gone.txt")
    assert main(words) == 2 and "gone.txt cannot be read" in capsys.readouterr().err
