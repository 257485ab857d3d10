"""llmlab run: a model's answers in the terminal, streamed; from a pipe, one prompt and one answer."""

import contextlib
import gc
import json
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from . import places
from .errors import LabError

_HELP = """\
/clear               begin a new conversation
/save FILE           write the conversation to a new file
/set                 list the sampling options; /set NAME VALUE changes one
/help                this list
/exit                leave; so do Ctrl-D, and Ctrl-C twice
A line that ends with \\ goes on in the next. Ctrl-C stops an answer."""
ENGINES = ("auto", "lean", "transformers")
_COMPARED = "The capital of France is Paris, and that of Italy is Rome."       # what fast mode's deviation is measured on
_KEPT_LINES = 1000       # of what was typed, for the arrow keys of another day
# What would move the cursor or change the terminal is shown as a picture of itself instead.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), 0xFFFD)


def run(a: Namespace) -> int:
    """Answer in the terminal as the options of `llmlab run` say; the exit status. Raises LabError."""
    if a.model is None:
        raise LabError(_nothing_named())
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    text = _one_text(a)
    if text is not None and not text.strip():
        raise LabError("the prompt is empty; give a text with --prompt, --file or a pipe")
    if text is None:
        _say(f"loading {a.model} ...")
    chat, options = _begin(a)
    if not chat.chat:
        _say("plain continuation, as asked" if a.no_chat else
             "this file has no chat template: what you type is continued as it is")
    if text is None:
        return _talk(chat, options)
    return 0 if _answer(chat, text, options) else 130


def _begin(a: Namespace):
    """The conversation that is asked for, its model loaded, and the options."""
    if a.engine not in ENGINES:
        raise LabError(f"--engine is {a.engine[:40]!r}; give one of {', '.join(ENGINES)}")
    with contextlib.nullcontext() if a.compile else _no_collecting():
        file, why = _file(a)
        if file is not None and not a.no_chat and "tokenizer.chat_template" in file.metadata:
            from .vocabulary import templates
            templates.warm()                        # beside the import of torch
        _spin_briefly()
        from .runtime.generating import Options  # torch from here on
        options = Options(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, min_p=a.min_p, seed=a.seed,
                          repeat_penalty=a.repeat_penalty, max_tokens=a.max_tokens, stop=tuple(a.stop), shift=a.shift)
        if a.threads is not None:
            import torch
            if not 1 <= a.threads <= 1024:
                raise LabError(f"--threads is {a.threads}; give a number from 1 up, such as the processor's cores")
            torch.set_num_threads(a.threads)
        return _loaded(a, file, why), options


def _spin_briefly() -> None:
    """GNU OpenMP's threads wait for each other spinning, for milliseconds: on a busy machine they take the core from the very
    thread they wait for, and a token takes ten times as long. Microseconds do as well on an idle one. Read as torch is
    imported; what the user has set stays."""
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _file(a: Namespace):
    """The GGUF that the lean decoder may run, its header read, and ""; or None, and why it is for transformers' modules."""
    from .starting import gguf_of
    if a.engine == "transformers":
        return None, "as asked"
    if a.quant is not None:
        return None, "--quant is for folders"
    try:
        file = gguf_of(a.model)
    except LabError:                                # load says what is wrong with it
        return None, ""
    return file, "" if file is not None else "it is a folder"


def _loaded(a: Namespace, file, why: str):
    """The conversation with the model, by the engine asked for or the one that can; the line that says which is printed."""
    from .runtime.conversing import Conversation
    kv = tuple(a.kv.split(",")) if a.kv and "," in a.kv else a.kv
    if file is not None:
        from .starting import decoder, refusal
        why = refusal(file)
        if not why:
            budget = _budget(a)
            draft = _draft(a, budget)               # before the model takes what there is
            made, words = decoder(file, a.device, a.dtype, a.strategy, a.context, a.compile, _say, kv,
                                  sinks=a.shift or 0 if kv else 0, budget=budget, mode=a.mode)
            chat = Conversation(made, words, a.system, chat=not a.no_chat, draft=draft)
            _say(f"{file.architecture} by the lean decoder, {made.strategy}, {str(made.dtype).removeprefix('torch.')} on "
                 f"{made.device}: {made.why}")
            if getattr(made, "aside", None) is not None:
                _say(str(made.deviation(words(_COMPARED)["input_ids"] if words else [*range(8)])))
            if chat.draft:
                _say(f"tokens are guessed by {chat.draft}")
            return chat
    if a.engine == "lean" and why:
        raise LabError(f"--engine lean cannot be used: {why}; leave it out")
    if a.compile and why:
        raise LabError(f"--compile is for the lean decoder, which is not used ({why}); leave it out")
    if a.shift is not None and why:
        raise LabError(f"--shift is for the lean decoder, which is not used ({why}); leave it out")
    if a.budget is not None and why:
        raise LabError(f"--budget is for the lean decoder, which is not used ({why}); leave it out")
    if (a.mode is not None or a.ram_budget is not None) and why:
        raise LabError(f"--mode and --ram-budget are for the lean decoder, which is not used ({why}); leave them out")
    if a.draft is not None and why:
        raise LabError(f"--draft is for the lean decoder, which is not used ({why}); leave it out")
    from .loading import load
    model, tokenizer = load(a.model, a.device, a.dtype, a.quant, a.strategy, False, kv)
    chat = Conversation(model, tokenizer, a.system, a.context, chat=not a.no_chat)
    if (made := getattr(model, "llmlab", None)) is not None:
        _say(f"{made.architecture} by transformers' modules ({why}), {made.strategy}: {made.why}")
    return chat


