"""train.py loses no work: killed, stopped, with damaged files or NaNs it goes on bit for bit, or says
in one line why not. Bit for bit is on one machine, with one number of ranks and threads."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import FEW, TOY, children, same_weights
from torch.nn.parallel import DistributedDataParallel

import train
from rollout import TransformersEngine

FLAGS = "--min_variance 0.1 --save_every 2 --steps".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(launch, folder):
    """6 steps on one rank, undisturbed."""
    return launch(folder / "whole", *FLAGS, 6)


@pytest.fixture(scope="module")
def half(launch, folder):
    """4 of them, with checkpoints of the steps 2 and 4."""
    return launch(folder / "half", *FLAGS, 4)


@pytest.fixture(scope="module")
def pair(ranks, folder):
    """6 steps on two ranks, undisturbed."""
    return checked(ranks(folder / "pair", *FLAGS, 6))


@pytest.fixture(scope="module")
def long_pair(ranks, folder):
    """12 of them."""
    return checked(ranks(folder / "long_pair", *FLAGS, 12))


@pytest.fixture(scope="module")
def half_pair(ranks, folder):
    """4 of them."""
    return checked(ranks(folder / "half_pair", *FLAGS, 4))


def checked(job):
    run = job.result()
    assert job.codes == [0, 0], [job.said(rank, "err") for rank in (0, 1)]
    return run


def copied(run, to):
    return shutil.copytree(run.folder, to)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder, step):
    """All that a checkpoint holds, with tensors as bytes."""

    def plain(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), x.shape, x.numpy().tobytes()
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return [plain(value) for value in x] if isinstance(x, list) else x

    files = sorted((folder / "checkpoints" / f"step_{step:06d}").iterdir())
    saved = {file.name: plain(torch.load(file, weights_only=True)) for file in files}
    for shard in saved.values():
        del shard["logs"]  # in bytes, which the clock's digits decide
    return saved


def assert_same(run, undisturbed):
    """Every metric but the clock's and every sample; at the end weights, moments, pool and state."""
    assert run.code == 0, run.err
    steps = run.metrics[-1]["step"]
    assert [m["step"] for m in run.metrics] == list(range(steps + 1))  # nothing lost, no step twice
    assert run.comparable() == undisturbed.comparable()[: steps + 1]
    assert run.samples == [row for row in undisturbed.samples if row["step"] <= steps]
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept[-1] == f"step_{steps:06d}" and len(kept) <= 2  # and no .part
    if steps == undisturbed.metrics[-1]["step"]:
        same = shards(run.folder, steps) == shards(undisturbed.folder, steps)
        assert same and same_weights(run.weights, undisturbed.weights), "the weights differ"
    assert not list(run.folder.glob("*.part")) and (run.folder / "curves.png").exists()


# ------------------------------------------------------------------------------------- exact resume


def test_4_and_2_steps_are_6_steps(half, whole, launch, tmp_path):
    """With both stages on both sides of the cut. What changes no number may differ."""
    assert {m["stage"] for m in whole.steps[:4]} == {m["stage"] for m in whole.steps[4:]} == {1, 2}
    other = "--resume --save_every 3 --eval_every 5 --steps".split()
    run = launch(copied(half, tmp_path / "run"), *FLAGS, 4, *other, 6)
    assert "resumed after step 4, in stage" in run.out and not run.errors
    assert_same(run, whole)
    assert_same(launch(run.folder, *FLAGS, 4, *other, 6), whole)  # a finished run stays what it is


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
    assert several.metrics[-1]["step"] == 4
    assert several.comparable() == one.comparable() and several.samples == one.samples
    same = shards(several.folder, 4) == shards(one.folder, 4)
    assert same and same_weights(several.weights, one.weights)


