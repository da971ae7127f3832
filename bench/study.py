"""A miniature study of ScRPO on the embedded toy: does it help, by how much, and which part of it does?

    python bench/study.py                    # the core: what is missing in runs/study is run, then its RESULTS.md written
    python bench/study.py --only scarce      # one group of it: budgets, stage2, scarce or hard
    python bench/study.py --full             # the sweeps too: groups rates and pool
    python bench/study.py --report           # only tables and figure, from the runs that are there
    python bench/study.py --full --output bench           # publish: the same section in bench/RESULTS.md, and its figures
    python bench/study.py --time             # measure bench/seconds_per_step.json again, on an idle machine

1. An *arm* is a method under a budget: flags of train.py, and perhaps a fork of a few lines (section 2). Each run of an
   arm at a seed is a process of its own that calls train.main; its result is one JSON file, written whole or not at
   all. Kill the study at any time; the same command goes on, and loses at most the runs in progress (half a minute). A
   result is used again where its flags are the same: delete runs/study after a change of what train.py computes.
2. Budgets are spent, not planned: a fork of both stages counts samples, stage-1 questions, corrections or seconds, lets
   the learning rate fall as a cosine of the share spent, and ends the run when all is spent. So every method reaches
   rate 0 just as its own budget ends. Not a constant rate, under which one run would serve all budgets: the toy's
   accuracy then jumps by 0.2 between steps, and noise of that size hides any difference between methods. Not fixed
   numbers of steps: DAPO's samples and ScRPO's questions a step are known only when they are drawn.
3. Seconds are steps times bench/seconds_per_step.json, measured once, so that the tables do not depend on the machine.
4. The same seed means the same order of questions and the same seeds of samples in every arm, so tests are paired over
   seeds. Beside each stands the difference that it would have detected with 80 % power. Seeds are 0, 1, ..., n-1; the
   budget was chosen by looking at GRPO alone at seed 100 (0.88 after 24 steps: learned much, no ceiling).
5. With a GPU the same commands run there, since train.py finds it; --train_flags "--model ... --train_data ...
   --eval_data ..." puts a larger policy in the toy's place. That was not tried: there was no GPU.
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SECONDS = BENCH / "seconds_per_step.json"
BASE = ("--schedule constant --rollout auto --steps 2000 --save_every 100000 --eval_every 0 --samples_per_step 0 "
        "--grader_workers 1 --learning_rate 5e-4")  # fmt: skip
SEEDS = {"budgets": 8, "stage2": 8, "scarce": 8, "hard": 8, "rates": 8, "pool": 8, "smoke": 1}  # of each group
CORE = ("budgets", "stage2", "scarce", "hard")
HARD = ("--digits", "4", "--seed", "1", "--steps", "400")  # of make_toy.py: longer sums, other misconceptions, less training
MEASURES = ("accuracy", "fixed errors corrected", "own errors corrected", "right answers spoiled")
RULES = {"analysis": "", "all tokens": "--credit response", "both signs": "--success_conditioned False"}  # who gets credit
RATES, MORE_RATES = ("2.5e-4", "5e-4"), ("1.25e-4", "1e-3")  # --full adds the latter
BUDGETS = (("Equal samples", "samples"), ("Equal stage-1 questions", "questions"), ("Equal seconds", "seconds"))
STAGE2 = "Stage 2 alone: no gradient from stage 1, equal corrections"  # titles of tables
METHOD_RATES = "Learning rates of the methods (5e-4 where none is named), equal "
FILTER = "Variance filter (Eq. 7) on and off, equal samples"
TIMING_SEED = 100  # also the seed by which the budget was chosen; not one of the study's


# ============================================================================================================ 1. arms


@dataclass(frozen=True)
class Arm:
    unit: str  # of the budget: samples, questions (of stage 1), corrections, or seconds
    budget: float
    flags: str = ""  # of train.py
    fork: str = ""  # a name in FORKS
    labels: int = 0  # training questions, another set for each seed; 0: all 6,000
    toy: str = "toy"  # or hard: another policy and its task, made with the flags HARD


def make_arms(smoke: bool = False) -> dict[str, Arm]:
    """{name: arm}. GRPO's 24 steps are the measure of all three budgets, so its one run stands in all three tables; DAPO
    pays a sample and a question alike, so its first two tables share a run too. What no table shows is never run."""
    G, B, steps = (4, 8, 3) if smoke else (8, 32, 24)
    amount = {"samples": steps * B * G, "questions": steps * B, "seconds": steps * prices()["stage 1"] * B * G / 256}
    size = f"--questions_per_step {B} --group_size {G} --pool_trigger {B}"
    arms = {"vanilla": Arm("samples", 0, f"{size} --steps 0")}
    arms["GRPO"] = Arm("samples", amount["samples"], f"{size} --algorithm grpo")
    arms["DAPO"] = Arm("samples", amount["samples"], f"{size} --algorithm dapo")
    arms["DAPO, seconds"] = Arm("seconds", amount["seconds"], f"{size} --algorithm dapo")
    for unit in amount:
        arms[f"ScRPO, {unit}"] = Arm(unit, amount[unit], size)
    arms["ScRPO without filter"] = Arm("samples", amount["samples"], f"{size} --min_variance 0")
    # Stage 2 alone. Every wrong response is kept, so that the untrained stage 1 costs few rollouts a correction.
    alone, corrections = f"{size} --train_stages 2 --errors_per_question 8", (1 if smoke else 20) * B * G
    for rule, flags in RULES.items():
        for rate in (*RATES, *MORE_RATES):
            arms[f"{rule}, {rate}"] = Arm("corrections", corrections, f"{alone} {flags} --learning_rate {rate}")
    for fork in FORKS:
        arms[fork] = Arm("corrections", corrections, f"{alone} --learning_rate 5e-4", fork)
    # Scarce labels: 16 steps of half the size over 32 questions, so each is seen 8 times; once more, on the harder toy.
    half = f"--questions_per_step {B // 2} --group_size {G} --pool_trigger {B // 2}"
    few = {unit: value / 3 for unit, value in amount.items()}  # 16 half steps are a third of 24 whole ones
    arms["hard vanilla"] = Arm("samples", 0, f"{half} --steps 0", toy="hard")
    for name, toy in (("scarce", "toy"), ("hard", "hard")):
        arms[f"{name} GRPO"] = Arm("samples", few["samples"], f"{half} --algorithm grpo", labels=32, toy=toy)
        for method, flags in (("ScRPO", ""), ("ScRPO all errors", " --errors_per_question 8")):
            for unit in few:
                arms[f"{name} {method}, {unit}"] = Arm(unit, few[unit], half + flags, labels=32, toy=toy)
    # Sweeps of the whole method, with --full.
    for rate in MORE_RATES:
        for method in ("GRPO", "DAPO", "ScRPO"):
            flags = f"{size} --algorithm {method.lower()} --learning_rate {rate}"
            arms[f"{method} at {rate}"] = Arm("samples", amount["samples"], flags)
        arms[f"ScRPO at {rate}, questions"] = Arm("questions", amount["questions"], f"{size} --learning_rate {rate}")
    for setting in ("pool_trigger 64", "pool_trigger 128", "errors_per_question 2", "errors_per_question 8"):
        arms[setting] = Arm("samples", amount["samples"], f"{size} --{setting}")  # the later flag wins
    return arms


def scarce_title(more: str, unit: str) -> str:
    return f"Scarce labels: 32 training questions{more}, equal {'question draws' if unit == 'questions' else unit}"


def make_tables(arms: dict[str, Arm], smoke: bool = False) -> list[tuple[str, str, list[str], list[tuple[str, str]]]]:
    """[(group, title, arms, pairs of arms to compare)]. A pair is a claim; the controls are there to refute one."""
    if smoke:
        rows = ["vanilla", "GRPO", "ScRPO, samples", "random tokens"]
        return [("smoke", "Smoke", rows, [("GRPO", "vanilla"), ("ScRPO, samples", "GRPO")])]
    tables = []
    for title, unit in BUDGETS:
        scrpo, dapo = f"ScRPO, {unit}", "DAPO, seconds" if unit == "seconds" else "DAPO"
        tables.append(("budgets", title, ["vanilla", "GRPO", dapo, scrpo],
                       [("GRPO", "vanilla"), (scrpo, "vanilla"), (scrpo, "GRPO"), (dapo, "GRPO")]))  # fmt: skip
    filtered = ["ScRPO, samples", "ScRPO without filter"]
    tables.append(("budgets", FILTER, filtered, [tuple(filtered)]))
    pairs = [(f"analysis, {rate}", "vanilla") for rate in RATES] + [(fork, "vanilla") for fork in FORKS]
    pairs += [("analysis, 5e-4", fork) for fork in FORKS]
    pairs += [(f"analysis, {rate}", f"{rule}, {rate}") for rule in ("all tokens", "both signs") for rate in RATES]
    tables.append(("stage2", STAGE2,
                   ["vanilla", *(f"{rule}, {rate}" for rule in RULES for rate in RATES), *FORKS], pairs))  # fmt: skip
    for name, start, more in (("scarce", "vanilla", ""), ("hard", "hard vanilla", ", longer sums, a shakier start")):
        for unit in ("samples", "questions", "seconds"):
            rows = [f"{name} GRPO", f"{name} ScRPO, {unit}", f"{name} ScRPO all errors, {unit}"]
            title = scarce_title(more, unit)
            tables.append((name, title, [start, *rows], [(rows[0], start), (rows[1], rows[0]), (rows[2], rows[0])]))
    rates = sorted((*RATES, *MORE_RATES), key=float)
    tables.append(("rates", "Learning rates of the credit rules, stage 2 alone, equal corrections",
                   [f"{rule}, {rate}" for rule in RULES for rate in rates],
                   [(f"analysis, {rate}", f"both signs, {rate}") for rate in rates]))  # fmt: skip
    methods = [f"{method} at {rate}" for rate in MORE_RATES for method in ("GRPO", "DAPO", "ScRPO")]
    tables.append(("rates", METHOD_RATES + "samples", ["GRPO", "DAPO", "ScRPO, samples", *methods],
                   [(f"ScRPO at {rate}", f"GRPO at {rate}") for rate in MORE_RATES]))  # fmt: skip
    pairs = [(f"ScRPO at {rate}, questions", f"GRPO at {rate}") for rate in MORE_RATES]
    tables.append(("rates", METHOD_RATES + "stage-1 questions", ["GRPO", "ScRPO, questions", *sum(pairs, ())], pairs))
    pool = [a for a in arms if a.startswith(("pool_", "errors_"))]
    tables.append(("pool", "Pool trigger (else 32) and errors per question (else 1), equal samples",
                   ["GRPO", "ScRPO, samples", *pool], [(a, "ScRPO, samples") for a in pool]))  # fmt: skip
    return tables


# ====================================================================================== 2. one run, and the forks of it


def within_budget(train, arm: Arm, price: dict) -> None:
    """Forks both stages of train.py: they count what they spend, set the learning rate by it, and end the run."""
    spent, peak = Counter(), {}

    def fork(stage):
        original = getattr(train, stage)

        def act(run, step):
            config, state = run.config, run.state
            share = min(1.0, spent[arm.unit] / arm.budget)
            config.learning_rate = peak.setdefault("rate", config.learning_rate) * 0.5 * (1 + math.cos(math.pi * share))
            samples, questions = state.samples, state.questions
            groups, examples, metrics = original(run, step)
            name = "stage 2" if state.stage == 2 else "stage 1, dapo" if config.algorithm == "dapo" else "stage 1"
            drawn = state.samples - samples  # DAPO's discarded ones too
            spent.update(samples=drawn, questions=state.questions - questions, corrections=drawn * (state.stage == 2),
                         steps=1, stage2_steps=int(state.stage == 2),
                         seconds=price[name] * config.questions_per_step * config.group_size / 256)  # fmt: skip
            if spent[arm.unit] >= arm.budget - 1e-9:
                config.steps = step  # the loop takes this step for its last
            return groups, examples, metrics | {"spent": dict(spent)}

        setattr(train, stage, act)

    fork("trial_and_error"), fork("self_correction")


def random_tokens(train, seed: int) -> None:
    """Control: the credit of a mask goes to as many tokens drawn at random from the whole response. Where all tokens
    have it, as in stage 1, nothing changes."""
    rng, original = np.random.default_rng(seed), train.make_examples

    def moved(mask, length):
        new = mask.new_zeros(length)
        new[rng.choice(length, int(mask.sum()), replace=False)] = True
        return new

    def make_examples(groups, advantages, masks, counted):
        masks = [[moved(row[i], len(s.token_ids)) for i, s in enumerate(g.samples)] for g, row in zip(groups, masks)]
        return original(groups, advantages, masks, counted)

    train.make_examples = make_examples


def random_success(train, seed: int) -> None:
    """Control: within each group of corrections the verdicts are dealt out again at random. The rate of success, the
    groups that carry gradient, and the sizes of advantages stay; who is rewarded has nothing to do with being right."""
    rng, original = np.random.default_rng(seed), train.grade_samples

    def grade_samples(run, tasks, samples, stage):
        groups = original(run, tasks, samples, stage)
        for group in groups if stage == 2 else ():
            group.verdicts = [group.verdicts[i] for i in rng.permutation(len(group.verdicts))]
        return groups

    train.grade_samples = grade_samples


FORKS = {"random tokens": random_tokens, "random success": random_success}


def measure(run, train, fixed: Path, smoke: bool) -> dict:
    """What is measured of a policy, in place of train.py's evaluation. Same seeds for all arms at a seed of the run.

    fixed  file of the errors that all runs of the study correct: wrong answers of the untrained policy to held-out
           problems, at a seed of their own. Where the file is not there, this run makes it.
    """
    config, (n, n_fixed, n_spoiled) = run.config, (20, 8, 8) if smoke else (1000, 300, 200)
    how = {"temperature": config.temperature, "top_p": 1.0, "max_new_tokens": config.max_new_tokens}
    run.engine.wake()
    run.engine.update_weights(run.model)

    def answers(seed):
        return train.sample_answers(run.engine, run.tokenizer, run.eval_problems[:n], run.grader, k=1, seed=seed, **how)

    def corrected(records):
        corrections = train.sample_corrections(run.engine, run.tokenizer, records, run.grader, k=1, seed=config.seed, **how)
        return train.accuracy(corrections)[0]

    if run.state.step == 0 and not fixed.exists():  # always from the untrained policy, so always the same
        wrong = [r for r in answers(seed=1_000_003) if r["verdict"] != "right" and r["finished"]]
        write_whole(fixed, wrong[:n_fixed])
    if run.state.step == 0 and config.steps:  # before training all arms are `vanilla`, which has no steps
        return {}
    records = answers(config.seed)
    right = [r for r in records if r["verdict"] == "right"]
    return {
        "accuracy": len(right) / len(records),
        "fixed errors corrected": corrected(json.loads(fixed.read_text())),
        "own errors corrected": corrected([r for r in records if r["verdict"] != "right"]),
        "right answers spoiled": 1 - corrected(right[:n_spoiled]),
        "entropy": entropy(run, train, records[:200]),
        "length": float(np.mean([len(r["token_ids"]) for r in records])),
    }


def entropy(run, train, records) -> float:
    """Mean entropy of the policy, in nats a token, along these held-out answers of its own."""
    import torch

    examples = []
    for r in records:
        prompt, n = train.render(run.tokenizer, train.solution_prompt(r["problem"])), len(r["token_ids"])
        ids = prompt + r["token_ids"]
        examples.append(train.Example(0, 0.0, n, ids, len(prompt), torch.ones(n, dtype=torch.bool), [0.0] * n))
    batch = train.collate(examples, run.device)
    with torch.no_grad():
        _, values = run.policy.module(batch.ids, batch.attention, batch.first)
    return values[batch.mask].mean().item()


def one_run(name: str, arm: Arm, seed: int, options) -> None:
    """In a process of its own: trains, measures, writes the result."""
    sys.path.insert(0, str(ROOT))
    import train

    work, folder = options.work, options.work / f"tmp-{os.getpid()}"
    toy = ROOT / "toy" if arm.toy == "toy" else work / arm.toy
    flags = ["--model", str(toy), "--train_data", str(toy / "train.jsonl"), "--eval_data", str(toy / "test.jsonl")]
    flags = [*shlex.split(BASE), *flags, *shlex.split(arm.flags), *shlex.split(options.train_flags)]
    folder.mkdir(parents=True)
    if arm.labels:  # another set for each seed, the same for all arms
        last = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of several flags the last one is in force
        last.add_argument("--train_data", type=Path)
        data = last.parse_known_args(flags)[0].train_data
        if not data.is_file():
            sys.exit(f"error: --train_data {data} in --train_flags: scarce labels are cut from a JSONL file; give one")
        lines = data.read_text().splitlines(keepends=True)
        (folder / "few.jsonl").write_text("".join(lines[seed * arm.labels:][:arm.labels]))
        flags += ["--train_data", str(folder / "few.jsonl")]
    if arm.fork:
        FORKS[arm.fork](train, seed)
    within_budget(train, arm, prices())
    policy = f"{arm.toy}-{crc32(options.train_flags.encode()):08x}" if options.train_flags else arm.toy
    fixed = work / f"errors-{policy}{'-smoke' if options.smoke else ''}.json"
    train.evaluate_policy = lambda run: measure(run, train, fixed, options.smoke)
    train.summary = lambda run: None
    train.main([*flags, "--seed", str(seed), "--output_dir", str(folder / "run")])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    if MEASURES[1] not in lines[-1]:  # a signal stopped it before its last evaluation
        sys.exit("error: stopped before its end")
    keep = ("stage", "samples", "accuracy", "correction_success", "entropy", "seconds")
    write_whole(result_file(options, name, seed), {
        **lines[-1], **definition(arm, options),
        "curve": [{key: line.get(key) for key in keep} for line in lines],
    })  # fmt: skip
    shutil.rmtree(folder)


# ========================================================================================================= 3. all runs


def write_whole(path: Path, value) -> None:
    """JSON, there wholly or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


