"""train.py as the paper's models need it: bf16 with fp32 masters that no two ranks both hold, recomputed
activations, schedules, dropout off, several nodes."""

import json
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import TOY, same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from rollout import load_problems, render, solution_prompt, start_distributed


@pytest.fixture
def alone(monkeypatch):
    """A process group of one, as train.py's own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    start_distributed()
    yield
    dist.destroy_process_group()


def toy_model(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TOY, dtype=dtype)


def adam(model, dtype, weight_decay=0.0, max_norm=1.0):
    return train.MasterAdamW(model, dtype, weight_decay=weight_decay, max_norm=max_norm)


# ---------------------------------------------------------------------------------- gradients to try


@pytest.fixture(scope="module")
def responses():
    """128 toy prompts with an answer written out, as ids: gradients are as in training."""
    tokenizer, rows = AutoTokenizer.from_pretrained(TOY), []
    for p in load_problems(str(TOY / "train.jsonl"))[:128]:
        a, b = (part[::-1] for part in p.problem.removeprefix("Add ").split(" ")[0].split("+"))
        carry, text = 0, ""
        for step, (x, y) in enumerate(zip(a, b), 1):
            value = int(x) + int(y) + carry
            text += f"Step {step}: {x}+{y}+{carry}={value:02d}\n"
            carry = value // 10
        answer = tokenizer.encode(f"{text}\\boxed{{{p.answer}}}") + [tokenizer.eos_token_id]
        rows.append((render(tokenizer, solution_prompt(p.problem)), answer))
    return rows


def backward(model, rows) -> None:
    """Adds the gradient of a loss with advantages of both signs, as one micro-batch has it."""
    batch = train.collate([
        train.Example(0, i, 1.0 if i % 2 else -1.0, len(answer), prompt + answer, len(prompt),
                      torch.ones(len(answer), dtype=torch.bool), [0.0] * len(answer))
        for i, (prompt, answer) in enumerate(rows)
    ], "cpu")  # fmt: skip
    logp, _ = train.token_logprobs(model, batch.ids, batch.attention, batch.first)
    loss, _ = train.policy_loss(logp, logp.detach(), None, batch.advantages, batch.mask, clip_low=0.2,
                                clip_high=0.2, beta=0.0, reduction="grpo", denominator=128)  # fmt: skip
    loss.backward()


# ------------------------------------------------------------------------------------- MasterAdamW


def moved(before, after) -> float:
    """Share of single weights that changed."""
    changed = sum((a != b).sum().item() for a, b in zip(before, after))
    return changed / sum(a.numel() for a in before)


def masters_after(dtype, rows, steps=20, rate=1e-6) -> tuple[list, list]:
    """(before, after) of the masters over AdamW steps, each on other responses."""
    model = toy_model()
    optimizer = adam(model, dtype)
    before = [m.detach().clone() for m in optimizer.masters.values()]
    for step in range(steps):
        backward(model, rows[8 * step % 128 :][:8])
        optimizer.accumulate()
        optimizer.step(rate)
        if dtype == torch.bfloat16:  # what is computed with is the masters, rounded
            assert all(torch.equal(optimizer.params[i], m.bfloat16()) for i, m in optimizer.masters.items())
    return before, [m.detach() for m in optimizer.masters.values()]


def test_weights_move_in_bf16_as_they_do_in_fp32(alone, responses):
    (old, fp32), (same, bf16) = (masters_after(d, responses) for d in (torch.float32, torch.bfloat16))
    assert all(map(torch.equal, old, same)) and {m.dtype for m in bf16} == {torch.float32}
    assert moved(old, fp32) > 0.99 and moved(old, bf16) > 0.95 * moved(old, fp32)
    along = sum(((a - o) * (b - o)).sum().item() for a, b, o in zip(fp32, bf16, old))
    norms = [sum((x - o).square().sum().item() for x, o in zip(x, old)) ** 0.5 for x in (fp32, bf16)]
    assert along / norms[0] / norms[1] > 0.8  # and in the same direction
    # What masters are for: AdamW on the bf16 weights themselves leaves nearly all where they were.
    model = toy_model(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    plain = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for step in range(20):
        backward(model, responses[8 * step % 128 :][:8])
        plain.step()
        plain.zero_grad()
    assert moved(before, list(model.parameters())) < 0.1


def relative_error(got, want) -> float:
    difference = sum((g.double() - w).square().sum().item() for g, w in zip(got, want))
    return (difference / sum(w.square().sum().item() for w in want)) ** 0.5


def test_gradients_are_summed_in_fp32(alone, responses):
    """16 micro-batches' bf16 gradients, against their exact sum and as p.grad would add them up."""
    model = toy_model()
    optimizer = adam(model, torch.bfloat16)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in optimizer.params]
    naive = [torch.zeros_like(p) for p in optimizer.params]
    for k in range(16):
        backward(model, responses[8 * k :][:8])
        for p, total, rounded in zip(optimizer.params, exact, naive):
            total += p.grad
            rounded += p.grad
        optimizer.accumulate()
        assert all(p.grad is None for p in optimizer.params)  # nothing is left to be counted twice
    summed = [optimizer.masters[i].grad for i in range(len(exact))]
    assert relative_error(summed, exact) < 1e-6 and relative_error(naive, exact) > 1e-3
    optimizer.step(1e-6)
    assert all(m.grad is None for m in optimizer.masters.values())


