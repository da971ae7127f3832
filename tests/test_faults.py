"""train.py cannot lose work: killed, stopped, out of space, with damaged files or NaNs, it goes on bit for bit or says
in one line why not."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import same_weights

import train
from rollout import TransformersEngine

# Small steps, both stages, many checkpoints, all of them kept.
FLAGS = "--min_variance 0.1 --steps 12 --save_every 2 --keep_checkpoints 99 --samples_per_step -1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(launch, folder):
    """12 steps on one rank, undisturbed."""
    return launch(folder / "whole", *FLAGS)


@pytest.fixture(scope="module")
def pair(ranks, folder):
    """12 steps on two ranks, undisturbed."""
    run = ranks(folder / "pair", *FLAGS).result()
    assert run.code == 0, run.err
    return run


def copied(run, to):
    shutil.copytree(run.folder, to)
    return to


def back_to(run, step, to):
    """A copy of a finished run as it was when the checkpoint after `step` had just been written."""
    shutil.copytree(run.folder, to, ignore=shutil.ignore_patterns("final", "curves.png"))
    for later in to.glob("checkpoints/step_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (to / name).read_text().splitlines(keepends=True)
        (to / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return to


def shards(folder, step):
    """All that a checkpoint holds, with tensors as bytes. Not the files' own bytes: a pickle also says which of two
    equal strings are one object."""

    def plain(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), x.shape, x.numpy().tobytes()
        return (
            {k: plain(v) for k, v in x.items()}
            if isinstance(x, dict)
            else [plain(v) for v in x]
            if isinstance(x, list)
            else x
        )

    files = sorted((folder / "checkpoints" / f"step_{step:06d}").glob("*.pt"))
    return {file.name: plain(torch.load(file, weights_only=True)) for file in files}


def assert_same(run, undisturbed, steps=12):
    """Every metric but the clock's, every sample, and at the end weights, moments, pool and state: bit for bit."""
    assert run.code == 0, run.err
    assert [m["step"] for m in run.metrics] == list(range(steps + 1))  # nothing lost, no step twice
    assert run.comparable() == undisturbed.comparable()[: steps + 1]
    assert run.samples == [row for row in undisturbed.samples if row["step"] <= steps]
    same = shards(run.folder, steps) == shards(undisturbed.folder, steps)
    assert same, "the checkpoints differ"
    assert steps < 12 or same_weights(run.weights, undisturbed.weights)


# --------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("flags", ["--beta 0.1 --warmup_steps 3 --weight_decay 0.1 --eval_questions 8 --eval_every 1",
                                   "--algorithm dapo --overlong_cache 40"])  # fmt: skip
def test_n_and_n_steps_are_2n_steps(flags, launch, tmp_path):
    """Stopped after 2 steps and after 3: in the middle of warm-up, between the stages, with errors in the pool."""
    flags = ["--steps", 4, *"--min_variance 0.1 --samples_per_step -1 --keep_checkpoints 99".split(), *flags.split()]
    one = launch(tmp_path / "one", *flags)
    for steps in (2, 3, 4):
        several = launch(tmp_path / "several", *flags, "--steps", steps, "--resume")
    assert several.comparable() == one.comparable() and several.samples == one.samples
    same = shards(several.folder, 4) == shards(one.folder, 4)  # not within the assert: pytest would print megabytes
    assert same and same_weights(several.weights, one.weights)
    assert "resumed after step 3" in several.out and (several.folder / "curves.png").exists()


def test_6_and_6_steps_are_12_steps(launch, whole, tmp_path):
    """Both stages on both sides of the cut."""
    assert {m["stage"] for m in whole.steps[:6]} == {m["stage"] for m in whole.steps[6:]} == {1, 2}
    launch(tmp_path / "run", *FLAGS, "--steps", 6)
    assert_same(launch(tmp_path / "run", *FLAGS, "--resume"), whole)


