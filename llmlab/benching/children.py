"""A process of its own for each that takes part, kept alive and asked in turns through a pipe, a line of JSON each way.

Its memory, its threads and its crashes are then its alone; while another is timed it waits for its next line.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from ..errors import LabError

MARK = "llmlab-bench:"
PATIENCE = 3600.0        # seconds for one answer; compiling takes minutes
_TOP = Path(__file__).resolve().parents[2]


def waiting() -> dict[str, str]:
    """How OpenMP's threads wait for each other, as environment variables: what the user has set; else they spin for some
    microseconds and then sleep. By themselves they spin for milliseconds, which costs an engine on a busy machine nine tenths
    of its speed, and OMP_WAIT_POLICY=PASSIVE costs llama.cpp an eighth on an idle one."""
    own = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    return own or {"GOMP_SPINCOUNT": "1000"}


class Child:
    """One child. Raises LabError, in one line, where it fails or dies; `close` ends it however it stands."""

    def __init__(self, name: str, module: str, threads: int):
        path = os.pathsep.join(filter(None, (str(_TOP), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": str(threads)}
        environment |= waiting()
        self.name = name
        self._words = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._words, env=environment, text=True, encoding="utf-8", errors="replace")

    def ask(self, do: str, **more) -> dict:
        """What the child answers to a command."""
        late: list[bool] = []
        alarm = threading.Timer(PATIENCE, lambda: (late.append(True), self._process.kill()))
        alarm.daemon = True
        alarm.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._process.stdin.flush()
            line = next((line for line in self._process.stdout if line.startswith(MARK)), None)
        except OSError:                        # it had died before
            line = None
        finally:
            alarm.cancel()
        if line is None:
            raise LabError(f"gave no answer in {PATIENCE / 60:.0f} minutes and was stopped" if late else self._ended())
        answer = json.loads(line.removeprefix(MARK))
        if "error" in answer:
            raise LabError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def cpu_seconds(self) -> float:
        """Processor time it has taken so far."""
        import psutil
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def close(self) -> None:
        import psutil
        with contextlib.suppress(psutil.Error):          # a compiler that it started would go on alone
            for started in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    started.kill()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._words):
            try:
                pipe.close()
            except OSError:                    # what was written last never reached it
                pass

    def _ended(self) -> str:
        code = self._process.wait()
        self._words.seek(0)
        said = [line.strip() for line in self._words.read().decode("utf-8", "replace").splitlines() if line.strip()]
        wrong = [line for line in said if re.search("assert|error|fail", line, re.IGNORECASE)]
        how = ("was killed, as the system does when memory runs out" if code == -9 else
               f"stopped (signal {-code})" if code < 0 else f"stopped (exit code {code})")
        return f"{how}; its last words: {(wrong or said or ['none'])[-1][:200]}"