def result_file(options, name: str, seed: int) -> Path:
    return options.work / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}{'-smoke' if options.smoke else ''}.json"


def definition(arm: Arm, options) -> dict:
    """The flags and prices that a result depends on; where they have changed, the run is done again."""
    flags = {"base": BASE, "train_flags": options.train_flags, "toy": HARD if arm.toy == "hard" else ()}
    return json.loads(json.dumps({"arm": asdict(arm), **flags, "price": prices()}))


def load(options, name: str, arm: Arm, seed: int) -> dict | None:
    path = result_file(options, name, seed)
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if definition(arm, options).items() <= result.items() else None


def run_all(jobs: list[tuple[str, int]], arms: dict[str, Arm], options) -> None:
    """Runs what has no result yet, `options.jobs` at a time, each in a process with one thread."""
    jobs = [(name, seed) for name, seed in dict.fromkeys(jobs) if load(options, name, arms[name], seed) is None]
    if any(arms[name].toy == "hard" for name, _ in jobs) and not (options.work / "hard/model.safetensors").exists():
        make = [sys.executable, str(ROOT / "toy/make_toy.py"), *HARD, "--measure", "200", "--output", str(options.work / "hard")]
        subprocess.run(make, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    started, done = time.perf_counter(), 0

    def run(job):
        nonlocal done
        name, seed = job
        log = result_file(options, name, seed).with_suffix(".log")
        command = [sys.executable, __file__, "--run", name, "--seed", str(seed), "--work", str(options.work),
                   "--train_flags", options.train_flags, *["--smoke"] * options.smoke]  # fmt: skip
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code or load(options, name, arms[name], seed) is None:
            raise RuntimeError(f"{name}, seed {seed} ended with code {code}; see {log}")
        log.unlink()
        done += 1
        left = (time.perf_counter() - started) / done * (len(jobs) - done) / 60
        print(f"{done} of {len(jobs)}: {name}, seed {seed}; about {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(run, job) for job in jobs]:
            try:
                future.result()
            except RuntimeError as error:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"error: {error}")


def prices() -> dict:
    """Seconds of a step of 256 samples by its kind, frozen in a file; 1 each where there is none."""
    return json.loads(SECONDS.read_text()) if SECONDS.exists() else dict.fromkeys(("stage 1", "stage 1, dapo", "stage 2"), 1.0)


def time_steps(options) -> None:
    """bench/seconds_per_step.json: means over the runs of GRPO, DAPO and ScRPO at a seed of their own, one after another,
    without evaluation and checkpoint, and without each run's first step, which warms up."""
    arms, seconds = make_arms(), {}
    for name in ("GRPO", "DAPO", "ScRPO, samples"):
        result_file(options, name, TIMING_SEED).unlink(missing_ok=True)
        run_all([(name, TIMING_SEED)], arms, options)
        for line in load(options, name, arms[name], TIMING_SEED)["curve"][2:]:
            kind = f"stage {line['stage']}" + ", dapo" * (name == "DAPO")
            parts = [s for part, s in line["seconds"].items() if part not in ("evaluation", "checkpoint")]
            seconds.setdefault(kind, []).append(sum(parts))
    SECONDS.write_text(json.dumps({kind: round(float(np.mean(s)), 3) for kind, s in seconds.items()}, indent=1) + "\n")
    print(SECONDS.read_text())


# ======================================================================================================= 4. statistics


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4).

    >>> round(t_cdf(2.776445, 4), 5), round(t_cdf(-1.0, 1), 5), t_cdf(0.0, 7)   # 97.5 % at df 4; 1/4 for Cauchy's
    (0.975, 0.25, 0.5)
    """
    theta = math.atan(t / math.sqrt(df))
    term = total = math.cos(theta) if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= (k - 1) / k * math.cos(theta) ** 2
        total += term
    if df % 2:
        return 0.5 + (theta + math.sin(theta) * total * (df > 1)) / math.pi
    return 0.5 + math.sin(theta) * total / 2


def t_quantile(p: float, df: int) -> float:
    """
    >>> [round(t_quantile(0.975, df), 3) for df in (1, 2, 4, 7)]
    [12.706, 4.303, 2.776, 2.365]
    """
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return low


def statistics(values: list[float]) -> dict:
    """Mean, half of the 95 % interval (t), two-sided p of mean 0, and the mean that n values with this spread detect
    with 80 % power at the 5 % level, (t_0.975 + t_0.8) s / sqrt(n).

    >>> {k: round(v, 3) for k, v in statistics([0.1, 0.2, 0.3]).items()}   # s 0.1, t = 0.2 / (0.1 / sqrt 3) = 3.464
    {'mean': 0.2, 'half': 0.248, 'p': 0.074, 'detectable': 0.31}
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"mean": mean, "half": math.nan, "p": math.nan, "detectable": math.nan}
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    p = 2 * t_cdf(-abs(mean) / error, n - 1) if error else float(mean == 0)
    quantile = t_quantile(0.975, n - 1)
    return {"mean": mean, "half": quantile * error, "p": p, "detectable": (quantile + t_quantile(0.8, n - 1)) * error}


