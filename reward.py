r"""Responses -> R in {0, 1} (Eq. 1), and the two sections of a correction (Eqs. 11, 12).

A wrong answer that is paid poisons the training; a right one that is missed costs a sample. So an
answer in doubt is wrong, and so is one that leaves work to the reader: a policy that is paid for it
soon boxes the question. Answers that are not the gold letter for letter go to a worker, which is a
process of its own, because SymPy may hang or eat memory and only a process can be killed.
    >>> grade([r"\boxed{0.5}", r"\boxed{964+494}"], ["1/2", "1458"])
    [1.0, 0.0]
"""

import bisect
import contextlib
import functools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import NamedTuple

MEMORY = 2**30  # a worker's address space, in bytes
START = 120.0  # seconds until a worker is ready

THINKING = {  # the mark that opens it: the mark that closes it
    "<think>": "</think>",
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "◁think▷": "◁/think▷",  # Kimi
    "<|channel|>": "<|channel|>final<|message|>",  # gpt-oss: every channel but the final one
}


def answer_start(text: str) -> int:
    """Where the answer begins: behind all thinking, and nowhere if thinking never ends."""
    start = 0
    for opening, closing in THINKING.items():
        answer = text.rpartition(closing)[2]
        if opening in answer:
            return len(text)
        start = max(start, len(text) - len(answer))
    return start


