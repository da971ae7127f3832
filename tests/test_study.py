"""bench/study.py: it goes on where it was killed; its statistics and controls are right."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from bench import study
from conftest import start
from loss import analysis_mask
from rollout import Group, Sample

SMALL = """
from bench import study
size = "--questions_per_step 8 --group_size 4 --pool_trigger 8 --eval_questions 20"
stage2 = f"{size} --train_stages 2 --errors_per_question 8"
study.FIXED, study.AT_RISK, study.CLAIMS = 8, 8, study.CLAIMS[:1]
study.ARMS = {"vanilla": study.Arm("budgets", "samples", 0, f"{size} --steps 0"),
              "GRPO": study.Arm("budgets", "samples", 96, f"{size} --algorithm grpo"),
              "random tokens": study.Arm("stage2", "corrections", 32, stage2, "random tokens")}
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
    (control,) = tmp_path.glob("random-tokens-*")
    assert json.loads(control.read_text())["spent corrections"] == 32  # its budget
    assert all(path.stat().st_mtime_ns == then for path, then in early.items())
    report = (tmp_path / "RESULTS.md").read_text()
    assert report.startswith("BEFORE<") and report.endswith(">AFTER")
    assert "| GRPO |" in report and "OLD" not in report


def test_paired_statistics_by_hand_of_arms_that_are_there():
    for _, _, *pair, values in study.CLAIMS:
        assert {arm.format(value) for arm in pair for value in values} <= set(study.ARMS)
    pytest.importorskip("scipy")  # in bench/requirements.txt only
    s = study.statistics([0.0, 2.0, 2.0, 4.0, 2.0])  # s^2 = 2, error sqrt(2/5), t = 3.1623
    wanted = (2.0, 0.0341, 2.77645 * 0.63246, (2.77645 + 0.94096) * 0.63246)
    assert (s["mean"], s["p"], s["half"], s["detectable"]) == pytest.approx(wanted, abs=1e-4)


def test_random_tokens_are_as_many_but_not_the_analysis(monkeypatch):
    monkeypatch.setattr(train, "make_examples", train.make_examples)  # put back at the end
    study.random_tokens(train, seed=0)
    samples = [Sample(list(range(n)), [-1.0] * n, "", True) for n in (93, 60)]
    group = Group("q", "a", [7, 7], 0, samples=samples, graded=[], spans=[], verdicts=[])
    mask = analysis_mask([(2, 49), None], 93, [True, False])
    one, none = train.make_examples([group], torch.ones(1, 2), [mask], [[47, 0]])
    places = {one.first - 2 + i for i in one.mask.nonzero().flatten().tolist()}  # 2: the prompt
    assert len(places) == 47 and max(places) < 93 and not none.mask.any()
    assert 5 < sum(place >= 49 for place in places)  # the corrected solution gets its share


def test_random_success_keeps_each_groups_rate(monkeypatch):
    before = [["right"] * 4 + ["wrong"] * 4, ["right"] + ["wrong"] * 7] * 90
    groups = [SimpleNamespace(verdicts=verdicts) for verdicts in before]
    monkeypatch.setattr(train, "sample_groups", lambda *_, **__: groups)
    study.random_success(train, seed=0)
    for how in ({"step": 1}, {"span": "sections", "step": 0}):  # answers; an evaluation
        assert [group.verdicts for group in train.sample_groups(**how)] == before
    train.sample_groups(span="sections", step=1)
    right = np.array([group.verdicts for group in groups]) == "right"
    assert right.sum(1).tolist() == [4, 1] * 90
    assert 0.4 < right[::2, :4].mean() < 0.6  # a half stays right, as chance has it
