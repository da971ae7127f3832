"""train.py as the paper's models need it: bf16 with fp32 masters that no two ranks both hold, checkpointing,
several nodes, schedules, the settings files, and what bench/plan.py says of their memory."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import yaml
from bench import plan
from conftest import RANK_VARIABLES, ROOT, TINY, Result, same_weights
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import train
from evaluate import start_distributed
from rollout import load_problems, render, solution_prompt

TOY = ROOT / "toy"
CONSTANT = (
    "--schedule",
    "constant",
)  # a cosine's length is part of the run, so it could not be resumed to a later step


@pytest.fixture
def alone():
    """A process group of one, as train.py's own."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    yield start_distributed()
    dist.destroy_process_group()
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


def toy_model(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TOY, dtype=dtype)


def settings(*flags):
    return train.parse([str(flag) for flag in flags])


# ------------------------------------------------------------------------------------------ gradients to try


@pytest.fixture(scope="module")
def responses():
    """128 toy prompts with their answers written out, as ids: gradients are as in training."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    rows = []
    for p in load_problems(str(TOY / "train.jsonl"))[:128]:
        prompt = render(tokenizer, solution_prompt(p.problem))
        a, b = (part[::-1] for part in p.problem.removeprefix("Add ").split(" ")[0].split("+"))
        carry, lines = 0, []
        for step, (x, y) in enumerate(zip(a, b), 1):
            value = int(x) + int(y) + carry
            lines.append(f"Step {step}: {x}+{y}+{carry}={value:02d}\n")
            carry = value // 10
        rows.append(
            (prompt, tokenizer.encode("".join(lines) + f"\\boxed{{{p.answer}}}") + [tokenizer.eos_token_id])
        )
    return rows


def backward(model, rows) -> None:
    """Adds the gradient of a loss with advantages of both signs, as one micro-batch has it."""
    batch = train.collate(
        [
            train.Example(
                0,
                1.0 if i % 2 else -1.0,
                len(answer),
                prompt + answer,
                len(prompt),
                torch.ones(len(answer), dtype=torch.bool),
                [0.0] * len(answer),
            )
            for i, (prompt, answer) in enumerate(rows)
        ],
        "cpu",
    )
    logp, _ = train.token_logprobs(model, batch.ids, batch.attention, batch.first)
    loss, _ = train.policy_loss(
        logp,
        logp.detach(),
        None,
        batch.advantages,
        batch.mask,
        clip_low=0.2,
        clip_high=0.2,
        beta=0.0,
        reduction="grpo",
        denominator=128,
    )
    loss.backward()


# ------------------------------------------------------------------------------------------------- precision


def moved(before, after) -> float:
    """Share of single weights that changed."""
    return sum((a != b).sum().item() for a, b in zip(before, after)) / sum(a.numel() for a in before)


def masters_after(dtype, rows, steps, learning_rate) -> tuple[list, list]:
    """(before, after) of the masters over `steps` AdamW steps, each on other responses."""
    model = toy_model()
    optimizer = train.MasterAdamW(model, dtype, settings(), 0, 1)
    before = [m.detach().clone() for m in optimizer.masters.values()]
    for step in range(steps):
        backward(model, rows[8 * step % 128 :][:8])
        optimizer.accumulate()
        optimizer.step(learning_rate)
    return before, [m.detach() for m in optimizer.masters.values()]


def test_weights_move_in_bf16_as_they_do_in_fp32(alone, responses):
    (old, fp32), (_, bf16) = (
        masters_after(dtype, responses, 20, 1e-6) for dtype in (torch.float32, torch.bfloat16)
    )
    assert moved(old, fp32) > 0.99
    assert moved(old, bf16) > 0.95 * moved(old, fp32)
    along = sum(((a - o) * (b - o)).sum().item() for a, b, o in zip(fp32, bf16, old))
    norms = [sum((x - o).square().sum().item() for x, o in zip(new, old)) ** 0.5 for new in (fp32, bf16)]
    assert along / norms[0] / norms[1] > 0.8  # and in the same direction
    # What masters are for: AdamW on the bf16 weights themselves leaves nearly all of them where they were.
    model = toy_model(torch.bfloat16)
    before, adam = (
        [p.detach().clone() for p in model.parameters()],
        torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0),
    )
    for step in range(20):
        backward(model, responses[8 * step % 128 :][:8])
        adam.step()
        adam.zero_grad()
    assert moved(before, list(model.parameters())) < 0.1


def relative_error(got, want) -> float:
    difference = sum((g.double() - w).square().sum().item() for g, w in zip(got, want))
    return (difference / sum(w.square().sum().item() for w in want)) ** 0.5


def accumulation_errors(rows, count=16) -> tuple[float, float]:
    """Relative errors of the sum of `count` micro-batches' bf16 gradients, against their exact sum:
    (as MasterAdamW sums them, as p.grad would in bf16)."""
    model = toy_model()
    optimizer = train.MasterAdamW(model, torch.bfloat16, settings(), 0, 1)
    params = optimizer.params
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    naive = [torch.zeros_like(p) for p in params]
    for k in range(count):
        backward(model, rows[8 * k :][:8])
        for p, total, rounded in zip(params, exact, naive):
            total += p.grad
            rounded += p.grad
        optimizer.accumulate()
        assert all(
            p.grad is None for p in params
        )  # nothing is left to be counted twice, or to hold DDP's first buckets
    return relative_error([m.grad for m in optimizer.masters.values()], exact), relative_error(naive, exact)


def test_gradients_are_summed_in_fp32(alone, responses):
    summed, naive = accumulation_errors(responses)
    assert summed < 1e-6 and naive > 1e-3, (summed, naive)


def test_bf16_leaves_positions_alone(alone):
    """Rounded to bf16, the rotary frequencies would turn position 8,000 by radians, in training alone."""
    model, ids = toy_model(), torch.arange(2000)[None] % 256
    frequencies = model.model.rotary_emb.inv_freq.clone()
    train.MasterAdamW(model, torch.bfloat16, settings(), 0, 1)
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    with torch.no_grad():
        assert torch.equal(
            model(ids).logits, toy_model(torch.bfloat16)(ids).logits
        )  # what evaluate.py and vLLM load


def test_weight_decay_is_on_matrices_only_and_at_the_steps_rate(alone):
    model = toy_model()
    optimizer = train.MasterAdamW(model, torch.float32, settings("--weight_decay", 0.5), 0, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.01)
    for old, new in zip(before, model.parameters()):
        torch.testing.assert_close(new.detach(), old * (0.995 if old.dim() > 1 else 1.0), rtol=1e-6, atol=0)


def test_checkpointing_changes_no_gradient(alone, responses):
    plain, saving = toy_model().eval(), toy_model()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saving.train()
    kept = []
    for model in (plain, saving):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            backward(model, responses[:8])
        kept.append(sum(sizes))
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)
    assert kept[1] < 0.6 * kept[0]  # it did something


def test_train_py_switches_checkpointing_on(launch, tmp_path, monkeypatch):
    seen, original = [], train.train
    monkeypatch.setattr(train.Grader, "verdicts", coin)
    monkeypatch.setattr(
        train,
        "train",
        lambda run: (original(run), seen.append(run.model.is_gradient_checkpointing and run.model.training)),
    )
    assert launch(tmp_path / "run", "--gradient_checkpointing", "--steps", 1).code == 0 and seen == [True]


# ------------------------------------------------------------------------------------------------- schedules


def coin(self, responses, golds):
    """In a grader's place where rightness does not matter: quick, and a random model's groups differ too."""
    return ["right" if sum(map(ord, response)) % 3 == 0 else "wrong" for response in responses]


def test_the_scheduled_rate_reaches_adam(launch, tmp_path, monkeypatch):
    rates, original = [], train.MasterAdamW.step
    monkeypatch.setattr(train.Grader, "verdicts", coin)
    monkeypatch.setattr(
        train.MasterAdamW,
        "step",
        lambda self, rate: (
            original(self, rate),
            rates.append([group["lr"] for group in self.adam.param_groups]),
        )[0],
    )
    flags = ("--updates_per_rollout", 1, "--steps", 5, "--warmup_steps", 2, "--learning_rate", 4e-4)
    launch(tmp_path / "cosine", *flags, "--schedule", "cosine")
    want = [2e-4, 4e-4, 4e-4, 3e-4, 1e-4]  # half a cosine over the three steps after the warm-up: 1, 3/4, 1/4
    assert rates == [[pytest.approx(rate)] * 2 for rate in want]
    del rates[:]
    launch(tmp_path / "constant", *flags, "--schedule", "constant")
    assert rates == [[pytest.approx(rate)] * 2 for rate in (2e-4, 4e-4, 4e-4, 4e-4, 4e-4)]


def test_memory_is_free_before_the_engine_wakes(launch, tmp_path, monkeypatch):
    """vLLM's wake-up takes memory past torch's allocator, which keeps what the update freed until told."""
    events, update, make_engine = [], train.update, train.make_engine
    monkeypatch.setattr(train.Grader, "verdicts", coin)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    monkeypatch.setattr(train, "update", lambda *a: (update(*a), events.append("updated"))[0])

    def engine(*arguments, **options):
        made = make_engine(*arguments, **options)
        monkeypatch.setattr(made, "wake", lambda: events.append("awake"))
        return made

    monkeypatch.setattr(train, "make_engine", engine)
    launch(tmp_path / "run", "--steps", 2)
    assert events == ["awake", "emptied", "updated"] * 2


# ----------------------------------------------------------------------------------- several ranks and nodes

# train.py, and at the end what each rank holds. argv[1]: where to write it.
INSPECTED = """
import sys, torch, train
where, original = sys.argv.pop(1), train.train
def inspected(run):
    original(run)
    o = run.optimizer
    masters = {i: m.detach() for i, m in o.masters.items()}
    torch.save({"masters": masters, "weights": [p.detach() for p in o.params],
                "adam": o.adam.state_dict()["state"]}, f"{where}/rank_{run.rank}.pt")