def after_thinking(text: str) -> str:
    """All of a text without thinking, nothing of one whose thinking never ends.

    >>> [after_thinking(text) for text in ("<think>2+2</think>It is 4.", "It is 4.", "<think>2+2")]
    ['It is 4.', 'It is 4.', '']
    """
    return text[answer_start(text):].strip()


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} after the thinking; None if it is missing or left open."""
    box, body = after_thinking(text).rpartition(r"\boxed")[1:]
    body = body.lstrip()
    if not box or not body.startswith("{"):
        return None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # an escaped \{ opens nothing
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return body[1:match.start()].strip() or None
    return None


def grade(responses: list[str], golds: list[str], timeout: float = 5.0) -> list[float]:
    """R of each response to its gold: 1.0 if it is right, else 0.0."""
    with Grader(deadline=timeout) as grader:
        return [float(verdict == "right") for verdict in grader.verdicts(responses, golds)]  # Eq. 1


class Grader(contextlib.ExitStack):
    """Workers, started when needed, kept between calls, stopped by close(); deadline in seconds."""
    def __init__(self, workers=2, deadline=5.0):
        super().__init__()
        self.deadline = deadline
        self.idle = [None] * workers  # None: a worker that is yet to be started

    def verdicts(self, responses, golds, problems=None) -> list[str]:
        """For each response "right", "wrong" or "ungradable" (late, too large, a gold not read).

        With the problems, an answer copied out of its problem is wrong even if it equals the gold,
        unless it is the gold as written.
        """
        pairs = zip(responses, golds, problems or [""] * len(golds), strict=True)
        jobs = [(gold.strip(), final_answer(text), problem) for text, gold, problem in pairs]
        todo = list(dict.fromkeys(jobs))  # samples often agree
        with ThreadPoolExecutor(len(self.idle)) as threads:  # they only wait for the workers
            verdict_of = dict(zip(todo, threads.map(self.mark, todo)))
        return [verdict_of[job] for job in jobs]  # Eq. 1

    def mark(self, job: tuple[str, str | None, str]) -> str:
        """One verdict. A worker has one answer at a time, so no other is lost with it."""
        gold, answer, _ = job
        if answer is None or answer == gold:
            return "right" if answer else "wrong"
        worker = self.idle.pop() or self.start()
        verdict = ask(worker, [*job, self.deadline], self.deadline)
        if not verdict:
            worker.kill()
            worker.communicate()
        self.idle.append(worker if verdict else None)
        return verdict or "ungradable"

    def start(self):
        """A worker that has warmed up on two lines. It ends with its stdin, so with the trainer."""
        worker = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)], text=True, start_new_session=True,
            env={**os.environ, "SYMPY_GROUND_TYPES": "python"},  # gmpy2 aborts at a memory limit
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.callback(worker.communicate)
        self.callback(worker.kill)
        if ask(worker, ["y=2x+1", "y-2x=1", "", START], START) != "right":
            raise RuntimeError(f"a grading worker did not start; see {' '.join(worker.args)}")
        return worker


def ask(worker, job, seconds):
    """The verdict on [gold, answer, problem, deadline]; "" if the worker is late or dead."""
    with contextlib.suppress(OSError):
        print(json.dumps(job), file=worker.stdin, flush=True)
    return worker.stdout.readline().strip() if wait([worker.stdout], seconds) else ""


class Correction(NamedTuple):
    """token_ids[start:end] is the analysis (Eq. 12); `solution`, a text, is graded (Eq. 11)."""
    start: int
    end: int
    solution: str


def find_correction(token_ids: list[int], tokenizer, span="sections") -> Correction | None:
    """The sections of a well-formed correction, else None (Eq. 11).

    The analysis is the tokens that lie wholly between its headers, which are [ours]; with
    span="prefix" it starts at token 0. Nothing is decoded with skip_special_tokens, because the
    marks of thinking may be special tokens.
    """
    silent = (tokenizer.eos_token_id, tokenizer.pad_token_id)

    def text_of(k):  # of the first k tokens, because single ones lose bytes and spaces
        return tokenizer.decode([token for token in token_ids[:k] if token not in silent])

    def whole(k):  # characters that the first k tokens hold in full; U+FFFD is half of one
        prefix = text_of(k)
        return len(prefix if text.startswith(prefix) else prefix.rstrip("\ufffd"))

    text = text_of(len(token_ids))
    after = answer_start(text)
    analysis = list(header("Analysis").finditer(text[after:]))
    solution = list(header("CorrectedSolution").finditer(text[after:]))
    if len(analysis) != 1 or len(solution) != 1:  # Eq. 11: both, once each
        return None
    begin = after + analysis[0].end()
    stop = after + solution[0].start()
    if not any(map(str.isalnum, text[begin:stop])):  # nothing between them, or the wrong way round
        return None
    # start: the fewest tokens that hold all text before the analysis. end: the most tokens whose
    # text does not pass the next header. By bisection, because each look costs time of order n.
    counts = range(len(token_ids) + 1)
    start = 0 if span == "prefix" else bisect.bisect_left(counts, begin, key=whole)
    end = bisect.bisect_right(counts, stop, key=lambda k: len(text_of(k))) - 1
    return Correction(start, max(start, end), text[after + solution[0].end():])  # Eq. 12


def header(name):
    """A line that begins with the name, like `1. **Analysis:**`; a colon follows, or nothing."""
    space, marks = r"[^\S\n]*", r"(?:[^\S\n]*[#*_])*"
    letters = (marks + space).join(name)
    return re.compile(rf"^{marks}{space}(?:(?:\d+[.)]|[-+•]){marks}{space})?{letters}{marks}"
                      rf"(?:{space}:{marks}|(?={space}$))", re.IGNORECASE | re.MULTILINE)


# CHANGE: words after which a number means another one, so that no unit before them is cut off.
# TEXT and WORD: what may be a unit, written as \text{...} or plainly; single letters are variables.
CHANGE = (r"(?i:\b(?:or|and|not|plus|minus|times|over|to|point|factorial|choose|base|binary|squared"
          r"|cubed|hal(?:f|ves)|hundred|thousand|\w+illion|least|most|less|fewer|except|unless|if"
          r"|false|wrong|is|pi)\b|(?:thirds?|(?!months)\b\w+ths?|more)\W*$)")  # 7 million is not 7
TEXT = r"\\text\{(?!\s*[aeijknqruvwxyz]\s*\})(?:[^{},;\d]|\^?\{?-?\d\}?)+\}(?:\s?\^\s?\{?-?\d\}?)?"
WORD = r"(?:[a-zA-Z]{3,}|[cmkd]m|[km]g|in|ft|yd|oz|mL|sq|[CF]|k?m/[hs])\.?(?:\^\{?\d\}?)?"
UNIT = rf"(?:{TEXT}(?:\s?(?:/|\\cdot)?\s?{TEXT})*|(?<=[\d}} ]){WORD}(?:[ /]{WORD})*)$"
SI = re.compile(r"[\d}\s](?:\\text\{)?\s*([cmk]?m|[mk]?g|in|ft|yd|m?L|s|min|h)\}?\^?\{?(\d)?\}?$")
NOTATION = {  # Each pattern is replaced by what stands behind it, in this order. [ours]
    "[−–—]": "-", "[·∙×⋅∗]": r"\\cdot ", "÷": r"\\div ", "⁄": "/",
    "√": "sqrt", "∞": r"\\infty ", "∈": r"\\in ",
    r"\\[()\[\]]|\\?[$€£]|\\text\{\W*\}|^\*\*|\*\*$|\\\\$": "",        # \$18, \(18\), **18**
    r"\\(?:left|right|displaystyle|bf|rm)(?![a-zA-Z])|\\!\s*": "",     # \left(1,2\right)
    r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s)+": " ",               # 1\,000
    r"\\(?:(?:math|text)(?:rm|bf|it|sf)|boldsymbol|bm|emph|mbox)\s?(?=\{)": r"\\text",
    r"\*\*": "^",                                                      # n**2
    r"\\[lc]?dots|\.\.\.": r"\\ldots ",                                # 1, 2, \dots
    r"\^?(?:°|\\degree|\\circ|\{\\circ\})": " ",                       # 90^\circ
    r"\\?sqrt\s*(?:\(([^()]*)\)|(\d+|[a-z]))": r"\\sqrt{\1\2}",        # √12, sqrt(x+1)
    r"\\[dtc]frac(?![a-z])": r"\\frac",                                # \dfrac{1}{2}
    r"\\frac\s*(\d)\s*(\d)": r"\\frac{\1}{\2}",                        # \frac12
    r"(.)\\approx\s*-?\d*\.\d+$": r"\1",                               # \sqrt{2} \approx 1.41
    r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln)(?![a-zA-Z])": r"\\\1 ",   # 2*pi
    r",?\s*\\text\{\s*,?\s*(?:for|where)\b(?:(?!\\text|[,;]).)*$": "",  # 2n, \text{ for } n > 1
    r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))": ", ",
    r"\\text\{\s*(?:\\?%|percent)\s*\}|(?<![a-zA-Z\\])percent\b|(?<!\\)%": r"\\%",
    r"\(?\\pmod\s*\{?\d+\}?\)?$": "",                                  # 9 \pmod{11}
    r"(?i)\\varnothing|\\\{\s*\\\}|^(?:\\text\{)?no (?:real )?solutions?\}?$": r"\\emptyset ",
    r"^0?(\d+:\d\d)(?:\s?(?:\\text\{)?\s*[ap]\.?m\.?\s*\}?)?$": r"\1",  # 1:58 a.m.
    r"[\s.,;:]+(\}?)$": r"\1",                                         # 5., \text{Yes.}
    r"^\s+": "",
    rf"(?<=[\w}})\]%])\s?(?!.*{CHANGE}){UNIT}": "",                    # 5 cm, 9.8\text{ m/s}^2
    r"(?<=\d)(?:\^\{?)?(?:\\text\{)?(?:st|nd|rd|th)\}*$": "",          # 23rd, 4^{\text{th}}
    r"\\text\{\s*([-+]?[\d.,]+|[A-Za-z]|\(?[A-Z][).:]*)\s*\}": r"\1",  # \text{(A)}
    r"^\(?([A-J])(?:\)|\s?[.:])+\s?(?!\\text)(?:\\[a-z]+|[^A-Za-z])*$": r"\1",  # (B) 12
    r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:(?:[ ,]|\s?\{,\}\s?)\d{3})+(?!\d|,\d|\s?[)\]]|\s?\\\})":
        lambda number: re.sub("[ ,{}]", "", number[0]),                # 1,000, but not (1,234)
    r"(?<=\d)\s?[eE]([+-]?\d+)(?!\d)": r"\\cdot 10^{\1}",              # 1.5e3
    r"(?<!\d)(\d+) (\d+)/(\d+)(?!\d)": r"\1\\frac{\2}{\3}",            # 1 1/2
    r"(\d+)\.(\d*)\\(?:overline|bar|dot)\s?\{?(\d+)\}?":               # 0.1\overline{6} = 15/90
        lambda m: rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}}}"
                  rf"{{{'9' * len(m[3])}{'0' * len(m[2])}}}",
    r"^\(?(\d\w*)\)?_\{?(\d+)\}?$": r"\1_\2",                          # (101)_{2}
    r"_\{(\w)\}": r"_\1",                                              # E_{1}
    r"(^|,|\\\{)((?:(?!\\\{)[^,;])*)\\pm([^,;]*?)(?=,|;|$|\\\})": r"\1\2+\3,\2-\3",  # 1 \pm i
    r"^(?:[A-Za-z](?:_\w)?)?\s?\\approx": "",                          # x \approx 8.24
    r"^([^=]+)=\s?([A-Za-z](?:_\w)?)$": r"\2=\1",                      # 5 = x
    r"^\\begin\{[pb]matrix\}([^&]*?)(?:\\\\)?\s?\\end\{[pb]matrix\}$":  # a column is a point
        lambda column: "(" + column[1].replace(r"\\", ",") + ")",
}


def tidy(text):
    """The text in one notation, without its unit; first cm², x₁ and 1½."""
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    for pattern, replacement in NOTATION.items():
        text = re.sub(pattern, replacement, text)
    return text.strip()


# ------------------------------------------------------------------------------ within a worker

# A worker runs this file as its program, and only it gets here with SymPy, which takes seconds to
# import and is free to hang. The trainer imports this file and calls nothing from here on.
if __name__ == "__main__":
    import sympy
    from latex2sympy2_extended import is_expr_of_only_symbols, latex2sympy2, math_normalization
    from math_verify import grader
    from sympy.core.function import AppliedUndef

    class Parser(latex2sympy2._Latex2Sympy):
        """math-verify's parser, which takes 0.1 for a float and 5(5) for 5 + 5."""
        def parse_number(self, text):
            return sympy.Rational(text.replace(",", ""))

        def convert_postfix_list(self, factors, i=0):
            value = super().convert_postfix_list(factors, i)
            following = "".join(factor.getText() for factor in factors[i + 1:])
            if isinstance(value, sympy.Rational) and following[:5] not in ("", r"\frac"):
                raise ValueError("two numbers side by side")
            return value