def test_a_checkpoint_holds_everything(whole):
    saved = torch.load(whole.folder / "checkpoints" / "step_000008" / "rank_0.pt", weights_only=True)
    m = whole.metrics[8]
    assert (
        saved["state"]["step"] == 8
        and saved["state"]["stage"] == m["stage"]
        and saved["state"]["visits"] == m["visits"]
    )
    assert len(saved["pool"]["errors"]) == m["pool_size"] and saved["state"]["questions"] == m["questions"]
    for name, value in zip(saved["optimizer"]["masters"], saved["optimizer"]["masters"].values()):
        assert value.dtype == torch.float32, name
    assert {m["stage"] for m in whole.steps} == {1, 2}
    verified = subprocess.run(
        ["sha256sum", "-c", "rank_0.sha256"], cwd=whole.folder / "checkpoints" / "step_000008", capture_output=True
    )
    assert verified.returncode == 0


def test_resuming_a_finished_run_changes_nothing(whole, launch, tmp_path):
    again = launch(copied(whole, tmp_path / "run"), *FLAGS, "--resume")
    assert_same(again, whole)


def test_resume_of_an_empty_folder_starts_fresh(launch, tmp_path, whole):
    (tmp_path / "run").mkdir()
    run = launch(tmp_path / "run", *FLAGS, "--steps", 2, "--resume")
    assert run.code == 0 and "resumed" not in run.out and not run.errors
    assert [m["loss"] for m in run.steps] == [m["loss"] for m in whole.steps[:2]]


def test_a_run_that_is_stopped_before_its_first_checkpoint_starts_again(launch, tmp_path, whole):
    folder = back_to(whole, 1, tmp_path / "run")
    assert not list(folder.glob("checkpoints/*"))
    assert_same(
        launch(folder, *FLAGS, "--steps", 4, "--resume"), whole, steps=4
    )  # step 0 is measured again, not twice there


def test_the_last_k_checkpoints_are_kept(launch, tmp_path):
    run = launch(tmp_path / "run", *"--steps 5 --save_every 1 --keep_checkpoints 3 --algorithm grpo".split())
    assert sorted(path.name for path in run.folder.glob("checkpoints/*")) == [
        "step_000003",
        "step_000004",
        "step_000005",
    ]


@pytest.mark.parametrize("change,named", [
    ("--temperature 0.9", "temperature (1.0"), ("--group_size 4", "group_size (8"), ("--seed 1", "seed (0"),
    ("--min_variance 0.2", "min_variance (0.1"), ("ranks", "ranks (2"),
])  # fmt: skip
def test_a_resume_that_would_be_another_run_is_refused(change, named, launch, whole, pair, tmp_path):
    folder = copied(pair if change == "ranks" else whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = launch(folder, *FLAGS, "--resume", *(change.split() if change != "ranks" else ()))
    assert run.code == 2 and len(run.errors) == 1 and f"another {named}" in run.errors[0], run.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_with_a_cosine_the_number_of_steps_is_part_of_the_run(launch, tmp_path):
    flags = "--algorithm grpo --schedule cosine --steps".split()
    assert launch(tmp_path / "run", *flags, 1).code == 0
    run = launch(tmp_path / "run", *flags, 2, "--resume")
    assert run.code == 2 and "another steps (1" in run.err


def test_torchruns_restart_implies_resume_of_its_own_run_only(launch, tmp_path, monkeypatch, whole):
    folder = back_to(whole, 2, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    run = launch(folder, *FLAGS, "--steps", 4)  # without --resume: the first start was refused, and so is the restart
    assert run.code == 2 and "already holds a run" in run.err
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"launch": "mine"}))
    assert_same(launch(folder, *FLAGS, "--steps", 4), whole, steps=4)