train.train = inspected
train.main()
"""


class Agent:
    """torchrun of one node in a folder of its own: with a relative --output_dir, a file system of its own."""

    def __init__(self, folder, launch, script, *flags):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launch,
            script,
            folder,
            *TINY,
            *CONSTANT,
            "--output_dir",
            "run",
            "--samples_per_step",
            -1,
            "--precision",
            "bf16",
            *flags,
        ]
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def result(self) -> Result:
        try:
            out, err = self.process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGTERM)
            out, err = self.process.communicate()
        return Result(self.process.returncode, out, err, self.folder / "run")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "inspected.py"
    path.write_text(INSPECTED)
    return path


@pytest.fixture(scope="module")
def one_agent(script, tmp_path_factory):
    """Six steps in bf16 by one agent with two ranks."""
    return Agent(
        tmp_path_factory.mktemp("one") / "node", ["--standalone", "--nproc_per_node=2"], script
    ).result()


def two_agents(script, folders, *flags) -> list[Result]:
    """The same by two agents with a rank each, which meet at a port that was free a moment ago."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
        "--rdzv_id=scrpo",
        "--local_addr=localhost",
    ]
    agents = [Agent(folder, launch, script, *flags) for folder in folders]
    return [agent.result() for agent in agents]


@pytest.fixture(scope="module")
def two_nodes(script, tmp_path_factory):
    """Three steps by two agents on separate file systems; first the node that the rendezvous gave rank 0."""
    home = tmp_path_factory.mktemp("two")
    results = two_agents(script, [home / "a", home / "b"], "--steps", 3)
    assert [r.code for r in results] == [0, 0], results[0].err + results[1].err
    return sorted(results, key=lambda r: not (r.folder / "settings.json").exists())


