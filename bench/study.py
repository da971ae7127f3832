"""A miniature study of ScRPO on the toy: does it help, and what teaches what? See STUDY.md.

    pip install -r bench/requirements.txt
    python bench/study.py                          # runs what bench/study.csv does not have yet
    python bench/study.py --groups mechanism       # this group only
    python bench/study.py --groups --output bench  # no runs: tables, pictures and CSV into bench/

1. An *arm* is a method under a budget: a policy, flags of train.py, and perhaps a fork of a few
   lines. Each run of an arm at a seed is a process of its own that calls train.main; its result is
   one file in the work folder, and one line of study.csv, which says by which settings it was made.
   Kill the study at any time: the same command continues, and loses at most the runs in progress
   (a minute). Delete study.csv and the work folder to run everything again.
2. Budgets are spent, not planned: both stages are wrapped so that they count samples, stage-1
   questions, corrections or seconds. The learning rate falls as a cosine of the share spent, and
   the run ends when all is spent. A constant rate would let one run serve all budgets, but accuracy
   then jumps by 0.2 between steps; numbers of steps cannot be fixed, because DAPO's samples and
   ScRPO's questions a step are known only when drawn.
3. The same seed means the same policy, the same order of questions and the same seeds of samples
   in every arm, so tests are paired over seeds 0, 1, ..., n-1. The budget was chosen by GRPO alone
   at seed 100, and so was stage 2's rate in the group `mechanism`.
"""

import argparse
import difflib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # the last bit of a sum, and so a sample, depends on it
TABLE = ROOT / "bench/study.csv"  # every run's settings and measures
GROUPS = {
    "budgets": "Equal samples, equal stage-1 questions, or equal seconds",
    "mechanism": "Stage 2 alone: three kinds of analysis, by which tokens get the credit",
    "remedy": "Stage 2 alone: the analysis without what it quotes",
    "methods": "Both stages, by kind of analysis",
    "rate": "Stage 2 alone at a quarter of the learning rate",
    "scarce": "Scarce labels: 32 training questions, another 32 at each seed",
}
KINDS = ("recompute", "quote", "verdict")  # of analyses, see toy/make_toy.py
BASE = (
    "--schedule constant --steps 2000 --save_every 100000 --eval_every 0 "
    "--eval_questions 1000 --learning_rate 5e-4"
)
# Seconds of a step of 256 samples with its update, on one core of the machine that the first
# edition was measured on. Charged, not measured, so that the tables do not depend on the machine.
PRICES = {"stage 1": 0.783, "stage 1, dapo": 1.365, "stage 2": 1.783}
SOLVED = "accuracy"
CORRECTED = "fixed errors corrected"
OWN = "own errors corrected"
SPOILED = "right answers spoiled"
CALLED_WRONG = "wrong steps called wrong"
CALLED_RIGHT = "right steps called right"
WELL_FORMED = "well-formed"
RIGHT = "log p, right value in solution"
MISCONCEIVED = "log p, misconceived value in solution"
MEASURES = (SOLVED, CORRECTED, OWN, SPOILED)
FIXED = 300  # errors of the untrained policy, on held-out problems
AT_RISK = 200  # right answers that the policy is asked to correct
PROBED = 100  # of the fixed errors: log p of the values, and gradients
UNITS = ("samples", "questions", "seconds")  # questions of stage 1
MOST_SEEDS = 100
KEPT = (  # beginnings of the names of what study.csv holds
    *MEASURES, CALLED_WRONG, CALLED_RIGHT, WELL_FORMED, "log p, ", "cosine, ", "spent ", "tokens",
)  # fmt: skip


# --------------------------------------------------------------------------- 1. arms and claims


@dataclass(frozen=True)
class Arm:
    group: str
    unit: str  # of the budget: samples, questions (of stage 1), corrections, or seconds
    budget: float
    flags: str  # of train.py; a later one wins
    fork: str = ""  # a name in FORKS
    kind: str = "recompute"  # what the policy's analyses say
    two_policies: bool = False  # even seeds start from the policy of make_toy's seed 0, odd of 1


