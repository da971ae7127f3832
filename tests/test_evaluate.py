"""evaluate.py: the same bytes whatever happens to a run, figures that are what they are called, no lost file."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import evaluate
from reward import Grader
from rollout import Problem, Sample, sample_seed

torch.set_num_threads(1)  # two threads on a busy machine are slower than one
ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT.parent / "shared" / "benchmarks"
WRITTEN = ("completions.jsonl", "corrections.jsonl", "summary.json", "table.md", "accuracy.png", "state.json")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ALONE = {name: value for name, value in os.environ.items() if name not in RANKS} | {"OMP_NUM_THREADS": "1"}


def command(*flags, ranks=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *torchrun * (ranks > 1), str(ROOT / "evaluate.py"), *map(str, flags)]


def start(*flags, ranks=1):
    """A real run in a session of its own, so that it can be killed with all its children."""
    return subprocess.Popen(command(*flags, ranks=ranks), cwd=ROOT, env=ALONE, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out + err


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*flags) -> (exit code, stdout, stderr) of evaluate.main in this process, as plain python would."""

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        forget_ranks()
        capsys.readouterr()
        code = 0
        try:
            evaluate.main()
        except SystemExit as end:
            code = end.code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return code, *capsys.readouterr()

    yield main
    forget_ranks()


def forget_ranks():
    for name in RANKS:
        os.environ.pop(name, None)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    return {name: (folder / name).read_bytes() for name in WRITTEN}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """(flags, folder) of one uninterrupted run on one rank: two benchmarks, both files of completions."""
    folder = tmp_path_factory.mktemp("evaluation")
    problems = (ROOT / "toy" / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "alpha.jsonl").write_text("".join(problems[:60]))
    (folder / "beta.jsonl").write_text("".join(problems[60:75]))
    flags = ["--benchmarks", folder / "alpha.jsonl", folder / "beta.jsonl", "--k", 4, "--max_new_tokens", 200,
             "--self_correct", "--chunk_samples", 16]
    printed = finish(start(*flags, "--output", folder / "one"))
    assert "| alpha | 60 | 4 |" in printed and "put right" in printed
    return flags, folder / "one"


# --------------------------------------------------------------------------------------------- the same bytes


def test_two_ranks_and_another_chunk_give_the_same_bytes(baseline):
    flags, one = baseline
    finish(start(*flags, "--chunk_samples", 100, "--output", one.parent / "two", ranks=2))
    assert contents(one.parent / "two") == contents(one)


def test_killed_at_three_random_moments_and_resumed(baseline, tmp_path):
    flags, one = baseline
    rng, sizes = random.Random(6), [(one / name).stat().st_size for name in WRITTEN[:2]]
    size = lambda: sum((tmp_path / name).stat().st_size for name in WRITTEN[:2] if (tmp_path / name).exists())
    seen = []
    for moment in sorted(rng.uniform(0.02, 0.98) * sum(sizes) for _ in range(3)):
        process = start(*flags, "--output", tmp_path)
        while size() < moment and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))  # not always right after a write
        assert process.poll() is None, process.communicate()[1]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seen.append(size())
        assert not (tmp_path / "summary.json").exists()
        if len(seen) == 1:
            with open(tmp_path / WRITTEN[0], "a") as file:
                file.write('{"benchmark": "alpha", "question": 7, "respo')  # a kill within a write
    assert 0 < seen[0] < seen[1] < seen[2] < sum(sizes)
    finish(start(*flags, "--output", tmp_path))
    assert contents(tmp_path) == contents(one)


def test_completions_hold_all_that_is_needed_to_check_them(baseline):
    from transformers import AutoTokenizer

    flags, one = baseline
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    rows = lines(one / "completions.jsonl")
    assert [(r["benchmark"], r["question"], r["sample"]) for r in rows] == [
        (name, q, i) for name, n in (("alpha", 60), ("beta", 15)) for q in range(n) for i in range(4)]
    with Grader() as grader:
        verdicts = grader.verdicts([r["response"] for r in rows], [r["gold"] for r in rows])
    assert verdicts == [r["verdict"] for r in rows]
    for r in rows:
        assert r["seed"] == sample_seed(0, 0, r["question"], r["sample"])
        assert r["prompt"] == f"<|user|>{r['problem']}\n{evaluate.INSTRUCTION}<|assistant|>"
        assert tokenizer.decode(r["token_ids"], skip_special_tokens=True) == r["response"]
        assert r["finished"] == (r["token_ids"][-1] == tokenizer.eos_token_id)
        assert r["verdict"] != "right" or r["answer"] == r["gold"]
    figures = json.loads((one / "summary.json").read_text())["benchmarks"]["alpha"]
    alpha = [r for r in rows if r["benchmark"] == "alpha"]
    assert figures["accuracy"] == pytest.approx(np.mean([r["verdict"] == "right" for r in alpha]))
    assert figures["tokens"] == pytest.approx(np.mean([len(r["token_ids"]) for r in alpha]))
    assert 0.2 < figures["accuracy"] < figures["pass@2"] < figures["pass@4"] < 1
    assert figures["se"] > figures["se_sampling"] > 0


