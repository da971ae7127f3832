r"""Responses -> R in {0, 1} (Eq. 1), and the two sections of a correction (Eqs. 11, 12).

A right answer that is missed costs a sample; a wrong one that is paid poisons the training. So what
is in doubt is wrong, and so is what leaves work undone: a policy soon learns to box the question.
What is not the gold letter for letter goes to a worker: a subprocess, because that can be killed.
    >>> grade([r"\boxed{0.5}", r"\boxed{964+494}"], ["1/2", "1458"])
    [1.0, 0.0]
"""

import bisect
import contextlib
import functools
import json
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

MEMORY = 2**30  # bytes of address space that a worker may use
START = 120.0  # seconds until a worker is ready

# What opens and what closes thinking in today's models. Of gpt-oss's channels, `final` alone is no
# thinking.
THINKING = {
    "<think>": "</think>",
    "<thought>": "</thought>",  # EXAONE Deep
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "\u25c1think\u25b7": "\u25c1/think\u25b7",  # Kimi
    "<|channel|>": "<|channel|>final<|message|>",  # gpt-oss
    "<|channel>": "<channel|>",  # Gemma 4
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
}


def answer_start(text: str) -> int:
    """Where the answer begins: behind all thinking; at the end of the text if thinking is open."""
    start = 0
    for opening, closing in THINKING.items():
        answer = text.rpartition(closing)[2]
        if opening in answer:
            return len(text)
        start = max(start, len(text) - len(answer))
    return start