# =========================================================================================================== 5. report

SPENT = ("steps", "stage2_steps", "samples", "questions", "seconds")
COMPARED = ("mean", "p", "detectable", "reading")
EXPLAINED = f"""Same policy, questions and sample seeds in all arms at a seed. Columns: share of 1,000 held-out problems
answered right with one sample each; share of 300 fixed errors (of the untrained policy, held-out problems) put right; share
of the policy's own errors on the 1,000 put right; share of 200 of its right answers that end up wrong when it is told that
they are wrong and asked to correct them; entropy in nats a token on held-out answers; the rest is what training spent.
Seconds are charged, not measured: each step at its kind's price in seconds_per_step.json, by its number of samples. The
prices are those of the three-digit toy with an update in each step; the scarce and the harder tasks' stage 2 costs less
than that, so that ScRPO with all errors, at equal charged seconds, got somewhat less than equal time there.
± and [] are 95 % intervals (t) over seeds, tests are paired t tests over seeds, `detectable` is the difference that this
number of seeds with this spread finds with 80 % power. p is not corrected for the number of comparisons.

Who gets credit in stage 2, where it is trained alone: `analysis`: the analysis tokens of successful corrections (Eq. 12, the
paper's claim); `all tokens` of successful corrections; `both signs`: the analysis tokens of successful and failed ones;
`random tokens`: as many tokens, drawn from the whole correction, of which about half lie in its analysis; `random success`:
the verdicts dealt out again within each group, so that success has the same rate and no meaning. At success rate p the first
rule's gradient is (1−p) times that of both signs; AdamW and clipping to norm 1 take most of such a factor out again, and
two rates are shown because neither need suit both, and four in the sweep. The main tables share one learning rate, 5e-4,
tuned for no method; the sweep shows what another would have changed.

What may not be concluded, whatever the numbers: **transfer is built into this toy**. Its analyses contain solution steps
(`Step 2: 6+9+0=15 not 16`), so a policy whose analyses improve has practised solving; that learning to diagnose helps to
solve where the two are different texts is not shown here. Nor does a policy of 0.3 million parameters on three-digit sums
say how large an effect is on a 1.5B model. All seeds share one policy, one test set and one set of fixed errors: the
intervals hold the noise of sampling and order (and of the 32 labels), not that of another policy. In the scarce tables every
arm has the same labels, so there equal samples and equal seconds compare at equal labels; with equal question *draws* ScRPO
samples more, and GRPO was not given more. "No difference shown" is not "no difference": see `detectable`. Correction of right
answers is asked with the words for wrong ones, which no arm was trained for. The harder toy is
`toy/make_toy.py {' '.join(HARD)}`: four-digit sums, other misconceptions, a training that ended earlier. Eight
seeds were planned; 0 to 4 were run first, and their tables read, before 5 to 7. All seeds of a table are shown."""


