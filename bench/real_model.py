"""A real language model through the whole method: word problems, warm start, GRPO against ScRPO.

    python bench/real_model.py table                                               # 1, 2
    python bench/real_model.py --methods grpo --rates 1e-5 3e-5 1e-4 --seeds 100   # choose a rate,
    python bench/real_model.py --rates 3e-5 --seeds 0 1 2 --jobs 3                 # then compare
    python bench/real_model.py report --work bench/real_model_runs --seeds 0 1     # what is there

As it comes, a small model boxes no answer and writes neither section of a correction, so neither
stage would learn anything. Hence, each in --work, and skipped where its result is there:

1. Warm start: supervised learning on solutions and corrections. In its first half the wrong
   solutions are made, in the second they are the model's own, where it has one.
2. Table before RL: has it the form, is there room to learn, can it correct? If not, change
   --largest_number. 20 corrections are in analyses.md.
3. Runs: train.py for each method, rate and seed; it asks no question twice, so choose the rate by
   accuracy while training. Final policies answer the held-out problems, and are then deleted.
4. Report: report.md and curves.png. Intervals are over problems, paired; the spread over seeds,
   which no interval over problems covers, stands beside them.
"""

import argparse
import json
import operator
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from error_pool import correction_prompt, informative  # noqa: E402
from reward import final_answer, grade  # noqa: E402
from rollout import load_policy, render, solution_prompt  # noqa: E402

_, NAMES, THINGS, *TEMPLATES = (ROOT / "bench/word_problems.txt").read_text().strip().split("\n\n")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CORRECTIONS, BATCH = 0.45, 8  # their share of the demonstrations; demonstrations an update
GROUP = 8  # samples a question, in training and in the table before
METHODS = {
    "grpo": "--algorithm grpo",
    "scrpo": "--algorithm scrpo",
    # Its stage 1 only fills the pool, here with more errors a question, so that most steps train.
    "stage2": "--algorithm scrpo --train_stages 2 --errors_per_question 4",
}
TRAIN = (f"--group_size {GROUP} --questions_per_step 8 --pool_trigger 8 --updates_per_rollout 1 "
         "--schedule cosine --micro_batch_tokens 2048 --eval_questions 0 --resume")  # fmt: skip
ENGINE = "--rollout transformers --precision fp32"


# =============================================================================== word problems
class Story(NamedTuple):
    problem: str
    answer: str
    steps: list[tuple]  # (name of a quantity, "19 + 9", 28)


def result(task: str) -> Fraction:
    left, sign, right = task.split()
    return SIGNS[sign](Fraction(left), Fraction(right))


def make_story(rng, largest_number: int) -> Story:
    """Draws numbers until every result is whole, none is negative, and none is there twice."""
    text, _, steps = rng.choice(TEMPLATES).replace("\n", " ").partition(" = ")
    text = re.sub(r"\[(.*?)\]", lambda choice: rng.choice(choice[1].split("|")), text)
    name, other = rng.sample(NAMES.split(), 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS.split())}
    plan = [step.split(": ") for step in steps.format(**words).split("; ")]
    while True:
        known = {letter: rng.randint(2, largest_number) for letter in "abcd"}
        known |= {letter: rng.randint(2, 9) for letter in "pqr"}
        problem = re.sub(r" +(?=[ .?])", "", text.format(**words, **known))
        steps = []
        for letter, (quantity, task) in zip("xy", plan):
            task = re.sub("[a-z]", lambda match: str(known[match[0]]), task)
            known[letter] = result(task)
            steps.append((quantity[0].upper() + quantity[1:], task, known[letter]))
        numbers = re.findall(r"\d+", problem) + [str(value) for _, _, value in steps]
        if all(map(str.isdecimal, numbers)) and len(set(numbers)) == len(numbers):
            return Story(problem, numbers[-1], steps)


