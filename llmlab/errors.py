"""What can go wrong, as one clear line that names the thing and the remedy.

Every error llmlab raises on bad input is a `LabError`, which is a `ValueError`, so a notebook can
catch one class and show the sentence.
"""


class LabError(ValueError):
    """Something the caller gave cannot be used; the message names it and says what to do."""


class UnknownName(LabError):
    """A model, card, quant or option name that is not known; the message offers the nearest ones."""


class BadFile(LabError):
    """A file that is truncated, damaged, or not what its name says."""


class BadConfig(LabError):
    """A config.json that describes no model we can count."""


class Unreachable(LabError):
    """A remote place that did not answer; the message says what works without a network."""
