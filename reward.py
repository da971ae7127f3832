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

if __name__ == "__main__":  # A worker runs this file. The trainer imports it, without SymPy.
    import sympy
    from latex2sympy2_extended import is_expr_of_only_symbols, latex2sympy2, math_normalization
    from math_verify import grader
    from sympy.core.function import AppliedUndef

MEMORY = 2**30  # a worker's address space, in bytes
START = 120.0  # seconds until a worker is ready

THINKING = {  # the marks that open and close it
    "<think>": "</think>",
    "<thought>": "</thought>",  # EXAONE Deep
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "◁think▷": "◁/think▷",  # Kimi
    "<|channel|>": "<|channel|>final<|message|>",  # gpt-oss: all channels but the final one
    "<|channel>": "<channel|>",  # Gemma 4
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
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
    last = text.rfind(r"\boxed")
    body = text[last + len(r"\boxed"):].lstrip()
    if last < answer_start(text) or not body.startswith("{"):
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
        """Each "right", "wrong" or "ungradable": late, out of memory, a gold nobody can read.

        With the problems, an answer that is copied out of its problem is wrong, be it equal or not.
        """
        jobs = []
        verdict_of = {}
        problems = problems or [""] * len(golds)
        for response, gold, problem in zip(responses, golds, problems, strict=True):
            job = (gold.strip(), final_answer(response), problem)
            if job[1] in (job[0], None):
                verdict_of[job] = "right" if job[1] else "wrong"
            jobs.append(job)
        todo = [job for job in dict.fromkeys(jobs) if job not in verdict_of]  # samples often agree
        with ThreadPoolExecutor(len(self.idle)) as threads:  # they only wait for the workers
            verdict_of.update(zip(todo, threads.map(self.mark, todo)))
        return [verdict_of[job] for job in jobs]  # Eq. 1

    def mark(self, job: tuple[str, str, str]) -> str:
        """One verdict. A worker has one answer at a time, so no other is lost with it."""
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
    silent = {getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}

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
    counts = range(len(token_ids) + 1)  # by bisection: each look costs time of order n
    start = 0 if span == "prefix" else bisect.bisect_left(counts, begin, key=whole)
    end = bisect.bisect_right(counts, stop, key=lambda k: len(text_of(k))) - 1
    return Correction(start, max(start, end), text[after + solution[0].end():])  # Eq. 12


def header(name):
    """A line that begins with the name, like `1. **Analysis:**`; a colon follows, or nothing."""
    space, marks = r"[^\S\n]*", r"(?:[^\S\n]*[#*_])*"
    letters = (marks + space).join(name)
    return re.compile(rf"^{marks}{space}(?:(?:\d+[.)]|[-+•]){marks}{space})?{letters}{marks}"
                      rf"(?:{space}:{marks}|(?={space}$))", re.IGNORECASE | re.MULTILINE)


CHANGE = (r"(?i:\b(?:or|and|not|plus|minus|times|over|to|point|factorial|choose|base|binary|squared"
          r"|cubed|hal(?:f|ves)|hundred|thousand|\w+illion|least|most|less|fewer|except|unless|if"
          r"|false|wrong|is|pi)\b|(?:thirds?|(?!months)\b\w+ths?|more)\W*$)")  # 7 million is not 7
TEXT = r"\\text\{(?!\s*[aeijknqruvwxyz]\s*\})(?:[^{},;\d]|\^?\{?-?\d\}?)+\}(?:\s?\^\s?\{?-?\d\}?)?"
WORD = r"(?:[a-zA-Z]{3,}|[cmkd]m|[km]g|in|ft|yd|oz|mL|sq|[CF]|k?m/[hs])\.?(?:\^\{?\d\}?)?"
UNIT = rf"(?:{TEXT}(?:\s?(?:/|\\cdot)?\s?{TEXT})*|(?<=[\d}} ]){WORD}(?:[ /]{WORD})*)$"
SI = re.compile(r"[\d}\s](?:\\text\{)?\s*([cmk]?m|[mk]?g|in|ft|yd|m?L|s|min|h)\}?\^?\{?(\d)?\}?$")
# Pattern => replacement, in which ~ is a space; one after another, then an example of the line.
NOTATION = r"""
[−–—] => -   [·∙×⋅∗] => \\cdot~   ÷ => \\div~   ⁄ => /
√ => sqrt   ∞ => \\infty~   ∈ => \\in~
\\[()\[\]]|\\?[$€£]|\\text\{\W*\}|^\*\*|\*\*$|\\\\$ =>                   # \$18, \(18\), **18**
\\(?:left|right|displaystyle|bf|rm)(?![a-zA-Z])|\\!\s* =>                # \left(1,2\right)
(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s+ => ~   [ ][ ]+ => ~              # 1\,000
\\(?:(?:math|text)(?:rm|bf|it|sf)|boldsymbol|bm|emph|mbox)\s?(?=\{) => \\text
\*\* => ^   \\[lc]?dots|\.\.\. => \\ldots~                               # n**2, 1, 2, \dots
\^?(?:°|\\degree|\\circ|\{\\circ\}) => ~                                 # 90^\circ
\\?sqrt\s*(?:\(([^()]*)\)|(\d+|[a-z])) => \\sqrt{\1\2}                   # √12, sqrt(x+1)
\\[dtc]frac(?![a-z]) => \\frac   \\frac\s*(\d)\s*(\d) => \\frac{\1}{\2}  # \dfrac12
(.)\\approx\s*-?\d*\.\d+$ => \1                                          # \sqrt{2} \approx 1.41
(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln)(?![a-zA-Z]) => \\\1~              # 2*pi
,?\s*\\text\{\s*,?\s*(?:for|where)\b(?:(?!\\text|[,;]).)*$ =>            # 2n, \text{ for } n > 1
,?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])) => ,~
\\text\{\s*(?:\\?%|percent)\s*\}|(?<![a-zA-Z\\])percent\b|(?<!\\)% => \\%
\(?\\pmod\s*\{?\d+\}?\)?$ =>                                             # 9 \pmod{11}
(?i)\\varnothing|\\\{\s*\\\}|^(?:\\text\{)?no (?:real )?solutions?\}?$ => \\emptyset~
^0?(\d+:\d\d)(?:\s?(?:\\text\{)?\s*[ap]\.?m\.?\s*\}?)?$ => \1            # 1:58 a.m.
[\s.,;:]+(\}?)$ => \1   ^\s+ =>                                          # 5., \text{Yes.}
(?<=[\w})\]%])\s?(?!.*CHANGE)UNIT =>                                     # 5 cm, 9.8\text{ m/s}^2
(?<=\d)(?:\^\{?)?(?:\\text\{)?(?:st|nd|rd|th)\}*$ =>                     # 23rd, 4^{\text{th}}
\\text\{\s*([-+]?[\d.,]+|[A-Za-z]|\(?[A-Z][).:]*)\s*\} => \1             # \text{(A)}
^\(?([A-J])(?:\)|\s?[.:])+\s?(?!\\text)(?:\\[a-z]+|[^A-Za-z])*$ => \1    # (B) 12
(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:(?:[ ,]|\s?\{,\}\s?)\d{3})+(?!\d|,\d|\s?[)\]]|\s?\\\}) => JOIN
(?<=\d)\s?[eE]([+-]?\d+)(?!\d) => \\cdot 10^{\1}                         # 1.5e3
(?<!\d)(\d+) (\d+)/(\d+)(?!\d) => \1\\frac{\2}{\3}                       # 1 1/2
(\d+)\.(\d*)\\(?:overline|bar|dot)\s?\{?(\d+)\}? => REPEAT               # 0.1\overline{6} = 15/90
^\(?(\d\w*)\)?_\{?(\d+)\}?$ => \1_\2   _\{(\w)\} => _\1                  # (101)_{2}, E_{1}
(^|,|\\\{)((?:(?!\\\{)[^,;])*)\\pm([^,;]*?)(?=,|;|$|\\\}) => \1\2+\3,\2-\3   # 1 \pm i
^(?:[A-Za-z](?:_\w)?)?\s?\\approx =>                                     # x \approx 8.24
^([^=]+)=\s?([A-Za-z](?:_\w)?)$ => \2=\1                                 # 5 = x
^\\begin\{[pb]matrix\}([^&]*?)(?:\\\\)?\s?\\end\{[pb]matrix\}$ => COLUMN
""".replace("CHANGE", CHANGE).replace("UNIT", UNIT)
FUNCTIONS = {
    "JOIN": lambda number: re.sub("[ ,{}]", "", number[0]),               # 1,000, but not (1,234)
    "REPEAT": lambda m: rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}}}"
                        rf"{{{'9' * len(m[3])}{'0' * len(m[2])}}}",
    "COLUMN": lambda column: "(" + column[1].replace(r"\\", ",") + ")",
}
RULES = re.findall(
    "(?m)(\\S.*?) => ?(\\S*(?: \\S+)*?)(?= {3}|$)", re.sub("(?m) +# .*", "", NOTATION))


