"""Ahead-of-time packages: a function of tensors compiled for this machine, kept on disk, run without the compiler.

torch.export traces the function, torch's inductor writes C++ for it and calls the machine's compiler once, in ten to thirty
seconds. What comes out is one file; a later process opens it in milliseconds and imports neither torch.compile nor a compiler.
A package belongs to a processor, a number of threads, a version of torch and the source of the function: its name holds
them all, so that one made for something else is never run.
"""

import contextlib
import hashlib
import inspect
import io
import os
import platform
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from .. import hardware, places
from ..errors import LabError

# One loop a multiplication: intermediate sums stay in registers instead of being written down after so many reads, a product
# and a sum are one instruction, and threads are woken for matrices alone.
SETTINGS = {"cpp.enable_floating_point_contract_flag": "fast", "realize_acc_reads_threshold": 1 << 20,
            "realize_opcount_threshold": 1 << 20, "compile_threads": 1, "cpp.min_chunk_size": 2048}


LONGEST = 3600      # seconds that compiling one package may take


class NotPackaged(LabError):
    """Why nothing could be compiled: no compiler, one that fails, or a wrong result."""


class Package:
    """A compiled function: flat tensors in, tensors out."""

    def __init__(self, path: Path):
        from torch._C._aoti import AOTIModelPackageLoader  # torch._inductor's own loader imports the whole compiler

        self.path, self._run = path, AOTIModelPackageLoader(str(path), "model", False, 1, -1).run

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return self._run(list(tensors))


def package(function: Callable, tensors: Sequence[torch.Tensor], name: str, sources: Sequence[Callable],
            dynamic: dict[int, dict[int, str]] | None = None, progress: Callable[[str], None] | None = None) -> Package:
    """`function(*tensors)` -> tuple of tensors, compiled: opened where it lies on disk, made and kept there otherwise.

    `name` says what it is, in its first word, and all that the function closes over; `sources` are modules or functions whose
    text it is made of. `dynamic` names dimensions whose size may change, 2 at least: {argument: {dimension: name}}; "2*name" is
    one twice as large. What was made is run once against the function itself. Raises NotPackaged.
    """
    kind = name.split(" ")[0].replace("_", " ")
    path = _place(name, tensors, sources, dynamic or {})
    try:
        if _is_whole(path):
            return Package(path)
        compiler()
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        if progress:
            progress(f"compiling the {kind} for this machine, once")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as folder:
            made = Path(folder) / path.name
            _compile(function, tensors, dynamic or {}, made)
            _check(function, tensors, Package(made), kind)
            os.replace(made, path)
        return Package(path)
    except NotPackaged:
        raise
    except OSError as error:
        raise NotPackaged(f"compiled code cannot be kept in {path.parent} ({error.strerror}); make room there, or give another "
                          "folder in LLMLAB_CACHE") from error
    except Exception as error:      # export, code generation, the compiler and the loader each fail in many ways
        raise NotPackaged(f"the {kind} cannot be compiled here ({type(error).__name__}: {_line(error)})") from error


def _is_whole(path: Path) -> bool:
    """Whether a package lies there, every byte as it was written: what is damaged is made again."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile):
        return False


def _sweep(folder: Path) -> None:
    """What processes left that were killed while they compiled."""
    for left in folder.glob("making-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LONGEST:
                shutil.rmtree(left, ignore_errors=True)


def compiler() -> str:
    """The C++ compiler that torch would call. Raises NotPackaged."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return get_cpp_compiler()
    except Exception as error:
        raise NotPackaged("no C++ compiler was found (g++ or clang++); install one (build-essential, xcode-select --install), "
                         "or load without compile=True") from error


def _compile(function: Callable, tensors: Sequence[torch.Tensor], dynamic: dict, made: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    names: dict[str, object] = {}

    def size(name: str):
        times, _, name = name.rpartition("*")
        found = names.setdefault(name, torch.export.Dim(name, min=2, max=1 << 24))
        return int(times) * found if times else found

    shapes = [{at: size(name) for at, name in dynamic[i].items()} if i in dynamic else None for i in range(len(tensors))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Module(function), tuple(tensors), dynamic_shapes=(tuple(shapes),))
        aoti_compile_and_package(program, package_path=str(made), inductor_configs=dict(SETTINGS))     # torch writes into it


class _Module(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def _check(function: Callable, tensors: Sequence[torch.Tensor], made: Package, kind: str) -> None:
    """Compilers have mistakes: what was made must give what the function gives."""
    with torch.no_grad():
        for one, other in zip(function(*tensors), made(*tensors), strict=True):
            off = (one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-30)
            if not off < 1e-3:
                raise NotPackaged(f"the {kind}, compiled, gives other numbers than it does uncompiled (relative {off:.1g})")


def _place(name: str, tensors: Sequence[torch.Tensor], sources: Sequence[Callable], dynamic: dict) -> Path:
    told = [name, *(f"{tuple(t.shape)} {t.dtype}" for t in tensors), repr(dynamic), repr(SETTINGS), machine(),
            *(inspect.getsource(source) for source in sources)]
    return places.cache() / "compiled" / f"{hashlib.sha256(chr(10).join(told).encode()).hexdigest()[:32]}.pt2"


@cache
def _processor() -> str:
    return hardware.machine().cpu.name


def machine() -> str:
    """What a package depends on beside its function."""
    told = _processor(), platform.system(), torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"
    return f"{', '.join(told)}, torch {torch.__version__}"


def settle(value: torch.Tensor) -> torch.Tensor:
    """The same tensor, written down before anything reads it: without this inductor makes it anew at each of its uses."""
    from torch._inductor import inductor_prims

    return inductor_prims.force_stride_order(value, value.stride())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
