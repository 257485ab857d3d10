"""llama.cpp's server, built from the source that llama-cpp-python's sdist carries: once, into llmlab's cache.

    python tests/bench/llama_server.py

The sdist comes by this Python's own pip; cmake and a C++ compiler do the rest: a quarter of an hour on two cores. What is built
is for this processor, without the web page, TLS and shared libraries. CMAKE_BUILD_PARALLEL_LEVEL says how many compilers run.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

from llmlab import places  # noqa: E402
from llmlab.errors import LabError  # noqa: E402
from llmlab.verified import locked  # noqa: E402

VERSION = "0.3.36"       # that of the extra `peers`
INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
OPTIONS = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "LLAMA_BUILD_SERVER": "ON", "LLAMA_BUILD_TESTS": "OFF",
           "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF", "LLAMA_OPENSSL": "OFF",
           # the page would be fetched from a hub, or made by npm
           "LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF"}


def target() -> Path:
    return places.cache() / "llama.cpp" / f"llama-server-{VERSION}{'.exe' if os.name == 'nt' else ''}"


def build(say: Callable[[str], None] = print) -> Path:
    """The program, built first where it is not there. Raises LabError naming what is missing, or the last words of what
    failed."""
    done = target()
    with locked(done):
        if done.is_file():
            return done
        cmake, ninja = tool("cmake"), tool("ninja")
        if not cmake:
            raise LabError("llama.cpp's server is built with cmake, which is not here: pip install cmake ninja")
        work = done.with_name(f".{done.name}.build")       # stays where it is interrupted, and is gone on from
        source = work / "source"
        if not (source / "CMakeLists.txt").is_file():
            say("fetching llama.cpp's source with pip")
            unpack(download(work), source)
        say("building llama.cpp's server, once: a quarter of an hour on two cores")
        made = work / "made"
        run([cmake, "-S", source, "-B", made, *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ()),
             *(f"-D{name}={value}" for name, value in OPTIONS.items())])
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        run([cmake, "--build", made, "--config", "Release", "--target", "llama-server", "--parallel", jobs])
        found = next((path for path in (made / "bin").rglob(f"llama-server{done.suffix if os.name == 'nt' else ''}")
                      if path.is_file()), None)
        if not found:
            raise LabError(f"llama.cpp was built and its server is not in {made / 'bin'}; remove {work} and try again")
        part = done.with_name(f".{done.name}.part")
        shutil.copy2(found, part)
        os.replace(part, done)
        shutil.rmtree(work, ignore_errors=True)
        return done


def tool(name: str) -> str | None:
    """A program beside this Python, as pip installs it, or on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def download(work: Path) -> Path:
    """The sdist."""
    work.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--no-input",
         "--disable-pip-version-check", "--dest", work, f"llama-cpp-python=={VERSION}"])
    found = next(work.glob("*.tar.gz"), None)
    if not found:
        raise LabError(f"pip brought no source of llama-cpp-python {VERSION}")
    return found


def unpack(sdist: Path, source: Path) -> None:
    """llama.cpp's part of it."""
    part = source.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if member.name.startswith(INSIDE)]
        archive.extractall(part, members, filter="data")
    os.replace(part / INSIDE, source)
    shutil.rmtree(part, ignore_errors=True)
    sdist.unlink()


def run(command: list) -> None:
    """Raises LabError with the last words of a command that fails."""
    with tempfile.TemporaryFile() as words:
        code = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=words,
                              stderr=subprocess.STDOUT, check=False).returncode
        if code:
            words.seek(0)
            lines = [line.strip() for line in words.read().decode("utf-8", "replace").splitlines() if line.strip()]
            wrong = [line for line in lines if "error" in line.lower()]
            last = (wrong or lines or ["no reason given"])[-1][:300]
            raise LabError(f"{Path(str(command[0])).name} failed (exit code {code}): {last}")


if __name__ == "__main__":
    print(build())