CLAIMS = (  # in the paper's words or ours, and the difference that would show it: (claim, table, arm, arm, measure)
    *(("ScRPO solves more than GRPO", title, f"ScRPO, {unit}", "GRPO", MEASURES[0]) for title, unit in BUDGETS),
    *(("... at other learning rates too", METHOD_RATES + budget, f"ScRPO at {rate}{unit}", f"GRPO at {rate}", MEASURES[0])
      for budget, unit in (("samples", ""), ("stage-1 questions", ", questions")) for rate in MORE_RATES),
    *(("ScRPO corrects more errors than GRPO", title, f"ScRPO, {unit}", "GRPO", MEASURES[1]) for title, unit in BUDGETS),
    *((f"... solves more with scarce labels{also} too", scarce_title(more, unit),
       f"{toy} {method}, {unit}", f"{toy} GRPO", MEASURES[0])
      for toy, also, more in (("scarce", "", ""), ("hard", " and longer sums", ", longer sums, a shakier start"))
      for unit in ("samples", "questions", "seconds") for method in ("ScRPO", "ScRPO all errors")),
    ("learning to diagnose teaches to solve", STAGE2, "analysis, 5e-4", "vanilla", MEASURES[0]),
    ("... because success means something", STAGE2, "analysis, 5e-4", "random success", MEASURES[0]),
    ("... because the analysis gets the credit", STAGE2, "analysis, 5e-4", "random tokens", MEASURES[0]),
    *(("credit for the analysis is better than for all tokens", STAGE2, f"analysis, {rate}", f"all tokens, {rate}", MEASURES[0])
      for rate in RATES),
    *(("credit for success is better than both signs", STAGE2, f"analysis, {rate}", f"both signs, {rate}", MEASURES[0])
      for rate in RATES),
    ("the variance filter helps", FILTER, "ScRPO, samples", "ScRPO without filter", MEASURES[0]),
)  # fmt: skip


