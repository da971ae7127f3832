"""What loss.py's log-probabilities cost, and whether its gradients are a peer's. 10 minutes, 22 GB.

    pip install -r bench/requirements.txt     # in an environment of its own: it adds TRL
    python bench/loss.py

Log-probabilities and entropy of 8,192 tokens at a vocabulary of 151,936 and hidden size 1,536,
forward and backward in fp32, on one thread: `ChunkedLogprobs` beside plain logits and log_softmax.
Then the parameter gradient of one optimizer step of two micro-batches, off-policy and with a KL
term, beside that of TRL's GRPOTrainer, for every reduction.
"""

import json
import resource
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import loss

torch.set_num_threads(1)
VOCABULARY, HIDDEN, TOKENS = 151_936, 1_536, 8_192
GROUPS, SAMPLES, LONGEST, TEMPERATURE, BETA = 16, 4, 320, 0.7, 0.04


def head():
    measured = {}
    for kind in ("plain", "lean"):  # each in a process of its own, so that the peak is its own
        command = [sys.executable, __file__, "--child", kind]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[kind] = json.loads(out)
    for name, limit, unit in (("extra memory", 0.125, "GiB"), ("time", 1.7, "s")):
        ours, theirs = measured["lean"][unit], measured["plain"][unit]
        yield (f"{name} of log-probabilities, over plain logits", f"at most {limit}",
               f"{ours / theirs:.3f}: {ours:.2f} / {theirs:.2f} {unit}")  # fmt: skip


def head_once(kind):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    start = time.process_time()
    if kind == "lean":
        logp, _ = loss.ChunkedLogprobs.apply(
            hidden, targets, weight, None, 1.0, VOCABULARY, 1024, False
        )
    else:
        log_probs = torch.log_softmax(hidden @ weight.T, dim=-1)  # the logits are not kept
        logp = log_probs.gather(1, targets[:, None]).squeeze(1)
        with torch.no_grad():
            -(log_probs.exp() * log_probs).sum(dim=-1)
    logp.mean().backward()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"GiB": (peak - before) / 2**30, "s": seconds}


def padded(rows, side="right"):
    """(ids, mask), both [S,L]."""
    ids = pad_sequence(rows, True, padding_value=-1, padding_side=side)
    return ids.clamp(min=0), (ids >= 0).long()


def gradient(reduction):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=6, head_dim=32,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
    ))  # fmt: skip
    rng = np.random.default_rng(0)
    prompts, completions = (
        [torch.tensor(rng.integers(2, 2048, n)) for n in rng.integers(4, longest, GROUPS * SAMPLES)]
        for longest in (60, LONGEST)
    )
    rewards = torch.tensor(rng.integers(0, 2, (GROUPS, SAMPLES))).float()
    advantages = loss.group_advantages(rewards).flatten()
    rows = [torch.cat(pair) for pair in zip(prompts, completions)]
    ids, attention = padded(rows)
    completion_ids, mask = padded(completions)
    prompt_ids, prompt_mask = padded(prompts, side="left")
    first = torch.tensor([len(prompt) for prompt in prompts])

    def logprobs(part):
        return loss.token_logprobs(model, ids[part], attention[part], first[part], TEMPERATURE)[0]

    with torch.no_grad():
        logp = logprobs(slice(None))
    old, ref = logp + 0.2 * torch.randn(logp.shape), logp + 0.3 * torch.randn(logp.shape)
    denominator = loss.step_denominator(mask.sum(dim=1).tolist(), reduction, LONGEST)
    for half in torch.arange(len(rows)).chunk(2):
        logp = logprobs(half)
        width = logp.shape[1]
        part, _ = loss.policy_loss(
            logp, old[half, :width], ref[half, :width], advantages[half],
            mask[half, :width], clip_low=0.2, clip_high=0.2, beta=BETA, reduction=reduction,
            denominator=denominator,
        )  # fmt: skip
        part.backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    model.zero_grad()
    theirs = trl_gradient(model, reduction, {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask,
        "completion_ids": completion_ids, "completion_mask": mask,
        "advantages": advantages, "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old, "ref_per_token_logps": ref,
    })  # fmt: skip
    cosine, ratio = torch.cosine_similarity(ours, theirs, dim=0), ours.norm() / theirs.norm()
    return (f"gradient of `{reduction}` beside TRL's", "cosine 1 - 1e-5, norm ratio 1 +- 1e-4",
            f"cosine 1 - {1 - cosine:.0e}, norm ratio 1 {ratio - 1:+.0e}")  # fmt: skip


def trl_gradient(model, reduction, rollout):
    """Of TRL's GRPOTrainer on a given rollout: all after generation and grading is its own."""

    class Given(GRPOTrainer):
        def _generate_and_score_completions(self, _):
            return dict(rollout)

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    samples, catch = GROUPS * SAMPLES, Catch()
    config = GRPOConfig(
        output_dir="/tmp/bench_loss_trl", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=samples // 2, gradient_accumulation_steps=2, max_steps=1,
        num_generations=SAMPLES, max_completion_length=LONGEST, loss_type=reduction,
        temperature=TEMPERATURE, max_grad_norm=0.0, report_to=[], save_strategy="no",
        # GRPO's k3 as it is; by default TRL multiplies it by the ratio (DeepSeek-V3.2).
        use_bias_correction_kl=False,
    )  # fmt: skip
    trainer = Given(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * samples}), callbacks=[catch],
        processing_class=AutoTokenizer.from_pretrained(ROOT / "toy"),
    )  # fmt: skip
    trainer.beta = BETA  # only now: it would load a reference, whose log-probabilities are given
    trainer.train()
    return catch.gradient


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return print(json.dumps(head_once(sys.argv[2])))
    print("| measure | must be | measured |\n| --- | --- | --- |")
    for row in chain(head(), map(gradient, loss.REDUCTIONS)):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
