"""Tokens a CPU second of TransformersEngine beside `model.generate`, at equal and spread lengths.

    OMP_NUM_THREADS=1 python bench/rollout.py                   # the toy
    OMP_NUM_THREADS=1 python bench/rollout.py MODEL --median 8  # any checkpoint's folder or hub id

32 prompts x 8 samples. Both sides draw the same number of tokens for the same sample: its
end-of-sequence id is forced at a given length and forbidden before. Equal: twice the median.
Spread: log-normal with sigma 1, cut off at 16 times the median. `generate` gets all 256 rows in one
batch and returns no log-probabilities. The sides take turns; the fastest of three rounds counts.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout

PROMPTS, SAMPLES = 32, 8


class Forced(LogitsProcessor):
    """For `generate`, whose rows stay where they are."""

    def __init__(self, lengths, eos, prompt):
        self.lengths, self.eos, self.prompt = lengths, eos, prompt

    def __call__(self, input_ids, scores):
        due = self.lengths == input_ids.shape[1] - self.prompt + 1
        scores[:, self.eos] = float("-inf")
        scores[due] = float("-inf")
        scores[due, self.eos] = 0.0
        return scores


def with_engine(model, tokenizer, prompts, lengths):
    """Sample i has seed i, by which the patched `draw` knows it wherever its row has moved to."""
    uniforms, draw, eos, row = rollout.uniforms, rollout.draw, tokenizer.eos_token_id, {}

    def seen(seeds, index):
        row["due"] = lengths[torch.from_numpy(seeds.astype("int64"))] == index + 1
        return uniforms(seeds, index)

    def forced(*args, **kwargs):
        ids, logprobs = draw(*args, **kwargs)
        return torch.where(row["due"], eos, torch.where(ids == eos, 0, ids)), logprobs

    rollout.uniforms, rollout.draw = seen, forced
    try:
        engine = rollout.TransformersEngine(model, tokenizer, max_context=2048)
        seeds = torch.arange(PROMPTS * SAMPLES).view(PROMPTS, SAMPLES).tolist()
        how = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": int(lengths.max())}
        groups = engine.generate(prompts, SAMPLES, seeds=seeds, **how)
    finally:
        rollout.uniforms, rollout.draw = uniforms, draw
    assert [len(s.token_ids) for group in groups for s in group] == lengths.tolist()


def with_generate(model, tokenizer, prompts, lengths):
    eos, longest = tokenizer.eos_token_id, max(map(len, prompts))
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    out = model.generate(
        **batch, num_return_sequences=SAMPLES, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=int(lengths.max()), eos_token_id=eos, pad_token_id=0,
        logits_processor=[Forced(lengths, eos, longest)],
    )  # fmt: skip
    assert (out[:, longest:] == eos).float().argmax(-1).tolist() == (lengths - 1).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "toy"))
    parser.add_argument("--median", type=int, default=32, help="tokens of a response")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    problems = rollout.load_problems(str(ROOT / "toy" / "test.jsonl"))
    prompts = [rollout.render(tokenizer, p.problem) for p in problems[:PROMPTS]]
    median, normal = options.median, torch.randn(PROMPTS * SAMPLES, generator=torch.manual_seed(0))
    equal = torch.full((PROMPTS * SAMPLES,), 2 * median)
    spread = (median * normal.exp()).long().clamp(1, 16 * median)
    spread[0] = 16 * median  # the cap is reached, as by one in 200
    print("| lengths | tokens | `generate`, tokens/s | engine | ratio |\n" + "| --- " * 5 + "|")
    for kind, lengths in (("equal", equal), ("spread", spread)):
        best = {}
        for side in (with_generate, with_engine) * 3:
            start = time.process_time()
            side(model, tokenizer, prompts, lengths)
            best[side] = min(best.get(side, float("inf")), time.process_time() - start)
        theirs, ours = (int(lengths.sum()) / seconds for seconds in best.values())
        print(f"| {kind} | {lengths.sum():,} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
