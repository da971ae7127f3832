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
import json, sys
import train

update, log = train.update, []

def seen(policy, reference, optimizer, config, step, groups, examples):
    rows = [{"group": e.group, "advantage": e.advantage, "tokens": int(e.mask.sum()),
             "counted": e.counted, "drawn": [e.ids, e.engine_logp]} for e in examples]
    log.append({"step": step, "reduction": config.reduction, "examples": rows})
    return update(policy, reference, optimizer, config, step, groups, examples)

train.update = seen
train.main(sys.argv[1:])
json.dump(log, open("log.json", "w"))
"""
FLAGS = ("--questions_per_step 8 --pool_trigger 8 --steps 6 --eval_questions 0 --schedule constant "
         "--train_data few.jsonl --output_dir out").split()  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(patch or None, questions) -> (what each update was given, metrics), each run done once."""
    done = {}

    def train(patch, questions):
        if (patch, questions) not in done:
            folder = tmp_path_factory.mktemp("fork")
            for file in ROOT.glob("*.py"):
                shutil.copy(file, folder)
            shutil.copytree(ROOT / "toy", folder / "toy")
            if patch:
                command = ["git", "apply", ROOT / "forks" / f"{patch}.patch"]
                subprocess.run(command, cwd=folder, check=True)
            (folder / "driver.py").write_text(DRIVER)
            lines = (ROOT / "toy/train.jsonl").read_text().splitlines(keepends=True)
            (folder / "few.jsonl").write_text("".join(lines[:questions]))
            command = [sys.executable, "driver.py", *FLAGS]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            metrics = (folder / "out/metrics.jsonl").read_text().splitlines()[1:]
            log = json.loads((folder / "log.json").read_text())
            done[patch, questions] = log, [json.loads(line) for line in metrics]
        return done[patch, questions]

    return train


def dr_grpo(log, metrics):
    """Stage 1 by Dr. GRPO: its reduction, and advantages that are R minus the mean of 8; stage 2 as is."""
    first, second = ([u for u in log if metrics[u["step"] - 1]["stage"] == stage] for stage in (1, 2))
    eighths = all(8 * e["advantage"] % 1 == 0 for u in first for e in u["examples"])
    return (first and second and eighths and {u["reduction"] for u in first} == {"dr_grpo"}
            and {u["reduction"] for u in second} == {"grpo"})  # fmt: skip


def joint_training(log, metrics):
    """Answers and corrections in one update, in both of its optimizer steps; failed corrections count."""
    corrections = [[e for e in u["examples"] if e["group"] % 2] for u in log]
    halves = [{e["group"] < len(u["examples"]) / 16 for e in row} for u, row in zip(log, corrections)]
    return (min(len(u["examples"]) for u in log) > 64 and all(half == {True, False} for half in halves)
            and all(None not in (m["accuracy"], m["correction_success"]) for m in metrics)
            and any(e["advantage"] < 0 and e["tokens"] for row in corrections for e in row))  # fmt: skip


def reflect_retry_reward(log, metrics):
    """Only reflections are trained on, whichever their sign; each well-formed one costs one sample more."""
    drawn = [m["samples"] for m in metrics]
    steps = zip([0, *drawn], drawn, metrics)
    extra = [after - before - 64 for before, after, m in steps if m["stage"] == 2]
    reflections = [e for u in log for e in u["examples"]]
    return (log and all(metrics[u["step"] - 1]["stage"] == 2 for u in log)
            and 0 < sum(extra) == sum(e["counted"] > 0 for e in reflections)
            and any(e["advantage"] < 0 and e["tokens"] for e in reflections))  # fmt: skip


def success_replay(log, metrics):
    """With 8 questions, each is asked in every step: right responses of earlier ones, drawn with other
    weights, come back."""
    seen, replayed = [], []
    for u in log:
        replayed += [e for e in u["examples"] if e["drawn"] in seen]
        seen += [e["drawn"] for e in u["examples"]]
    return replayed and all(e["advantage"] > 0 for e in replayed if e["advantage"])


def refinements_in_group(log, metrics):
    """No stage 2; samples are drawn for corrections, and some stand in the groups as right responses."""
    more = metrics[-1]["samples"] > 64 * len(metrics)
    stages = {m["stage"] for m in metrics}
    sizes = {len(u["examples"]) for u in log}
    return stages == {1} and sizes == {64} and more


CLAIMS = {"dr_grpo": (dr_grpo, 400), "joint_training": (joint_training, 400),
          "reflect_retry_reward": (reflect_retry_reward, 400), "success_replay": (success_replay, 8),
          "refinements_in_group": (refinements_in_group, 400)}  # fmt: skip


def test_every_patch_has_a_claim():
    assert [patch.stem for patch in PATCHES] == sorted(CLAIMS)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_changes_at_most_40_lines_of_at_most_two_files(patch):
    text = patch.read_text(encoding="utf-8")
    assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.M)) <= 40
    assert len(re.findall(r"^\+\+\+ ", text, re.M)) <= 2


@pytest.mark.parametrize("name", CLAIMS)
def test_a_fork_does_what_it_says_and_the_original_does_not(name, trained):
    claim, questions = CLAIMS[name]
    assert claim(*trained(name, questions))
    assert not claim(*trained(None, questions))
