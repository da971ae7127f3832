"""train.py as the paper's models need it: bf16 with fp32 masters that no two ranks both hold,
schedules, recomputed activations without dropout, several nodes."""

import json
import shutil
import socket
from functools import cache

import pytest
import torch
from conftest import TOY, same_weights
from transformers import AutoModelForCausalLM

import train
from rollout import TransformersEngine


def toy_model(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TOY, dtype=dtype)


def moved(before, after) -> float:
    """Share of single weights that changed."""
    changed = sum((a != b).sum().item() for a, b in zip(before, after))
    return changed / sum(a.numel() for a in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_adamw_on_fp32_masters(dtype, alone):
    """Beside torch's AdamW in float64: micro-batches' gradients are summed in fp32, clipped by
    their global norm, decay is on matrices only, and at lr 1e-6 nearly all weights move."""
    generator, model = torch.Generator().manual_seed(0), toy_model()
    slow = [p.detach().double().requires_grad_() for p in model.parameters()]
    decayed, plain = [s for s in slow if s.dim() > 1], [s for s in slow if s.dim() < 2]
    expected = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": plain}],
                                 weight_decay=0.0)  # fmt: skip
    optimizer = train.MasterAdamW(model, dtype, weight_decay=0.5, max_norm=0.5)
    naive = [p.detach().to(dtype) for p in slow]  # what AdamW on the bf16 weights would make of it
    before = [p.detach().clone() for p in slow], [p.clone() for p in naive]
    without_masters = torch.optim.AdamW(naive, lr=1e-6, weight_decay=0.0)
    for size, rate in ((1.0, 1e-6), (1e-5, 1e-6), (1e-5, 3e-6)):  # far above the norm, then below
        for s in slow:
            s.grad = torch.zeros_like(s)
        for _ in range(16):
            for p, s in zip(optimizer.params, slow):
                grad = (size * torch.randn(p.shape, generator=generator)).to(dtype)
                p.grad = grad if p.grad is None else p.grad + grad
                s.grad += grad
            optimizer.accumulate()
        for s, n in zip(slow, naive):
            n.grad = s.grad.to(dtype)
        without_masters.step()
        norm = sum(s.grad.square().sum() for s in slow).sqrt().item()
        for i, s in enumerate(slow):
            grad = optimizer.masters[i].grad
            assert (grad - s.grad).norm() < 1e-6 * s.grad.norm()
            s.grad *= min(1.0, 0.5 / norm)
        for group in expected.param_groups:
            group["lr"] = rate
        expected.step()
        assert optimizer.step(rate) == pytest.approx(norm, rel=1e-4)
        assert all(p.grad is None for p in [*optimizer.params, *optimizer.masters.values()])
    for i, (s, old) in enumerate(zip(slow, before[0])):
        assert optimizer.masters[i].dtype == torch.float32
        assert (optimizer.masters[i].double() - s).norm() < 0.05 * (s - old).norm()
        assert torch.equal(optimizer.params[i], optimizer.masters[i].to(dtype))
    assert moved(before[0], optimizer.masters.values()) > 0.98
    assert (moved(before[1], naive) < 0.1) == (dtype == torch.bfloat16)


def test_bf16_leaves_positions_alone(alone):
    """Rounded, the rotary frequencies would turn position 8,000 by radians, in training alone."""
    model, ids = toy_model(), torch.arange(2000)[None] % 256
    train.MasterAdamW(model, torch.bfloat16, weight_decay=0.0, max_norm=1.0)
    with torch.no_grad():  # as what evaluate.py and vLLM load
        assert torch.equal(model(ids).logits, toy_model(torch.bfloat16)(ids).logits)


