r"""Responses -> R in {0, 1} (Eq. 1), and the two sections of a correction (Eqs. 11, 12).

The reward is the only teacher, so the grader must not be fooled, must not hang and must not fail in silence.

    1. The last \boxed{} after the last </think> is the answer; words outside it never count.
    2. An answer that is the gold letter for letter is right. Any other goes to a worker: a subprocess that
       imports math-verify (never torch), has a memory limit, and is killed and replaced past its deadline.
       Not a thread, which nothing can stop: 9^{9^{9^9}} holds the GIL for a minute. Not `signal.alarm`, which
       works in a main thread only and takes the caller's timer. Not multiprocessing, whose spawn imports the
       trainer again.
    3. The worker tidies notation as a fair marker would, takes lists apart, and math-verify reads the rest.
       Numbers and terms are compared exactly: 0.333 is not 1/3, and 2^{-99} is not 2^{-98}.
    4. A verdict is "right", "wrong" or "ungradable": timed out, out of memory, crashed, or a gold that nobody
       can read. The last earns nothing, but it is counted apart.

    >>> grade([r"So x = \boxed{0.5}.", r"\boxed{0.333}", r"1/3"], [r"\frac12", r"\frac13", r"\frac13"])
    [1.0, 0.0, 0.0]
"""

import bisect
import collections
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from fractions import Fraction
from multiprocessing.connection import wait

ANALYSIS_HEADER, SOLUTION_HEADER = "Analysis", "Corrected Solution"
LONGEST_ANSWER = 2000  # characters; a longer one is not read at all: ungradable, unless it is the gold itself
MEMORY = 2**30         # bytes of address space for a worker, which needs a tenth of it
START = 120.0          # seconds in which a new worker must be ready; 0.7 on an idle core


# ----------------------------------------------------------------------------------------------------------
# The trainer's side
# ----------------------------------------------------------------------------------------------------------
def answer_start(text):
    """Where the answer begins: behind the last </think>, 0 if nobody thinks; None if thinking never ends."""
    start = text.rfind("</think>")
    start = start + len("</think>") if start >= 0 else 0
    return None if "<think>" in text[start:] else start


def final_answer(text):
    r"""The content of the last \boxed{} after the thinking; None if it is missing, empty or left open.

    >>> final_answer(r"<think> \boxed{1}? </think> First \boxed{2}, or rather \boxed{\frac{1}{\sqrt{2}}}.")
    '\\frac{1}{\\sqrt{2}}'
    >>> [final_answer(text) for text in (r"<think> \boxed{1}", r"\boxed{1} \boxed{2", r"\boxed{ }", "1")]
    [None, None, None, None]
    """
    start = answer_start(text)
    last = text.rfind(r"\boxed")
    if start is None or last < start:
        return None
    body = text[last + len(r"\boxed"):].lstrip()
    if number := re.match(r"-?\d[\d.,/]*", body):
        return number[0].rstrip(".,")  # without braces TeX boxes what comes next
    depth = 0
    for match in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # an escaped \{ opens nothing
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return body[1:match.start()].strip() or None if body.startswith("{") else None
    return None


