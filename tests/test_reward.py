"""reward.py against a marker's verdicts, answers that hang or eat memory, and its own contract.

The marker's verdicts are in reward_cases.tsv, each with its reason: add a line to add a case.
"""

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
from transformers import AutoTokenizer

import reward

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def grader():
    with reward.Grader(deadline=30.0) as grader:
        yield grader


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and " Z " not in stat.read_text()


def run(code):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------- verdicts


def test_the_marker_s_verdicts(grader):
    rows = []
    for line in Path(__file__).with_name("reward_cases.tsv").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            right, gold, answer, reason = line.split("\t")
            whole = any(word in answer for word in (r"\boxed", r"\fbox", "<think>", "final answer"))
            rows.append((right == "1", gold, answer if whole else boxed(answer), reason))
    right, golds, responses, reasons = zip(*rows)
    assert all(reasons) and len(set(zip(golds, responses))) == len(rows)
    assert 200 < sum(right) < len(rows) - 200
    verdicts = grader.verdicts(responses, golds)
    missed = [(verdict, *row) for verdict, row in zip(verdicts, rows)
              if (verdict == "right") != row[0]]  # fmt: skip
    assert not missed, "\n".join(map(str, missed))


def test_three_verdicts():
    golds, responses = [*"55555", r"\frac{"], [boxed("5"), boxed("x=5"), boxed("6"), "5"]
    responses += [boxed("9^{9^{9^9}}"), boxed("7")]
    with reward.Grader(deadline=3.0) as grader:
        verdicts = grader.verdicts(responses, golds)
        with pytest.raises(ValueError):
            grader.verdicts(responses, golds[1:])
    assert verdicts == ["right"] * 2 + ["wrong"] * 2 + ["ungradable"] * 2
    assert reward.grade(responses[:3], golds[:3], timeout=30.0) == [1.0, 1.0, 0.0]


def test_nothing_of_the_response_is_executed(grader, tmp_path):
    trap = tmp_path / "trap"
    system, write = f"__import__('os').system('touch {trap}')", f"open('{trap}','w')"
    attacks = [boxed(attack) for attack in (system, f"\\write18{{touch {trap}}}", write)]
    assert "right" not in grader.verdicts(attacks, ["5"] * 3) and not trap.exists()


@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "olympiad", "gsm8k"])
def test_benchmark_golds(name, grader):
    """Each is right against itself, also when a worker must compare, and wrong against another."""
    path = SHARED / "benchmarks" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is absent: benchmark golds not tested")
    golds, rng = [json.loads(line)["answer"] for line in path.open()], random.Random(0)
    for form in ("{}", "{}\\,"):
        assert set(grader.verdicts([boxed(form.format(g)) for g in golds], golds)) == {"right"}
    pairs = [(gold, rng.choice(golds)) for gold in golds]
    pairs = [(gold, other) for gold, other in pairs  # f(x)=1 and 1
             if other not in (gold, gold.split("=")[-1], gold.removesuffix(r"^\circ"))]  # fmt: skip
    verdicts = grader.verdicts([boxed(other) for _, other in pairs], [gold for gold, _ in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts) if verdict == "right"] == []


COPIES = {  # (problem, gold): what a response may copy out of it; the gold itself is right
    (r"Simplify $\sqrt{242}$.", r"11\sqrt2"): [r"\sqrt{242}", r"\sqrt {242}", r"{\sqrt{242}}"],
    (r"Write \[(2x^3)^3.\] without brackets", "8x^9"): ["(2x^3)^3", r"\left( 2x^3 \right)^3"],
    (r"Which fraction is $0.4\overline5$?", r"\frac{41}{90}"): [r"0.4\overline5"],
    (r"Which fraction is $0.375$?", r"\frac{3}{8}"): ["0.375"],
    (r"If $y = x = 4$, find $x$.", "4"): ["x = 4"],
    (r"Is $f(x)=x^2-1$ zero? Factor \(x^2 - 1\).", "(x-1)(x+1)"): ["x^2-1", "x^2 - 1"],
}