def make_arms() -> dict[str, Arm]:
    """{name: arm}. GRPO's 24 steps are the measure of all three budgets, so GRPO is run once; DAPO
    pays a sample and a question alike."""
    size = "--questions_per_step 32 --group_size 8 --pool_trigger 32"
    samples = 24 * 256
    questions = 24 * 32
    budget = {"samples": samples, "questions": questions, "seconds": 24 * PRICES["stage 1"]}
    ten = f"{size} --algorithm grpo --group_size 10"
    arms = {
        "vanilla": Arm("budgets", "samples", 0, f"{size} --steps 0"),
        "GRPO": Arm("budgets", "samples", samples, f"{size} --algorithm grpo"),
        "GRPO, G = 10": Arm("budgets", "questions", questions, ten),
        "DAPO": Arm("budgets", "samples", samples, f"{size} --algorithm dapo"),
        "DAPO, seconds": Arm("budgets", "seconds", budget["seconds"], f"{size} --algorithm dapo"),
        "ScRPO without filter": Arm("budgets", "samples", samples, f"{size} --min_variance 0"),
    }
    for unit in UNITS:
        arms[f"ScRPO, {unit}"] = Arm("budgets", unit, budget[unit], size)

    # Every wrong response is kept, so that the untrained stage 1 costs few rollouts.
    half = "--questions_per_step 16 --group_size 8 --pool_trigger 16"
    alone = f"{half} --train_stages 2 --errors_per_question 8 --eval_questions 500"
    for kind in KINDS:
        def stage2(group, flags="", fork="", budget=CORRECTIONS, kind=kind):
            return Arm(group, "corrections", budget, f"{alone}{flags}", fork, kind, True)

        arms[f"{kind}: vanilla"] = stage2("mechanism", " --steps 0", budget=0)
        arms[f"{kind}: analysis"] = stage2("mechanism")
        arms[f"{kind}: all tokens"] = stage2("mechanism", " --credit response")
        arms[f"{kind}: corrected solution"] = stage2("mechanism", fork="corrected solution")
        arms[f"{kind}: random tokens"] = stage2("mechanism", fork="random tokens")
        arms[f"{kind}: both signs"] = stage2("mechanism", " --success_conditioned False")
        arms[f"{kind}: no quotes"] = stage2("remedy", fork="no quotes")
        arms[f"{kind}: analysis, 1.25e-4"] = stage2("rate", " --learning_rate 1.25e-4")
        arms[f"{kind}: all tokens, 1.25e-4"] = stage2(
            "rate", " --learning_rate 1.25e-4 --credit response"
        )

    for kind in ("quote", "verdict"):
        def both(unit, flags, kind=kind):
            return Arm("methods", unit, budget[unit], f"{size}{flags}", "", kind, True)

        arms[f"{kind}: GRPO"] = both("samples", " --algorithm grpo")
        arms[f"{kind}: ScRPO, samples"] = both("samples", "")
        arms[f"{kind}: ScRPO, questions"] = both("questions", "")
        arms[f"{kind}: ScRPO, prefix"] = both("samples", " --analysis_span prefix")

    # 16 steps of half the size, a third of the budget, see each of 32 questions 8 times.
    arms["scarce GRPO"] = Arm("scarce", "samples", samples / 3, f"{half} --algorithm grpo")
    for unit in UNITS:
        arms[f"scarce ScRPO, {unit}"] = Arm("scarce", unit, budget[unit] / 3, half)
    return arms


def make_claims() -> list[tuple]:
    """(claim, measure, arm, the arm that is subtracted); the difference that would show it."""
    claims = [
        ("ScRPO learns", SOLVED, "ScRPO, samples", "vanilla"),
        ("GRPO learns", SOLVED, "GRPO", "vanilla"),
        ("DAPO solves more than GRPO", SOLVED, "DAPO", "GRPO"),
        ("... in equal seconds", SOLVED, "DAPO, seconds", "GRPO"),
        ("the variance filter helps", SOLVED, "ScRPO, samples", "ScRPO without filter"),
    ]
    for claim, measure in (("solves more", SOLVED), ("corrects more errors", CORRECTED)):
        claims += [
            (f"ScRPO {claim} than GRPO: equal samples", measure, "ScRPO, samples", "GRPO"),
            ("... equal questions", measure, "ScRPO, questions", "GRPO"),
            ("... equal questions and samples", measure, "ScRPO, questions", "GRPO, G = 10"),
            ("... equal seconds", measure, "ScRPO, seconds", "GRPO"),
        ]
    for kind in KINDS:
        for measure in (SOLVED, CORRECTED, CALLED_WRONG, CALLED_RIGHT, MISCONCEIVED, RIGHT):
            claims.append(("credit to the analysis raises it", measure, f"{kind}: analysis",
                           f"{kind}: vanilla"))  # fmt: skip
        for credit in ("corrected solution", "all tokens", "random tokens", "both signs"):
            claims.append(("credit to the analysis teaches more than other credit", SOLVED,
                           f"{kind}: analysis", f"{kind}: {credit}"))  # fmt: skip
        for other in ("analysis", "vanilla"):
            claims.append(("no credit to quotes is better", SOLVED, f"{kind}: no quotes",
                           f"{kind}: {other}"))  # fmt: skip
        claims.append(("... at a quarter of the rate", SOLVED, f"{kind}: analysis, 1.25e-4",
                       f"{kind}: vanilla"))  # fmt: skip
    for kind in ("quote", "verdict"):
        for budget in ("samples", "questions"):
            claims.append((f"ScRPO solves more than GRPO: equal {budget}", SOLVED,
                           f"{kind}: ScRPO, {budget}", f"{kind}: GRPO"))  # fmt: skip
        claims.append(("credit before the analysis too helps", SOLVED, f"{kind}: ScRPO, prefix",
                       f"{kind}: ScRPO, samples"))  # fmt: skip
    for unit in UNITS:
        claims.append((f"with scarce labels, equal {unit}: ScRPO solves more than GRPO", SOLVED,
                       f"scarce ScRPO, {unit}", "scarce GRPO"))  # fmt: skip
    return claims


