"""The patches in forks/: each applies to this very code, is small, and does what it says."""

import json
import re
import shutil
import subprocess
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from conftest import PATIENCE, ROOT, TOY, Patient

PATCHES = list((ROOT / "forks").glob("*.patch"))
FLAGS = ("--questions_per_step 8 --pool_trigger 8 --steps 6 --eval_questions 0 --schedule constant "
         "--train_data").split()  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(patch or None, questions) -> (what each update was given, metrics)."""
    grader = Patient(workers=1, deadline=PATIENCE)

    @cache
    def train(patch, questions):
        folder = tmp_path_factory.mktemp("fork")
        shutil.copy(ROOT / "train.py", folder)
        (folder / "toy").symlink_to(TOY)
        if patch:
            command = ["git", "apply", ROOT / "forks" / f"{patch}.patch"]
            subprocess.run(command, cwd=folder, check=True)
        spec = spec_from_file_location("fork", folder / "train.py")
        fork = module_from_spec(spec)
        spec.loader.exec_module(fork)
        update, log = fork.update, []

        def seen(policy, reference, optimizer, config, step, groups, examples):
            rows = [{"group": e.group, "advantage": e.advantage, "tokens": int(e.mask.sum()),
                     "counted": e.counted, "drawn": (e.ids, e.engine_logp)}
                    for e in examples]  # fmt: skip
            log.append({"step": step, "reduction": config.reduction, "examples": rows})
            return update(policy, reference, optimizer, config, step, groups, examples)

        fork.update, fork.Grader = seen, lambda: grader
        lines = (TOY / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "few.jsonl").write_text("".join(lines[:questions]))
        fork.main([*FLAGS, f"{folder}/few.jsonl", "--output_dir", f"{folder}/out"])
        metrics = (folder / "out/metrics.jsonl").read_text().splitlines()[1:]
        return log, [json.loads(line) for line in metrics]

    yield train
    grader.close()


def dr_grpo(log, metrics):
    """Stage 1 by Dr. GRPO: its reduction, and R minus the mean of 8; stage 2 as it was."""
    stages = [metrics[u["step"] - 1]["stage"] for u in log]
    used = {(stage, u["reduction"]) for stage, u in zip(stages, log)}
    first = [e for stage, u in zip(stages, log) for e in u["examples"] if stage == 1]
    eighths = all(8 * e["advantage"] % 1 == 0 for e in first)
    return eighths and used == {(1, "dr_grpo"), (2, "grpo")}


def joint_training(log, metrics):
    """Answers and corrections in each optimizer step of one update; failed corrections count."""
    both = all(None not in (m["accuracy"], m["correction_success"]) for m in metrics)
    failed = False
    for u in log:
        corrections = [e for e in u["examples"] if e["group"] % 2]
        halves = {e["group"] < len(u["examples"]) / 16 for e in corrections}
        both &= len(u["examples"]) > 64 and halves == {True, False}
        failed |= any(e["advantage"] < 0 and e["tokens"] for e in corrections)
    return both and failed


def reflect_retry_reward(log, metrics):
    """Only reflections are trained on, of either sign; a well-formed one costs one sample more."""
    drawn = [0, *(m["samples"] for m in metrics)]
    extra = sum(after - before - 64 for before, after, m in zip(drawn, drawn[1:], metrics)
                if m["stage"] == 2)  # fmt: skip
    reflections = [e for u in log for e in u["examples"]]
    return (log and all(metrics[u["step"] - 1]["stage"] == 2 for u in log)
            and 0 < extra == sum(e["counted"] > 0 for e in reflections)
            and any(e["advantage"] < 0 and e["tokens"] for e in reflections))  # fmt: skip


def success_replay(log, metrics):
    """Of 8 questions, all asked in every step, right responses drawn with other weights return."""
    seen, replayed = [], []
    for u in log:
        replayed += [e for e in u["examples"] if e["drawn"] in seen]
        seen += [e["drawn"] for e in u["examples"]]
    return replayed and all(e["advantage"] > 0 for e in replayed if e["advantage"])


def refinements_in_group(log, metrics):
    """No stage 2; corrections are drawn, and some stand in the groups as right responses."""
    more = metrics[-1]["samples"] > 64 * len(metrics)
    full = all(len(u["examples"]) == 64 for u in log)
    return more and full and {m["stage"] for m in metrics} == {1}


CLAIMS = {  # and how many questions it needs
    "dr_grpo": (dr_grpo, 400),
    "joint_training": (joint_training, 400),
    "reflect_retry_reward": (reflect_retry_reward, 400),
    "success_replay": (success_replay, 8),
    "refinements_in_group": (refinements_in_group, 400),
}


def test_every_patch_has_a_claim_and_changes_at_most_40_lines_of_two_files():
    assert {patch.stem for patch in PATCHES} == CLAIMS.keys()
    for patch in PATCHES:
        text = patch.read_text(encoding="utf-8")
        assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.M)) <= 40, patch
        assert len(re.findall(r"^\+\+\+ ", text, re.M)) <= 2, patch


@pytest.mark.parametrize("name", CLAIMS)
def test_a_fork_does_what_it_says_and_the_original_does_not(name, trained):
    claim, questions = CLAIMS[name]
    assert claim(*trained(name, questions))
    assert not claim(*trained(None, questions))