def number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.3f}"


def row_of(text: list) -> str:
    return f"| {' | '.join(text)} |"


def complete(rows: list[str], wanted: int, arms, options) -> tuple[int, dict[str, list[dict]]]:
    """(n, {arm: results of seeds 0 .. n-1}), n the most for which no row of the table misses a seed."""
    results = {name: [load(options, name, arms[name], seed) for seed in range(wanted)] for name in rows}
    n = next((seed for seed in range(wanted) if any(r[seed] is None for r in results.values())), wanted)
    return n, {name: r[:n] for name, r in results.items()}


def levels(results: dict[str, list[dict]]) -> list[str]:
    """Each arm's means, intervals, and what it spent."""
    lines = [row_of(["", *MEASURES, "steps (stage 2)", "samples", "stage-1 questions", "seconds (charged)", "1,000 tokens", "entropy",
                     "accuracy by seed"]), "|" + " --- |" * 12]  # fmt: skip
    for name, runs in results.items():
        cells = [name]
        for measure in MEASURES:
            s = statistics([math.nan if run[measure] is None else run[measure] for run in runs])
            cells.append(f"{number(s['mean'])} ± {number(s['half'])}")
        spent = Counter()
        for run in runs:
            spent.update(run.get("spent", {}))
        spent = {key: value / len(runs) for key, value in spent.items()} if spent else dict.fromkeys(SPENT, 0)
        cells += [f"{spent['steps']:.1f} ({spent['stage2_steps']:.1f})", f"{spent['samples']:,.0f}",
                  f"{spent['questions']:,.0f}", f"{spent['seconds']:.1f}"]  # fmt: skip
        cells += [f"{np.mean([run['tokens'] for run in runs]) / 1000:,.0f}", number(np.mean([run["entropy"] for run in runs]))]
        lines.append(row_of([*cells, " ".join(number(run["accuracy"]) for run in runs)]))
    return lines


