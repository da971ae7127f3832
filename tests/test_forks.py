"""The patches in forks/: each applies to this very code, is small, and does what it says.
And what README's table "to change, cut here" names takes effect where it is replaced."""

import copy
import importlib
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

import error_pool
import reward
import rollout

README = (ROOT / "README.md").read_text(encoding="utf-8")
PATCHES = list((ROOT / "forks").glob("*.patch"))
FLAGS = ("--questions_per_step 8 --pool_trigger 8 --steps 6 --eval_questions 0 --schedule constant "
         "--train_data").split()


@dataclass
class Trained:
    """What a run gave to each update, wrote into metrics.jsonl, and drew, by step."""

    config: object
    updates: list[dict] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    answers: dict[int, list] = field(default_factory=dict)  # the groups of stage 1, as drawn
    accuracy: dict[int, float] = field(default_factory=dict)  # of these, before anything else

    def stage(self, update: dict) -> int:
        return self.metrics[update["step"] - 1]["stage"]

    def log_mu(self, step: int) -> list[list[float]]:
        """Of the answers that were drawn in this step: it tells one sample from another."""
        return [sample.logprobs for _, sample in rollout.each_sample(self.answers[step])]

    def replaced(self) -> list[tuple[int, dict]]:
        """(step, example) where stage 1 trained on what it had not drawn in this step."""
        found = []
        for update in self.updates:
            if self.stage(update) == 1:
                drawn = self.log_mu(update["step"])
                found += [(update["step"], e) for e in update["examples"]
                          if e["log_mu"] not in drawn]
        return found


def load_fork(folder, patch):
    """train.py with this patch, as a module of its own."""
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
    """trained(patch or None, questions) -> Trained."""
    grader = Patient(workers=1, deadline=PATIENCE)
    lines = (TOY / "train.jsonl").read_text().splitlines(keepends=True)

    @cache
    def train(patch, questions):
        folder = tmp_path_factory.mktemp("fork")
        fork = load_fork(folder, patch)
        seen = Trained(config=fork.parse([]))
        update = fork.update
        sample_groups = rollout.sample_groups

        def recorded_update(policy, reference, optimizer, config, step, groups, examples):
            rows = []
            for e in examples:
                rows.append({"group": e.group, "advantage": e.advantage, "log_mu": e.engine_logp,
                             "tokens": int(e.mask.sum()), "counted": e.denominator_tokens})
            seen.updates.append({"step": step, "reduction": config.reduction, "examples": rows})
            return update(policy, reference, optimizer, config, step, groups, examples)

        def recorded_samples(*arguments, step, span, **options):
            groups = sample_groups(*arguments, step=step, span=span, **options)
            if span is None and step not in seen.answers:
                seen.answers[step] = copy.deepcopy(groups)
                seen.accuracy[step] = np.mean([group.rewards for group in groups])
            return groups

        (folder / "few.jsonl").write_text("".join(lines[:questions]))
        with pytest.MonkeyPatch.context() as replaced:
            replaced.setattr(fork, "update", recorded_update)
            replaced.setattr(rollout, "sample_groups", recorded_samples)
            replaced.setattr(reward, "Grader", lambda: grader)
            fork.main([*FLAGS, f"{folder}/few.jsonl", "--output_dir", f"{folder}/out"])
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
    """Right responses of earlier steps return in stage 1. In the default run questions do: at
    least every other of its steps is stage 1, for a visit to stage 2 is one step."""
    earlier = True
    for step, example in run.replaced():
        before = [log_mu for s in run.answers if s < step for log_mu in run.log_mu(s)]
        earlier &= example["log_mu"] in before and example["advantage"] >= 0
    config = run.config
    assert config.pool_trigger == config.questions_per_step  # so a visit is one step
    asked = config.steps // 2 * config.questions_per_step
    returns = getattr(config, "train_questions", 6000) <= asked // 2
    return run.replaced() and earlier and returns


