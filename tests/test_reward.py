"""reward.py against a marker's verdicts, against answers that hang or eat memory, and against its own contract.

The marker's verdicts are in reward_cases.tsv, one pair a line, each with its reason: add a line to add a case.
Tests marked `slow` measure; they print what they measured (pytest -m slow -s).
"""

import doctest
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import reward

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).with_name("reward_cases.tsv")
BENCHMARKS = Path(__file__).parents[2] / "shared" / "benchmarks"
AMBIGUOUS = {r"m_{\max }=n^{2}-n-1", "t(0,4]"}  # golds of OlympiadBench that cannot be read


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


def cases():
    """(class, right, gold, response, reason) of each line of the table."""
    name = ""
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            name = line.removeprefix("# -- ")
        else:
            right, gold, answer, reason = line.split("\t")
            whole = any(word in answer for word in (r"\boxed", r"\fbox", "<think>", "final answer"))
            yield name, right == "1", gold, answer if whole else boxed(answer), reason


@pytest.fixture(scope="module")
def grader():
    with reward.Grader() as grader:
        yield grader


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def rss(pid):
    """Bytes of resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# -- verdicts -----------------------------------------------------------------------------------------------------
def test_doctests():
    result = doctest.testmod(reward)
    assert result.attempted and not result.failed


@pytest.fixture(scope="module")
def verdicts(grader):
    rows = list(cases())
    return list(zip(rows, grader.verdicts([row[3] for row in rows], [row[2] for row in rows])))


def test_table_is_large_and_has_both_verdicts():
    rows = list(cases())
    assert len(rows) >= 300 and all(row[4] for row in rows)
    assert min(sum(row[1] for row in rows), sum(not row[1] for row in rows)) > 100
    assert len({row[2:4] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", dict.fromkeys(row[0] for row in cases()))
def test_marker(name, verdicts):
    wrong = [f"{verdict}: {gold} | {response} ({reason})" for (group, right, gold, response, reason), verdict in verdicts
             if group == name and (verdict == "right") != right]
    assert not wrong, "\n".join(wrong)


def test_three_outcomes_are_counted(grader):
    with reward.Grader(deadline=1.0) as grader:
        responses = [boxed("5"), boxed("x=5"), boxed("6"), "5", boxed("9^{9^{9^9}}"), boxed("7"), boxed("7")]
        golds = ["5", "5", "5", "5", "5", r"\frac{", r"\frac{"]
        expected = ["right", "right", "wrong", "wrong", "ungradable", "ungradable", "ungradable"]
        assert grader.verdicts(responses, golds) == expected
        assert grader.grade(responses[:3], golds[:3]) == [1.0, 1.0, 0.0]
        assert grader.counts == {"right": 4, "wrong": 3, "ungradable": 3}


def test_an_unparsable_gold_is_named_and_only_its_own_letters_are_right(grader):
    golds = ["5", r"\frac{1}{", r"\text{Tuesday}", "(1,2)", "", r"m_{\max }=n^{2}-n-1", r"x \in [0,1)", "3:30", "1 +"]
    assert grader.unparsable(golds) == [1, 4, 5, 8]
    assert grader.verdicts([boxed(golds[5]), boxed("m=1")], [golds[5]] * 2) == ["right", "ungradable"]


def test_one_response_more_than_golds_is_an_error(grader):
    with pytest.raises(ValueError):
        grader.grade([boxed("1"), boxed("2")], ["1"])


def test_nothing_of_the_response_is_executed(grader, tmp_path):
    trap = tmp_path / "trap"
    attacks = [f"__import__('os').system('touch {trap}')", f"\\write18{{touch {trap}}}", f"open('{trap}','w')",
               f"\\text{{{{exec(\"open('{trap}','w')\")}}}}", f"lambda: open('{trap}','w')"]
    assert grader.grade(list(map(boxed, attacks)), ["5"] * len(attacks)) == [0.0] * len(attacks)
    assert not trap.exists()


# -- answers that hang, crash or eat memory -----------------------------------------------------------------------
HOSTILE = {
    "tower": "9^{9^{9^9}}", "tower in a list": r"1, 9^{9^{9^9}}", "small tower": r"9^{-9^{9^9}}", "factorial": "10000000!",
    "binomial": r"\binom{10000000}{5000000}", "memory": r"\gcd(10^{10^{10}},3)", "exponent": "1e999999999",
    "sum": r"\sum_{k=1}^{100000000} \frac{1}{k^{k}}", "integral": r"\int_0^1 \frac{\sin(x^x)}{\ln(1+e^{x})} dx",
    "product": r"\prod_{n=1}^{1000000000} n", "parentheses": "(" * 900 + "5" + ")" * 900, "words": "5 " + "ab cd " * 300,
    "matrix": r"\begin{pmatrix}" + r"\\".join("&".join(f"x^{{{i * j}}}" for i in range(12)) for j in range(12))
              + r"\end{pmatrix}",
}
ODD = {
    "3,000 elements": ",".join(map(str, range(3000))), "junk": "x" * 100000, "brackets": "(" * 100000, "digits": "9" * 1990,
    "commas": "," * 1900, "equals": "x=" * 900 + "1", "regex bomb": "5" + "a" * 1900 + "!", "units": r"5\text{a}" * 200,
    "NUL": "5\0", "surrogate": "\ud800", "emoji": "\U0001f600" * 100, "newline": "5\n6", "JSON": '"}\n{"', "spaces": "1 " * 900,
}


def test_hostile_answers_end_in_time_and_are_never_right():
    with reward.Grader(deadline=1.0) as grader:
        grader.grade([boxed("2")], ["1"])
        for name, answer in (HOSTILE | ODD).items():
            start = time.monotonic()
            verdict = grader.verdicts([boxed(answer)], ["5"])[0]
            assert verdict != "right", name
            # the deadline, and the start of the worker that replaces the one before
            assert time.monotonic() - start < 1.0 + 5.0, name


def test_a_batch_with_hanging_answers_ends_in_time_and_nothing_else_changes():
    rng = random.Random(0)
    golds = [str(rng.randrange(1000)) for _ in range(512)]
    responses = [boxed(gold if i % 3 else f"x={gold}" if i % 2 else f"{gold}1") for i, gold in enumerate(golds)]
    with reward.Grader(workers=2, deadline=2.0) as grader:
        expected = grader.verdicts(responses, golds)
        assert set(expected) == {"right", "wrong"}
        hanging = rng.sample(range(512), 8)
        for i, answer in zip(hanging, list(HOSTILE.values())[:8]):
            responses[i] = boxed(answer)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        verdicts = grader.verdicts(responses, golds)
        seconds = time.monotonic() - start
    assert seconds < 8 / 2 * (2.0 + 1.0) + 2.0 + 10.0  # 10 s more than the contract's, for machines that are busy
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    changed = {i for i in range(512) if verdicts[i] != expected[i]}
    assert changed <= set(hanging) and all(verdicts[i] != "right" for i in hanging)


def test_a_worker_lives_under_a_memory_limit():
    with reward.Grader(deadline=5.0) as grader:
        grader.grade([boxed("2.0")], ["1"])
        limits = Path(f"/proc/{grader.idle[0].pid}/limits").read_text()
        assert f"Max address space         {reward.MEMORY} " in limits
        assert grader.verdicts([boxed(HOSTILE["memory"])], ["5"]) == ["ungradable"]


def test_a_worker_that_is_killed_is_replaced():
    with reward.Grader() as grader:
        grader.grade([boxed("2")] * 2, ["1", "3"])
        for worker in grader.idle:
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.1)
        verdicts = [grader.verdicts([boxed("2.0")], ["2"])[0] for _ in range(4)]
        assert verdicts[-1] == "right" and verdicts.count("ungradable") <= 2


def test_closing_leaves_no_process_behind():
    with reward.Grader() as grader:
        grader.grade([boxed("2.0")] * 4, ["2", "3", "4", "5"])
        pids = [worker.pid for worker in grader.idle]
        assert pids and all(map(alive, pids))
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_workers_die_with_a_trainer_that_is_killed():
    """An idle one by the end of its stdin, a busy one by its own alarm, at the latest a second after its deadline."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward, threading, time\n"
            "g = reward.Grader(workers=2, deadline=2.0); g.grade([r'\\boxed{1.0}', r'\\boxed{2.0}'], ['1', '2'])\n"
            "print(*[w.pid for w in g.idle], flush=True)\n"
            "g.grade([r'\\boxed{9^{9^{9^9}}}'], ['1'])")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        time.sleep(0.5)
        assert pids and all(map(alive, pids))
        trainer.kill()
    limit = time.monotonic() + 6.0
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(alive, pids))


