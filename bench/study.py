"""A miniature study of ScRPO on the embedded toy: does it help, how much, and which part of it?

    pip install -r bench/requirements.txt
    python bench/study.py                      # what is missing of the core: 80 minutes on 2 cores
    python bench/study.py --groups rates pool  # the sweeps: as long again
    python bench/study.py --groups             # no runs, only tables and figure of what is there
    python bench/study.py --groups --output bench          # publish them in bench/RESULTS.md

1. An *arm* is a method under a budget: flags of train.py, and perhaps a fork of a few lines. Each
   run of an arm at a seed is a process of its own that calls train.main; its result is one JSON
   file in runs/study, named by all its flags. Kill the study at any time: the same command goes on,
   and loses at most the runs in progress (half a minute). Delete the folder after a change of what
   train.py computes.
2. Budgets are spent, not planned: a fork of both stages counts samples, stage-1 questions,
   corrections or seconds, lets the learning rate fall as a cosine of the share spent, and ends
   the run when all is spent. So every method reaches rate 0 just as its own budget ends. Not a
   constant rate, under which one run would serve all budgets: the toy's accuracy then jumps by
   0.2 between steps, which hides any difference between methods. Not fixed numbers of steps:
   DAPO's samples and ScRPO's questions a step are known only when they are drawn.
3. The same seed means the same order of questions and the same seeds of samples in every arm, so
   tests are paired over seeds. Beside each stands the difference that it would have detected.
   Seeds are 0, 1, ..., n-1; the budget was chosen by looking at GRPO alone at seed 100 (0.88 after
   24 steps: learned much, no ceiling).
4. STUDY.md explains the columns, and says what may not be concluded.
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
from itertools import chain, takewhile
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BASE = ("--schedule constant --steps 2000 --save_every 100000 --eval_every 0 "
        "--eval_questions 1000 --learning_rate 5e-4")  # fmt: skip
# Seconds of a step of 256 samples with its update, on one core of the machine that the first
# edition was measured on. Charged, not measured, so that the tables do not depend on the machine.
PRICES = {"stage 1": 0.783, "stage 1, dapo": 1.365, "stage 2": 1.783}
# Of make_toy.py, for the harder toy: longer sums, other misconceptions, less training.
HARD = "--digits 4 --seed 1 --steps 400"
MEASURES = ("accuracy", "fixed errors corrected", "own errors corrected", "right answers spoiled")
SOLVED, CORRECTED, OWN, SPOILED = MEASURES
HELD_OUT = (1000, 300, 200)  # problems solved, fixed errors corrected, right answers at risk
UNITS = {"samples": "samples", "questions": "stage-1 questions", "seconds": "seconds"}
RATES, MORE_RATES = ("2.5e-4", "5e-4"), ("1.25e-4", "1e-3")  # the latter in the sweeps
CONTROLS = ("random tokens", "random success")


# ----------------------------------------------------------------------- 1. arms, tables, claims


@dataclass(frozen=True)
class Arm:
    unit: str  # of the budget: samples, questions (of stage 1), corrections, or seconds
    budget: float
    flags: str  # of train.py; a later one wins
    fork: str = ""  # one of CONTROLS
    labels: int = 0  # training questions, another set for each seed; 0: all 6,000
    toy: str = "toy"  # or hard: another policy and its task, made with the flags HARD


def make_arms() -> dict[str, Arm]:
    """{name: arm}. GRPO's 24 steps are the measure of all three budgets, so its one run stands in
    all three tables; DAPO pays a sample and a question alike, so two tables share a run too."""
    size = "--questions_per_step 32 --group_size 8 --pool_trigger 32"
    half = "--questions_per_step 16 --group_size 8 --pool_trigger 16"
    budget = {"samples": 24 * 256, "questions": 24 * 32, "seconds": 24 * PRICES["stage 1"]}
    samples = budget["samples"]
    arms = {
        "vanilla": Arm("samples", 0, f"{size} --steps 0"),
        "hard vanilla": Arm("samples", 0, f"{half} --steps 0", toy="hard"),
        "GRPO": Arm("samples", samples, f"{size} --algorithm grpo"),
        "DAPO": Arm("samples", samples, f"{size} --algorithm dapo"),
        "DAPO, seconds": Arm("seconds", budget["seconds"], f"{size} --algorithm dapo"),
        "ScRPO without filter": Arm("samples", samples, f"{size} --min_variance 0"),
    }
    for unit in UNITS:
        arms[f"ScRPO, {unit}"] = Arm(unit, budget[unit], size)

    # Stage 2 alone. Every wrong response is kept, so that the untrained stage 1 costs few rollouts.
    alone = f"{size} --train_stages 2 --errors_per_question 8 --learning_rate"
    for rate in (*RATES, *MORE_RATES):
        for credit, flags in (
            ("analysis", ""),
            ("all tokens", " --credit response"),
            ("both signs", " --success_conditioned False"),
        ):
            arms[f"{credit}, {rate}"] = Arm("corrections", 20 * 256, f"{alone} {rate}{flags}")
    for control in CONTROLS:
        arms[control] = Arm("corrections", 20 * 256, f"{alone} 5e-4", control)

    # Scarce labels: 16 steps of half the size, a third of the budget, see each question 8 times.
    for name, toy in (("scarce", "toy"), ("hard", "hard")):
        few = {"labels": 32, "toy": toy}
        arms[f"{name} GRPO"] = Arm("samples", samples / 3, f"{half} --algorithm grpo", **few)
        for unit in UNITS:
            third, keeping_all = budget[unit] / 3, f"{half} --errors_per_question 8"
            arms[f"{name} ScRPO, {unit}"] = Arm(unit, third, half, **few)
            arms[f"{name} ScRPO all errors, {unit}"] = Arm(unit, third, keeping_all, **few)

    # Sweeps of the whole method.
    for rate in MORE_RATES:
        at = f"{size} --learning_rate {rate}"
        for method in ("GRPO", "DAPO", "ScRPO"):
            flags = f"{at} --algorithm {method.lower()}"
            arms[f"{method} at {rate}"] = Arm("samples", samples, flags)
        arms[f"ScRPO at {rate}, questions"] = Arm("questions", budget["questions"], at)
    for name, values in (("pool_trigger", (64, 128)), ("errors_per_question", (2, 8))):
        for value in values:
            arms[f"{name} {value}"] = Arm("samples", samples, f"{size} --{name} {value}")
    return arms


def each(pattern: str, values) -> list[str]:
    return [pattern.format(value) for value in values]


def make_tables() -> list[tuple[str, str, list[str], list[tuple[str, str]]]]:
    """[(group, title, arms, pairs of them to compare)]. The controls are to refute a claim."""
    tables = []

    def add(group, title, pairs, *others):
        rows = dict.fromkeys([arm for a, b in pairs for arm in (b, a)] + list(others))
        tables.append((group, title, list(rows), pairs))

    for unit, words in UNITS.items():
        scrpo, dapo = f"ScRPO, {unit}", "DAPO, seconds" if unit == "seconds" else "DAPO"
        pairs = [("GRPO", "vanilla"), (dapo, "GRPO"), (scrpo, "vanilla"), (scrpo, "GRPO")]
        add("budgets", f"Equal {words}", pairs)
    pairs = [("ScRPO, samples", "ScRPO without filter")]
    add("budgets", "Variance filter (Eq. 7) on and off, equal samples", pairs)

    analysis = each("analysis, {}", RATES)
    pairs = [(arm, "vanilla") for arm in (*analysis, *CONTROLS)]
    pairs += [("analysis, 5e-4", control) for control in CONTROLS]
    pairs += zip(analysis, each("all tokens, {}", RATES))
    pairs += zip(analysis, each("both signs, {}", RATES))
    add("stage2", "Stage 2 alone: no gradient from stage 1, equal corrections", pairs)

    for name, more in (("scarce", ""), ("hard", ", longer sums, a shakier start")):
        for unit, words in UNITS.items():
            scrpo = f"{name} ScRPO, {unit}", f"{name} ScRPO all errors, {unit}"
            pairs = [(f"{name} GRPO", "vanilla" if name == "scarce" else "hard vanilla")]
            pairs += [(arm, f"{name} GRPO") for arm in scrpo]
            add(name, f"Scarce labels: 32 training questions{more}, equal {words}", pairs)

    rates = sorted((*RATES, *MORE_RATES), key=float)
    pairs = [*zip(each("analysis, {}", rates), each("both signs, {}", rates))]
    title = "Learning rates of the credit rules, stage 2 alone, equal corrections"
    add("rates", title, pairs, *each("all tokens, {}", rates))
    title = "Learning rates of the methods (5e-4 where none is named), equal "
    grpo, dapo, scrpo = (each(f"{name} at {{}}", MORE_RATES) for name in ("GRPO", "DAPO", "ScRPO"))
    add("rates", title + "samples", [*zip(scrpo, grpo)], "GRPO", "DAPO", "ScRPO, samples", *dapo)
    pairs = [*zip(each("ScRPO at {}, questions", MORE_RATES), grpo)]
    add("rates", title + "stage-1 questions", pairs, "GRPO", "ScRPO, questions")
    settings = [arm for arm in ARMS if arm.startswith(("pool_", "errors_"))]
    title = "Pool trigger (else 32) and errors per question (else 1), equal samples"
    add("pool", title, [(arm, "ScRPO, samples") for arm in settings], "GRPO")
    return tables


ARMS = make_arms()
TABLES = make_tables()
CLAIMS = (  # in the paper's words or ours; the difference that would show it; for each of these
    ("ScRPO solves more than GRPO", SOLVED, "ScRPO, {}", "GRPO", UNITS),
    ("... at other learning rates too", SOLVED, "ScRPO at {}", "GRPO at {}", MORE_RATES),
    ("... at other learning rates too", SOLVED, "ScRPO at {}, questions", "GRPO at {}", MORE_RATES),
    ("ScRPO corrects more errors than GRPO", CORRECTED, "ScRPO, {}", "GRPO", UNITS),
    ("... solves more with scarce labels too", SOLVED, "scarce ScRPO, {}", "scarce GRPO", UNITS),
    ("... keeping all errors", SOLVED, "scarce ScRPO all errors, {}", "scarce GRPO", UNITS),
    ("... with scarce labels and longer sums too", SOLVED, "hard ScRPO, {}", "hard GRPO", UNITS),
    ("... keeping all errors", SOLVED, "hard ScRPO all errors, {}", "hard GRPO", UNITS),
    ("learning to diagnose teaches to solve", SOLVED, "analysis, {}", "vanilla", ["5e-4"]),
    ("... because success means something", SOLVED, "analysis, {}", "random success", ["5e-4"]),
    ("... because the analysis gets the credit", SOLVED, "analysis, {}", "random tokens", ["5e-4"]),
    ("credit for the analysis is better than for all tokens", SOLVED,
     "analysis, {}", "all tokens, {}", RATES),
    ("credit for success is better than both signs", SOLVED,
     "analysis, {}", "both signs, {}", RATES),
    ("the variance filter helps", SOLVED, "ScRPO, {}", "ScRPO without filter", ["samples"]),
)  # fmt: skip


# ---------------------------------------------------------------------- 2. one run, and its forks


def within_budget(train, arm: Arm) -> None:
    """Forks both stages of train.py: they count what they spend, set the learning rate by it, and
    end the run."""
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
                stage2_steps=int(state.stage == 2),
                seconds=PRICES[kind] * config.questions_per_step * config.group_size / 256,
            )
            if spent[arm.unit] >= arm.budget - 1e-9:
                config.steps = step  # the loop takes this step for its last
            return groups, examples, metrics | {"spent": dict(spent)}

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
    at a seed of the run.

    fixed  file of the errors that all runs of the study correct: wrong answers of the untrained
           policy to held-out problems. Where the file is not there, this run makes it.
    """
    from evaluate import correction_tasks
    from rollout import Task, render, solution_prompt

    config, (n, n_fixed, n_spoiled) = run.config, HELD_OUT

    def sample(tasks, seed, span=None):
        return train.sample_groups(
            run.engine, run.tokenizer, run.grader, tasks, range(1), seed=seed, span=span,
            temperature=config.temperature, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip

    def answers(seed):
        tasks = []
        for question, p in enumerate(run.eval_problems[:n]):
            prompt = render(run.tokenizer, solution_prompt(p.problem))
            tasks.append(Task(p.problem, p.answer, prompt, question))
        groups = sample(tasks, seed)
        right = [group for group in groups if group.rewards == [1.0]]
        return right, [group for group in groups if group.rewards != [1.0]]

    def to_correct(groups):
        context = run.engine.max_context
        return correction_tasks(run.tokenizer, groups, config.max_new_tokens, context)

    def success(tasks):
        rewards = [group.rewards for group in sample(tasks, config.seed, "sections")]
        return float(np.mean(rewards)) if rewards else math.nan

    run.engine.wake()
    run.engine.update_weights(run.model)
    if run.state.step == 0 and not fixed.exists():  # the untrained policy, so always the same
        _, wrong = answers(seed=1_000_003)
        write_whole(fixed, [asdict(task) for task in to_correct(wrong)[:n_fixed]])
    if run.state.step == 0 and config.steps:  # before training all arms are `vanilla`
        return {}
    right, wrong = answers(config.seed)
    return {
        SOLVED: len(right) / (len(right) + len(wrong)),
        CORRECTED: success([Task(**task) for task in json.loads(fixed.read_text())]),
        OWN: success(to_correct(wrong)),
        SPOILED: 1 - success(to_correct(right[:n_spoiled])),
    }


def one_run(name: str, seed: int, work: Path) -> None:
    """In a process of its own: trains, measures, writes the result."""
    sys.path.insert(0, str(ROOT))
    import train

    arm = ARMS[name]
    toy = ROOT / "toy" if arm.toy == "toy" else work / arm.toy
    if arm.fork:
        {"random tokens": random_tokens, "random success": random_success}[arm.fork](train, seed)
    within_budget(train, arm)
    train.evaluate_policy = lambda run: measure(run, train, work / f"fixed-errors-{arm.toy}.json")
    train.summary = lambda run: None  # it would look for train.py's own evaluation
    with tempfile.TemporaryDirectory() as folder:
        data = toy / "train.jsonl"
        if arm.labels:  # the same for all arms at a seed
            lines = data.read_text().splitlines(keepends=True)
            data = Path(folder) / "few.jsonl"
            data.write_text("".join(lines[seed * arm.labels :][: arm.labels]))
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
    digest = crc32(repr((ARMS[name], BASE, PRICES, HARD, HELD_OUT)).encode())
    return work / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}-{digest:08x}.json"


