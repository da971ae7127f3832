"""evaluate.py: the same samples whatever happens to a run, and figures that are what they say."""

import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas
import pytest
from transformers import AutoTokenizer

import evaluate
import rollout
from conftest import ALONE, LIMITED, TOY
from evaluate import read, write
from reward import grade
from rollout import Group, Sample


def completions(folder):
    return {path.name: path.read_bytes() for path in (folder / "completions").glob("*.jsonl")}


def summary(folder):
    """{(benchmark, kind): row of the table}."""
    table = pandas.read_csv(folder / "summary.csv", index_col=["benchmark", "kind"])
    return table.to_dict("index")


@pytest.fixture
def run(capsys):
    """run(*flags) -> (exit code, stdout, stderr) of evaluate.main in this process."""

    def main(*flags):
        capsys.readouterr()
        try:
            code = evaluate.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
        return code or 0, *capsys.readouterr()

    return main


# A process of its own: with passes this narrow, killed in the middle of its nth write.
PROCESS = f"""
import os, signal, sys, torch
from itertools import count
from pathlib import Path
import evaluate
{LIMITED}
""" + """
evaluate.PASS_SAMPLES, n = int(sys.argv[1]), int(sys.argv[2])
replace, writes = Path.replace, count(1)

def killed(path, target):
    if next(writes) == n:
        path.write_text(path.read_text()[:-50])
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)

Path.replace = killed
evaluate.main(sys.argv[3:])
"""


