"""A real language model through the whole method: word problems, warm start, GRPO beside ScRPO.

    python bench/real_model.py table                                               # 1, 2
    python bench/real_model.py --methods grpo --rates 1e-5 2e-5 --seeds 100        # choose a rate,
    python bench/real_model.py --rates 1e-5 --seeds 0 1 2 3 --jobs 12              # then compare
    python bench/real_model.py --methods grpo scrpo --jobs 8 --minutes 7 --work DIR   # in a hurry
    python bench/real_model.py report --work DIR                                   # what is there

As it comes, a small model boxes no answer and writes neither section of a correction, so neither
stage would learn anything. Hence, each in --work, and skipped where its result is there:

1. Warm start: supervised learning on solutions and corrections, at the rate of --warm_rates with
   the lowest loss on the last tenth of the first half. There the wrong solutions are made, in the
   second half they are the model's own, where it has one.
2. Table before RL: has it the form, is there room to learn, can it correct? If not, change
   --largest_number. Of its wrong answers 256 are fixed errors, which every policy corrects.
3. Runs: each trains by train.py until it has asked --questions, and is measured, also where it has
   drawn as many samples as GRPO does in all, which a constant rate allows. With --minutes all runs
   stop after the same step and are measured there; without it, the same command continues them.
4. Report: report.md. Intervals are Student's over paired seeds. Those over problems
   do not hold the spread of seeds, so they say nothing of methods.

The rate: where GRPO, at a seed of its own, solves most held-out problems in the end. Twelve runs
share one card only with small micro-batches: 4,096 tokens took 8.8 GiB in fp32 [measured], and
8,192 should in bf16, in which a GPU computes [estimate]. A CPU needs --train_flags
"--micro_batch_tokens 2048".
"""

import argparse
import json
import math
import operator
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import error_pool, evaluate, reward, rollout, train  # noqa: E402, E401

_, NAMES, THINGS, *TEMPLATES = (ROOT / "bench/word_problems.txt").read_text().strip().split("\n\n")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CORRECTIONS = 0.45  # their share of the demonstrations
BATCH = 8  # demonstrations an update
GROUP = 8  # samples a question, in training
K = 4  # answers to a held-out problem, and corrections of a fixed error
FIXED_ERRORS = 256
SOLVED = "solved"
FIXED = "fixed errors corrected"
OWN = "own errors corrected"
SPOILED = "right answers spoiled"
FORMED = "both headers, own errors"
BOXED = "boxed"
WANTED = {SOLVED: "0.25 to 0.65", FIXED: "above 0.2", FORMED: "above 0.9", BOXED: "above 0.95"}
METHODS = {
    "grpo": "--algorithm grpo",
    # As many questions as the others, and about as many samples as ScRPO with its corrections.
    "grpo10": "--algorithm grpo --group_size 10",
    "scrpo": "--algorithm scrpo",
    # Its stage 1 only fills the pool, with more errors a question, so that most steps train.
    "stage2": "--algorithm scrpo --train_stages 2 --errors_per_question 4",
}
TRAIN = (f"--questions_per_step 32 --group_size {GROUP} --pool_trigger 32 --updates_per_rollout 1 "
         "--schedule constant --warmup_steps 5 --micro_batch_tokens 8192 --rollout transformers "
         "--memory_share 0.05 --eval_every 15 --save_every 30 --resume true --steps 10000")
SETTINGS = ("model", "seed", "demonstrations", "warm_rates", "training", "held_out",
            "largest_number", "max_new_tokens", "questions", "train_flags")
SELECTION = """Own errors are those that a policy still makes: the better it solves, the fewer and
the harder they are. Fixed errors are the same for all, of the policy before RL."""


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
    rng = random.Random(seed)
    distinct = {}
    while len(distinct) < sum(counts.values()):
        story = make_story(rng, largest_number)
        distinct[story.problem] = story
    stories = iter(distinct.values())
    return {name: [next(stories) for _ in range(count)] for name, count in counts.items()}