def judge(gold: str, answer: str, problem: str) -> str:
    """The verdict. 50% is 50, where the question says per cent, and 0.5; but 0.5% is not 0.5."""
    units = [SI.findall(unicodedata.normalize("NFKC", text)) for text in (gold, answer)]
    if all(units) and units[0] != units[1] or copied(answer, gold, problem):
        return "wrong"  # 15 m for 15 cm
    gold = tidy(gold)
    answer = tidy(answer)
    right = same(gold, answer)
    if not right and r"\%" in gold + answer and not answer.startswith(("0", ".")):
        right = same(gold.removesuffix(r"\%"), answer.removesuffix(r"\%"))
    if right and finished(gold, answer):
        return "right"
    return "wrong" if wordy(gold) or read(gold) is not None else "ungradable"


def copied(answer: str, gold: str, problem: str) -> bool:
    """Whether the answer stands in the problem, and the gold is more than another notation of it.

    A repeating decimal that the problem gives is to be turned into a fraction.
    """
    def bare(text):  # without spaces, brackets and fonts, and with $ where a formula ends
        text = re.sub(r"\\[\[\]()]", "$", re.sub(r"\\[dt]frac", r"\\frac", text))
        return re.sub(r"[\s{}()]|\\(?:left|right|displaystyle|text|[,;:!])", "", text)

    if not re.search(rf"(?<![\w.]){re.escape(bare(answer))}(?!\w)", bare(problem)):
        return False
    return r"\overline" in answer or bare(tidy(answer)) != bare(sides(tidy(gold))[-1])  # \$18 is 18