def differences(results: dict[str, list[dict]], pairs) -> tuple[list[str], dict]:
    """(lines, {(arm, arm, measure): (p, cells of the line)}): arm minus arm, paired by seed."""
    lines, found = [row_of(["paired difference", "of", *COMPARED]), "|" + " --- |" * 6], {}
    for a, b in pairs:
        for measure in MEASURES[:2]:
            s = statistics([x[measure] - y[measure] for x, y in zip(results[a], results[b])])
            mean, low, high = (number(v, "+") for v in (s["mean"], s["mean"] - s["half"], s["mean"] + s["half"]))
            reading = "no difference shown" if not s["p"] < 0.05 else "higher" if s["mean"] > 0 else "lower"
            p = "< 0.0001" if s["p"] < 1e-4 else f"{s['p']:.4f}"
            found[a, b, measure] = s["p"], [f"{mean} [{low}, {high}]", p, number(s["detectable"]), reading]
            lines.append(row_of([f"{a} − {b}", measure, *found[a, b, measure][1]]))
    return lines, found


def report(arms, tables, options) -> None:
    """Writes this study's section of RESULTS.md, and nothing outside its markers, and the figure."""
    text, found, by_title, shown = [], {}, {}, {}
    for group, title, rows, pairs in tables:
        wanted = options.seeds or SEEDS[group]
        n, results = complete(rows, wanted, arms, options)
        if n:
            lines, more = differences(results, pairs)
            command = "python bench/study.py " + ("--smoke" if options.smoke else f"--only {group}")
            command += f" --seeds {options.seeds}" * bool(options.seeds)
            command += f" --train_flags {shlex.quote(options.train_flags)}" * bool(options.train_flags)
            missing = f" ({wanted} were planned, the others are missing)" * (n < wanted)
            text += [f"\n### {title}\n", f"`{command}`, seeds 0 to {n - 1}{missing}\n", *levels(results), "", *lines]
            found |= more
            shown[title] = results
            by_title[title] = more
    claims = [row_of(["claim", "difference", "of", *COMPARED]), "|" + " --- |" * 7]
    claims += [row_of([claim, f"{a} − {b}", of, *by_title[title][a, b, of][1]])
               for claim, title, a, b, of in CLAIMS if title in by_title]  # fmt: skip
    used = {name: arms[name] for results in shown.values() for name in results}
    text += ["\n### The arms\n", row_of(["arm", "runs until it has spent", "flags of train.py", "fork", "training questions"]),
             "|" + " --- |" * 5]  # fmt: skip
    for name, arm in used.items():
        text.append(row_of([name, f"{arm.budget:,.1f} {arm.unit}", f"`{arm.flags}`", arm.fork, str(arm.labels or "all")]))
    text.append(f"\nEvery run begins with `{BASE}`; a later flag wins.")
    readings, m = Counter(cells[-1] for _, cells in found.values()), max(1, len(found))
    summary = (f"Of the {m} different comparisons below {readings['higher']} are higher and {readings['lower']} lower at p < 0.05; "
               f"{m / 20:.1f} would be by chance if nothing differed. {sum(p < 0.05 / m for p, _ in found.values())} also pass "
               f"Bonferroni's bound, p < {0.05 / m:.5f}.")  # fmt: skip
    begin, end = "<!-- study.py: begin -->", "<!-- study.py: end -->"
    section = "\n".join([begin, "## study.py", "", "![accuracy by arm and seed](study.png)", "", *claims, "",
                         "![the other tables](study_more.png)", "",
                         EXPLAINED, "", summary, *text, end])  # fmt: skip
    headline = [title for title in shown if title.startswith(("Equal", "Stage 2"))] or list(shown)  # what README opens with
    draw({title: shown[title] for title in headline}, options.output / "study.png")
    draw({title: shown[title] for title in shown if title not in headline}, options.output / "study_more.png")
    path = options.output / "RESULTS.md"
    before, _, rest = (path.read_text() if path.exists() else "# Measured\n\n").partition(begin)
    path.write_text(before + section + (rest.partition(end)[2] or "\n"))
    print(f"written: {path}")


