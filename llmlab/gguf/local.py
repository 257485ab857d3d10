"""A GGUF file on this computer, read and mapped so that one cut short or replaced under us is an error, not a crash."""

import mmap
import os
import stat
from dataclasses import dataclass
from weakref import WeakValueDictionary

from ..errors import BadFile
from .words import show, show_path

_OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_maps: "WeakValueDictionary[tuple, mmap.mmap]" = WeakValueDictionary()  # a map lives as long as an array looks at it


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A regular file as it was when we first looked. Holds no descriptor; each access checks that it is unchanged."""

    name: str
    size: int
    stamp: tuple[int, int]  # inode, modification time in ns

    @classmethod
    def look(cls, path: str | os.PathLike) -> "LocalFile":
        """Raises BadFile where `path` is nothing that can be read. A pipe or device is never opened: it might hang."""
        try:
            name = os.fsdecode(path)
            found = os.stat(name)
        except (TypeError, ValueError):
            raise BadFile(f"{show(str(path))} is not a path; give the path of a .gguf file") from None
        except FileNotFoundError:
            raise BadFile(f"{show_path(name)} does not exist; check the path, or try llmlab fetch") from None
        except OSError as error:
            raise BadFile(f"{show_path(name)} cannot be reached ({error.strerror}); check the path") from None
        if stat.S_ISDIR(found.st_mode):
            raise BadFile(f"{show_path(name)} is a folder; give the path of a .gguf file in it")
        if not stat.S_ISREG(found.st_mode):
            raise BadFile(f"{show_path(name)} is not a regular file; give the path of a .gguf file")
        return cls(name, found.st_size, (found.st_ino, found.st_mtime_ns))

    def read(self, offset: int, length: int) -> bytes:
        handle = self._open()
        try:
            parts = []
            os.lseek(handle, offset, os.SEEK_SET)
            while length > 0 and (part := os.read(handle, length)):
                parts.append(part)
                length -= len(part)
        except OSError as error:
            raise BadFile(f"{show_path(self.name)} cannot be read ({error.strerror}); check its disk") from None
        finally:
            os.close(handle)
        if length > 0:
            raise self._changed()
        return b"".join(parts)

    def map(self) -> mmap.mmap:
        key = (self.name, self.size, self.stamp)
        handle = self._open()  # even where a map is at hand: a file cut short since must not be touched through it
        try:
            found = _maps.get(key)
            if found is None:
                found = _maps[key] = mmap.mmap(handle, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BadFile(f"{show_path(self.name)} cannot be mapped ({error.strerror}); close other programs or raise "
                          "the limit on memory maps") from None
        finally:
            os.close(handle)
        return found

    def let_go(self) -> None:
        """Of the mapped pages that were touched: they no longer count as this process's memory, and are mapped again when
        something looks at them. Where a system cannot, nothing happens."""
        found = _maps.get((self.name, self.size, self.stamp))
        if found is not None and hasattr(mmap, "MADV_DONTNEED"):
            found.madvise(mmap.MADV_DONTNEED)

    def check_in_place(self) -> None:
        """Raises BadFile where this very file was written to since: pages that it lost end the process when they are
        touched. A file that another took the place of, or that was deleted, is as it was."""
        try:
            found = os.stat(self.name)
        except OSError:
            return
        if found.st_ino == self.stamp[0] and (found.st_size, found.st_mtime_ns) != (self.size, self.stamp[1]):
            raise self._changed()

    def _open(self) -> int:
        """A descriptor of the very file we looked at. Raises BadFile."""
        try:
            handle = os.open(self.name, _OPEN)
        except PermissionError:
            raise BadFile(f"{show_path(self.name)} may not be read by this user; change its permissions") from None
        except OSError as error:
            raise BadFile(f"{show_path(self.name)} cannot be opened ({error.strerror}); check the path") from None
        found = os.fstat(handle)
        if (found.st_size, (found.st_ino, found.st_mtime_ns)) != (self.size, self.stamp):
            os.close(handle)
            raise self._changed()
        return handle

    def _changed(self) -> BadFile:
        return BadFile(f"{show_path(self.name)} has changed since it was opened; "
                       "wait until it is complete, then open it again")
