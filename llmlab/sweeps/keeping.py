"""Results in a folder, one file a point, whole or not there; failures beside them, as text."""

import hashlib
import os
import struct
import uuid
from pathlib import Path

from ..errors import LabError
from ..gguf.words import show_path

_HEAD = b"llmlab result 2\n"
_SECONDS = struct.Struct("<d")


class Kept:
    """The folder of one sweep. Several processes may use it at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:           # ValueError: a NUL in it
            raise _unwritable(folder, error) from None

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.result"

    def get(self, key: str) -> tuple[float, bytes] | None:
        """(seconds it took, result), None where there is none. Raises ValueError for a damaged file."""
        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
        if data.startswith(b"llmlab result 1\n"):
            raise ValueError("an older llmlab kept it otherwise")
        body = data[len(_HEAD) + 32:]
        if not data.startswith(_HEAD) or hashlib.sha256(body).digest() != data[len(_HEAD):len(_HEAD) + 32]:
            raise ValueError("it is cut off or was changed")
        return _SECONDS.unpack_from(body)[0], body[_SECONDS.size:]

    def put(self, key: str, seconds: float, result: bytes) -> None:
        """Raises LabError where the file cannot be written."""
        body = _SECONDS.pack(seconds) + result
        self._write(self.path(key), _HEAD + hashlib.sha256(body).digest() + body)
        self.remove(key, ".failure")

    def put_failure(self, key: str, text: str) -> None:
        """Raises LabError where the file cannot be written."""
        self._write(self.path(key).with_suffix(".failure"), text.encode("utf-8", "replace"))

    def remove(self, key: str, suffix: str) -> None:
        """A ".result" or a ".failure" that an earlier call has left."""
        self.path(key).with_suffix(suffix).unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            raise _unwritable(path, error) from None
        finally:
            part.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError | ValueError) -> LabError:
    why = getattr(error, "strerror", None) or error
    return LabError(f"{show_path(str(path))} cannot be written: {why}; give another folder=")