def make_mistake(story: Story, rng) -> str:
    """A wrong solution: a slip, a wrong operation or operand, with which later steps continue."""
    while True:
        kind = rng.choice(["slip", "slip", "slip", "operation", "operand", "operand"])
        wrong_step = rng.randrange(len(story.steps))
        steps = []
        carried = {}  # {right result: the result here}
        for k, (name, task, value) in enumerate(story.steps):
            left, sign, right = [carried.get(part, part) for part in task.split()]
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
    """A step of division ends in its quotient: a box with `48 / 4` undone would be wrong."""
    text = " ".join(f"{name}: {task} = {value}." for name, task, value in steps)
    return f"{text} The answer is \\boxed{{{steps[-1][2]}}}."


def correction_text(story: Story, wrong_solution: str) -> str:
    """Every step again, beside the equation that the wrong solution, made or sampled, has there.

    Naming the mistake alone would not tell a model how to find one. The corrected solution copies
    these numbers, so that a gradient on the analysis alone (Eq. 12) has something to teach.
    """
    written = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", wrong_solution)
    written += [("nothing", "")] * len(story.steps)
    analysis = []
    for (name, task, value), (wrong_task, wrong_value) in zip(story.steps, written):
        if wrong_task != task:
            finding = f"not {wrong_task} but {task}, which is {value}"
        elif wrong_value != str(value):
            finding = f"{task} is {value}, not {wrong_value}"
        else:
            finding = f"{task} is {value}, right"
        analysis.append(f"{name}: {finding}.")
    if finding.endswith("right"):  # then only the box can be wrong
        analysis.append(f"The answer is {value}, not {reward.final_answer(wrong_solution)}.")
    return f"Analysis:\n{' '.join(analysis)}\nCorrected Solution:\n{solution_text(story.steps)}"


# ================================================================================== warm start


def demonstrations(stories: list, wrong: list[str]) -> list[tuple[str, str]]:
    """(user turn, response): corrections of `wrong`, and solutions of the other stories."""
    rows = []
    for story, text in zip(stories, wrong):
        prompt = error_pool.correction_prompt(story.problem, text)
        rows.append((prompt, correction_text(story, text)))
    for story in stories[len(wrong) :]:
        rows.append((rollout.solution_prompt(story.problem), solution_text(story.steps)))
    return rows


