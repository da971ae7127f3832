"""train.py loses no work: killed, stopped, with damaged files or NaNs it goes on bit for bit, or
says in one line why not. Bit for bit: on one machine, with one number of ranks and of threads."""

import gc
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FEW, ROOT, same_weights
from torch.distributed.run import get_args_parser
from torch.nn.parallel import DistributedDataParallel

import train
from rollout import TransformersEngine

FLAGS = "--min_variance 0.1 --save_every 2 --steps".split()


@pytest.fixture(scope="module")
def done(launch, ranks, tmp_path_factory):
    """done(world, steps) -> such a run, undisturbed."""

    @cache
    def run(world, steps):
        folder = tmp_path_factory.mktemp("done") / "run"
        flags = (folder, *FLAGS, steps)
        return launch(*flags) if world == 1 else checked(ranks(*flags))

    return run


@pytest.fixture
def copied(done, tmp_path):
    """copied(world, steps) -> a copy of its folder."""
    return lambda *which: shutil.copytree(done(*which).folder, tmp_path / "run")


def checked(job):
    run = job.result()
    assert job.codes == [0, 0], [job.said(rank, "err") for rank in (0, 1)]
    return run


def plain(x):
    if isinstance(x, torch.Tensor):
        return str(x.dtype), x.shape, x.numpy().tobytes()
    if isinstance(x, dict):  # logs: sizes in bytes, which the clock's digits decide
        return {key: plain(value) for key, value in x.items() if key != "logs"}
    return [plain(value) for value in x] if isinstance(x, list) else x


def shards(folder):
    """All that the last checkpoint holds, with tensors as bytes."""
    *_, last = sorted((folder / "checkpoints").glob("step_*"))
    return last.name, {f.name: plain(torch.load(f)) for f in last.iterdir()}


def assert_same(run, undisturbed):
    """Every metric but the clock's, every sample; at the end weights, moments, pool and state."""
    assert run.code == 0, run.err
    assert run.comparable() == undisturbed.comparable() and run.samples == undisturbed.samples
    same = shards(run.folder) == shards(undisturbed.folder)
    assert same and same_weights(run.weights, undisturbed.weights), "the weights differ"
    assert len(list((run.folder / "checkpoints").iterdir())) <= 2
    assert not list(run.folder.rglob("*.part"))


# ------------------------------------------------------------------------------------- exact resume


def test_4_and_2_steps_are_6_steps(done, copied, launch):
    """With both stages on both sides of the cut. What changes no number may differ."""
    stages, folder = [m["stage"] for m in done(1, 6).steps], copied(1, 4)
    assert set(stages[:4]) == set(stages[4:]) == {1, 2}
    for said in ("resumed after step 4, in stage", "resumed after step 6"):  # finished is finished
        run = launch(folder, *FLAGS, 6, "--resume", "--save_every", 3, "--eval_every", 5)
        assert said in run.out and not run.errors
        assert_same(run, done(1, 6))


@pytest.mark.parametrize("flags", [
    "--beta 0.1 --warmup_steps 3 --weight_decay 0.1 --eval_questions 4 --eval_every 1",
    "--algorithm dapo --overlong_cache 120 --precision bf16",
])  # fmt: skip
def test_n_and_n_steps_are_2n_steps(flags, launch, tmp_path):
    """Stopped twice: in the middle of warm-up, between the stages, with errors in the pool."""
    one = launch(tmp_path / "one", *FLAGS, 4, *flags.split())
    for steps in (2, 3, 4):
        several = launch(tmp_path / "several", *FLAGS, steps, *flags.split(), "--resume")
    assert "resumed after step 3" in several.out
    assert_same(several, one)