def make_stories(seed: int, counts: dict[str, int], largest_number: int) -> dict[str, list[Story]]:
    """Sets of these names and sizes, no problem in two of them nor twice in one."""
    rng, seen = random.Random(seed), {}
    while len(seen) < sum(counts.values()):
        story = make_story(rng, largest_number)
        seen[story.problem] = story
    stories = iter(seen.values())
    return {name: [next(stories) for _ in range(count)] for name, count in counts.items()}


def make_mistake(story: Story, rng) -> str:
    """A wrong solution: a slip, a wrong operation or operand; what follows goes on from there."""
    while True:
        kind = rng.choice(["slip", "slip", "slip", "operation", "operand", "operand"])
        wrong_step, steps, carried = rng.randrange(len(story.steps)), [], {}
        for k, (name, task, value) in enumerate(story.steps):
            left, sign, right = (carried.get(part, part) for part in task.split())
            if k == wrong_step and kind == "operation":
                sign = {"+": "-", "-": "+", "*": "+", "/": "*"}[sign]
            if k == wrong_step and kind == "operand":
                number = rng.choice(re.findall(r"\d+", story.problem))
                left, right = rng.choice([(left, number), (number, right)])
            task = f"{left} {sign} {right}"
            wrong_value = result(task)
            if k == wrong_step and kind == "slip":
                wrong_value += rng.choice([-10, -9, -2, -1, 1, 2, 9, 10])
            carried[str(value)] = str(wrong_value)
            steps.append((name, task, wrong_value))
        if all(map(str.isdecimal, carried.values())) and str(wrong_value) != story.answer:
            return solution_text(steps)


def solution_text(steps: list[tuple]) -> str:
    text = " ".join(f"{name}: {task} = {value}." for name, task, value in steps)
    return f"{text} The answer is \\boxed{{{steps[-1][2]}}}."


def correction_text(story: Story, wrong_solution: str) -> str:
    """Every step again, beside the equation that the wrong solution, made or sampled, has there.

    Naming the mistake alone would not tell a model how to find one. The corrected solution copies
    these numbers, so that a gradient on the analysis alone (Eq. 12) has something to teach.
    """
    written = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", wrong_solution)
    written, analysis = written + [("nothing", "")] * len(story.steps), []
    for (name, task, value), (wrong_task, wrong_value) in zip(story.steps, written):
        if wrong_task != task:
            finding = f"not {wrong_task} but {task}, which is {value}"
        elif wrong_value != str(value):
            finding = f"{task} is {value}, not {wrong_value}"
        else:
            finding = f"{task} is {value}, right"
        analysis.append(f"{name}: {finding}.")
    if finding.endswith("right"):  # then only the box can be wrong
        analysis.append(f"The answer is {value}, not {final_answer(wrong_solution)}.")
    return f"Analysis:\n{' '.join(analysis)}\nCorrected Solution:\n{solution_text(story.steps)}"


# ==================================================================== warm start and measurement
def demonstrations(stories: list, wrong: list[str]) -> list[tuple[str, str]]:
    """(user turn, response): corrections of `wrong`, and solutions of the other stories."""
    rows = [(correction_prompt(story.problem, text), correction_text(story, text))
            for story, text in zip(stories, wrong)]  # fmt: skip
    return rows + [(solution_prompt(story.problem), solution_text(story.steps))
                   for story in stories[len(wrong) :]]  # fmt: skip


def warm_start(args, stories: list) -> None:
    """Both halves, under a rate that falls linearly to 0."""
    rng, rate, half = random.Random(args.seed), args.warm_learning_rate, len(stories) // 2
    first, second, asked = stories[:half], stories[half:], round(CORRECTIONS * half)
    wrong = [make_mistake(story, rng) for story in first[:asked]]
    supervise(args.model, demonstrations(first, wrong), args.work / "half", rate, rate / 2)
    write_problems(args.work / "own.jsonl", second[:asked])
    own = measure(args, args.work / "half", "own", args.work / "own", correct=False)
    wrong = [text if error else make_mistake(story, rng)
             for story, text, error in zip(second, own["text"], own["error"])]  # fmt: skip
    supervise(args.work / "half", demonstrations(second, wrong), args.work / "warm", rate / 2, 0)


