"""reward.py against a marker's verdicts, answers that hang or eat memory, and its own contract.

The marker's verdicts are in reward_cases.tsv, one pair a line, each with its reason: add a line to add a case.
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

import reward

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
CASES = Path(__file__).with_name("reward_cases.tsv")


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


def cases():
    """(kind, right, gold, response, reason) of each line of the table."""
    kind = ""
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            kind = line.removeprefix("# -- ")
        else:
            right, gold, answer, reason = line.split("\t")
            whole = any(word in answer for word in (r"\boxed", r"\fbox", "<think>", "final answer"))
            yield kind, right == "1", gold, answer if whole else boxed(answer), reason


@pytest.fixture(scope="module")
def grader():
    with reward.Grader(deadline=30.0) as grader:
        yield grader


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(code, **options):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, **options)


# -- verdicts ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def verdicts(grader):
    rows = list(cases())
    return list(zip(rows, grader.verdicts([row[3] for row in rows], [row[2] for row in rows])))


def test_the_table_has_both_verdicts_and_a_reason_in_every_line():
    rows = list(cases())
    assert all(row[4] for row in rows) and len({row[2:4] for row in rows}) == len(rows)
    assert min(sum(row[1] for row in rows), sum(not row[1] for row in rows)) > 200


@pytest.mark.parametrize("kind", dict.fromkeys(row[0] for row in cases()))
def test_marker(kind, verdicts):
    missed = [f"{verdict}: {gold} | {response} ({reason})"
              for (name, right, gold, response, reason), verdict in verdicts
              if name == kind and (verdict == "right") != right]
    assert not missed, "\n".join(missed)


def test_work_may_stay_undone_where_the_gold_leaves_it_too(grader):
    pairs = [(r"\binom{2019}{5}", r"\binom{2019}{5}\,"), ("2^{10}-1", "2^{10} - 1."), (r"n!", r"n! \,"),
             (r"\log_2 3", r"\frac{\log 3}{\log 2}"), (r"\frac{1}{2004!}", r"\dfrac{1}{2004!}"),
             (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k \,"), (r"\cos 20^\circ", r"\cos(20^\circ)")]
    assert grader.verdicts([boxed(answer) for _, answer in pairs], [gold for gold, _ in pairs]) == ["right"] * len(pairs)


def test_three_verdicts():
    with reward.Grader(deadline=3.0) as grader:
        responses = [boxed("5"), boxed("x=5"), boxed("6"), "5", boxed("9^{9^{9^9}}"), boxed("7")]
        golds = ["5", "5", "5", "5", "5", r"\frac{"]
        assert grader.verdicts(responses, golds) == ["right", "right", "wrong", "wrong", "ungradable", "ungradable"]
    assert reward.grade(responses[:3], golds[:3], timeout=30.0) == [1.0, 1.0, 0.0]


def test_one_response_more_than_golds_is_an_error(grader):
    with pytest.raises(ValueError):
        grader.verdicts([boxed("1"), boxed("2")], ["1"])


def test_nothing_of_the_response_is_executed(grader, tmp_path):
    trap = tmp_path / "trap"
    attacks = [f"__import__('os').system('touch {trap}')", f"\\write18{{touch {trap}}}", f"open('{trap}','w')"]
    assert "right" not in grader.verdicts(list(map(boxed, attacks)), ["5"] * len(attacks))
    assert not trap.exists()


# -- answers that hang, crash or eat memory ---------------------------------------------------------
HANGING = ["9^{9^{9^9}}", r"1, 9^{9^{9^9}}", r"9^{-9^{9^9}}", "1e999999999", "5^{10000000!}", r"2^{2^{2^{2^{99}}}}",
           r"\log_2 9^{9^{9^9}}", "x = 9^{9^{9^9}} = 5"]
ODD = [r"\sum_{k=1}^{100000000} \frac{1}{k^{k}}", r"\int_0^1 \frac{\sin(x^x)}{\ln(1+e^{x})} dx", "10000000!",
       r"\binom{10000000}{5000000}", r"\gcd(10^{10^{10}},3)", "(" * 900 + "5" + ")" * 900, "5 " + "ab cd " * 300,
       ",".join(map(str, range(400))), "x" * 100000, "(" * 100000, "9" * 1990, "," * 1900, "x=" * 900 + "1",
       "5" + "a" * 1900 + "!", r"5\text{a}" * 200, r"5\text{a" * 300, "5\0", "\ud800", "\U0001f600" * 100, "5\n6",
       '"}\n{"', "1 " * 900, "A" * 1900, "1" + "{,}000" * 300 + "x", r"\pm" * 600, r"\\pm," * 300]


def test_a_batch_with_hanging_answers_ends_in_time_and_nothing_else_changes():
    rng = random.Random(0)
    golds = [str(rng.randrange(1000)) for _ in range(512)]
    responses = [boxed(gold if i % 3 else f"x={gold}" if i % 2 else f"{gold}1") for i, gold in enumerate(golds)]
    with reward.Grader(workers=2, deadline=2.0) as grader:
        start = time.monotonic()
        grader.verdicts([boxed("2"), boxed("4")], ["1", "3"])
        slow = time.monotonic() - start - 1.0  # a worker starts in a second, unless the machine is busy
        expected = grader.verdicts(responses, golds)
        assert set(expected) == {"right", "wrong"}
        hanging = rng.sample(range(512), 8)
        for i, answer in zip(hanging, HANGING):
            responses[i] = boxed(answer)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        verdicts = grader.verdicts(responses, golds)
        seconds = time.monotonic() - start
    print(f"\n512 responses, 8 of them hanging: {seconds:.1f} s")
    assert seconds < 26.0 + 4 * max(0.0, slow)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    assert {i for i in range(512) if verdicts[i] != expected[i]} <= set(hanging)
    assert all(verdicts[i] != "right" for i in hanging)


def test_odd_answers_end_in_time_and_are_never_right():
    with reward.Grader(workers=2, deadline=2.0) as grader:
        grader.verdicts([boxed("2")], ["1"])
        start = time.monotonic()
        verdicts = grader.verdicts(list(map(boxed, ODD)), ["5"] * len(ODD))
        assert "right" not in verdicts and time.monotonic() - start < len(ODD) * 3.0


def test_a_worker_lives_under_a_memory_limit():
    with reward.Grader(workers=1, deadline=30.0) as grader:
        grader.verdicts([boxed("2.0")], ["1"])
        limits = Path(f"/proc/{grader.idle[0].pid}/limits").read_text()
    assert f"Max address space         {reward.MEMORY} " in limits


def test_a_worker_that_is_killed_is_replaced():
    with reward.Grader(deadline=30.0) as grader:
        grader.verdicts([boxed("2")] * 2, ["1", "3"])
        for worker in filter(None, grader.idle):
            os.kill(worker.pid, signal.SIGKILL)
        verdicts = [grader.verdicts([boxed("2.0")], ["2"])[0] for _ in range(4)]
    assert verdicts[-1] == "right" and verdicts.count("ungradable") <= 2


def test_closing_leaves_no_process_behind():
    with reward.Grader(deadline=30.0) as grader:
        grader.verdicts([boxed("2.0")] * 4, ["2", "3", "4", "5"])
        pids = [worker.pid for worker in grader.idle if worker]
        assert pids and all(map(alive, pids))
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_workers_die_with_a_trainer_that_is_killed():
    """An idle one by the end of its stdin, a busy one by its own alarm, a second after its deadline."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward\n"
            "g = reward.Grader(workers=2, deadline=3.0); g.verdicts([r'\\boxed{1.0}', r'\\boxed{2.0}'], ['1', '2'])\n"
            "print(*[w.pid for w in g.idle if w], flush=True)\n"
            "g.verdicts([r'\\boxed{9^{9^{9^9}}}'], ['1'])")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        time.sleep(0.5)
        assert pids and all(map(alive, pids))
        trainer.kill()
    limit = time.monotonic() + 10.0
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(alive, pids))


