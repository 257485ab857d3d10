"""llmlab run: prompts from arguments, files and pipes, and a real terminal in which Ctrl-C is pressed."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tiny_chat

from llmlab import cli, loading

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Run `llmlab run FILE ...` over a model that says `answers`: (status, out, err); `said.asked` is what it read last."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))

    def run(*argv, answers=("Fine.<|im_end|>",), template=tiny_chat.TEMPLATE, stdin=None):
        tokenizer = tiny_chat.tokenizer(template)
        model, texts = tiny_chat.Scripted(tokenizer, *answers), []
        model.register_forward_pre_hook(lambda _, args, named: texts.append(tokenizer.decode(named["input_ids"][0])),
                                        with_kwargs=True)
        monkeypatch.setattr(loading, "load", lambda path, *choices: (model, tokenizer))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        status = cli.main(["run", "model.gguf", *argv])
        run.asked = texts[0] if texts else None
        return status, *capsys.readouterr()
    return run


def test_one_prompt(said):
    status, out, err = said("--prompt", "How are you?", "--system", "Be brief.")
    assert (status, out) == (0, "Fine.\n") and "5 new tokens" in err and "end of turn [measured]" in err
    assert said.asked == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
                          "<|im_start|>assistant\n")


def test_a_pipe_is_one_prompt(said):
    status, out, _ = said(stdin="Wie geht’s?\n".encode())
    assert (status, out) == (0, "Fine.\n") and "user\nWie geht’s?<|im_end|>" in said.asked
    assert said(stdin=b"caf\xe9")[0] == 0 and "user\ncaf\ufffd<|im_end|>" in said.asked


def test_a_file_follows_the_prompt(said, tmp_path):
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    assert said("-p", "Sum up:", "--file", str(tmp_path / "notes.txt"))[0] == 0
    assert "user\nSum up:\n\none\ntwo<|im_end|>" in said.asked
    assert said("-p", "Sum up:", "-f", "-", stdin=b"three\n")[0] == 0 and "Sum up:\n\nthree<|im_end|>" in said.asked


def test_sampling_options_arrive(said):
    assert said("-p", "x", "--temp", "0", "-n", "3", answers=["for ever "])[1] == "for\n"
    assert said("-p", "x", "--stop", "END", "--stop", "ever", answers=["for ever "])[1] == "for \n"
    _, out, err = said("-p", "x" * 30, "-c", "100", answers=["for ever "])
    assert "context full" in err and len(out) < 60
    before = __import__("torch").get_num_threads()
    try:
        assert said("-p", "x", "-t", "1")[0] == 0 and __import__("torch").get_num_threads() == 1
    finally:
        __import__("torch").set_num_threads(before)


def test_the_first_line_says_by_which_engine(tmp_path, capsys):
    """And both engines draw the same words."""
    file = str(tiny_chat.write(tmp_path / "tiny.gguf"))

    def run(*argv):
        assert cli.main(["run", file, "-p", "How are you?", "-s", "1", "-n", "20", "--dtype", "float32", *argv]) == 0
        return capsys.readouterr()
    out, err = run()
    assert out.strip() and err.startswith("llama by the lean decoder, ")
    again = run("--engine", "lean")
    other = run("--engine", "transformers")
    assert out == again.out == other.out and other.err.startswith("llama by transformers' modules (as asked), ")
    exact, little = run("--strategy", "compact"), run("--budget", "40MiB", "-c", "512")
    assert little.out == exact.out and "llama by the lean decoder, compact" in little.err and " pieces " in little.err
    fast = run("--budget", "1.6MiB", "--ram-budget", "64MiB", "--mode", "fast", "-c", "512", "--device", "cpu")
    assert fast.out == exact.out and "fast mode: RAM layers computed where they lie; the same arithmetic" in fast.err
    drafted = run("--budget", "60MiB", "-c", "256", "--draft", file, "--device", "cpu")
    assert drafted.out == exact.out and "tokens are guessed by a draft" in drafted.err


@pytest.mark.parametrize(("argv", "says"), [
    (["FOLDER", "--engine", "lean"], "--engine lean cannot be used: it is a folder"),
    (["MAMBA"], "is a 'mamba' model, which llmlab does not run"),
    (["MAMBA", "--engine", "lean"], "--engine lean cannot be used: "), (["TINY", "--engine", "vllm"], "--engine is 'vllm'"),
    (["TINY", "--engine", "lean", "--quant", "nf4"], "--engine lean cannot be used: --quant is for folders"),
    (["TINY", "--engine", "transformers", "--compile"], "--compile is for the lean decoder, which is not used (as asked)"),
    (["TINY", "--engine", "transformers", "--budget", "1GiB"], "--budget is for the lean decoder, which is not used"),
    (["TINY", "--budget", "1MiB"], "the budget has 1.00 MiB; the least for a context of 512 is "),
    (["TINY", "--mode", "fast"], "--mode and --ram-budget go with a --budget"),
    (["TINY", "--budget", "1GiB", "--mode", "quick"], "the placement's mode is 'quick'; give one of exact, fast"),
    (["TINY", "--engine", "transformers", "--mode", "fast"], "--mode and --ram-budget are for the lean decoder, which is not"),
    (["TINY", "--budget", "100KiB", "--draft", "TINY"], "the draft would take "),
    (["TINY", "--budget", "some"], "'some' is not a size"), (["TINY", "--budget", "1GiB", "-c", "513"], "was trained with 512"),
    (["TINY", "--budget", "1GiB", "--strategy", "fast"], "weights are held as 'compact' has them"),
    (["TINY", "--quant", "nf4"], "is for safetensors folders"), (["TINY", "--dtype", "int3"], "dtype 'int3' is not one of"),
    (["TINY", "--strategy", "x"], "strategy"), (["TINY", "--device", "x"], "device 'x' cannot be used here"),
    (["TINY", "-c", "513"], "was trained with 512"), (["no-such", "--engine", "lean"], "'no-such' is no file and no model"),
    (["TEXT"], "TEXT"), (["TEXT", "--engine", "lean"], "TEXT"), (["BARE"], "has no vocabulary")])
def test_a_file_that_cannot_be_run_is_one_line(argv, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "TEXT").write_text("no model")
    tiny_chat.write(tmp_path / "TINY")
    tiny_chat.write(tmp_path / "MAMBA", **{"general.architecture": "mamba"})
    tiny_chat.write(tmp_path / "BARE", **{"tokenizer.ggml.tokens": None, "tokenizer.ggml.merges": None})
    assert cli.main(["run", *argv, "-p", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llmlab: ") and says in err and err.count("\n") == 1


def test_threads_spin_briefly_unless_the_user_says_how(monkeypatch):
    from llmlab.terminal import _spin_briefly

    def set_to(**environment):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _spin_briefly()
        return os.environ.get("GOMP_SPINCOUNT")
    assert set_to() is None, "torch is imported: it would not be read"
    monkeypatch.delitem(sys.modules, "torch")
    assert set_to() == "1000" and set_to(OMP_WAIT_POLICY="ACTIVE") is None and set_to(GOMP_SPINCOUNT="7") == "7"


def test_without_a_template_the_text_is_continued(said):
    status, out, err = said("-p", "Once upon", template=None, answers=[" a time<|im_end|>"])
    assert (status, out, said.asked) == (0, " a time\n", "Once upon") and "no chat template" in err
    _, _, err = said("-p", "Once upon", "--no-chat")
    assert said.asked == "Once upon" and "as asked" in err


@pytest.mark.parametrize(("argv", "says"), [
    (["--temp", "-1"], "temperature is -1.0; give"), (["--top-p", "7"], "top_p is 7.0"), (["--top-k", "x"], "--top-k"),
    (["-t", "0"], "--threads is 0"), (["-c", "100k"], "was trained with 512"), (["-c", "many"], "context is 'many'"),
    (["--file", "/no/such"], "/no/such cannot be read"), (["--no-chat", "--system", "x"], "needs a chat template"),
    (["-p", ""], "the prompt is empty"), (["--file", "-"], "the prompt is empty"),
    (["-p", "x" * 600], "the prompt is "), (["--stop", ""], "stop is ('',)"),
    (["--colour"], "no option of run")])
def test_what_cannot_be_used_is_one_line(said, argv, says):
    argv = argv if "-p" in argv or argv[0] == "--file" else ["-p", "x", *argv]
    status, out, err = said(*argv)
    last = err.splitlines()[-1]
    assert (status, out) == (2, "") and last.startswith("llmlab: ") and says in last


def test_no_file_names_what_there_is(monkeypatch, capsys, tmp_path):
    from llmlab import stores
    one = stores.LocalModel("tiny-model", tmp_path, 1, "llmlab")
    monkeypatch.setattr(stores, "local_models", lambda: [one])
    assert cli.main(["run"]) == 2 and "on this computer: tiny-model; " in capsys.readouterr().err
    monkeypatch.setattr(stores, "local_models", list)
    assert cli.main(["run"]) == 2 and "llmlab fetch smollm2-135m" in capsys.readouterr().err


# ---- in a process of its own, in a terminal -------------------------------------------------------------

CHILD = """
import fcntl, sys, termios
sys.path.insert(0, {tests!r})
if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)       # Ctrl-C in this terminal is for this process
import tiny_chat
from llmlab import loading
from llmlab.cli import main
tokenizer = tiny_chat.tokenizer()
for argv, answers in {runs!r}:
    loading.load = lambda path, *choices: (tiny_chat.Scripted(tokenizer, *answers, context=100_000), tokenizer)
    status = main(["run", "model.gguf", *argv])
    print("status", status)