def processes(*flags, ranks=1, width=2048, killed_in=0):
    """Exit codes of evaluate.main in such processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        environment = ALONE | environment | {"RANK": str(rank)}
        command = [sys.executable, "-c", PROCESS, width, killed_in, *flags]
        started.append(subprocess.Popen([str(part) for part in command], env=environment))
    return [process.wait() for process in started]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """(flags, folder) of a run on one rank: answers and corrections of 14 + 4 problems that fit."""
    folder = tmp_path_factory.mktemp("evaluation")
    alpha, beta = folder / "alpha.jsonl", folder / "beta.jsonl"
    problems = read(TOY / "test.jsonl")
    write(alpha, problems[:14])
    write(beta, [*problems[14:16], {"problem": "long " * 900, "answer": "2"}, *problems[16:18]])
    flags = "--k 3 --temperature 1 --max_new_tokens 200 --self_correct --benchmarks".split()
    flags += [str(alpha), str(beta), "--model", str(TOY)]
    evaluate.main([*flags, "--output", str(folder / "one")])
    return flags, folder / "one"


def test_killed_in_two_writes_and_continued_by_two_ranks(baseline, tmp_path):
    """Each time in the middle of the third pass; a pass has one answer of each question, or two."""
    flags, one = baseline
    flags, sizes = [*flags, "--output", tmp_path], [0]
    for width in (13, 20):
        assert processes(*flags, width=width, killed_in=4) == [-signal.SIGKILL]  # 1: the settings
        there = completions(tmp_path)
        assert all(completions(one)[name].startswith(begun) for name, begun in there.items())
        sizes.append(sum(map(len, there.values())))
    assert sizes[0] < sizes[1] < sizes[2] and not (tmp_path / "summary.csv").exists()
    assert processes(*flags, ranks=2) == [0, 0]
    assert completions(tmp_path) == completions(one)
    for name in ("graded.csv", "summary.csv"):
        assert (tmp_path / name).read_bytes() == (one / name).read_bytes()


def test_only_what_is_missing_is_drawn_and_all_graded_again(baseline, run, tmp_path, monkeypatch):
    flags, one = baseline
    flags, drawn, sample_groups = [*flags, "--output", tmp_path], [], rollout.sample_groups

    def counting(engine, tokenizer, grader, tasks, numbers, **how):
        drawn.extend([how["span"] or "answer"] * len(numbers) * len(tasks))
        return sample_groups(engine, tokenizer, grader, tasks, numbers, **how)

    monkeypatch.setattr(rollout, "sample_groups", counting)
    run(*flags, "--k", 1, "--self_correct", False)
    assert drawn == ["answer"] * 18
    run(*flags, "--self_correct", False)
    run(*flags, "--k", 1)
    corrections = read(tmp_path / "completions" / "alpha.corrections.jsonl")
    assert len(drawn) > 54 and {row["sample"] for row in corrections} == {0}
    assert run(*flags)[0] == 0
    assert completions(tmp_path) == completions(one)
    assert drawn.count("answer") == 54 and drawn.count("sections") == 54  # all of them finished
    monkeypatch.setattr(rollout, "load_policy", None)  # from here on there is no model
    assert run(*flags, "--k", 1)[0] == 0  # a smaller k looks at fewer
    assert summary(tmp_path)["alpha", "answers"]["samples"] == 14
    file = tmp_path / "completions" / "alpha.jsonl"
    write(file, [row | {"response": f"\\boxed{{{row['gold']}}}"} for row in read(file)])
    _, out, err = run(*flags)
    assert err.count("warning: beta: 1 of 5 do not fit") == 1
    assert summary(tmp_path)["alpha", "answers"]["avg@k"] == 100
    assert re.search(r"^alpha +answers +100\.0 +0\.0 +100\.0 ", out, re.M)
    assert "\ntemperature: 1.0\n" in out and "{" not in out.replace("boxed{}", "")  # no JSON


def test_another_run_in_its_folder_is_refused_by_name(baseline, run, tmp_path, monkeypatch):
    (flags, one), out = baseline, tmp_path / "out"
    before = completions(one), (one / "graded.csv").read_bytes()

    def refused(name, *flags):
        code, _, err = run(*flags)
        assert code == 2 and f"begun with {name} " in one_error(err)

    for flag, value in (("seed", 1), ("temperature", 0.7), ("max_new_tokens", 199)):
        refused(flag, *flags, "--output", one, f"--{flag}", value)
    alpha, changed = read(one.parent / "alpha.jsonl"), tmp_path / "alpha.jsonl"
    write(changed, [*alpha[:-1], alpha[-1] | {"answer": "5"}])
    refused("problems of alpha", *flags, "--output", one, "--benchmarks", changed)
    monkeypatch.setattr(rollout, "solution_prompt", "On Monday: {}".format)  # a dated template
    refused("prompt", *flags, "--output", one)
    monkeypatch.undo()
    toy = shutil.copytree(TOY, tmp_path / "toy")
    own = ["--model", toy, "--benchmarks", changed, "--max_new_tokens", 9, "--output", out]
    assert run(*own)[0] == 0
    assert summary(out)["alpha", "answers"]["cut off"] == 100
    weights = (toy / "model.safetensors").read_bytes()
    (toy / "model.safetensors").write_bytes(weights[:-1] + b"!")
    refused("weights", *own)
    assert before == (completions(one), (one / "graded.csv").read_bytes())
    write(tmp_path / "thesis" / "chapter.jsonl", [])
    for name, fault in (("", "is empty"), (tmp_path / "thesis", "holds chapter.jsonl and no run")):
        code, _, err = run(*flags, "--output", name)
        assert code == 2 and fault in one_error(err)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.jsonl"]


def group(question, rewards, samples=None, corrects=None, problem="1+1"):
    samples = samples or [Sample([1, 2], [], "\\boxed{2}", True) for _ in rewards]
    for sample, sample_reward in zip(samples, rewards, strict=True):
        sample.reward = sample_reward
    return Group(problem, "2", [], question, corrects, samples=samples)


def test_the_table_is_what_the_files_say(baseline):
    _, one = baseline
    rows, fixed = (read(one / f"completions/alpha{kind}.jsonl") for kind in ("", ".corrections"))
    places = [(i, q) for i in range(3) for q in range(14)]
    for file in (rows, fixed):  # all were finished, so all are corrected
        assert [(row["sample"], row["question"]) for row in file] == places
    golds, table = [row["gold"] for row in rows], summary(one)
    right = np.reshape(grade([row["response"] for row in rows], golds), (3, 14))
    now = np.reshape(grade([row["solution"] for row in fixed], golds), (3, 14))
    answers = table["alpha", "answers"]
    assert (answers["questions"], answers["samples"]) == (14, 42)
    assert answers["avg@k"] == pytest.approx(100 * right.mean())
    assert answers["SE"] == pytest.approx(100 * right.mean(0).std(ddof=1) / np.sqrt(14))
    assert answers["pass@k"] == pytest.approx(100 * right.any(0).mean())
    assert answers["tokens"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    for before, kind in ((0, "corrections of wrong"), (1, "corrections of right")):
        corrected = np.where(right == before, now, np.nan)
        share = np.mean([np.nanmean(each) for each in corrected.T if (each >= 0).any()])
        assert table["alpha", kind]["avg@k"] == pytest.approx(100 * share)
        assert table["alpha", kind]["samples"] == (right == before).sum() > 5


def test_standard_error_over_questions_and_samples():
    rng, found = np.random.default_rng(0), []
    for _ in range(800):  # each with new questions and new samples
        p, n = rng.beta(0.7, 0.9, size=40), rng.integers(1, 9, size=40)
        found.append(evaluate.accuracy([group(q, rng.random(n[q]) < p[q]) for q in range(40)]))
    means, errors = zip(*found)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.08)
    assert all(np.isnan(evaluate.accuracy([])))
    assert np.isnan(evaluate.accuracy([group(0, [1, 0])])[1])


def test_every_finished_answer_that_fits_is_corrected():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    texts = ["so \\boxed{2}", "\\boxed{3}", "<think>4</think>\\boxed{5}", "<think>"]
    samples = [Sample([1], [], text, text != "\\boxed{3}") for text in texts]
    rows = evaluate.records([group(7, [1, 0, 0, 0], samples)], range(10, 14))
    rows += evaluate.records([group(8, [0], problem="long" * 999)])
    tasks = evaluate.correction_tasks(tokenizer, rows, 100, 1000)
    assert [(task.question, task.corrects) for task in tasks] == [(7, 10), (7, 12)]
    said = tokenizer.decode(tasks[1].prompt)
    assert "Wrong solution:\n\\boxed{5}\n" in said and "think" not in said
    assert tasks[1].answer == "2"
    sample = Sample([1, 2, 3], [], "all of it", True, solution="its end")
    (row,) = evaluate.records([group(7, [1], [sample], corrects=12)])
    assert (row["sample"], row["response"], row["solution"]) == (12, "all of it", "its end")


def finished(folder, scores, order=1):
    """As of an evaluation in which question q has scores[q] right answers of 4."""
    folder.mkdir()
    rows = [{"benchmark": "own", "kind": "answers", "problem": f"p{q}", "right": i < n}
            for q, n in list(enumerate(scores))[::order] for i in range(4)]  # fmt: skip
    rows.append(rows[0] | {"kind": "corrections of right", "right": True})  # is no answer
    pandas.DataFrame(rows).to_csv(folder / "graded.csv", index=False)
    return folder


def test_compare_is_paired(run, tmp_path):
    rng = np.random.default_rng(0)
    weak = rng.choice([0, 1, 3], size=50)
    mixed = rng.permutation(weak)
    a, c = finished(tmp_path / "a", weak), finished(tmp_path / "c", mixed)
    b = finished(tmp_path / "b", [*(weak + 1), 4], order=-1)  # 1/4 better; other order; one more
    code, out, _ = run("--compare", a, b, c)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0 and f"own, 50 problems: difference to the baseline {a}," in out
    assert rows[str(a)][1:] == ["0.0"] * 3 and rows[str(b)][1:] == ["25.0"] * 3
    difference, low, high = map(float, rows[str(c)][1:])
    spread = 100 * (mixed - weak).std() / 4 / np.sqrt(50)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert difference == 0 and low < 0 < high


def one_error(err):
    errors = [line for line in re.split(r"[\r\n]", err) if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in err, err
    return errors[0]


BAD_INPUT = {
    "--tempratur 1": "--tempratur",
    "--k -1": "--k",
    "--top_p 1.5": "--top_p",
    "--compare a b": "a/graded.csv",
    "--benchmarks {good}": "--model is missing",
    "--model {toy} --benchmarks {good} {good}": "rename the file",
    "--model no/such/model": "no/such/model",
    "--max_new_tokens 2048": "no prompt fits",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(flags, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = tmp_path / "good.jsonl"
    write(good, [{"problem": "1+1", "answer": "2"}])
    code, _, err = run(*flags.format(good=good, toy=TOY).split(), "--output", tmp_path / "out")
    assert code == 2 and BAD_INPUT[flags] in one_error(err)
    assert not (tmp_path / "out").exists()