@pytest.mark.parametrize("problem, gold", COPIES)
def test_an_expression_copied_out_of_the_problem_is_no_answer(grader, problem, gold):
    copies = COPIES[problem, gold]
    responses = [boxed(answer) for answer in (*copies, gold, gold + r"\,")]
    golds = [gold] * len(responses)
    verdicts = grader.verdicts(responses, golds, [problem] * len(responses))
    assert verdicts == ["wrong"] * len(copies) + ["right"] * 2
    assert grader.verdicts(responses, golds) == ["right"] * len(responses)


def test_a_gold_that_stands_in_its_problem_is_right_in_every_notation(grader):
    problem = r"Evelyn pays \$18 for $18$ pens of $\frac{1}{2}$ cm, at $60^\circ$."
    pairs = [("18", r"\$18"), (r"\frac{1}{2}", r"\dfrac{1}{2}"), (r"\text{Evelyn}", "Evelyn")]
    pairs += [(r"60^\circ", "60"), (r"\$18.00", r"\$18.00")]
    golds, answers = zip(*pairs)
    assert set(grader.verdicts(map(boxed, answers), golds, [problem] * 5)) == {"right"}


# --------------------------------------------------------- answers that hang, crash or eat memory

HANGING = [
    "9^{9^{9^9}}", r"1, 9^{9^{9^9}}", r"9^{-9^{9^9}}", "1e999999999", "5^{10000000!}",
    r"2^{2^{2^{2^{99}}}}", r"\log_2 9^{9^{9^9}}", "x = 9^{9^{9^9}} = 5",
]  # fmt: skip
ODD = [
    r"\sum_{k=1}^{100000000} \frac{1}{k^{k}}", r"\int_0^1 \frac{\sin(x^x)}{\ln(1+e^{x})} dx",
    "10000000!", r"\binom{10000000}{5000000}", r"\gcd(10^{10^{10}},3)", "(" * 900 + "5" + ")" * 900,
    "5 " + "ab cd " * 300, ",".join(map(str, range(400))), "x" * 100000, "(" * 100000, "9" * 1990,
    "," * 1900, "x=" * 900 + "1", "5" + "a" * 1900 + "!", r"5\text{a}" * 200, r"5\text{a" * 300,
    "5\0", "\ud800", "\U0001f600" * 100, "5\n6", '"}\n{"', "1 " * 900, "A" * 1900,
    "1" + "{,}000" * 300 + "x", r"\pm" * 600, r"\\pm," * 300,
]  # fmt: skip


def test_a_batch_with_hanging_answers_ends_in_time_and_nothing_else_changes():
    rng = random.Random(0)
    golds = [str(rng.randrange(1000)) for _ in range(512)]
    forms = ["{}", "x={}", "{}1"]  # letter for letter; right by a worker; wrong
    responses = [boxed(forms[i % 3].format(gold)) for i, gold in enumerate(golds)]
    with reward.Grader(workers=2, deadline=2.0) as grader:
        start = time.monotonic()
        grader.verdicts([boxed("2"), boxed("4")], ["1", "3"])
        slow = time.monotonic() - start - 1.0  # a worker starts in a second, or the machine is busy
        expected = grader.verdicts(responses, golds)
        assert set(expected) == {"right", "wrong"}
        hanging = dict(zip(rng.sample(range(512), 8), HANGING))
        for i, answer in hanging.items():
            responses[i] = boxed(answer)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        verdicts = grader.verdicts(responses, golds)
    assert time.monotonic() - start < 26.0 + 4 * max(0.0, slow)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    assert {i for i in range(512) if verdicts[i] != expected[i]} <= hanging.keys()
    assert all(verdicts[i] != "right" for i in hanging)


def test_odd_answers_end_in_time_and_are_never_right():
    with reward.Grader(workers=2, deadline=2.0) as grader:
        grader.verdicts([boxed("2")], ["1"])
        start = time.monotonic()
        verdicts = grader.verdicts(list(map(boxed, ODD)), ["5"] * len(ODD))
        assert "right" not in verdicts and time.monotonic() - start < len(ODD) * 3.0


