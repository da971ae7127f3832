"""bench/study.py: it goes on where it was killed; its statistics and controls are right."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import train
from bench import study
from loss import analysis_mask
from rollout import Group, Sample

SMALL = f"""
import sys
sys.path.insert(0, {str(study.ROOT)!r})
from bench import study
size = "--questions_per_step 8 --group_size 4 --pool_trigger 8 --eval_questions 20"
stage2 = f"{{size}} --train_stages 2 --errors_per_question 8"
study.FIXED, study.AT_RISK, study.CLAIMS = 8, 8, study.CLAIMS[:1]
study.ARMS = {{"vanilla": study.Arm("budgets", "samples", 0, f"{{size}} --steps 0"),
              "GRPO": study.Arm("budgets", "samples", 96, f"{{size}} --algorithm grpo"),
              "random tokens": study.Arm("stage2", "corrections", 32, stage2, "random tokens")}}
study.main()
"""


def start(folder):
    (folder / "small.py").write_text(SMALL)
    command = [sys.executable, folder / "small.py", "--seeds", "1", "--work", folder / "work"]
    return subprocess.Popen([*map(str, command), "--output", str(folder)], start_new_session=True)


def test_killed_and_started_again_it_does_only_what_is_missing(tmp_path):
    work, report = tmp_path / "work", tmp_path / "RESULTS.md"
    begin, end = "<!-- study.py: begin -->", "<!-- study.py: end -->\n# a later section\n"
    report.write_text(f"# Measured\n{begin}\nthe last study\n{end}")
    process = start(tmp_path)
    while not list(work.glob("*-seed0-*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # runs in progress and all
    process.wait()
    early = {path: path.stat().st_mtime_ns for path in work.glob("*-seed0-*.json")}
    assert early and start(tmp_path).wait(900) == 0
    results = {path.name[:4]: json.loads(path.read_text()) for path in work.glob("*-seed0-*.json")}
    assert len(results) == 3 and results["rand"]["spent corrections"] >= 32  # its budget
    assert all(path.stat().st_mtime_ns == then for path, then in early.items())
    head, table, tail = report.read_text().partition("| GRPO |")
    assert head.startswith(f"# Measured\n{begin}") and tail.endswith(end) and "last" not in head


def test_groups_and_claims_have_their_arms_and_budgets_agree():
    arms = study.ARMS
    assert {arm.group for arm in arms.values()} == set(study.GROUPS)
    for _, measure, *pair, values in study.CLAIMS:
        assert {pattern.format(value) for pattern in pair for value in values} <= set(arms)
    assert arms["GRPO"].budget == 24 * 256 and arms["scarce GRPO"].budget == 16 * 128


def test_paired_statistics_by_hand():
    pytest.importorskip("scipy")  # in bench/requirements.txt only
    s = study.statistics([0.0, 2.0, 2.0, 4.0, 2.0])  # s^2 = 2, error sqrt(2/5), t = 3.1623
    assert (s["mean"], s["p"]) == pytest.approx((2.0, 0.0341), abs=1e-4)
    wanted = (2.77645 * 0.63246, (2.77645 + 0.94096) * 0.63246)
    assert (s["half"], s["detectable"]) == pytest.approx(wanted, abs=1e-4)
    assert study.statistics([0.0, 0.0])["p"] == 1.0


def test_a_budget_is_spent_along_a_cosine_and_then_the_run_ends():
    def trial_and_error(run, step):
        run.state.samples += 64  # half of them discarded, as DAPO does
        return [], [], {}

    fake = SimpleNamespace(trial_and_error=trial_and_error, self_correction=None)
    config = train.Config(algorithm="grpo", learning_rate=1.0, questions_per_step=4)
    run = SimpleNamespace(config=config, state=SimpleNamespace(stage=1, samples=0, questions=0))
    study.within_budget(fake, study.Arm("budgets", "samples", 256, ""))
    rates = []
    while len(rates) < config.steps:
        _, _, metrics = fake.trial_and_error(run, len(rates) + 1)
        rates.append(round(config.learning_rate, 3))
    assert rates == [1.0, 0.854, 0.5, 0.146] and metrics["spent samples"] == 256
    assert math.isclose(metrics["spent seconds"], 4 * study.PRICES["stage 1"] * 32 / 256)


def corrections(lengths, spans, verdicts):
    samples = [Sample(list(range(n)), [-1.0] * n, "", True) for n in lengths]
    graded = {"samples": samples, "graded": [], "spans": spans, "verdicts": verdicts}
    return Group("q", "a", [7, 7], 0, **graded)


def test_random_tokens_are_as_many_but_not_the_analysis(monkeypatch):
    monkeypatch.setattr(train, "make_examples", train.make_examples)  # put back at the end
    study.random_tokens(train, seed=0)
    group = corrections([93, 60], [(2, 49), None], ["right", "wrong"])
    mask = analysis_mask(group.spans, 93, [True, False])
    one, none = train.make_examples([group], torch.ones(1, 2), [mask], [[47, 0]])
    places = {one.first - 2 + i for i in one.mask.nonzero().flatten().tolist()}  # 2: the prompt
    assert len(places) == 47 and places <= set(range(93)) and not none.mask.any()
    assert 5 < sum(place >= 49 for place in places)  # the corrected solution gets its share


def test_random_success_keeps_each_groups_rate(monkeypatch):
    rows = [["right"] * 4 + ["wrong"] * 4, ["right"] + ["wrong"] * 7] * 90
    groups = [corrections([9] * 8, [(1, 5)] * 8, row) for row in rows]
    monkeypatch.setattr(train, "sample_groups", lambda *_, **__: groups)
    study.random_success(train, seed=0)
    for how in ({"step": 1}, {"span": "sections", "step": 0}):  # answers; an evaluation
        assert [group.verdicts for group in train.sample_groups(**how)] == rows
    dealt = [group.rewards for group in train.sample_groups(span="sections", step=1)]
    assert [sum(rewards) for rewards in dealt] == [4, 1] * 90
    # Of the groups with 4 right, a half stays right, as chance has it.
    assert 0.4 < sum(sum(rewards[:4]) for rewards in dealt[::2]) / (4 * 90) < 0.6
