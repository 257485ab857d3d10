"""What a model gets right, measured on the spot: choices by log-likelihood, exact answers, function calls, needles.

`evaluate(model, tokenizer, tasks)` gives an `Evaluation`; `.beside(other)` compares two on the same items, `Comparison`. Items
are JSON lines, `read_items` is strict about them; `llmlab.intervals` says what so few of them can show. `lm_eval_model` puts
any of our models behind lm-eval-harness. `recorded` is what was measured of larger models once.
"""

from .items import Call, Choice, Exact, read_items, shipped
from .outcomes import Evaluation, Outcome, Score
from .pairing import Comparison
from .records import recorded, recorded_table
from .running import evaluate

__all__ = ["Call", "Choice", "Comparison", "Evaluation", "Exact", "Outcome", "Score", "evaluate", "lm_eval_model", "read_items",
           "recorded", "recorded_table", "shipped"]


def lm_eval_model(model, tokenizer):
    """A model of `llmlab.load` or `llmlab.decoder` as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.
    Raises LabError where lm-eval-harness is not installed."""
    from .adapter import LabLM

    return LabLM(model, tokenizer)