def test_a_run_of_others_is_not_touched(half, launch, tmp_path):
    """Without --resume, with other settings, data, first prompt or ranks: one line that names it."""
    data = shutil.copy(FEW, tmp_path / "data.jsonl")
    model = shutil.copytree(TOY, tmp_path / "model")
    mine = ["--train_data", data, "--model", model, "--algorithm", "grpo", "--steps"]
    assert launch(tmp_path / "run", *mine, 1).code == 0
    before = contents(tmp_path / "run")

    def refused(*flags):
        run = launch(tmp_path / "run", *mine, 1, *flags)
        assert run.code == 2 and len(run.errors) == 1 and contents(tmp_path / "run") == before, run.err
        return run.errors[0]

    assert "holds a run already; add --resume" in refused()
    for name, value in {"temperature": 0.9, "group_size": 2, "seed": 1, "learning_rate": 1e-3}.items():
        assert f"began with {name} " in refused("--resume", f"--{name}", value)
    data.write_text(FEW.read_text().replace("Add 1", "Add 2"))  # behind the same path
    assert "began with problems " in refused("--resume")
    shutil.copy(FEW, data)
    template = model / "tokenizer_config.json"  # may write today's date
    template.write_text(template.read_text().replace("{{ m.content", "Today: {{ m.content"))
    assert "began with first_prompt " in refused("--resume")
    shutil.copy(TOY / template.name, template)
    settings = tmp_path / "run" / "settings.json"
    settings.write_text(settings.read_text().replace('"ranks": 1', '"ranks": 2'))
    before = contents(tmp_path / "run")
    assert "began with ranks 2, not 1" in refused("--resume")
    settings.unlink()
    before = contents(tmp_path / "run")
    assert "began with" in refused("--resume")


def test_with_a_cosine_the_number_of_steps_is_part_of_the_run(launch, tmp_path):
    flags = "--algorithm grpo --schedule cosine --steps".split()
    assert launch(tmp_path / "run", *flags, 1).code == 0
    run = launch(tmp_path / "run", *flags, 2, "--resume")
    assert run.code == 2 and "began with steps 1, not 2" in run.err


def test_a_folder_that_is_being_written_is_left_alone(half, launch, tmp_path):
    folder = copied(half, tmp_path / "run")
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = contents(folder)
    run = launch(folder, *FLAGS, 4, "--resume")
    assert run.code == 2 and len(run.errors) == 1 and "another run is writing there" in run.err
    assert contents(folder) == before
    os.close(lock)
    assert launch(folder, *FLAGS, 4, "--resume").code == 0


# -------------------------------------------------------------------------------------------- kills


