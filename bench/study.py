"""A miniature study of ScRPO on the toy: does it help, and what teaches what? See STUDY.md.

    pip install -r bench/requirements.txt
    python bench/study.py                          # runs what bench/study.csv does not have yet
    python bench/study.py --groups mechanism       # this group only
    python bench/study.py --groups --output bench  # no runs: CSV, tables and pictures into bench/

1. An *arm* is a method under a budget: a policy, flags of train.py, and perhaps other tokens that
   get the credit. Each run of an arm at a seed is a process of its own that calls train.main; its
   result is a file in the work folder, and with --output bench a line of bench/study.csv. Kill the
   study at any time: the same command continues, and loses at most the runs in progress (a minute).
   Delete study.csv and the work folder to run everything again.
2. Budgets are spent, not planned: both stages are wrapped so that they count samples, stage-1
   questions, corrections or seconds. The learning rate falls as a cosine of the share spent, and
   the run ends when all is spent. A constant rate would let one run serve all budgets, but accuracy
   then jumps by 0.2 between steps; numbers of steps cannot be fixed, because DAPO's samples and
   ScRPO's questions a step are known only when drawn.
3. The same seed means the same policy, the same order of questions and the same seeds of samples in
   every arm, so tests are paired over seeds 0, 1, ..., n-1. The budget was chosen by GRPO alone at
   seed 100.
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
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # the last bit of a sum, and so a sample, depends on it

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from tqdm import tqdm  # noqa: E402

import reward  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from toy import make_toy  # noqa: E402

TABLE = ROOT / "bench/study.csv"  # every run's settings and measures
GROUPS = {
    "budgets": "Equal samples, equal stage-1 questions, or equal seconds",
    "mechanism": "Stage 2 alone: three kinds of analysis, by which tokens get the credit",
    "remedy": "Stage 2 alone: no credit to what the analysis quotes",
    "methods": "Both stages, by kind of analysis",
    "long": "Stage 2 alone, as long as the first look: 60 steps of 256 corrections",
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
MEASURES = [SOLVED, CORRECTED, OWN, SPOILED]
CALLED_WRONG = "wrong steps called wrong"
CALLED_RIGHT = "right steps called right"
WELL_FORMED = "well-formed"
RIGHT = "log p, right value in solution"
MISCONCEIVED = "log p, misconceived value in solution"
FIXED = 300  # errors of the untrained policy, on held-out problems
AT_RISK = 200  # right answers that the policy is asked to correct
PROBED = 100  # of the fixed errors: log p of the values, and gradients
COLUMNS = "wrong steps|right steps|well-formed|log p|cosine|spent"  # kept beside MEASURES
UNITS = ("samples", "questions", "seconds")  # questions of stage 1
CORRECTIONS = 24 * 128  # of a run with stage 2 alone
PRINTED = "printed"  # in place of a run's settings: the accuracy that the first edition printed
QUOTE = 8  # tokens of a common span, at least, that are a quote; a step of the toy has 11


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

    half = "--questions_per_step 16 --group_size 8 --pool_trigger 16"
    # Every wrong response is kept, so that the untrained stage 1 costs few rollouts.
    alone = f"{half} --train_stages 2 --errors_per_question 8 --eval_questions 500"
    stage2 = (  # (group, name, flags, fork)
        ("mechanism", "analysis", "", ""),
        ("mechanism", "all tokens", " --credit response", ""),
        ("mechanism", "corrected solution", "", "corrected solution"),
        ("mechanism", "random tokens", "", "random tokens"),
        ("mechanism", "both signs", " --success_conditioned False", ""),
        ("remedy", "no quotes", "", "no quotes"),
        ("rate", "analysis, 1.25e-4", " --learning_rate 1.25e-4", ""),
        ("rate", "all tokens, 1.25e-4", " --learning_rate 1.25e-4 --credit response", ""),
    )
    for kind in KINDS:
        untrained = Arm("mechanism", "corrections", 0, f"{alone} --steps 0", "", kind, True)
        arms[f"{kind}: vanilla"] = untrained
        for group, name, flags, fork in stage2:
            if (kind, fork) == ("verdict", "no quotes"):  # it quotes nothing
                continue
            arm = Arm(group, "corrections", CORRECTIONS, f"{alone}{flags}", fork, kind, True)
            arms[f"{kind}: {name}"] = arm
        look = f"{size} --train_stages 2 --errors_per_question 8 --eval_questions 500"
        long = Arm("long", "corrections", 60 * 256, look, "", kind, True)
        arms[f"{kind}: analysis, 60 x 256"] = long

    both_stages = (  # (name, unit, flags)
        ("GRPO", "samples", " --algorithm grpo"),
        ("ScRPO, samples", "samples", ""),
        ("ScRPO, questions", "questions", ""),
        ("ScRPO, prefix", "samples", " --analysis_span prefix"),
    )
    for kind in ("quote", "verdict"):
        for name, unit, flags in both_stages:
            arm = Arm("methods", unit, budget[unit], f"{size}{flags}", "", kind, True)
            arms[f"{kind}: {name}"] = arm

    # 16 steps of half the size, a third of the budget, see each of 32 questions 8 times.
    arms["scarce GRPO"] = Arm("scarce", "samples", samples / 3, f"{half} --algorithm grpo")
    for unit in UNITS:
        arms[f"scarce ScRPO, {unit}"] = Arm("scarce", unit, budget[unit] / 3, half)
    return arms


def make_claims() -> list[tuple]:
    """(claim, measure, arm, the arm that is subtracted): the difference that would show it."""
    claims = [
        ("GRPO learns", SOLVED, "GRPO", "vanilla"),
        ("ScRPO learns", SOLVED, "ScRPO, samples", "vanilla"),
    ]
    for claim, measure in (("solves more", SOLVED), ("corrects more errors", CORRECTED)):
        claims += [
            (f"ScRPO {claim} than GRPO, equal samples", measure, "ScRPO, samples", "GRPO"),
            ("... equal questions", measure, "ScRPO, questions", "GRPO"),
            ("... equal questions and samples", measure, "ScRPO, questions", "GRPO, G = 10"),
            ("... equal seconds", measure, "ScRPO, seconds", "GRPO"),
        ]
    claims += [
        ("DAPO solves more than GRPO", SOLVED, "DAPO", "GRPO"),
        ("... equal seconds", SOLVED, "DAPO, seconds", "GRPO"),
        ("the variance filter helps", SOLVED, "ScRPO, samples", "ScRPO without filter"),
    ]
    of_kind = (  # (claim, measure, arm, other) for each kind of analysis
        ("learning to diagnose teaches to solve", SOLVED, "analysis", "vanilla"),
        ("... to correct", CORRECTED, "analysis", "vanilla"),
        ("... to find wrong steps", CALLED_WRONG, "analysis", "vanilla"),
        ("... to pass right steps", CALLED_RIGHT, "analysis", "vanilla"),
        ("... to believe right values", RIGHT, "analysis", "vanilla"),
        ("... to believe misconceived values", MISCONCEIVED, "analysis", "vanilla"),
        ("credit to the analysis beats all tokens", SOLVED, "analysis", "all tokens"),
        ("... the corrected solution", SOLVED, "analysis", "corrected solution"),
        ("... as many random tokens", SOLVED, "analysis", "random tokens"),
        ("... both signs", SOLVED, "analysis", "both signs"),
        ("all tokens teach to solve", SOLVED, "all tokens", "vanilla"),
        ("no credit to quotes is better", SOLVED, "no quotes", "analysis"),
        ("... than no training", SOLVED, "no quotes", "vanilla"),
        ("... with 60 x 256 corrections", SOLVED, "analysis, 60 x 256", "vanilla"),
        ("a quarter of the rate teaches too", SOLVED, "analysis, 1.25e-4", "vanilla"),
        ("ScRPO solves more than GRPO, equal samples", SOLVED, "ScRPO, samples", "GRPO"),
        ("... equal questions", SOLVED, "ScRPO, questions", "GRPO"),
        ("credit before the analysis helps", SOLVED, "ScRPO, prefix", "ScRPO, samples"),
    )
    for kind in KINDS:
        for claim, measure, arm, other in of_kind:
            if f"{kind}: {arm}" in ARMS:
                claims.append((claim, measure, f"{kind}: {arm}", f"{kind}: {other}"))
    for unit in UNITS:
        claim = f"ScRPO solves more with scarce labels, equal {unit}"
        claims.append((claim, SOLVED, f"scarce ScRPO, {unit}", "scarce GRPO"))
    return claims


ARMS = make_arms()
CLAIMS = make_claims()


# ---------------------------------------------------------------------- 2. one run, and its forks


def within_budget(arm: Arm) -> None:
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


def random_tokens(mask, sample, prompt, rng):
    """As many tokens as the mask has, drawn from the whole correction."""
    moved = mask.new_zeros(len(sample.token_ids))
    moved[rng.choice(len(moved), int(mask.sum()), replace=False)] = True
    return moved


def corrected_solution(mask, sample, prompt, rng):
    """Everything after the analysis."""
    moved = mask.new_zeros(len(sample.token_ids))
    moved[sample.analysis[1] :] = True
    return moved


def no_quotes(mask, sample, prompt, rng):
    """The mask without the spans of the analysis that stand in the prompt, in the same order."""
    start, end = sample.analysis
    matcher = difflib.SequenceMatcher(None, sample.token_ids[start:end], prompt, autojunk=False)
    moved = mask.clone()
    for block in matcher.get_matching_blocks():
        if block.size >= QUOTE:
            first = start + block.a
            moved[first : first + block.size] = False
    return moved


FORKS = {
    "random tokens": random_tokens,
    "corrected solution": corrected_solution,
    "no quotes": no_quotes,
}


def redirect_credit(fork: str, seed: int) -> None:
    """The credit of each analysis goes to other tokens of its correction. Stage 1 stays."""
    move = FORKS[fork]
    rng = np.random.default_rng(seed)
    original = train.make_examples

    def make_examples(groups, advantages, masks, denominator_tokens):
        moved = []
        for group, row in zip(groups, masks):
            new = list(row)
            for i, sample in enumerate(group.samples):
                if sample.analysis is not None and row[i].any():
                    new[i] = move(row[i], sample, group.prompt, rng)
            moved.append(new)
        return original(groups, advantages, moved, denominator_tokens)

    train.make_examples = make_examples


class WholeNumbers(ExitStack):
    """A grader of whole numbers, all that the toy answers, without reward.Grader's processes."""

    def verdicts(self, responses, golds, problems=None):
        answers = [reward.final_answer(response) or "" for response in responses]
        right = [answer.lstrip("0") == gold for answer, gold in zip(answers, golds)]
        return ["right" if r else "wrong" for r in right]


