"""A safetensors folder converted on the way: the logits and the tokens are those of transformers; what cannot be converted says
so in one line."""

import json
import shutil
import unicodedata

import checkpoints
import numpy as np
import pytest
import torch
import vocabularies
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

import llmlab
from llmlab.converting import Checkpoint
from llmlab.converting.cutting import cut_named
from llmlab.errors import BadConfig, BadFile, LabError
from llmlab.gguf import read_gguf
from llmlab.vocabulary import tokenizer_of

FAMILIES = ("llama", "llama3", "llama-biased", "llama-yarn", "mistral", "mixtral", "qwen2", "qwen3", "qwen2moe", "gemma",
            "gemma2", "gemma3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder and its model by name, each saved once; tests that change one copy it."""
    known = {}

    def make(name, tokenizer=None, **changes):
        key = name, tokenizer, tuple(changes)
        if key not in known:
            path = tmp_path_factory.mktemp("checkpoint") / name
            words = checkpoints.sentencepiece_model(vocabularies.spm()) if tokenizer == "spm" else checkpoints.byte_level()
            known[key] = path, checkpoints.folder(path, name, words, **changes)
        return known[key]

    return make


@pytest.fixture
def folder(made, tmp_path):
    """A copy of a small Llama's folder, to be spoilt."""
    return shutil.copytree(made("llama")[0], tmp_path / "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(made, tmp_path, name):
    path, reference = made(name)
    target = tmp_path / "model.gguf"
    plan = llmlab.quantize_gguf(path, target, "F32")
    assert plan.file_bytes == target.stat().st_size
    model, _ = llmlab.load(target, dtype="float32")
    ids = torch.randint(5, reference.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = reference(ids).logits, model(ids).logits
    assert torch.allclose(found, expected, atol=2e-4 * expected.abs().max()), (found - expected).abs().max()


def test_gemma_has_llamas_names_and_norms_with_one_added(made, tmp_path):
    path, reference = made("gemma")
    llmlab.quantize_gguf(path, tmp_path / "model.gguf", "F32")
    file, state = read_gguf(tmp_path / "model.gguf"), reference.state_dict()
    def values(name):
        return file.data(name).view(np.float32)
    assert file.architecture == "gemma" and "output.weight" not in file.tensors
    assert np.array_equal(values("blk.1.ffn_norm.weight"), state["model.layers.1.post_attention_layernorm.weight"].numpy() + 1)
    assert np.array_equal(values("blk.0.attn_q.weight"), state["model.layers.0.self_attn.q_proj.weight"].numpy().ravel())
    assert file.metadata["gemma.attention.key_length"] == 64 and "gemma.rope.freq_base" not in file.metadata


def test_a_folder_gives_what_its_gguf_gives(made, tmp_path):
    path, _ = made("llama", dtype=torch.bfloat16)
    llmlab.quantize_gguf(path, tmp_path / "bf16.gguf", "BF16")
    llmlab.quantize_gguf(tmp_path / "bf16.gguf", tmp_path / "two.gguf", "Q4_0")
    llmlab.quantize_gguf(path, tmp_path / "one.gguf", "Q4_0")
    one, two = read_gguf(tmp_path / "one.gguf"), read_gguf(tmp_path / "two.gguf")
    assert {t.type for t in read_gguf(tmp_path / "bf16.gguf").tensors.values()} == {"F32", "BF16"}
    assert list(one.tensors) == list(two.tensors) and "Q4_0" in {t.type for t in one.tensors.values()}
    assert all(np.array_equal(one.data(name), two.data(name)) for name in one.tensors)
    assert one.metadata == two.metadata


def test_files_in_parts_and_other_prefixes_give_the_same(made, tmp_path):
    whole, _ = made("gemma3", shard="5GB")
    llmlab.quantize_gguf(whole, tmp_path / "whole.gguf", "F16")
    parts = shutil.copytree(whole, tmp_path / "model")
    every = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    named = {f"language_model.{name}": tensor for name, tensor in every.items()} | {
        "vision_tower.patch.weight": torch.zeros(2, 2), "multi_modal_projector.norm.weight": torch.zeros(2)}
    names, index = sorted(named), {}
    for number, share in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: named[name] for name in share}, parts / file)
        index |= dict.fromkeys(share, file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    llmlab.quantize_gguf(parts, tmp_path / "parts.gguf", "F16")
    one, two = read_gguf(tmp_path / "whole.gguf"), read_gguf(tmp_path / "parts.gguf")
    assert all(np.array_equal(one.data(name), two.data(name)) for name in one.tensors)
    (parts / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadFile, match="model-00002-of-00002.safetensors is missing"):
        Checkpoint(parts)


def test_experts_in_one_parameter_are_taken_apart(made, tmp_path):
    path, model = made("mixtral")
    llmlab.quantize_gguf(path, tmp_path / "single.gguf", "F16")
    stacked = shutil.copytree(path, tmp_path / "model")
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, stacked / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(stacked / "model.safetensors")
    llmlab.quantize_gguf(stacked, tmp_path / "stacked.gguf", "F16")
    one, two = read_gguf(tmp_path / "single.gguf"), read_gguf(tmp_path / "stacked.gguf")
    assert all(np.array_equal(one.data(name), two.data(name)) for name in one.tensors)


# ---- vocabularies ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", checkpoints.CUTS)
def test_the_name_of_a_cut_is_found_by_what_it_does(tmp_path, cut):
    checkpoints.byte_level(cut, 300).save(str(tmp_path / "tokenizer.json"))
    assert cut_named(tmp_path / "tokenizer.json", {"ignore_merges": checkpoints.CUTS[cut][2]}) == cut


def test_a_cut_that_has_no_name_is_an_error(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LabError, match="no name of tokenizer.ggml.pre means"):
        cut_named(tmp_path / "tokenizer.json", {})


@pytest.mark.parametrize("kind", [*checkpoints.CUTS, "spm", "spm without space"])
def test_tokens_are_those_of_the_tokenizer(made, tmp_path, kind):
    """The folder of any model with another tokenizer in it."""
    if kind in checkpoints.CUTS:
        tokenizer = checkpoints.byte_level(kind)
        if kind == "llama-bpe":
            checkpoints.begins(tokenizer, "<|endoftext|>")
    else:
        tokenizer = checkpoints.of_sentencepiece(kind == "spm")
    name = "gemma2" if kind == "spm without space" else "llama"
    path = tmp_path / "model"
    checkpoints.folder(path, name, tokenizer, num_hidden_layers=1)
    llmlab.quantize_gguf(path, tmp_path / "model.gguf", "Q8_0")
    found = tokenizer_of(read_gguf(tmp_path / "model.gguf"))
    for text in (*vocabularies.TEXTS, *vocabularies.SAMPLE.splitlines()):
        # llama.cpp composes no letters as Qwen's tokenizer does, nor knows which of those beyond ASCII are capitals.
        known = text.isascii() if kind == "tekken" else kind != "qwen2" or unicodedata.is_normalized("NFC", text)
        if known and not any(word in text for word in ("<|", "<tool", "<unk>", "<s>")):
            assert found(text)["input_ids"] == tokenizer.encode(text).ids, text
    said = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_tokenizer_that_does_more_than_a_gguf_can_say_is_refused(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(LabError, match=r"tokenizer.json makes other tokens of 'I'm sure.* than a GGUF"):
        Checkpoint(folder)


def test_special_tokens_are_found_in_a_text(made, tmp_path):
    path, _ = made("llama")
    llmlab.quantize_gguf(path, tmp_path / "model.gguf", "Q8_0")
    file = read_gguf(tmp_path / "model.gguf")
    found, tokenizer = tokenizer_of(file), Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "<|im_start|>user\nhello <tool_call>x<|im_end|>"
    assert found(text)["input_ids"] == tokenizer.encode(text).ids
    kinds = dict(zip(file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_end|>"], kinds["<tool_call>"], kinds["the"]) == (3, 4, 1)
    assert file.metadata["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False


def test_a_sentencepiece_model_is_read_piece_by_piece(made, tmp_path):
    path, _ = made("mistral", "spm")
    llmlab.quantize_gguf(path, tmp_path / "model.gguf", "Q8_0")
    found, given = read_gguf(tmp_path / "model.gguf").metadata, vocabularies.spm()
    kinds = list(given["tokenizer.ggml.token_type"][1])
    assert list(found["tokenizer.ggml.tokens"]) == given["tokenizer.ggml.tokens"][1]
    assert np.allclose(found["tokenizer.ggml.scores"][3:], given["tokenizer.ggml.scores"][1][3:])
    # What the pieces call user-defined is known by the tokenizer's settings alone; <unk> is special by them.
    assert list(found["tokenizer.ggml.token_type"]) == [3] + [1 if kind == 4 else kind for kind in kinds[1:]]
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.model"] == "llama"


def test_rows_without_tokens_get_names(made, tmp_path):
    path = tmp_path / "model"
    checkpoints.folder(path, "llama", checkpoints.byte_level(), vocab_size=700, num_hidden_layers=1)
    tokens = Checkpoint(path).file.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 700 and tokens[-1] == "[PAD699]" and len(set(tokens)) == 700


def test_settings_licence_and_named_templates_come_along(folder):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.9}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("---\nlicense: mit\nlicense_link: 'https://a.org/b'\ntags: [x]\n---\nlicense: no\n")
    found = Checkpoint(folder).metadata
    assert (found["general.license"], found["general.license.link"]) == ("mit", "https://a.org/b")
    assert found["general.sampling.temp"] == ("float32", 0.6) and found["general.sampling.top_k"] == ("int32", 20)
    assert found["tokenizer.chat_template.tool_use"] == "{{ messages }}"
    assert found["tokenizer.chat_template"] == checkpoints.TEMPLATE
    assert found["tokenizer.chat_templates"] == ("array:string", ["tool_use"])


# ---- bad input ------------------------------------------------------------------------------------------------

def _change(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _tensors(folder, change):
    every = load_file(folder / "model.safetensors")
    change(every)
    save_file(every, folder / "model.safetensors")


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda f: _change(f, model_type="rwkv"), "is a 'rwkv' model|transformers cannot read it"),
    (lambda f: _change(f, model_type="phi3"), "is a 'phi3' model, and llmlab converts llama, mistral"),
    (lambda f: _change(f, intermediate_size=768), r"down_proj.weight' is \[256, 512\], and config.json says \[256, 768\]"),
    (lambda f: _change(f, num_hidden_layers=3), "lacks the tensor 'model.layers.2"),
    (lambda f: _change(f, num_hidden_layers=1), "has the tensor 'model.layers.1.*for which a GGUF of this model has no place"),
    (lambda f: _change(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "by 'dynamic'"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "no safetensors file or is cut short"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has no safetensors"),
    (lambda f: (f / "tokenizer.json").unlink(), "has neither a tokenizer.json nor a tokenizer.model"),
    (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}'), "a vocabulary of the kind 'WordPiece'"),
    (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": []}}'), "has no vocabulary"),
    (lambda f: (f / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff"), "is no SentencePiece model or is cut short"),
    (lambda f: (f / "tokenizer.model").write_bytes(b"\x12\x02\x18\x01\x0a\x03\x0a\x01a"), "is a unigram vocabulary"),
    (lambda f: _change(f, vocab_size=100), "of another model|token .* is number"),
    (lambda f: _tensors(f, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(512, 256, dtype=torch.int8)})),
     "up_proj.weight' is I8: this checkpoint is quantized already"),
    (lambda f: _tensors(f, lambda t: t.pop("lm_head.weight")), "lacks the tensor 'lm_head.weight'"),
    (lambda f: _tensors(f, lambda t: t["model.layers.1.self_attn.v_proj.weight"].view(-1)[700].fill_(float("nan"))),
     r"tensor blk.1.attn_v.weight has nan in row 2, column 188"),
])
def test_what_cannot_be_converted_says_so(folder, tmp_path, spoil, says):
    spoil(folder)
    with pytest.raises(LabError, match=says) as error:
        llmlab.quantize_gguf(folder, tmp_path / "out.gguf", "Q8_0")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_numbers_too_large_for_the_type_that_was_asked(folder, tmp_path):
    _tensors(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[9].fill_(1e6))
    with pytest.raises(LabError, match=r"tensor blk.1.ffn_up.weight: F16: weight 9 of row 0 is 1e\+06"):
        llmlab.quantize_gguf(folder, tmp_path / "out.gguf", "F16")


def test_gemma_with_another_rope_is_refused(made, tmp_path):
    path = shutil.copytree(made("gemma")[0], tmp_path / "model")
    _change(path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(BadConfig, match="turns positions otherwise"):
        Checkpoint(path)