# -- where it runs ------------------------------------------------------------------------------------------------
def test_in_a_thread_and_with_the_callers_signals_untouched():
    def handler(*_):
        raise AssertionError("the caller's alarm went off early")

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 100.0)
    rewards = []
    try:
        thread = threading.Thread(target=lambda: rewards.extend(reward.grade([boxed("0.5")], [r"\frac12"])))
        thread.start()
        thread.join()
        assert rewards == reward.grade([boxed("0.5")], [r"\frac12"]) == [1.0]
        assert signal.getsignal(signal.SIGALRM) is handler and 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_importing_it_imports_neither_torch_nor_sympy():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward; print({{'torch', 'sympy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_what_a_library_prints_is_no_reply():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward, os\n"
            "def judge(*_): print('\"right\"'); os.write(1, b'\"right\"\\n'); return 'wrong'\n"
            "reward.judge = judge; reward.work()")
    job = json.dumps(["5", "6", 5.0]) + "\n"
    result = subprocess.run([sys.executable, "-c", code], input=job, capture_output=True, text=True)
    assert result.stdout.splitlines() == ['"ready"', '"wrong"']


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('math_verify is broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start: .*math_verify is broken here"), reward.Grader() as grader:
        grader.grade([boxed("0.5")], ["1"])


# -- the benchmarks -----------------------------------------------------------------------------------------------
def golds_of(name):
    path = BENCHMARKS / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is absent: benchmark golds not tested")
    return [json.loads(line)["answer"] for line in path.open()]


@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "olympiad", "gsm8k"])
def test_benchmark_golds(name, grader):
    """Each gold is right against itself, also when a worker must compare, and wrong against four others."""
    golds = golds_of(name)
    assert set(grader.verdicts(list(map(boxed, golds)), golds)) == {"right"}
    assert set(grader.verdicts([boxed(f"{gold}\\,") for gold in golds], golds)) == {"right"}
    assert {golds[i] for i in grader.unparsable(golds)} <= AMBIGUOUS
    rng = random.Random(0)
    pairs = [(gold, other) for gold in golds for other in rng.sample(golds, 4)
             if other not in (gold, gold.split("=")[-1])]  # f(x)=1 and 1 mean the same
    verdicts = grader.verdicts([boxed(other) for _, other in pairs], [gold for gold, _ in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts) if verdict == "right"] == []
    assert {gold for (gold, _), verdict in zip(pairs, verdicts) if verdict == "ungradable"} <= AMBIGUOUS


@pytest.mark.slow
def test_throughput(grader):
    golds = golds_of("math500")
    rng = random.Random(1)
    answers = [rng.choice([f" {g}\\,", f"x={g}" if "=" not in g else g, rng.choice(golds), g]) for g in golds * 4]
    grader.grade(list(map(boxed, answers)), golds * 4)
    start = time.monotonic()
    grader.grade(list(map(boxed, answers)), golds * 4)
    rate = len(answers) / (time.monotonic() - start)
    print(f"\n{rate:.0f} responses a second, {grader.counts}")
    assert rate > 300


@pytest.mark.slow
def test_memory_of_workers_is_flat():
    rng = random.Random(2)
    forms = [r"\frac{%d}{%d}", r"%d\sqrt{%d}", r"x^2+%dx+%d", "(%d,%d)", r"[%d,\infty) \cup \{%d\}", r"\{%d,%d\}", "y=%dx+%d"]
    with reward.Grader() as grader:
        sizes = []
        for _ in range(10):
            golds = [rng.choice(forms) % (rng.randrange(2, 99), rng.randrange(2, 99)) for _ in range(2000)]
            grader.grade([boxed(rng.choice([f"{gold}\\,", rng.choice(golds)])) for gold in golds], golds)
            sizes.append([rss(worker.pid) >> 20 for worker in grader.idle])
        print("\nMB of each worker after every 2,000:", *sizes)
        assert max(sizes[-1]) <= 1.1 * max(sizes[1])


# -- corrections --------------------------------------------------------------------------------------------------
class Bytes:
    """A byte-level tokenizer whose tokens, of one to three bytes, split characters."""

    def encode(self, text, rng):
        data, tokens = text.encode(), []
        while data:
            n = rng.randint(1, 3)
            tokens, data = [*tokens, data[:n]], data[n:]
        return tokens

    def decode(self, tokens):
        return b"".join(tokens).decode(errors="replace")


def spans(tokens):
    """For each token, the characters of which it holds a byte."""
    owners = [i for i, character in enumerate(b"".join(tokens).decode()) for _ in character.encode()]
    position = 0
    for token in tokens:
        yield range(owners[position], owners[position + len(token) - 1] + 1)
        position += len(token)


@pytest.mark.parametrize("seed", range(30))
def test_the_span_is_that_of_equation_12_token_by_token(seed):
    rng = random.Random(seed)
    head = rng.choice(["", "<think>Hm: 9é\nAnalysis: no</think>\n", "Préface 🙂\n"])
    first, body = rng.choice(["Analysis:", "## **Analysis** ", "analysis"]), rng.choice(["é 2+2 ≠ 5 🙂", "\nStep 1: ü\n", "x"])
    second, tail = rng.choice(["Corrected Solution:", "### corrected   solution", "**Corrected Solution:**"]), "\n\\boxed{4}"
    text = f"{head}{first} {body}\n{second}{tail}"
    begin = len(f"{head}{first} ")
    stop = text.index(second, begin)
    tokens = Bytes().encode(text, rng)
    inside = [i for i, span in enumerate(spans(tokens)) if begin <= span.start and span.stop <= stop]
    start, end, solution = reward.find_correction(tokens, Bytes())
    assert list(range(start, end)) == inside and solution == tail
    before = [i for i, span in enumerate(spans(tokens)) if span.stop <= stop]
    assert list(range(*reward.find_correction(tokens, Bytes(), span="prefix")[:2])) == before


@pytest.mark.parametrize("text, found", [
    ("Analysis: a\nCorrected Solution: b", True),
    ("ANALYSIS\na\nCORRECTED SOLUTION\nb", True),
    ("# Analysis #\na\n__Corrected_Solution__:\nb", True),
    ("Well.\n  Analysis : a\n  CorrectedSolution b", True),
    ("<think>Analysis: 1\nCorrected Solution: 2</think>Analysis: a\nCorrected Solution: b", True),
    ("<think>Analysis: a\nCorrected Solution: b", False),                        # thinking that never ends
    ("<think></think>Analysis: a\n<think>Corrected Solution: b", False),
    ("Analysis: a", False),
    ("Corrected Solution: b", False),
    ("Corrected Solution: b\nAnalysis: a", False),                               # the wrong way round
    ("Analysis: a\nAnalysis: a\nCorrected Solution: b", False),                  # twice
    ("Analysis: a\nCorrected Solution: b\nCorrected Solution: b", False),
    ("Analysis:\nCorrected Solution: b", False),                                 # empty
    ("Analysis: ** -- \n\nCorrected Solution: b", False),
    ("My Analysis: a\nCorrected Solution: b", False),                            # not at a line's beginning
    ("Analysis: a. Corrected Solution: b", False),
    ("Analysis: a\nThe Analysis: b\nmy corrected solution\nCorrected Solution: b", True),
    ("Analysisx: a\nCorrected Solution: b", False),                              # another word
    ("Analysis: a\nCorrected\nSolution: b", False),                              # a name on two lines
    ("", False),
])
def test_headers(text, found):
    tokens = Bytes().encode(text, random.Random(0))
    assert (reward.find_correction(tokens, Bytes()) is not None) == found


def test_tokens_that_share_a_character_with_a_header_do_not_belong():
    tokens = [b"Ana", b"lysis", b":\n", b"2+2", b" is 4", b".\n##", b" Corrected", b" Solution", b":\n", b"4"]
    assert reward.find_correction(tokens, Bytes()) == (3, 5, "\n4")
    tokens = [b"Analysis", b":", b"\n2+2 is 4.\n", b"Corrected Solution: 4"]
    assert reward.find_correction(tokens, Bytes()) == (2, 3, "4")
    tokens = [b"Analysis:\xc2", b"\xa0", b"x", b"\nCorrected", b" Solution: 4"]  # a no-break space in two halves
    assert reward.find_correction(tokens, Bytes()) == (2, 3, "4")
    tokens = [b"Analysis: a\nCorrected", b" Solution: 4"]  # well-formed, without a token for the loss
    assert reward.find_correction(tokens, Bytes()) == (1, 1, "4")


def test_a_long_correction_takes_milliseconds():
    text = "Analysis:\n" + "é word " * 4000 + "\nCorrected Solution:\n" + "word " * 4000
    tokens = Bytes().encode(text, random.Random(0))
    start = time.monotonic()
    for _ in range(10):
        assert reward.find_correction(tokens, Bytes())
    assert len(tokens) > 20000 and (time.monotonic() - start) / 10 < 0.2


def test_a_large_trainer_does_not_make_its_workers_look_large():
    """On Linux a child's ru_maxrss begins with its parent's peak: every worker of a real trainer would seem too big."""
    script = ("x = bytearray(900 * 2**20); from reward import Grader\n"
              "with Grader() as grader: print(grader.verdicts([r'\\boxed{\\frac{2}{4}}'] * 2, ['0.5', '0.25']))")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "['right', 'wrong']", done.stderr
