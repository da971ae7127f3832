"""A miniature study of ScRPO on the embedded toy: does it help, how much, which part? See STUDY.md.

    pip install -r bench/requirements.txt
    python bench/study.py                      # what is missing of the core: 80 minutes on 2 cores
    python bench/study.py --groups rates pool  # the sweeps: as long again
    python bench/study.py --groups             # no runs, only tables and figure of what is there
    python bench/study.py --groups --output bench          # publish them in bench/RESULTS.md

1. An *arm* is a method under a budget: flags of train.py, and perhaps a fork of a few lines. Each
   run of an arm at a seed is a process of its own that calls train.main; its result is one file in
   runs/study, named by all its flags. Kill the study at any time: the same command goes on, and
   loses at most the runs in progress (half a minute). Delete the folder when train.py changes.
2. Budgets are spent, not planned: a fork of both stages counts samples, stage-1 questions,
   corrections or seconds, lets the learning rate fall as a cosine of the share spent, and ends
   the run when all is spent. Not a constant rate, under which one run would serve all budgets:
   accuracy then jumps by 0.2 between steps. Not fixed numbers of steps: DAPO's samples and ScRPO's
   questions a step are known only when drawn.
3. The same seed means the same order of questions and the same seeds of samples in every arm, so
   tests are paired over seeds 0, 1, ..., n-1. The budget was chosen by GRPO alone at seed 100.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "budgets": "Equal samples, equal stage-1 questions, or equal seconds",
    "stage2": "Stage 2 alone: no gradient from stage 1, equal corrections",
    "scarce": "Scarce labels: 32 training questions, another 32 at each seed",
    "hard": "Scarce labels, longer sums, a shakier start",
    "rates": "Learning rates (5e-4 where none is named)",
    "pool": "Pool trigger (else 32) and errors per question (else 1), equal samples",
}
BASE = ("--schedule constant --steps 2000 --save_every 100000 --eval_every 0 "
        "--eval_questions 1000 --learning_rate 5e-4")  # fmt: skip
# Of make_toy.py, for the group `hard`: longer sums, other misconceptions, less training.
HARD = "--digits 4 --seed 1 --steps 400"
# Seconds of a step of 256 samples with its update, on one core of the machine that the first
# edition was measured on. Charged, not measured, so that the tables do not depend on the machine.
PRICES = {"stage 1": 0.783, "stage 1, dapo": 1.365, "stage 2": 1.783}
MEASURES = ("accuracy", "fixed errors corrected", "own errors corrected", "right answers spoiled")
SOLVED, CORRECTED, OWN, SPOILED = MEASURES
FIXED, AT_RISK = 300, 200  # errors of the untrained policy, right answers; of 1,000 problems
UNITS = ("samples", "questions", "seconds")  # questions of stage 1
CREDIT = {"analysis": "", "all tokens": " --credit response",
          "both signs": " --success_conditioned False"}  # fmt: skip
RATES, MORE_RATES = ("2.5e-4", "5e-4"), ("1.25e-4", "1e-3")  # the latter in the sweeps
ALL_RATES = (*RATES, *MORE_RATES)
SETTINGS = ("pool_trigger 64", "pool_trigger 128", "errors_per_question 2", "errors_per_question 8")


# --------------------------------------------------------------------------- 1. arms and claims


@dataclass(frozen=True)
class Arm:
    group: str
    unit: str  # of the budget: samples, questions (of stage 1), corrections, or seconds
    budget: float
    flags: str  # of train.py; a later one wins
    fork: str = ""  # a control: random tokens or random success


def make_arms() -> dict[str, Arm]:
    """{name: arm}. GRPO's 24 steps are the measure of all three budgets, so it is run once; DAPO
    pays a sample and a question alike. The controls are there to refute a claim."""
    size = "--questions_per_step 32 --group_size 8 --pool_trigger 32"
    half = "--questions_per_step 16 --group_size 8 --pool_trigger 16"
    budget = {"samples": 24 * 256, "questions": 24 * 32, "seconds": 24 * PRICES["stage 1"]}
    samples = budget["samples"]
    arms = {
        "vanilla": Arm("budgets", "samples", 0, f"{size} --steps 0"),
        "GRPO": Arm("budgets", "samples", samples, f"{size} --algorithm grpo"),
        "DAPO": Arm("budgets", "samples", samples, f"{size} --algorithm dapo"),
        "DAPO, seconds": Arm("budgets", "seconds", budget["seconds"], f"{size} --algorithm dapo"),
        "ScRPO without filter": Arm("budgets", "samples", samples, f"{size} --min_variance 0"),
    }
    for unit in UNITS:
        arms[f"ScRPO, {unit}"] = Arm("budgets", unit, budget[unit], size)

    # Every wrong response is kept, so that the untrained stage 1 costs few rollouts.
    alone = f"{size} --train_stages 2 --errors_per_question 8 --learning_rate"
    for credit, flags in CREDIT.items():
        for rate in ALL_RATES:
            group, trained = "stage2" if rate in RATES else "rates", f"{alone} {rate}{flags}"
            arms[f"{credit}, {rate}"] = Arm(group, "corrections", 20 * 256, trained)
    for control in ("random tokens", "random success"):
        arms[control] = Arm("stage2", "corrections", 20 * 256, f"{alone} 5e-4", control)

    # 16 steps of half the size, a third of the budget, see each of 32 questions 8 times.
    arms["hard vanilla"] = Arm("hard", "samples", 0, f"{half} --steps 0")
    for name in ("scarce", "hard"):
        arms[f"{name} GRPO"] = Arm(name, "samples", samples / 3, f"{half} --algorithm grpo")
        for unit in UNITS:
            third, keeping_all = budget[unit] / 3, f"{half} --errors_per_question 8"
            arms[f"{name} ScRPO, {unit}"] = Arm(name, unit, third, half)
            arms[f"{name} ScRPO all errors, {unit}"] = Arm(name, unit, third, keeping_all)

    for rate in MORE_RATES:
        at = f"{size} --learning_rate {rate}"
        for method in ("GRPO", "DAPO", "ScRPO"):
            flags = f"{at} --algorithm {method.lower()}"
            arms[f"{method} at {rate}"] = Arm("rates", "samples", samples, flags)
        arms[f"ScRPO at {rate}, questions"] = Arm("rates", "questions", budget["questions"], at)
    for setting in SETTINGS:
        arms[setting] = Arm("pool", "samples", samples, f"{size} --{setting}")
    return arms


ARMS = make_arms()
CLAIMS = (  # in the paper's words or ours; the difference that would show it; for each of these
    ("GRPO learns", SOLVED, "{}", "vanilla", ["GRPO"]),
    ("ScRPO learns", SOLVED, "ScRPO, {}", "vanilla", UNITS),
    ("ScRPO solves more than GRPO", SOLVED, "ScRPO, {}", "GRPO", UNITS),
    ("... at other learning rates too", SOLVED, "ScRPO at {}", "GRPO at {}", MORE_RATES),
    ("... at other learning rates too", SOLVED, "ScRPO at {}, questions", "GRPO at {}", MORE_RATES),
    ("ScRPO corrects more errors than GRPO", CORRECTED, "ScRPO, {}", "GRPO", UNITS),
    ("... solves more with scarce labels too", SOLVED, "scarce ScRPO, {}", "scarce GRPO", UNITS),
    ("... keeping all errors", SOLVED, "scarce ScRPO all errors, {}", "scarce GRPO", UNITS),
    ("... with scarce labels and longer sums too", SOLVED, "hard ScRPO, {}", "hard GRPO", UNITS),
    ("... keeping all errors", SOLVED, "hard ScRPO all errors, {}", "hard GRPO", UNITS),
    ("DAPO solves more than GRPO", SOLVED, "{}", "GRPO", ["DAPO", "DAPO, seconds"]),
    ("learning to diagnose teaches to solve", SOLVED, "analysis, {}", "vanilla", RATES),
    ("... because success means something", SOLVED, "analysis, {}", "random success", ["5e-4"]),
    ("... because the analysis gets the credit", SOLVED, "analysis, {}", "random tokens", ["5e-4"]),
    ("credit for analyses beats all tokens", SOLVED, "analysis, {}", "all tokens, {}", ALL_RATES),
    ("credit for success beats both signs", SOLVED, "analysis, {}", "both signs, {}", ALL_RATES),
    ("the variance filter helps", SOLVED, "ScRPO, {}", "ScRPO without filter", ["samples"]),
    ("another pool is better", SOLVED, "{}", "ScRPO, samples", SETTINGS),
)  # fmt: skip


# ---------------------------------------------------------------------- 2. one run, and its forks


def within_budget(train, arm: Arm) -> None:
    """Forks both stages of train.py: they count what they spend, and set rate and end by it."""
    spent, peak = Counter(), None

    def budgeted(stage):
        def act(run, step):
            nonlocal peak
            config, state = run.config, run.state
            peak = peak or config.learning_rate
            share = min(1.0, spent[arm.unit] / arm.budget)
            config.learning_rate = peak * 0.5 * (1 + math.cos(math.pi * share))
            samples, questions = state.samples, state.questions
            groups, examples, metrics = stage(run, step)
            drawn = state.samples - samples  # DAPO's discarded ones too
            kind = f"stage {state.stage}" + (", dapo" if config.algorithm == "dapo" else "")
            spent.update(
                samples=drawn,
                questions=state.questions - questions,
                corrections=drawn if state.stage == 2 else 0,
                steps=1,
                seconds=PRICES[kind] * config.questions_per_step * config.group_size / 256,
            )
            spent["stage-2 steps"] += state.stage == 2
            if spent[arm.unit] >= arm.budget - 1e-9:
                config.steps = step  # the loop takes this step for its last
            return groups, examples, metrics | {f"spent {name}": spent[name] for name in spent}

        return act

    train.trial_and_error = budgeted(train.trial_and_error)
    train.self_correction = budgeted(train.self_correction)


def random_tokens(train, seed: int) -> None:
    """Control: the credit of a mask goes to as many tokens drawn at random from the whole response.
    Where all tokens have it, as in stage 1, nothing changes."""
    rng, original = np.random.default_rng(seed), train.make_examples

    def moved(mask, length):
        new = mask.new_zeros(length)
        new[rng.choice(length, int(mask.sum()), replace=False)] = True
        return new

    def make_examples(groups, advantages, masks, counted):
        masks = [[moved(mask, len(sample.token_ids)) for mask, sample in zip(row, group.samples)]
                 for row, group in zip(masks, groups)]  # fmt: skip
        return original(groups, advantages, masks, counted)

    train.make_examples = make_examples


def random_success(train, seed: int) -> None:
    """Control: within each group of corrections the verdicts are dealt out again at random. The
    rate of success, the groups that carry gradient, and the sizes of advantages stay; who is
    rewarded has nothing to do with being right."""
    rng, original = np.random.default_rng(seed), train.sample_groups

    def sample_groups(*arguments, span=None, step=0, **options):
        groups = original(*arguments, span=span, step=step, **options)
        if span and step > 0:  # corrections, and not those of an evaluation
            for group in groups:
                order = rng.permutation(len(group.verdicts))
                group.verdicts = [group.verdicts[i] for i in order]
        return groups

    train.sample_groups = sample_groups


def measure(run, train, fixed: Path) -> dict:
    """What is measured of a policy, in place of train.py's evaluation: the same seeds for all arms
    at a seed of the run. `fixed`: file of the errors that all runs correct, wrong answers of the
    untrained policy to held-out problems; where it is not there, this run makes it."""
    from evaluate import correction_tasks, records
    from rollout import Task

    config = run.config

    def sample(tasks, seed, span=None):
        return train.sample_groups(
            run.engine, run.tokenizer, run.grader, tasks, range(1), seed=seed, span=span,
            temperature=config.temperature, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip

    def corrected(tasks):
        rewards = [group.rewards for group in sample(tasks, config.seed, "sections")]
        return float(np.mean(rewards)) if rewards else math.nan

    def to_correct(answers, reward):
        asked = records([group for group in answers if group.rewards == [reward]])
        context = run.engine.max_context
        return correction_tasks(run.tokenizer, asked, config.max_new_tokens, context)

    run.engine.update_weights(run.model)
    if run.state.step == 0 and not fixed.exists():  # the untrained policy, so always the same
        errors = to_correct(sample(run.eval_tasks, seed=1_000_003), reward=0)
        write_whole(fixed, [asdict(task) for task in errors[:FIXED]])
    measured = {}
    if run.state.step == config.steps:  # before training all arms are `vanilla`, which has no steps
        answers = sample(run.eval_tasks, config.seed)
        measured = {
            SOLVED: float(np.mean([group.rewards for group in answers])),
            CORRECTED: corrected([Task(**task) for task in json.loads(fixed.read_text())]),
            OWN: corrected(to_correct(answers, reward=0)),
            SPOILED: 1 - corrected(to_correct(answers, reward=1)[:AT_RISK]),
        }
    run.engine.sleep()
    return measured


def one_run(name: str, seed: int, work: Path) -> None:
    """In a process of its own: trains, measures, writes the result."""
    sys.path.insert(0, str(ROOT))
    import train

    arm = ARMS[name]
    toy = work / "hard" if arm.group == "hard" else ROOT / "toy"
    if arm.fork:
        {"random tokens": random_tokens, "random success": random_success}[arm.fork](train, seed)
    within_budget(train, arm)
    train.evaluate_policy = lambda run: measure(run, train, work / f"fixed-errors-{toy.name}.json")
    train.summary = lambda run: None  # it would look for train.py's own evaluation
    with tempfile.TemporaryDirectory() as folder:
        data = toy / "train.jsonl"
        if arm.group in ("scarce", "hard"):  # the same 32 questions for all arms at a seed
            lines = data.read_text().splitlines(keepends=True)
            data = Path(folder) / "few.jsonl"
            data.write_text("".join(lines[seed * 32 :][:32]))
        train.main([
            *BASE.split(), *arm.flags.split(), f"--model={toy}", f"--train_data={data}",
            f"--eval_data={toy}/test.jsonl", f"--seed={seed}", f"--output_dir={folder}/run",
        ])  # fmt: skip
        last = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1])
    if CORRECTED not in last:
        sys.exit("error: a signal stopped the run before its end")
    write_whole(result_file(work, name, seed), last)


# ----------------------------------------------------------------------------------- 3. all runs


def write_whole(path: Path, value) -> None:
    """JSON, there wholly or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


