"""bench/study.py: it continues where it was killed; statistics, controls and tables are right."""

import json
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import loss
import train
from bench import study
from conftest import TOY, start
from rollout import Group, Sample
from toy import make_toy

SMALL = """
from pathlib import Path
from bench import study
size = "--questions_per_step 8 --group_size 4 --pool_trigger 8 --eval_questions 20"
stage2 = f"{size} --train_stages 2 --errors_per_question 8"
study.FIXED, study.AT_RISK, study.PROBED, study.TABLE = 8, 8, 8, Path("none.csv")
Arm = study.Arm
study.ARMS = {"vanilla": Arm("mechanism", "samples", 0, f"{size} --steps 0", two_policies=True),
              "GRPO": Arm("budgets", "samples", 96, f"{size} --algorithm grpo"),
              "random": Arm("mechanism", "corrections", 32, stage2, "random tokens")}
study.CLAIMS = [("GRPO learns", study.SOLVED, "GRPO", "vanilla")]
if __name__ == "__main__":
    study.main()
"""
REPORT = "BEFORE<!-- study.py: begin -->OLD<!-- study.py: end -->AFTER"


def test_killed_and_started_again_it_does_only_what_is_missing(tmp_path):
    (tmp_path / "RESULTS.md").write_text(REPORT)
    (tmp_path / "small.py").write_text(SMALL)
    command = [sys.executable, tmp_path / "small.py", "--seeds", 1, "--work", tmp_path]
    process = start(command, start_new_session=True)
    while not list(tmp_path.glob("*-seed0-*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # runs in progress and all
    process.wait()
    early = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-seed0-*.json")}
    assert early and start(command).wait(900) == 0
    assert len(list(tmp_path.glob("*-seed0-*.json"))) == 3
    assert all(path.stat().st_mtime_ns == then for path, then in early.items())
    runs = pd.read_csv(tmp_path / "study.csv").set_index("arm")
    assert runs["spent corrections"]["random"] == 32  # its budget
    assert -1 <= runs["cosine, solution and right value"]["vanilla"] <= 1
    report = (tmp_path / "RESULTS.md").read_text()
    assert report.startswith("BEFORE<") and report.endswith(">AFTER")
    assert "| GRPO |" in report and "OLD" not in report


def test_every_figure_of_the_study_follows_from_its_table(tmp_path):
    pytest.importorskip("scipy")  # in bench/requirements.txt only
    runs = study.results(tmp_path)  # of an empty folder: study.csv alone
    study.report(runs, tmp_path)
    section = re.compile("<!-- study.py: begin -->.*<!-- study.py: end -->", re.DOTALL)
    published = (study.ROOT / "bench/RESULTS.md").read_text(encoding="utf-8")
    assert section.search((tmp_path / "RESULTS.md").read_text())[0] == section.search(published)[0]
    assert (tmp_path / "study.csv").read_text() == study.TABLE.read_text()
    assert len(runs) > 0 and not runs.duplicated(["arm", "seed"]).any()


def test_paired_statistics_by_hand_of_arms_that_are_there():
    arms = set(study.ARMS)
    for _, measure, arm, other in [*study.CLAIMS, *(("", "", *pair) for pair in study.PICTURED)]:
        assert {arm, other} <= arms, (measure, arm, other)
    pytest.importorskip("scipy")
    s = study.statistics([0.0, 2.0, 2.0, 4.0, 2.0])  # s^2 = 2, error sqrt(2/5), t = 3.1623
    wanted = (2.0, 0.0341, 2.77645 * 0.63246, (2.77645 + 0.94096) * 0.63246)
    assert (s["mean"], s["p"], s["half"], s["detectable"]) == pytest.approx(wanted, abs=1e-4)
    runs = pd.DataFrame({"arm": list("aaabb"), "seed": [0, 1, 2, 2, 1], "share": [9, 5, 7, 4, 1]})
    assert study.paired(runs, "share", "a", "b").tolist() == [4, 3]  # seeds 1 and 2


def redirected(monkeypatch, fork, token_ids, prompt, analysis):
    """The places in a correction that get the credit of its analysis."""
    monkeypatch.setattr(train, "make_examples", train.make_examples)  # put back at the end
    study.redirect_credit(fork, seed=0)
    n = len(token_ids)
    right = Sample(token_ids, [-1.0] * n, "", True, analysis=analysis)
    wrong = Sample(token_ids[:60], [-1.0] * 60, "", True, analysis=None)
    group = Group("q", "a", prompt, 0, samples=[right, wrong])
    mask = loss.analysis_mask([analysis, None], n, [True, False])
    one, none = train.make_examples([group], torch.ones(1, 2), [mask], [[47, 0]])
    assert not none.mask.any()
    return {one.first - len(prompt) + i for i in one.mask.nonzero().flatten().tolist()}


def test_random_tokens_are_as_many_but_not_the_analysis(monkeypatch):
    places = redirected(monkeypatch, "random tokens", list(range(93)), [7, 7], (2, 49))
    assert len(places) == 47 and max(places) < 93
    assert 5 < sum(place >= 49 for place in places)  # the corrected solution gets its share


def test_credit_to_the_corrected_solution_is_all_that_follows_the_analysis(monkeypatch):
    places = redirected(monkeypatch, "corrected solution", list(range(93)), [7, 7], (2, 49))
    assert places == set(range(49, 93))


def test_no_credit_to_quotes_leaves_what_the_prompt_does_not_say(monkeypatch):
    ids = list(range(93))
    prompt = [7, *range(10, 25), 5, *range(30, 37)]  # 15 tokens of the analysis, and 7: too few
    places = redirected(monkeypatch, "no quotes", ids, prompt, (2, 49))
    assert places == set(range(2, 49)) - set(range(10, 25))


def test_judgements_are_counted_where_the_line_itself_decides():
    steps = [(4, 4, 0, 9), (6, 9, 1, 16), (9, 4, 1, 14)]  # the second: right but for its carry
    truth = make_toy.walk(964, 494, lambda place, fact: sum(fact))
    said = "Analysis:\nStep 1: 4+4+0=09 wrong\nStep 2: 6+9+1=16 right\nStep 3: wrong\n"
    group = SimpleNamespace(samples=[SimpleNamespace(text=said, analysis=(0, 1))])
    measured = study.what_analyses_say([group, group], [(steps, truth), None])
    assert measured == {study.CALLED_WRONG: 1.0, study.CALLED_RIGHT: 0.0, study.WELL_FORMED: 1.0}


def test_log_p_is_that_of_the_continuation_alone():
    model = AutoModelForCausalLM.from_pretrained(TOY).eval()
    rows = [([5, 6, 7], [8, 9]), ([5, 6], [7, 8, 9])]
    with torch.no_grad():
        both = study.log_p(model, rows)
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    after_6, after_7, after_8 = logits[1, 7], logits[2, 8], logits[3, 9]
    wanted = torch.tensor([[after_7, after_8, 0.0], [after_6, after_7, after_8]])
    assert torch.allclose(both, wanted, atol=1e-5)