def sides(text: str) -> list[str]:
    """The sides of an equation, or of several in a row."""
    return re.split(r"(?:(?<![<>!])=|\\equiv)(?![^{}]*\})", text)


LEFT = re.compile(r"(?:\([^()]*\)|[^=,;(])*=(?![^{}]*\})")  # the left side of an equation
POWER = r"(?![01] ?\^)\d+ ?\^ ?(?!1\b)-?\d+"  # not 1458^1
TERM = rf"(?:{POWER}|\d+)"
TIMES = r"(?:\\cdot|\\times|\*)"
NUMBER = re.compile(  # one finished number, in a text that is `spaced`
    rf"(?!- ?\\frac ?-)[-+]? ?(?:(?P<integer>\d+\.?|\d(?:\.\d+)? ?{TIMES} ?10 ?\^ ?[-+]?\d+"
    rf"|{POWER}(?: ?{TIMES}? ?{POWER})*)"                              # 6 \cdot 10^{3}, 2^6 3^5
    r"|(?P<decimal>\d*\.\d+(?: ?\\%)?|\d+ ?\\%)"                       # 5.2, 50\%
    r"|(?P<root>\\sqrt ?(?:\[[2-9]\] ?)?\d+)"
    rf"|(?P<fraction>(?:\d+ ?)?(?:\\frac ?-? ?{TERM} ?{TERM}"          # 1\frac{1}{2}
    rf"|{TERM} ?(?:/|:|\\over|\\div) ?{TERM})(?: ?\^ ?\d+)?(?: ?\\%)?))"  # (3/4)^2
)
FORMS = {  # the form of a gold that is one number, and the forms that an answer may have
    "integer": ("integer", "decimal", "root"),
    "decimal": ("integer", "decimal", "fraction"),
    "fraction": ("integer", "decimal", "fraction", "reducible"),
    "reducible": ("integer", "decimal", "fraction", "reducible"),
}