def result_file(work: Path, name: str, seed: int) -> Path:
    """Named by all that a result depends on, so that a changed arm is run again."""
    digest = crc32(repr((ARMS[name], BASE, PRICES, HARD, FIXED, AT_RISK)).encode())
    return work / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}-{digest:08x}.json"


def run_all(names: list[str], seeds: range, jobs: int, work: Path) -> None:
    """Runs what has no result yet, `jobs` at a time, each in a process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    missing = [(name, seed) for seed in seeds for name in names
               if not result_file(work, name, seed).exists()]  # fmt: skip
    hard = work / "hard"
    if any(ARMS[name].group == "hard" for name, _ in missing) and not hard.exists():
        make = [sys.executable, str(ROOT / "toy/make_toy.py"), *HARD.split(), "--measure", "200"]
        subprocess.run([*make, "--output", f"{hard}.part"], env=environment, check=True)
        Path(f"{hard}.part").rename(hard)

    def run(name, seed):
        command = [sys.executable, sys.argv[0], "--run", name, str(seed), "--work", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"error: {name}, seed {seed}:\n{done.stderr[-3000:]}")

    pool = ThreadPoolExecutor(jobs)
    try:
        runs = [pool.submit(run, *job) for job in missing]
        for done in tqdm(as_completed(runs), total=len(runs), unit="run"):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------- 4. report


def statistics(values) -> dict:
    """Mean, half of the 95 % interval (t), two-sided p of mean 0, and the mean that n values with
    this spread detect with 80 % power at the 5 % level, (t_0.975 + t_0.8) s / sqrt(n)."""
    values = np.asarray(values, dtype=float)
    n, mean = len(values), values.mean()
    if n < 2:
        return {"mean": mean, "half": math.nan, "p": math.nan, "detectable": math.nan}
    from scipy import stats  # here, since one seed, as in the quick test, does without it

    error = stats.sem(values)
    low, high = stats.t.ppf([0.8, 0.975], n - 1)
    p = stats.ttest_1samp(values, 0).pvalue if error else float(mean == 0)
    return {"mean": mean, "half": high * error, "p": p, "detectable": (high + low) * error}


def markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def results(names: list[str], seeds: range, work: Path) -> pd.DataFrame:
    """A line for each arm and seed, as long as no arm misses the seed."""
    lines = []
    for seed in seeds:
        files = {name: result_file(work, name, seed) for name in names}
        if not all(file.exists() for file in files.values()):
            break
        for name, file in files.items():
            lines.append({"arm": name, "seed": seed, **json.loads(file.read_text())})
    return pd.DataFrame(lines)


def levels(runs: pd.DataFrame) -> pd.DataFrame:
    """Each arm's means, intervals, and what it spent."""
    by_arm, interval = runs.groupby("arm", sort=False), "{mean:.3f} ± {half:.3f}"
    table = by_arm[list(MEASURES)].agg(lambda values: interval.format(**statistics(values)))
    for name in (f"spent {name}" for name in ("steps", "stage-2 steps", *UNITS)):
        if name in runs:  # `vanilla` spends nothing
            table[name] = by_arm[name].mean().fillna(0).map("{:,.1f}".format)
    table["1,000 tokens"] = by_arm["tokens"].mean().div(1000).map("{:,.0f}".format)
    by_seed = by_arm[SOLVED].agg(list)
    table["accuracy by seed"] = [" ".join(map("{:.3f}".format, arm)) for arm in by_seed]
    return table.reset_index()


