"""Background: work in a thread of its own, seen through traits: begun, ended, waited for; what went wrong is said, not lost."""

import logging
import threading
from collections.abc import Callable

import traitlets as t

from ..errors import LabError

PAUSE = 0.1         # seconds between two looks at what is coming: a page needs no more


class Stopped(Exception):
    """Ends work from within that `end()` was called for."""


class Background(t.HasTraits):
    """`running` while there is work, `progress` says what is being done, `error` in one line where it went wrong; `end()` ends
    it, `wait()` waits for it."""

    running = t.Bool(read_only=True)
    progress = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        self._stopping, self._thread = threading.Event(), None
        super().__init__(**settings)

    def end(self) -> None:
        """End what is under way, after the present step."""
        self._stopping.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done; whether it is."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.running

    def _begin(self, name: str, work: Callable, *given) -> None:
        """Call `work(*given)` in a thread; it sets `running` to False at its end."""
        self._stopping.clear()
        self._thread = threading.Thread(target=work, args=given, daemon=True, name=f"llmlab {name}")
        self._thread.start()

    def _through(self, doing: str, work: Callable, *given) -> None:
        """Call `work(*given)` to its end, or until `_say` finds that it is to end; what went wrong is said."""
        error = ""
        try:
            work(*given)
        except Stopped:
            pass
        except Exception as wrong:
            error = said_of(wrong, doing)
        finally:
            stopped = self._stopping.is_set()
            self._set(error="" if stopped else error, running=False, progress="Stopped." if stopped else "")

    def _say(self, text: str) -> None:
        """Show what is being done. Raises Stopped where it is to end."""
        if self._stopping.is_set():
            raise Stopped
        self.set_trait("progress", text)

    def _finish(self) -> None:
        """Wait; Ctrl-C ends the work too. Raises LabError where it went wrong."""
        try:
            self.wait()
        except KeyboardInterrupt:
            self.end()
            raise
        if self.error:
            raise LabError(self.error)

    def _set(self, **values) -> None:
        """Change together what only we change."""
        with self.hold_trait_notifications():
            for name, value in values.items():
                self.set_trait(name, value)


def said_of(wrong: Exception, doing: str) -> str:
    """What to say of an error in a thread, in one line; one of our own making is written to the log whole."""
    if isinstance(wrong, LabError):
        return str(wrong)
    logging.getLogger(__name__).error("while %s", doing, exc_info=wrong)
    return f"Something is wrong in llmlab itself: {type(wrong).__name__}: {wrong}"