def killed_at_random(kills, ranks, pair, tmp_path, seed):
    """Kills 2 ranks at random moments and resumes, until the run is through; then another run."""
    rng, killed, runs, moments = random.Random(seed), 0, 0, []
    while killed < kills or runs == 0:
        folder, code = tmp_path / f"{runs}", None
        lines = folder / "metrics.jsonl"

        def logged():
            return lines.read_bytes().count(b"\n") if lines.exists() else 0

        while code != 0:
            job = ranks(folder, *FLAGS, 12, "--resume")
            if killed < kills:
                while "the first prompt" not in job.said() and job.alive(0):
                    time.sleep(0.005)
                goal = logged() + rng.randrange(5)
                while job.alive(0) and logged() < goal:
                    time.sleep(0.001)
                time.sleep(rng.choice((0.0, 0.02, 0.7)) * rng.random())  # rollout, update, checkpoint
                if job.alive(0):
                    job.kill()
                    killed += 1
                    moments.append(logged() - 1)
            code = job.result().code
            assert code in (0, -9), job.said(0, "err")
        assert_same(job.result(), pair)
        runs += 1
    print(f"{killed} kills in {runs} run(s); the last finished steps were {moments}")
    assert len(set(moments)) >= min(4, kills // 2)


def test_killed_at_eight_random_moments(ranks, long_pair, tmp_path):
    killed_at_random(8, ranks, long_pair, tmp_path, seed=1)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(ranks, long_pair, tmp_path):
    killed_at_random(30, ranks, long_pair, tmp_path, seed=2)


@pytest.mark.parametrize("name", ["save", "rename"])
def test_killed_while_a_checkpoint_is_written(name, ranks, pair, half_pair, tmp_path):
    """Half a shard, or all of them without their name: it does not count, and nothing of it stays."""
    patch = f"""
import io, signal
save = train.torch.save
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(data, path):
    save(data, buffer := io.BytesIO())
    path.write_bytes(buffer.getvalue()[:50_000])
    die()
if "{name}" == "rename":
    train.Path.rename = die
elif rank == 1:
    train.torch.save = half
"""
    folder = copied(half_pair, tmp_path / "run")
    job = ranks(folder, *FLAGS, 6, "--resume", patch=patch)
    assert -9 in (job.result(), job.codes)[1] and (folder / "checkpoints" / "step_000006.part").exists()
    run = checked(ranks(folder, *FLAGS, 6, "--resume"))
    assert "resumed after step 4" in run.out
    assert_same(run, pair)


@pytest.mark.parametrize("how,rank", [("a flipped byte", 0), ("cut", 1), ("missing", 1)])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_used(how, rank, ranks, pair, half_pair, tmp_path):
    folder = copied(half_pair, tmp_path / "run")
    shard = folder / "checkpoints" / "step_000004" / f"rank_{rank}.pt"
    data = shard.read_bytes()
    shard.write_bytes(data[:99_999] + (bytes([data[99_999] ^ 1]) + data[100_000:]) * (how[0] == "a"))
    if how == "missing":
        shard.unlink()
    run = checked(ranks(folder, *FLAGS, 6, "--resume"))
    assert len(run.errors) == 1 and f"step_000004/rank_{rank}.pt: missing or damaged" in run.errors[0]
    assert "resumed after step 2" in run.out
    assert_same(run, pair)


def test_no_flipped_byte_passes(half, tmp_path, capsys, monkeypatch):
    """Of 60 places: refused, or what is loaded is what was saved. `torch.load` alone lets most pass."""
    monkeypatch.setattr(train, "gather", list)
    before, loaded = shards(half.folder, 4)["rank_0.pt"], []
    folder, rng = tmp_path / "checkpoints" / "step_000004", random.Random(0)
    folder.mkdir(parents=True)
    data = (half.folder / "checkpoints" / "step_000004" / "rank_0.pt").read_bytes()
    kept = SimpleNamespace(load_state_dict=loaded.append)
    refused = 0
    for place in (rng.randrange(len(data)) for _ in range(60)):
        (folder / "rank_0.pt").write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        run = SimpleNamespace(output=tmp_path, rank=0, optimizer=kept, pool=None)
        del loaded[:]
        if train.load_checkpoint(run):
            assert str(loaded[0]["adam"]["param_groups"]) == str(before["optimizer"]["adam"]["param_groups"])
            for i, master in loaded[0]["masters"].items():
                assert master.numpy().tobytes() == before["optimizer"]["masters"][i][2]
            for i, moments in loaded[0]["adam"]["state"].items():
                for name, value in moments.items():
                    assert value.numpy().tobytes() == before["optimizer"]["adam"]["state"][i][name][2]
        refused += not loaded
    assert refused > 50 and capsys.readouterr().err.count("missing or damaged") == refused


def test_when_all_are_damaged_the_run_starts_again(half, whole, launch, tmp_path):
    folder = copied(half, tmp_path / "run")
    for shard in folder.glob("checkpoints/*/rank_0.pt"):
        shard.write_bytes(shard.read_bytes()[:1000])
    (folder / "final.part").mkdir()  # of a run that was killed at its very end
    run = launch(folder, *FLAGS, 6, "--resume")
    assert len(run.errors) == 2 and "resumed" not in run.out
    assert_same(run, whole)


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("name,sent", [
    ("SIGTERM", "rollout"), ("SIGINT", "update"), ("SIGTERM", "saving"),
])  # fmt: skip
def test_a_signal_finishes_the_step_saves_and_leaves(name, sent, half, whole, launch, tmp_path, monkeypatch):
    owner, function = {"rollout": (TransformersEngine, "generate"), "update": (train.MasterAdamW, "step"),
                       "saving": (train, "save_checkpoint")}[sent]  # fmt: skip
    original, number = getattr(owner, function), getattr(signal, name)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def signalled(*arguments, **keywords):
        os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, function, signalled)
    often = ("--save_every", 1 if sent == "saving" else 2)
    run = launch(copied(half, tmp_path / "run"), *FLAGS, 6, "--resume", *often)
    assert run.code == {"SIGTERM": 0, "SIGINT": 130}[name] and not run.errors
    assert "stopped by a signal after step 5" in run.out and run.metrics[-1]["step"] == 5
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    monkeypatch.undo()
    run = launch(run.folder, *FLAGS, 6, "--resume")
    assert "resumed after step 5" in run.out
    assert_same(run, whole)


def test_a_signal_that_reaches_one_rank_stops_both_after_the_same_step(ranks, pair, half_pair, tmp_path):
    """Rank 1's, while the ranks agree whether to stop: they agree not to, and stop after the next step."""
    patch = """
gather = train.gather
def signalled(items):
    gathered = gather(items)
    if rank == 1 and items == [False]:
        os.kill(os.getpid(), 15)
    return gathered
train.gather = signalled
"""
    run = checked(ranks(copied(half_pair, tmp_path / "run"), *FLAGS, 7, "--resume", patch=patch))
    assert "stopped by a signal after step 6" in run.out
    assert_same(checked(ranks(run.folder, *FLAGS, 6, "--resume")), pair)