def test_a_run_of_others_is_not_touched(launch, tmp_path):
    """Without --resume, or with other settings, data or ranks: one line that names it."""
    data, held_out = (shutil.copy(FEW, tmp_path / name) for name in ("train", "held_out"))
    mine = ["--train_data", data, "--eval_data", held_out, "--eval_questions", 2]
    mine += "--algorithm grpo --schedule cosine --steps 1 --max_context 400".split()
    folder = tmp_path / "run"
    assert launch(folder, *mine).code == 0

    def refused(said, *flags):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        run = launch(folder, *mine, *flags)
        assert run.code == 2 and len(run.errors) == 1 and said in run.errors[0], run.err
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    refused("holds a run; add --resume")
    for name, value in {"temperature": 0.9, "group_size": 2, "seed": 1, "steps": 2}.items():
        refused(f"begun with {name} ", "--resume", f"--{name}", value)  # steps: with a cosine
    for name, path, old, new in (
        ("problems", data, "Add 1", "Add 2"),  # behind the same path
        ("problems", held_out, '"answer": "', '"answer": "1'),
        ("ranks", folder / "settings.json", '"ranks": 1', '"ranks": 2'),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        refused(f"begun with {name} ", "--resume")
        path.write_text(text)
    assert launch(folder, *mine, "--resume").code == 0


# -------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("kills", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, ranks, done, tmp_path):
    """Kills 2 ranks at random moments and resumes, until the run is through; then another run."""
    rng, killed, runs, moments = random.Random(kills), 0, 0, []
    while killed < kills:
        folder, code = tmp_path / f"{runs}", None
        lines = folder / "metrics.jsonl"

        def logged():
            return lines.read_bytes().count(b"\n") if lines.exists() else 0

        while code != 0:
            job = ranks(folder, *FLAGS, 12, "--resume")
            if killed < kills:
                while "the first prompt" not in job.said() and job.alive():
                    time.sleep(0.005)
                goal = logged() + rng.randrange(5)
                while job.alive() and logged() < goal:
                    time.sleep(0.001)
                time.sleep(rng.choice((0.0, 0.02, 0.7)) * rng.random())  # a save, an update, ...
                killed += job.alive()
                moments.append(logged() - 1)
                job.kill()
            code = job.result().code
            assert code in (0, -9), job.said(0, "err")
        assert_same(job.result(), done(2, 12))
        runs += 1
    assert len(set(moments)) >= 4


@pytest.mark.parametrize("how,rank", [("a flipped byte", 0), ("cut", 1), ("missing", 1)])
def test_a_damaged_shard_is_named_and_the_one_before_used(how, rank, ranks, done, copied):
    folder = copied(2, 4)
    (folder / "checkpoints" / "step_000006.part").mkdir()  # as of a kill while it was written
    (folder / "checkpoints" / "step_000006.part" / "rank_1.pt").write_bytes(b"PK")
    shard = folder / "checkpoints" / "step_000004" / f"rank_{rank}.pt"
    data = bytearray(shard.read_bytes())
    data[99_999] ^= 1
    shard.write_bytes(data[: None if how == "a flipped byte" else 99_999])
    if how == "missing":
        shard.unlink()
    run = checked(ranks(folder, *FLAGS, 6, "--resume"))
    (line,) = run.errors
    assert f"step_000004/rank_{rank}.pt: missing or damaged" in line and "after step 2" in run.out
    assert_same(run, done(2, 6))


def test_when_all_are_damaged_the_run_starts_again(done, copied, launch):
    folder = copied(1, 4)
    for shard in folder.glob("checkpoints/*/rank_0.pt"):
        shard.write_bytes(shard.read_bytes()[:1000])
    (folder / "final.part").mkdir()  # as of a kill at the very end
    run = launch(folder, *FLAGS, 6, "--resume")
    assert len(run.errors) == 2 and "resumed" not in run.out
    assert_same(run, done(1, 6))


def test_a_full_disk_gets_one_line(done, copied, launch, monkeypatch):
    """torch.save then says `unexpected pos` and nothing of a disk; here files may not grow so far.
    What was saved before is whole, and what is half written is no obstacle."""
    folder, save = copied(1, 4), train.save_checkpoint
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def onto_a_full_disk(run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, most))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    monkeypatch.setattr(train, "save_checkpoint", onto_a_full_disk)
    run = launch(folder, *FLAGS, 6, "--resume")
    (line,) = run.errors
    assert run.code == 1 and f"{folder}/checkpoints/step_000006" in line and "disk" in line
    assert list(folder.glob("checkpoints/*.part/*"))
    monkeypatch.undo()
    assert_same(launch(folder, *FLAGS, 6, "--resume"), done(1, 6))


