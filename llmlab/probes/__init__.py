"""One run of an engine in a fresh interpreter, so that a crash is an error line and peaks are its own.

A job goes in as JSON on stdin, what was measured comes back as the last line of stdout. Each module's `run(job)` is one engine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from ..errors import LabError

_MARK = "llmlab-probe:"
_TOP = Path(__file__).resolve().parents[2]


def ask(engine: str, job: dict, timeout: float | None = None) -> dict:
    """What `llmlab.probes.<engine>.run(job)` returns, run in another process, and "others": the load before it.

    Raises LabError with the engine's own last words where it fails, crashes or takes longer than `timeout` seconds.
    """
    path = os.pathsep.join(filter(None, (str(_TOP), os.environ.get("PYTHONPATH"))))
    # CUDA numbers cards by speed unless told; nvidia-smi, and so llmlab.machine(), numbers them by slot
    environment = os.environ | {"PYTHONPATH": path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONIOENCODING": "utf-8"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    try:
        done = subprocess.run([sys.executable, "-m", f"llmlab.probes.{engine}"], input=json.dumps(job), text=True,
                              capture_output=True, errors="replace", encoding="utf-8", env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise LabError(f"the run took longer than {timeout:g} s and was stopped; give measured() a longer timeout, "
                       "or a report with a shorter context") from None
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    if line is None:
        raise LabError(f"the engine stopped ({_ended(done.returncode)}) before it could be measured; its last words: "
                       f"{_last_words(done.stderr) or 'none'}")
    answer = json.loads(line.removeprefix(_MARK))
    if "error" in answer:
        raise LabError(answer["error"])
    return answer | {"others": load}


def _ended(code: int) -> str:
    if code == -9:
        return "killed, as the system does when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def serve(run) -> None:
    """The other end of `ask`: read a job, run it, print the answer or one line of what went wrong."""
    job = json.loads(sys.stdin.read())
    try:
        answer = run(job)
    except Exception as error:  # whatever the engine raises is a line for the caller
        answer = {"error": str(error) if isinstance(error, LabError) else
                  f"{job.get('engine', 'the engine')} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sys.stdout.flush()
    print("\n" + _MARK + json.dumps(answer), flush=True)


def reset_peak() -> None:
    """Let `peak_resident` count from now on, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def resident() -> int:
    """Resident bytes of this process now: anonymous memory and mapped files that were touched."""
    import psutil
    return psutil.Process().memory_info().rss


def peak_resident() -> int | None:
    """The most resident bytes of this process, since `reset_peak` on Linux, since its start elsewhere; None if unknown."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil
    if peak := getattr(psutil.Process().memory_info(), "peak_wset", None):     # Windows
        return peak
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss              # bytes on macOS
    except ImportError:
        return None


def free_on_cards() -> list[int | None]:
    """Free bytes of each card of this computer, as its driver says."""
    from ..hardware import machine
    return [card.free for card in machine().cards]
