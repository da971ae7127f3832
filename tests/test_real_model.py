"""bench/real_model.py: its problems, its report, how it starts and stops runs; and all of it on the toy."""

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from transformers import AutoTokenizer

from bench import real_model
from reward import final_answer, find_correction

ROOT = Path(real_model.__file__).resolve().parents[1]
RUNS = ROOT / "bench" / "real_model_runs"


@pytest.fixture(scope="module")
def tokenizer():
    real = ROOT.parent / "shared" / "tokenizers" / "smollm2_135m_instruct"
    return AutoTokenizer.from_pretrained(real if real.exists() else ROOT / "toy")


def test_a_demonstrated_correction_is_well_formed_and_right(tokenizer):
    rng = random.Random(0)
    counts = {"training": 200, "held_out": 100}
    first, again, other = [real_model.make_stories(seed, counts, 60) for seed in (0, 0, 1)]
    stories = first["training"] + first["held_out"]
    assert first == again != other and len({story.problem for story in stories}) == 300
    for story in stories:
        wrong = real_model.make_mistake(story, rng)
        ids = tokenizer(real_model.correction_text(story, wrong)).input_ids
        start, end, solution = find_correction(ids, tokenizer, "sections")
        assert final_answer(solution) == story.answer != final_answer(wrong)
        for _, task, value in story.steps:
            assert eval(task) == value and f"{task} = {value}." in solution
            assert task in tokenizer.decode(ids[start:end])
    assert any("/" in task for story in stories for _, task, _ in story.steps)


# ---------------------------------------------------------------------------------------- the report


def made_state(rng, solves: float) -> dict:
    """Of 40 problems and 30 fixed errors."""
    right = (rng.random((40, 4)) < solves).astype(int)
    return {
        "samples": 256, "questions": 32, "boxed": [1] * 40, "right": right.tolist(),
        "error": (1 - right[:, 0]).tolist(), "corrected": rng.integers(0, 2, 40).tolist(),
        "formed": [1] * 40,
        "fixed": {str(j): rng.integers(0, 2, 4).tolist() for j in range(30)},
    }


def test_differences_are_paired_by_seed_and_their_interval_is_students():
    rng = np.random.default_rng(0)
    ours = {seed: made_state(rng, 0.6) for seed in (0, 1, 2, 7)}
    theirs = {seed: made_state(rng, 0.4) for seed in (2, 0, 1)}
    row = real_model.difference(ours, theirs).loc["solved"]
    a, b = [[np.mean(arm[seed]["right"]) for seed in (0, 1, 2)] for arm in (ours, theirs)]
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert row["seeds"] == 3 and row["difference"] == f"{np.mean(a) - np.mean(b):+.3f}"
    assert row["95 % over seeds"] == f"[{expected.low:+.3f}, {expected.high:+.3f}]"
    assert real_model.student([0.1]) == "-"  # one seed shows nothing


def test_own_errors_are_shares_of_errors():
    state = made_state(np.random.default_rng(0), 0.5)
    own = [c for c, error in zip(state["corrected"], state["error"]) if error]
    kept = [c for c, right in zip(state["corrected"], state["right"]) if right[0]]
    assert real_model.share(state, "own errors corrected") == pytest.approx(np.mean(own))
    assert real_model.share(state, "right answers spoiled") == pytest.approx(1 - np.mean(kept))


@pytest.mark.parametrize("flags", [
    "--rates 3e-5 --seeds 0 1", "--rates 1e-5 3e-5 1e-4 --seeds 100 --methods grpo",
])
def test_results_shows_what_report_prints(flags, tmp_path, capsys):
    shutil.copytree(RUNS, tmp_path / "runs")
    real_model.main(["report", "--work", str(tmp_path / "runs"), *flags.split()])
    results = (ROOT / "bench" / "RESULTS.md").read_text()
    levels = capsys.readouterr().out.split("```")[1]
    assert levels in results and f"report --work bench/real_model_runs {flags}" in results


# ------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def work(tmp_path):
    """A folder with what stands before the runs."""
    (tmp_path / "runs").mkdir()
    before = made_state(np.random.default_rng(0), 0.5)
    (tmp_path / "before.json").write_text(json.dumps(before) + "\n")
    return tmp_path