def compared(seeds: range, work: Path) -> pd.DataFrame:
    """Every claim's arm minus arm, paired by seed."""
    lines = []
    for claim, measure, pattern, other, values in CLAIMS:
        for value in values:
            a, b = pattern.format(value), other.format(value)
            runs = results([a, b], seeds, work)
            if runs.empty:
                continue
            by_arm = runs.set_index(["arm", "seed"])[measure].astype(float)
            s = statistics(by_arm[a] - by_arm[b])
            low, high = s["mean"] - s["half"], s["mean"] + s["half"]
            reading = "no difference shown" if s["p"] >= 0.05 else "-"  # one seed has no p
            if s["p"] < 0.05:
                reading = "higher" if s["mean"] > 0 else "lower"
            lines.append({
                "claim": claim, "difference": f"{a} − {b}", "of": measure,
                "mean": f"{s['mean']:+.3f} [{low:+.3f}, {high:+.3f}]", "p": s["p"],
                "detectable": f"{s['detectable']:.3f}", "reading": reading,
            })  # fmt: skip
    return pd.DataFrame(lines)


def report(seeds: range, work: Path, output: Path) -> None:
    """This study's section of RESULTS.md and its figure, of all groups that are there."""
    claims, shown, text = compared(seeds, work), {}, []
    for group, title in GROUPS.items():
        runs = results([name for name in ARMS if ARMS[name].group == group], seeds, work)
        if not runs.empty:
            shown[title] = runs
            note = f"`--groups {group}`, {runs['seed'].nunique()} of {len(seeds)} seeds"
            text += [f"### {title}", note, markdown(levels(runs))]
    if claims.empty:
        sys.exit(f"error: no results in {work} yet")
    m, readings = len(claims), Counter(claims["reading"])
    summary = (
        f"Of these {m} comparisons {readings['higher']} are higher and {readings['lower']} lower "
        f"at p < 0.05 (chance alone: {m / 20:.1f}), {sum(claims['p'] < 0.05 / m)} also at "
        f"Bonferroni's {0.05 / m:.5f}. The columns, and what may not be concluded: STUDY.md."
    )
    claims["p"] = ["< 0.0001" if p < 1e-4 else f"{p:.4f}" for p in claims["p"]]
    section = ["![accuracy by arm and seed](study.png)", markdown(claims), summary, *text]
    write_section(output / "RESULTS.md", "study.py", "\n\n".join(section))
    draw(shown, output / "study.png")