def warm_start(args, first: list, second: list) -> None:
    """The first half at each rate, which falls to its half; the second one at the best, to 0."""
    rng = random.Random(args.seed)
    asked = round(CORRECTIONS * len(first))
    rows = demonstrations(first, [make_mistake(story, rng) for story in first[:asked]])
    losses = {}
    for rate in args.warm_rates:
        of_updates = supervise(args, args.model, rows, args.work / f"half-{rate}", float(rate))
        # Each demonstration is seen once, so its loss is that of one not trained on.
        losses[rate] = float(np.mean(of_updates[-max(1, len(of_updates) // 10) :]))
    best = min(losses, key=losses.get)
    evaluate.write(args.work / "warm_rate.json", [{"chosen": best, "losses": losses}])
    with sampler(args, args.work / f"half-{best}") as (draw, tokenizer):
        tasks = rollout.load_tasks(tokenizer, str(args.work / "second.jsonl"))
        answers = [group.samples[0] for group in draw(tasks[:asked], range(1))]
    wrong = []
    for story, own in zip(second, answers):
        wrong.append(own.text if is_error(own) else make_mistake(story, rng))
    rows = demonstrations(second, wrong)
    supervise(args, args.work / f"half-{best}", rows, args.work / "warm", float(best) / 2, 0.0)


def supervise(args, source, rows: list[tuple], folder: Path, rate: float, last_share=0.5) -> list:
    """A plain loop over the demonstrations, once each, with the loss on responses only. The rate
    falls to `last_share` of itself. Returns the loss of each update."""
    log = folder.with_name(f"{folder.name}.json")
    if folder.exists():
        return evaluate.read(log)[0]
    model, tokenizer = rollout.load_policy(str(source), torch.float32, args.device)
    pairs = []
    for user, response in rows:
        prompt = rollout.render(tokenizer, user)
        ids = tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        pairs.append((torch.tensor(prompt + ids), torch.tensor([-100] * len(prompt) + ids)))
    pairs.sort(key=lambda pair: len(pair[0]))  # so that little is padded
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    random.Random(0).shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for batch in tqdm(batches, desc=folder.name, unit="update"):
        ids, labels = zip(*batch)
        ids = pad_sequence(ids, batch_first=True).to(model.device)  # right: in no token's past
        labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        spent = len(losses) / len(batches)
        optimizer.param_groups[0]["lr"] = rate * (1 - spent + spent * last_share)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    evaluate.write(log, [losses])
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return losses


# ================================================================================= measurement


@contextmanager
def sampler(args, folder: Path):
    """(draw, tokenizer) of a checkpoint."""
    bf16 = args.device.type == "cuda"  # as train.py computes
    dtype = torch.bfloat16 if bf16 else torch.float32
    model, tokenizer = rollout.load_policy(str(folder), dtype, args.device)
    engine = rollout.make_engine("transformers", model, tokenizer, max_context=2048)
    with reward.Grader() as grader:
        yield drawing(args, engine, tokenizer, grader), tokenizer


def drawing(args, engine, tokenizer, grader):
    """draw(tasks, samples, span=None): always at these seeds, so that policies are paired."""
    return partial(rollout.sample_groups, engine, tokenizer, grader, seed=args.seed,
                   temperature=1.0, max_new_tokens=args.max_new_tokens)


def is_error(sample) -> bool:
    """What may enter the pool: finished and wrong (Eq. 8)."""
    return sample.finished and sample.verdict == "wrong"


def measure(args, draw, tokenizer) -> dict:
    """K answers to each held-out problem, a correction of each first one, right or wrong, and K
    corrections of each fixed error; the first policy that is measured makes these."""
    correction = partial(rollout.correction_task, tokenizer, corrects=0)
    answers = draw(rollout.load_tasks(tokenizer, str(args.work / "held_out.jsonl")), range(K))
    file = args.work / "fixed_errors.jsonl"
    if not file.exists():
        errors = []
        for group in answers:
            texts = [sample.text for sample in group.samples if is_error(sample)]
            errors += [{"problem": group.problem, "answer": group.answer, "response": text,
                        "question": group.question} for text in texts[:1]]
        evaluate.write(file, errors[:FIXED_ERRORS])
    first = [group.samples[0] for group in answers]
    tasks = [correction(group.problem, group.answer, sample.text, group.question)
             for group, sample in zip(answers, first) if sample.finished]
    own = {group.question: group.samples[0] for group in draw(tasks, range(1), span="sections")}
    tasks = [correction(**row) for row in evaluate.read(file)]
    fixed = draw(tasks, range(K), span="sections")
    return {
        "boxed": [int(reward.final_answer(sample.text) is not None) for sample in first],  # [J]
        "right": [list(map(int, group.rewards)) for group in answers],  # [J,K]
        "error": [int(is_error(sample)) for sample in first],  # [J]
        # Of the first answer's correction; what was cut off has none [J].
        "corrected": [int(q in own and own[q].reward) for q in range(len(first))],
        "formed": [int(q in own and own[q].analysis is not None) for q in range(len(first))],
        "fixed": {group.question: list(map(int, group.rewards)) for group in fixed},  # [F][K]
    }


# ======================================================================================== runs


@dataclass(frozen=True)
class Run:
    """A method at a rate and a seed; its checkpoints stand in `folder` until it has ended."""

    work: Path
    method: str
    rate: str
    seed: int

    @property
    def file(self) -> Path:
        return self.work / "runs" / f"{self.method}-{self.rate}-{self.seed}.json"

    @property
    def folder(self) -> Path:
        return self.file.with_suffix("")

    def result(self) -> dict:
        """What was measured; `complete` unless --minutes stopped it."""
        return (evaluate.read(self.file) or [{"complete": False, "states": {}, "curve": []}])[0]

    def curve(self) -> list[dict]:
        return evaluate.read(self.folder / "metrics.jsonl")


def chosen_runs(args, rates: list[str]) -> list[Run]:
    return [Run(args.work, *names) for names in product(args.methods, rates, args.seeds)]


def one_run(args, one: Run) -> None:
    """In a process of its own: trains, measures, writes the result."""
    equal_samples = args.questions * GROUP
    early = one.folder / "at_equal_samples.json"
    write_line = train.log

    def at_end(line: dict) -> bool:
        return line["questions"] >= args.questions

    def measured(run) -> dict:
        run.engine.update_weights(run.model)
        state = {name: vars(run.state)[name] for name in ("step", "samples", "questions")}
        draw = drawing(args, run.engine, run.tokenizer, run.grader)
        return state | measure(args, draw, run.tokenizer)

    def log(run, metrics, groups) -> None:
        write_line(run, metrics, groups)
        stops = evaluate.read(args.work / "stop_after.json")
        if at_end(vars(run.state)) or run.state.step >= min(stops, default=math.inf):
            run.config.steps = run.state.step  # the loop takes this step for its last one
        elif run.state.samples >= equal_samples and not early.exists():
            evaluate.write(early, [measured(run)])

    def finish(run) -> None:
        result = {"states": {one.method: measured(run)}, "curve": one.curve()}
        for state in evaluate.read(early):
            result["states"][f"{one.method}, samples"] = state
        result["complete"] = at_end(result["curve"][-1])
        evaluate.write(one.file, [result])

    train.log = log
    train.summary = finish
    train.save_final = lambda run: None
    flags = f"{TRAIN} {METHODS[one.method]} {args.train_flags}".split()
    for line in one.curve()[-1:]:
        if at_end(line):  # it is only measured
            flags.append(f"--steps={line['step']}")
    train.main([
        *flags, f"--model={args.work}/warm", f"--train_data={args.work}/training.jsonl",
        f"--eval_data={args.work}/held_out.jsonl", f"--output_dir={one.folder}",
        f"--max_new_tokens={args.max_new_tokens}", f"--learning_rate={one.rate}",
        f"--seed={one.seed}",
    ])


def run_all(args, deadline: float) -> list[str]:
    """Trains and measures what is not complete, --jobs at a time. Returns the logs of failures."""
    (args.work / "runs").mkdir(exist_ok=True)
    stop = args.work / "stop_after.json"
    stop.unlink(missing_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}

    def process(one: Run) -> bool:
        command = [sys.executable, __file__, "one", f"--work={args.work}", f"--rates={one.rate}",
                   f"--methods={one.method}", f"--seeds={one.seed}"]
        with one.file.with_suffix(".log").open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env=threads | os.environ)
        bar.update()
        return done.returncode == 0 and one.file.exists()

    missing = [one for one in chosen_runs(args, args.rates) if not one.result()["complete"]]
    missing.sort(key=lambda one: one.seed)
    bar = tqdm(total=len(missing), desc="runs", unit="run")
    pool = ThreadPoolExecutor(args.jobs)  # of threads that wait for a process each
    jobs = {pool.submit(process, one): one for one in missing}
    try:
        _, late = wait(jobs, timeout=max(0.0, deadline - time.monotonic()))
        running = [jobs[job] for job in late if not job.cancel()]
        if running:  # all stop after the step in which the fastest one is
            reached = [line["step"] for one in running for line in one.curve()]
            evaluate.write(stop, [max(reached, default=0) + 1])
        wait(jobs)
    finally:
        pool.shutdown(cancel_futures=True)
    for one in missing:
        if one.result()["complete"]:
            shutil.rmtree(one.folder, ignore_errors=True)
    begun = {job: one for job, one in jobs.items() if not job.cancelled()}
    return [str(one.file.with_suffix(".log")) for job, one in begun.items() if not job.result()]


# ====================================================================================== report


def counts(state: dict) -> dict:
    """{measure: (how many, of how many)} of each problem, or of each fixed error."""
    right = np.array(state["right"])  # [J,K]
    error = np.array(state["error"])  # [J]
    corrected = np.array(state["corrected"])  # [J]
    fixed = np.array([np.mean(row) for row in state["fixed"].values()])  # [F]
    first = right[:, 0]
    return {
        SOLVED: (right.mean(axis=1), np.ones(len(right))),
        FIXED: (fixed, np.ones(len(fixed))),
        OWN: (error * corrected, error),
        SPOILED: (first * (1 - corrected), first),
        FORMED: (error * state["formed"], error),
        BOXED: (np.array(state["boxed"]), np.ones(len(state["boxed"]))),
    }


def share(state: dict, name: str) -> float:
    some, of = counts(state)[name]
    return some.sum() / max(1, of.sum())


def level(states: list[dict]) -> dict:
    """What a policy of these seeds does, on average."""
    cells = {name: states[0][name] for name in ("samples", "questions")} | {"seeds": len(states)}
    for name in counts(states[0]):
        each = [share(state, name) for state in states]
        spread = f" (sd {np.std(each, ddof=1):.3f})" if len(each) > 1 else ""
        cells[name] = f"{np.mean(each):.3f}{spread}"
    return cells


def difference(ours: dict[int, dict], theirs: dict[int, dict]) -> pandas.DataFrame:
    """Rows of measures: the mean over paired seeds, with both intervals of 95 %."""
    rows = {}
    for name in (SOLVED, FIXED, OWN, SPOILED):
        of_seeds, of_problems = [], []
        for seed in sorted(ours.keys() & theirs.keys()):
            of_seeds.append(share(ours[seed], name) - share(theirs[seed], name))
            of_problems.append(counts(ours[seed])[name][0] - counts(theirs[seed])[name][0])
        rows[name] = {"difference": f"{np.mean(of_seeds):+.3f}", "seeds": len(of_seeds),
                      "95 % over seeds": student(of_seeds), "over problems": "-"}
        if name in (SOLVED, FIXED):  # of the others each policy is asked its own
            rows[name]["over problems"] = student(np.mean(of_problems, axis=0))
    return pandas.DataFrame(rows).T


def student(values) -> str:
    """Student's interval of 95 %; one seed shows nothing."""
    if len(values) < 2:
        return "-"
    from scipy import stats  # only here, for a machine with a GPU may lack it

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"[{np.mean(values) - half:+.3f}, {np.mean(values) + half:+.3f}]"


def report(args) -> None:
    """Writes and prints report.md from the results that are there."""
    before = evaluate.read(args.work / "before.json")
    if not before:
        sys.exit(f"error: {args.work} has no before.json: `table` makes it, or name another --work")
    levels = {"wanted": WANTED, "before": level(before)}
    differences, curves = {}, {}
    for rate in args.rates:
        arms = {}  # {name: {seed: state}}
        for one in chosen_runs(args, [rate]):
            result = one.result()
            for arm, state in result["states"].items():
                arms.setdefault(arm, {})[one.seed] = state
            for line in result["curve"]:
                if line.get("eval_accuracy") is not None:
                    row = curves.setdefault(f"{one.method}, {rate}", {})
                    row.setdefault(line["step"], []).append(line["eval_accuracy"])
        for arm, states in arms.items():
            levels[f"{arm}, {rate}"] = level(list(states.values()))
            others = {"before": dict.fromkeys(states, before[0])}
            if arm != "grpo":
                others |= {name: arms[name] for name in ("grpo", "grpo10") if name in arms}
            for other in others:
                if other != arm and states.keys() & others[other].keys():
                    name = f"{arm} - {other}, {rate}"
                    differences[name] = difference(states, others[other])
    tables = [pandas.DataFrame(levels).fillna("")]
    if differences:
        tables.append(pandas.concat(differences))
    if curves:
        means = pandas.DataFrame(curves).map(np.mean, na_action="ignore")
        tables.append(means.rename_axis("solved after step"))
    parts = [table.to_string(float_format="{:.3f}".format, na_rep="") for table in tables]
    text = "\n\n".join(f"```\n{part}\n```" for part in parts) + f"\n\n{SELECTION}\n"
    (args.work / "report.md").write_text(text)
    print(text)


# ========================================================================================= start


def prepare(args) -> None:
    """Problems, the warm start, and what it can do."""
    half = args.demonstrations // 2
    sizes = {"held_out": args.held_out, "training": args.training, "first": half, "second": half}
    sets = make_stories(args.seed, sizes, args.largest_number)
    for name, stories in sets.items():
        rows = [{"problem": story.problem, "answer": story.answer} for story in stories]
        evaluate.write(args.work / f"{name}.jsonl", rows)
    warm_start(args, sets["first"], sets["second"])
    with sampler(args, args.work / "warm") as (draw, tokenizer):
        state = {"samples": 0, "questions": 0} | measure(args, draw, tokenizer)
    evaluate.write(args.work / "before.json", [state])
    torch.cuda.empty_cache()  # the runs are other processes


def main(arguments=None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, parts = parser.add_argument, ("table", "runs", "report", "one")
    flag("part", nargs="?", default="runs", choices=parts,
         help="table: 1 and 2; runs: all; report: only that; one: a run, as `runs` starts it")
    flag("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub id")
    flag("--work", type=Path, default=ROOT / "runs" / "real_model", help="everything goes here")
    flag("--seed", type=int, default=0, help="of problems, demonstrations and measurements")
    flag("--demonstrations", type=int, default=2400, help="of the warm start")
    flag("--warm_rates", nargs="+", default=["1e-4", "3e-4"], help="of its AdamW; falls to 0")
    flag("--training", type=int, default=4000, help="training problems")
    flag("--held_out", type=int, default=512, help="held-out problems")
    flag("--largest_number", type=int, default=60, help="in a problem")
    flag("--max_new_tokens", type=int, default=144, help="solutions take 50, corrections 120")
    flag("--questions", type=int, default=1920, help="of a run: 60 steps of GRPO")
    flag("--train_flags", default="", help="more flags of train.py; of two the last one counts")
    flag("--rates", nargs="+", default=["1e-5"], help="learning rates of the runs")
    flag("--methods", nargs="+", default=["grpo", "grpo10", "scrpo"], choices=METHODS)
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of the runs")
    flag("--jobs", type=int, default=1, help="runs at the same time; they share the CPU's threads")
    flag("--minutes", type=float, default=10_000.0, help="from now on until all runs stop")
    args = parser.parse_args(arguments)
    if args.part == "one":
        vars(args).update(json.loads((args.work / "settings.json").read_text()))
        one_run(args, *chosen_runs(args, args.rates))
        return
    failed = []
    if args.part != "report":
        _, _, args.device = rollout.start_distributed()
        settings = {name: vars(args)[name] for name in SETTINGS}
        try:
            lock = rollout.lock_folder(args.work, settings)
            if not (args.work / "before.json").exists():
                prepare(args)
            if args.part == "runs":
                failed = run_all(args, started + 60 * args.minutes)
            lock.close()
        except ValueError as error:
            rollout.fail(error)
        finally:
            dist.destroy_process_group()
    report(args)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed, as {', '.join(failed)} say; the same command "
                 "repeats them")


if __name__ == "__main__":
    main()
