"""What the fit panel's folds hold, one a file: made over a panel, brought up to date by `show()`."""

from .command import CommandBox
from .comparison import CompareBox
from .engine import EngineBox
from .levers import LeverBox
from .sharing import ShareBox

__all__ = ["CommandBox", "CompareBox", "EngineBox", "LeverBox", "ShareBox"]
