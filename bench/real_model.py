r"""A real language model through the whole method: word problems, warm start, GRPO against ScRPO.

    python bench/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct          # all of it
    python bench/real_model.py --model FOLDER table                                 # up to the table before RL
    python bench/real_model.py --model FOLDER compare --methods grpo scrpo --seeds 0 1 2 --jobs 3
    python bench/real_model.py --model FOLDER report                                # from what is there

As it comes, a small model boxes no answer and writes neither section of a correction, so both stages
would learn nothing. Hence, each part in --work, each skipped where its result is there:

1. data      Word problems of two steps from the templates below; no problem is in two of: training, held
             out, demonstrations. --largest_number and --largest_factor make them harder or easier.
2. warm      Supervised learning on solutions and corrections. A demonstrated analysis takes every step
             again and says what differs, and the corrected solution uses it:

                 Analysis:
                 Shells in all: 19 + 43 is 62, right. Shells left: 62 - 19 is 43, not 53: the tens are wrong.
                 Corrected Solution:
                 Shells in all: 19 + 43 = 62. Shells left: 62 - 19 = 43. The answer is \boxed{43}.

             Not an analysis that only names the mistake: nothing would tell the model how to find one. In
             the first half wrong solutions are made; in the second most are the model's own, drawn after
             the first, so that it learns to correct the mistakes that it makes.
3. table     Before any RL: does it have the form, is there room to learn, and can it correct at all?
4. rates     GRPO at three learning rates, at a seed of its own; the best one serves all methods.
5. compare   train.py, as it is, for each method and seed; each final policy is measured on the same
             held-out problems with the same seeds, and then deleted (2 GB); a result is a small file.
6. report    report.md and curves.png. Intervals are over problems, paired: all policies answered the same
             ones. The spread over seeds stands beside them, for no interval over problems covers it.

No training question is asked twice in a run of default length, so accuracy *while training* is that of
unseen problems, and costs nothing: train.py's own evaluation is off.
"""

import argparse
import json
import operator
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from error_pool import ErrorPool, correction_prompt  # noqa: E402  the prompts of training itself
from loss import token_logprobs  # noqa: E402
from reward import Grader, final_answer, find_correction  # noqa: E402
from rollout import make_engine, render, sample_seed, solution_prompt  # noqa: E402

# ==================================================================================== 1. word problems

# [this|that] is a choice; a to d are numbers, p to r are factors; behind = stand the steps, of which x is
# the first one's result.
TEMPLATES = """
[{name} has|On a shelf {name} keeps] {a} {things} and [gets {b} more|then buys another {b}]. [Later|On the
way home] {name} loses {c} of them. How many {things} [are left|does {name} have in the end]?
= {things} in all: a + b; {things} left: x - c

{name} [has|owns] {a} {things}, gives {b} of them to {other} and [then finds {c} more|is later given {c}
new ones]. How many {things} does {name} have now? = {things} kept: a - b; {things} now: x + c

[There are|{name} fills] {p} boxes with {q} {things} [each|in every box]. [Another {a}
{things} lie|And there are {a} {things}] on the table. How many {things} [is that|are there] in all?
= {things} in boxes: p * q; {things} in all: x + a

{name} [buys|opens] {p} packs of {q} {things} [each |]and [uses|needs] {a} of them for [school|a present].
How many {things} [remain|are not used]? = {things} in packs: p * q; {things} left: x - a

{name} [has|collected] {a} {things}. {other} [has|collected] {b} more than {name}. How many {things} do
[the two|both of them] have together? = {things} of {other}: a + b; {things} together: a + x

{name} [made|sold] {a} {things} and {other} {b} fewer. How many {things} is that [together|for both]?
= {things} of {other}: a - b; {things} together: a + x

{name} has {q} {things}. {other} has {p} times as many. [Together, how many {things} do they have?|How
many {things} do they have together?] = {things} of {other}: p * q; {things} together: q + x

{name} [puts|throws] {a} {things} and {b} more [in a bag|on a heap]. {p} friends share them [equally|so
that all get the same]. How many {things} does each [friend|of them] get?
= {things} in all: a + b; {things} for each: x / p

{name} [buys|pays for] {p} {things}. [Each costs|The price of each is] {q} dollars. {name} [hands over|
pays with] {a} dollars. How many dollars does {name} get back? = dollars to pay: p * q; dollars back: a - x

A bag costs {a} dollars and a [hat|lamp] {b}. {name} buys both and had {c} dollars [before|at first]. How
many dollars does {name} have left? = dollars for both: a + b; dollars left: c - x

{name} [reads|writes] {p} pages [a day|every day] for {q} days. The book has {a} pages. How many pages are
still [missing|to come]? = pages so far: p * q; pages to come: a - x

[A bus|A train] [leaves with|carries] {a} people. At the first stop {b} get off, and at the second {c}.
How many people are still in it? = people after one stop: a - b; people after two stops: x - c

{name} has {a} {things} and gives {b} away. The rest go into {p} [bags|boxes], [the same number in each|
equally]. How many {things} are in each? = {things} kept: a - b; {things} in each: x / p

{name} has {p} bags of {q} {things}. {other} has {a} {things}. How many more {things} does {name} have
[than {other}|]? = {things} of {name}: p * q; {things} more: x - a

{name} [saves|earns] {p} dollars [a week|every week] for {q} weeks and had {a} dollars [before|already].
How many dollars does {name} have now? = dollars from the weeks: p * q; dollars now: a + x

{name} wants {a} {things}. [{name} has {b}|There are {b} already], and {other} brings {c}. How many
{things} are still missing? = {things} there: b + c; {things} missing: a - x

[A hall|A cinema] has {p} rows of {q} seats. {a} [of the seats|seats] are taken. How many seats are free?
= seats in all: p * q; seats free: x - a

Each of {p} children [brings|carries] {q} red {things} and {r} blue ones. How many {things} do they bring
[together|in all]? = {things} for each child: q + r; {things} in all: p * x

A rope is {a} meters long. {name} cuts off {b} meters and cuts the rest into pieces of {p} meters. How
many pieces are there? = meters left: a - b; pieces: x / p

[In a class|On a team] there are {a} girls and {b} boys. [Today|This week] {c} of them are ill. How many
are [there today|not ill]? = children in all: a + b; children not ill: x - c

{name} is {a} years old and {other} is {b} years older. How old will {other} be in {c} years?
= years of {other} now: a + b; years of {other} then: x + c

{name} [plants|counts] {p} rows of {q} trees. [The wind takes {a} of them|{a} of them are
cut down]. How many trees still stand? = trees in rows: p * q; trees standing: x - a
"""
NAMES = "Mia Tom Ana Ben Eva Leo Ida Max Nina Paul Rosa Sam Vera Hugo Lena Omar".split()
THINGS = "shells cards beads coins stamps pens apples nuts balls stones cups toys keys eggs".split()
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


