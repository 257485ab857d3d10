"""The socket, and connections on it: uvicorn's, with a limit on how long a request's headers may take to come."""

import errno
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import LabError


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises LabError where that cannot be, saying why."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise LabError(f"port is {port!r:.40}; give a number from 1 to 65535, or 0 for any that is free")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise LabError(f"host {str(host)[:100]!r} is no address of this computer; give 127.0.0.1, or 0.0.0.0 for all") from None
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    try:
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LabError(f"port {port} is taken; give another one, or 0 for any that is free") from None
        if error.errno == errno.EACCES:
            raise LabError(f"port {port} is not for this user; give one from 1024 up") from None
        raise LabError(f"{host}:{port} cannot be listened on ({error.strerror or error}); give another host or port") from None


def protocol_of(seconds: float) -> type[H11Protocol]:
    """Connections that are closed where a request's headers are not there after so many seconds."""

    class Connection(H11Protocol):
        _due = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._expect_nothing()
            elif self._due is None:         # a part of the next one's headers; without any, uvicorn's own timer runs
                self._expect()

        def connection_lost(self, error: Exception | None) -> None:
            self._expect_nothing()
            super().connection_lost(error)

        def _expect(self) -> None:
            self._due = self.loop.call_later(seconds, self.transport.close)

        def _expect_nothing(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

    return Connection