class Grader:
    """A pool of worker processes, started when first needed and kept between calls.

    `deadline` is in seconds, for each item; `counts` adds up the verdicts of all calls. Works in any thread
    (one at a time), in a notebook and on every rank; the caller's signal handlers and timers are left alone.
    """

    def __init__(self, workers=2, deadline=5.0):
        self.workers, self.deadline = workers, deadline
        self.idle = []
        self.counts = collections.Counter()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        while self.idle:
            stop_worker(self.idle.pop())

    def verdicts(self, responses, golds):
        """A list of "right", "wrong" or "ungradable", one for each response and its gold answer."""
        verdicts, jobs = [], {}
        for i, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            answer = final_answer(response)
            letter_for_letter = answer == gold.strip()
            verdicts.append("right" if letter_for_letter else "wrong" if answer is None else "ungradable")
            if verdicts[i] == "ungradable" and len(answer) <= LONGEST_ANSWER:
                jobs.setdefault((gold, answer), []).append(i)  # samples of a group often agree: grade once
        for job, verdict in self.run(jobs):
            for i in jobs[job]:
                verdicts[i] = verdict
        self.counts.update(verdicts)
        return verdicts

    def grade(self, responses, golds):
        """R of each response: 1.0 if it is right, else 0.0."""
        return [float(verdict == "right") for verdict in self.verdicts(responses, golds)]  # Eq. 1

    def unparsable(self, golds):
        """The indices of golds that cannot be read: nothing but the same letters could ever be right."""
        verdicts = dict(self.run({(gold, None): None for gold in golds}))
        return [i for i, gold in enumerate(golds) if verdicts[gold, None] == "ungradable"]

    def run(self, jobs):
        """Yield (job, verdict) for each job, a pair (gold, answer), as it ends.

        A worker has one job at a time: no other item dies with it, and none waits behind one that hangs.
        """
        jobs, busy = collections.deque(jobs), {}  # busy: worker -> (its job or None; when it is due)
        try:
            while jobs or busy:
                while jobs and self.idle:
                    worker, job = self.idle.pop(), jobs.popleft()
                    busy[worker] = job, time.monotonic() + self.deadline
                    send(worker, [*job, self.deadline])
                starting = sum(job is None for job, _ in busy.values())
                for _ in range(min(self.workers - len(busy), len(jobs) - starting)):
                    busy[start_worker()] = None, time.monotonic() + START
                due = min(due for _, due in busy.values())
                ready = wait([worker.stdout for worker in busy], max(0.0, due - time.monotonic()))
                for worker, (job, due) in list(busy.items()):
                    if worker.stdout in ready or due <= time.monotonic():
                        reply = receive(worker) if worker.stdout in ready else None
                        del busy[worker]
                        self.idle.append(worker) if reply else stop_worker(worker)
                        if job is not None:
                            yield job, reply or "ungradable"
                        elif reply != "ready":
                            raise RuntimeError(f"a grading worker did not start: {reply or 'no reply'}")
        finally:
            for worker in busy:
                stop_worker(worker)


def start_worker():
    """A subprocess that says "ready" when it is, and ends with its stdin: at the latest with the trainer."""
    # Without gmpy2, which aborts at a memory limit; in a session of its own, which Ctrl-C does not reach.
    environment = {**os.environ, "SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, os.path.abspath(__file__), "--worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            env=environment, start_new_session=True)


def send(worker, message):
    with contextlib.suppress(OSError):  # dead already: the missing reply will tell
        worker.stdin.write(json.dumps(message).encode() + b"\n")
        worker.stdin.flush()


def receive(worker):
    """The reply in a readable pipe (one short line, written at once), or None if the worker died."""
    line = worker.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def stop_worker(worker):
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    worker.wait()


def grade(responses, golds, timeout=5.0):
    """Grader.grade for a single call; `timeout` is its deadline."""
    with Grader(deadline=timeout) as grader:
        return grader.grade(responses, golds)


# ----------------------------------------------------------------------------------------------------------
# Corrections
# ----------------------------------------------------------------------------------------------------------
def find_correction(token_ids, tokenizer, span="sections"):
    """(start, end, solution_text) of a well-formed correction, else None (Eq. 11).

    A header is a line's beginning that equals its name, ignoring case, spaces and `#*_:`. Both must stand
    there once each, in order, after the thinking, with something between them. token_ids[start:end] is the
    analysis (Eq. 12): it begins behind the first header's name and decoration, be it on the same line, and
    ends where the second header's line begins; a token belongs if all its characters do. span="prefix" begins
    at the first token. [ours]

    >>> class Letters:
    ...     decode = staticmethod("".join)
    >>> find_correction("**Analysis:** 2+2 is 4.\\nCorrected solution:\\n\\\\boxed{4}", Letters)
    (14, 24, '\\n\\\\boxed{4}')
    """
    text = tokenizer.decode(token_ids)
    after = answer_start(text)
    if after is None:
        return None
    headers = ANALYSIS_HEADER, SOLUTION_HEADER
    analysis, solution = (list(header(name).finditer(text[after:])) for name in headers)
    if len(analysis) != 1 or len(solution) != 1:  # Eq. 11: both, once each
        return None
    begin, stop = after + analysis[0].end(), after + solution[0].start()
    if not any(map(str.isalnum, text[begin:stop])):  # nothing between them, or the wrong way round
        return None

    def whole(k):  # characters that the first k tokens hold in full
        prefix = tokenizer.decode(token_ids[:k])
        return len(prefix if text.startswith(prefix) else prefix.rstrip("\ufffd"))  # U+FFFD: half a character

    def touched(k):  # characters that they hold in full or in part
        return len(tokenizer.decode(token_ids[:k]))

    # Prefixes, because single tokens lose bytes and spaces; by bisection, because each costs time of order n.
    counts = range(len(token_ids) + 1)
    start = 0 if span == "prefix" else bisect.bisect_left(counts, begin, key=whole)
    end = bisect.bisect_right(counts, stop, key=touched) - 1
    return start, max(start, end), text[after + solution[0].end():]  # Eq. 12