def test_corrections_hold_both_directions(baseline):
    _, one = baseline
    first = {(r["benchmark"], r["question"], r["sample"]): r for r in lines(one / "completions.jsonl")}
    second = lines(one / "corrections.jsonl")
    assert {(r["benchmark"], r["question"], r["first_sample"]) for r in second} == {
        key for key, r in first.items() if r["finished"]}
    for r in second:
        origin = first[r["benchmark"], r["question"], r["first_sample"]]
        assert r["first_verdict"] == origin["verdict"]
        assert f"Wrong solution:\n{origin['response']}\n" in r["prompt"]
        assert r["well_formed"] or r["verdict"] == "wrong"
    of_alpha = [r["seed"] for r in [*first.values(), *second] if r["benchmark"] == "alpha"]
    assert len(set(of_alpha)) == len(of_alpha)  # no correction repeats the random numbers of an answer
    wrong = [r for r in second if r["benchmark"] == "alpha" and r["first_verdict"] != "right"]
    figures = json.loads((one / "summary.json").read_text())["self_correction"]["alpha"]
    assert figures["wrong"] == len(wrong)
    assert figures["corrected"] == pytest.approx(np.mean([r["verdict"] == "right" for r in wrong]))
    assert figures["corrected"] > 0.2 and figures["spoiled"] < 0.6  # the toy has learned to correct


def test_other_settings_are_refused_and_nothing_is_touched(baseline, run, tmp_path):
    flags, one = baseline
    before = contents(one)
    for i, (change, name) in enumerate((
            (["--seed", 1], "seed"), (["--k", 5], "alpha"), (["--temperature", 0.7], "temperature"),
            (["--benchmarks", one.parent / "beta.jsonl"], "alpha"), (["--model", another_toy(tmp_path)], "model"))):
        copy = shutil.copytree(one, tmp_path / str(i))  # a folder stays locked until the process ends
        code, _, err = run(*flags, *change, "--output", copy)
        assert code == 2 and f"another {name}" in one_error(err)
        assert contents(copy) == before


def test_corrections_may_be_added_later_and_half_of_them_are_not_reported(baseline, run, tmp_path):
    flags, one = baseline
    half, whole = shutil.copytree(one, tmp_path / "half"), tmp_path / "whole"
    state = json.loads((half / "state.json").read_text())
    kept = b"".join((half / "corrections.jsonl").read_bytes().splitlines(keepends=True)[:8])
    state["corrections.jsonl"] = {"questions": 2, "bytes": len(kept)}
    (half / "state.json").write_text(json.dumps(state))
    assert run(*[flag for flag in flags if flag != "--self_correct"], "--output", half)[0] == 0
    assert "self_correction" not in json.loads((half / "summary.json").read_text())
    assert "put right" not in (half / "table.md").read_text()
    shutil.copytree(half, whole)  # a folder stays locked until the process ends
    assert run(*flags, "--output", whole)[0] == 0
    assert contents(whole) == contents(one)


def another_toy(tmp_path):
    return shutil.copytree(ROOT / "toy", tmp_path / "toy")


