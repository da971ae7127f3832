r"""Word problems with solutions, mistakes, and corrections whose analysis takes every step again.

    Ida wants 48 shells. There are 19 already, and Ben brings 9. How many shells are still missing?

    solution   Shells there: 19 + 9 = 28. Shells missing: 48 - 28 = 20. The answer is \boxed{20}.
    mistake    Shells there: 19 + 9 = 28. Shells missing: 48 - 28 = 18. The answer is \boxed{18}.
    correction Analysis:
               Shells there: 19 + 9 is 28, right. Shells missing: 48 - 28 is 20, not 18.
               Corrected Solution:
               Shells there: 19 + 9 = 28. Shells missing: 48 - 28 = 20. The answer is \boxed{20}.

Not an analysis that only names the mistake: nothing in it would tell a model how to find one, and
the corrected solution would have to find the right numbers by itself. Here it copies them, and so a
gradient on the analysis alone (Eq. 12) has something to teach. The templates: word_problems.txt.
"""

import operator
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from reward import final_answer

TEMPLATES = Path(__file__).with_suffix(".txt").read_text().strip().split("\n\n")[1:]
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
    """Draws numbers until every result is whole, above 0, and stands nowhere else in it."""
    text, _, steps = rng.choice(TEMPLATES).replace("\n", " ").partition(" = ")
    text = re.sub(r"\[(.*?)\]", lambda choice: rng.choice(choice[1].split("|")), text)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    names, steps = zip(*(step.split(": ") for step in steps.format(**words).split("; ")))
    largest = {letter: largest_factor if letter in "pqr" else largest_number
               for letter in re.findall(r"[a-dp-r]", " ".join(steps))}  # fmt: skip
    while True:
        numbers = {letter: rng.randint(2, limit) for letter, limit in largest.items()}
        problem = re.sub(r" +(?=[ .?])", "", text.format(**words, **numbers))
        story = Story(problem, list(names), list(steps), numbers)
        solution = story.solve()
        whole = all(e.sign != "/" or e.left % e.right == 0 for e in solution)
        values = [*numbers.values(), *(e.value for e in solution)]
        if whole and min(values) > 0 and len(set(values)) == len(values):
            return story


def make_stories(seed: int, counts: dict[str, int], *limits: int) -> dict[str, list[Story]]:
    """Sets of these names and sizes, no problem in two of them nor twice in one.

    >>> counts = {"train": 3, "held_out": 2}
    >>> sets = make_stories(0, counts, 60, 9)
    >>> [len(stories) for stories in sets.values()], sets == make_stories(0, counts, 60, 9)
    ([3, 2], True)
    """
    sets, seen = {}, set()
    for name, count in counts.items():
        rng, sets[name] = random.Random(f"{seed} {name}"), []
        while len(sets[name]) < count:
            story = make_story(rng, *limits)
            if story.problem not in seen:
                seen.add(story.problem)
                sets[name].append(story)
    return sets


# ------------------------------------------------------------------------ mistakes and corrections

MISTAKES = [*["slip"] * 4, *["ten"] * 2, "operation", "operand", "skipped step", "halfway"]


def make_mistake(story: Story, rng) -> str:
    """A wrong solution, as a pupil would write it.

    slip          a result is off by 1, 2, 9 or 10
    ten           a carry is lost, a ten not borrowed, a group forgotten, a rest counted as a whole
    operation     subtracted where it should be added, and the like
    operand       a number of the problem where another belongs, or the result before
    skipped step  the same, and the result before was never worked out
    halfway       the first quantity is given as the answer, the last one worked out or not
    """
    while True:
        kind, step = rng.choice(MISTAKES), rng.randrange(len(story.steps))
        if kind == "halfway":
            equations = story.solve()[: rng.randint(1, len(story.steps))]
            answer = equations[0].value
        else:
            step = len(story.steps) - 1 if kind == "skipped step" else step
            equations = story.solve(step, lambda e: go_wrong(e, kind, story, rng))
            equations = equations[-1:] if kind == "skipped step" else equations
            answer = equations[-1].value
        if str(answer) != story.answer and min(e.value for e in equations) >= 0:
            return solution_text(equations, answer)


def go_wrong(e: Equation, kind: str, story: Story, rng) -> Equation:
    if kind == "slip":
        return e._replace(value=e.value + rng.choice([-10, -9, -2, -1, 1, 2, 9, 10]))
    if kind == "ten":
        return e._replace(value=e.value + {"+": -10, "-": 10, "*": -e.left, "/": 1}[e.sign])
    sign, operands = e.sign, [e.left, e.right]
    if kind == "operation":
        sign = {"+": "-", "-": "+", "*": "+", "/": "*"}[sign]
    else:
        first = story.solve()[0]  # in a later step it is the one to be replaced
        place = operands.index(first.value) if e.name != first.name else rng.randrange(2)
        operands[place] = rng.choice(list(story.numbers.values()))
    return Equation(e.name, operands[0], sign, operands[1], SIGNS[sign](*operands))


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
    found = re.findall(r"(\w[^.:\n]*): (\d+) ([-+*/]) (\d+) = (\d+)", text)
    return [Equation(name[0].lower() + name[1:], int(left), sign, int(right), int(value))
            for name, left, sign, right, value in found]  # fmt: skip


def which_digits(right: int, wrong: int) -> str:
    """
    >>> which_digits(43, 53), which_digits(43, 44), which_digits(43, 52)
    (': the tens are wrong', ': the ones are wrong', '')
    """
    if right // 10 == wrong // 10:
        return ": the ones are wrong"
    return ": the tens are wrong" if right % 10 == wrong % 10 and abs(right - wrong) < 100 else ""


def same_task(a: Equation, b: Equation) -> bool:
    turned = a.sign in "+*" and (a.left, a.right) == (b.right, b.left)
    return a.sign == b.sign and (turned or (a.left, a.right) == (b.left, b.right))


def analysis(story: Story, wrong_solution: str) -> str:
    """Every step again, beside what the wrong solution has for it: by name, or else by place."""
    written, sentences = read_equations(wrong_solution), []
    by_name = {e.name: e for e in written}
    for k, e in enumerate(story.solve()):
        old = by_name.get(e.name, written[k] if len(written) == len(story.steps) else None)
        if old is None:
            finding = f"this step is missing, {e.task} is {e.value}"
        elif not same_task(old, e):
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