def write_section(path: Path, name: str, text: str) -> None:
    """Puts `text` between this script's markers in a Markdown file; all around them stays."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = (path.read_text() if path.exists() else "# Measured\n\n").partition(begin)
    after = rest.partition(end)[2] or "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n## {name}\n\n{text}\n{end}{after}")


def draw(shown: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel a table: held-out accuracy of every seed, and its mean with the 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(shown), 4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    axes[0].set_ylabel("held-out accuracy")
    for axis, (title, runs) in zip(axes, shown.items()):
        arms = runs.groupby("arm", sort=False)[SOLVED]
        for x, (_, values) in enumerate(arms):
            s = statistics(values)
            axis.plot([x] * len(values), values, ".", color="tab:gray", alpha=0.6)
            axis.errorbar(x + 0.2, s["mean"], np.nan_to_num(s["half"]), fmt="o", capsize=3)
        axis.set_xticks(range(len(arms)), [arm for arm, _ in arms], rotation=45, ha="right")
        axis.set_title(title.replace(", ", ",\n"), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS)[:4], help="of arms to run")
    parser.add_argument("--seeds", type=int, default=8, help="0 .. n-1 of every arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/study", help="folder of results")
    parser.add_argument("--output", type=Path, help="folder of RESULTS.md; default: --work's")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # one run, in its own process
    options = parser.parse_args()
    work, seeds = options.work.resolve(), range(options.seeds)
    output = options.output or work
    work.mkdir(parents=True, exist_ok=True)
    if options.run:
        return one_run(options.run[0], int(options.run[1]), work)
    names = [name for name in ARMS if ARMS[name].group in options.groups]
    run_all(names, seeds, options.jobs, work)
    report(seeds, work, output)


if __name__ == "__main__":
    main()