def run_all(names: list[str], seeds: range, jobs: int, work: Path) -> None:
    """Runs what has no result yet, `jobs` at a time, each in a process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    missing = [(name, seed) for seed in seeds for name in names
               if not result_file(work, name, seed).exists()]  # fmt: skip
    hard = work / "hard"
    if any(ARMS[name].toy == "hard" for name, _ in missing) and not hard.exists():
        make = [sys.executable, str(ROOT / "toy/make_toy.py"), *HARD.split(), "--measure", "200"]
        subprocess.run([*make, "--output", f"{hard}.part"], env=environment, check=True)
        Path(f"{hard}.part").rename(hard)

    def run(name, seed):
        command = [sys.executable, sys.argv[0], "--run", name, str(seed), "--work", str(work)]
        log = result_file(work, name, seed).with_suffix(".log")
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
        if code:
            raise SystemExit(f"error: {name}, seed {seed} ended with code {code}; see {log}")
        log.unlink()

    pool = ThreadPoolExecutor(jobs)
    try:
        runs = [pool.submit(run, *job) for job in missing]
        for done in tqdm(as_completed(runs), total=len(runs), unit="run"):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------- 4. report


def statistics(values: list[float]) -> dict:
    """Mean, half of the 95 % interval (t), two-sided p of mean 0, and the mean that n values with
    this spread detect with 80 % power at the 5 % level, (t_0.975 + t_0.8) s / sqrt(n)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"mean": mean, "half": math.nan, "p": math.nan, "detectable": math.nan}
    from scipy import stats  # here: with one seed, as in the quick test, none is needed

    error = stats.sem(values)
    low, high = stats.t.ppf([0.8, 0.975], n - 1)
    p = stats.ttest_1samp(values, 0).pvalue if error else float(mean == 0)
    return {"mean": mean, "half": high * error, "p": p, "detectable": (high + low) * error}


