"""Where data/ and notebooks/ lie: at the top of a checkout, or inside the installed package; and llmlab's own folders."""

import os
import shutil
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `name` ("data" or "notebooks") of this installation. Raises FileNotFoundError."""
    for place in (_HERE / name, _HERE.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"llmlab's {name}/ folder is missing beside {_HERE}; reinstall llmlab")


def cache() -> Path:
    """llmlab's cache folder: `LLMLAB_CACHE`, else `XDG_CACHE_HOME/llmlab`, else `~/.cache/llmlab` (not made here)."""
    if own := os.environ.get("LLMLAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmlab"


def notebooks() -> Path:
    """A folder of notebooks to work in: the checkout's own, or, for an installed llmlab, a copy in the user's home
    (`LLMLAB_NOTEBOOKS`, else ~/llmlab-notebooks) that keeps what the user changed and gains what is new."""
    shipped = folder("notebooks")
    if shipped.parent != _HERE:
        return shipped
    own = Path(os.environ.get("LLMLAB_NOTEBOOKS") or Path.home() / "llmlab-notebooks")
    own.mkdir(parents=True, exist_ok=True)
    for source in sorted(shipped.rglob("*")):
        target = own / source.relative_to(shipped)
        if source.is_file() and source.suffix in (".ipynb", ".png") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return own