def refinements_in_group(run):
    """No stage 2; in each step corrections are drawn, and some stand in a group, as right ones."""
    steps = {step for step, _ in run.replaced()}
    right = all(example["advantage"] >= 0 for _, example in run.replaced())
    full = all(len(update["examples"]) == 64 for update in run.updates)
    more = run.metrics[-1]["samples"] > 64 * len(run.metrics)
    return (more and full and right and steps == {m["step"] for m in run.metrics}
            and {m["stage"] for m in run.metrics} == {1})


CLAIMS = {  # and how many questions it needs
    "dr_grpo": (dr_grpo, 400),
    "joint_training": (joint_training, 400),
    "reflect_retry_reward": (reflect_retry_reward, 400),
    "success_replay": (success_replay, 8),
    "refinements_in_group": (refinements_in_group, 400),
}


def cut_here() -> list[tuple[str, str]]:
    """What README says to replace, as (module, name)."""
    table = README.partition("| cut here |")[2].partition("\n\n")[0]
    return re.findall(r"`(\w+)\.py:([\w.]+)`", table)


def test_what_readme_says_to_replace_takes_effect(launch, tmp_path, monkeypatch):
    """Each is called where it was replaced; a reward and stages of one's own are what is used."""
    called = set()
    names = cut_here()
    for module, name in names:
        owner = importlib.import_module(module)
        *classes, attribute = name.split(".")
        for part in classes:
            owner = getattr(owner, part)

        def recorded(*arguments, original=getattr(owner, attribute), name=name, **options):
            called.add(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, attribute, recorded)
    grade_groups = rollout.grade_groups
    next_stage = error_pool.next_stage
    stages = []

    def generous(grader, tokenizer, groups, span):
        grade_groups(grader, tokenizer, groups, span)
        for _, sample in rollout.each_sample(groups):
            if span is None and sample.verdict == "wrong":
                sample.reward = 0.25

    def in_turn(stage, pool_size, trigger, batch):
        next_stage(stage, pool_size, trigger, batch)
        stages.append(1 + len(stages) % 2)
        return stages[-1]

    monkeypatch.setattr(rollout, "grade_groups", generous)
    monkeypatch.setattr(error_pool, "next_stage", in_turn)
    steps = launch(tmp_path / "run").steps
    assert {"informative", "next_stage", "correction_prompt", "policy_loss", "analysis_mask",
            "group_advantages", "find_correction", "grade_groups"} <= {name for _, name in names}
    assert called == {name for _, name in names}
    assert [line["stage"] for line in steps] == stages
    for line in steps[::2]:
        share = (line["right"] + 0.25 * line["wrong"]) / 16
        assert line["accuracy"] == pytest.approx(share)


def test_every_patch_has_a_claim_and_changes_at_most_40_lines_of_two_files():
    assert {patch.stem for patch in PATCHES} == CLAIMS.keys()
    for patch in PATCHES:
        text = patch.read_text(encoding="utf-8")
        assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.M)) <= 40, patch
        assert len(re.findall(r"^\+\+\+ ", text, re.M)) <= 2, patch


@pytest.mark.parametrize("name", CLAIMS)
def test_a_fork_does_what_it_says_and_the_original_does_not(name, trained):
    claim, questions = CLAIMS[name]
    assert claim(trained(name, questions))
    assert not claim(trained(None, questions))


@pytest.mark.parametrize("name", CLAIMS)
def test_a_forks_accuracy_is_that_of_what_the_policy_itself_drew(name, trained):
    """In step 1 the untouched policy's, then its own: never that of a group made better."""
    run = trained(name, CLAIMS[name][1])
    original = trained(None, CLAIMS[name][1])
    assert run.metrics[0]["accuracy"] == pytest.approx(original.accuracy[1], abs=1e-6)
    for metrics in run.metrics:
        if metrics["stage"] == 1:
            drawn = pytest.approx(run.accuracy[metrics["step"]], abs=1e-6)
            assert metrics["accuracy"] == drawn
            if metrics["correction_success"] is None:  # else corrections are counted with them
                assert metrics["right"] / 64 == drawn