def number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.3f}"


def row_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def header(*cells: str) -> list[str]:
    return [row_of(cells), "|" + " --- |" * len(cells)]


def levels(results: dict[str, list[dict]]) -> list[str]:
    """Each arm's means, intervals, and what it spent."""
    spending = ("steps (stage 2)", *UNITS.values(), "1,000 tokens")
    lines = header("", *MEASURES, *spending, "accuracy by seed")
    for name, runs in results.items():
        cells = [name]
        for measure in MEASURES:
            s = statistics([math.nan if run[measure] is None else run[measure] for run in runs])
            cells.append(f"{number(s['mean'])} ± {number(s['half'])}")
        total = Counter(tokens=sum(run["tokens"] for run in runs))
        for run in runs:
            total.update(run.get("spent", {}))
        mean = {key: total[key] / len(runs) for key in ("steps", "stage2_steps", "tokens", *UNITS)}
        cells.append(f"{mean['steps']:.1f} ({mean['stage2_steps']:.1f})")
        cells += [f"{mean['samples']:,.0f}", f"{mean['questions']:,.0f}", f"{mean['seconds']:.1f}"]
        cells += [f"{mean['tokens'] / 1000:,.0f}", " ".join(number(run[SOLVED]) for run in runs)]
        lines.append(row_of(cells))
    return lines