class Equation(NamedTuple):
    """One step, as it stands in a solution; of the wrong ones `value` may be anything."""

    name: str  # of the quantity
    left: int
    sign: str
    right: int
    value: int

    @property
    def task(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


@dataclass
class Story:
    problem: str
    names: list[str]  # of the quantities, one a step
    steps: list[str]  # "a + b", "x - c"
    numbers: dict[str, int]  # what the letters stand for

    @property
    def answer(self) -> str:
        return str(self.solve()[-1].value)

    def solve(self, wrong_step=None, change=None) -> list[Equation]:
        """The equations; at `wrong_step` what `change` makes of the right one, carried on from."""
        known, equations = dict(self.numbers), []
        for k, (name, step) in enumerate(zip(self.names, self.steps)):
            left, sign, right = step.split()
            left, right = known[left], known[right]
            equation = Equation(name, left, sign, right, SIGNS[sign](left, right))
            equations.append(change(equation) if k == wrong_step else equation)
            known["xyz"[k]] = equations[-1].value
        return equations


def make_story(rng, largest_number: int, largest_factor: int) -> Story:
    """Draws numbers until every result is whole, above 0, and stands nowhere else in the problem."""
    text, _, steps = rng.choice(TEMPLATES.strip().split("\n\n")).replace("\n", " ").partition("= ")
    text = re.sub(r"\[(.*?)\]", lambda choice: rng.choice(choice[1].split("|")), text)
    text = re.sub(r" +(?=[ .?])", "", text).strip()
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    names, steps = zip(*(step.split(": ") for step in steps.format(**words).split("; ")))
    letters = sorted(set(re.findall(r"[a-dp-r]", " ".join(steps))))
    while True:
        numbers = {letter: rng.randint(2, largest_factor if letter in "pqr" else largest_number)
                   for letter in letters}  # fmt: skip
        story = Story(text.format(**words, **numbers), list(names), list(steps), numbers)
        solution = story.solve()
        whole = all(e.sign != "/" or e.left % e.right == 0 for e in solution)
        values = [*numbers.values(), *(e.value for e in solution)]
        if whole and min(values) > 0 and len(set(values)) == len(values):
            return story


def make_stories(args) -> dict[str, list[Story]]:
    """Three sets, no problem in two of them nor twice in one: a function of the seed and the counts."""
    stories, seen = {}, set()
    counts = {"held_out": args.held_out, "train": args.training, "demonstrations": args.demonstrations}
    for name, count in counts.items():
        rng, stories[name] = random.Random(f"{args.seed} {name}"), []
        while len(stories[name]) < count:
            story = make_story(rng, args.largest_number, args.largest_factor)
            if story.problem not in seen:
                seen.add(story.problem)
                stories[name].append(story)
    return stories


# ============================================================================ 2. mistakes and corrections

MISTAKES = [*["slip"] * 4, *["ten"] * 2, "operation", "operand", "skipped step", "halfway"]
OTHER_SIGN = {"+": "-", "-": "+", "*": "+", "/": "*"}


def make_mistake(story: Story, rng) -> str:
    """A wrong solution, as a pupil would write it."""
    while True:
        kind, step = rng.choice(MISTAKES), rng.randrange(len(story.steps))

        def change(e: Equation) -> Equation:
            if kind == "slip":
                return e._replace(value=e.value + rng.choice([-10, -9, -2, -1, 1, 2, 9, 10]))
            if kind == "ten":  # a carry lost, a ten not borrowed, a group too few, a rest forgotten
                return e._replace(value=e.value + {"+": -10, "-": 10, "*": -e.left, "/": 1}[e.sign])
            sign, left, right = e.sign, e.left, e.right
            if kind == "operation":
                sign = OTHER_SIGN[sign]
            elif step == 0 or kind == "operand" and "x" not in story.steps[step].split()[0]:
                right = rng.choice(list(story.numbers.values()))
            else:  # a number of the problem where the first step's result belongs
                left = rng.choice(list(story.numbers.values()))
            return Equation(e.name, left, sign, right, SIGNS[sign](left, right))

        if kind == "halfway":  # the answer is to another question than the one asked
            equations = story.solve()[: rng.randint(1, len(story.steps))]
            answer = equations[0].value
        else:
            step = len(story.steps) - 1 if kind == "skipped step" else step
            equations = story.solve(step, change)[-1 if kind == "skipped step" else 0 :]
            answer = equations[-1].value
        if str(answer) != story.answer and min(e.value for e in equations) >= 0:
            return solution_text(equations, answer)


def capital(name: str) -> str:
    return name[0].upper() + name[1:]


def solution_text(equations: list[Equation], answer) -> str:
    steps = [f"{capital(e.name)}: {e.task} = {e.value}." for e in equations]
    return " ".join([*steps, f"The answer is \\boxed{{{answer}}}."])


def read_equations(text: str) -> list[Equation]:
    """
    >>> read_equations("Cups in all: 19 + 43 = 52. The answer is \\\\boxed{52}.")
    [Equation(name='cups in all', left=19, sign='+', right=43, value=52)]
    """
    found = re.findall(r"([^.:\n]+): (\d+) ([-+*/]) (\d+) = (\d+)", text)
    return [Equation((name := n.strip())[0].lower() + name[1:], int(left), sign, int(right), int(value))
            for n, left, sign, right, value in found if n.strip()]  # fmt: skip


def which_digits(right: int, wrong: int) -> str:
    """
    >>> which_digits(43, 53), which_digits(43, 44), which_digits(43, 52)
    (': the tens are wrong', ': the ones are wrong', '')
    """
    if right // 10 == wrong // 10:
        return ": the ones are wrong"
    return ": the tens are wrong" if right % 10 == wrong % 10 and abs(right - wrong) < 100 else ""


def analysis(story: Story, wrong_solution: str) -> str:
    """Every step again, beside what the wrong solution has for it."""
    written, sentences = read_equations(wrong_solution), []
    by_name = {e.name: e for e in written}
    for k, e in enumerate(story.solve()):
        in_its_place = written[k] if len(written) == len(story.steps) else None
        old = by_name.get(e.name, in_its_place)
        if old is None:
            finding = f"this step is missing, {e.task} is {e.value}"
        elif old.sign != e.sign or (old.left, old.right) not in {(e.left, e.right)} | (
            {(e.right, e.left)} if e.sign in "+*" else set()
        ):
            finding = f"not {old.task} but {e.task}, which is {e.value}"
        elif old.value != e.value:
            finding = f"{e.task} is {e.value}, not {old.value}{which_digits(e.value, old.value)}"
        else:
            finding = f"{e.task} is {e.value}, right"
        sentences.append(f"{capital(e.name)}: {finding}.")
    if old and finding.endswith("right"):  # then only the box can be wrong
        sentences.append(f"Asked for are {e.name}, {e.value}, not {final_answer(wrong_solution)}.")
    return " ".join(sentences)


def correction_text(story: Story, wrong_solution: str) -> str:
    solution = solution_text(story.solve(), story.answer)
    return f"Analysis:\n{analysis(story, wrong_solution)}\nCorrected Solution:\n{solution}"
