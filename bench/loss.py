"""What loss.py costs, and whether its gradients are a peer's: ratios, each measured side by side in one run.

Seconds are CPU seconds of one thread on both sides, so that other work on the machine does not count.

    pip install -r bench/requirements.txt          # adds TRL; without it the rows beside TRL say so
    python bench/loss.py                           # all: 10 minutes of one core, 22 GB of memory
    python bench/loss.py head padding update trl gradients      # or some of them

head       one vocabulary of 151,936 at hidden size 1,536: log-probabilities and entropy of 8,192 tokens, forward
           and backward, by `ChunkedLogprobs` and by plain logits and log_softmax; each in a fresh process, fp32.
           Where memory does not suffice for the plain version, its peak is extrapolated from the two largest token
           counts that fit, in which it is linear, and the times are those of the larger.
padding    micro-batches of `deal` on log-normal lengths.
update     one whole `update` of train.py (DDP, loss, statistics, optimizer) against a bare forward, cross-entropy and
           backward of the same micro-batches, taking turns in one process.
trl        one whole update on a rollout where half of the groups are all right or all wrong, against TRL's GRPOTrainer
           with the same model, samples, and memory for a micro-batch (TRL: so many samples of the longest length).
           Neither side generates or grades anything.
gradients  the parameter gradients of one optimizer step of two micro-batches, off-policy and with a KL term, against
           TRL's.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

import loss

torch.set_num_threads(1)
VOCABULARY, HIDDEN, TOKENS = 151_936, 1_536, 8_192
GIB = 2**30
NO_TRL = "not measured: TRL is not installed"
# A small decoder with the share of its operations in the head that 1.5B models have, 10 to 15 %.
SHAPE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32,
         "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
GROUPS, SAMPLES, LONGEST, MICRO_BATCH = 16, 4, 320, 8  # MICRO_BATCH: TRL's samples


def main() -> None:
    parts = {"head": head, "padding": padding, "update": floor, "trl": peer, "gradients": gradients}
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[sys.argv[2]](*map(json.loads, sys.argv[3:]))))
        return
    print("| measure | must be | measured | how |\n| --- | --- | --- | --- |")
    for name in sys.argv[1:] or parts:
        for row in parts[name]():
            print("| " + " | ".join(row) + " |", flush=True)


def child(function, *arguments):
    """Calls a function of this file in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--child", function, *map(json.dumps, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


# --------------------------------------------------------------------------------------------------- the head alone


