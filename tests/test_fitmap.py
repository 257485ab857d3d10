"""The whole catalogue's map says what fit() says."""

import random

import pytest

from llmlab.errors import LabError
from llmlab.fitmap import fit_map
from llmlab.fitting import fit


def test_the_map_agrees_with_single_reports():
    found = fit_map()
    assert len(found.models) == 99 and len(found.cards) == 171
    pick = random.Random(7)
    for _ in range(150):
        i, j = pick.randrange(99), pick.randrange(171)
        assert fit(found.models[i], found.cards[j]).best_quant() == found.best[i][j]


def test_more_memory_never_fits_less():
    found = fit_map(["llama-3-8b"], context=4096)
    ladder = found.ladder
    by_card = {c.id: q for c, q in zip(found.cards, found.best[0], strict=True)}
    assert by_card["rtx-4090-24gb"] == "F16" and by_card["gtx-1060-6gb"] in ladder[4:]
    assert "1 model on 171 cards" in found.answer and found.count() == sum(q is not None for q in found.best[0])


def test_as_a_table():
    found = fit_map(["llama-3-8b", "smollm2-135m"], ["rtx-4090-24gb", "gtx-1060-6gb"], context=4096)
    rows = list(found.table)
    assert [row["model"] for row in rows] == ["smollm2-135m", "llama-3-8b"]
    assert list(rows[1]) == ["model", "params", "gtx-1060-6gb", "rtx-4090-24gb"]
    assert (rows[1]["gtx-1060-6gb"], rows[1]["rtx-4090-24gb"]) == found.best[1] and "8.03 B" in str(found.table)


def test_bad_settings_are_refused():
    with pytest.raises(LabError, match="context"):
        fit_map(context=0)
    with pytest.raises(LabError, match="cache type"):
        fit_map(kv="q99")