def policy_of(arm: Arm, seed: int, work: Path) -> Path:
    """The folder of the policy and its problems that an arm starts from."""
    number = 0
    if arm.two_policies:
        number = seed % 2
    if arm.kind == "recompute" and number == 0:
        return ROOT / "toy"
    return work / f"policies/{arm.kind}-{number}"


def one_run(name: str, seed: int, work: Path) -> None:
    """In a process of its own: trains, measures, writes the result."""
    arm = ARMS[name]
    policy = policy_of(arm, seed, work)
    within_budget(arm)
    if arm.fork:
        redirect_credit(arm.fork, seed)
    reward.Grader = WholeNumbers
    train.evaluate_policy = lambda run: measure(run, arm, work / f"fixed-{policy.name}.json")
    train.summary = lambda run: None  # it would look for train.py's own evaluation
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        data = policy / "train.jsonl"
        if arm.group == "scarce":  # the same 32 questions for all arms at a seed
            lines = data.read_text().splitlines(keepends=True)
            data = Path(folder) / "few.jsonl"
            data.write_text("".join(lines[seed * 32 :][:32]))
        flags = [
            str(ROOT / "configs/toy.yaml"), *BASE.split(), *arm.flags.split(),
            f"--model={policy}", f"--train_data={data}", f"--eval_data={policy}/test.jsonl",
            f"--seed={seed}", f"--output_dir={folder}/run",
        ]  # fmt: skip
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            train.main(flags)
        last = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1])
    if CORRECTED not in last:
        raise RuntimeError(f"{name}, seed {seed}: a signal stopped the run before its end")
    write_whole(result_file(work, name, seed), last)