def test_ddp_is_gone_before_the_process_group(launch, tmp_path, monkeypatch):
    """Else its destructor ends the group, with Python's lock held, for which gloo's thread may wait:
    of 150 runs on 2 ranks one hung at its end."""
    wrapped, destroy, left = [], train.dist.destroy_process_group, []

    def wrap(*arguments, **keywords):
        made = DistributedDataParallel(*arguments, **keywords)
        wrapped.append(weakref.ref(made))
        return made

    monkeypatch.setattr(train, "DistributedDataParallel", wrap)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: (left.append(wrapped[0]()), destroy()))
    assert launch(tmp_path / "run", *"--steps 1 --algorithm grpo".split()).code == 0
    assert left == [None]


# --------------------------------------------------------------------------------------------- NaNs


def poison(monkeypatch, calls):
    """Makes the gradients of these micro-batches (0, 1, ...) not finite."""
    count, loss = [0], train.batch_loss

    def poisoned(*arguments):
        count[0] += 1
        return loss(*arguments) * (float("nan") if count[0] - 1 in calls else 1)

    monkeypatch.setattr(train, "batch_loss", poisoned)


def test_a_gradient_that_is_not_finite_takes_no_step_and_is_counted(launch, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3})  # both optimizer steps of step 2
    weights, log = [], train.log

    def logged(run, *rest):
        weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
        log(run, *rest)

    monkeypatch.setattr(train, "log", logged)
    run = launch(tmp_path / "run", *"--steps 3 --questions_per_step 8 --algorithm grpo".split())
    assert run.code == 0 and [m["nonfinite_updates"] for m in run.steps] == [0, 2, 0]
    assert [same_weights(a, b) for a, b in zip(weights, weights[1:])] == [False, True, False]
    assert run.steps[1]["grad_norm"] is run.steps[1]["loss"] is None


@pytest.mark.parametrize("calls", [range(99), {1, 2, 3}])
def test_three_in_a_row_end_the_run_and_say_where(calls, half, whole, launch, tmp_path, monkeypatch):
    """Also where the third is not the last update of its step. Without the NaNs it then goes on."""
    poison(monkeypatch, calls)
    run = launch(copied(half, tmp_path / "run"), *FLAGS, 6, "--resume")
    (line,) = run.errors
    assert run.code == 2 and re.search(r"step \d, stage \d: three gradients in a row were not finite", line)
    monkeypatch.undo()
    assert_same(launch(run.folder, *FLAGS, 6, "--resume"), whole)


def test_stale_weights_raise_the_alarm(launch, tmp_path, monkeypatch):
    """An engine that samples from the weights of the start: seen after the first update, no earlier."""
    frozen = train.load_policy(str(TOY), "auto", "cpu")[0]
    monkeypatch.setattr(TransformersEngine, "update_weights", lambda self, _: setattr(self, "model", frozen))
    run = launch(tmp_path / "run", *"--steps 2 --learning_rate 5e-3 --algorithm grpo".split())
    assert len(run.errors) == 1 and "step 2: engine and trainer disagree" in run.errors[0]


# ------------------------------------------------------------------------------- torchrun, for real


def wait_for_steps(job, folder, steps):
    lines = folder / "metrics.jsonl"
    while not lines.exists() or lines.read_bytes().count(b"\n") <= steps:
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)


def test_no_second_writer_while_workers_outlive_torchrun(torchrun, ranks, long_pair, tmp_path):
    """torchrun alone is killed; --resume is refused until its workers, told to stop, have left."""
    folder = tmp_path / "run"
    job = torchrun(folder, *FLAGS, 12)
    wait_for_steps(job, folder, 2)
    workers = children(job.pid)
    job.kill()
    job.wait()
    run = ranks(folder, *FLAGS, 12, "--resume").result()
    assert run.code == 2 and len(run.errors) == 1
    assert "another run is writing there" in run.errors[0]
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        time.sleep(0.05)
    run = checked(ranks(folder, *FLAGS, 12, "--resume"))
    assert re.search(r"resumed after step [2-9]", run.out)
    assert_same(run, long_pair)


def test_a_rank_that_breaks_alone_ends_the_run_with_its_traceback(torchrun, tmp_path):
    script = tmp_path / "breaks.py"
    script.write_text("""
import os, train
act = train.trial_and_error
def broken(run, step):
    if run.rank == 1 and step == 2:
        raise RuntimeError("CUDA out of memory")
    return act(run, step)
train.trial_and_error = broken
train.main()
""")
    job = torchrun(tmp_path / "run", "--algorithm", "grpo", script=script)
    _, err = job.communicate(timeout=300)
    assert job.returncode == 1 and "RuntimeError: CUDA out of memory" in err and "in broken" in err
    assert re.search(r"Root Cause.*rank +: 1", err, re.S) and not (tmp_path / "run" / "final").exists()
