"""bench/study.py: it goes on where it was killed, its statistics are right, and its controls do what they say."""

import doctest
import fcntl
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
from rollout import Sample

SCRIPT = study.__file__
RUNS = ("vanilla", "GRPO", "ScRPO-samples", "random-tokens")


# ------------------------------------------------------------------------------------------------------------
# The whole of it, small
# ------------------------------------------------------------------------------------------------------------
def start(folder):
    command = [sys.executable, SCRIPT, "--smoke", "--work", str(folder / "work"), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def test_killed_and_started_again_it_does_only_what_is_missing(tmp_path):
    (tmp_path / "RESULTS.md").write_text("# Measured\n\n## another section\n")
    results = [tmp_path / "work" / f"{name}-seed0-smoke.json" for name in RUNS]
    process = start(tmp_path)
    while not any(path.exists() for path in results):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # runs in progress and all
    process.communicate()
    early = {path: path.stat().st_mtime_ns for path in results if path.exists()}
    finish(start(tmp_path))
    assert all(path.exists() for path in results)
    assert all(path.stat().st_mtime_ns == then for path, then in early.items())
    assert not list((tmp_path / "work").glob("tmp-*"))

    table = (tmp_path / "RESULTS.md").read_text()
    assert table.startswith("# Measured\n\n## another section\n") and "| GRPO |" in table
    assert (tmp_path / "study.png").stat().st_size > 5000

    # A run done twice gives the same numbers, and the section takes its own place and no other.
    then = json.loads(results[-1].read_text())
    results[-1].unlink()
    with (tmp_path / "RESULTS.md").open("a") as file:
        file.write("## a later section\n")
    assert "1 of 1: random tokens" in finish(start(tmp_path))
    assert (tmp_path / "RESULTS.md").read_text() == table + "## a later section\n"
    again = json.loads(results[-1].read_text())
    assert all(again[name] == then[name] for name in (*study.MEASURES, "entropy", "tokens", "spent", "arm"))
    assert then["spent"]["corrections"] >= 32  # its budget


def test_every_table_has_its_arms_and_the_budgets_agree():
    arms = study.make_arms()
    for group, _, rows, pairs in study.make_tables(arms):
        assert group in study.SEEDS and set(rows) <= set(arms)
        assert {name for pair in pairs for name in pair} <= set(rows)
    assert arms["GRPO"].budget == 24 * 256 and arms["ScRPO, questions"].budget == 24 * 32
    assert math.isclose(arms["ScRPO, seconds"].budget, 24 * study.prices()["stage 1"])
    assert arms["scarce GRPO"].budget == 16 * 128


def test_a_changed_arm_is_run_again(tmp_path):
    options, arm = SimpleNamespace(work=tmp_path, smoke=False, train_flags=""), study.Arm("samples", 10)
    study.write_whole(study.result_file(options, "x", 0), {"accuracy": 1.0, **study.definition(arm, options)})
    assert study.load(options, "x", arm, 0)["accuracy"] == 1.0
    assert study.load(options, "x", study.Arm("samples", 11), 0) is None
    assert study.load(options, "x", arm, 1) is None


@pytest.mark.parametrize("flags, said", [
    (["--jobs", "0"], "--jobs 0: must be at least 1"),
    (["--seeds", "0"], "--seeds 0: must be at least 1"),
    (["--only", "everything"], "--only: invalid choice: 'everything'"),
    ([], "another study works in"),
])  # fmt: skip
def test_bad_flags_and_a_second_study_end_with_one_line(flags, said, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, SCRIPT, "--work", str(tmp_path), "--output", str(tmp_path / "new"), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------
def test_the_worked_examples_in_docstrings():
    assert doctest.testmod(study).failed == 0


@pytest.mark.parametrize("p, df, t", [  # from printed tables
    (0.975, 3, 3.182), (0.975, 7, 2.365), (0.975, 9, 2.262), (0.8, 4, 0.941), (0.8, 7, 0.896), (0.995, 30, 2.750),
])  # fmt: skip
def test_students_t(p, df, t):
    assert abs(study.t_quantile(p, df) - t) < 6e-4
    assert abs(study.t_cdf(-t, df) - (1 - p)) < 1e-4


def test_paired_statistics_by_hand():
    # mean 2, s^2 = (4 + 0 + 0 + 4 + 0) / 4 = 2, standard error sqrt(2/5) = 0.63246, t = 3.1623
    s = study.statistics([0.0, 2.0, 2.0, 4.0, 2.0])
    assert math.isclose(s["mean"], 2.0)
    assert abs(s["half"] - 2.77645 * 0.63246) < 1e-4
    assert abs(s["detectable"] - (2.77645 + 0.94096) * 0.63246) < 1e-4
    assert abs(s["p"] - 0.0341) < 1e-4
    assert study.statistics([0.0, 0.0])["p"] == 1.0 and math.isnan(study.statistics([1.0])["half"])


# ------------------------------------------------------------------------------------------------------------
# Budgets and controls
# ------------------------------------------------------------------------------------------------------------
def test_a_budget_is_spent_along_a_cosine_and_then_the_run_ends():
    def trial_and_error(run, step):
        run.state.samples += 64  # half of them discarded, as DAPO does
        run.state.questions += 8
        return [], [], {}

    fake = SimpleNamespace(trial_and_error=trial_and_error, self_correction=None)
    config = SimpleNamespace(learning_rate=1.0, steps=99, algorithm="grpo", questions_per_step=4, group_size=8)
    run = SimpleNamespace(config=config, state=SimpleNamespace(stage=1, samples=0, questions=0))
    study.within_budget(fake, study.Arm("samples", 256), {"stage 1": 2.0})
    rates, step = [], 0
    while step < config.steps:
        step += 1
        _, _, metrics = fake.trial_and_error(run, step)
        rates.append(round(config.learning_rate, 3))
    assert rates == [1.0, 0.854, 0.5, 0.146] and step == 4
    assert metrics["spent"] == {"samples": 256, "questions": 32, "corrections": 0, "steps": 4, "stage2_steps": 0,
                                "seconds": 4 * 2.0 * 32 / 256}  # fmt: skip


def corrections(lengths, spans, verdicts):
    samples = [Sample(list(range(n)), [-1.0] * n, "", True) for n in lengths]
    return train.Group("q", "a", [7, 7], samples, list(verdicts), spans)


def test_random_tokens_are_as_many_but_not_the_analysis(monkeypatch):
    monkeypatch.setattr(train, "make_examples", train.make_examples)  # put back afterwards
    study.random_tokens(train, seed=0)
    lengths, spans = [93, 90, 60, 80], [(2, 49), (2, 40), None, (2, 50)]
    group = corrections(lengths, spans, ["right", "right", "wrong", "wrong"])
    mask = analysis_mask(spans, 93, [True, True, False, False])
    examples = train.make_examples([group], torch.ones(1, 4), [mask], [[47, 38, 0, 48]])
    assert [int(e.mask.sum()) for e in examples] == [47, 38, 0, 0]
    for e, n, (start, end) in zip(examples[:2], lengths, spans):
        places = {e.first - 2 + i for i in e.mask.nonzero().flatten().tolist()}  # 2: the prompt
        assert places <= set(range(n)) and places != set(range(start, end))
        assert 5 < sum(place >= end for place in places)  # the corrected solution gets its share
    whole = [[torch.ones(n, dtype=torch.bool) for n in lengths]]
    assert all(e.mask.all() for e in train.make_examples([group], torch.ones(1, 4), whole, [lengths]))


def test_random_success_keeps_each_groups_rate(monkeypatch):
    verdicts = [["right"] * k + ["wrong"] * (8 - k) for k in range(9)] * 20

    def graded(run, tasks, samples, stage):
        return [corrections([9] * 8, [(1, 5)] * 8, row) for row in verdicts]

    monkeypatch.setattr(train, "grade_samples", graded)
    study.random_success(train, seed=0)
    groups = train.grade_samples(None, None, None, stage=2)
    assert [sum(g.rewards) for g in groups] == [row.count("right") for row in verdicts]
    # Of groups with 4 right, the share that stays right is a half, as chance has it.
    stayed = [g.rewards[i] for g, row in zip(groups, verdicts) if row.count("right") == 4 for i in range(4)]
    assert 0.3 < sum(stayed) / len(stayed) < 0.7
    assert [g.verdicts for g in train.grade_samples(None, None, None, stage=1)] == verdicts