CORRECTIONS = 24 * 128  # of a run with stage 2 alone
ARMS = make_arms()
CLAIMS = make_claims()


# ---------------------------------------------------------------------- 2. one run, and its forks


def within_budget(train, arm: Arm) -> None:
    """Wraps both stages of train.py: they count what they spend, and set rate and end by it."""
    spent = Counter()
    peak = None

    def budgeted(stage):
        def act(run, step):
            nonlocal peak
            config = run.config
            state = run.state
            peak = peak or config.learning_rate
            share = min(1.0, spent[arm.unit] / arm.budget)
            config.learning_rate = peak * 0.5 * (1 + math.cos(math.pi * share))
            samples_before = state.samples
            questions_before = state.questions
            groups, examples, metrics = stage(run, step)
            kind = f"stage {state.stage}"
            if config.algorithm == "dapo":
                kind += ", dapo"
            drawn = state.samples - samples_before  # DAPO's discarded ones too
            spent["steps"] += 1
            spent["samples"] += drawn
            spent["questions"] += state.questions - questions_before
            spent["seconds"] += PRICES[kind] * config.questions_per_step * config.group_size / 256
            if state.stage == 2:
                spent["stage-2 steps"] += 1
                spent["corrections"] += drawn
            if spent[arm.unit] >= arm.budget - 1e-9:
                config.steps = step  # the loop takes this step for its last
            return groups, examples, metrics | {f"spent {name}": spent[name] for name in spent}

        return act

    train.trial_and_error = budgeted(train.trial_and_error)
    train.self_correction = budgeted(train.self_correction)


def random_tokens(mask, span, sample, prompt, rng):
    """As many tokens as the mask has, drawn from the whole correction."""
    moved = mask.new_zeros(len(sample.token_ids))
    moved[rng.choice(len(moved), int(mask.sum()), replace=False)] = True
    return moved


def corrected_solution(mask, span, sample, prompt, rng):
    """Everything after the analysis."""
    moved = mask.new_zeros(len(sample.token_ids))
    moved[span[1] :] = True
    return moved


QUOTE = 8  # tokens of a common span, at least; a toy's step has 11


def no_quotes(mask, span, sample, prompt, rng):
    """The mask without spans of the correction that stand in its prompt too, in this order."""
    start, end = span
    matcher = difflib.SequenceMatcher(None, sample.token_ids[start:end], prompt, autojunk=False)
    moved = mask.clone()
    for block in matcher.get_matching_blocks():
        if block.size >= QUOTE:
            moved[start + block.a : start + block.a + block.size] = False
    return moved


FORKS = {
    "random tokens": random_tokens,
    "corrected solution": corrected_solution,
    "no quotes": no_quotes,
}


def redirect_credit(train, fork: str, seed: int) -> None:
    """The credit of each analysis goes to other tokens of its correction. Stage 1 stays."""
    move = FORKS[fork]
    rng = np.random.default_rng(seed)
    original = train.make_examples

    def make_examples(groups, advantages, masks, counted):
        moved = []
        for group, row in zip(groups, masks):
            new = list(row)
            for i, (mask, sample) in enumerate(zip(row, group.samples)):
                if group.spans[i] is not None and mask.any():
                    new[i] = move(mask, group.spans[i], sample, group.prompt, rng)
            moved.append(new)
        return original(groups, advantages, moved, counted)

    train.make_examples = make_examples


STEP = re.compile(r"Step \d: (\d)\+(\d)\+(\d)=(\d\d)")


@dataclass
class WrongSteps:
    """A wrong solution of the toy in form, beside the right one."""

    problem: str
    response: str
    steps: list[tuple]  # (digit, digit, carry, value) of each, as it stands there
    truth: list[tuple]  # the same of the right solution

    @property
    def differs(self) -> list[bool]:  # a step is wrong if its value is not the right solution's
        return [step[-1] != true[-1] for step, true in zip(self.steps, self.truth)]

    @property
    def first(self) -> int:  # the first wrong step; its digits and carry are still right
        return self.differs.index(True)


def read_steps(problem: str, response: str):
    """WrongSteps; None for a response out of form."""
    from toy.make_toy import solution_text, walk

    x, y = re.search(r"(\d+)\+(\d+)", problem).groups()
    steps = [tuple(map(int, step)) for step in STEP.findall(response)]
    truth = walk(int(x), int(y), lambda place, fact: sum(fact))
    if len(steps) != len(truth) or solution_text(steps) != response or steps == truth:
        return None
    return WrongSteps(problem, response, steps, truth)


