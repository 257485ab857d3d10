"""llmlab.best: which model for this machine and this task, ranked by published scores less what the quant is expected to cost.

    published.py       scores that may be compared, and how far chance moves them
    losses.py          what a quant and a quantized cache are expected to cost of a score
    limits.py          languages and licences
    configurations.py  the quants, caches and placements in which a model fits
    choosing.py        all of it asked at once
    answer.py          choices in order, with reasons; frontiers; what is unknown; what failed
    generations.py     newer and smaller against older and larger, in every setting that scores both
"""

from .answer import Advice, Choice, Unknown
from .choosing import best
from .published import TASKS, setting_of, settings_of

__all__ = ["Advice", "Choice", "TASKS", "Unknown", "best", "setting_of", "settings_of"]