@functools.cache
def header(name):
    decoration = r"(?:[^\S\n]|[#*_:])*"
    letters = decoration.join(name.replace(" ", ""))
    return re.compile(rf"^{decoration}{letters}(?![^\W_]){decoration}", re.IGNORECASE | re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------
# The worker's side: a marker. Only here are SymPy and math-verify imported.
# ----------------------------------------------------------------------------------------------------------
PLAIN = str.maketrans({
    **dict.fromkeys("−–—‐", "-"), **dict.fromkeys("·⋅∙", r"\cdot "), "×": r"\times ", "÷": "/", "±": r"\pm ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "√": r"\sqrt ", "°": r"^\circ ", "\u2044": "/",
})


def join(number):
    return re.sub("[ ,]", "", number[0])


def fraction(decimal):
    """A decimal as an exact fraction: no Float is ever compared. 0.1 with the period 6 is 1/10 + 6/90."""
    power, whole, digits, period = decimal.groups()
    value = Fraction(int("0" + whole + digits), 10 ** len(digits))
    if period:
        value += Fraction(int(period), 10 ** len(digits) * (10 ** len(period) - 1))
    text = rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)
    return power + (f"{{{text}}}" if power else text)


def numeral(match):
    """101_2 is 5, which math-verify does not know; what is no numeral stays."""
    with contextlib.suppress(ValueError):
        return str(int(match[1], int(match[2])))
    return match[0]


def column(vector):
    """(1, 2) for the rows 1 and 2 of a vector, or of a system of equations."""
    return f"({vector[1]})".replace("&", "").replace(r"\\", ",")


def times(match):
    """7 million is 7000000."""
    return rf"\cdot {SCALES[match[2].lower()]}{match[1] or ' '}"


SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NOTATION = [  # what a marker does not see, in this order
    (r"\\[()\[\]]|^\s*\*\*|\*\*\s*$|(?<!\\)\$|\\\\$", ""), (r"\*\*", "^"),   # delimiters; powers
    (r"\\!\s*|\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|\\(?:displaystyle|limits|bf|rm|it)(?![A-Za-z])", ""),
    (r"(?:(?<!\\)\\(?:[,;:> ]|q?quad(?![A-Za-z])|$)|~|\s)+", " "),         # spaces
    (r"\\(?:text)?color\s?\{\w+\}|\\(?:underline|boxed)\s?(?=\{)", ""),
    (r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|bm|emph|text(?:bf|it|rm|normal)|[mh]box)\s?(?=\{)", r"\\text"),
    (r"\\[dt]?frac\s?(\d|\\pi)\s?(\d)", r"\\frac{\1}{\2}"), (r"_(\w)\s", r"_{\1} "),  # \frac 1 2, \log_2 8
    (r"(?<!\\)sqrt", r"\\sqrt"), (r"\\sqrt\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
    (r"(?<![\\A-Za-z])(pi|theta|alpha|beta|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"\\?\binfinity", r"\\infty "), (r"\\l?dots[cb]?|\\cdots|\.\.\.+", r"\\ldots "),
    (r"\\text\{\s*,?\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\land(?![A-Za-z])", ","),
    (r"\\text\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\lor(?![A-Za-z])", ";"),
    (r"\\text\{\s*(?:\\?%|percent(?:age)?)\s*\}|(?<![A-Za-z\\])(?:percent(?:age)?|pct)\b|(?<!\\)%", r"\\%"),
    (r"\\[$#]|[€£¥₹]|\\text\{(?:USD|Rs\.?|\s*\.?)\s*\}", ""),              # money
    *[(rf"(?i)(?<=[\d}}])\s?(\\text\{{)?\s*({'|'.join(SCALES)})s?(?![A-Za-z-])\s*", times)] * 2,  # hundred thousand
    (r"(?i)\\text\{\s*(?:no (?:real )?solutions?|(?:the )?empty set)\s*\}|^no (?:real )?solutions?$"
     r"|\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (r"(?i)\\text\{\s*all real numbers\s*\}|^all real numbers$", r"\\mathbb{R}"),
    (r"(?i)^\s?(?:\\text\{(?![^{}]*(?:\d|n't|\b(?:not|or|than|least|most)\b))"
     r"(?:[^{}]*(?:\b(?:is|are)|[:=])\s*\}|[^{}]*\}\s?[=:])"
     r"|(?:the )?(?:final )?answer(?: is|:)|(?:option|choice) )", ""),     # \text{The answer is } 5
    (r"[\s.,;:]+$|^\s+", ""), (r"(?i)(^\\text\{[^{}]*?)[.,]\s*\}$", r"\1}"),
]
TEXT = r"\\text\{(?!\s*[aeijknqruvwxyz]\s*\})[^{}]*\}(?:\s?\^\s?\{?-?\d\}?)?"
WORD = (r"(?:[A-Za-z]{4,}|[cmkd]m|[km]g|in|ft|yd|mi|lbs?|oz|m[lL]|[mk]ph|hrs?|min|sec|day|old|deg|rad|sq|cu|per|[CF]"
        r"|k?m/[hs])\.?(?:\^\{?\d\}?)?")
UNIT = re.compile(rf"(?<=[\w}})\]!|%])\s?(?:{TEXT}(?:\s?(?:/|\\cdot)?\s?{TEXT})*"
                  rf"|(?<=[\d}} ]){WORD}(?:[ /]{WORD})*)$")  # at the end, behind a number or a bracket
PART = r"hal(?:f|ves)|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth)s?"
NO_UNIT = re.compile(rf"(?i)[,;]\s?(?:less|more|fewer|greater)\b|\bat (?:least|most)\b|\bnot\b"  # it was an `or`
                     rf"|^\W*(?:\\text\{{)?\s*(?:{PART}|squared|cubed)\W*$"
                     r"|(?<![\dA-Za-z^{(])\d|\\(?!text|cdot|%)|^\W*text\{\s*[,;]"
                     r"|^\W*(?:text\{)?\W*(?:or|and|plus|minus|times|over|to|point|factorial|choose|base|in binary|is|are|if"
                     r"|pi|versus)\b|\b(?:except|unless|wrong|false)\b")
NUMBERS = [  # one notation for each number and name, in this order
    (r"(?<=\d)(?:st|nd|rd|th)$|\^\{?(?:\\text\{)?(?:st|nd|rd|th)\}*$", ""),  # ordinals
    (r"\\text\{\s*([-+]?[\d.,]+|[A-Za-z]|\(?[A-Z][).:]*)\s*\}", r"\1"),
    (r"(?<=\d)\s?\{\s?,\s?\}\s?(?=\d{3})", ","), (r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)", join),
    (r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:,\d{3})+(?!\d|,\d|\s?[)\]]|\s?\\\})", join),  # 1,000, but not (1,234)
    (r"(?<![\d,])\d{1,3},0\d\d(?!\d|,\d)", join),                          # (1,000): no coordinate is 000
    (r"(?<=\d)\s?[eE]([+-]?\d+)(?!\d)", r"\\cdot 10^{\1}"),
    (r"(?<!\d)(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),              # 1 1/2
    (r"(\^?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s?\{?(\d+)\}?)?(?<=[\d}])", fraction),
    (r"\(?(?<![A-Za-z\\\d])(\d[0-9A-F]*)\)?_\{?(\d+)\}?", numeral),  # 101_2
    (r"^[a-z]\s?\([a-z]\)\s?=(?!.*=)", "y="),                              # f(x) =, where it is the only one
    (r"^\(?\s?[a-z](?:_\d)?(?:\s?,\s?[a-z](?:_\d)?)+\s?\)?\s?(?:=|\\in\b)\s?(?=\(|\\\{)", ""),  # (x, y) =
    (r"^[A-Za-z]\s?(?:\\in|=)\s?(?=\\\{)|^[A-Z]\s?=\s?(?=\([^()]*,)", ""),  # x \in \{1, 2\}, P = (1, 2)
    (r"^(?:[A-Za-z](?:_\{?\w\}?)?)?\s?\\approx", ""), (r"\\approx[^,]*$", ""),  # 1/3 \approx 0.333 is 1/3
    (r"^\\\{\s?[a-z]\s?(?:\\in\s?\\mathbb\{?R\}?\s?)?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x : x > 2}
    (r"^\\langle(.*)\\rangle$", r"(\1)"),                                  # vectors are tuples
    (r"^\\begin\{[pb]?matrix\}([^&]*?)(?:\\\\)?\s?\\end\{[pb]?matrix\}$", column),
    (r"^\\begin\{(?:cases|aligned)\}(.*)\\end\{(?:cases|aligned)\}$", column),
]


def tidy(text):
    r"""(the text as NOTATION and NUMBERS leave it, the unit that was dropped: its letters, and its power)

    >>> tidy(r"$x = 1,\!250.50\text{ cm}^2$"), tidy("３√2"), tidy("101_2")
    (('x = \\frac{2501}{2}', 'cm2'), ('3\\sqrt{2}', ''), ('5', ''))
    """
    for pattern, form in (("[⁰¹²³⁴-⁹⁻]+", "^{%s}"), ("[₀-₉]+", "_{%s}"), ("[¼-¾⅐-⅞]", " %s")):
        text = re.sub(pattern, lambda m: form % unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[α-ω]", lambda m: "\\" + unicodedata.name(m[0]).split()[-1].lower() + " ", text)
    text = unicodedata.normalize("NFKC", text.translate(PLAIN)).translate(PLAIN)
    angle = r"\\frac{\\pi}{180}" if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text) else " "
    text = re.sub(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)", angle, text)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    unit = UNIT.search(text)
    if unit and NO_UNIT.search(unit[0]):
        unit = None
    if unit:
        text = text[:unit.start()]
    for pattern, replacement in NUMBERS:
        text = re.sub(pattern, replacement, text)
    return text.strip(), unit_name(unit[0]) if unit else ""


def unit_name(unit):
    r"""cm2 for \text{ cm}^2 and for square centimeters; "" for degrees, which are no length."""
    name = re.sub(r"\\text|squared?|cub(?:ic|ed)|sq|cu|degrees?|[^A-Za-z]", "", unit).lower()
    name = re.sub("(kilo|centi|milli|deci|)(meter|metre|gram|liter|litre)s?", lambda m: m[1][:1] + m[2][0], name)
    power = 3 if re.search("cu|3", unit) else 2 if re.search("sq|2", unit) else 1
    return f"{name}{power}" if name else ""


def clash(gold, answer):
    """Whether two units cannot be one: cm and m, cm^2 and cm; but h and hours may be, and so may no unit."""
    if not (gold and answer):
        return False
    metric = all(re.fullmatch(r"[kcmd]?[mgl]\d", unit) for unit in (gold, answer))
    lengths = all(re.match(r"[kcmd]?m\d|in|f(?:t|oot|eet)|y(?:d|ard)|mi|unit", unit) for unit in (gold, answer))
    whole_words = min(len(gold), len(answer)) > 5  # minutes and months, pounds and pints
    return (gold[:1 + whole_words] != answer[:1 + whole_words] or metric and gold != answer
            or lengths and gold[-1] != answer[-1])


def readings(raw):
    """(the one or two ways in which a marker may read an answer, the likelier first; its unit)"""
    text, unit = tidy(raw)
    if re.fullmatch(r"\([a-j]\)", text):
        text = text.upper()
    # "(C), (D)" is no choice, nor is "A: B" or "A. 5, B. 6"
    another = r"\s?(?:[,;]|[A-J][.)]|.*(?:\([A-J]\)|\b[A-J]\s?[.):]|[,;]\s?[A-J]\b))"
    if choice := re.fullmatch(rf"(?:\(([A-J])\)|([A-J])\s?[).:](?!\s?[A-J]$))(?!{another})\s?(.*)", text):
        return [part for part in choice.groups() if part], unit  # "(B) 12": a choice, and its value
    if text.endswith(r"\%"):  # 50% is 50, where the question says per cent, and 0.5
        number = text[:-2].strip()
        below_one = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", number)
        plain = [] if below_one and int(below_one[1]) < int(below_one[2]) else [number]  # 0.5% is not 0.5
        return [*plain, rf"\frac{{{number}}}{{100}}"], unit
    if clock := re.fullmatch(r"0?(\d{1,2}):(\d\d)", text):
        return [rf"\text{{{clock[1]}:{clock[2]}}}", rf"\frac{{{clock[1]}}}{{{clock[2]}}}"], unit
    if text.count(":") == 1:
        return [r"\frac{%s}{%s}" % tuple(text.split(":"))], unit
    if text.count(":") > 1 and all(part.strip() for part in text.split(":")):
        return ["(" + ",".join(text.split(":")) + ")"], unit
    if re.search(r"\d{3},\d{3}", raw):  # 131,141: a number, or a list
        return [text, tidy(raw.replace(",", ", "))[0]], unit
    return [text], unit


def split(text, separators):
    r"""The parts of a text between separators outside all brackets; None if the brackets do not match.

    >>> split(r"(1,2), \{3,4\}", ","), split("1),(2", ",")
    (['(1,2)', '\\{3,4\\}'], None)
    """
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"\\[A-Za-z]+|\\?[([{{]|\\?[)\]}}]|(?<![<>!])[{separators}]", text):
        depth += (match[0][-1] in "([{") - (match[0][-1] in ")]}")
        if depth < 0:
            return None
        if depth == 0 and match[0] in separators:
            parts.append(text[start:match.start()].strip())
            start = match.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def elements(text):
    """(whether the order counts, the elements of a tuple, a set or a list), with every \\pm written out."""
    ordered, parts = False, split(text, ",;") or [text]
    for opening, closing in (("(", ")"), (r"\{", r"\}")):
        if text.startswith(opening) and text.endswith(closing):
            inner = split(text[len(opening):-len(closing)], ",;")
            if inner and (opening != "(" or len(inner) > 1):
                if opening != "(" and len(inner) == 1 and inner[0].startswith("("):
                    return elements(inner[0])
                ordered, parts = opening == "(", inner
    if ordered and re.search(r"\\(?:pm|mp)(?![a-z])", text):  # (\pm 1, 0): two points
        ordered, parts = False, [text]
    return ordered, [signed for part in parts for signed in signs(part)]


def signs(part):
    r"""A part with \pm written out: +a and -a. Several \pm are independent, but tied where there is a \mp."""
    if r"\mp" not in part and len(plus_minus := re.split(r"\\pm(?![a-z])", part)) > 2:  # \pm a \pm b: four values
        return ["".join(map("".join, zip(plus_minus, [*pms, ""])))
                for pms in itertools.product("+-", repeat=len(plus_minus) - 1)]
    both = [("+", "-"), ("-", "+")]
    return [re.sub(r"\\mp(?![a-z])", mp, re.sub(r"\\pm(?![a-z])", pm, part))
            for pm, mp in (both if re.search(r"\\(?:pm|mp)(?![a-z])", part) else both[:1])]


def letters(text):
    """What two texts share that are the same letter for letter."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def alike(gold, answer):
    """Whether two texts are the same letter for letter; in words, and in a choice, be they upper or lower case. The
    variables R and r are two."""
    a, b = letters(gold), letters(answer)
    words = wordy(gold) or wordy(answer) or re.fullmatch("[A-J]|yes|no|odd|all", a, re.IGNORECASE)
    return a == b or bool(words) and a.casefold() == b.casefold()


def wordy(text):
    """Words are compared as words: math-verify would multiply their letters, and east would equal seat."""
    commands = r"\\(?:begin|end|mathbb|operatorname)\{\w+\}|\\(?!text)[A-Za-z]+"
    return bool(re.search(r"\\text\{|[A-Za-z]{4,}", re.sub(commands, " ", text)))


def same(gold, answer):
    """Whether two tidied texts mean the same: the same letters, equal elements, or equal values."""
    if alike(gold, answer):
        return True
    if wordy(gold) or wordy(answer) or not answer:
        return False
    (gold_ordered, golds), (answer_ordered, answers) = elements(gold), elements(answer)
    if len(golds) == len(answers) == 1:
        return same_value(golds[0], answers[0])
    if len(golds) == len(answers):
        few, many = sorted(len({e.split("=")[0] for e in side if "=" in e}) for side in (golds, answers))
        if few == 0 and many > 1:  # y = 1, x = 2 in the order of their names
            golds, answers = (sorted(side) if all(re.match(r"[xyz]\s?=", e) for e in side) else side
                              for side in (golds, answers))
        ordered = gold_ordered or answer_ordered or few == 0 and many > 1  # (1, 2) for x = 1, y = 2
        if all(map(same, golds, answers)) or not ordered and permuted(golds, answers):
            return True
    # Perhaps intervals or relations, whose commas are not those of a list
    relation = re.search(r"[<>\[\]]|\\(?:[lg]e|[lg]t|ne|cup|infty)q?(?![a-z])", gold + answer)
    return bool(relation) and len(golds) + len(answers) < 9 and same_value(gold, answer)


def permuted(golds, answers):
    """Whether each gold has an answer of its own."""
    answers = list(answers)
    for gold in golds:
        twin = next((answer for answer in answers if same(gold, answer)), None)
        if twin is None:
            return False
        answers.remove(twin)
    return True


def same_value(gold, answer):
    is_equation = [len(split(text, "=") or []) > 1 for text in (gold, answer)]
    if all(is_equation) and solved(gold) and not (solved(answer) or "0" in split(answer, "=")):
        return False  # a step on the way; but y + 2 = 0 is a line's usual form
    if is_equation[0] != is_equation[1]:
        gold, answer = value(gold), value(answer)
    return equal(read(gold), read(answer))


def solved(equation):
    r"""Whether it gives its unknown: x = 5, 5 = x, \theta = 2 + 3 = 5; but not 2x = 10, nor y = 2x."""
    sides = split(equation, "=") or []
    rest = [side for side in sides if not re.fullmatch(r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?", side)]
    return 0 < len(rest) == len(sides) - 1 and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", "".join(rest)))


def value(text):
    """5 for "5", "x = 5", "5 = x", "f(2) = 5", "2 + 3 = 5"; None for an equation such as 2x + z = 5."""
    *sides, last = split(text, "=") or [text]
    if not sides:
        return last
    bare = re.sub(r"[_^](?:\{[^{}]*\}|\w)|\([^()]*\)", "", sides[0])
    equation = re.search(r"^\s*-|\d", bare) or last == "0" and re.search("[+-]", bare)
    if re.search("[A-Za-z]", sides[0]) and not equation:
        return last
    if re.fullmatch(r"[A-Za-z](?:_\w)?", last):
        return sides[0]
    return last if all(same(side, last) for side in sides) else None


@functools.lru_cache(1000)
def read(text):
    """A SymPy object, by math-verify's parser; None if it is not mathematics."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.parser import should_treat_as_complex

    if text and ";" in text:  # it was an `or`
        parts = [read(part) for part in split(text, ";") or []]
        sets = [as_set(part) for part in parts]
        if len(sets) > 1 and all(isinstance(s, sympy.Set) for s in sets):
            if len(set().union(*(part.free_symbols for part in parts))) == 1:
                return sympy.Union(*sets)
        text = text.replace(";", ",")
    if text is None or r"\ldots" in text or re.search(r"\d\s+\d|\d_|(?:gcd|lcm)\}?\s?[({][^()]*[A-Za-z]", text):
        return None
    if number := re.fullmatch(r"([+-]?)(?:(\d+)|\\frac\{(-?\d+)\}\{(\d*[1-9]\d*)\})", text):
        return sympy.Rational(int(number[1] + "1") * int(number[2] or number[3]), int(number[4] or 1))
    # Not units=True: it takes the d of 3d for days.
    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        latex = normalize_latex(text, config)
        # As math_verify.parser.parse_latex_cached, but for the case of letters: R and r are two variables.
        expression = latex2sympy(latex, is_real=not should_treat_as_complex(latex), normalization_config=None,
                                 conversion_config=ConversionConfig(lowercase_symbols=False))
        return expression.subs({s: sympy.I for s in expression.free_symbols if s.name == "i"})
    except MemoryError:
        raise
    except Exception:  # the parser's own, and whatever SymPy meets in nonsense
        return None


def equal(gold, answer):
    import sympy
    from math_verify.grader import is_relation, sympy_expr_eq

    if gold is None or answer is None:
        return False
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq):  # f(1) and P(x) are unknowns like any other
        calls = gold.atoms(sympy.core.function.AppliedUndef) | answer.atoms(sympy.core.function.AppliedUndef)
        names = {call: sympy.Symbol(str(call), real=True) for call in calls}
        gold, answer = gold.subs(names), answer.subs(names)
        if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)):
            return gold == answer
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return equal_terms(gold, answer)
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq):
        factor = sympy.simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
        if factor.is_number:
            return bool(factor.is_finite and factor != 0)
        # math-verify takes any two without a solution for equal
        return bool(sympy.solve(gold)) and sympy_expr_eq(gold, answer, 6, 15)
    a, b = as_set(gold), as_set(answer)
    if is_relation(gold) and is_relation(answer) and gold.free_symbols != answer.free_symbols:
        return False
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(equal_terms, a.flat(), b.flat()))
    return sympy_expr_eq(a, b, 6, 15, allow_set_relation_comp=True)


