"""The patches in forks/: each applies to this very code, is small, and does what it says.
And what README's table "to change, cut here" names takes effect where it is replaced."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, TOY, Patient

import reward
import rollout

PATCHES = list((ROOT / "forks").glob("*.patch"))
QUIET = ["--eval_questions", "0", "--schedule", "constant"]
SMALL = [*QUIET, "--questions_per_step", "8", "--pool_trigger", "8", "--steps", "6"]
DEFAULT = [*QUIET, "--steps", "16"]  # the toy's own sizes, but fewer steps


@dataclass
class Trained:
    """What a run gave to each update, wrote into metrics.jsonl, and drew."""

    updates: list[dict] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    draws: list[dict] = field(default_factory=list)

    def stage(self, update: dict) -> int:
        return self.metrics[update["step"] - 1]["stage"]

    def drawn_accuracy(self, step: int) -> float:
        """Of the answers to this step's questions, as they came from the policy."""
        return next(draw["accuracy"] for draw in self.draws
                    if draw["step"] == step and draw["span"] is None)


def load_fork(folder, patch):
    shutil.copy(ROOT / "train.py", folder)
    for name in ("toy", "configs"):
        (folder / name).symlink_to(ROOT / name)
    if patch:
        command = ["git", "apply", ROOT / "forks" / f"{patch}.patch"]
        subprocess.run(command, cwd=folder, check=True)
    spec = spec_from_file_location("fork", folder / "train.py")
    fork = module_from_spec(spec)
    sys.modules["fork"] = fork  # a dataclass looks itself up there
    spec.loader.exec_module(fork)
    return fork


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(patch or None, default) -> Trained; with `default` the toy's own sizes."""
    grader = Patient(workers=1, deadline=PATIENCE)
    lines = (TOY / "train.jsonl").read_text().splitlines(keepends=True)

    @cache
    def train(patch, default=False):
        folder = tmp_path_factory.mktemp("fork")
        fork = load_fork(folder, patch)
        seen = Trained()
        update = fork.update
        sample_groups = rollout.sample_groups

        def recorded_update(policy, reference, optimizer, config, step, groups, examples):
            rows = []
            for e in examples:
                rows.append({"group": e.group, "advantage": e.advantage,
                             "tokens": int(e.mask.sum()), "counted": e.denominator_tokens,
                             "drawn": (e.ids, e.engine_logp)})
            seen.updates.append({"step": step, "reduction": config.reduction, "examples": rows})
            return update(policy, reference, optimizer, config, step, groups, examples)

        def recorded_samples(*arguments, step, span, **options):
            groups = sample_groups(*arguments, step=step, span=span, **options)
            accuracy = np.mean([group.rewards for group in groups]) if groups else None
            seen.draws.append({"step": step, "span": span, "accuracy": accuracy})
            return groups

        flags = DEFAULT
        if not default:
            (folder / "few.jsonl").write_text("".join(lines[:400]))
            flags = [*SMALL, "--train_data", f"{folder}/few.jsonl"]
        with pytest.MonkeyPatch.context() as replaced:
            replaced.setattr(fork, "update", recorded_update)
            replaced.setattr(rollout, "sample_groups", recorded_samples)
            replaced.setattr(reward, "Grader", lambda: grader)
            fork.main([*flags, "--output_dir", f"{folder}/out"])
        rows = (folder / "out/metrics.jsonl").read_text().splitlines()[1:]
        seen.metrics = [json.loads(row) for row in rows]
        return seen

    yield train
    grader.close()


def dr_grpo(run):
    """Stage 1 by Dr. GRPO: its reduction, and R minus the mean of 8; stage 2 as it was."""
    used = {(run.stage(update), update["reduction"]) for update in run.updates}
    eighths = True
    for update in run.updates:
        if run.stage(update) == 1:
            eighths &= all(8 * e["advantage"] % 1 == 0 for e in update["examples"])
    return eighths and used == {(1, "dr_grpo"), (2, "grpo")}