def held(*folders) -> list[dict]:
    return [torch.load(folder.parent / f"rank_{rank}.pt") for rank, folder in enumerate(folders)]


def test_masters_are_fp32_sharded_and_what_all_ranks_compute_with(one_agent):
    assert one_agent.code == 0, one_agent.err
    ranks = held(one_agent.folder, one_agent.folder)
    weights = ranks[0]["weights"]
    assert {p.dtype for p in weights} == {torch.bfloat16} and all(
        map(torch.equal, weights, ranks[1]["weights"])
    )
    owned = [set(rank["masters"]) for rank in ranks]
    assert not owned[0] & owned[1] and owned[0] | owned[1] == set(
        range(len(weights))
    )  # each by exactly one rank
    for rank in ranks:
        for place, (i, master) in enumerate(rank["masters"].items()):
            assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weights[i])
            assert (master != weights[i]).any()  # it holds more than the weights do
        assert len(rank["adam"]) == len(rank["masters"])  # and no moment of another rank's parameter
        assert {state["exp_avg"].dtype for state in rank["adam"].values()} == {torch.float32}
    load = [sum(m.numel() for m in rank["masters"].values()) for rank in ranks]
    assert abs(load[0] - load[1]) < 0.02 * sum(load)
    start = [p.bfloat16() for p in toy_model().parameters()]
    assert moved(start, weights) > 0.5  # at the toy's rate; it trains
    assert all(0 < m["grad_norm"] < 5 and m["logp_gap"] < 0.05 for m in one_agent.steps)
    assert {m["stage"] for m in one_agent.steps} == {1, 2}