def as_set(expression):
    """Inequalities in one variable as the set that they describe, matrix sums done; the rest as it is."""
    import sympy
    from math_verify.grader import is_relation

    if (isinstance(expression, sympy.FiniteSet) and len(expression.free_symbols) == 1
            and all(is_relation(link) and not isinstance(link, sympy.Eq) for link in expression.args)):
        sets = [as_set(relation) for relation in expression.args]
        both = sympy.Intersection(*sets)
        return sympy.Union(*sets) if both.is_empty else both  # x < 1, x > 3 can only mean "or"
    if is_relation(expression) and not isinstance(expression, sympy.Eq) and len(expression.free_symbols) == 1:
        chain = getattr(expression, "_unsorted_args", [expression])
        return sympy.Intersection(*(link.as_set() for link in chain))
    return expression.doit() if isinstance(expression, sympy.MatrixExpr) else expression


def equal_terms(gold, answer):
    """Exact, where math-verify has an absolute tolerance of 1e-15, and 1e-6 for decimals."""
    import sympy

    a, b = gold.doit(), answer.doit()
    if a == b or a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return a == b and not a.has(sympy.nan, sympy.zoo)
    if a.free_symbols | b.free_symbols:
        return sympy.simplify(a - b) == 0
    if a.is_Rational and b.is_Rational or a.is_infinite or b.is_infinite:
        return rounded(a, b) or rounded(b, a)
    x, y = a.evalf(50), b.evalf(50)
    if abs(x - y) <= sympy.Float(10, 50) ** -40 * abs(x):
        return bool(abs((a - b).evalf(5, maxn=2000)) <= sympy.Float(10, 50) ** -1000 * abs(x))
    if x == 0 or y == 0:  # an exact zero may come out as 1e-60
        return sympy.simplify(a - b) == 0
    return rounded(a, b) or rounded(b, a)