def test_workers_have_a_memory_limit_are_replaced_when_killed_and_end_with_the_grader():
    def pids():
        return {worker.pid for worker in grader.idle if worker}

    with reward.Grader(deadline=30.0) as grader:
        grader.verdicts([boxed("2.0")] * 4, ["2", "3", "4", "5"])
        workers = pids()
        assert workers and all(map(alive, workers))
        for pid in workers:
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert f"Max address space         {reward.MEMORY} " in limits
            os.kill(pid, signal.SIGKILL)
        verdicts = [grader.verdicts([boxed("2.0")], ["2"])[0] for _ in range(4)]
        assert verdicts[-1] == "right" and verdicts.count("ungradable") <= 2
        workers |= pids()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_workers_die_with_a_trainer_that_is_killed():
    """An idle one by the end of its stdin, a busy one by its own alarm, after its deadline."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); import reward
grader = reward.Grader(workers=2, deadline=3.0)
grader.verdicts([r'\\boxed{{1.0}}', r'\\boxed{{2.0}}'], ['1', '2'])
print(*[worker.pid for worker in grader.idle if worker], flush=True)
grader.verdicts([r'\\boxed{{9^{{9^{{9^9}}}}}}'], ['1'])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        pids = [int(pid) for pid in job.stdout.readline().split()]
        time.sleep(0.5)
        assert pids and all(map(alive, pids))
        job.kill()
    limit = time.monotonic() + 10.0
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(alive, pids))


# ------------------------------------------------------------------------------------ where it runs


def test_in_a_thread_and_with_the_callers_signals_untouched():
    def handler(*_):
        raise AssertionError("the caller's alarm went off early")

    rewards, old = [], signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 300.0)
    pair = [boxed("0.5")], [r"\frac12"], 30.0
    try:
        thread = threading.Thread(target=lambda: rewards.extend(reward.grade(*pair)))
        thread.start(), thread.join()
        assert rewards == [1.0] and signal.getsignal(signal.SIGALRM) is handler
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_in_a_script_from_standard_input_and_in_a_process_that_it_spawns():
    """Importing it imports neither torch nor SymPy."""
    done = run("""