COMPARED = ("mean", "p", "detectable", "reading")


def differences(results: dict[str, list[dict]], pairs) -> dict:
    """{(arm, arm, measure): (p, cells of a line)}: arm minus arm, paired by seed."""
    found = {}
    for a, b in pairs:
        for measure in (SOLVED, CORRECTED):
            s = statistics([x[measure] - y[measure] for x, y in zip(results[a], results[b])])
            ends = s["mean"], s["mean"] - s["half"], s["mean"] + s["half"]
            mean, low, high = (number(value, "+") for value in ends)
            p = "< 0.0001" if s["p"] < 1e-4 else f"{s['p']:.4f}"
            reading = "no difference shown"
            if s["p"] < 0.05:
                reading = "higher" if s["mean"] > 0 else "lower"
            cells = [f"{mean} [{low}, {high}]", p, number(s["detectable"]), reading]
            found[a, b, measure] = s["p"], cells
    return found


def report(seeds: range, work: Path, output: Path) -> None:
    """This study's section of RESULTS.md and its figure, of all groups that are there."""
    text, found, shown = [], {}, {}
    for group, title, rows, pairs in TABLES:
        results = {}
        for name in rows:
            files = takewhile(Path.exists, (result_file(work, name, seed) for seed in seeds))
            results[name] = [json.loads(file.read_text()) for file in files]
        n = min(map(len, results.values()))  # seeds 0 .. n-1, of which no row misses one
        if n == 0:
            continue
        shown[title] = {name: runs[:n] for name, runs in results.items()}
        new = differences(shown[title], pairs)
        found |= new
        missing = f" ({len(seeds)} were planned)" if n < len(seeds) else ""
        text += [f"\n### {title}\n", f"`--groups {group}`, seeds 0 to {n - 1}{missing}\n"]
        text += [*levels(shown[title]), "", *header("paired difference", "of", *COMPARED)]
        text += [row_of([f"{a} − {b}", of, *cells]) for (a, b, of), (_, cells) in new.items()]

    claims = header("claim", "difference", "of", *COMPARED)
    for claim, of, pattern, other, values in CLAIMS:
        for a, b in zip(each(pattern, values), each(other, values)):
            if (a, b, of) in found:
                claims.append(row_of([claim, f"{a} − {b}", of, *found[a, b, of][1]]))
    readings, m = Counter(cells[-1] for _, cells in found.values()), max(1, len(found))
    summary = (
        f"Of the {m} different comparisons below {readings['higher']} are higher and "
        f"{readings['lower']} lower at p < 0.05; {m / 20:.1f} would be by chance if nothing "
        f"differed. {sum(p < 0.05 / m for p, _ in found.values())} also pass Bonferroni's bound, "
        f"p < {0.05 / m:.5f}. What the columns are, and what may not be concluded: STUDY.md."
    )
    picture = "![accuracy by arm and seed](study.png)"
    section = "\n".join([picture, "", *claims, "", summary, *text])
    write_section(output / "RESULTS.md", "study.py", section)
    draw(shown, output / "study.png")