# ----------------------------------------------------------------------------------- 3. measures


def measure(run, arm: Arm, fixed: Path) -> dict:
    """In place of train.py's evaluation: MEASURES, and what explains them, after training."""
    config = run.config

    def sample(tasks, span=None, seed=config.seed, samples=range(1)):
        return rollout.sample_groups(
            run.engine, run.tokenizer, run.grader, tasks, samples, seed=seed, span=span,
            temperature=config.temperature, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip

    def correct(answers, samples=range(1)):
        tasks = []
        for problem, answer, response, question in answers:
            tasks.append(rollout.correction_task(
                run.tokenizer, problem, answer, response, question, corrects=0
            ))  # fmt: skip
        return sample(tasks, config.analysis_span, samples=samples)

    def finished(groups, wanted):
        """(problem, answer, response, question) of each group whose one sample has this reward."""
        found = []
        for group in groups:
            (only,) = group.samples
            if only.finished and only.reward == wanted:
                found.append((group.problem, group.answer, only.text, group.question))
        return found

    run.engine.update_weights(run.model)
    measured = {}
    if run.state.step == 0 and not fixed.exists():  # the untrained policy, so always the same
        errors = finished(sample(run.eval_tasks, seed=1_000_003), wanted=0)
        write_whole(fixed, errors[:FIXED])
    if run.state.step == config.steps:  # before training all arms are `vanilla`, which has no steps
        answers = sample(run.eval_tasks)
        errors = json.loads(fixed.read_text())
        corrections = correct(errors)
        measured = {
            SOLVED: share_right(answers),
            CORRECTED: share_right(corrections),
            OWN: share_right(correct(finished(answers, wanted=0))),
            SPOILED: 1 - share_right(correct(finished(answers, wanted=1)[:AT_RISK])),
        }
        if arm.two_policies:
            measured |= explain(run, arm.kind, errors, corrections, correct)
    run.engine.sleep()
    return measured


def explain(run, kind: str, errors, corrections, correct) -> dict:
    """What the analyses of these errors say, and what the policy believes of the values there."""
    wrongs = [make_toy.read_steps(problem, response) for problem, _, response, _ in errors]
    measured = what_analyses_say(corrections, wrongs)
    readable = [(error[0], *wrong) for error, wrong in zip(errors, wrongs) if wrong]
    for where in ("solution", "analysis", "corrected solution"):
        if (kind, where) != ("verdict", "analysis"):  # it has no values
            with torch.no_grad():
                values = log_p_of_values(run, readable[:PROBED], kind, where)
            for which, logp in values.items():
                measured[f"log p, {which} value in {where}"] = logp.mean().item()
    if run.config.steps == 0:  # the policy that all arms of this kind start from
        successful = []
        for group, wrong in zip(correct(errors[: PROBED // 2], samples=range(4)), wrongs):
            for sample in group.samples:
                if wrong and sample.reward == 1:
                    successful.append((group.prompt, sample.token_ids, (group.problem, *wrong)))
        measured |= cosines(run, successful[:PROBED], kind)
    return measured


def share_right(groups) -> float:
    """nan where nothing was asked."""
    if not groups:
        return math.nan
    return float(np.mean([group.rewards for group in groups]))


def what_analyses_say(corrections, wrongs: list) -> dict:
    """Shares of wrong and of right steps that are judged rightly, and of corrections in form."""
    called = {True: [], False: []}  # is the step wrong? -> is it judged rightly?
    for group, wrong in zip(corrections, wrongs):
        if wrong:
            for is_wrong, said in make_toy.read_judgements(group.samples[0].text, *wrong):
                called[is_wrong].append(said is is_wrong)
    in_form = [group.samples[0].analysis is not None for group in corrections]
    return {
        CALLED_WRONG: float(np.mean(called[True])),
        CALLED_RIGHT: float(np.mean(called[False])),
        WELL_FORMED: float(np.mean(in_form)),
    }


def log_p(model, rows: list[tuple]):
    """log p of the tokens of each continuation after its prompt, [rows, longest], then zeros."""
    ids = pad_sequence([torch.tensor(prompt + after) for prompt, after in rows], batch_first=True)
    logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)  # the padding comes last
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    parts = []
    for row, (prompt, after) in zip(logp, rows):
        start = len(prompt) - 1
        parts.append(row[start : start + len(after)])
    return pad_sequence(parts, batch_first=True)


def log_p_of_values(run, errors, kind: str, where: str) -> dict:
    """{right or misconceived: log p of this value of the first wrong step, [errors]}; `where` is
    the text that it stands in. errors: (problem, steps, right steps) each."""
    rows = {"right": [], "misconceived": []}
    for problem, steps, truth in errors:
        user_turn, text, *values = make_toy.until_wrong_value(problem, steps, truth, where, kind)
        prompt = rollout.render(run.tokenizer, user_turn) + run.tokenizer.encode(text)
        for which, value in zip(rows, values):
            rows[which].append((prompt, run.tokenizer.encode(value)))
    return {which: log_p(run.model, of_value).sum(1) for which, of_value in rows.items()}


def cosines(run, corrections, kind: str) -> dict:
    """Cosines between two gradients: of log p of some tokens of successful corrections, along which
    credit moves the policy, and of log p of a value in a solution, right or misconceived.

    corrections  (prompt, token ids, (problem, steps, right steps)) each
    """

    def gradient(value):
        parts = torch.autograd.grad(value, list(run.model.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    places = {"analysis of wrong steps": [], "analysis of right steps": [], "solution": []}
    for row, (_, ids, (_, steps, truth)) in enumerate(corrections):
        line = 0  # the analysis' header; its steps are lines 1, 2, ...
        for t, token in enumerate(ids):
            name = "solution"
            if 0 < line <= len(steps):
                name = "analysis of right steps"
                if steps[line - 1][-1] != truth[line - 1][-1]:
                    name = "analysis of wrong steps"
            if line > 0:
                places[name].append((row, t))
            line += run.tokenizer.decode([token]).count("\n")
    logp = log_p(run.model, [(prompt, ids) for prompt, ids, _ in corrections])
    values = log_p_of_values(run, [error for *_, error in corrections], kind, "solution")
    measured = {}
    for which, value in values.items():
        along = gradient(value.sum())
        for name, tokens in places.items():
            sequences, columns = torch.tensor(tokens).T
            credit = gradient(logp[sequences, columns].sum())
            cosine = torch.cosine_similarity(credit, along, dim=0).item()
            measured[f"cosine, {name} and {which} value"] = cosine
    return measured


# ----------------------------------------------------------------------------------- 4. all runs


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


def make_policy(policy: Path) -> None:
    """Trains the policy of this folder, if it is not there: minutes."""
    if policy.exists():
        return
    kind, number = policy.name.split("-")
    part = policy.with_suffix(".part")
    make = [sys.executable, ROOT / "toy/make_toy.py", "--analysis", kind, "--seed", number]
    subprocess.run([*make, "--measure", "300", "--output", part], check=True)
    part.rename(policy)


def run_all(names: list[str], seeds: range, jobs: int, work: Path) -> None:
    """Runs what has no result yet, `jobs` at a time, each in a process of its own."""
    known = results(work)
    known = known[known["settings"] != PRINTED]
    done = set(zip(known["arm"], known["seed"]))
    missing = [(name, seed) for seed in seeds for name in names if (name, seed) not in done]
    for policy in {policy_of(ARMS[name], seed, work) for name, seed in missing}:
        make_policy(policy)
    # A server that has imported everything and has no threads forks a process for each run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__"])
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
        lines = pd.read_csv(TABLE, dtype={"settings": str}).to_dict("records")
    for name in ARMS:
        for file in work.glob(result_file(work, name, 0).name.replace("-seed0-", "-seed*-")):
            line = {"arm": name, "seed": int(re.search(r"-seed(\d+)-", file.name)[1])}
            line["settings"] = settings(name)
            for column, value in json.loads(file.read_text()).items():
                if column in MEASURES or re.match(COLUMNS, column):
                    line[column] = round(value, 6)
            lines.append(line)
    frame = pd.DataFrame(lines, columns=None if lines else ["arm", "seed", "settings"])
    frame = frame[frame["arm"].isin(ARMS.keys())]
    current = frame["settings"] == frame["arm"].map(settings)
    # A run takes the place of what the first edition printed of it.
    frame = pd.concat([frame[frame["settings"] == PRINTED], frame[current]])
    frame = frame.drop_duplicates(["arm", "seed"], keep="last")
    place = {name: i for i, name in enumerate(ARMS)}
    return frame.sort_values(["arm", "seed"], key=lambda column: column.map(place).fillna(column))


# ------------------------------------------------------------------------------------- 5. report


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
    if error > 1e-9:  # else all are the same, but for rounding
        p = stats.ttest_1samp(values, 0).pvalue
    detectable = (t_975 + t_80) * error
    return {"n": n, "mean": mean, "half": t_975 * error, "p": p, "detectable": detectable}


def paired(runs: pd.DataFrame, measure: str, arm: str, other: str) -> pd.Series:
    """The difference at each seed that both arms have."""
    if measure not in runs or not {arm, other} <= set(runs["arm"]):
        return pd.Series(dtype=float)
    by_arm = runs.set_index(["arm", "seed"])[measure]
    return (by_arm[arm] - by_arm[other]).dropna()


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Every claim's arm minus arm, paired by seed."""
    lines = []
    for claim, measure, arm, other in CLAIMS:
        differences = paired(runs, measure, arm, other)
        if differences.empty:
            continue
        s = statistics(differences)
        line = {
            "claim": claim, "difference": f"{arm} − {other}", "of": measure, "seeds": s["n"],
            "mean": f"{s['mean']:+.3f}", "p": s["p"], "detectable": "-", "reading": "one seed",
        }  # fmt: skip
        if s["n"] > 1:
            low = s["mean"] - s["half"]
            high = s["mean"] + s["half"]
            line["mean"] += f" [{low:+.3f}, {high:+.3f}]"
            line["detectable"] = f"{s['detectable']:.3f}"
            line["reading"] = "no difference shown"
        if s["p"] < 0.05:
            line["reading"] = "higher" if s["mean"] > 0 else "lower"
        lines.append(line)
    return pd.DataFrame(lines)


def levels(runs: pd.DataFrame, columns) -> pd.DataFrame:
    """Each arm's means with 95 % intervals, of the columns that hold anything."""

    def interval(values):
        known = values.dropna()
        if known.empty:
            return "-"
        s = statistics(known)
        text = f"{s['mean']:.3f}"
        if s["n"] > 1:
            text += f" ± {s['half']:.3f}"
        if s["n"] < len(values):
            text += f" (n = {s['n']})"
        return text

    by_arm = runs.groupby("arm", sort=False)
    table = pd.DataFrame({"seeds": by_arm.size()})
    for column in columns:
        if runs[column].notna().any():
            table[column] = by_arm[column].agg(interval)
    return table.reset_index()


def spent(runs: pd.DataFrame) -> pd.DataFrame:
    """Means of what each arm spent."""
    names = {f"spent {unit}": f"{unit} spent" for unit in ("steps", "stage-2 steps", *UNITS)}
    means = runs.groupby("arm", sort=False)[list(names)].mean().rename(columns=names)
    return means.map(lambda mean: "-" if math.isnan(mean) else f"{mean:,.4g}").reset_index()


def markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def report(runs: pd.DataFrame, output: Path) -> None:
    """study.csv, the pictures, and this study's section of RESULTS.md, of all that is there."""
    claims = compared(runs)
    if claims.empty:
        sys.exit("error: there are no results to compare yet; name --groups to run")
    readings = claims["reading"].value_counts()
    bound = 0.05 / len(claims)
    summary = (
        f"Of these {len(claims)} comparisons {readings.get('higher', 0)} are higher and "
        f"{readings.get('lower', 0)} lower at p < 0.05 (chance alone: {len(claims) / 20:.1f}), "
        f"{(claims['p'] < bound).sum()} also at Bonferroni's {bound:.5f}."
    )
    claims["p"] = claims["p"].map("{:.4f}".format).replace({"0.0000": "< 0.0001", "nan": "-"})
    section = [f"![{CAPTIONS['study']}](study.png)", markdown(claims), summary]
    section.append(f"![{CAPTIONS['mechanism']}](mechanism.png)")
    columns = pd.Index(runs.columns)
    explaining = columns[columns.str.match("wrong steps|right steps|well-formed|log p")]
    for group, title in GROUPS.items():
        rows = runs[runs["arm"].map(lambda name: ARMS[name].group) == group]
        if rows.empty:
            continue
        section += [f"### {title} (`{group}`)", markdown(levels(rows, MEASURES))]
        if group in ("mechanism", "remedy", "long", "rate"):
            section.append(markdown(levels(rows, explaining)))
        if group == "mechanism":
            untrained = rows[rows["arm"].str.endswith("vanilla")]
            cosines_of = columns[columns.str.startswith("cosine")]
            section += [CAPTIONS["cosines"], markdown(levels(untrained, cosines_of))]
    section += ["### What the arms spent", markdown(spent(runs))]
    absent = [name for name in ARMS if name not in set(runs["arm"])]
    if absent:
        section.append(f"**Not run yet**: {'; '.join(absent)}.")
    write_section(output / "RESULTS.md", "study.py", "\n\n".join(section))
    runs.to_csv(output / "study.csv", index=False)
    draw_all(runs, output)


CAPTIONS = {
    "study": "paired differences of every seed, and their means with 95 % intervals",
    "mechanism": "accuracy and correction by kind of analysis and by who gets the credit",
    "cosines": (
        "Before training: the cosine between two gradients, of log p of some tokens of successful "
        "corrections, along which credit to them moves the policy, and of log p of a value of the "
        "first wrong step in a solution."
    ),
}


def write_section(path: Path, name: str, text: str) -> None:
    """Puts `text` between this script's markers in a Markdown file; all around them stays."""
    begin = f"<!-- {name}: begin -->"
    end = f"<!-- {name}: end -->"
    old = "# Measured\n\n"
    if path.exists():
        old = path.read_text()
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2] or "\n"
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


GRAY = "#7d8590"  # of letters and lines: readable on white and on black
PICTURED = (  # (arm, the arm that is subtracted)
    ("ScRPO, samples", "GRPO"),
    ("ScRPO, questions", "GRPO"),
    ("ScRPO, questions", "GRPO, G = 10"),
    ("ScRPO, seconds", "GRPO"),
)
CREDITS = {  # an arm of each kind of analysis: its colour
    "vanilla": GRAY,
    "analysis": "tab:orange",
    "no quotes": "tab:olive",
    "corrected solution": "tab:blue",
    "all tokens": "tab:green",
    "random tokens": "tab:purple",
    "both signs": "tab:red",
}


def draw(path: Path, columns: dict[str, list[tuple]]) -> None:
    """{title: [(label, values by seed, colour)]} -> a panel each: seeds, mean and 95 % interval.

    900 pixels wide, transparent, with letters of 12 pixels.
    """
    matplotlib.rcParams.update({
        "font.size": 9, "axes.titlesize": 9, "text.color": GRAY, "axes.labelcolor": GRAY,
        "axes.edgecolor": GRAY, "xtick.color": GRAY, "ytick.color": GRAY, "savefig.dpi": 100,
        "savefig.transparent": True, "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip
    labels = [label for label, *_ in next(iter(columns.values()))]
    figure = Figure(figsize=(9, 0.7 + 0.27 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axis, (title, rows) in zip(axes, columns.items()):
        for y, (_, values, color) in enumerate(rows):
            s = statistics(values)
            axis.plot(values, [y + 0.2] * len(values), ".", color=color, ms=4, alpha=0.7)
            half = 0.0
            if s["n"] > 2:  # over two seeds it would be wider than the picture
                half = s["half"]
            axis.errorbar(s["mean"], y - 0.1, xerr=half, fmt="o", color=color, capsize=3)
        axis.axvline(0, color=GRAY)
        axis.set_xlabel(title)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.grid(axis="x", color=GRAY, alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    figure.savefig(path)


def draw_all(runs: pd.DataFrame, output: Path) -> None:
    rows = []
    for arm, other in PICTURED:
        differences = paired(runs, SOLVED, arm, other)
        if len(differences):
            rows.append((f"{arm} − {other}", differences, "tab:orange"))
    draw(output / "study.png", {"difference of held-out accuracy, paired by seed": rows})
    columns = {}
    for measure in (SOLVED, CORRECTED):
        rows = []
        for kind in KINDS:
            for credit, color in CREDITS.items():
                values = runs.loc[runs["arm"] == f"{kind}: {credit}", measure].dropna()
                if len(values):
                    rows.append((f"{kind}: {credit}", values, color))
        columns[f"{measure}, after stage 2 alone"] = rows
    if rows:
        draw(output / "mechanism.png", columns)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), help="of arms to run")
    parser.add_argument("--seeds", type=int, default=8, help="0 .. n-1 of every arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/study", help="folder of results")
    parser.add_argument("--output", type=Path, help="folder of the report; default: --work's")
    options = parser.parse_args()
    work = options.work.resolve()
    (work / "policies").mkdir(parents=True, exist_ok=True)
    names = [name for name in ARMS if ARMS[name].group in options.groups]
    if names:
        run_all(names, range(options.seeds), options.jobs, work)
    report(results(work), options.output or work)


if __name__ == "__main__":
    main()