def test_two_nodes_on_separate_disks_do_the_same_run(one_agent, two_nodes):
    first, second = two_nodes
    assert first.comparable() == one_agent.comparable()[:4]
    assert first.samples == [line for line in one_agent.samples if line["step"] <= 3]
    kept = {path.relative_to(second.folder).as_posix() for path in second.folder.rglob("*") if path.is_file()}
    assert kept == {
        f"checkpoints/step_000003/rank_1.{end}" for end in ("pt", "sha256")
    }  # all else is rank 0's
    a, b = held(first.folder, second.folder)
    assert all(map(torch.equal, a["weights"], b["weights"]))


@pytest.mark.slow
def test_two_nodes_resume_on_separate_disks(one_agent, two_nodes, script):
    swapped = two_agents(script, [r.folder.parent for r in reversed(two_nodes)], "--resume")
    assert not (two_nodes[1].folder / "settings.json").exists()  # rank 0 did not begin again on the other node
    if swapped[0].code or swapped[1].code:  # unless the rendezvous gave rank 0 its old node although it came last
        assert any("rank 0 must be on the node it was on" in line for r in swapped for line in r.errors)
        assert len(two_nodes[0].metrics) == 4  # nothing was touched
    first, second = two_agents(script, [r.folder.parent for r in two_nodes], "--resume")
    assert first.code == second.code == 0, first.err
    assert first.comparable() == one_agent.comparable() and first.samples == one_agent.samples
    assert same_weights(first.weights, one_agent.weights)


# ---------------------------------------------------------------------------------------- the settings files