def write_section(path: Path, name: str, text: str) -> None:
    """Puts `text` between this script's markers in a Markdown file; all around them stays."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = (path.read_text() if path.exists() else "# Measured\n\n").partition(begin)
    after = rest.partition(end)[2] or "\n"
    path.write_text(f"{before}{begin}\n## {name}\n\n{text}\n{end}{after}")
    print(f"written: {path}")


def draw(shown: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """A panel for each of the first tables: accuracy of every seed, and its mean with the 95 %
    interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = [title for title in shown if title.startswith(("Equal", "Stage 2"))] or list(shown)
    figure, axes = plt.subplots(1, max(1, len(titles)), squeeze=False, layout="constrained")
    figure.set_size_inches(4.2 * max(1, len(titles)), 4)
    for axis, title in zip(axes[0], titles):
        for x, runs in enumerate(shown[title].values()):
            values = [run[SOLVED] for run in runs]
            s = statistics(values)
            axis.plot([x] * len(values), values, ".", color="tab:gray", alpha=0.6)
            half = np.nan_to_num(s["half"])
            axis.errorbar(x + 0.2, s["mean"], half, fmt="o", color="tab:blue", capsize=3)
        names = list(shown[title])
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
        axis.set_title(title.replace(": ", ":\n").replace(", ", ",\n"), fontsize="small")
        axis.grid(alpha=0.3, axis="y")
    axes[0, 0].set_ylabel("held-out accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    core, groups = ["budgets", "stage2", "scarce", "hard"], {group for group, *_ in TABLES}
    parser.add_argument("--groups", nargs="*", default=core, help=f"of arms: {', '.join(groups)}")
    parser.add_argument("--seeds", type=int, default=8, help="0 .. n-1 of every arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/study", help="folder of results")
    parser.add_argument("--output", type=Path, help="folder of RESULTS.md; default: --work's")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # one run, in its own process
    options = parser.parse_args()
    if unknown := set(options.groups) - groups:
        parser.error(f"--groups: no such group: {', '.join(unknown)}")
    work, seeds = options.work.resolve(), range(options.seeds)
    output = options.output or work
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    if options.run:
        return one_run(options.run[0], int(options.run[1]), work)
    asked = [rows for group, _, rows, _ in TABLES if group in options.groups]
    run_all(list(dict.fromkeys(chain(*asked))), seeds, options.jobs, work)
    report(seeds, work, output)


if __name__ == "__main__":
    main()
