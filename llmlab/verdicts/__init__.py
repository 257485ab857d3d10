"""llmlab.claims: what was claimed in 2024 of running models at home, each with its verdict as of now and the numbers behind it.

    reading.py   data/claims.json: a claim's parts, the bounds that decide them, where its numbers come from
    numbers.py   a number by each of those ways, recomputed where that is possible: fits, sizes, plans, scores, measurements
    judging.py   numbers against bounds, the verdict of a claim, its sentence, the table
"""

from .judging import Claims, Judged, claims
from .reading import VERDICTS, Claim, Part, stated

__all__ = ["VERDICTS", "Claim", "Claims", "Judged", "Part", "claims", "stated"]
