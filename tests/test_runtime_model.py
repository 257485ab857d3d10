"""A packed model behaves as a transformers model, an adapter trains on top of it, and a bad file is one clear line."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from runtime_models import VOCAB, divergence, make

import llmlab
from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf, write_gguf
from llmlab.runtime import FAMILIES, PackedModel
from llmlab.runtime.modules import PackedLinear, in_order

TOKENS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "qwen2.gguf"
    return path, make("qwen2", path)


@pytest.fixture
def model(qwen):
    return llmlab.load(qwen[0], device="cpu", dtype="float32", strategy="compact")[0]


# ---- a transformers model ------------------------------------------------------------------------------------

@torch.no_grad()
def test_hooks_and_hidden_states_are_seen(model, qwen):
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, x, y: seen.append(y.shape))
    found = model(TOKENS, output_hidden_states=True)
    handle.remove()
    wanted = qwen[1](TOKENS, output_hidden_states=True)
    assert seen == [(2, 20, 256)] and len(found.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert divergence(found.logits[:, -1:], model(TOKENS, logits_to_keep=1).logits) < 1e-9
    assert divergence(found.logits, model(inputs_embeds=model.get_input_embeddings()(TOKENS)).logits) < 1e-9


def test_it_counts_what_is_packed(model, qwen):
    reference = qwen[1]
    assert model.num_parameters() == reference.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == reference.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0 and not model.training
    held = sum(p.bytes + p.mapped for _, p in model.packed())
    assert held < model.get_memory_footprint() == model.llmlab.resident_bytes < held + 20000
    assert {name for name, _ in model.packed()} >= {"lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"}


def test_pickling_it_is_refused_in_words(model):
    with pytest.raises(LabError, match="packed weights are not pickled; hand on the path of their file and load it there"):
        pickle.dumps(model)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(model):
    twin = copy.deepcopy(model)
    assert isinstance(twin, PackedModel) and divergence(model(TOKENS).logits, twin(TOKENS).logits) < 1e-9
    assert twin.model.norm.weight.data_ptr() != model.model.norm.weight.data_ptr()
    assert twin.num_parameters() == model.num_parameters()


def test_it_stays_where_and_as_it_was_made(model):
    assert model.to("cpu") is model and model.float() is model and model.to(torch.float32) is model
    for move in (model.half, model.bfloat16, lambda: model.to("meta")):
        with pytest.raises(LabError, match=r"stays where and as it was made \(cpu, float32\); load it again"):
            move()


def test_it_is_not_saved_or_resized(model, qwen, tmp_path):
    for act in (lambda: model.save_pretrained(tmp_path), lambda: model.push_to_hub("me/mine"),
                lambda: model.resize_token_embeddings(400)):
        with pytest.raises(LabError, match=re.escape(str(qwen[0]))):
            act()
    assert not list(tmp_path.iterdir())


def test_rows_interleaved_for_rope_come_back_in_order():
    rows = torch.arange(12.0)
    interleaved = rows.view(2, 2, 3).transpose(1, 2).reshape(-1)          # the converter's permute, two heads of six
    assert interleaved.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(in_order(interleaved, 2), rows)


# ---- adapters ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["compact", "fast"])
def test_an_adapter_trains_on_top_of_packed_weights(qwen, tmp_path, strategy, checkpointing):
    from peft import LoraConfig, PeftModel, get_peft_model

    def fresh():
        return llmlab.load(qwen[0], device="cpu", dtype="float32", strategy=strategy)[0]

    base = fresh()
    before = base(TOKENS).logits
    torch.manual_seed(0)
    with warnings.catch_warnings():                 # transformers renames checkpointing as it goes to version 6
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(base, LoraConfig(r=4, target_modules=r".*_proj", task_type="CAUSAL_LM"))
        targets = [m for m in tuned.modules() if isinstance(m, PackedLinear) and m is not base.lm_head]
        trained, counted = tuned.get_nb_trainable_parameters()
        assert len(targets) == 14 and 0 < trained < 0.1 * counted and counted == base.num_parameters()
        if checkpointing:
            tuned.gradient_checkpointing_enable()
            tuned.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        tuned.train()
        losses = []
        for _ in range(4):
            loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            grads = {name: float(p.grad.norm()) for name, p in tuned.named_parameters() if p.requires_grad}
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert len(grads) == 28 and min(grads.values()) > 0
    assert losses[-1] < 0.7 * losses[0]
    tuned.eval()
    with tuned.disable_adapter(), torch.no_grad():
        assert torch.allclose(tuned(TOKENS).logits, before, atol=1e-5)
    for safe in (False, True):
        with pytest.raises(LabError, match="cannot be merged into them"):
            tuned.merge_adapter(safe_merge=safe)
    with warnings.catch_warnings():                 # peft looks for a config.json beside the base model, and says so
        warnings.simplefilter("ignore")
        tuned.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(TOKENS).logits, tuned(TOKENS).logits, atol=1e-6)


# ---- files that cannot be used -------------------------------------------------------------------------------

def changed(source, target, drop=(), tensors=None, add=(), **metadata):
    """A copy of a GGUF without some tensors, with others instead, with more, and other hyperparameters (None: left out)."""
    file, tensors = read_gguf(source), tensors or {}
    values = {**file.typed_metadata(), **{f"qwen2.{key.replace('__', '.')}": value for key, value in metadata.items()}}
    kept = [tensors.get(n, (n, t.shape, t.type, file.data(n).tobytes())) for n, t in file.tensors.items() if n not in drop]
    write_gguf(target, {k: v for k, v in values.items() if v is not None}, [*kept, *add])
    return target


NUMBERS = bytes(4 * 256)


@pytest.mark.parametrize(("change", "says"), [
    ({"drop": ["blk.1.ffn_up.weight"]}, "lacks tensor 'blk.1.ffn_up.weight', which this model needs"),
    ({"drop": ["token_embd.weight"]}, "lacks tensor 'token_embd.weight'"),
    ({"drop": ["output_norm.weight"]}, "lacks tensor 'output_norm.weight'"),
    ({"tensors": {"blk.0.attn_norm.weight": ("blk.0.attn_norm.weight", (128,), "F32", NUMBERS[:512])}},
     "tensor 'blk.0.attn_norm.weight' is 128, and by the file's own hyperparameters it is 256"),
    ({"tensors": {"blk.0.attn_output.weight": ("blk.0.attn_output.weight", (256, 1), "F32", NUMBERS)}},
     "tensor 'blk.0.attn_output.weight' is 1x256, and by the file's own hyperparameters it is 256x256"),
    ({"tensors": {"blk.0.attn_k.weight": ("blk.0.attn_k.weight", (256, 128), "Q8_K", bytes(292 * 128))}},
     "tensor 'blk.0.attn_k.weight': Q8_K"),
    ({"tensors": {"blk.0.attn_q.bias": ("blk.0.attn_q.bias", (256,), "Q8_1", bytes(8 * 36))}},
     "tensor 'blk.0.attn_q.bias': Q8_1"),
    ({"add": [("blk.0.attn_q_norm.weight", (64,), "F32", NUMBERS[:256])]}, "holds tensor 'blk.0.attn_q_norm.weight'"),
    ({"block_count": 3}, "lacks tensor 'blk.2."),
    ({"block_count": 1}, "holds tensor 'blk.1."),
    ({"block_count": None}, "has no qwen2.block_count"),
    ({"block_count": ("string", "two")}, "qwen2.block_count is 'two', not a whole number"),
    ({"embedding_length": 0}, "qwen2.embedding_length is 0"),
    ({"attention__head_count_kv": 3}, "qwen2.attention.head_count_kv is 3, not a divisor of 4 heads"),
    ({"attention__head_count_kv": ("array:uint32", [2, 1])}, "layers of different sizes"),
    ({"attention__layer_norm_rms_epsilon": ("float32", float("nan"))}, "layer_norm_rms_epsilon is nan"),
    ({"attention__value_length": 32}, "qwen2.attention.value_length is 32, not 64"),
    ({"rope__dimension_count": 32}, "qwen2.rope.dimension_count is 32, not 64, the length of a key"),
    ({"rope__scaling__type": "spiral"}, "scales positions by 'spiral'"),
    ({"feed_forward_length": 300},
     "tensor 'blk.0.ffn_gate.weight' is 512x256, and by the file's own hyperparameters it is 300x256"),
])
def test_a_bad_file_is_one_clear_line(qwen, tmp_path, change, says):
    path = changed(qwen[0], tmp_path / "bad.gguf", **change)
    with pytest.raises(LabError) as error:
        llmlab.load(path, device="cpu")
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_cut_short_says_so(qwen, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(qwen[0].read_bytes()[:-1000])
    with pytest.raises(BadFile, match="is truncated: tensor 'output.weight' ends at byte"):
        llmlab.load(path)


def test_an_architecture_that_is_not_run_is_named_with_the_alternatives(tmp_path):
    path = tmp_path / "mamba.gguf"
    write_gguf(path, {"general.architecture": "mamba"}, [("token_embd.weight", (32, 4), "F32", bytes(512))])
    with pytest.raises(LabError, match="is a 'mamba' model, which llmlab does not run packed") as error:
        llmlab.load(path)
    assert all(name in str(error.value) for name in FAMILIES if " " not in name) and "Mistral" in str(error.value)


def test_factors_of_another_length_are_refused(tmp_path):
    path = tmp_path / "llama3.gguf"
    make("llama3", path)
    file = read_gguf(path)
    tensors = [(n, t.shape, t.type, file.data(n).tobytes()) for n, t in file.tensors.items() if n != "rope_freqs.weight"]
    write_gguf(tmp_path / "bad.gguf", file.typed_metadata(), [*tensors, ("rope_freqs.weight", (16,), "F32", bytes(64))])
    with pytest.raises(BadFile, match="'rope_freqs.weight' has 16 factors for 32 frequencies"):
        llmlab.load(tmp_path / "bad.gguf")