def _budget(a: Namespace):
    """What may be held; None where nothing was said."""
    if a.budget is None:
        if a.ram_budget is not None or a.mode is not None:
            raise LabError("--mode and --ram-budget go with a --budget: say how much may be held on the device")
        return None
    from .offload.budget import Budget
    return Budget(a.budget, a.ram_budget)


def _draft(a: Namespace, budget):
    """What guesses tokens: a small model's decoder and its words, where --draft is no word of `generating.stream`'s; a budget
    then has what it holds set aside."""
    if a.draft in (None, "lookup"):
        return a.draft
    from .starting import decoder
    made = decoder(a.draft, a.device, a.dtype, a.strategy, None, a.compile, _say)
    if budget is not None:
        from .offload.choosing import take_draft
        take_draft(budget, made[0], a.context)
    return made


@contextlib.contextmanager
def _no_collecting() -> Iterator[None]:
    """Garbage is not looked for while a hundred thousand objects come that stay: a tenth of the time imports take."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _nothing_named() -> str:
    from .stores import local_models
    names = list(dict.fromkeys(model.name for model in local_models() if model.kind != "projector"))
    here = f"on this computer: {', '.join(names[:6])}{', ...' * (len(names) > 6)}" if names else "none is on this computer yet"
    return f"name a model to run, a GGUF file or a folder; {here}; llmlab fetch smollm2-135m gets a small one"


def _one_text(a: Namespace) -> str | None:
    """The one prompt there is: of --prompt, of --file, of a pipe; None where somebody sits at the keyboard."""
    if a.prompt is not None and a.file is None:
        return a.prompt
    if a.file not in (None, "-"):
        try:
            found = Path(a.file).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise LabError(f"--file {a.file[:120]} cannot be read ({error.strerror}); check the path") from None
    elif a.file is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    else:
        found = sys.stdin.read() if sys.stdin is not None else ""
    found = found.removesuffix("\n")
    return found if a.prompt is None else f"{a.prompt}\n\n{found}"


# ---- answering ------------------------------------------------------------------------------------------


def _answer(chat, text: str, options) -> bool:
    """Print one answer as it comes, then its figures on stderr; False where it was stopped."""
    out, clean, piece = sys.stdout, sys.stdout.isatty(), ""
    with _Stopping() as stopping:
        try:
            for piece in chat.answer(text, options, stopping):
                out.write(piece.translate(_SHOWN) if clean else piece)
                out.flush()
        except KeyboardInterrupt:        # the second Ctrl-C does not wait for a token
            stopping.asked = True
        if not piece.endswith("\n"):
            out.write("\n")
            out.flush()
    if chat.stats is not None:
        _say(f"[{chat.stats}]")
    return not stopping.asked


class _Stopping:
    """While an answer comes: Ctrl-C asks it to stop after the present token, a second one breaks off at once."""

    def __init__(self):
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> "_Stopping":
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _hear(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- talking --------------------------------------------------------------------------------------------


def _talk(chat, options) -> int:
    """Question and answer until Ctrl-D, /exit, or Ctrl-C twice."""
    _say("/help lists what else there is; Ctrl-C stops an answer, Ctrl-D leaves")
    leaving = False
    with _history():
        while True:
            try:
                text = _typed()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                if leaving:
                    return 0
                leaving = True
                _say("Ctrl-C again leaves, and so does Ctrl-D")
                continue
            leaving = False
            command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text.strip(), re.DOTALL)
            try:
                if command and command[1] in ("exit", "quit", "bye"):
                    return 0
                if command:
                    options = _command(chat, options, command[1], (command[2] or "").strip())
                elif text.strip() or not chat.chat and chat.text:
                    _answer(chat, text, options)
            except LabError as error:
                _say(f"llmlab: {error}")


def _typed() -> str:
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


def _command(chat, options, name: str, rest: str):
    """Do what a line such as /clear says; the options from then on."""
    if name == "help":
        _say(_HELP)
    elif name == "clear":
        chat.clear()
        _say("a new conversation")
    elif name == "save":
        _save(chat, rest)
    elif name == "set":
        options = _set(options, rest)
        _say("  ".join(f"{field.name}={getattr(options, field.name)}" for field in fields(options)))
    else:
        raise LabError(f"/{name[:40]} is no command; /help lists them")
    return options


def _save(chat, name: str) -> None:
    content = chat.saved()
    if not name or not chat.messages:
        raise LabError("nothing was said yet" if name else "/save needs a file's name, such as /save talk.json")
    try:
        with open(Path(name).expanduser(), "x", encoding="utf-8", errors="replace") as file:
            file.write(content)
    except FileExistsError:
        raise LabError(f"{name[:120]} is there already; give another name") from None
    except OSError as error:
        raise LabError(f"{name[:120]} cannot be written ({error.strerror}); give a place you can write to") from None
    _say(f"saved as {name}")


def _set(options, words: str):
    """Options with one of them changed: "temperature 0.2", "seed none", "stop END"."""
    name, _, value = words.partition(" ")
    names = [field.name for field in fields(options)]
    name = name.replace("-", "_")
    if not words:
        return options
    if name not in names:
        raise LabError(f"{name[:40]!r} is no option; there are {', '.join(names)}")
    value = value.strip()
    if name == "stop":
        return replace(options, stop=(value,) if value else ())
    try:
        return replace(options, **{name: None if value == "none" else json.loads(value)})
    except json.JSONDecodeError:
        return replace(options, **{name: value})


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """What was typed before, under the arrow keys, where Python has readline; kept in llmlab's cache, for this user only."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = places.cache() / "typed"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_KEPT_LINES)
    readline.set_auto_history(True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)