def supervise(source, rows: list[tuple], folder: Path, first_rate: float, last_rate: float) -> None:
    """A plain loop over the demonstrations, once each; the loss is on responses only."""
    if folder.exists():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_policy(str(source), torch.float32, device)
    pairs = []
    for user, response in rows:
        prompt = render(tokenizer, user)
        ids = tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        pairs.append((torch.tensor(prompt + ids), torch.tensor([-100] * len(prompt) + ids)))
    pairs.sort(key=lambda pair: len(pair[0]))  # so that little is padded
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    random.Random(0).shuffle(batches)
    optimizer, losses = torch.optim.AdamW(model.parameters(), weight_decay=0.0), []
    for batch in tqdm(batches, desc=folder.name, unit="update"):
        ids, labels = zip(*batch)
        ids = pad_sequence(ids, batch_first=True).to(device)  # on the right: in no token's past
        labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(device)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = first_rate + (last_rate - first_rate) * len(losses) / len(batches)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    folder.with_suffix(".json").write_text(json.dumps({"losses": losses, "demonstrations": rows}))
    model.save_pretrained(folder.with_suffix(".part"))
    tokenizer.save_pretrained(folder.with_suffix(".part"))
    folder.with_suffix(".part").rename(folder)


def write_problems(path: Path, stories: list[Story]) -> None:
    evaluate.write(path, [{"problem": s.problem, "answer": s.answer} for s in stories])


def measure(args, model: Path, name: str, folder: Path, k=1, correct=True) -> dict:
    """evaluate.py's k answers to each problem of `name`, and a correction of each, right or wrong.
    `pool` is what becomes of those that would enter the pool (Eqs. 7, 8)."""
    evaluate.main([
        *f"--temperature 1 --top_p 1 --memory_share 0.05 {ENGINE} --self_correct {correct}".split(),
        f"--k={k}", f"--seed={args.seed}", f"--max_new_tokens={args.max_new_tokens}",
        f"--model={model}", f"--benchmarks={args.work / name}.jsonl", f"--output={folder}",
    ])  # fmt: skip
    rows = evaluate.read(folder / "completions" / f"{name}.jsonl")  # all first answers come first
    corrections = evaluate.read(folder / "completions" / f"{name}.corrections.jsonl")
    corrections = {(row["question"], row["sample"]): row for row in corrections}
    cut_off = {"response": "", "solution": ""}  # has no correction
    corrections = [corrections.get((row["question"], row["sample"]), cut_off) for row in rows]
    responses, golds = [row["response"] for row in rows], [row["gold"] for row in rows]
    solutions, J = [row["solution"] for row in corrections], len(rows) // k
    right = np.array(grade(responses, golds), int).reshape(k, J)
    corrected = np.array(grade(solutions, golds), int).reshape(k, J)
    error = np.array([row["finished"] for row in rows], int).reshape(k, J) * (1 - right)
    pool = []
    for j in range(J):
        wrong = np.flatnonzero(error[:, j])
        if len(wrong) and informative(int(right[:, j].sum()), k, 0.15):
            pool.append(int(corrected[wrong[0], j]))
    own = {  # of the first answer, as are `error` and `text`
        "right": corrected[0].tolist(),
        "formed": [int(solution != "") for solution in solutions[:J]],  # Eq. 11
        "text": [row["response"] for row in corrections[:J]],
    }
    boxed = np.mean([final_answer(response) is not None for response in responses])
    return {"right": right.T.tolist(), "error": error[0].tolist(), "text": responses[:J],
            "boxed": float(boxed), "own": own, "pool": {"right": pool}}  # fmt: skip


# =============================================================================== runs and report
def result_file(args, method: str, rate: str, seed: int) -> Path:
    return args.work / "runs" / f"{method}-{rate}-{seed}.json"