"""
ENDLESS = "for ever "


class Terminal:
    """A terminal with `llmlab run` in it: type, and wait until something is on the screen."""

    def __init__(self, tmp_path, *runs):
        self._mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(tests=str(TESTS), runs=runs)], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, cwd=tmp_path, env=_environment(tmp_path))
        os.close(theirs)
        self.screen, self._seen = "", 0

    def type(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def until(self, text: str) -> str:
        """Wait for `text` after what was waited for before; what came up to and with it."""
        while text not in self.screen[self._seen:]:
            ready, _, _ = select.select([self._mine], [], [], 60)
            try:
                came = os.read(self._mine, 65536) if ready else b""
            except OSError:              # the other end is closed
                came = b""
            assert came, f"no {text!r} in {self.screen[self._seen:]!r}"
            self.screen += came.decode("utf-8", "replace").replace("\r\n", "\n")
        end = self.screen.index(text, self._seen) + len(text)
        found, self._seen = self.screen[self._seen:end], end
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._mine)


def _environment(tmp_path) -> dict:
    return os.environ | {"LLMLAB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(TESTS.parent), "TERM": "dumb",
                         "INPUTRC": os.devnull, "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def open(*runs):
        opened.append(Terminal(tmp_path, *runs))
        return opened[-1]
    yield open
    for one in opened:
        one.close()


def test_a_seat_at_the_keyboard(terminal, tmp_path):
    """One process, one terminal, one after the other: each import of transformers takes seconds."""
    seat = terminal(([], [ENDLESS, "Yes.\x1b[2J<|im_end|>", "Again.<|im_end|>"]), (["--no-chat"], ["Fine.<|im_end|>"]),
                    (["--prompt", "Talk"], [ENDLESS]))
    ctrl_c_stops_the_answer_and_not_the_program(seat)
    commands(seat, tmp_path)
    ctrl_c_twice_leaves(seat, tmp_path)
    lines_go_on_and_ctrl_d_leaves(seat)
    ctrl_c_ends_one_prompt(seat)


def ctrl_c_stops_the_answer_and_not_the_program(seat):
    seat.until("> ")
    seat.type("Talk\n")
    seat.until("for ever for")
    seat.type("\x03")
    assert "stopped [measured]" in seat.until("[measured]")
    seat.until("> ")
    seat.type("Really?\n")
    answer = seat.until("[measured]")
    assert "Yes.␛[2J\n" in answer and "\x1b[2J" not in answer, "a model cannot clear the screen"
    assert "from memory" in answer and "end of turn" in answer
    seat.until("> ")


def commands(seat, tmp_path):
    seat.type("/save talk.json\n")
    seat.until("saved as talk.json\n> ")
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2 and talk[1]["content"].startswith("for ever for")
    for typed, says in (("/save talk.json", "is there already"), ("/nothing", "no command"), ("/set heat 1", "no option"),
                        ("/set temperature hot", "give a number"), ("/set max-tokens 2", "max_tokens=2"),
                        ("/help", "/clear"), ("/clear", "a new conversation"), ("x" * 5, "Ag\n[")):
        seat.type(f"{typed}\n")
        seat.until(says)
        seat.until("> ")


def ctrl_c_twice_leaves(seat, tmp_path):
    time.sleep(0.3)                  # readline listens a moment after it has shown its prompt
    seat.type("\x03")
    seat.until("Ctrl-C again leaves")
    seat.until("> ")
    time.sleep(0.3)
    seat.type("\x03")
    seat.until("status 0\n")
    assert "Really?" in (tmp_path / "cache" / "typed").read_text()
    assert (tmp_path / "cache" / "typed").stat().st_mode & 0o077 == 0


def lines_go_on_and_ctrl_d_leaves(seat):
    assert "plain continuation" in seat.until("> ")
    seat.type("one \\\n")
    seat.until(". ")
    seat.type("two\n")
    assert "\n[8 prompt tokens" in seat.until("[measured]")
    seat.until("> ")
    seat.type("\n")
    assert "Fine.\n[13 prompt tokens, 12 of them from memory" in seat.until("[measured]")
    seat.until("> ")
    seat.type("\x04")
    seat.until("status 0\n")


def ctrl_c_ends_one_prompt(seat):
    seat.until("for ever for")
    seat.type("\x03")
    assert "stopped [measured]" in seat.until("status 130\n")


def test_a_broken_pipe_is_quiet(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(tests=str(TESTS), runs=[(["-p", "Talk"], [ENDLESS])])],
                             env=_environment(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.read(5)
    child.stdout.close()
    assert child.wait(60) == 0 and child.stderr.read() == b""
    child.stderr.close()


def test_a_real_model_answers(capsys):
    """Nothing stands in for anything here: the file, its template, its weights packed."""
    import llmlab
    path = llmlab.fetch("smollm2-135m", progress=False)
    assert cli.main(["run", str(path), "-p", "What is the capital of France?", "--temp", "0", "-n", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == "The capital of France is Paris.\n" and "7 new tokens" in err and "end of turn" in err


def test_what_a_shell_could_not_decode_is_saved(tmp_path):
    from llmlab import terminal
    chat = types.SimpleNamespace(messages=[{}], saved=lambda: os.fsdecode(b"caf\xe9"))
    terminal._save(chat, str(tmp_path / "talk.json"))
    assert (tmp_path / "talk.json").read_text() == "caf?"