@pytest.mark.parametrize("lost", ["checkpoints", "final checkpoints"])
def test_without_its_checkpoints_a_run_is_not_begun_again(lost, copied, launch):
    """Deleted to save disk, or copied without: logs were cut to nothing, final/ replaced."""
    folder = copied(1, 4)
    for name in lost.split():
        shutil.rmtree(folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for steps in (4, 6):
        run = launch(folder, *FLAGS, steps, "--resume")
        (line,) = run.errors
        assert run.code == 2 and str(folder) in line and "no checkpoint" in line
    before[folder / "settings.json"] = (folder / "settings.json").read_bytes()  # it is rewritten
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_log_that_was_moved_away_begins_empty(done, copied, launch):
    """It is cut to what the checkpoint says, and never made longer: that would be NUL bytes."""
    folder = copied(1, 4)
    (folder / "samples.jsonl").rename(folder / "old")
    run = launch(folder, *FLAGS, 6, "--resume")
    assert run.code == 0 and run.lines("old") + run.samples == done(1, 6).samples


def test_copies_and_links_are_not_ours_to_delete(done, copied, launch, tmp_path):
    """A user's copy is no checkpoint; a link, here to another disk, is followed in reading only."""
    folder, disk = copied(1, 4), tmp_path / "disk"
    checkpoints = folder / "checkpoints"
    for name in ("step_000008_keep", "step_000008_best1", "step_8"):
        shutil.copytree(checkpoints / "step_000002", checkpoints / name)
    disk.mkdir()
    for path in (folder / "final", checkpoints / "step_000002", checkpoints / "step_000004"):
        path.rename(disk / path.name)
        path.symlink_to(disk / path.name)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    run = launch(folder, *FLAGS, 6, "--resume", "--save_every", 1)
    assert "resumed after step 4" in run.out and not run.errors
    assert run.comparable() == done(1, 6).comparable()
    assert same_weights(run.weights, done(1, 6).weights)
    assert before == {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert len(list(checkpoints.glob("step_*8*/rank_0.pt"))) == 3
    assert {"step_000005", "step_000006"} <= {path.name for path in checkpoints.iterdir()}


# ------------------------------------------------------------------------------------ signals, NaNs


@pytest.mark.parametrize("sent,owner,name", [
    (signal.SIGTERM, TransformersEngine, "generate"), (signal.SIGINT, train.MasterAdamW, "step"),
    (signal.SIGTERM, train, "save_checkpoint"),
])  # fmt: skip
def test_a_signal_stops_after_the_step(sent, owner, name, done, copied, launch, monkeypatch):
    folder, original = copied(1, 4), getattr(owner, name)
    before = [signal.getsignal(n) for n in (2, 15)]

    def signalled(*arguments, **keywords):
        if signal.getsignal(sent) not in before:  # a model that is only tried has no step to finish
            os.kill(os.getpid(), sent)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, signalled)
    often = 1 if owner is train else 2
    run = launch(folder, *FLAGS, 6, "--resume", "--save_every", often)
    (line,) = set(run.errors)
    assert sent.name in line and "is finished and saved first" in line and "step 6" not in line
    assert run.code == (130 if sent == signal.SIGINT else 0)
    assert "stopped by a signal after step 5" in run.out and run.metrics[-1]["step"] == 5
    assert [signal.getsignal(n) for n in (2, 15)] == before
    monkeypatch.undo()
    run = launch(folder, *FLAGS, 6, "--resume")
    assert "resumed after step 5" in run.out
    assert_same(run, done(1, 6))


def test_a_signal_that_reaches_one_rank_stops_both_after_the_same_step(ranks, done, copied):
    """Rank 1's, just when the ranks have agreed to go on: they stop after that step."""
    patch = """
gather = train.gather
def signalled(items):
    gathered = gather(items)
    if rank == 1 and items == [False]:
        os.kill(os.getpid(), 15)
    return gathered
train.gather = signalled
"""
    run = checked(ranks(copied(2, 4), *FLAGS, 9, "--resume", patch=patch))
    assert "stopped by a signal after step 5" in run.out
    assert_same(checked(ranks(run.folder, *FLAGS, 6, "--resume")), done(2, 6))


def test_ddp_is_gone_before_the_process_group(launch, tmp_path, monkeypatch):
    """Else its destructor ends the group, with Python's lock held, for which gloo's thread may
    wait: one of 150 runs on 2 ranks hung at its end."""
    left, destroy = [], train.dist.destroy_process_group

    def counted():
        left.append(sum(type(x) is DistributedDataParallel for x in gc.get_objects()))
        destroy()

    gc.collect()
    monkeypatch.setattr(train.dist, "destroy_process_group", counted)
    run = launch(tmp_path / "run", *"--steps 1 --algorithm grpo".split())
    assert run.code == 0 and left == [0]


@pytest.mark.parametrize("calls,end", [({0, 1}, None), (range(99), 6), ({1, 2, 3}, 6)])
def test_no_step_on_a_norm_that_is_not_finite(calls, end, done, copied, launch, monkeypatch):
    """The gradients of these micro-batches of steps 5, 6, ... are NaN. Three optimizer steps in a
    row end the run, wherever in a step; without the NaNs it then goes on."""
    folder, count, loss = copied(1, 4), iter(range(99)), train.batch_loss

    def poisoned(*arguments):
        return loss(*arguments) * (float("nan") if next(count) in calls else 1)

    monkeypatch.setattr(train, "batch_loss", poisoned)
    run = launch(folder, *FLAGS, 6, "--resume")
    if end is None:
        assert run.code == 0 and [m["nonfinite_updates"] for m in run.steps[4:]] == [2, 0]
        assert run.steps[4]["grad_norm"] is run.steps[4]["loss"] is None
        assert all(weight.isfinite().all() for weight in run.weights.values())
    else:
        (line,) = run.errors
        assert run.code == 2 and f"step {end}, stage 2: three gradients in a row were not " in line
        monkeypatch.undo()
        assert_same(launch(folder, *FLAGS, 6, "--resume"), done(1, 6))


# ------------------------------------------------------------------------------- torchrun, for real


HOLD = """
import time, train
def stand_still(owner, name, call, flag):  # rank 1 does, for which rank 0 then waits
    original, calls = getattr(owner, name), iter(range(1, 999))
    def held(*arguments, **keywords):
        if os.environ["RANK"] == "1" and next(calls) == call:
            open(flag, "w").close()
            time.sleep(600)
        return original(*arguments, **keywords)
    setattr(owner, name, held)
"""
MOMENTS = {  # where rank 1 stands still when torchrun is killed, and at which call
    "rendezvous": "train.dist, 'init_process_group', 1",
    "sampling": "train.rollout.TransformersEngine, 'generate', 5",
    "update": "train.MasterAdamW, 'step', 6",
}


def workers_of(job):
    threads = Path(f"/proc/{job.pid}/task").glob("*/children")
    return [int(pid) for thread in threads for pid in thread.read_text().split()]


def gone(pid):
    with suppress(OSError):
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def wait_for(condition, seconds, job=None):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and (job is None or job.poll() is None), condition
        time.sleep(0.02)


def test_workers_end_with_a_killed_torchrun(torchrun, ranks, done, tmp_path):
    """While they wait for one another, sample or train. --resume at once goes on, bit for bit."""
    folder = tmp_path / "run"
    for moment, call in MOMENTS.items():
        flag = tmp_path / moment
        breaks = f"{HOLD}stand_still({call}, {str(flag)!r})"
        job = torchrun(folder, *FLAGS, 12, "--resume", breaks=breaks)
        wait_for(flag.exists, 300, job)
        workers = workers_of(job)
        assert len(workers) == 2
        job.kill()
        wait_for(lambda: all(map(gone, workers)), 10)
    run = checked(ranks(folder, *FLAGS, 12, "--resume"))
    assert_same(run, done(2, 12))


@pytest.mark.slow
def test_a_step_of_40_seconds_is_finished(torchrun, tmp_path):
    """torchrun kills after 30 s, if --shutdown-timeout says nothing else."""
    flag, nodes = tmp_path / "sampling", "--standalone --nproc_per_node=2 --shutdown-timeout=600"
    breaks = f"{HOLD}stand_still({MOMENTS['sampling']}, {str(flag)!r})".replace("600", "40")
    job = torchrun(tmp_path / "run", *FLAGS, 12, nodes=nodes, breaks=breaks)
    wait_for(flag.exists, 300, job)
    job.terminate()
    sent = time.time()
    assert any("is finished and saved first" in line for line in job.stderr)
    assert time.time() - sent < 10
    out, _ = job.communicate(timeout=300)
    stopped = re.search(r"stopped by a signal after step (\d)", out)
    assert time.time() - sent > 30
    assert (tmp_path / "run" / "checkpoints" / f"step_00000{stopped[1]}" / "rank_1.pt").exists()


def test_launch_lines_leave_a_step_its_time():
    """Those for real models: in README and at the top of the settings files."""
    files = [ROOT / "README.md", *ROOT.glob("configs/*.yaml")]
    texts = "\n".join(file.read_text() for file in files)
    lines = re.findall(r"torchrun (.* train\.py configs/[\w.]+\.yaml)", texts)
    lines = [line for line in lines if "toy.yaml" not in line]
    shared = re.findall(r'run="torchrun (.*)"', texts)  # what README's lines begin with
    assert len(lines) == 4 and len(shared) == 1
    lines += [f"{shared[0]} train.py"]
    for line in lines:
        assert (get_args_parser().parse_args(line.split()).shutdown_timeout or 0) >= 600, line


def test_a_rank_that_breaks_alone_ends_the_run_with_its_traceback(torchrun, tmp_path):
    breaks = """
act = train.trial_and_error
def broken(run, step):
    if run.rank == 1 and step == 2:
        raise RuntimeError("CUDA out of memory")
    return act(run, step)
train.trial_and_error = broken
"""
    job = torchrun(tmp_path / "run", "--algorithm", "grpo", breaks=breaks)
    _, err = job.communicate(timeout=300)
    assert job.returncode == 1 and "RuntimeError: CUDA out of memory" in err and "in broken" in err
    assert not (tmp_path / "run" / "final").exists()