def judgements(correction: str, wrong: WrongSteps) -> list[tuple[bool, bool]]:
    """(is the step wrong?, does the analysis say so?) of each step; one not judged is judged wrongly."""
    analysis = correction.partition("Corrected Solution:")[0]
    pairs = []
    for n, differs in enumerate(wrong.differs, 1):
        line = re.search(rf"^Step {n}: (.*)$", analysis, re.MULTILINE)
        said = not differs
        if line:
            said = line[1].endswith("wrong") or " not " in line[1]
        pairs.append((differs, said))
    return pairs


def sites(wrong: WrongSteps, kind: str) -> dict[str, tuple[str, str]]:
    """{where: (user turn, response up to the value of the first wrong step)}."""
    from error_pool import correction_prompt
    from rollout import solution_prompt
    from toy.make_toy import correction_text, solution_text

    step = f"Step {wrong.first + 1}: "

    def until_value(text, start=0):
        return text[: text.index("=", text.index(step, start)) + 1]

    asked = correction_prompt(wrong.problem, wrong.response)
    correction = correction_text(wrong.truth, wrong.steps, kind)
    solution = correction.index("Corrected Solution:")
    found = {
        "solution": (solution_prompt(wrong.problem), until_value(solution_text(wrong.truth))),
        "corrected solution": (asked, until_value(correction, solution)),
    }
    if kind != "verdict":  # whose analyses have no values
        found["analysis"] = (asked, until_value(correction))
    return found