def test_other_weights_under_the_same_path_are_refused(tmp_path, run):
    """As after more training: out/final is another model now."""
    import safetensors.torch as st

    toy, file = another_toy(tmp_path), write(tmp_path / "p.jsonl", [{"problem": "1+1", "answer": "2"}])
    flags = ["--model", toy, "--benchmarks", file, "--k", 1, "--max_new_tokens", 8, "--output"]
    assert run(*flags, tmp_path / "out")[0] == 0
    weights = st.load_file(toy / "model.safetensors")
    more = {name: w * 1.001 for name, w in weights.items()}
    st.save_file(more, toy / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    code, _, err = run(*flags, tmp_path / "again")
    assert code == 2 and "another weights" in one_error(err)


def test_only_one_run_writes_into_a_folder(tmp_path, run):
    file = write(tmp_path / "p.jsonl", [{"problem": "1+1", "answer": "2"}])
    with evaluate.lock(tmp_path):
        code, _, err = run("--benchmarks", file, "--output", tmp_path)
    assert code == 2 and "another evaluation is writing" in one_error(err)
    assert not (tmp_path / "state.json").exists()


def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(evaluate.os.strerror(38))

    monkeypatch.setattr(evaluate.fcntl, "flock", unable)
    with evaluate.lock(tmp_path) as first, evaluate.lock(tmp_path) as second:
        assert first and second


# ------------------------------------------------------------------------------------------------- statistics


def simulate(probabilities, k, rng):
    """Graded records of one evaluation with known probabilities of a right answer."""
    right = rng.random((len(probabilities), k)) < probabilities[:, None]
    verdicts = np.where(right, "right", "wrong").tolist()
    return right, [{"question": q, "verdict": verdict} for q, row in enumerate(verdicts) for verdict in row]


def test_standard_error_over_questions_and_samples():
    rng, means, errors = np.random.default_rng(0), [], []
    for _ in range(4000):  # each with new questions and new samples
        mean, error = evaluate.accuracy(simulate(rng.beta(0.7, 0.9, size=60), 4, rng)[1])
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)


def test_standard_error_of_sampling_alone():
    rng = np.random.default_rng(1)
    probabilities, means, errors = rng.beta(0.7, 0.9, size=60), [], []
    for _ in range(4000):  # the same questions, new samples
        right, records = simulate(probabilities, 4, rng)
        means.append(evaluate.accuracy(records)[0])
        errors.append(evaluate.sampling_error(right.astype(int).tolist()))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    known = np.sqrt((probabilities * (1 - probabilities) / 4).sum()) / 60
    assert np.mean(errors) == pytest.approx(known, rel=0.05)
    assert evaluate.accuracy(records)[1] > 1.5 * known  # the error over other questions too is another figure


def test_standard_error_with_unequal_groups():
    """Wrong first answers are not equally many on each question."""
    rng, means, errors = np.random.default_rng(2), [], []
    for _ in range(4000):
        p, n = rng.beta(1, 1, size=80), rng.integers(1, 9, size=80)
        questions = np.repeat(np.arange(80), n)
        mean, error = evaluate.clustered_mean(questions, rng.random(len(questions)) < p[questions])
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for right in range(n + 1) if k <= n else ():
            draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert evaluate.pass_at_k(n, right, k) == pytest.approx(np.mean([any(d) for d in draws]))


def test_bootstrap_interval_covers_the_difference():
    rng, covered = np.random.default_rng(3), 0
    for trial in range(300):
        d = rng.choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=100)  # true mean 0.2
        low, high = np.quantile(evaluate.bootstrap(d, draws=2000, seed=trial), (0.025, 0.975))
        covered += low <= 0.2 <= high
    assert 0.90 <= covered / 300 <= 0.98
    assert np.std(evaluate.bootstrap(d)) == pytest.approx(np.std(d) / 10, rel=0.05)


# --------------------------------------------------------------------------------------------- scripted model


class Script:
    """An engine that answers from a list of (text, finished), and a tokenizer whose tokens are characters."""

    name, max_context, chat_template = "script", 10**9, None

    def __init__(self, *groups):
        self.groups, self.prompts = groups, None

    def generate(self, prompts, n, *, seeds, temperature, top_p, max_new_tokens, progress=None):
        self.prompts, self.seeds = ["".join(map(chr, p)) for p in prompts], seeds
        assert len(prompts) == len(self.groups) and all(len(row) == n for row in seeds)
        return [[Sample([ord(c) for c in text], [0.0] * len(text), text, finished) for text, finished in group]
                for group in self.groups]

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 99, "seed": 5}


@pytest.fixture
def alone():
    """A process group of one."""
    forget_ranks()
    evaluate.start_distributed()
    yield
    dist.destroy_process_group()
    forget_ranks()


