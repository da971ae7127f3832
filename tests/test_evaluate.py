"""evaluate.py: the same samples whatever happens to a run, and figures that are what they are called."""

import itertools
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import evaluate
from reward import Grader, grade
from rollout import Group, Sample

torch.set_num_threads(1)  # two threads on a busy machine are slower than one
ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT.parent / "shared" / "benchmarks"
ALONE = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completions(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "completions").glob("*.jsonl"))}


@pytest.fixture
def run(capsys):
    """run(*flags) -> (exit code, stdout, stderr) of evaluate.main in this process."""

    def main(*flags):
        capsys.readouterr()
        code = 0
        try:
            evaluate.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return main


def forked(*flags, ranks=1, before=lambda: None):
    """Exit codes of evaluate.main in processes of its own, which is what torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, pids = free.getsockname()[1], []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                before()
                evaluate.main([str(flag) for flag in flags])
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """(flags, folder) of one uninterrupted run on one rank: two benchmarks, answers and corrections."""
    folder = tmp_path_factory.mktemp("evaluation")
    problems = lines(ROOT / "toy" / "test.jsonl")
    write(folder / "alpha.jsonl", problems[:14])
    write(folder / "beta.jsonl", problems[14:18])
    flags = ["--benchmarks", folder / "alpha.jsonl", folder / "beta.jsonl", "--k", 3, "--temperature", 1,
             "--max_new_tokens", 200, "--self_correct"]
    evaluate.main([str(flag) for flag in (*flags, "--output", folder / "one")])
    return flags, folder / "one"


# ------------------------------------------------------------------------------------- the same samples


def test_two_ranks_and_narrow_passes_give_the_same_bytes(baseline, tmp_path, monkeypatch):
    flags, one = baseline
    monkeypatch.setattr(evaluate, "PASS", 7)  # one answer of each question a pass, 7 corrections a pass
    assert forked(*flags, "--output", tmp_path, ranks=2) == [0, 0]
    assert completions(tmp_path) == completions(one)
    for name in ("graded.csv", "summary.json"):
        assert (tmp_path / name).read_bytes() == (one / name).read_bytes()


def test_killed_in_two_writes_and_continued(baseline, tmp_path, monkeypatch):
    flags, one = baseline
    monkeypatch.setattr(evaluate, "PASS", 20)
    replace, count = Path.replace, itertools.count(1)

    def killed(path, target):
        if next(count) == 4:  # settings, two passes, and in the middle of the third
            path.write_text(path.read_text()[:-50])
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    flags, sizes = [*flags, "--output", tmp_path], []
    for _ in range(2):
        assert forked(*flags, before=lambda: setattr(Path, "replace", killed)) == [-signal.SIGKILL]
        there = completions(tmp_path)
        assert all(completions(one)[name].startswith(begun) for name, begun in there.items())
        sizes.append(sum(map(len, there.values())))
        assert not (tmp_path / "summary.json").exists()
    assert 0 < sizes[0] < sizes[1] and forked(*flags) == [0]
    assert completions(tmp_path) == completions(one)


def test_more_answers_draw_only_what_is_missing(baseline, run, tmp_path, monkeypatch):
    flags, one = baseline
    drawn = []
    sample_groups = evaluate.sample_groups

    def counting(engine, tokenizer, grader, tasks, numbers, **how):
        drawn.extend(list(numbers) * len(tasks) if how["span"] is None else [])
        return sample_groups(engine, tokenizer, grader, tasks, numbers, **how)

    monkeypatch.setattr(evaluate, "sample_groups", counting)
    answers_only = [*flags[:-1], "--output", tmp_path]
    assert run(*answers_only, "--k", 1)[0] == 0
    assert sorted(drawn) == [0] * 18
    assert run(*answers_only)[0] == 0
    assert run(*flags, "--k", 1, "--output", tmp_path)[0] == 0
    assert {row["sample"] for row in lines(tmp_path / "completions" / "alpha.corrections.jsonl")} == {0}
    assert run(*flags, "--output", tmp_path)[0] == 0
    assert sorted(drawn) == [0] * 18 + [1] * 18 + [2] * 18
    assert completions(tmp_path) == completions(one)
    assert run(*flags, "--k", 1, "--output", tmp_path)[0] == 0  # a smaller k looks at fewer
    assert json.loads((tmp_path / "summary.json").read_text())["alpha"]["samples"] == 14
    assert len(drawn) == 54 and completions(tmp_path) == completions(one)


def test_the_same_command_grades_again_and_loads_no_model(baseline, run, tmp_path, monkeypatch):
    flags, one = baseline
    shutil.copytree(one, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(evaluate, "load_policy", None)
    assert run(*flags, "--output", tmp_path)[0] == 0
    assert (tmp_path / "graded.csv").read_bytes() == (one / "graded.csv").read_bytes()
    rows = lines(tmp_path / "completions" / "alpha.jsonl")
    write(tmp_path / "completions" / "alpha.jsonl", [row | {"response": f"\\boxed{{{row['gold']}}}"} for row in rows])
    code, out, _ = run(*flags, "--output", tmp_path)
    assert code == 0 and json.loads((tmp_path / "summary.json").read_text())["alpha"]["avg@k"] == 100
    assert "- temperature: 1.0" in out and "PROBLEM" in out and out.strip()[:500] in (tmp_path / "table.md").read_text()


def test_other_settings_problems_weights_prompts_are_refused_by_name(baseline, run, tmp_path, monkeypatch):
    flags, one = baseline
    before = completions(one), (one / "graded.csv").read_bytes()

    def refused(name, *change):
        code, _, err = run(*flags, "--output", one, *change)
        assert code == 2 and f"begun with {name} " in one_error(err)

    refused("seed", "--seed", 1)
    refused("temperature", "--temperature", 0.7)
    refused("max_new_tokens", "--max_new_tokens", 199)
    alpha = lines(one.parent / "alpha.jsonl")
    changed = write(tmp_path / "alpha.jsonl", [*alpha[:-1], alpha[-1] | {"answer": "5"}])
    refused("problems of alpha", "--benchmarks", changed)
    monkeypatch.setattr(evaluate, "solution_prompt", "On Monday: {}".format)  # as a template with a date
    refused("prompt")
    monkeypatch.undo()
    toy, out = shutil.copytree(ROOT / "toy", tmp_path / "toy"), tmp_path / "out"
    own = ["--model", toy, "--benchmarks", changed, "--k", 1, "--max_new_tokens", 9, "--output", out]
    assert run(*own)[0] == 0
    weights = bytearray((toy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (toy / "model.safetensors").write_bytes(weights)
    code, _, err = run(*own)
    assert code == 2 and "begun with weights " in one_error(err)
    assert before == (completions(one), (one / "graded.csv").read_bytes())


def test_a_second_writer_is_refused(baseline, run, tmp_path):
    flags, _ = baseline
    lock = open(tmp_path / ".lock0", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    code, _, err = run(*flags, "--output", tmp_path)
    assert code == 2 and "another process is writing there" in one_error(err)
    lock.close()
    assert not (tmp_path / "completions").exists()


def test_called_twice_and_as_a_child_of_its_caller(baseline, tmp_path):
    flags, one = baseline
    script = f"import evaluate, subprocess, sys\nflags = {[str(f) for f in (*flags, '--output', one)]}\n" + (
        "evaluate.main(flags); evaluate.main(flags)\n"
        "subprocess.run([sys.executable, 'evaluate.py', *flags], check=True)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ALONE, check=True, capture_output=True)


# --------------------------------------------------------------------------------------------- figures


def group(question, rewards, samples=None, corrects=None, problem="1+1"):
    samples = samples or [Sample([1, 2], [], "\\boxed{2}", True) for _ in rewards]
    verdicts = ["right" if reward else "wrong" for reward in rewards]
    return Group(problem=problem, answer="2", prompt=[], question=question, corrects=corrects, samples=samples,
                 graded=[s.text for s in samples], spans=[None] * len(samples), verdicts=verdicts)  # fmt: skip


def test_the_table_is_what_the_files_say(baseline):
    _, one = baseline
    rows = lines(one / "completions" / "alpha.jsonl")
    assert [(r["question"], r["sample"]) for r in rows] == [(q, i) for i in range(3) for q in range(14)]
    right = np.array(grade([r["response"] for r in rows], [r["gold"] for r in rows])).reshape(3, 14)
    summary = json.loads((one / "summary.json").read_text())
    figures = summary["alpha"]
    assert (figures["questions"], figures["k"], figures["samples"]) == (14, 3, 42)
    assert figures["avg@k"] == pytest.approx(100 * right.mean())
    assert figures["SE"] == pytest.approx(100 * right.mean(0).std(ddof=1) / np.sqrt(14))
    assert figures["pass@k"] == pytest.approx(100 * right.any(0).mean())
    assert figures["tokens"] == pytest.approx(np.mean([r["tokens"] for r in rows]))
    assert summary["average"]["avg@k"] == pytest.approx((figures["avg@k"] + summary["beta"]["avg@k"]) / 2)
    assert summary["average"]["SE"] == pytest.approx(np.hypot(figures["SE"], summary["beta"]["SE"]) / 2)
    was = {(r["question"], r["sample"]): bool(x) for r, x in zip(rows, right.ravel())}
    fixed = lines(one / "completions" / "alpha.corrections.jsonl")
    assert {(r["question"], r["sample"]) for r in fixed} == {key for key, r in zip(was, rows) if r["finished"]}
    now = grade([r["solution"] for r in fixed], [r["gold"] for r in fixed])
    for before, name, counts in ((False, "wrong put right", 1), (True, "right spoiled", 0)):
        part = [x == counts for r, x in zip(fixed, now) if was[r["question"], r["sample"]] == before]
        assert summary[f"alpha: {name}"]["samples"] == len(part) > 5
        assert summary[f"alpha: {name}"]["avg@k"] == pytest.approx(100 * np.mean(part))


@pytest.mark.parametrize("uneven", [False, True])
def test_standard_error_over_questions_and_samples(uneven):
    rng, means, errors = np.random.default_rng(0), [], []
    for _ in range(800):  # each with new questions and new samples
        p, n = rng.beta(0.7, 0.9, size=40), rng.integers(1, 9, size=40) if uneven else np.full(40, 4)
        mean, error = evaluate.accuracy([group(q, rng.random(n[q]) < p[q]) for q in range(40)])
        means.append(mean)
        errors.append(error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.08)
    assert all(np.isnan(evaluate.accuracy([])))
    assert np.isnan(evaluate.accuracy([group(0, [1, 0])])[1])


class Characters:
    chat_template, added_tokens_decoder = None, {}

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})


def test_every_finished_answer_that_fits_is_corrected():
    texts = [("so \\boxed{2}", True), ("\\boxed{3}", False), ("<think>4</think>\\boxed{5}", True), ("<think>", True)]
    answers = [group(7, [1, 0, 0, 0], [Sample([1], [], text, end) for text, end in texts]),
               group(8, [0], problem="long" * 999)]  # fmt: skip
    rows = evaluate.records(answers[:1], range(10, 14)) + evaluate.records(answers[1:])
    tasks = evaluate.correction_tasks(Characters(), rows, 100, 1000)
    assert [(task.question, task.corrects) for task in tasks] == [(7, 10), (7, 12)]
    said = "".join(map(chr, tasks[1].prompt))
    assert "Wrong solution:\n\\boxed{5}\n" in said and "think" not in said and tasks[1].answer == "2"
    correction = group(7, [1], [Sample([1, 2, 3], [], "all of it", True)], corrects=12)
    (row,) = evaluate.records([correction])
    assert (row["sample"], row["response"], row["solution"], row["tokens"]) == (12, "all of it", "all of it", 3)


def near_miss(gold):
    if re.fullmatch(r"-?\d+", gold):
        return str(int(gold) + 1)
    return gold[1:] if gold.startswith("-") else "-" + gold


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the five benchmark files are not beside this repository")
def test_golds_are_right_and_near_misses_wrong(tmp_path):
    for name in evaluate.BENCHMARKS:
        golds = [row["answer"] for row in lines(BENCHMARKS / f"{name}.jsonl")]
        for change, least, most in ((str, 1, 1), (near_miss, 0, 0.005)):
            golds = golds[::5] if change is near_miss and name == "gsm8k" else golds  # integers, all alike
            file = write(tmp_path / "answers.jsonl", [
                {"question": q, "sample": 0, "gold": gold, "response": f"It is \\boxed{{{change(gold)}}}.", "solution": None}
                for q, gold in enumerate(golds)])  # fmt: skip
            with Grader() as grader:
                assert least <= evaluate.graded(grader, file, 1).right.mean() <= most, name


def finished(folder, scores, of="aime24", order=1):
    """As of an evaluation in which question q has scores[q] right answers of 4."""
    folder.mkdir()
    rows = [{"of": of, "problem": f"p{q}", "right": i < n} for q, n in list(enumerate(scores))[::order] for i in range(4)]
    pandas.DataFrame(rows).to_csv(folder / "graded.csv", index=False)
    return folder


def test_compare_is_paired_and_marks_the_papers_figures(run, tmp_path):
    rng = np.random.default_rng(0)
    weak = rng.choice([0, 1, 3], size=50)
    a = finished(tmp_path / "a", weak)
    b = finished(tmp_path / "b", [*(weak + 1), 4], order=-1)  # 1/4 better each; another order; one more
    mixed = rng.permutation(weak)
    c = finished(tmp_path / "c", mixed)
    code, out, _ = run("--compare", a, b, c, "--output", tmp_path / "d")
    row = {Path(line.split()[0]).name: line for line in out.splitlines() if line.startswith(str(tmp_path))}
    assert code == 0 and row["b"].count("+25.0 [+25.0, +25.0]") == 2 and out in (tmp_path / "d/comparison.md").read_text() + "\n"
    difference, low, high = map(float, re.search(r"([-+\d.]+) \[([-+\d.]+), ([-+\d.]+)\]", row["c"]).groups())
    spread = 100 * (mixed - weak).std() / 4 / np.sqrt(50)
    assert difference == 0 and high - low == pytest.approx(2 * 1.96 * spread, rel=0.1) and low < 0 < high
    paper = [line for line in out.splitlines() if "reported by the paper, not measured here" in line]
    assert len(paper) == 4 and "+5.7" in paper[2] and "of all five" in paper[2]
    _, out, _ = run("--compare", finished(tmp_path / "e", weak, "own"), finished(tmp_path / "f", weak, "own"),
                    "--output", tmp_path / "g")  # fmt: skip
    assert "paper" not in out


# ------------------------------------------------------------------------------------------- bad input


def one_error(err):
    errors = [line for line in re.split(r"[\r\n]", err) if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in err, err
    return errors[0]


BAD_INPUT = {
    "--tempratur 1": "--tempratur",
    "--k many": "--k",
    "--k -1": "--k",
    "--temperature -1": "--temperature",
    "--top_p 1.5": "--top_p",
    "--max_new_tokens -5": "--max_new_tokens",
    "--rollout sglang": "--rollout",
    "--compare a b": "a/graded.csv",
    "--benchmarks none.jsonl": "none.jsonl",
    "--benchmarks {good} {twin}": "rename the file",
    "--model no/such/model": "no/such/model",
    "--max_new_tokens 2048 --benchmarks {good}": "no prompt fits",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(flags, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "twin").mkdir()
    names = {"good": tmp_path / "good.jsonl", "twin": tmp_path / "twin" / "good.jsonl"}
    for path in names.values():
        write(path, [{"problem": "1+1", "answer": "2"}])
    code, out, err = run(*flags.format(**names).split(), "--output", tmp_path / "out")
    assert code == 2 and BAD_INPUT[flags] in one_error(err)
    assert not (tmp_path / "out").exists()


def test_problems_that_do_not_fit_are_left_out_in_one_line(run, tmp_path):
    problems = [{"problem": problem, "answer": "2"} for problem in ("1+1", "long " * 900, "2+0")]
    file = write(tmp_path / "own.jsonl", problems)
    code, _, err = run("--benchmarks", file, "--k", 1, "--max_new_tokens", 20, "--output", tmp_path / "out")
    assert code == 0 and err.count("warning: own: 1 of 3 do not fit") == 1
    assert [row["question"] for row in lines(tmp_path / "out/completions/own.jsonl")] == [0, 2]