def log_p(model, rows: list[tuple[list[int], list[int]]]):
    """log p of the tokens of each continuation after its prompt, [rows, longest], then zeros."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(prompt + after) for prompt, after in rows], batch_first=True)
    logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)  # the padding comes last
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    parts = []
    for row, (prompt, after) in zip(logp, rows):
        parts.append(row[len(prompt) - 1 : len(prompt) - 1 + len(after)])
    return pad_sequence(parts, batch_first=True)


def value_rows(tokenizer, wrongs: list[WrongSteps], kind: str, where: str, which: str) -> list:
    """Rows for `log_p`: the right or the misconceived value of each first wrong step."""
    from rollout import render

    rows = []
    for wrong in wrongs:
        user_turn, prefix = sites(wrong, kind)[where]
        steps = wrong.truth if which == "right" else wrong.steps
        value = f"{steps[wrong.first][-1]:02d}"
        rows.append((render(tokenizer, user_turn) + tokenizer.encode(prefix), tokenizer.encode(value)))
    return rows


def value_measures(run, wrongs: list[WrongSteps], kind: str) -> dict:
    """Mean log p of the right and of the misconceived value, at each site."""
    import torch

    measured = {}
    for where in sites(wrongs[0], kind):
        for which in ("right", "misconceived"):
            rows = value_rows(run.tokenizer, wrongs, kind, where, which)
            with torch.no_grad():
                mean = log_p(run.model, rows).sum(1).mean().item()
            measured[f"log p, {which} value in {where}"] = mean
    return measured


def gradient(value, model):
    """Of a scalar, over all parameters, as one vector."""
    import torch

    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def cosines(run, corrections: list, kind: str) -> dict:
    """Cosines between the gradient of log p of some tokens of successful corrections, along which
    their credit moves the policy, and that of a value in a solution, right or misconceived.

    corrections  (prompt, token ids, WrongSteps) each
    """
    import torch

    wrongs = [wrong for *_, wrong in corrections]
    values = {}
    for which in ("right", "misconceived"):
        rows = value_rows(run.tokenizer, wrongs, kind, "solution", which)
        values[which] = gradient(log_p(run.model, rows).sum(), run.model)
    credited = log_p(run.model, [(prompt, ids) for prompt, ids, _ in corrections])
    classes = {"analysis of wrong steps": [], "analysis of right steps": [], "solution": []}
    for row, (_, ids, wrong) in enumerate(corrections):
        line = 0  # the analysis' header; its steps are lines 1, 2, ...
        for t, token in enumerate(ids):
            if 0 < line <= len(wrong.steps):
                name = "analysis of wrong steps" if wrong.differs[line - 1] else "analysis of right steps"
                classes[name].append((row, t))
            elif line:
                classes["solution"].append((row, t))
            line += run.tokenizer.decode([token]).count("\n")
    measured = {}
    for name, places in classes.items():
        rows, columns = zip(*places)
        credit = gradient(credited[list(rows), list(columns)].sum(), run.model)
        for which, value in values.items():
            cosine = torch.cosine_similarity(credit, value, dim=0).item()
            measured[f"cosine, {name} and {which} value"] = cosine
    return measured


def measure(run, arm: Arm, fixed: Path) -> dict:
    """In train.py's evaluation's place: MEASURES and what explains them, once training has ended."""
    from evaluate import correction_tasks, records
    from rollout import sample_groups

    config = run.config
    sampling = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}

    def sample(tasks, seed, span=None, samples=range(1)):
        return sample_groups(
            run.engine, run.tokenizer, run.grader, tasks, samples, seed=seed, span=span, **sampling
        )

    def correct(answers, seed=config.seed, samples=range(1)):
        tasks = correction_tasks(
            run.tokenizer, answers, config.max_new_tokens, run.engine.max_context
        )
        return sample(tasks, seed, config.analysis_span, samples)

    def share_right(groups):
        return float(np.mean([group.rewards for group in groups])) if groups else math.nan

    def answered(groups, reward):
        return records([group for group in groups if group.rewards == [reward]])

    run.engine.update_weights(run.model)
    run.model.eval()
    if run.state.step == 0 and not fixed.exists():  # the untrained policy, so always the same
        errors = answered(sample(run.eval_tasks, seed=1_000_003), reward=0)
        write_whole(fixed, [error for error in errors if error["finished"]][:FIXED])
    measured = {}
    if run.state.step == config.steps:  # before training all arms are `vanilla`, which has no steps
        answers = sample(run.eval_tasks, config.seed)
        errors = json.loads(fixed.read_text())
        corrections = correct(errors)
        measured = {
            SOLVED: share_right(answers),
            CORRECTED: share_right(corrections),
            OWN: share_right(correct(answered(answers, reward=0))),
            SPOILED: 1 - share_right(correct(answered(answers, reward=1)[:AT_RISK])),
        }
        if arm.two_policies:
            measured |= explain(run, arm, errors, corrections, correct)
    run.engine.sleep()
    return measured


def explain(run, arm, errors, corrections, correct) -> dict:
    """What the analyses of the fixed errors say, and what the policy believes of their values."""
    wrongs = {}
    for error in errors:
        wrong = read_steps(error["problem"], error["response"])
        if wrong:
            wrongs[error["problem"]] = wrong
    pairs = []
    for group in corrections:
        if group.problem in wrongs:
            pairs += judgements(group.samples[0].text, wrongs[group.problem])
    called = pd.DataFrame(pairs, columns=["is wrong", "said wrong"])
    probed = list(wrongs.values())[:PROBED]
    measured = {
        CALLED_WRONG: float(called["said wrong"][called["is wrong"]].mean()),
        CALLED_RIGHT: float(1 - called["said wrong"][~called["is wrong"]].mean()),
        WELL_FORMED: float(np.mean([group.spans[0] is not None for group in corrections])),
        **value_measures(run, probed, arm.kind),
    }
    if run.config.steps == 0:  # of the untrained policy, along which it would be trained
        successful = []
        for group in correct(errors[: PROBED // 2], samples=range(4)):
            for sample, reward in zip(group.samples, group.rewards):
                if reward == 1 and group.problem in wrongs:
                    successful.append((group.prompt, sample.token_ids, wrongs[group.problem]))
        measured |= cosines(run, successful[:PROBED], arm.kind)
    return measured


class WholeNumbers:
    """A grader of the toy's answers, without the worker processes of reward.Grader."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def verdicts(self, responses, golds, problems=None):
        from reward import final_answer

        answers = [final_answer(response) or "" for response in responses]
        right = [a.isdecimal() and int(a) == int(gold) for a, gold in zip(answers, golds)]
        return ["right" if r else "wrong" for r in right]


def policy_of(arm: Arm, seed: int, work: Path) -> Path:
    """The folder of the policy and its problems that an arm starts from."""
    number = seed % 2 if arm.two_policies else 0
    if (arm.kind, number) == ("recompute", 0):
        return ROOT / "toy"
    return work / f"policies/{arm.kind}-{number}"


def one_run(name: str, seed: int, work: Path) -> None:
    """In a process of its own: trains, measures, writes the result."""
    import train

    arm = ARMS[name]
    policy = policy_of(arm, seed, work)
    fixed = work / f"fixed-errors-{policy.name}.json"
    if arm.fork:
        redirect_credit(train, arm.fork, seed)
    within_budget(train, arm)
    train.Grader = WholeNumbers
    train.evaluate_policy = lambda run: measure(run, arm, fixed)
    train.summary = lambda run: None  # it would look for train.py's own evaluation
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        data = policy / "train.jsonl"
        if arm.group == "scarce":  # the same 32 questions for all arms at a seed
            lines = data.read_text().splitlines(keepends=True)
            data = Path(folder) / "few.jsonl"
            data.write_text("".join(lines[seed * 32 :][:32]))
        flags = [
            *BASE.split(), *arm.flags.split(), f"--model={policy}", f"--train_data={data}",
            f"--eval_data={policy}/test.jsonl", f"--seed={seed}", f"--output_dir={folder}/run",
        ]  # fmt: skip
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            train.main(flags)
        last = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1])
    if CORRECTED not in last:
        raise RuntimeError(f"{name}, seed {seed}: a signal stopped the run before its end")
    write_whole(result_file(work, name, seed), last)