def draw(shown: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """One panel a table: held-out accuracy of every seed, and its mean with the 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, max(1, len(shown)))
    rows = math.ceil(len(shown) / columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.axis("off")
    for axis, (title, results) in zip(axes.flat, shown.items()):
        for x, runs in enumerate(results.values()):
            values = [run["accuracy"] for run in runs]
            s = statistics(values)
            axis.plot([x] * len(values), values, ".", color="tab:gray", alpha=0.6)
            axis.errorbar(x + 0.2, s["mean"], 0 if math.isnan(s["half"]) else s["half"], fmt="o", color="tab:blue", capsize=3)
        axis.set_xticks(range(len(results)), list(results), rotation=45, ha="right", fontsize="small")
        axis.set_title(title.replace(": ", ":\n").replace(", ", ",\n"), fontsize="small")
        axis.grid(alpha=0.3, axis="y")
    axes[0, 0].set_ylabel("held-out accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", choices=[group for group in SEEDS if group != "smoke"], help="one group of arms")
    parser.add_argument("--full", action="store_true", help="all groups: the sweeps too, twice as long")
    parser.add_argument("--seeds", type=int, help="0 .. n-1 in every group, instead of each group's own number")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="folder of the runs' results")
    parser.add_argument("--output", type=Path, help="folder of RESULTS.md and its figures; default: --work's")
    parser.add_argument("--train_flags", default="", help="more flags of train.py, for every run")
    parser.add_argument("--report", action="store_true", help="run nothing, only write what is there")
    parser.add_argument("--time", action="store_true", help="only measure seconds_per_step.json again")
    parser.add_argument("--smoke", action="store_true", help="a minute's version, for the test")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in its own process
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.error = fail
    options = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name} {getattr(options, name)}: must be at least 1")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output = options.output or options.work
    options.output.mkdir(parents=True, exist_ok=True)
    arms = make_arms(options.smoke)
    if options.run:
        return one_run(options.run, arms[options.run], options.seed, options)
    lock = (options.work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another study works in {options.work}; wait for it, or give another --work")
    for left_over in options.work.glob("tmp-*"):
        shutil.rmtree(left_over)
    if options.time:
        return time_steps(options)
    groups = [options.only] if options.only else ["smoke"] if options.smoke else list(SEEDS) if options.full else CORE
    tables = make_tables(arms, options.smoke)
    if not options.report:
        jobs = [(seed, name) for group, _, rows, _ in tables if group in groups
                for name in rows for seed in range(options.seeds or SEEDS[group])]  # fmt: skip
        run_all([(name, seed) for seed, name in sorted(jobs, key=lambda job: job[0])], arms, options)
    report(arms, tables, options)  # of all groups that are there, whichever was asked for


if __name__ == "__main__":
    main()
