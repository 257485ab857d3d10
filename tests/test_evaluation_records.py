"""What was recorded of models, as it is shown."""

import pytest

from llmlab.errors import UnknownName
from llmlab.evaluation import recorded, recorded_table, records
from llmlab.intervals import wilson

HEAD = "model,quant,twice,task,items,n,right,share,low,high,chance,acc,logprob,tokens,seconds,how,date,torch,source\n"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A task asked in part, then whole; another quant in part alone; a task without choices."""
    (tmp_path / "evaluations.csv").write_text(
        HEAD + "m,Q8_0,,coding,ab,36,20,0.5556,0.3958,0.7046,0.1667,0.5,-3.5,1,1,x,d,t,s\n"
        "m,Q8_0,,coding,ab-every3,12,3,0.25,0.0889,0.5323,0.1667,0.25,-4.5,1,1,x,d,t,s\n"
        "m,Q2_K,yes,coding,ab-every3,12,2,0.1667,0.047,0.448,0.1667,0.25,-5.5,1,1,x,d,t,s\n"
        "m,Q2_K,yes,tools,cd,36,9,0.25,0.1371,0.4109,0.0,,,1,1,x,d,t,s\n")
    monkeypatch.setattr(records, "folder", lambda name: tmp_path)


def test_a_task_that_was_asked_whole_and_in_part_is_shown_whole(two):
    found = recorded("m")
    assert list(found) == ["m Q8_0", "m Q2_K"] and (found["m Q8_0"]["coding"].right, found["m Q8_0"]["coding"].n) == (20, 36)
    assert found["m Q2_K"]["coding"].n == 12 and found["m Q2_K"]["tools"].logprob is None


def test_the_table_has_a_row_a_quant_and_gaps_where_nothing_was_asked(two):
    first, second = recorded_table()
    assert first == {"model": "m Q8_0", "coding": "20/36 (40 to 70 %)", "tools": None}
    assert second["tools"] == "9/36 (14 to 41 %)"


def test_what_comes_along_has_two_models_and_wilson_s_intervals():
    found = recorded()
    assert len({name.split()[0] for name in found}) >= 2
    for scores in found.values():
        for score in scores.values():
            assert (score.low, score.high) == pytest.approx(wilson(score.right, score.n), abs=1e-4)


def test_a_model_nobody_recorded_is_named():
    with pytest.raises(UnknownName, match="recorded: smollm2-135m"):
        recorded("gpt-5")