def spaced(text: str) -> str:
    """The text with one space for all braces, brackets and spaces between two of its symbols."""
    return re.sub(r"(?:\\?[{}()]|\s)+", " ", text).strip()


def form(text: str) -> str | None:
    """Which kind of finished number a text is, a key of FORMS or a root; None if it is none."""
    number = NUMBER.fullmatch(spaced(text))
    if number and number["fraction"] and math.gcd(*map(int, re.findall(r"\d+", text))) > 1:
        return "reducible"
    return number and number.lastgroup


def finished(gold: str, answer: str) -> bool:
    """Whether an answer leaves no more to work out than the gold.

    A number is answered by a number: 2916/2 is none for 1458, nor is 50/4 for 12.5, but 2/4 for 1/2
    is. For all other golds the kinds of work left in the answer must be found in the gold as well.
    """
    forms = FORMS.get(form(re.sub(r"^\w+ ?=", "", gold)))
    if forms:
        return any(form(side) in forms for side in sides(answer))
    if ("=" in gold) != ("=" in answer):  # y = 2x+1 for 2x+1
        gold = LEFT.sub("", gold)
        answer = LEFT.sub("", answer)
    return undone(answer) <= undone(gold)


def wordy(text: str):
    """What is compared as words: math-verify would multiply their letters, and east equal seat."""
    text = re.sub(r"\\(?:begin|end|mathbb)\{\w+\}|\\(?!text|ldots|gcd|lcm)[A-Za-z]+", " ", text)
    words = r"(?i)\\[a-z]|[a-z]{4,}|\d_|:.*:|^[a-j]$|^\d?\d:\d\d$|^(?:yes|no|odd|all)$"
    return re.search(words, text)