def joint_training(run):
    """Answers and corrections in each optimizer step of one update; failed corrections count."""
    both = all(None not in (m["accuracy"], m["correction_success"]) for m in run.metrics)
    failed = False
    for update in run.updates:
        examples = update["examples"]
        corrections = [e for e in examples if e["group"] % 2]
        halves = {e["group"] < len(examples) / 16 for e in corrections}
        both &= len(examples) > 64 and halves == {True, False}
        failed |= any(e["advantage"] < 0 and e["tokens"] for e in corrections)
    return both and failed


def reflect_retry_reward(run):
    """Only reflections are trained on, of either sign; a well-formed one costs one sample more."""
    drawn = [0, *(m["samples"] for m in run.metrics)]
    extra = 0
    for before, after, metrics in zip(drawn, drawn[1:], run.metrics):
        if metrics["stage"] == 2:
            extra += after - before - 64
    reflections = [e for update in run.updates for e in update["examples"]]
    return (run.updates and all(run.stage(update) == 2 for update in run.updates)
            and 0 < extra == sum(e["counted"] > 0 for e in reflections)
            and any(e["advantage"] < 0 and e["tokens"] for e in reflections))


def success_replay(run):
    """Right responses that were drawn with other weights return, in stage 1 of a default run."""
    seen = []
    replayed = []
    for update in run.updates:
        again = [e for e in update["examples"] if e["drawn"] in seen]
        if again and run.stage(update) == 2:
            return False
        replayed += again
        seen += [e["drawn"] for e in update["examples"]]
    return replayed and all(e["advantage"] > 0 for e in replayed if e["advantage"])


def refinements_in_group(run):
    """No stage 2; corrections are drawn, and some stand in the groups as right responses."""
    more = run.metrics[-1]["samples"] > 64 * len(run.metrics)
    full = all(len(update["examples"]) == 64 for update in run.updates)
    for update in run.updates:
        positive = sum(e["advantage"] > 0 for e in update["examples"])
        replaced = positive > 64 * run.drawn_accuracy(update["step"])
        more &= replaced
    return more and full and {m["stage"] for m in run.metrics} == {1}


CLAIMS = (dr_grpo, joint_training, reflect_retry_reward, success_replay, refinements_in_group)
NAMES = [claim.__name__ for claim in CLAIMS]


def at_default(name):
    return name == "success_replay"  # it claims something about the default run


def test_every_patch_has_a_claim_and_changes_at_most_40_lines_of_two_files():
    assert sorted(patch.stem for patch in PATCHES) == sorted(NAMES)
    for patch in PATCHES:
        text = patch.read_text(encoding="utf-8")
        assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.M)) <= 40, patch
        assert len(re.findall(r"^\+\+\+ ", text, re.M)) <= 2, patch


@pytest.mark.parametrize("claim", CLAIMS, ids=NAMES)
def test_a_fork_does_what_it_says_and_the_original_does_not(claim, trained):
    default = at_default(claim.__name__)
    assert claim(trained(claim.__name__, default))
    assert not claim(trained(None, default))


@pytest.mark.parametrize("name", NAMES)
def test_a_forks_accuracy_is_that_of_what_the_policy_itself_drew(name, trained):
    """In step 1 the untouched policy's, then its own: never that of a group made better."""
    run = trained(name, at_default(name))
    original = trained(None, at_default(name))
    assert run.metrics[0]["accuracy"] == original.metrics[0]["accuracy"]
    for metrics in run.metrics:
        if metrics["stage"] == 1:
            drawn = run.drawn_accuracy(metrics["step"])
            assert metrics["accuracy"] == pytest.approx(drawn, abs=1e-6)
            share = metrics["right"] / (metrics["right"] + metrics["wrong"])
            if metrics["correction_success"] is None:
                assert share == pytest.approx(drawn, abs=1e-6)
