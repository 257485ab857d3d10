"""A compiled package run without Python's lock, so that other threads, such as those that read the next layer, go on meanwhile.

torch's own loader holds the lock for as long as a package runs: for a large layer tens of milliseconds, in which no other
Python thread can so much as ask for its next bytes. What a package exports is C (torch's aoti_runtime/interface.h), and ctypes
lets the lock go around every call. Handing 25 tensors over takes some 20 us more than the loader does.
"""

import ctypes
import os
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch

from ..errors import LabError


class Unlocked:
    """What `compiling.Package` is, by the library inside of it: flat tensors in, tensors out."""

    def __init__(self, library: ctypes.CDLL):
        self._library, self._container = library, ctypes.c_void_p()
        self._run = library.AOTInductorModelContainerRun
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t,
                              ctypes.c_void_p, ctypes.c_void_p]
        create = library.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]
        _must(create(ctypes.byref(self._container), 1, b"cpu", None))
        self._inputs = self._count(library.AOTInductorModelContainerGetNumInputs)
        self._outputs = ctypes.c_void_p * self._count(library.AOTInductorModelContainerGetNumOutputs)

    def _count(self, ask) -> int:
        ask.argtypes, found = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_size_t()
        _must(ask(self._container, ctypes.byref(found)))
        return found.value

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if len(tensors) != self._inputs:        # the library does not look
            raise LabError(f"a package of {self._inputs} tensors was given {len(tensors)}")
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)      # each a tensor that the package frees
        given, found = (ctypes.c_void_p * len(handles))(*[_pointer(handle, None) for handle in handles]), self._outputs()
        _must(self._run(self._container, given, len(handles), found, len(found), None, None))
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(one, None, None) for one in found])


def _must(error: int) -> None:
    if error:
        raise LabError("compiled code failed; what torch says of it was printed above")


@cache
def unlocked(path: Path) -> Unlocked | None:
    """The package that lies there, made ready once for as long as the process lives; None where it needs more than its library
    has (operations that only the loader can call), or this torch or system has it otherwise."""
    with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        names = [name for name in file.namelist() if name.endswith(".so")]
        more = [name for name in file.namelist() if name.endswith(".json") and not name.endswith("_metadata.json")]
        if os.name != "posix" or len(names) != 1 or more or not hasattr(torch._C._aoti, "unsafe_alloc_void_ptrs_from_tensors"):
            return None
        try:
            return Unlocked(ctypes.CDLL(file.extract(names[0], folder)))
        except (OSError, AttributeError):       # no folder to run code from; a package that exports other names
            return None


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))