def test_a_norm_that_is_not_finite_takes_no_step(alone):
    model = toy_model()
    optimizer = train.MasterAdamW(model, torch.float32, weight_decay=0.5, max_norm=1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for bad, count in ((float("nan"), 1), (float("inf"), 2), (0.1, 0)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.params[3].grad.view(-1)[5] = bad
        optimizer.step(1e-3)
        assert optimizer.skipped_in_a_row == count
        assert all(p.grad is None for p in optimizer.params)
        assert same_weights(before, model.state_dict()) == (count > 0)


def test_schedule():
    def rates(**settings):
        config = train.Config(steps=8, learning_rate=1.0, **settings)
        return [train.learning_rate(config, step) for step in range(1, 9)]

    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 5
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine[5] == pytest.approx(0.5) and cosine[7] < 0.1
    assert all(a > b > 0 for a, b in zip(cosine[2:], cosine[3:]))


def test_checkpointing_without_dropout_the_rate_and_memory_in_a_run(launch, tmp_path, monkeypatch):
    """A checkpointed model is in train mode, and must not drop anything out for that. The step's
    rate reaches Adam. Memory is given back before the engine wakes."""
    model = shutil.copytree(TOY, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.5}
    (model / "config.json").write_text(json.dumps(config))
    rates, events, step, batch_loss = [], [], train.MasterAdamW.step, train.batch_loss

    def watched(optimizer, rate):
        norm = step(optimizer, rate)
        rates.extend({group["lr"] for group in optimizer.adam.param_groups})
        return norm

    def losing(policy, *rest):
        events.append(policy.module.model.is_gradient_checkpointing and policy.training)
        return batch_loss(policy, *rest)

    monkeypatch.setattr(train.MasterAdamW, "step", watched)
    monkeypatch.setattr(train, "batch_loss", losing)
    monkeypatch.setattr(TransformersEngine, "sleep", lambda engine: events.append("asleep"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    flags = ("--algorithm grpo --updates_per_rollout 1 --steps 3 --warmup_steps 1 --schedule "
             "cosine --learning_rate 4e-4 --gradient_checkpointing True").split()  # fmt: skip
    run = launch(tmp_path / "run", "--model", model, *flags)
    assert run.code == 0 and not run.errors and rates == pytest.approx([4e-4, 4e-4, 2e-4])
    assert events == ["asleep"] + ["asleep", True, "emptied"] * 3  # the first: the trial
    assert all(m["logp_gap_max"] < 1e-4 for m in run.steps)


# ------------------------------------------------------------------------- several ranks and nodes


@pytest.fixture(scope="module")
def pair(ranks, tmp_path_factory):
    """pair(precision) -> 4 steps on two ranks."""

    @cache
    def run(precision):
        flags = ("--steps", 4, "--micro_batch_tokens", 300, "--precision", precision)
        return ranks(tmp_path_factory.mktemp(precision) / "run", *flags).result()

    return run


def shards(run):
    return [torch.load(run / f"checkpoints/step_000004/rank_{rank}.pt") for rank in (0, 1)]


def test_masters_are_sharded_and_what_all_ranks_compute_with(pair, launch, tmp_path):
    pair, one = pair("bf16"), launch(tmp_path / "one", *"--precision bf16 --steps 1".split())
    # Many micro-batches on two ranks sum to one large one, but for bf16's roundings.
    assert pair.steps[0]["grad_norm"] == pytest.approx(one.steps[0]["grad_norm"], rel=0.03)
    assert pair.code == 0 and {m["stage"] for m in pair.steps} == {1, 2}, pair.err
    assert all((m["logp_gap"] or 0) < 0.05 for m in pair.steps)
    held = [shard["optimizer"] for shard in shards(pair.folder)]
    masters = held[0]["masters"] | held[1]["masters"]
    names = [name for name, _ in toy_model().named_parameters()]
    assert len(held[0]["masters"]) + len(held[1]["masters"]) == len(masters) == len(names)
    for rank in held:  # and no moment of another rank's
        assert len(rank["adam"]["state"]) == len(rank["masters"])
        assert {s["exp_avg"].dtype for s in rank["adam"]["state"].values()} == {torch.float32}
    load = [sum(m.numel() for m in rank["masters"].values()) for rank in held]
    assert abs(load[0] - load[1]) < 0.02 * sum(load)
    for i, name in enumerate(names):  # rank 0 computes with the masters of both, rounded
        weights = pair.weights[name]
        assert weights.dtype == torch.bfloat16 and torch.equal(masters[i].bfloat16(), weights)
        assert masters[i].dtype == torch.float32 and (masters[i] != weights).any()
    before = [p.bfloat16() for p in toy_model().parameters()]
    assert moved(before, map(pair.weights.get, names)) > 0.5


def test_two_nodes_with_a_shared_output_folder_do_the_same_run(pair, torchrun, tmp_path):
    with socket.socket() as free:  # they meet at a port that was free a moment ago
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ("--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=scrpo "
             f"--local_addr=localhost --rdzv_endpoint=localhost:{port}")  # fmt: skip
    flags = "--precision fp32 --steps 4 --micro_batch_tokens 300".split()
    agents = [torchrun(tmp_path / "run", *flags, nodes=nodes) for _ in range(2)]
    said = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("the first prompt" in out for out, _ in said) == 1
    for ours, theirs in zip(shards(tmp_path / "run"), shards(pair("fp32").folder)):
        assert same_weights(ours["optimizer"]["masters"], theirs["optimizer"]["masters"])
        assert ours["pool"] == theirs["pool"] and ours["state"] == theirs["state"]
