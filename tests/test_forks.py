"""The patches in forks/: each applies to this very code, is small, and does to a run what it says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATCHES = sorted((ROOT / "forks").glob("*.patch"))
# Runs the train.py of its folder and writes down what each update was given.
DRIVER = """
import functools, json, sys
import train

train.Grader = functools.partial(train.Grader, deadline=600)  # a busy machine must not change a verdict
update, policy_loss, log = train.update, train.policy_loss, []

def seen_update(run, step, groups, examples):
    log.append({"step": step, "stage": run.state.stage, "reductions": [], "examples": [
        {"group": e.group, "advantage": e.advantage, "tokens": int(e.mask.sum()), "counted": e.counted} for e in examples]})
    return update(run, step, groups, examples)

def seen_loss(*tensors, **how):
    log[-1]["reductions"].append(how["reduction"])
    return policy_loss(*tensors, **how)

train.update, train.policy_loss = seen_update, seen_loss
train.main(sys.argv[1:])
print("LOG" + json.dumps(log))
"""
FLAGS = ("--questions_per_step 8 --pool_trigger 8 --steps 5 --eval_questions 0 --schedule constant --grader_workers 1 "
         "--output_dir out").split()  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(patch or None) -> (what each update was given, the lines of metrics.jsonl), each run done once."""
    done = {}

    def train(patch):
        if patch not in done:
            folder = tmp_path_factory.mktemp("fork")
            for file in ROOT.glob("*.py"):
                shutil.copy(file, folder)
            shutil.copytree(ROOT / "toy", folder / "toy")
            if patch:
                subprocess.run(["git", "apply", ROOT / "forks" / f"{patch}.patch"], cwd=folder, check=True)
            (folder / "driver.py").write_text(DRIVER)
            lines = (ROOT / "toy" / "train.jsonl").read_text().splitlines(keepends=True)
            (folder / "few.jsonl").write_text("".join(lines[:400]))
            command = [sys.executable, "driver.py", *FLAGS, "--train_data", "few.jsonl"]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            log = json.loads(run.stdout.partition("LOG")[2])
            done[patch] = log, [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()[1:]]
        return done[patch]

    return train


def dr_grpo(log, metrics):
    """Stage 1 by Dr. GRPO: its reduction, and advantages that are R minus the mean of 8; stage 2 as it was."""
    first, second = ([line for line in log if line["stage"] == stage] for stage in (1, 2))
    eighths = all(8 * e["advantage"] % 1 == 0 for line in first for e in line["examples"])
    return bool(first and second and eighths and {r for line in first for r in line["reductions"]} == {"dr_grpo"}
                and {r for line in second for r in line["reductions"]} == {"grpo"})  # fmt: skip


def joint_training(log, metrics):
    """Answers and corrections in one update, in both of its optimizer steps; failed corrections count against it."""
    sizes = [len(line["examples"]) for line in log]
    corrections = [[e for e in line["examples"] if e["group"] % 2] for line in log]
    return (min(sizes) > 64 and all(m["accuracy"] is not None and m["correction_success"] is not None for m in metrics)
            and any(e["advantage"] < 0 and e["tokens"] for row in corrections for e in row)
            and all({e["group"] < n / 16 for e in row} == {True, False} for n, row in zip(sizes, corrections)))  # fmt: skip


def reflect_retry_reward(log, metrics):
    """Only reflections are trained on, whichever their sign; each that is well-formed costs another sample."""
    drawn = [m["samples"] for m in metrics]
    extra = [after - before - 64 for before, after, m in zip([0, *drawn], drawn, metrics) if m["stage"] == 2]
    reflections = [e for line in log for e in line["examples"]]
    return (bool(log) and all(line["stage"] == 2 for line in log) and all(0 < n <= 64 for n in extra)
            and sum(extra) == sum(e["counted"] > 0 for e in reflections)
            and any(e["advantage"] < 0 and e["tokens"] for e in reflections))  # fmt: skip


CLAIMS = {claim.__name__: claim for claim in (dr_grpo, joint_training, reflect_retry_reward)}


def test_every_patch_has_a_claim():
    assert [patch.stem for patch in PATCHES] == sorted(CLAIMS)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_changes_at_most_40_lines_of_at_most_two_files(patch):
    text = patch.read_text(encoding="utf-8")
    assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.M)) <= 40
    assert len(re.findall(r"^\+\+\+ ", text, re.M)) <= 2


@pytest.mark.parametrize("name", CLAIMS)
def test_a_fork_does_what_it_says_and_the_original_does_not(name, trained):
    assert CLAIMS[name](*trained(name))
    assert not CLAIMS[name](*trained(None))