def tidy(text):
    """The text in one notation, without its unit; first cm², x₁ and 1½."""
    for letters, form in (("[⁰¹²³⁴-⁹⁻]+", "^{%s}"), ("[₀-₉]+", "_{%s}"), ("[¼-¾⅐-⅞]", " %s")):
        text = re.sub(letters, lambda m: form % unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in RULES:
        text = re.sub(pattern, FUNCTIONS.get(replacement, replacement.replace("~", " ")), text)
    return text.strip()


def skeleton(text: str) -> str:
    """The text without spaces, brackets and fonts; the ends of a formula become dollars."""
    text = re.sub(r"\\[\[\]()]|\$+", "$", re.sub(r"\\[dt]frac", r"\\frac", text))
    return re.sub(r"[\s{}()]|\\(?:left|right|displaystyle|text|[,;:!])", "", text)


def copied(answer: str, gold: str, problem: str) -> bool:
    """Whether the answer is an expression of the problem, and the gold another one."""
    text = skeleton(problem)
    formula = skeleton(answer)
    if not text:
        return False
    if f"${formula}$" in text:
        return formula != skeleton(sides(gold)[-1])
    if skeleton(tidy(answer)) == skeleton(sides(tidy(gold))[-1]):
        return False
    return re.search(rf"(?<![\w.]){re.escape(formula)}(?!\w)", text) is not None


# One finished number, its braces and parentheses left out.
POWER = r"(?![01] ?\^)\d+ ?\^ ?(?!1\b)-?\d+"
TIMES = r"(?:\\cdot|\\times|\*)"
TERM = rf"(?:{POWER}|\d+)"
NUMBER = re.compile(
    r"[-+]? ?(?:(?:\d+\.?\d*|\.\d+)"                                              # 5.2, 50\%
    rf"|\d(?:\.\d+)? ?{TIMES} ?10 ?\^ ?[-+]?\d+"                                  # 6 \cdot 10^{-3}
    rf"|{POWER}(?: ?{TIMES}? ?{POWER})*|(?P<root>\\sqrt ?(?:\[[2-9]\] ?)?\d+)"    # 2^6 3^5
    rf"|(?P<fraction>(?:\d+ ?)?(?:\\frac ?-? ?{TERM} ?{TERM}"                     # 1\frac{1}{2}
    rf"|{TERM} ?(?:/|:|\\over|\\div) ?{TERM}))(?: ?\^ ?\d+)?)(?: ?\\%)?"          # (3/4)^2
)


def judge(gold: str, answer: str, problem: str) -> str:
    """The verdict. 50% is 50, where the question says per cent, and 0.5; but 0.5% is not 0.5."""
    units = [SI.findall(unicodedata.normalize("NFKC", text)) for text in (gold, answer)]
    if all(units) and units[0] != units[1] or copied(answer, gold, problem):
        return "wrong"  # 15 m for 15 cm
    gold = tidy(gold)
    answer = tidy(answer)
    hundredths = [re.sub(r"(.*)\\%", r"\1 \\cdot 10^{-2}", text) for text in (gold, answer)]
    right = same(hundredths[0], hundredths[1])
    if not right and r"\%" in gold + answer and not answer.startswith(("0", ".")):
        right = same(gold.removesuffix(r"\%"), answer.removesuffix(r"\%"))
    if right and finished(gold, answer):
        return "right"
    return "wrong" if wordy(gold) or read(gold) is not None else "ungradable"


def sides(text: str) -> list[str]:
    """The sides of an equation, or of several in a row."""
    return re.split(r"(?:(?<![<>!])=|\\equiv)(?![^{}]*\})", text)


def finished(gold: str, answer: str) -> bool:
    """Whether an answer to a gold that is one number is one number too, and nothing to work out.

    A fraction is none for 12, in lowest terms for 1.5 or 50%, any for 3/2.
    """
    texts = [re.sub(r"(?:\\?[{}()]|\s)+", " ", text).strip() for text in (gold, *sides(answer))]
    target, *numbers = map(NUMBER.fullmatch, texts)
    if not target or target["root"] or target["fraction"]:
        return not target or target["root"] or any(numbers)
    for number in filter(None, numbers):
        terms = re.findall(r"\d+", number["fraction"] or "")
        if not terms or re.search(r"[.%]", gold) and math.gcd(*map(int, terms)) == 1:
            return True
    return False


@functools.cache
def parser_class():
    """math-verify's parser, which takes 0.1 for a float, 5(5) for a mixed number and 6/2 for 3."""
    def quotient(value):
        return sympy.UnevaluatedExpr(value) if isinstance(value, sympy.Integer) else value

    class Parser(latex2sympy2._Latex2Sympy):
        def parse_number(self, text):
            return sympy.Rational(text.replace(",", ""))

        def convert_frac(self, frac):
            return quotient(super().convert_frac(frac))

        def convert_mp(self, mp):
            value = super().convert_mp(mp)
            return quotient(value) if mp.DIV() or mp.CMD_DIV() or mp.COLON() else value

        def convert_postfix_list(self, factors, i=0):
            value = super().convert_postfix_list(factors, i)
            if isinstance(value, sympy.Rational) and i + 1 < len(factors):
                whole = str(value.p // value.q)
                if factors[i].getText() != whole or factors[i + 1].getText()[:5] != r"\frac":
                    raise ValueError("no mixed number")
            return value

    return Parser


def wordy(text: str):
    """What is compared as words: math-verify would multiply their letters, and east equal seat."""
    text = re.sub(r"\\(?:begin|end|mathbb)\{\w+\}|\\(?!text|ldots|gcd|lcm)[A-Za-z]+", " ", text)
    words = r"(?i)\\[a-z]|[a-z]{4,}|\d_|:.*:|^[a-j]$|^\d?\d:\d\d$|^(?:yes|no|odd|all)$"
    return re.search(words, text)


def same(gold: str, answer: str) -> bool:
    """Whether two texts mean the same, and the answer leaves no more undone than the gold."""
    letters = [re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1", text) for text in (gold, answer)]
    letters = [re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text) for text in letters]
    if letters[0] == letters[1] or wordy(gold) or wordy(answer):
        return letters[0].casefold() == letters[1].casefold()
    a = read(gold)
    b = read(answer)
    if a is None or b is None:
        return False
    results = {answer: b}
    if a.has(sympy.Eq) != b.has(sympy.Eq):
        a = value(a)
        results[answer] = value(b)
        if results[answer] is not sympy.nan and not isinstance(b, sympy.FiniteSet):
            results = {side: read(side) for side in sides(answer)}  # true, so all sides are equal
    allowed = undone(a, gold)
    return any(
        result is not None and undone(result, text) <= allowed and equal(a, result)
        for text, result in results.items()
    )


@functools.lru_cache(1000)
def read(text: str):
    """A SymPy object; None if the text is not mathematics."""
    if re.fullmatch(r"-?\d+(?:\.\d+)?", text):
        return sympy.Rational(text)
    tidying = math_normalization.NormalizationConfig(malformed_operators=True, boxed="none")
    config = latex2sympy2.ConversionConfig(lowercase_symbols=False)
    text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", "I", text)
    with contextlib.suppress(Exception):  # the parser's own, and whatever SymPy meets in nonsense
        parser = parser_class()(is_real=True, config=config)
        return parser.parse(math_normalization.normalize_latex(text, tidying))


def value(expression):
    """v for x = v, f(2) = v and 2 + 3 = v, each element of a list so; nan for 2x + z = v."""
    parts = getattr(expression, "_unsorted_args", expression.args)  # as they were written
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
    for one, other in (both, both[::-1]):
        if isinstance(one, sympy.FiniteSet) and not isinstance(other, sympy.FiniteSet):
            written = getattr(one, "_unsorted_args", one.args)  # with what is written twice
            if len(written) > len(one.args) or len(written) > 1 and isinstance(other, sympy.Expr):
                return False  # 10, 10 for 10
    if all(isinstance(one, sympy.FiniteSet) for one in both):
        lists = [getattr(one, "_unsorted_args", one.args) for one in both]  # with what occurs twice
        counts = [[sum(equal(one, other) for other in side) for one in lists[0]] for side in lists]
        return len(lists[0]) == len(lists[1]) and counts[0] == counts[1]
    return grader.sympy_expr_eq(gold, answer, 6, 15, allow_set_relation_comp=True)


def exact(gold, answer, *digits):
    """Takes the place of math-verify's comparison, to which 2^-99 and 2^-98 are equal."""
    a = gold.doit()
    b = answer.doit()
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(exact, a.flat(), b.flat()))
    known = isinstance(a - b, sympy.Expr) and not a.has(sympy.nan, sympy.zoo)
    return known and (a == b or bool((a - b).equals(0)))


EAGER = re.compile(  # what the parser does at once, or SymPy later
    r"\\(?:sum|prod|int|lim|max|min|det|[dt]?binom|choose|Gamma|operatorname|phantom|b?mod|cap|\|)"
    r"(?![a-z])|\\frac\{(?:d|\\partial)|[vV]matrix|\|_|e\^\{?\\l|!(?!=)|['?]|\^\{?(?:T|\\top)"
    r"|-(?:[\s({]|\\frac)*-|\\(?:pi|sqrt)(?=[^,;+-]*\d\^\{?\d)"
    r"|(?<=\d)\^(?=\{?\d[^,;+-]*\\(?:pi|sqrt))|e\s?\^\s?(?:i|\{(?=[^}]*(?<![a-z\\])i(?![a-z])))")


def undone(expression, text: str) -> set:
    """The kinds of work that are left to the reader."""
    kinds = set(EAGER.findall(text))
    if isinstance(expression, sympy.Expr):
        kinds |= expression.free_symbols
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, (sympy.MatMul, sympy.MatAdd)):
            kinds.add(node.func)
        elif isinstance(node, sympy.UnevaluatedExpr) and node.args[0].is_Integer:
            kinds.add("quotient")  # 48 / 4
        elif isinstance(node, sympy.Add):
            total = sympy.Add.make_args(sympy.Add(*[term.doit() for term in node.args]))
            if len(total) < len(node.args):
                kinds.add("sum")  # 964 + 494, but not 1 + \sqrt{2}
        elif isinstance(node, sympy.Mul) and multiplies(node):
            kinds.add("product")
        elif isinstance(node, sympy.Pow) and node.is_number and not node.base.is_rational:
            if node.base.is_algebraic and node.exp.is_Integer and node.exp != -1:
                kinds.add("power")  # (1 + i)^2, but not \pi^2
        elif isinstance(node, sympy.Function) and node.is_number:
            if node.func != sympy.exp or node.has(sympy.I):
                kinds.add(node.func.__base__)  # \log_2 8, \sin 30; sine and cosine are of one kind
        elif isinstance(node, sympy.Union) and sympy.Union(*node.args) != node:
            kinds.add("union")  # [1, 3] \cup [2, 5]
    return kinds


def multiplies(product) -> bool:
    r"""2 \cdot 3, (-1)(-x), 6\pi / 2; but not 2^6 3^5, 6 \cdot 10^{-3}, 5\pi / 2."""
    numbers = [factor for factor in product.args if factor.is_number]
    powers = [
        n for n in numbers if n.is_Pow and n.base.doit().is_Integer and n.exp.is_Integer
        and n.doit() not in (1, n.base)
    ]
    factors = [n.doit() for n in numbers if n not in powers and n != -1]
    multiplied = sympy.Mul.make_args(sympy.Mul(*factors))
    if len(multiplied) < len(factors) or sum(bool(n.is_negative) for n in numbers) > 1:
        return True
    if sum(factor.is_Add for factor in factors) > 1:
        return True
    quotient = product.is_number and any(power.exp == -1 for power in powers)
    terms = sympy.Add.make_args(product.doit())
    return quotient and all(term.as_coeff_Mul()[0].is_Integer for term in terms)


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