def same(gold: str, answer: str) -> bool:
    """Whether two texts mean the same, letter for letter or to SymPy."""
    letters = [re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1", text) for text in (gold, answer)]
    letters = [re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text) for text in letters]
    if letters[0] == letters[1] or wordy(gold) or wordy(answer):
        return letters[0].casefold() == letters[1].casefold()
    a = read(gold)
    b = read(answer)
    if a is None or b is None:
        return False
    if a.has(sympy.Eq) != b.has(sympy.Eq):
        return equal(value(a), value(b))
    return equal(a, b)


@functools.lru_cache(1000)
def read(text: str):
    """A SymPy object; None if the text is not mathematics."""
    if re.fullmatch(r"-?\d+(?:\.\d+)?", text):
        return sympy.Rational(text)
    tidying = math_normalization.NormalizationConfig(malformed_operators=True, boxed="none")
    config = latex2sympy2.ConversionConfig(lowercase_symbols=False)
    text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", "I", text.replace(r"\%", r" \cdot 10^{-2}"))
    with contextlib.suppress(Exception):  # the parser's own, and whatever SymPy meets in nonsense
        parser = Parser(is_real=True, config=config)
        return parser.parse(math_normalization.normalize_latex(text, tidying))


def written(expression):
    """The parts of a list as they were written, in order and with what occurs twice."""
    return getattr(expression, "_unsorted_args", expression.args)


def value(expression):
    """v for x = v, f(2) = v and 2 + 3 = v, each element of a list so; nan for 2x + z = v."""
    parts = written(expression)
    if isinstance(expression, (sympy.FiniteSet, sympy.Tuple)):
        if len({part.lhs for part in parts if isinstance(part, sympy.Eq)}) > 1:
            return sympy.Tuple(*map(value, sorted(parts, key=str)))  # y = 2, x = 1
        return expression.func(*map(value, parts))
    if not grader.is_equation(expression):
        return expression
    links = [expression] if isinstance(expression, sympy.Eq) else parts
    first = links[0].lhs
    values = [link.rhs for link in links]
    named = first.free_symbols and is_expr_of_only_symbols(first)
    if not named and not isinstance(first, AppliedUndef):
        values.insert(0, first)
    return values[-1] if all(equal(one, values[-1]) for one in values) else sympy.nan


def equal(gold, answer):
    """Whether two SymPy objects are equal: terms exactly, lists element by element."""
    both = (gold, answer)
    if all(isinstance(one, (sympy.Expr, sympy.MatrixBase)) for one in both):
        return exact(gold, answer)
    if all(isinstance(one, sympy.Eq) for one in both):
        if gold.lhs.is_Symbol and gold.rhs.is_number and gold.lhs not in answer.args:
            return False  # x + 4 = 3x is a step on the way to x = 2
        factor = sympy.simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
        return bool(factor.is_number and factor.is_finite and factor != 0)
    if all(isinstance(one, (sympy.FiniteSet, sympy.Expr, sympy.Eq)) for one in both):
        lists = [written(one) if isinstance(one, sympy.FiniteSet) else [one] for one in both]
        counts = [[sum(equal(one, other) for other in side) for one in lists[0]] for side in lists]
        return len(lists[0]) == len(lists[1]) and counts[0] == counts[1]  # 10, 10 is not 10
    return grader.sympy_expr_eq(gold, answer, 6, 15, allow_set_relation_comp=True)