def head():
    memory = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    tokens = TOKENS
    # log-probabilities, then an exponential and a product for the entropy; the weight and its gradient; a reserve
    while (3 * tokens + 2 * HIDDEN) * VOCABULARY * 4 + 4 * GIB > int(memory.split()[1]) * 1024:
        tokens //= 2
    plain, lean, how = child("head_once", "plain", tokens), child("head_once", "lean", TOKENS), f"{TOKENS:,} tokens"
    peak, times = plain["gib"], (lean["seconds"], plain["seconds"])
    if tokens < TOKENS:
        half = child("head_once", "plain", tokens // 2)
        peak += (plain["gib"] - half["gib"]) * (TOKENS - tokens) / (tokens // 2)
        times = (child("head_once", "lean", tokens)["seconds"], plain["seconds"])
        how += f"; plain extrapolated from {half['gib']:.2f} and {plain['gib']:.2f} at {tokens // 2:,} and {tokens:,}"
    yield ("peak extra memory of log-probabilities, forward + backward, over plain logits", "at most 0.125",
           f"{lean['gib'] / peak:.3f}", f"{lean['gib']:.2f} / {peak:.2f} GiB; fp32, {how}")  # fmt: skip
    yield ("time of the same", "at most 1.7", f"{times[0] / times[1]:.2f}",
           f"{times[0]:.1f} / {times[1]:.1f} s at {tokens:,} tokens")  # fmt: skip


def head_once(kind, tokens):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,))
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    start = time.process_time()
    if kind == "lean":
        logp, _ = loss.ChunkedLogprobs.apply(hidden, weight, None, targets, 1.0, 1024)
    else:
        log_probs = torch.log_softmax(hidden @ weight.T, dim=-1)  # the logits are not kept
        logp = log_probs.gather(1, targets[:, None]).squeeze(1)
        with torch.no_grad():
            -(log_probs.exp() * log_probs).sum(dim=-1)
    logp.mean().backward()
    seconds = time.process_time() - start
    return {"gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / GIB, "seconds": seconds}


# --------------------------------------------------------------------------------------------------------- padding


def padding(budget=16_384):
    shares, counts = [], []
    for seed in range(20):
        drawn = np.exp(np.random.default_rng(seed).normal(math.log(1000), 0.8, 512))
        lengths = drawn.clip(1, 8192).astype(int).tolist()
        (hand,) = loss.deal(lengths, ranks=1, budget=budget)
        cells = sum(len(part) * max(lengths[i] for i in part) for part in hand)
        shares.append(1 - sum(lengths) / cells)
        counts.append(len(hand) / (sum(lengths) / budget))
    how = "20 draws of 512 lengths, median 1,000, sigma 0.8, cap 8,192; budget 16,384"
    worst = f"{100 * np.mean(shares):.1f} %, worst {100 * max(shares):.1f} %"
    yield "padding in micro-batches", "at most 5 %", worst, how
    yield "micro-batches over tokens / budget", "at most 1.2", f"{np.mean(counts):.2f}, worst {max(counts):.2f}", how


# ------------------------------------------------------------------------------------------------ a synthetic rollout


def random_rollout(seed=0):
    """Prompts, completions of uneven lengths, and rewards [GROUPS,SAMPLES], half of whose groups are equal."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 2048, rng.integers(20, 60)).tolist() for _ in range(GROUPS)]
    lengths = np.exp(rng.normal(math.log(80), 0.8, (GROUPS, SAMPLES))).clip(4, LONGEST).astype(int)
    completions = [[rng.integers(2, 2048, n).tolist() for n in row] for row in lengths]
    rewards = torch.zeros(GROUPS, SAMPLES)
    rewards[: GROUPS // 4] = 1  # all right; the next quarter all wrong
    rewards[GROUPS // 2 :, 0] = 1
    rewards[GROUPS // 2 :: 2, 1] = 1
    return prompts, completions, rewards


def random_model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False))


def most_tokens():
    """Memory for one micro-batch on both sides: MICRO_BATCH samples of the longest prompt and completion."""
    prompts, completions, _ = random_rollout()
    return MICRO_BATCH * (max(map(len, prompts)) + max(len(c) for row in completions for c in row))


def our_run():
    """What train.py's `update` needs of a run, without engine, grader or files, and the rollout as its examples."""
    import train

    rank, world, device = train.start_distributed()
    config = train.Config(group_size=SAMPLES, questions_per_step=GROUPS, updates_per_rollout=1, max_new_tokens=LONGEST,
                          micro_batch_tokens=most_tokens(), learning_rate=1e-5, importance_cap=0.0)  # fmt: skip
    train.check(config)
    model = random_model()
    optimizer = train.MasterAdamW(model, torch.float32, config, rank, world)
    policy = train.Policy(model, config.temperature, config.logprob_chunk)
    policy = train.DistributedDataParallel(policy, gradient_as_bucket_view=True, broadcast_buffers=False)
    run = SimpleNamespace(config=config, rank=rank, world=world, device=device, optimizer=optimizer, policy=policy,
                          reference=None, state=SimpleNamespace(nonfinite_in_a_row=0))  # fmt: skip
    return train, run, model


def our_examples(train, mixed):
    """The rollout as train.py's `update` takes it; `mixed` gives every group right and wrong answers."""
    prompts, completions, rewards = random_rollout()
    if mixed:
        rewards[:, 0], rewards[:, 1] = 1, 0
    groups = [
        train.Group("", "", prompt, [train.Sample(ids, [0.0] * len(ids), "", True) for ids in row], [], [])
        for prompt, row in zip(prompts, completions)
    ]
    lengths = [[len(ids) for ids in row] for row in completions]
    masks = [[torch.ones(n, dtype=torch.bool) for n in row] for row in lengths]
    return train.make_examples(groups, loss.group_advantages(rewards), masks, lengths)


def timed(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


# ---------------------------------------------------------------------------------------- an update and its floor


def floor():
    ours, bare = child("update_and_floor")
    yield ("one update, over bare forward + cross-entropy + backward of the same micro-batches", "at most 1.15",
           f"{ours / bare:.2f}", f"{ours:.2f} / {bare:.2f} s, medians of 5; optimizer and statistics on our side only")


def update_and_floor():
    train, run, model = our_run()
    examples = our_examples(train, mixed=True)
    (hand,) = loss.deal([len(e.ids) for e in examples], 1, run.config.micro_batch_tokens)
    batches = [train.collate([examples[i] for i in part], run.device) for part in hand]

    def bare():
        for batch in batches:
            logits = model(input_ids=batch.ids, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten()).backward()
        model.zero_grad()

    times = [(timed(train.update, run, 1, GROUPS, examples), timed(bare)) for _ in range(6)][1:]
    return [float(np.median(column)) for column in zip(*times)]


# ---------------------------------------------------------------------------------------------------- beside TRL


def peer():
    row = ("one whole update, half of the groups all right or all wrong, over TRL's GRPOTrainer", "at most 0.5")
    if not find_spec("trl"):
        yield (*row, NO_TRL, "")
        return
    turns = [(child("our_updates"), child("trl_updates")) for _ in range(2)]
    ours, theirs = (min(turn[side] for turn in turns) for side in (0, 1))
    yield (*row, f"{ours / theirs:.2f}", f"{ours:.2f} / {theirs:.2f} s, best of 2 processes' medians of 3; "
           f"{GROUPS} x {SAMPLES} samples, TRL {MICRO_BATCH} a micro-batch")  # fmt: skip


def our_updates():
    train, run, _ = our_run()
    examples = our_examples(train, mixed=False)
    return float(np.median([timed(train.update, run, 1, GROUPS, examples) for _ in range(4)][1:]))


def trl_trainer(model, inputs, loss_type, steps, callback, temperature=1.0, beta=0.0, micro_batch=MICRO_BATCH):
    """TRL's GRPOTrainer on a rollout that is given: everything after generation and grading is its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class Given(GRPOTrainer):
        def _generate_and_score_completions(self, _):
            return dict(inputs)

    samples = len(inputs["advantages"])
    config = GRPOConfig(
        output_dir="/tmp/bench_loss_trl", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=samples // micro_batch,
        num_generations=SAMPLES, max_completion_length=LONGEST, loss_type=loss_type, temperature=temperature,
        use_bias_correction_kl=False,  # GRPO's k3 as it is; by default TRL multiplies it by the ratio (DeepSeek-V3.2)
        max_steps=steps, learning_rate=1e-5, lr_scheduler_type="constant", max_grad_norm=0.0 if beta else 1.0,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Given(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, callbacks=[callback],
        train_dataset=Dataset.from_dict({"prompt": ["x"] * 64}),
        processing_class=AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "toy"),
    )  # fmt: skip
    trainer.beta = beta  # after construction, so that it loads no reference: the log-probabilities are given
    return trainer


def trl_inputs():
    """The rollout as TRL holds it: prompts padded on the left, completions on the right."""
    prompts, completions, rewards = random_rollout()
    prompts = [torch.tensor(prompt) for prompt in prompts for _ in range(SAMPLES)]
    completions = [torch.tensor(ids) for row in completions for ids in row]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {"advantages": loss.group_advantages(rewards).flatten()}
    for name, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        inputs[f"{name}_ids"] = pad(rows, batch_first=True, padding_side=side)
        inputs[f"{name}_mask"] = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def trl_updates():
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times = []

        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            self.times.append(time.process_time() - self.start)

    clock = Clock()
    trl_trainer(random_model(), trl_inputs(), "grpo", 4, clock).train()
    return float(np.median(clock.times[1:]))


# ----------------------------------------------------------------------------------------------------- gradients


def gradients():
    for reduction in loss.REDUCTIONS:
        row = (f"parameter gradient of `{reduction}` beside TRL's", "cosine at least 0.99999, norm ratio within 1e-4")
        if not find_spec("trl"):
            yield (*row, NO_TRL, "")
            continue
        cosine, ratio = child("gradient_agreement", reduction)
        yield (*row, f"cosine 1 - {1 - cosine:.0e}, norm ratio 1 {'-' if ratio < 1 else '+'} {abs(ratio - 1):.0e}",
               "fp32, off-policy, beta 0.04, temperature 0.7, two micro-batches on each side")  # fmt: skip


def gradient_agreement(reduction):
    from transformers import TrainerCallback

    inputs, generator = trl_inputs(), torch.Generator().manual_seed(1)
    model = random_model()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    keep = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    rows = [row[kept] for row, kept in zip(ids, keep)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # ours: everything padded on the right
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    first, mask = inputs["prompt_mask"].sum(dim=1), inputs["completion_mask"]
    with torch.no_grad():
        logp, _ = loss.token_logprobs(model, ids, attention, first, temperature=0.7)
    old = logp + 0.2 * torch.randn(logp.shape, generator=generator)
    ref = logp + 0.3 * torch.randn(logp.shape, generator=generator)

    halves = torch.arange(len(rows)).chunk(2)
    denominator = loss.step_denominator(mask.sum(dim=1).tolist(), reduction, LONGEST)
    for half in halves:
        logp, _ = loss.token_logprobs(model, ids[half], attention[half], first[half], temperature=0.7)
        width = logp.shape[1]
        part, _ = loss.policy_loss(
            logp, old[half, :width], ref[half, :width], inputs["advantages"][half], mask[half, :width], clip_low=0.2,
            clip_high=0.2, beta=0.04, reduction=reduction, denominator=denominator,
        )  # fmt: skip
        part.backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    model.zero_grad()

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    catch = Catch()
    given = {**inputs, "old_per_token_logps": old, "ref_per_token_logps": ref}
    trl_trainer(model, given, reduction, 1, catch, temperature=0.7, beta=0.04, micro_batch=len(rows) // 2).train()
    return F.cosine_similarity(ours, catch.gradient, dim=0).item(), (ours.norm() / catch.gradient.norm()).item()


if __name__ == "__main__":
    main()
