"""A process that may hold so many bytes: watched from outside and killed above them, or in a memory group of the system.

`run` watches VmHWM, the most that was ever resident (mapped pages that were touched among it; page cache that was only read is
nobody's); `group` is a limit that the system keeps, page cache counted. As a program (`python limited.py JOB`) it is the child,
which answers a prompt with a model and says what came and what it held, as its last line.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
EVERY = 0.005            # seconds between two looks


@dataclass(frozen=True)
class Ran:
    """How a process ended: `killed` by whoever watched it, `peak` the most bytes resident that were seen from outside,
    `answer` what its last line said, `words` what it said to stderr."""

    rc: int
    killed: bool
    peak: int
    answer: dict | None
    words: str


def run(job: dict, allowed: int | None = None, inside: "Group | None" = None, patience: float = 300.0) -> Ran:
    """The child with a job, killed as soon as it has held more than `allowed` bytes; in a group where one is given."""
    command = [sys.executable, __file__, json.dumps(job)]
    if inside:                                 # the shell goes into the group and becomes the child
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(inside.procs), *command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH")))),
                                "OMP_NUM_THREADS": str(job["threads"])}
    with tempfile.TemporaryFile() as words, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=words, env=environment)
        peak, killed, end = 0, False, time.monotonic() + patience
        try:
            while child.poll() is None:
                peak = max(peak, status(child.pid).get("VmHWM", 0))
                if (allowed is not None and peak > allowed) or time.monotonic() > end:
                    killed = True
                    break
                time.sleep(EVERY)
        finally:
            child.kill()
            child.wait()
        for file in (words, said):
            file.seek(0)
        lines = said.read().decode("utf-8", "replace").splitlines()
        answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
        return Ran(child.returncode, killed, peak, answer, words.read().decode("utf-8", "replace"))


def status(process: int | str = "self") -> dict[str, int]:
    """{"VmHWM": bytes, "RssAnon": ...} of a process; {} where it is gone."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0]) * 1024
    return found


# ---- memory groups ----------------------------------------------------------------------------------------------------

class NoGroup(Exception):
    """The system lets nobody make one here; the text says why."""


class Group:
    """A memory group (cgroup) of version 1 or 2 that is there."""

    def __init__(self, folder: Path, version: int):
        self._folder, self._version, self.procs = folder, version, folder / "cgroup.procs"

    @property
    def peak(self) -> int:
        """The most bytes it held, page cache among them."""
        return int((self._folder / ("memory.max_usage_in_bytes" if self._version == 1 else "memory.peak")).read_text())

    @property
    def kills(self) -> int:
        """Processes that the system killed because the group was full."""
        lines = (self._folder / ("memory.oom_control" if self._version == 1 else "memory.events")).read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))


@contextlib.contextmanager
def group(allowed: int) -> Iterator[Group]:
    """A memory group of so many bytes, without swap, that is gone afterwards. Raises NoGroup."""
    parent, version = _parent()
    folder = parent / f"llmlab-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoGroup(f"no memory group can be made in {parent} ({error.strerror})") from None
    try:
        try:
            if version == 1:
                (folder / "memory.limit_in_bytes").write_text(str(allowed))
                with contextlib.suppress(OSError):             # where swap is not counted there is no such file
                    (folder / "memory.memsw.limit_in_bytes").write_text(str(allowed))
            else:
                (folder / "memory.max").write_text(str(allowed))
                with contextlib.suppress(OSError):
                    (folder / "memory.swap.max").write_text("0")
            made = Group(folder, version)
            made.peak, made.kills      # noqa: B018 - older systems lack them
        except (OSError, StopIteration) as error:
            raise NoGroup(f"a memory group here takes no limit ({error})") from None
        yield made
    finally:
        for _ in range(200):                   # what was killed takes a moment to be gone
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.01)


def _parent() -> tuple[Path, int]:
    """The folder that memory groups are made in, and their version."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        raise NoGroup("this system has no memory groups") from None
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(folder), 1
    for _, folder, kind, *_ in mounts:
        shared = Path(folder) / "cgroup.subtree_control"
        if kind == "cgroup2" and shared.is_file():
            with contextlib.suppress(OSError):
                shared.write_text("+memory")
            if "memory" in shared.read_text().split():
                return Path(folder), 2
    raise NoGroup("no mounted hierarchy of groups counts memory")


# ---- the child --------------------------------------------------------------------------------------------------------

def answer(job: dict) -> dict:
    """What a model says: `path`, `prompt`, `tokens` to write, `threads`, and `how`: what `llmlab.decoder` is given besides, or
    with a "placement" in it `offload.opening.open_decoder`."""
    import torch

    from llmlab.runtime.generating import Options, stream
    from llmlab.starting import decoder

    torch.set_num_threads(job["threads"])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")          # from here on the peak is the model's
    base = status()
    how = dict(job["how"])
    if "placement" in how:
        from llmlab.gguf import read_gguf
        from llmlab.offload.opening import open_decoder
        from llmlab.offload.placement import Placement
        from llmlab.vocabulary import words_of
        file = read_gguf(job["path"])
        model, words = open_decoder(file, Placement(**how.pop("placement")), **how), words_of(file)
    else:
        model, words = decoder(job["path"], "cpu", **how)
    text = "".join(stream(model, words, job["prompt"], Options(temperature=0, max_tokens=job["tokens"])))
    logits = model.read(model.tokens[-1:])
    held = status()
    trace = getattr(model, "trace", None)      # an ordinary decoder has none
    return {"text": text, "read": len(model.tokens), "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
            "before": base.get("VmRSS"), **{name: held.get(name) for name in ("VmHWM", "RssAnon", "RssFile")},
            "totals": {kind: list(sums) for kind, sums in trace.totals().items()} if trace else None}


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