FILES = sorted((ROOT / "configs").glob("*.yaml"))
SPECIAL = {  # (special tokens, the last one padding; end of a response; template), as the models have them
    "deepseek-ai": (
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
        "<｜end▁of▁sentence｜>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>"
        "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    ),
    "Qwen": (
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
}


def shrunken(model_id, folder):
    """A random model of the same architecture and the same kind of tokenizer: bytes, special tokens,
    template, and an embedding that is padded beyond them."""
    special, end, template = SPECIAL[model_id.split("/")[0]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate([*alphabet, *special])}, merges=[])
    )
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=end,
        pad_token=special[-1],
        bos_token=special[0],
        additional_special_tokens=special,
    )
    tokenizer.add_tokens(
        [AddedToken(word, special=False) for word in ("<think>", "</think>")]
    )  # not special, as in the models
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    shape = plan.SHAPES[model_id]
    shape = plan.qwen2(64, 2, 4, 2, 128, 288, shape["tie_word_embeddings"], shape["max_position_embeddings"])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=tokenizer.eos_token_id)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    return {
        name: shrunken(name, tmp_path_factory.mktemp(name.split("/")[1]))
        for name in {yaml.safe_load(file.read_text()).get("model") for file in FILES} - {None}
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_settings_file_runs_end_to_end(file, small_models, launch, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Grader, "verdicts", coin)
    named = yaml.safe_load(file.read_text())
    seen, original = [], train.train
    monkeypatch.setattr(train, "train", lambda run: (seen.append(run), original(run)))
    # A real model, vLLM and the hub are not to be had here; lengths are cut to what a random model is worth.
    flags = ["--steps", 1, "--eval_questions", 4, "--max_new_tokens", 32, "--questions_per_step", 4]
    if "model" in named:
        flags += [
            "--model",
            small_models[named["model"]],
            "--rollout",
            "transformers",
            "--train_data",
            TOY / "train.jsonl",
            "--eval_data",
            TOY / "test.jsonl",
        ]
    result = launch(tmp_path / "run", *flags, tiny=False, settings=[file])
    assert result.code == 0, result.err
    (step,), (run,) = result.steps, seen
    assert (
        step["loss_tokens"] > 0
        and step["grad_norm"] > 0
        and (step["kl"] is not None) == bool(named.get("beta"))
    )
    assert (
        run.config.learning_rate == float(named["learning_rate"])
        and run.config.pool_trigger == named["pool_trigger"]
    )
    assert run.optimizer.bf16 == (named.get("precision") == "bf16")
    assert AutoModelForCausalLM.from_pretrained(result.folder / "final").dtype == (
        torch.bfloat16 if run.optimizer.bf16 else torch.float32
    )
    if "model" in named and named["model"].startswith("deepseek"):
        assert {line["prompt"][-25:] for line in result.samples} == {INSTRUCTED}
        assert all(line["response"].startswith("<think>\n") for line in result.samples)


INSTRUCTED = "\\boxed{}.<｜Assistant｜><think>\n"[-25:]


def test_a_reasoning_model_goes_through_both_stages(small_models, launch, tmp_path, monkeypatch):
    """Errors of a model whose template opens its thinking: only what follows it goes into the user turn."""
    monkeypatch.setattr(train.Grader, "verdicts", coin)
    model = small_models["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
    result = launch(
        tmp_path / "run",
        "--model",
        model,
        "--steps",
        8,
        "--questions_per_step",
        4,
        "--pool_trigger",
        4,
        "--max_new_tokens",
        100,
        "--precision",
        "bf16",
        "--samples_per_step",
        -1,
        "--min_variance",
        0,
    )
    assert result.code == 0, result.err
    first, corrections = ([line for line in result.samples if line["stage"] == stage] for stage in (1, 2))
    thought = [line["response"].rpartition("</think>") for line in first]
    shown = {prompt for prompt in (line["prompt"] for line in corrections)}
    assert shown
    for prompt in shown:
        assert "</think>" not in prompt and prompt.endswith(INSTRUCTED)
        assert any(
            closed and answer.strip() and f"Wrong solution:\n{answer.strip()}" in prompt
            for _, closed, answer in thought
        )


def test_every_setting_names_its_source():
    for file in FILES[:-1]:  # the last is the toy, all of whose values are ours
        shown = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        free = (
            "model:",
            "algorithm:",
            "rollout:",
            "precision:",
            "eval_data:",
            "eval_questions:",
            "save_every:",
        )
        assert all("# " in line or line.startswith(free) for line in shown), file


# ------------------------------------------------------------------------------------------- the memory plan


def totals(file, *flags, machine=None) -> dict[str, float]:
    """GB of each phase."""
    config = settings(ROOT / "configs" / file, *flags)
    ranks, gpu_gb = machine or plan.SETTINGS[file]
    return {
        phase: sum(parts.values()) / 1e9
        for phase, parts in plan.plan(config, plan.read_shape(config.model), ranks, gpu_gb * 1e9).items()
    }


def test_every_settings_file_fits_its_machine_by_plan():
    assert {file.name for file in FILES} == set(plan.SETTINGS)
    assert plan.SETTINGS["r1_distill_1.5b_8gpu.yaml"] == (8, 40) and plan.SETTINGS[
        "r1_distill_7b_8gpu.yaml"
    ] == (8, 80)
    for file, (_, gpu_gb) in plan.SETTINGS.items():
        if gpu_gb:
            assert max(totals(file).values()) <= gpu_gb, file


def test_the_plan_knows_what_does_not_fit():
    assert max(totals("r1_distill_7b_8gpu.yaml", machine=(8, 40)).values()) > 40
    assert max(totals("r1_distill_7b_8gpu.yaml", "--beta", 0.001).values()) > 80  # a reference model
    assert totals("r1_distill_7b_8gpu.yaml", "--gradient_checkpointing", "false")["update"] > 80
    assert totals("r1_distill_1.5b_8gpu.yaml", machine=(1, 40))["update"] > 40  # one rank holds all masters


def test_the_plans_parts():
    name = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    parameters, shard = plan.shards(plan.read_shape(name), settings(), True, 8)
    assert (
        parameters == 7_615_616_512
        and plan.shards(plan.read_shape(name.replace("7B", "1.5B")), settings(), True, 1)[0] == 1_777_088_000
    )
    assert parameters / 8 <= shard < 1.1 * parameters / 8  # 545 M of each embedding cannot be divided
    phases = plan.plan(settings(ROOT / "configs" / "r1_distill_7b_8gpu.yaml"), plan.read_shape(name), 8, 80e9)
    sampling, update = phases["sampling"], phases["update"]
    assert (
        update["weights"]
        == update["gradients, in DDP's buckets"]
        == sampling["vLLM: weights"]
        == 2 * parameters
    )
    assert (
        update["Adam's moments, shard"]
        == 2 * update["master weights, shard"]
        == 2 * update["gradient sum, shard"]
        == 8 * shard
    )
    assert sum(
        value for part, value in sampling.items() if part[:5] == "vLLM:" and "graphs" not in part
    ) == pytest.approx(0.4 * 80e9)
    assert (
        "vLLM: cache" not in update and "gradient sum, shard" not in sampling
    )  # they are not there at the same time


@pytest.mark.slow
def test_the_plan_is_right_within_a_tenth(capsys):
    assert plan.check(), capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- accuracy


def late_accuracy(launch, folder, precision, seed) -> float:
    """Of the last two steps in stage 1; the toy starts at 0.4."""
    result = launch(
        folder,
        "--precision",
        precision,
        "--seed",
        seed,
        "--steps",
        8,
        "--questions_per_step",
        32,
        "--pool_trigger",
        32,
        "--save_every",
        99,
    )
    return sum([m["accuracy"] for m in result.steps if m["stage"] == 1][-2:]) / 2


@pytest.mark.slow
def test_bf16_learns_as_fast_as_fp32(launch, tmp_path):
    end = {
        p: torch.tensor([late_accuracy(launch, tmp_path / f"{p}{seed}", p, seed) for seed in range(3)])
        for p in ("fp32", "bf16")
    }
    assert end["fp32"].mean() > 0.55
    noise = (
        (end["fp32"].var() + end["bf16"].var() + 2 * 0.02**2) / 3
    ).sqrt()  # 0.02: of one run's 512 samples
    assert (end["fp32"].mean() - end["bf16"].mean()).abs() < 3 * noise, end