def test_a_folder_begun_with_other_settings_is_refused(work, capsys):
    real_model.main(["table", "--work", str(work), "--questions", "64"])
    with pytest.raises(SystemExit):
        real_model.main(["table", "--work", str(work), "--questions", "96"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "questions 64" in error and "96" in error


def write_result(command: list[str], complete: bool) -> None:
    named = dict(flag.removeprefix("--").split("=") for flag in command[3:])
    one = real_model.Run(Path(named["work"]), named["methods"], named["rates"], named["seeds"])
    one.folder.mkdir(exist_ok=True)
    state = made_state(np.random.default_rng(int(one.seed)), 0.6)
    result = {"complete": complete, "states": {one.method: state}, "curve": []}
    one.file.write_text(json.dumps(result) + "\n")


def test_one_failed_run_stops_no_other_and_is_repeated(work, monkeypatch):
    commands = []

    def process(command, stdout, stderr, env):
        commands.append(command)
        assert int(env["OMP_NUM_THREADS"]) == 4  # of 8, for two jobs
        stdout.write("a line\n")
        if "--seeds=1" in command and len(commands) < 4:
            return subprocess.CompletedProcess(command, 1)
        write_result(command, complete=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_model.subprocess, "run", process)
    monkeypatch.setattr(real_model.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    flags = ["--work", str(work), "--methods", "grpo", "--seeds", "0", "1", "2", "--jobs", "2"]
    with pytest.raises(SystemExit, match="1 runs failed.*grpo-1e-5-1.log"):
        real_model.main(flags)
    assert "grpo - before" in (work / "report.md").read_text()
    real_model.main(flags)  # the failed one alone
    assert len(commands) == 4 and "--seeds=1" in commands[-1]
    assert (work / "runs" / "grpo-1e-5-1.log").read_text() == "a line\n" * 2


def test_after_minutes_all_runs_stop_at_one_step_and_continue_later(work, monkeypatch):
    def process(command, stdout, stderr, env):
        """Stands at another step with each seed, and waits to be stopped."""
        write_result(command, complete=False)
        seed = command[-1].removeprefix("--seeds=")
        folder = work / "runs" / f"scrpo-1e-5-{seed}"
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 5 + int(seed)}) + "\n")
        while not (work / "stop_after.json").exists():
            time.sleep(0.01)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_model.subprocess, "run", process)
    flags = ["--work", str(work), "--methods", "scrpo", "--seeds", "0", "1", "2", "--jobs", "2"]
    real_model.main([*flags, "--minutes", "0.02"])
    assert json.loads((work / "stop_after.json").read_text()) == 7  # the fastest was at 6
    assert not (work / "runs" / "scrpo-1e-5-2.json").exists()  # not begun any more
    assert (work / "runs" / "scrpo-1e-5-0" / "metrics.jsonl").exists()  # kept, to continue
    begun = []

    def finish(command, **_):
        begun.append(command[-1])
        write_result(command, complete=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_model.subprocess, "run", finish)
    real_model.main(flags)
    assert sorted(begun) == ["--seeds=0", "--seeds=1", "--seeds=2"]
    assert not (work / "stop_after.json").exists()
    assert not (work / "runs" / "scrpo-1e-5-0").exists()


@pytest.mark.slow
def test_all_parts_on_the_toy(tmp_path, monkeypatch):
    """From the warm start to the report; a run that was stopped and continued is one that was not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = (f"--model {ROOT}/toy --demonstrations 80 --training 100 --held_out 8 --rates 1e-4 --seeds 0 "
             "--max_new_tokens 60 --questions 16 --warm_rates 1e-3 3e-3 --methods scrpo").split()
    # tau = 0: the toy answers all of it wrong, which must be enough to enter stage 2.
    flags += ["--train_flags", "--questions_per_step 4 --pool_trigger 4 --eval_every 2 --min_variance 0"]
    figures = []
    for name, minutes in ("stopped", ["0", "99"]), ("whole", ["99"]):
        work = tmp_path / name
        real_model.main(["table", "--work", str(work), *flags])
        for limit in minutes:
            real_model.main(["runs", "--work", str(work), *flags, "--minutes", limit])
        run = json.loads((work / "runs" / "scrpo-1e-4-0.json").read_text())
        assert run["complete"] and run["states"]["scrpo"]["questions"] == 16
        assert any(line.get("stage") == 2 for line in run["curve"])
        assert run["states"]["scrpo, samples"]["samples"] == 128 < run["states"]["scrpo"]["samples"]
        warm = json.loads((work / "warm_rate.json").read_text())
        assert warm["chosen"] == min(warm["losses"], key=warm["losses"].get)
        assert "scrpo - before" in (work / "report.md").read_text()
        figures.append((run["states"], warm, (work / "before.json").read_text()))
    assert figures[0] == figures[1]