import reward, multiprocessing
print({"torch", "sympy"} & set(sys.modules))
task = [r"\\boxed{0.5}"], [r"\\frac12"], 30.0
print(reward.grade(*task))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.apply(reward.grade, task))
""")
    assert done.stdout.split() == ["set()", "[1.0]", "[1.0]"], done.stderr


def test_what_a_library_prints_is_no_reply(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import json\nloads = json.loads\njson.loads = lambda text: print('right') or loads(text)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert reward.grade([boxed("6.0")], ["5"], 30.0) == [0.0]


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('math_verify is broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start; see .*reward.py"):
        reward.grade([boxed("0.5")], ["1"])


# -------------------------------------------------------------------------------------- corrections


class Bytes:
    """A byte-level tokenizer whose tokens, of one to three bytes, split characters."""

    eos_token_id, pad_token_id = b"<eos>", None

    def encode(self, text, rng):
        data, tokens = text.encode(), []
        while data:
            n = rng.randint(1, 3)
            tokens, data = [*tokens, data[:n]], data[n:]
        return tokens

    def decode(self, tokens):
        return b"".join(tokens).decode(errors="replace")


@pytest.mark.parametrize("seed", range(30))
def test_the_span_is_that_of_equation_12_token_by_token(seed):
    rng = random.Random(seed)
    head = rng.choice(["", "<think>Hm: 9é\nAnalysis: no</think>\n", "Préface 🙂\n"])
    names = ["Analysis:", "## **Analysis:**", "analysis :", "1. **Analysis**:", "- __Analysis:__"]
    begun = head + rng.choice(names)
    body = rng.choice([" é 2+2 ≠ 5 🙂", "\nStep 1: ü\nAnalysis shows that", " x"])
    names = ["Corrected Solution:", "### corrected   solution:", "2) **Corrected Solution:**"]
    text = f"{begun}{body}\n{rng.choice(names)}\n\\boxed{{4}}"
    tokens = [*Bytes().encode(text, rng), b"<eos>"]
    inside, at = [], 0  # a token belongs to the analysis if all of its bytes do
    for i, token in enumerate(tokens):
        whole = len(begun.encode()) <= at and at + len(token) <= len(f"{begun}{body}\n".encode())
        inside += [i] if whole else []
        at += len(token)
    start, end, solution = reward.find_correction(tokens, Bytes())
    assert list(range(start, end)) == inside and solution == "\n\\boxed{4}"
    assert reward.find_correction(tokens, Bytes(), span="prefix")[:2] == (0, end)


HEADERS = {
    "Analysis: a\nCorrected Solution: b": True,
    "ANALYSIS\na\nCORRECTED SOLUTION\nb": True,
    "# Analysis #\na\n__Corrected_Solution__:\nb": True,
    "1. **Analysis:**\na\n2. **Corrected Solution:**\nb": True,
    "- **Analysis**\na\n* **Corrected Solution**: b": True,
    "Analysis: a\nAnalysis shows that\nCorrected Solution: b": True,  # no header: it goes on
    "<think>Analysis: 1\nCorrected Solution: 2</think>Analysis: a\nCorrected Solution: b": True,
    "<think>Analysis: a\nCorrected Solution: b": False,  # thinking that never ends
    "Analysis: a": False,
    "Corrected Solution: b\nAnalysis: a": False,  # the wrong way round
    "Analysis: a\nAnalysis: a\nCorrected Solution: b": False,  # twice
    "Analysis: a\nCorrected Solution: b\nCorrected Solution: b": False,
    "Analysis: ** -- \n\nCorrected Solution: b": False,  # empty
    "My Analysis: a\nCorrected Solution: b": False,  # not where a line begins
    "Analysis: a. Corrected Solution: b": False,
    "Analysisx: a\nCorrected Solution: b": False,  # another word
    "Analysis: a\nCorrected\nSolution: b": False,  # a name on two lines
    "Analysis a\nCorrected Solution: b": False,  # neither colon nor end
}


@pytest.mark.parametrize("text", HEADERS)
def test_headers(text):
    tokens = Bytes().encode(text, random.Random(0))
    assert (reward.find_correction(tokens, Bytes()) is not None) == HEADERS[text]


@pytest.mark.parametrize("opening, closing", reward.THINKING.items())
def test_thinking_ends_at_the_mark_that_closes_it(opening, closing):
    sections = "Analysis: It must be 5.\nCorrected Solution: b \\boxed{5}"
    thought = f"{opening}analysis\n\\boxed{{5}}\n{sections}\n"
    for text, answer in {thought + closing + sections: sections, thought: "",
                         f"{thought}{closing}{opening}{sections}": "", sections: sections,
                         thought.removeprefix(opening) + closing + sections: sections}.items():
        assert reward.after_thinking(text) == answer
        assert reward.final_answer(text) == ("5" if answer else None)
        correction = reward.find_correction(Bytes().encode(text, random.Random(0)), Bytes())
        assert (correction is not None) == bool(answer)
        if correction:
            assert correction.solution == " b \\boxed{5}" and correction.start < correction.end


@pytest.mark.parametrize("name", ["r1_distill_qwen", "smollm2_135m_instruct"])
def test_sections_on_real_tokenizers(name):
    folder = SHARED / "tokenizers" / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent: sections not tested on a real tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<think>\nAnalysis: hm\n</think>\n- **Analysis**: No. 答\n\n### Corrected Solution\n4"
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    start, end, solution = reward.find_correction(ids, tokenizer)
    assert tokenizer.decode(ids[start:end]).startswith(" No. 答") and solution == "\n4"


def test_a_long_correction_takes_milliseconds():
    text = "Analysis:\n" + "é word " * 4000 + "\nCorrected Solution:\n" + "word " * 4000
    tokens = Bytes().encode(text, random.Random(0))
    start = time.process_time()
    assert len(tokens) > 20000 and reward.find_correction(tokens, Bytes())
    assert time.process_time() - start < 0.5