def test_answers_and_corrections_of_a_scripted_model(alone):
    problems = [Problem("1+1", "2", "here:0"), Problem("2+2", "4", "here:1")]
    first = Script([("so \\boxed{2}", True), ("so \\boxed{3}", True)],
                   [("<think>4? \\boxed{4}", False), ("\\boxed{5}", True)])
    fixed = "Analysis:\nadd again\nCorrected Solution:\n"
    second = Script([(fixed + "\\boxed{3}", True)],  # right -> wrong
                    [(fixed + "\\boxed{2}", True)],  # wrong -> right
                    [("I see: \\boxed{4}", True)])  # a right box, but no sections: wrong
    with Grader() as grader:
        answers = evaluate.sample_answers(first, first, problems, grader, k=2, **SAMPLING)
        corrections = evaluate.sample_corrections(second, second, answers, grader, **SAMPLING)
    assert [r["verdict"] for r in answers] == ["right", "wrong", "wrong", "wrong"]  # open thinking: none
    assert [r["answer"] for r in answers] == ["2", "3", None, "5"]
    assert first.seeds == [[sample_seed(5, 0, q, i) for i in range(2)] for q in range(2)]
    assert first.prompts[0] == f"1+1\n{evaluate.INSTRUCTION}\n"
    assert [(r["question"], r["first_sample"], r["well_formed"], r["verdict"]) for r in corrections] == [
        (0, 0, True, "wrong"), (0, 1, True, "right"), (1, 1, False, "wrong")]  # the unfinished: left out
    figures = evaluate.summarize_corrections(corrections, answers)
    assert (figures["wrong"], figures["right"], figures["left_out"]) == (2, 1, 1)
    assert (figures["corrected"], figures["spoiled"]) == (0.5, 1)
    assert (figures["before"], figures["after"]) == (1 / 3, 1 / 3)
    assert (figures["well_formed_of_wrong"], figures["well_formed_of_right"]) == (0.5, 1)


def test_prompts_that_do_not_fit_are_left_out_and_named(alone, capsys):
    problems = [Problem("1+1", "2", ""), Problem("long " * 99, "2", ""), Problem("2+2", "4", "")]
    engine = Script([("\\boxed{2}", True)], [("\\boxed{4}", True)])
    engine.max_context = 300
    asked = evaluate.askable(engine, engine, problems, SAMPLING["max_new_tokens"], "a file")
    with Grader() as grader:
        answers = evaluate.sample_answers(engine, engine, problems, grader, k=1, questions=asked, **SAMPLING)
    assert [(r["question"], r["verdict"]) for r in answers] == [(0, "right"), (2, "right")]
    assert "a file: 1 of 3 problems" in (err := capsys.readouterr().err) and "by number: 1" in err


# ---------------------------------------------------------------------------------------------------- regrade


def near_miss(gold):
    """
    >>> near_miss("12"), near_miss("-x"), near_miss("x")
    ('13', 'x', '-x')
    """
    if re.fullmatch(r"-?\d+", gold):
        return str(int(gold) + 1)
    return gold[1:] if gold.startswith("-") else "-" + gold


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the five benchmark files are not beside this repository")
def test_golds_are_right_and_near_misses_wrong(run, tmp_path):
    files = {name: lines(BENCHMARKS / f"{name}.jsonl") for name in evaluate.BENCHMARKS}
    golds = {name: [row["answer"] for row in rows] for name, rows in files.items()}
    for label, change in (("golds", lambda gold: gold), ("misses", near_miss)):
        file = write(tmp_path / f"{label}.jsonl", [
            {"benchmark": name, "response": f"So it is \\boxed{{{change(gold)}}}.", "gold": gold}
            for name in golds for gold in golds[name]])
        assert run("--regrade", file)[0] == 0
        figures = json.loads((tmp_path / f"{label}-regraded" / "summary.json").read_text())["benchmarks"]
        assert [figures[name]["questions"] for name in golds] == [len(golds[name]) for name in golds]
        for name in golds:
            accuracy = figures[name]["accuracy"]
            assert accuracy == 1 if label == "golds" else accuracy <= 0.005, (label, name, accuracy)


def test_regrade_gives_the_same_verdicts_and_repairs_wrong_ones(baseline, run, tmp_path):
    _, one = baseline
    rows = lines(one / "completions.jsonl")
    broken = write(tmp_path / "broken.jsonl", [{**r, "verdict": "wrong"} for r in rows])
    code, out, _ = run("--regrade", broken, "--output", tmp_path / "again")
    right = sum(r["verdict"] == "right" for r in rows)
    assert code == 0 and f"wrong -> right: {right}" in out
    assert (tmp_path / "again" / "completions.jsonl").read_bytes() == (one / "completions.jsonl").read_bytes()
    again, first = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "again", one))
    assert again["benchmarks"] == first["benchmarks"]
    assert all(r["verdict"] == "wrong" for r in lines(broken))  # the file itself stays as it was
    before = (tmp_path / "again" / "completions.jsonl").read_bytes()
    code, _, err = run("--regrade", one / "completions.jsonl", "--output", tmp_path / "again")
    assert code == 2 and "would be lost" in one_error(err)
    assert (tmp_path / "again" / "completions.jsonl").read_bytes() == before