# -- where it runs ----------------------------------------------------------------------------------
def test_in_a_thread_and_with_the_callers_signals_untouched():
    def handler(*_):
        raise AssertionError("the caller's alarm went off early")

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 300.0)
    rewards = []
    try:
        thread = threading.Thread(target=lambda: rewards.extend(reward.grade([boxed("0.5")], [r"\frac12"], 30.0)))
        thread.start()
        thread.join()
        assert rewards == [1.0] and signal.getsignal(signal.SIGALRM) is handler
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_in_a_script_from_standard_input_and_in_a_process_that_it_spawns():
    code = ("import reward, multiprocessing\n"
            "task = [r'\\boxed{0.5}'], [r'\\frac12'], 30.0\n"
            "print(reward.grade(*task))\n"
            "with multiprocessing.get_context('fork').Pool(1) as pool: print(pool.apply(reward.grade, task))")
    done = run(code)
    assert done.stdout.split() == ["[1.0]", "[1.0]"], done.stderr


def test_importing_it_imports_neither_torch_nor_sympy():
    assert run("import reward; print({'torch', 'sympy'} & set(sys.modules))").stdout == "set()\n"


def test_what_a_library_prints_is_no_reply(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import json\nloads = json.loads\n"
                                               "json.loads = lambda text: print('right') or loads(text)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert reward.grade([boxed("6.0")], ["5"], 30.0) == [0.0]


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('math_verify is broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start; see .*reward.py"):
        reward.grade([boxed("0.5")], ["1"])


# -- the benchmarks ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "olympiad", "gsm8k"])
def test_benchmark_golds(name, grader):
    """Each gold is right against itself, also when a worker must compare, and wrong against another."""
    path = SHARED / "benchmarks" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is absent: benchmark golds not tested")
    golds = [json.loads(line)["answer"] for line in path.open()]
    assert set(grader.verdicts(list(map(boxed, golds)), golds)) == {"right"}
    assert set(grader.verdicts([boxed(f"{gold}\\,") for gold in golds], golds)) == {"right"}
    rng = random.Random(0)
    pairs = [(gold, other) for gold in golds for other in rng.sample(golds, 1)
             if other not in (gold, gold.split("=")[-1], gold.removesuffix(r"^\circ"))]  # f(x)=1 and 1
    verdicts = grader.verdicts([boxed(other) for _, other in pairs], [gold for gold, _ in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts) if verdict == "right"] == []


# -- corrections ------------------------------------------------------------------------------------
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
    first = rng.choice(["Analysis:", "## **Analysis:**", "analysis :", "1. **Analysis**:", "- __Analysis:__"])
    body = rng.choice([" é 2+2 ≠ 5 🙂", "\nStep 1: ü\nAnalysis shows that", " x"])
    second = rng.choice(["Corrected Solution:", "### corrected   solution:", "2) **Corrected Solution:**"])
    text = f"{head}{first}{body}\n{second}\n\\boxed{{4}}"
    begin = len(f"{head}{first}")
    stop = text.index(second, begin)
    tokens = [*Bytes().encode(text, rng), b"<eos>"]
    owners = [i for i, character in enumerate(text) for _ in character.encode()]
    ends = [sum(map(len, tokens[: k + 1])) for k in range(len(tokens) - 1)]
    spans = [(owners[end - len(token)], owners[end - 1] + 1) for token, end in zip(tokens, ends)]
    inside = [i for i, (low, high) in enumerate(spans) if begin <= low and high <= stop]
    start, end, solution = reward.find_correction(tokens, Bytes())
    assert list(range(start, end)) == inside and solution == "\n\\boxed{4}"
    assert reward.find_correction(tokens, Bytes(), span="prefix")[:2] == (0, end)


@pytest.mark.parametrize("text, found", [
    ("Analysis: a\nCorrected Solution: b", True),
    ("ANALYSIS\na\nCORRECTED SOLUTION\nb", True),
    ("# Analysis #\na\n__Corrected_Solution__:\nb", True),
    ("1. **Analysis:**\na\n2. **Corrected Solution:**\nb", True),
    ("- **Analysis**\na\n* **Corrected Solution**: b", True),
    ("Analysis: a\nAnalysis shows that\nCorrected Solution: b", True),            # no header: it goes on
    ("<think>Analysis: 1\nCorrected Solution: 2</think>Analysis: a\nCorrected Solution: b", True),
    ("<think>Analysis: a\nCorrected Solution: b", False),                        # thinking that never ends
    ("Analysis: a", False),
    ("Corrected Solution: b\nAnalysis: a", False),                               # the wrong way round
    ("Analysis: a\nAnalysis: a\nCorrected Solution: b", False),                  # twice
    ("Analysis: a\nCorrected Solution: b\nCorrected Solution: b", False),
    ("Analysis: ** -- \n\nCorrected Solution: b", False),                        # empty
    ("My Analysis: a\nCorrected Solution: b", False),                            # not where a line begins
    ("Analysis: a. Corrected Solution: b", False),
    ("Analysisx: a\nCorrected Solution: b", False),                              # another word
    ("Analysis: a\nCorrected\nSolution: b", False),                              # a name on two lines
    ("Analysis a\nCorrected Solution: b", False),                                # neither colon nor end
])
def test_headers(text, found):
    tokens = Bytes().encode(text, random.Random(0))
    assert (reward.find_correction(tokens, Bytes()) is not None) == found


@pytest.mark.parametrize("name", ["r1_distill_qwen", "smollm2_135m_instruct"])
def test_sections_on_real_tokenizers(name):
    folder = SHARED / "tokenizers" / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent: sections not tested on a real tokenizer")
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    for first, second in [("Analysis:", "Corrected Solution:"), ("1. **Analysis:**", "2. **Corrected Solution:**"),
                          ("- **Analysis**:", "### Corrected Solution")]:
        text = f"<think>\nAnalysis: hm\n</think>\n{first} The step is wrong. 答\n\n{second}\n\\boxed{{4}}"
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        start, end, solution = reward.find_correction(ids, tokenizer)
        assert tokenizer.decode(ids[start:end]).startswith(" The step is wrong. 答"), first
        assert reward.final_answer(solution) == "4" and tokenizer.eos_token not in solution


def test_a_long_correction_takes_milliseconds():
    text = "Analysis:\n" + "é word " * 4000 + "\nCorrected Solution:\n" + "word " * 4000
    tokens = Bytes().encode(text, random.Random(0))
    start = time.process_time()
    for _ in range(10):
        assert reward.find_correction(tokens, Bytes())
    assert len(tokens) > 20000 and (time.process_time() - start) / 10 < 0.5
