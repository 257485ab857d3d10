"""A tiny model of random weights, a tokenizer of 256 bytes with a chat template, both as a GGUF file, and a model that says
what it is told."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmlab.gguf import write_gguf

CONTEXT = 512
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Each byte is a token, as in byte-level BPE without merges: an emoji takes four."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>",
                                   additional_special_tokens=["<|im_start|>", "<|tool|>"])
    made.chat_template = template
    return made


def _config(context: int = CONTEXT) -> LlamaConfig:
    return LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=context, bos_token_id=None, eos_token_id=256)


def model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers. Its weights are large enough that the logits of different prompts differ."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(_config()).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.2)
    return made


def write(path: Path, seed: int = 0, template: str | None = TEMPLATE, **changes) -> Path:
    """`model(seed)` and the tokenizer as a GGUF in float32; `changes` to its metadata, None to leave a key out."""
    made, config = model(seed), _config()
    normal, control = 1, 3
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>", "<|im_start|>", "<|tool|>"]
    metadata = {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": 2, "llama.embedding_length": 32,
        "llama.feed_forward_length": 48, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.context_length": CONTEXT,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ("array:string", tokens),
        "tokenizer.ggml.token_type": ("array:int32", [normal] * 256 + [control] * 3),
        "tokenizer.ggml.merges": ("array:string", []), "tokenizer.ggml.eos_token_id": ("uint32", 256),
        "tokenizer.chat_template": template} | changes
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = []
    for name, weight in made.state_dict().items():
        stem = name.removesuffix(".weight")
        _, _, layer, rest = stem.split(".", 3) if stem.startswith("model.layers.") else ("", "", "", "")
        new = f"blk.{layer}.{names[rest]}" if rest else names[stem]
        if new.endswith(("attn_q", "attn_k")):           # a Llama's GGUF has what turns together side by side
            weight = weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
        tensors.append((f"{new}.weight", weight.shape[::-1], "F32", weight.contiguous().numpy().tobytes()))
    write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, tensors)
    return path


class Scripted(LlamaForCausalLM):
    """Reads as a Llama does, and whatever it reads, its likeliest next tokens spell the next of `answers`, for ever the
    last of them. An answer begins where more than one token is read; `read` is how many tokens each call got."""

    def __init__(self, tokenizer, *answers: str, context: int = CONTEXT):
        super().__init__(_config(context))
        self.eval()
        self.answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        self.read, self._turn, self._at = [], -1, 0

    def forward(self, input_ids=None, logits_to_keep=0, **more):
        found = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **more)
        self.read.append(input_ids.shape[-1])
        if input_ids.shape[-1] > 1:
            self._turn, self._at = min(self._turn + 1, len(self.answers) - 1), 0
        answer = self.answers[self._turn]
        found.logits = torch.full_like(found.logits, -20.0)
        found.logits[..., answer[self._at % len(answer)]] = 20.0
        self._at += 1
        return found