def test_regrade_of_corrections_looks_at_the_corrected_solution_only(run, tmp_path):
    """A right box in the analysis earns nothing (Eq. 11), as when it was first graded."""
    row = {"problem": "1+1", "response": "Analysis: \\boxed{2}\nCorrected Solution: it is 2", "gold": "2"}
    rows = [{**row, "solution": " it is 2", "well_formed": True}, {**row, "solution": " \\boxed{2}", "well_formed": True},
            {**row, "solution": "", "well_formed": False},
            {**row, "solution": "of a benchmark: \\boxed{2}", "response": "\\boxed{3}"}]  # no file of corrections
    assert run("--regrade", write(tmp_path / "corrections.jsonl", rows))[0] == 0
    again = lines(tmp_path / "corrections-regraded" / "completions.jsonl")
    assert [(r["verdict"], r["answer"]) for r in again] == [
        ("wrong", None), ("right", "2"), ("wrong", None), ("wrong", "3")]


def test_regrade_of_minimal_lines_groups_samples_by_problem(run, tmp_path):
    given = (("a", "0.5"), ("a", "2"), ("b", "\\frac12"), ("b", "3"))
    file = write(tmp_path / "mine.jsonl",
                 [{"problem": p, "response": f"\\boxed{{{x}}}", "answer": "1/2"} for p, x in given])
    assert run("--regrade", file)[0] == 0
    figures = json.loads((tmp_path / "mine-regraded" / "summary.json").read_text())["benchmarks"]["mine"]
    assert (figures["questions"], figures["k"], figures["accuracy"], figures["pass@2"]) == (2, 2, 0.5, 1)
    assert (figures["tokens"], figures["truncated"], figures["ungradable"]) == (None, None, 0)
    row = lines(tmp_path / "mine-regraded" / "completions.jsonl")[0]
    assert (row["gold"], row["answer"], row["verdict"]) == ("1/2", "0.5", "right")


# ---------------------------------------------------------------------------------------------------- compare


def graded(folder, run, scores, benchmark="aime24", order=1):
    """A finished evaluation in which question q has scores[q] right answers of 4."""
    rows = [{"benchmark": benchmark, "problem": f"problem {q}", "gold": "1",
             "response": f"\\boxed{{{int(i < right)}}}"} for q, right in list(enumerate(scores))[::order] for i in range(4)]
    assert run("--regrade", write(folder.with_suffix(".jsonl"), rows), "--output", folder)[0] == 0
    return folder


def test_compare_is_paired_and_marks_the_papers_figures(run, tmp_path):
    rng = np.random.default_rng(0)
    weak = rng.choice([0, 1, 3], size=50)
    a = graded(tmp_path / "a", run, weak)
    b = graded(tmp_path / "b", run, [*(weak + 1), 4], order=-1)  # +1/4 on each; another order; one more
    code, out, _ = run("--compare", a, b, "--output", tmp_path / "c")
    assert code == 0 and "| +25.0 [+25.0, +25.0] |" in out and "aime24, 50 questions" in out
    paper = [line for line in out.splitlines() if "ScRPO 1.5B" in line]
    assert len(paper) == 1 and "reported by the paper, not measured here" in paper[0]
    assert "+5.7 over vanilla" in paper[0]
    assert "all five: 64.8" in paper[0]  # not to be read as the average of this table's one
    stored = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert stored["difference"][str(b)]["aime24"] == pytest.approx([0.25, 0.25, 0.25])
    assert (tmp_path / "c" / "comparison.md").exists() and (tmp_path / "c" / "comparison.png").exists()
    shuffled = graded(tmp_path / "d", run, rng.permutation(weak))
    _, out, _ = run("--compare", a, shuffled, "--output", tmp_path / "c")
    stored = json.loads((tmp_path / "c" / "comparison.json").read_text())
    mean, low, high = stored["difference"][str(shuffled)]["aime24"]
    assert mean == pytest.approx(0) and low < -0.05 and high > 0.05


def test_compare_names_settings_that_differ(baseline, run, tmp_path):
    flags, one = baseline
    assert run(*flags[:5], "--seed", 1, "--max_new_tokens", 200, "--output", tmp_path / "two")[0] == 0
    code, out, _ = run("--compare", one, tmp_path / "two", "--output", tmp_path / "c")
    assert code == 0 and "- not the same seed: 0; 1" in out and "alpha, 60 questions" in out