def after_thinking(text: str) -> str:
    """The answer: all of a text without thinking, nothing of a text whose thinking never ends.

    >>> [after_thinking(text) for text in ("<think>2+2</think>It is 4.", "It is 4.", "<think>2+2")]
    ['It is 4.', 'It is 4.', '']
    """
    return text[answer_start(text):].strip()


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} after the thinking; None if it is missing or left open."""
    last = text.rfind(r"\boxed")
    if last < answer_start(text):
        return None
    body = text[last + len(r"\boxed"):].lstrip()
    if not body.startswith("{"):
        return None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # an escaped \{ opens nothing
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
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

    def verdicts(self, responses, golds, problems=None):
        """Each "right", "wrong" or "ungradable": late, out of memory, a gold nobody can read."""
        problems = problems or [""] * len(golds)
        pairs, known = [], {}
        for response, gold, problem in zip(responses, golds, problems, strict=True):
            pair = gold.strip(), final_answer(response)
            pairs.append(pair)
            if pair[1] == pair[0]:
                known[pair] = "right"
            elif pair[1] is None or copied(pair[1], problem):
                known[pair] = "wrong"
        jobs = [pair for pair in dict.fromkeys(pairs) if pair not in known]  # samples often agree
        with ThreadPoolExecutor(len(self.idle)) as threads:  # they only wait for the workers
            known.update(zip(jobs, threads.map(self.mark, jobs)))
        return [known[pair] for pair in pairs]  # Eq. 1

    def mark(self, pair):
        """One verdict. A worker has one answer at a time, so no other is lost with it."""
        worker = self.idle.pop() or self.start()
        verdict = ask(worker, [*pair, self.deadline], self.deadline)
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
        if ask(worker, ["y=2x+1", "y-2x=1", START], START) != "right":
            raise RuntimeError(f"a grading worker did not start; see {' '.join(worker.args)}")
        return worker


def ask(worker, job, seconds):
    """The verdict on [gold, answer, deadline], one short line; "" if the worker is late or dead."""
    with contextlib.suppress(OSError):
        print(json.dumps(job), file=worker.stdin, flush=True)
    return worker.stdout.readline().strip() if wait([worker.stdout], seconds) else ""


def copied(answer: str, problem: str) -> bool:
    """Whether the answer is a formula of the question, and not worked out."""
    return f"${answer}$" in problem


class Correction(NamedTuple):
    """A well-formed correction: token_ids[start:end] is its analysis (Eqs. 11, 12)."""

    start: int
    end: int
    solution: str  # the text behind the second header, which is graded


def find_correction(
    token_ids: list[int], tokenizer, span: str = "sections"
) -> Correction | None:
    """The sections of a correction, None if it has not both of them once (Eq. 11).

    token_ids[start:end] is the analysis (Eq. 12): the tokens that lie wholly between its headers,
    which are [ours]; span="prefix": from token 0. Without skip_special_tokens: <think> may be one.
    """
    silent = {getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}

    def text_of(k):  # of the first k tokens, because single ones lose bytes and spaces
        return tokenizer.decode([token for token in token_ids[:k] if token not in silent])

    def whole(k):  # characters that the first k tokens hold in full; U+FFFD is half of one
        prefix = text_of(k)
        return len(prefix if text.startswith(prefix) else prefix.rstrip("\ufffd"))

    text = text_of(len(token_ids))
    after = answer_start(text)
    analysis, solution = (list(header(name).finditer(text[after:]))
                          for name in ("Analysis", "CorrectedSolution"))
    if len(analysis) != 1 or len(solution) != 1:  # Eq. 11: both, once each
        return None
    begin, stop = after + analysis[0].end(), after + solution[0].start()
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
NOTATION = [  # (what is replaced, by what), in this order  # an example
    ("[−–—]", "-"), ("[·∙]", r"\\cdot "), ("√", "sqrt"), ("∞", r"\\infty "), ("∈", r"\\in "),
    (r"\\[()\[\]]|\\?[$€£]|\\text\{\W*\}|^\*\*|\*\*$|\\\\$", ""),         # \$18, \(18\), **18**
    (r"\\(?:left|right|displaystyle|bf|rm)(?![a-zA-Z])|\\!\s*", ""),      # \left(1,2\right)
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s+", " "), (r"  +", " "),     # 1\,000
    (r"\\(?:(?:math|text)(?:rm|bf|it|sf)|boldsymbol|bm|emph|mbox)\s?(?=\{)", r"\\text"),
    ("⁄", "/"), (r"\*\*", "^"), (r"\\[lc]?dots|\.\.\.", r"\\ldots "),      # n**2, 1, 2, \dots
    (r"\^?(?:°|\\degree|\\circ|\{\\circ\})", " "),                        # 90^\circ
    (r"\\?sqrt\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),         # √12, sqrt(x+1)
    (r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1 "),    # 2*pi
    (r",?\s*\\text\{\s*,?\s*(?:for|where)\b(?:(?!\\text|[,;]).)*$", ""),  # 2n, \text{ for } n > 1
    (r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))", ", "),
    (r"\\text\{\s*(?:\\?%|percent)\s*\}|(?<![a-zA-Z\\])percent\b|(?<!\\)%", r"\\%"),
    (r"\(?\\pmod\s*\{?\d+\}?\)?$", ""),                                   # 9 \pmod{11}
    (r"(?i)\\varnothing|\\\{\s*\\\}|^(?:\\text\{)?no (?:real )?solutions?\}?$", r"\\emptyset "),
    (r"^0?(\d+:\d\d)(?:\s?(?:\\text\{)?\s*[ap]\.?m\.?\s*\}?)?$", r"\1"),  # 1:58 a.m.
    (r"[\s.,;:]+(\}?)$", r"\1"), (r"^\s+", ""),                           # 5., \text{Yes.}
    (rf"(?<=[\w}})\]%])\s?(?!.*{CHANGE}){UNIT}", ""),                     # 5 cm, 9.8\text{ m/s}^2
    (r"(?<=\d)(?:\^\{?)?(?:\\text\{)?(?:st|nd|rd|th)\}*$", ""),           # 23rd, 4^{\text{th}}
    (r"\\text\{\s*([-+]?[\d.,]+|[A-Za-z]|\(?[A-Z][).:]*)\s*\}", r"\1"),   # \text{(A)}
    (r"^\(?([A-J])(?:\)|\s?[.:])+\s?(?!\\text)(?:\\[a-z]+|[^A-Za-z])*$", r"\1"),  # (B) 12
    (r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:(?:[ ,]|\s?\{,\}\s?)\d{3})+(?!\d|,\d|\s?[)\]]|\s?\\\})",
     lambda number: re.sub("[ ,{}]", "", number[0])),                     # 1,000, but not (1,234)
    (r"(?<=\d)\s?[eE]([+-]?\d+)(?!\d)", r"\\cdot 10^{\1}"),               # 1.5e3
    (r"(?<!\d)(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),             # 1 1/2
    (r"(\d+)\.(\d*)\\(?:overline|bar|dot)\s?\{?(\d+)\}?",                 # 0.1\overline{6} = 15/90
     lambda m: rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}}}"
               rf"{{{'9' * len(m[3])}{'0' * len(m[2])}}}"),
    (r"^\(?(\d\w*)\)?_\{?(\d+)\}?$", r"\1_\2"), (r"_\{(\w)\}", r"_\1"),   # (101)_{2}, E_{1}
    (r"(^|,|\\\{)((?:(?!\\\{)[^,;])*)\\pm([^,;]*?)(?=,|;|$|\\\})", r"\1\2+\3,\2-\3"),  # 1 \pm i
    (r"^(?:[A-Za-z](?:_\w)?)?\s?\\approx", ""),                           # x \approx 8.24
    (r"^([^=]+)=\s?([A-Za-z](?:_\w)?)$", r"\2=\1"),                       # 5 = x
    (r"^\\begin\{[pb]matrix\}([^&]*?)(?:\\\\)?\s?\\end\{[pb]matrix\}$",
     lambda column: "(" + column[1].replace(r"\\", ",") + ")"),
]


def tidy(text):
    """The text in one notation, without its unit; first cm², x₁ and 1½."""
    for letters, form in (("[⁰¹²³⁴-⁹⁻]+", "^{%s}"), ("[₀-₉]+", "_{%s}"), ("[¼-¾⅐-⅞]", " %s")):
        text = re.sub(letters, lambda m: form % unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    return text.strip()


if __name__ == "__main__":  # in a worker, never in the trainer
    import sympy
    from latex2sympy2_extended import is_expr_of_only_symbols, latex2sympy2, math_normalization
    from math_verify import grader
    from sympy.core.function import AppliedUndef

    class Parser(latex2sympy2._Latex2Sympy):
        """math-verify's parser, which takes 0.1 for a float and 5(5) for a mixed number."""
        def parse_number(self, text):
            return sympy.Rational(text.replace(",", ""))

        def convert_postfix_list(self, factors, i=0):
            value = super().convert_postfix_list(factors, i)
            if isinstance(value, sympy.Rational) and i + 1 < len(factors):
                whole, part = factors[i].getText(), factors[i + 1].getText()
                if whole != str(value.p // value.q) or not part.startswith(r"\frac"):
                    raise ValueError("no mixed number")
            return value


def judge(gold, answer):
    """The verdict. 50% is 50, where the question says per cent, and 0.5; but 0.5% is not 0.5."""
    units = [SI.findall(unicodedata.normalize("NFKC", text)) for text in (gold, answer)]
    if all(units) and units[0] != units[1]:
        return "wrong"  # 15 m for 15 cm
    gold, answer = tidy(gold), tidy(answer)
    hundredth = [re.sub(r"^(.*)\\%$", r"\\frac{\1}{100}", text) for text in (gold, answer)]
    number = answer.removesuffix(r"\%")
    if same(*hundredth) or number[:1] not in "0." and same(gold.removesuffix(r"\%"), number):
        return "right"
    return "wrong" if wordy(gold) or read(gold) is not None else "ungradable"


def wordy(text):
    """What is compared as words: math-verify would multiply their letters, and east equal seat."""
    text = re.sub(r"\\(?:begin|end|mathbb)\{\w+\}|\\(?!text|ldots|gcd|lcm)[A-Za-z]+", " ", text)
    words = r"(?i)\\[a-z]|[a-z]{4,}|\d_|:.*:|^[a-j]$|^\d?\d:\d\d$|^(?:yes|no|odd|all)$"
    return re.search(words, text)


def same(gold, answer):
    """Whether two texts mean the same, and the answer leaves no more undone than the gold."""
    letters = [re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1", text) for text in (gold, answer)]
    letters = [re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text) for text in letters]
    if letters[0] == letters[1] or wordy(gold) or wordy(answer):
        return letters[0].casefold() == letters[1].casefold()
    a, b = read(gold), read(answer)
    if a is None or b is None:
        return False
    if a.has(sympy.Eq) != b.has(sympy.Eq):
        a, b = value(a), value(b)
        answer = re.split(r"=(?![^{}]*\})", answer)[-1]
    return equal(a, b) and undone(b, answer) <= undone(a, gold)


@functools.lru_cache(1000)
def read(text):
    """A SymPy object; None if the text is not mathematics."""
    if re.fullmatch(r"-?\d+(?:\.\d+)?", text):
        return sympy.Rational(text)
    tidying = math_normalization.NormalizationConfig(malformed_operators=True, boxed="none")
    parser = Parser(is_real=True, config=latex2sympy2.ConversionConfig(lowercase_symbols=False))
    text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", "I", text)
    with contextlib.suppress(Exception):  # the parser's own, and whatever SymPy meets in nonsense
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
    first, sides = links[0].lhs, [link.rhs for link in links]
    named = first.free_symbols and is_expr_of_only_symbols(first)
    if not named and not isinstance(first, AppliedUndef):
        sides.insert(0, first)
    return sides[-1] if all(equal(side, sides[-1]) for side in sides) else sympy.nan


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
    if all(isinstance(one, sympy.FiniteSet) for one in both):
        lists = [getattr(one, "_unsorted_args", one.args) for one in both]  # with what occurs twice
        counts = [[sum(equal(one, other) for other in side) for one in lists[0]] for side in lists]
        return len(lists[0]) == len(lists[1]) and counts[0] == counts[1]
    return grader.sympy_expr_eq(gold, answer, 6, 15, allow_set_relation_comp=True)


def exact(gold, answer, *digits):
    """Takes the place of math-verify's comparison, to which 2^-99 and 2^-98 are equal."""
    a, b = gold.doit(), answer.doit()
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(exact, a.flat(), b.flat()))
    known = isinstance(a - b, sympy.Expr) and not a.has(sympy.nan, sympy.zoo)
    return known and (a == b or bool((a - b).equals(0)))