def run_all(args) -> None:
    """Trains --jobs at a time, and measures each as it ends. A failure ends it; repeat to go on."""
    pool, jobs = ThreadPoolExecutor(args.jobs), {}  # of threads that wait for a process each
    for seed, rate, method in product(args.seeds, args.rates, args.methods):
        file = result_file(args, method, rate, seed)
        if file.exists():
            continue
        command = [
            sys.executable, f"{ROOT}/train.py", *f"{TRAIN} {ENGINE} {METHODS[method]}".split(),
            f"--model={args.work / 'warm'}", f"--train_data={args.work / 'training.jsonl'}",
            f"--output_dir={file.with_suffix('')}", f"--learning_rate={rate}", f"--seed={seed}",
            f"--steps={args.steps}", f"--max_new_tokens={args.max_new_tokens}",
            *args.train_flags.split(),
        ]  # fmt: skip
        log = file.with_suffix(".log").open("w")
        job = pool.submit(subprocess.run, command, check=True, stdout=log, stderr=log)
        jobs[job] = file
    try:
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs", unit="run"):
            job.result()  # raises where train.py failed
            folder = jobs[job].with_suffix("")
            result = measure(args, folder / "final", "held_out", folder / "held_out")
            del result["text"], result["own"]["text"]
            result["curve"] = evaluate.read(folder / "metrics.jsonl")
            jobs[job].write_text(json.dumps(result))
            shutil.rmtree(folder)
    finally:
        pool.shutdown(cancel_futures=True)


def shares(results: list[dict], weights=1.0) -> dict:
    """Ratios of sums over seeds and problems; a row of weights [R,J] is a resampling of these."""
    right, error = (np.array([result[name] for result in results]) for name in ("right", "error"))
    corrected = np.array([result["own"]["right"] for result in results])  # [N,J]
    first = right[:, :, 0]
    counted = {
        "solved": (right.mean(axis=2), np.ones(first.shape)),
        "own errors corrected": (error * corrected, error),
        "right answers spoiled": (first * (1 - corrected), first),
    }
    return {name: (weights * some.sum(0)).sum(-1) / np.maximum((weights * of.sum(0)).sum(-1), 1e-9)
            for name, (some, of) in counted.items()}  # fmt: skip


def over_seeds(results: list[dict]) -> dict:
    each = pandas.DataFrame([shares([result]) for result in results])
    spread = each.std(ddof=min(1, len(results) - 1))
    return {name: f"{mean:.3f} (sd {spread[name]:.3f})" for name, mean in shares(results).items()}


def difference(ours: list[dict], theirs: list[dict]) -> dict:
    J, cells = len(ours[0]["right"]), {}
    weights = np.random.default_rng(0).multinomial(J, np.full(J, 1 / J), size=4000)
    here, there = shares(ours, weights), shares(theirs, weights)
    for name, mean in shares(ours).items():
        low, high = np.percentile(here[name] - there[name], (2.5, 97.5))
        cells[name] = f"{mean - shares(theirs)[name]:+.3f} [{low:+.3f}, {high:+.3f}]"
    return cells


def table_before(result: dict) -> pandas.DataFrame:
    solved, corrected, spoiled = shares([result]).values()
    error, pool = np.array(result["error"]), result["pool"]["right"]
    headers = (error * result["own"]["formed"]).sum() / max(1, error.sum())
    table = {
        "boxed": (result["boxed"], "at least 0.95"),
        "solved": (solved, "0.25 to 0.65"),
        "both headers, own errors": (headers, "at least 0.9"),
        "own errors corrected": (corrected, "at least 0.2"),
        f"of the {len(pool)} that enter the pool": (sum(pool) / max(1, len(pool)), "at least 0.35"),
        "right answers spoiled": (spoiled, ""),
    }
    return pandas.DataFrame(table, index=["before RL, T = 1", "must be"]).T