def exact(gold, answer, *digits):
    """Takes the place of math-verify's comparison, to which 2^-99 and 2^-98 are equal.

    The `digits` of its precision are ignored: the comparison is exact.
    """
    a = gold.doit()
    b = answer.doit()
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(exact, a.flat(), b.flat()))
    known = isinstance(a - b, sympy.Expr) and not a.has(sympy.nan, sympy.zoo)
    return known and (a == b or bool((a - b).equals(0)))


QUOTIENT = re.compile(r"\\frac (\d+) (\d+)|(\d+) ?(?:/|:|\\over|\\div) ?(\d+)")
EAGER = re.compile(  # what the parser works out at once, so that `undone` can see it only here
    r"\\(?:sum|prod|int|lim|max|min|det|[dt]?binom|choose|Gamma|operatorname|phantom|b?mod|cap|\|)"
    r"(?![a-z])|\\frac\{(?:d|\\partial)|[vV]matrix|\|_|e\^\{?\\l|!(?!=)|['?]|\^\{?(?:T|\\top)"
    r"|-(?:[^,;+\\]*(?<!\^)[({]|\\frac\{)?\s*-"                     # -(-2), (-3)(-\sqrt2), --2
    r"|\\(?:pi|sqrt)(?=[^,;+-]*\d\^\{?\d|\{\d+\}\)?\^)"             # \pi \cdot 27^2, \sqrt{2}^3
    r"|(?:e\s?\^|\\exp)(?=[^}]*(?<![a-z])i(?![a-z]))"               # e^{i\pi/4}
)


def undone(text: str) -> set:
    """The kinds of work that are left to the reader."""
    kinds = set(EAGER.findall(text))
    for terms in QUOTIENT.findall(spaced(text)):
        dividend, divisor = map(int, filter(None, terms))
        if divisor and dividend % divisor == 0:
            kinds.add("quotient")  # (48/4, 3)
    for node in sympy.preorder_traversal(read(text)):
        if isinstance(node, (sympy.MatMul, sympy.MatAdd)):
            kinds.add(node.func)
        elif isinstance(node, sympy.Add):
            if len(sympy.Add.make_args(node.doit())) < len(node.args):
                kinds.add("sum")  # 964 + 494, but not 1 + \sqrt{2}
        elif isinstance(node, sympy.Mul):  # 2 \cdot 3, 6\pi / 2, (1 - i)(1 + i), but not 5\pi / 2
            factors = [
                part for part in node.args
                if part.is_number and abs(part) != 1 and not part.has(sympy.Function)
            ]
            product = sympy.Mul(*factors, evaluate=False)
            brackets = sum(factor.is_Add for factor in factors)
            if brackets > 1 or product.doit().count_ops() < product.count_ops():
                kinds.add("product")
        elif isinstance(node, sympy.Pow) and node.exp.is_Integer and node.exp > 1:
            if node.base.is_algebraic and not node.base.is_rational:
                kinds.add("power")  # (1 + i)^2, but not \pi^2
        elif isinstance(node, sympy.Function) and node.is_number and node.func != sympy.exp:
            kinds.add(node.func.__base__)  # \log_2 8, \sin 30; sine and cosine are of one kind
        elif isinstance(node, sympy.Union) and sympy.Union(*node.args) != node:
            kinds.add("union")  # [1, 3] \cup [2, 5]
    return kinds


def work():
    """Read jobs from stdin and write verdicts to stdout until the trainer closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    grader.sympy_numeric_eq = exact
    for line in sys.stdin:
        gold, answer, problem, deadline = json.loads(line)
        # The trainer kills in time. If it is dead, this ends even C code: SIGALRM has no handler.
        signal.setitimer(signal.ITIMER_REAL, deadline + 1)
        verdict = "ungradable"
        with contextlib.suppress(Exception):  # what SymPy cannot compare costs no worker
            verdict = judge(gold, answer, problem) if len(answer) <= 2000 else verdict
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, file=replies, flush=True)


if __name__ == "__main__":
    work()
