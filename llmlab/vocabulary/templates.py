"""Filling in a chat template that came with a file: in a sandbox, in a process of its own, within bounds of time and memory."""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ..errors import LabError
from ..gguf.words import show, show_path
from ..units import MIB
from . import template_worker

SECONDS = 10.0            # a long conversation takes milliseconds
MEMORY = template_worker.MEMORY
LONGEST = 64 * MIB        # characters of a rendered conversation
_LOOK = 0.02              # seconds between two looks at a process that has not answered


def render(template: str, variables: Mapping[str, Any], file: str = "the chat template") -> str:
    """The text that `template` makes of `variables` (plain JSON values). Raises LabError, in one line that names `file`, for a
    template that fails, does not end, takes too much memory or tries to leave its sandbox."""
    task = json.dumps({"template": template, "variables": dict(variables)})
    with _lock:
        answer = _ask(task, file)
    if "error" in answer:
        raise LabError(f"{show_path(file)}: its chat template gave no text: {show(answer['error'], 300)[1:-1]}; "
                       "give plain text instead of messages, or another template")
    if len(answer["text"]) > LONGEST:
        raise LabError(f"{show_path(file)}: its chat template made {len(answer['text'])} characters of this conversation; "
                       "give plain text instead of messages, or another template")
    return answer["text"]


def warm() -> None:
    """Start the process, so that it is there when the first conversation comes; where it cannot be, that one will say so."""
    global _worker
    with _lock, contextlib.suppress(LabError, OSError):
        if _worker is None or not _worker.alive():
            _worker = _Worker()


class _Worker:
    """The process, its pipes, and who started it (a forked child must not talk into its parent's pipes)."""

    def __init__(self):
        if not sys.executable:
            raise LabError("this Python does not know its own program (sys.executable), so no chat template can be filled in; "
                           "give plain text instead of messages")
        # Its own session: Ctrl-C in a terminal stops the answer, not this process. -I: nothing of the current folder is
        # imported.
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(template_worker.__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8", start_new_session=True)
        self.owner = os.getpid()

    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def stop(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                try:
                    pipe.close()
                except OSError:  # what was not read any more
                    pass


_lock = threading.Lock()
_worker: _Worker | None = None


@atexit.register
def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.stop()
        _worker = None


def _ask(task: str, file: str) -> dict:
    """One task and its answer; a process that goes beyond its bounds is ended."""
    global _worker
    if _worker is None or not _worker.alive():
        _worker = _Worker()
    worker, said = _worker, []

    def talk():
        try:
            worker.process.stdin.write(task + "\n")
            worker.process.stdin.flush()
            said.append(worker.process.stdout.readline())
        except (OSError, ValueError):  # it has ended, or was ended
            pass

    reader = threading.Thread(target=talk, daemon=True)
    began = time.monotonic()
    reader.start()
    problem = ""
    try:
        while not problem:
            reader.join(_LOOK)
            if not reader.is_alive():
                break
            if time.monotonic() - began > SECONDS:
                problem = f"it did not end within {SECONDS:g} s"
            elif _resident(worker.process.pid) > MEMORY:
                problem = "it takes more memory than a conversation can need"
    except BaseException:  # the user's Ctrl-C: the next task must not get this one's answer
        _stop()
        raise
    if problem or not said or not said[0].endswith("\n"):
        _stop()
        return {"error": problem or "it ended the process that filled it in"}
    return json.loads(said[0])


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0
