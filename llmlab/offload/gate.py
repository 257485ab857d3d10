"""An event that an interrupt cannot break.

A Ctrl-C that comes while threading.Event takes or gives back its lock, which Python code does, leaves that lock held for ever
(bugs.python.org issue 29988): whoever waits next, and whoever sets it, then hangs. Here nobody holds anything that others need.
"""

import contextlib
import threading


class Gate:
    """Closed until `open`."""

    __slots__ = ("is_open", "_lock")

    def __init__(self):
        self.is_open, self._lock = False, threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let everybody through, now and later; never waits."""
        self.is_open = True
        self._let_go()

    def wait(self, seconds: float = 1.0) -> bool:
        """Whether it is open, after so many seconds at most: on Windows an interrupt is seen only between waits, and who waits
        beside one that was interrupted may see it that late."""
        if not self.is_open and self._lock.acquire(timeout=seconds):
            self._let_go()                     # for who else waits
        return self.is_open

    def _let_go(self) -> None:
        with contextlib.suppress(RuntimeError):        # somebody else just did
            self._lock.release()