EAGER = re.compile(  # what the parser does at once, or SymPy later
    r"\\(?:sum|prod|int|lim|max|min|det|[dt]?binom|choose|Gamma|operatorname|phantom|b?mod|cap|\|)"
    r"(?![a-z])|\\frac\{(?:d|\\partial)|[vV]matrix|\|_|e\^\{?\\l|!(?!=)|['?]|\^\{?(?:T|\\top)"
    r"|\\approx(?!.*\.\d)")


def undone(expression, text):
    """The kinds of work that are left to the reader."""
    kinds = set(EAGER.findall(text))
    kinds |= expression.free_symbols if isinstance(expression, sympy.Expr) else set()
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, (sympy.MatMul, sympy.MatAdd)):
            kinds.add(node.func)
        elif isinstance(node, sympy.Add):
            total = sympy.Add.make_args(sympy.Add(*(term.doit() for term in node.args)))
            if len(total) < len(node.args):
                kinds.add("sum")  # 964 + 494, but not 1 + \sqrt{2}
        elif isinstance(node, sympy.Mul):  # 2 \cdot 3, but not 2^6 \cdot 3^5, 6 \times 10^{-3}
            factors = [f.doit() for f in node.args if f.is_number and f != -1 and not (
                f.is_Pow and f.base.doit().is_Integer and f.exp.is_Integer
                and f.doit() not in (1, f.base))]
            product = sympy.Mul.make_args(sympy.Mul(*factors))
            if len(product) < len(factors) or sum(factor.is_Add for factor in factors) > 1:
                kinds.add("product")
        elif isinstance(node, sympy.Function) and node.is_number and node.func != sympy.exp:
            kinds.add(node.func.__base__)  # \log_2 8, \sin 30; sine and cosine are of one kind
        elif isinstance(node, sympy.Union) and sympy.Union(*node.args) != node:
            kinds.add("union")  # [1, 3] \cup [2, 5]
    return kinds


def work():
    """Read jobs from stdin and write verdicts to stdout until the trainer closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    grader.sympy_numeric_eq = exact
    for line in sys.stdin:
        gold, answer, deadline = json.loads(line)
        # The trainer kills in time. If it is dead, this ends even C code: SIGALRM has no handler.
        signal.setitimer(signal.ITIMER_REAL, deadline + 1)
        verdict = "ungradable"
        with contextlib.suppress(Exception):  # what SymPy cannot compare costs no worker
            verdict = judge(gold, answer) if len(answer) <= 2000 else verdict
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, file=replies, flush=True)


if __name__ == "__main__":
    work()