def test_bf16_leaves_positions_alone(alone):
    """Rounded, the rotary frequencies would turn position 8,000 by radians, in training alone."""
    model, ids = toy_model(), torch.arange(2000)[None] % 256
    frequencies = model.model.rotary_emb.inv_freq.clone()
    adam(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    with torch.no_grad():  # what evaluate.py and vLLM load
        assert torch.equal(model(ids).logits, toy_model(torch.bfloat16)(ids).logits)


def test_weight_decay_is_on_matrices_only_and_at_the_steps_rate(alone):
    model = toy_model()
    optimizer = adam(model, torch.float32, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optimizer.step(0.01) == 0
    for old, new in zip(before, model.parameters()):
        decayed = old * (0.995 if old.dim() > 1 else 1.0)
        torch.testing.assert_close(new.detach(), decayed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_adamw_on_gradients_clipped_by_their_global_norm(dtype, alone):
    """Beside torch's own AdamW on float64 masters; two steps, the second one within the norm."""
    generator, model = torch.Generator().manual_seed(0), toy_model()
    slow = [p.detach().double().requires_grad_() for p in model.parameters()]
    optimizer, plain = adam(model, dtype, max_norm=0.5), torch.optim.AdamW(slow, weight_decay=0.0)
    for size, rate in ((1.0, 1e-3), (1e-5, 3e-4)):
        for p, s in zip(optimizer.params, slow):
            p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.dtype)
            s.grad = p.grad.double()
        optimizer.accumulate()
        norm = torch.stack([s.grad.square().sum() for s in slow]).sum().sqrt().item()
        for s in slow:
            s.grad *= min(1.0, 0.5 / norm)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert optimizer.step(rate) == pytest.approx(norm, rel=1e-4)
        assert all(p.grad is None for p in optimizer.params)
    for i, s in enumerate(slow):
        assert (optimizer.masters[i] - s).abs().max() < 1e-6
        torch.testing.assert_close(optimizer.params[i].float(), s.to(dtype).float(), rtol=1e-2, atol=1e-6)


def test_a_norm_that_is_not_finite_takes_no_step(alone):
    model = toy_model()
    optimizer = adam(model, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for bad, count in ((float("nan"), 1), (float("inf"), 2), (0.1, 0)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.params[3].grad.view(-1)[5] = bad
        optimizer.step(1e-3)
        assert optimizer.skipped_in_a_row == count and all(p.grad is None for p in optimizer.params)
        assert same_weights(before, model.state_dict()) == (count > 0)


def test_gradient_checkpointing_changes_no_gradient(alone, responses):
    plain, saving = toy_model().eval(), toy_model()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    saving.train()
    kept = []
    for model in (plain, saving):
        sizes = []
        pack = lambda tensor: (sizes.append(tensor.numel()), tensor)[1]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backward(model, responses[:8])
        kept.append(sum(sizes))
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.6 * kept[0]  # it did something


def test_schedule():
    def rates(**settings):
        config = train.Config(steps=8, learning_rate=1.0, **settings)
        return [train.learning_rate(config, step) for step in range(1, 9)]

    assert rates(schedule="constant") == [1.0] * 8
    assert rates(schedule="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine[5] == pytest.approx(0.5) and 0 < cosine[7] < 0.1
    assert all(a >= b for a, b in zip(cosine[1:], cosine[2:]))


def test_checkpointing_dropout_rate_and_memory_in_a_run(launch, tmp_path, monkeypatch):
    """Checkpointing is on and dropout off, though a checkpointed model is in train mode; the step's
    rate reaches Adam; memory is given back before the engine wakes."""
    model = shutil.copytree(TOY, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    rates, runs, events = [], [], []
    step, act, make_engine = train.MasterAdamW.step, train.train, train.make_engine

    def watched(optimizer, rate):
        rates.append(rate)
        norm = step(optimizer, rate)
        assert {group["lr"] for group in optimizer.adam.param_groups} == {rate}
        return norm

    def engine(*arguments, **options):
        made = make_engine(*arguments, **options)
        monkeypatch.setattr(made, "wake", lambda: events.append("awake"))
        monkeypatch.setattr(made, "sleep", lambda: events.append("asleep"))
        return made

    monkeypatch.setattr(train.MasterAdamW, "step", watched)
    monkeypatch.setattr(train, "train", lambda run: (act(run), runs.append(run)))
    monkeypatch.setattr(train, "make_engine", engine)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    flags = ("--algorithm grpo --updates_per_rollout 1 --steps 3 --warmup_steps 1 --learning_rate 4e-4 "
             "--schedule cosine --questions_per_step 8 --gradient_checkpointing True")  # fmt: skip
    run = launch(tmp_path / "run", "--model", model, *flags.split())
    assert run.code == 0 and not run.errors and rates == pytest.approx([4e-4, 4e-4, 2e-4])
    assert events == ["awake", "asleep", "emptied"] * 3
    assert runs[0].model.is_gradient_checkpointing and runs[0].model.training
    assert all(m["logp_gap_max"] < 1e-4 for m in run.steps)  # with dropout it would be large


# --------------------------------------------------------------------------- several ranks and nodes

HELD = """
original = train.train
def inspected(run):
    original(run)
    o = run.optimizer
    masters = {i: m.detach() for i, m in o.masters.items()}
    train.torch.save({"masters": masters, "weights": [p.detach() for p in o.params],
                      "adam": o.adam.state_dict()["state"]}, f"{run.output}.{rank}.held")
train.train = inspected
"""
BF16 = "--precision bf16 --steps 4".split()


@pytest.fixture(scope="module")
def two_ranks(ranks, tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("two") / "run", *BF16, patch=HELD).result()


def test_masters_are_fp32_sharded_and_what_all_ranks_compute_with(two_ranks):
    assert two_ranks.code == 0, two_ranks.err
    held = [torch.load(f"{two_ranks.folder}.{rank}.held") for rank in (0, 1)]
    weights = held[0]["weights"]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    assert all(map(torch.equal, weights, held[1]["weights"]))
    owned = [set(rank["masters"]) for rank in held]  # each by exactly one rank
    assert not owned[0] & owned[1] and owned[0] | owned[1] == set(range(len(weights)))
    for rank in held:
        for i, master in rank["masters"].items():
            assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weights[i])
            assert (master != weights[i]).any()  # it holds more than the weights do
        assert len(rank["adam"]) == len(rank["masters"])  # and no moment of another rank's parameter
        assert {state["exp_avg"].dtype for state in rank["adam"].values()} == {torch.float32}
    load = [sum(m.numel() for m in rank["masters"].values()) for rank in held]
    assert abs(load[0] - load[1]) < 0.02 * sum(load)
    assert moved([p.bfloat16() for p in toy_model().parameters()], weights) > 0.5
    assert {m["stage"] for m in two_ranks.steps} == {1, 2}
    assert all((m["logp_gap"] or 0) < 0.05 for m in two_ranks.steps)


def test_two_nodes_with_a_shared_output_folder_do_the_same_run(two_ranks, torchrun, tmp_path):
    """Two agents with a rank each, which meet at a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ("--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=scrpo --local_addr=localhost "
             f"--rdzv_endpoint=localhost:{port}")  # fmt: skip
    agents = [torchrun(tmp_path / "run", *BF16, nodes=nodes) for _ in range(2)]
    said = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("the first prompt" in out for out, _ in said) == 1
    ours, theirs = ((tmp_path / "run", two_ranks.folder))
    assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
    for name in ("rank_0.pt", "rank_1.pt"):
        saved = [torch.load(f / "checkpoints" / "step_000004" / name)["optimizer"] for f in (ours, theirs)]
        assert same_weights(saved[0]["masters"], saved[1]["masters"])
