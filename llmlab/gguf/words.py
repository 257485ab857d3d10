"""Names from a file in a message: quoted, on one line, cut."""


def show(text: str, limit: int = 80) -> str:
    """A name from a file, quoted, on one line, cut to `limit` characters."""
    shown = _printable(text[: limit + 1])
    return f"'{shown if len(shown) <= limit else shown[: limit - 1] + '…'}'"


def show_path(path: str) -> str:
    """A path on one line; of a very long one the end, which tells more."""
    shown = _printable(path)
    return shown if len(shown) <= 300 else "…" + shown[-299:]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