def report(args) -> None:
    """Writes report.md and curves.png from the results that are there."""
    before = json.loads((args.work / "before.json").read_text())
    levels, differences = {"before": over_seeds([before])}, {}
    axis = Figure(figsize=(6, 4), layout="constrained").subplots()
    axis.set(xlabel="samples drawn", ylabel="accuracy while training, T = 1")
    for rate in args.rates:
        done = {"before": [before]}
        for method in args.methods:
            files = [result_file(args, method, rate, seed) for seed in args.seeds]
            results = [json.loads(file.read_text()) for file in files if file.exists()]
            if not results:
                continue
            for other in [name for name in done if name in ("before", "grpo")]:
                differences[f"{method} - {other}, {rate}"] = difference(results, done[other])
            done[method] = results
            curve = pandas.DataFrame([row for result in results for row in result["curve"]])
            curve = curve[["samples", "accuracy"]].dropna().sort_values("samples")
            parts = np.array_split(curve.to_numpy(float), 10)
            bins = [part.mean(axis=0) for part in parts if len(part)]
            axis.plot(*np.transpose(bins), marker="o", label=f"{method}, {rate}")
            last = curve.accuracy.tail(max(1, len(curve) // 4)).mean()
            level = {"seeds": len(results), "last quarter of training": last}
            levels[f"{method}, {rate}"] = level | over_seeds(results)
    axis.legend(*axis.get_legend_handles_labels())
    axis.figure.savefig(args.work / "curves.png", dpi=120)
    tables = table_before(before), pandas.DataFrame(levels).T, pandas.DataFrame(differences).T
    how = {"float_format": "{:.3f}".format, "na_rep": ""}
    text = "\n\n".join(f"```\n{table.to_string(**how)}\n```" for table in tables if len(table))
    (args.work / "report.md").write_text(text)
    print(text)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, parts = parser.add_argument, ("table", "runs", "report")
    flag("part", nargs="?", default="runs", choices=parts, help="table, or all, or only the report")
    flag("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub id")
    flag("--work", type=Path, default=ROOT / "runs" / "real_model", help="everything goes here")
    flag("--seed", type=int, default=0, help="of problems, demonstrations and measurements")
    flag("--demonstrations", type=int, default=2400, help="of the warm start")
    flag("--warm_learning_rate", type=float, default=1e-4, help="of its AdamW; falls to 0")
    flag("--training", type=int, default=2000, help="training problems")
    flag("--held_out", type=int, default=512, help="held-out problems")
    flag("--largest_number", type=int, default=60, help="in a problem")
    flag("--max_new_tokens", type=int, default=144, help="solutions take 50, corrections 120")
    flag("--rates", nargs="+", default=["3e-5"], help="learning rates of the runs")
    flag("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    flag("--steps", type=int, default=40, help="of a run")
    flag("--jobs", type=int, default=1, help="runs at the same time")
    flag("--train_flags", default="", help="more flags of train.py; of two the last one counts")
    args = parser.parse_args(arguments)
    before = args.work / "before.json"
    if args.part != "report" and not before.exists():
        (args.work / "runs").mkdir(parents=True, exist_ok=True)
        counts = {name: vars(args)[name] for name in ("held_out", "training", "demonstrations")}
        sets = make_stories(args.seed, counts, args.largest_number)
        for name in ("held_out", "training"):
            write_problems(args.work / f"{name}.jsonl", sets[name])
        warm_start(args, sets["demonstrations"])
        result = measure(args, args.work / "warm", "held_out", args.work / "before", GROUP)
        pages = [f"**{sets['held_out'][j].problem}**\n\n```\n{result['text'][j]}\n\n"
                 f"{result['own']['text'][j]}\n```\n" for j in np.flatnonzero(result["error"])]
        (args.work / "analyses.md").write_text("\n".join(pages[:20]))
        before.write_text(json.dumps(result))
    if args.part == "runs":
        run_all(args)
    report(args)


if __name__ == "__main__":
    main()