def rounded(decimal, exact):
    """Whether a decimal is an endless number to six places and digits or more: 0.333333, but not 0.333."""
    if not decimal.is_Rational or exact.is_infinite or exact.is_Rational and 10**99 % exact.q == 0:
        return False
    places = next((k for k in range(99) if 10**k % decimal.q == 0), 0)
    if places < 6 or abs(decimal) * 10**places < 10**5:
        return False
    error = ((exact - decimal) * (1 if decimal > 0 else -1)).evalf(99) * 10**places  # cut off, or rounded
    return bool(-1 < error < 1 if places > 12 else -0.5 <= error < 1)


def judge(gold, answer):
    """The verdict on an answer; on None, "right" if the gold can be read."""
    golds, gold_unit = readings(gold)
    readable = wordy(golds[0]) or all(read(part) is not None for part in elements(golds[0])[1])
    if answer is None:
        return "right" if readable else "ungradable"
    if not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", golds[0])):
        answer = re.sub(r"(?<=\d)\s?[mghsL](?:\^\{?[23]\}?)?$", "", answer)  # 6 m: m is no variable
    answers, answer_unit = readings(answer)
    if len(golds) == len(answers) == 2:
        golds, answers = golds[:1], answers[:1]  # per cent against per cent, time against time
    if clash(gold_unit, answer_unit):
        golds = []
    right = any(same(g, a) for g in golds for a in answers)
    return "right" if right else "wrong" if readable else "ungradable"


def peak_memory():
    """Bytes this process has ever held. Not ru_maxrss: on Linux it starts, after exec, with the peak of the trainer."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return 0  # no /proc, no Linux: the memory limit alone has to do


def work():
    """Read jobs from stdin and write verdicts to stdout until the trainer closes the pipe."""
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no reply
    reply = functools.partial(print, file=replies)
    try:
        judge("y=2x+1", "y-2x=1")  # warm: imports, and SymPy's and the parser's caches
    except ImportError as error:
        return reply(json.dumps(str(error)))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    reply(json.dumps("ready"))
    for line in sys.stdin:
        gold, answer, deadline = json.loads(line)
        # The trainer kills in time. If it is dead itself, this ends even C code: SIGALRM has no handler here.
        signal.setitimer(signal.ITIMER_REAL, deadline + 1)
        try:
            verdict = judge(gold, answer)
        except MemoryError:
            os._exit(1)
        except Exception:  # what SymPy cannot compare earns nothing, and costs no worker
            verdict = "ungradable"
        signal.setitimer(signal.ITIMER_REAL, 0)
        if peak_memory() > MEMORY / 2:
            os._exit(1)  # SymPy may have swallowed a MemoryError: no verdict from such a worker
        reply(json.dumps(verdict))


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    work()