# ----------------------------------------------------------------------------------- 3. all runs


def write_whole(path: Path, value) -> None:
    """JSON, there wholly or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


def settings(name: str) -> str:
    """Of all that a result of this arm depends on, so that a changed arm is run again."""
    return f"{crc32(repr((ARMS[name], BASE, PRICES, FIXED, AT_RISK)).encode()):08x}"


def result_file(work: Path, name: str, seed: int) -> Path:
    return work / f"{re.sub('[^a-zA-Z0-9.]+', '-', name)}-seed{seed}-{settings(name)}.json"


def make_policies(jobs: list[tuple[str, int]], work: Path) -> None:
    """Trains the policies that these runs start from, if they are not there: minutes each."""
    for name, seed in jobs:
        policy = policy_of(ARMS[name], seed, work)
        if policy.exists():
            continue
        part = policy.with_name(f"{policy.name}.part")
        kind, number = policy.name.split("-")
        make = [sys.executable, ROOT / "toy/make_toy.py", "--analysis", kind, "--seed", number]
        subprocess.run([*make, "--measure", "300", "--output", part], check=True)
        part.rename(policy)


def run_all(names: list[str], seeds: range, jobs: int, work: Path) -> None:
    """Runs what has no result yet, `jobs` at a time, each in a process of its own."""
    done = {(row.arm, row.seed) for row in results(work).itertuples()}
    missing = [(name, seed) for seed in seeds for name in names if (name, seed) not in done]
    make_policies(missing, work)
    # A server that has imported everything and has no threads forks a process for each run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "train"])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        runs = [pool.submit(one_run, name, seed, work) for name, seed in missing]
        try:
            for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def results(work: Path) -> pd.DataFrame:
    """A line for each run that is known: those of study.csv, and the files of the work folder."""
    lines = []
    if TABLE.exists():
        for row in pd.read_csv(TABLE, dtype={"settings": str}).to_dict("records"):
            if row["arm"] in ARMS and row["settings"] == settings(row["arm"]):
                lines.append(row)
    for name in ARMS:
        for seed in range(MOST_SEEDS):
            file = result_file(work, name, seed)
            if file.exists():
                measured = json.loads(file.read_text())
                row = {"arm": name, "seed": seed, "settings": settings(name)}
                for column, value in measured.items():
                    if column.startswith(KEPT) and value is not None:
                        row[column] = round(value, 6)
                lines.append(row)
    if not lines:
        return pd.DataFrame(columns=["arm", "seed"])
    frame = pd.DataFrame(lines).drop_duplicates(["arm", "seed"], keep="last")
    order = {name: place for place, name in enumerate(ARMS)}
    return frame.sort_values(["arm", "seed"], key=lambda c: c.map(order).fillna(c))


# ------------------------------------------------------------------------------------- 4. report


def statistics(values) -> dict:
    """Mean, half of the 95 % interval (t), two-sided p of mean 0, and the mean that n values with
    this spread detect with 80 % power at the 5 % level, (t_0.975 + t_0.8) s / sqrt(n)."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = values.mean()
    if n < 2:
        return {"n": n, "mean": mean, "half": math.nan, "p": math.nan, "detectable": math.nan}
    from scipy import stats  # here, since one seed, as in the quick test, does without it

    error = stats.sem(values)
    t_80, t_975 = stats.t.ppf([0.8, 0.975], n - 1)
    p = float(mean == 0)
    if error:
        p = stats.ttest_1samp(values, 0).pvalue
    detectable = (t_975 + t_80) * error
    return {"n": n, "mean": mean, "half": t_975 * error, "p": p, "detectable": detectable}


def markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def interval(values) -> str:
    values = values.dropna()
    if values.empty:
        return "-"
    return "{mean:.3f} ± {half:.3f}".format(**statistics(values))