# -------------------------------------------------------------------------------------------------- bad input


def one_error(err):
    """The only line that is not a progress bar's or a library's, and it is ours."""
    errors = [line for line in re.split(r"[\r\n]", err) if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in err, err
    return errors[0]


GOOD = '{"problem": "1+1", "answer": "2"}\n'
BAD_INPUT = {
    "unknown flag": (["--tempratur", "1"], "--tempratur"),
    "no number": (["--k", "many"], "--k"),
    "negative k": (["--k", "-1"], "--k -1"),
    "greedy samples": (["--k", "4", "--temperature", "0"], "use --k 1"),
    "negative temperature": (["--temperature", "-1"], "--temperature -1"),
    "top_p": (["--top_p", "1.5"], "--top_p 1.5"),
    "negative length": (["--max_new_tokens", "-5"], "--max_new_tokens -5"),
    "chunk": (["--chunk_samples", "0"], "--chunk_samples 0"),
    "engine": (["--rollout", "sglang"], "--rollout"),
    "no such engine here": (["--rollout", "vllm", "--benchmarks", "{good}"], "install requirements-vllm.txt"),
    "two jobs": (["--compare", "a", "b", "--regrade", "c"], "--compare"),
    "one folder": (["--compare", "a"], "two folders"),
    "no such folder": (["--compare", "a", "b"], "--compare a"),
    "unknown benchmark": (["--benchmarks", "aime25"], "aime24, amc23"),
    "no such file": (["--benchmarks", "none.jsonl"], "none.jsonl"),
    "no file there": (["--benchmarks", "aime24", "--benchmarks_dir", "nowhere"], "nowhere/aime24.jsonl"),
    "same name twice": (["--benchmarks", "{good}", "{other}/good.jsonl"], "good"),
    "no such model": (["--model", "no/such/model", "--benchmarks", "{good}"], "--model no/such/model"),
    "too long": (["--max_new_tokens", "2048", "--benchmarks", "{good}"], "lower --max_new_tokens"),
    "foreign completions": (["--benchmarks", "{good}", "--output", "{foreign}"], "state.json"),
    "regrade nothing": (["--regrade", "none.jsonl"], "none.jsonl"),
    "regrade empty": (["--regrade", "{empty}"], "empty"),
    "regrade no JSON": (["--regrade", "{text}"], "text.jsonl, line 2"),
    "regrade no response": (["--regrade", "{good}"], "good.jsonl, line 1: must be a JSON object with texts"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_costs_nothing(case, run, tmp_path):
    files = {"good": GOOD, "other/good": GOOD, "empty": "", "text": '{"response": "2", "gold": "2"}\nhello\n',
             "foreign/completions": '{"response": "2", "gold": "2"}\n'}
    for name, text in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    names = {name: tmp_path / f"{name}.jsonl" for name in ("good", "empty", "text")}
    flags, said = BAD_INPUT[case]
    if "vllm" in flags and find_spec("vllm"):
        pytest.skip("it is installed here")
    flags = [flag.format(**names, other=tmp_path / "other", foreign=tmp_path / "foreign") for flag in flags]
    flags += [] if "--output" in flags else ["--output", tmp_path / "out"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    code, out, err = run(*flags)
    assert code == 2 and said in one_error(err), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before
    assert not (tmp_path / "out").exists()


def test_bad_input_on_two_ranks_is_still_one_line(tmp_path):
    err = finish(start("--benchmarks", "aime25", "--output", tmp_path / "out", ranks=2), code=1)  # torchrun's own
    assert err.count("error: --benchmarks aime25") == 1 and "exitcode  : 2" in err


def test_unreadable_golds_are_named(run, tmp_path):
    golds = ("\\text{}", "3")
    file = write(tmp_path / "p.jsonl", [{"problem": "1+2", "answer": gold} for gold in golds])
    code, _, err = run("--benchmarks", file, "--k", 1, "--max_new_tokens", 8, "--output", tmp_path / "out")
    assert code == 0 and "1 answers cannot be read" in err


def test_help_teaches_every_field(run):
    code, out, _ = run("--help")
    assert code == 0 and "2501.12948" in out and "torchrun --standalone" in out
    for name, field in evaluate.EvalConfig.__dataclass_fields__.items():
        assert f"--{name}" in out and len(field.metadata["help"]) > 15