def test_torchruns_restart_finds_the_numbered_folder(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert launch(None, "--algorithm", "grpo", "--steps", 1).code == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert launch(None, "--algorithm", "grpo", "--steps", 1).code == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = launch(None, "--algorithm", "grpo", "--steps", 2)
    assert run.code == 0 and "runs/001" in run.out and "resumed after step 1" in run.out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["001", "002"]


# ---------------------------------------------------------------------------------------------------------- kills


def killed_at_random(kills, ranks, pair, tmp_path, seed):
    """Kills 2 ranks at random moments and resumes, until the run is through; another run if kills are left over."""
    rng, killed, at, runs = random.Random(seed), 0, [], 0

    def logged():
        return lines.read_bytes().count(b"\n") if lines.exists() else 0

    while killed < kills or runs == 0:
        folder, code = tmp_path / f"{runs}", None
        lines = folder / "metrics.jsonl"
        while code != 0:
            job = ranks(folder, *FLAGS, "--resume")
            if killed < kills:
                while "the first prompt" not in job.said() and job.alive(
                    0
                ):  # set up: from here on it is about the run
                    time.sleep(0.005)
                goal = logged() + rng.randrange(5)
                while job.alive(0) and logged() < goal:
                    time.sleep(0.001)
                time.sleep(rng.choice((0.0, 0.02, 0.7)) * rng.random())  # in a checkpoint, a rollout, an update
                if job.alive(0):
                    job.kill()
                    killed += 1
                    at.append(logged() - 1)
            code = job.result().code
            assert code in (0, -9), job.said(0, "err")
        assert_same(job.result(), pair)
        runs += 1
    print(f"{killed} kills in {runs} run(s) of 12 steps, the last finished steps were {at}")
    assert len(set(at)) >= min(3, kills // 2) and (kills < 30 or max(at) > 8)


def test_killed_at_three_random_moments(ranks, pair, tmp_path):
    killed_at_random(3, ranks, pair, tmp_path, seed=1)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(ranks, pair, tmp_path):
    killed_at_random(30, ranks, pair, tmp_path, seed=2)


KILL_IN_CHECKPOINT = """
import signal
write_whole, replace = train.write_whole, train.Path.replace
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def patched(path, data):
    if "step_000004" in str(path) and rank == {rank}:
        if path.suffix == "{suffix}":
            if "{moment}" == "half":
                path.with_name(path.name + ".part").write_bytes(bytes(data)[: len(data) // 2])
            else:
                train.Path.replace = lambda *_: die()
                write_whole(path, data)
            die()
    write_whole(path, data)
train.write_whole = patched
"""


@pytest.mark.parametrize(
    "rank,suffix,moment", [(0, ".pt", "half"), (1, ".pt", "before the rename"), (1, ".sha256", "half")]
)
def test_killed_while_a_checkpoint_is_written(rank, suffix, moment, ranks, pair, tmp_path):
    """The checkpoint counts on no rank, the one before it does, and nothing of the torn one is left."""
    folder = back_to(pair, 2, tmp_path / "run")
    patch = KILL_IN_CHECKPOINT.format(rank=rank, suffix=suffix, moment=moment)
    job = ranks(folder, *FLAGS, "--steps", 4, "--resume", patch=patch)
    while job.alive(rank):
        time.sleep(0.01)
    job.kill()  # the machine is gone, with both ranks
    assert job.result().code == -9
    assert not (folder / "checkpoints" / "step_000004" / f"rank_{rank}.sha256").exists()
    job = ranks(folder, *FLAGS, "--steps", 4, "--resume")
    run = job.result()
    assert "resumed after step 2" in run.out
    assert_same(run, pair, steps=4)
    assert not list(folder.rglob("*.part"))


# ------------------------------------------------------------------------------------------------------ bad files


def damage(path, how):
    data = path.with_suffix(".pt").read_bytes()
    if how == "a flipped bit":
        path.with_suffix(".pt").write_bytes(data[:99999] + bytes([data[99999] ^ 1]) + data[100000:])
    elif how == "cut short":
        path.with_suffix(".pt").write_bytes(data[: len(data) // 2])
    elif how == "no data":
        path.with_suffix(".pt").unlink()
    else:
        path.with_suffix(".sha256").write_bytes(b"\xff\x00" * 40)


@pytest.mark.parametrize("how", ["a flipped bit", "cut short", "no data", "a digest of noise"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, launch, whole, tmp_path):
    folder = back_to(whole, 4, tmp_path / "run")
    damage(folder / "checkpoints" / "step_000004" / "rank_0.pt", how)
    run = launch(folder, *FLAGS, "--steps", 4, "--resume")
    assert (
        len(run.errors) == 1
        and "step_000004/rank_0.pt is damaged" in run.errors[0]
        and "resumed after step 2" in run.out
    )
    assert_same(run, whole, steps=4)


def test_damage_on_another_rank_is_named_too(ranks, pair, tmp_path):
    folder = back_to(pair, 4, tmp_path / "run")
    damage(folder / "checkpoints" / "step_000004" / "rank_1.pt", "cut short")
    run = ranks(folder, *FLAGS, "--steps", 4, "--resume").result()
    assert (
        len(run.errors) == 1
        and "step_000004/rank_1.pt is damaged" in run.errors[0]
        and "resumed after step 2" in run.out
    )
    assert_same(run, pair, steps=4)


def test_when_all_are_damaged_the_run_starts_again(launch, whole, tmp_path):
    folder = back_to(whole, 4, tmp_path / "run")
    for checkpoint in folder.glob("checkpoints/*/rank_0.pt"):
        damage(checkpoint, "cut short")
    run = launch(folder, *FLAGS, "--steps", 4, "--resume")
    assert len(run.errors) == 2 and all("is damaged" in line for line in run.errors)
    assert_same(run, whole, steps=4)


def test_a_second_beginning_keeps_its_checkpoints_and_those_of_the_first(launch, whole, tmp_path):
    """Later steps that are damaged neither count as the newest, nor are they lost."""
    folder = back_to(whole, 6, tmp_path / "run")
    for checkpoint in folder.glob("checkpoints/*/rank_0.pt"):
        damage(checkpoint, "cut short")
    launch(folder, *FLAGS, "--steps", 4, "--keep_checkpoints", 2, "--resume")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000004", "unused"]
    assert {path.name for path in (folder / "checkpoints" / "unused").iterdir()} >= {"step_000004", "step_000006"}
    assert "resumed after step 4" in launch(folder, *FLAGS, "--steps", 6, "--resume").out


def test_an_epoch_that_is_over_is_not_gone_on_with(launch, tmp_path):
    flags = "--algorithm grpo --schedule constant --epochs 1 --steps 99".split()
    few = (train.HERE / "toy" / "train.jsonl").read_text().splitlines(keepends=True)[:16]
    (tmp_path / "few.jsonl").write_text("".join(few))
    run = launch(tmp_path / "run", *flags, "--train_data", tmp_path / "few.jsonl")
    steps = len(run.metrics)
    again = launch(tmp_path / "run", *flags, "--train_data", tmp_path / "few.jsonl", "--resume")
    assert again.code == 0 and len(again.metrics) == steps == 3 and again.comparable() == run.comparable()


def test_lines_cut_short_or_after_the_checkpoint_are_dropped(launch, whole, tmp_path):
    folder = back_to(whole, 2, tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        third = next(
            line for line in (whole.folder / name).read_text().splitlines(True) if json.loads(line)["step"] == 3
        )
        with (folder / name).open("a") as file:
            file.write(third + third[: len(third) // 2])
    assert_same(launch(folder, *FLAGS, "--steps", 4, "--resume"), whole, steps=4)


# ----------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for one checkpoint (3.7 MB) and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs a privilege that this process does not have")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_goes_on(small_disk, launch, whole):
    full = launch(small_disk / "run", *FLAGS, "--steps", 4)
    assert (
        full.code == 1
        and len(full.errors) == 1
        and "No space left on device" in full.errors[0]
        and "Traceback" not in full.err
    )
    assert "rank 0, after step 4" in full.errors[0] and "--resume goes on" in full.errors[0]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    run = launch(small_disk / "run", *FLAGS, "--steps", 4, "--resume")
    assert "resumed after step 2" in run.out
    assert_same(run, whole, steps=4)


def test_a_file_that_may_not_grow_is_one_line(launch, whole, tmp_path):
    folder = back_to(whole, 2, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        run = launch(folder, *FLAGS, "--steps", 4, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.code == 1 and len(run.errors) == 1 and "File too large" in run.errors[0]
    assert_same(launch(folder, *FLAGS, "--steps", 4, "--resume"), whole, steps=4)


def test_output_that_cannot_be_written_is_one_line(launch, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "run", "/proc/run"):
        run = launch(path, "--steps", 1)
        assert run.code == 2 and len(run.errors) == 1 and "choose a folder that can be written" in run.errors[0], (
            run.err
        )
    assert (tmp_path / "file").read_text() == "mine"


# -------------------------------------------------------------------------------------------------------- SIGTERM

SIGTERM = """
import rollout, signal
owner, name, calls = {where}, "{name}", [0]
original = getattr(owner, name)
def patched(*arguments, **keywords):
    calls[0] += 1
    if calls[0] == {call} and rank in {ranks}:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **keywords)
setattr(owner, name, patched)
"""


def resumed(job, ranks, pair, codes=(0, 0), said=""):
    """Both ranks must have ended with `codes`; then the rest of the run is as if nothing had happened."""
    run = job.result()
    assert tuple(job.codes) == codes, [job.said(r, "err") for r in (0, 1)]
    if codes == (0, 0):
        assert not run.errors and "Traceback" not in job.said(0, "err") + job.said(1, "err")
    end = ranks(job.folder, *FLAGS, "--steps", 4, "--resume").result()
    assert said in end.out, end.out
    assert_same(end, pair, steps=4)
    return run


def test_sigterm_while_sampling_gives_up_the_step(ranks, pair, tmp_path):
    """In the middle of step 4's responses, on both ranks: the state after step 3 is saved, and all exit 0 at once."""
    patch = SIGTERM.format(where="rollout.TransformersEngine", name="generate", call=2, ranks=(0, 1))
    job = ranks(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume", patch=patch)
    resumed(job, ranks, pair, said="resumed after step 3")


def test_sigterm_within_the_forward_pass_of_a_rollout(ranks, pair, tmp_path):
    """Deep inside the sampling loop, on one rank; the other waits for it in a gather, and gets its signal there."""
    patch = SIGTERM.format(where="rollout", name="draw", call=20, ranks=(0,))
    job = ranks(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume", patch=patch)
    while job.alive(0):
        time.sleep(0.001)
    job.kill(1, sent=15)
    resumed(job, ranks, pair, said="resumed after step 2")


def test_sigterm_in_the_update_finishes_the_step(ranks, pair, tmp_path):
    """In the first optimizer step of step 3, on one rank: both stop after it, with a checkpoint, without a final/."""
    patch = SIGTERM.format(where="train.MasterAdamW", name="step", call=1, ranks=(1,))
    job = ranks(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume", patch=patch)
    run = resumed(job, ranks, pair, said="resumed after step 3")
    assert "stopped by a signal after step 3" in run.out and f"--output_dir {job.folder} --resume" in run.out


def test_ctrl_c_saves_too(ranks, pair, tmp_path):
    """SIGINT, twice to each rank, as from a terminal and from torchrun."""
    patch = SIGTERM.format(where="rollout.TransformersEngine", name="generate", call=2, ranks=(0, 1))
    patch = patch.replace("os.kill(os.getpid(), signal.SIGTERM)", "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]")
    job = ranks(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume", patch=patch)
    run = resumed(job, ranks, pair, codes=(130, 130), said="resumed after step 3")
    assert not run.errors and "stopped by a signal after step 3" in run.out


def test_a_script_that_trains_gets_its_signals_back(launch, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert launch(tmp_path / "run", *FLAGS, "--steps", 0).code == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_rank_that_cannot_start_says_so_itself(ranks, tmp_path):
    """Not rank 0: the others wait for it, until torchrun ends them."""
    patch = """
import train
make_engine = train.make_engine
def full(*arguments, **keywords):
    if rank == 1:
        raise RuntimeError("CUDA out of memory")
    return make_engine(*arguments, **keywords)
train.make_engine = full
"""
    job = ranks(tmp_path / "run", *FLAGS, patch=patch)
    while job.alive(1):
        time.sleep(0.05)
    job.kill(0)
    job.result()
    said = f"error: rank 1: CUDA out of memory (traceback: {tmp_path / 'run' / 'error_rank_1.txt'})"
    assert job.codes[1] == 2 and job.said(1, "err").splitlines()[-1] == said
    assert "RuntimeError: CUDA out of memory" in (tmp_path / "run" / "error_rank_1.txt").read_text()


def test_sigterm_while_a_checkpoint_is_written(ranks, pair, tmp_path):
    """It is written wholly; the next step does not begin."""
    patch = SIGTERM.format(where="train", name="save_checkpoint", call=1, ranks=(0, 1))
    job = ranks(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 6, "--resume", patch=patch)
    resumed(job, ranks, pair, said="resumed after step 4")


def test_sigterm_while_the_ranks_agree_whether_to_stop_is_not_lost(launch, whole, tmp_path, monkeypatch):
    """They agree not to, and before the next rollout it is seen: not one more step."""
    gather = train.gather

    def gathered(items):
        if items == [False]:  # `run.stop` at the end of step 3
            os.kill(os.getpid(), 15)
        return gather(items)

    monkeypatch.setattr(train, "gather", gathered)
    run = launch(back_to(whole, 2, tmp_path / "run"), *FLAGS, "--steps", 5, "--resume")
    assert run.code == 0 and not run.errors and run.metrics[-1]["step"] == 3 and not (run.folder / "final").exists()
    monkeypatch.undo()
    run = launch(run.folder, *FLAGS, "--steps", 4, "--resume")
    assert "resumed after step 3" in run.out
    assert_same(run, whole, steps=4)


def test_sigterm_twice_is_sigterm(launch, whole, tmp_path, monkeypatch):
    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *a: (os.kill(os.getpid(), 15), save(*a)))
    draw, calls = TransformersEngine.generate, []

    def generate(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), 15)
        return draw(*arguments, **keywords)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    run = launch(back_to(whole, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume")
    assert run.code == 0 and not run.errors
    monkeypatch.undo()
    assert_same(launch(run.folder, *FLAGS, "--steps", 4, "--resume"), whole, steps=4)


@pytest.mark.parametrize("call,step", [(3, 3), (4, 2)])
def test_an_error_in_the_update_is_one_line_and_nothing_half_done_is_saved(
    call, step, launch, whole, tmp_path, monkeypatch
):
    """Before step 4's first optimizer step the weights are those after step 3, and saved; after it they are not."""
    count, loss = [0], train.batch_loss

    def failing(*arguments):
        count[0] += 1
        if count[0] == call:
            raise RuntimeError("out of memory, say")
        return loss(*arguments)

    monkeypatch.setattr(train, "batch_loss", failing)
    run = launch(back_to(whole, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume")
    assert (
        run.code == 1 and len(run.errors) == 1 and "after step 3: RuntimeError: out of memory, say" in run.errors[0]
    )
    assert "batch_loss" in (run.folder / "error_rank_0.txt").read_text() and "Traceback" not in run.err
    monkeypatch.undo()
    run = launch(run.folder, *FLAGS, "--steps", 4, "--resume")
    assert f"resumed after step {step}" in run.out
    assert_same(run, whole, steps=4)


# ------------------------------------------------------------------------------------------------------------ NaNs


@pytest.fixture
def poison(monkeypatch):
    """poison(calls) makes the gradient of these micro-batches (0, 1, ...) of the next run not finite."""

    def arm(calls):
        count, loss = [0], train.batch_loss

        def poisoned(*arguments):
            count[0] += 1
            return loss(*arguments) * (float("nan") if count[0] - 1 in calls else 1)

        monkeypatch.setattr(train, "batch_loss", poisoned)

    return arm


def test_a_gradient_that_is_not_finite_takes_no_step_and_is_counted(launch, tmp_path, poison, monkeypatch):
    poison({2, 3})  # both optimizer steps of step 2
    weights, record = [], train.record

    def recorded(run, *rest):
        weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
        record(run, *rest)

    monkeypatch.setattr(train, "record", recorded)
    run = launch(tmp_path / "run", "--steps", 4, "--algorithm", "grpo")
    assert run.code == 0 and [m["nonfinite_updates"] for m in run.steps] == [0, 2, 0, 0]
    assert [same_weights(a, b) for a, b in zip(weights, weights[1:])] == [False, True, False, False]
    assert run.steps[1]["grad_norm"] is None and all(torch.isfinite(w).all() for w in run.weights.values())
    assert not (run.folder / "nonfinite.jsonl").exists()


@pytest.mark.parametrize("calls", [range(4, 99), {5, 6, 7}])
def test_three_in_a_row_end_the_run_and_say_where(calls, launch, tmp_path, whole, poison, monkeypatch):
    """Also where the third is not the last update of its step. Without the NaNs it then goes on."""
    poison({call - 4 for call in calls})  # the copy goes on after step 2, of two updates each
    folder = back_to(whole, 2, tmp_path / "run")
    run = launch(folder, *FLAGS, "--steps", 6, "--resume")
    (line,) = run.errors
    assert run.code == 2 and "step 4, stage" in line and "3 times in a row" in line and "nonfinite.jsonl" in line
    saved = run.lines("nonfinite.jsonl")
    assert len(saved) == 64 and {row["step"] for row in saved} == {4} and not (folder / "final").exists()
    assert saved == [row for row in run.samples if row["step"] == 4]
    monkeypatch.undo()
    assert_same(launch(folder, *FLAGS, "--steps", 4, "--resume"), whole, steps=4)


# ------------------------------------------------------------------------------------------------------ lost ranks


@pytest.mark.parametrize(
    "where,name,call", [("rollout", "draw", 20), ("train", "batch_loss", 3), ("train", "sample_corrections", 1)]
)
def test_a_lost_rank_ends_the_others_with_its_name(where, name, call, ranks, pair, tmp_path):
    """Killed in the rollout, in the update, in an evaluation; the other one ends by itself within seconds."""
    patch = SIGTERM.format(where=where, name=name, call=call, ranks=(1,)).replace("SIGTERM", "SIGKILL")
    evaluation = name == "sample_corrections"
    folder = tmp_path / "run" if evaluation else back_to(pair, 2, tmp_path / "run")
    job = ranks(folder, *FLAGS, "--steps", 4, "--eval_questions", 8 if evaluation else 0, "--resume", patch=patch)
    while job.alive(1):
        time.sleep(0.01)
    since = time.monotonic()
    run = job.result()
    assert time.monotonic() - since < 30 and job.codes == [1, -9]
    (line,) = run.errors
    assert (
        "error: rank 0, after step" in line
        and "lost rank 1" in line
        and "--resume goes on" in line
        and "Traceback" not in run.err
    )
    if not evaluation:
        assert_same(ranks(folder, *FLAGS, "--steps", 4, "--resume").result(), pair, steps=4)


def test_losing_rank_0_takes_the_store_along(ranks, pair, tmp_path):
    patch = SIGTERM.format(where="train", name="batch_loss", call=2, ranks=(0,)).replace("SIGTERM", "SIGKILL")
    job = ranks(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume", patch=patch, agent=False)
    job.result()
    assert job.codes == [-9, 1] and "lost rank 0" in job.said(1, "err") and "Traceback" not in job.said(1, "err")


def test_torchrun_restarts_and_the_run_goes_on(torchrun, pair, tmp_path):
    """One rank killed; torchrun starts both again, without --resume, and the run ends as if nothing had happened."""
    job = torchrun(tmp_path / "run", *FLAGS, "--steps", 6, elastic=["--max-restarts", 1])
    lines = tmp_path / "run" / "metrics.jsonl"
    while not lines.exists() or lines.read_bytes().count(b"\n") < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    os.kill(job.workers()[1], 9)
    run = job.result()
    assert "resumed after step" in run.out
    assert_same(run, pair, steps=6)


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_every_worker_with_0(torchrun, ranks, pair, tmp_path):
    job = torchrun(back_to(pair, 2, tmp_path / "run"), *FLAGS, "--steps", 4, "--resume")
    lines = tmp_path / "run" / "metrics.jsonl"
    while lines.read_bytes().count(b"\n") < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.005)
    job.terminate()
    run = job.result()
    assert "exitcode  : 1" not in run.err and "error: rank" not in run.err
    assert_same(ranks(run.folder, *FLAGS, "--steps", 4, "--resume").result(), pair, steps=4)


# ------------------------------------------------------------------------------------------------------------ cost


def test_checkpoints_every_ten_steps_cost_at_most_three_percent(launch, tmp_path, monkeypatch):
    """Time within saving and pruning, of the time of 20 steps of the toy's own size."""
    spent = []

    def timed(function):
        def wrapper(*arguments):
            start = time.perf_counter()
            function(*arguments)
            spent.append(time.perf_counter() - start)

        return wrapper

    monkeypatch.setattr(train, "save_checkpoint", timed(train.save_checkpoint))
    monkeypatch.setattr(train, "prune_checkpoints", timed(train.prune_checkpoints))
    monkeypatch.setattr(train, "train", timed(train.train))
    run = launch(tmp_path / "run", *"--steps 10 --save_every 10 --questions_per_step 16 --pool_trigger 16".split())
    assert run.code == 0 and len(spent) == 3
    share = sum(spent[:2]) / spent[2]
    print(f"checkpoints: {1000 * sum(spent[:2]):.0f} ms of {spent[2]:.1f} s, {100 * share:.2f} %")
    assert share <= 0.03