def levels(runs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Each arm's means and intervals; of what it spent, the means alone."""
    by_arm = runs.groupby("arm", sort=False)
    table = pd.DataFrame({"seeds": by_arm.size()})
    for column in columns:
        if runs.get(column) is not None and runs[column].notna().any():
            table[column] = by_arm[column].agg(interval)
    for unit in ("steps", "stage-2 steps", *UNITS):
        if f"spent {unit}" in runs:  # `vanilla` spends nothing
            spent = by_arm[f"spent {unit}"].mean().fillna(0)
            table[unit] = spent.map("{:,.1f}".format).str.removesuffix(".0")
    return table.reset_index()


def paired(runs: pd.DataFrame, measure: str, arm: str, other: str) -> pd.Series:
    """The difference at each seed that both arms have."""
    if measure not in runs:
        return pd.Series(dtype=float)
    by_seed = runs.pivot(index="seed", columns="arm", values=measure)
    if not {arm, other} <= set(by_seed.columns):
        return pd.Series(dtype=float)
    return (by_seed[arm] - by_seed[other]).dropna()


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Every claim's arm minus arm, paired by seed."""
    lines = []
    for claim, measure, arm, other in CLAIMS:
        differences = paired(runs, measure, arm, other)
        if differences.empty:
            continue
        s = statistics(differences)
        reading = "-"  # one seed has no p
        if s["p"] >= 0.05:
            reading = "no difference shown"
        if s["p"] < 0.05:
            reading = "higher" if s["mean"] > 0 else "lower"
        low = s["mean"] - s["half"]
        high = s["mean"] + s["half"]
        lines.append({
            "claim": claim, "difference": f"{arm} − {other}", "of": measure, "seeds": s["n"],
            "mean": f"{s['mean']:+.3f} [{low:+.3f}, {high:+.3f}]", "p": s["p"],
            "detectable": f"{s['detectable']:.3f}", "reading": reading,
        })  # fmt: skip
    return pd.DataFrame(lines)


def report(runs: pd.DataFrame, output: Path) -> None:
    """study.csv, the pictures, and this study's section of RESULTS.md, of all that is there."""
    claims = compared(runs)
    if claims.empty:
        sys.exit("error: no results to compare yet; run study.py with --groups of arms first")
    readings = claims["reading"].value_counts()
    small = claims["p"] < 0.05 / len(claims)
    summary = (
        f"Of these {len(claims)} comparisons {readings.get('higher', 0)} are higher and "
        f"{readings.get('lower', 0)} lower at p < 0.05 (chance alone: {len(claims) / 20:.1f}), "
        f"{small.sum()} also at Bonferroni's {0.05 / len(claims):.5f}. The columns, and what may "
        "not be concluded: STUDY.md."
    )
    claims["p"] = ["< 0.0001" if p < 1e-4 else f"{p:.4f}" for p in claims["p"]]
    section = [f"![{DIFFERENCES}](study.png)", markdown(claims), summary, f"![{WHO}](mechanism.png)"]
    for group, title in GROUPS.items():
        of_group = runs[runs["arm"].map(lambda name: ARMS[name].group) == group]
        if of_group.empty:
            continue
        section += [f"### {title} (`--groups {group}`)", markdown(levels(of_group, MEASURES))]
        if group in ("mechanism", "remedy"):
            columns = [c for c in runs if c.startswith(("wrong steps", "right steps", "log p"))]
            section += [WHY, markdown(levels(of_group, [WELL_FORMED, *columns]).iloc[:, : 3 + len(columns)])]
        if group == "mechanism":
            columns = [c for c in runs if c.startswith("cosine")]
            vanilla = of_group[of_group["spent steps"].isna()]
            section += [COSINES, markdown(levels(vanilla, columns).iloc[:, : 2 + len(columns)])]
    absent = [name for name in ARMS if name not in set(runs["arm"])]
    if absent:
        section.append(f"Not run yet: {'; '.join(absent)}.")
    write_section(output / "RESULTS.md", "study.py", "\n\n".join(section))
    runs.to_csv(output / "study.csv", index=False)
    draw_differences(runs, output / "study.png")
    draw_mechanism(runs, output / "mechanism.png")


def write_section(path: Path, name: str, text: str) -> None:
    """Puts `text` between this script's markers in a Markdown file; all around them stays."""
    begin = f"<!-- {name}: begin -->"
    end = f"<!-- {name}: end -->"
    before, _, rest = (path.read_text() if path.exists() else "# Measured\n\n").partition(begin)
    after = rest.partition(end)[2] or "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


DIFFERENCES = "paired differences of every seed, and their means with 95 % intervals"
WHO = "accuracy and correction by kind of analysis and by who gets the credit"
WHY = (
    "What the analyses of the fixed errors say, and mean log p of the value of the first wrong step "
    "at three places:"
)
COSINES = (
    "Before training: cosines between the gradient of log p of some tokens of successful "
    "corrections and of a value of the first wrong step in a solution. Credit to the tokens moves "
    "the value along it."
)
GRAY = "#7d8590"  # of letters and lines: readable on white and on black
PICTURED = (  # (label, measure, arm, the arm that is subtracted)
    ("ScRPO − GRPO, equal samples: solved", SOLVED, "ScRPO, samples", "GRPO"),
    ("... equal questions", SOLVED, "ScRPO, questions", "GRPO"),
    ("... equal questions and samples", SOLVED, "ScRPO, questions", "GRPO, G = 10"),
    ("... equal seconds", SOLVED, "ScRPO, seconds", "GRPO"),
    ("ScRPO − GRPO, equal samples: corrected", CORRECTED, "ScRPO, samples", "GRPO"),
    ("... equal questions and samples", CORRECTED, "ScRPO, questions", "GRPO, G = 10"),
    ("analysis − untrained, recompute: solved", SOLVED, "recompute: analysis", "recompute: vanilla"),
    ("... quote", SOLVED, "quote: analysis", "quote: vanilla"),
    ("... verdict", SOLVED, "verdict: analysis", "verdict: vanilla"),
    ("no credit to quotes − analysis, quote: solved", SOLVED, "quote: no quotes", "quote: analysis"),
)
WHAT = {SOLVED: "held-out problems solved", CORRECTED: "errors of the untrained policy corrected"}
COLORS = {
    "vanilla": GRAY, "analysis": "tab:orange", "no quotes": "tab:olive",
    "corrected solution": "tab:blue", "all tokens": "tab:green", "random tokens": "tab:purple",
    "both signs": "tab:red",
}  # fmt: skip
LABELS = {"vanilla": "untrained", "no quotes": "credit: analysis without quotes"}
EXAMPLES = {
    "recompute": "Step 2: 6+9+0=15 not 16",
    "quote": "Step 2: 6+9+0=16 wrong",
    "verdict": "Step 2: wrong",
}


def figure_of(rows: int, height: float, **options):
    """(figure, axes) of 900 pixels' width, transparent, with letters of 12 pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({
        "font.size": 9, "text.color": GRAY, "axes.labelcolor": GRAY, "axes.edgecolor": GRAY,
        "xtick.color": GRAY, "ytick.color": GRAY, "savefig.transparent": True, "savefig.dpi": 100,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
    })  # fmt: skip
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


def draw_differences(runs: pd.DataFrame, path: Path) -> None:
    """Paired differences of PICTURED: every seed, and the mean with its 95 % interval."""
    drawn = []
    for label, measure, arm, other in PICTURED:
        differences = paired(runs, measure, arm, other)
        if len(differences):
            drawn.append((f"{label} (n = {len(differences)})", differences))
    figure, (axis,) = figure_of(1, 0.8 + 0.32 * len(drawn))
    for y, (_, differences) in enumerate(drawn):
        s = statistics(differences)
        axis.plot(differences, [y + 0.18] * len(differences), ".", color=GRAY, ms=4)
        axis.errorbar(s["mean"], y - 0.1, xerr=s["half"], fmt="o", color="tab:orange", capsize=3)
    axis.axvline(0, color=GRAY, lw=1)
    axis.set_yticks(range(len(drawn)), [label for label, _ in drawn])
    axis.invert_yaxis()
    axis.set_xlabel("difference in share, paired by seed; dots: seeds, bars: mean and 95 % interval")
    figure.savefig(path)


def draw_mechanism(runs: pd.DataFrame, path: Path) -> None:
    """What stage 2 alone does to solving and correcting, by kind of analysis; credit by colour."""
    figure, axes = figure_of(2, 5.6, sharex=True)
    for axis, measure in zip(axes, (SOLVED, CORRECTED)):
        axis.set_title(f"{WHAT[measure]}, after stage 2 alone", loc="left")
        axis.set_ylim(0, 1)
        for place, kind in enumerate(KINDS):
            for offset, (credit, color) in enumerate(COLORS.items()):
                values = runs.loc[runs["arm"] == f"{kind}: {credit}", measure]
                if values.empty:
                    continue
                s = statistics(values)
                x = place + 0.12 * (offset - 3)
                axis.plot([x - 0.025] * len(values), values, ".", color=color, ms=3, alpha=0.6)
                label = LABELS.get(credit, f"credit: {credit}")
                axis.errorbar(
                    x + 0.02, s["mean"], np.nan_to_num(s["half"]), fmt="o", color=color, ms=5,
                    capsize=3, label=label if place == 0 else None,
                )  # fmt: skip
    axes[-1].set_xticks(range(len(KINDS)), [f"{kind}\n{EXAMPLES[kind]}" for kind in KINDS])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), help="of arms to run")
    parser.add_argument("--arms", nargs="*", help="run only these arms of the groups")
    parser.add_argument("--seeds", type=int, default=8, help="0 .. n-1 of every arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/study", help="folder of results")
    parser.add_argument("--output", type=Path, help="folder of the report; default: --work's")
    options = parser.parse_args()
    work = options.work.resolve()
    (work / "policies").mkdir(parents=True, exist_ok=True)
    names = [name for name in ARMS if ARMS[name].group in options.groups]
    if options.arms:
        names = options.arms
    run_all(names, range(options.seeds), options.jobs, work)
    report(results(work), options.output or work)


if __name__ == "__main__":
    main()
