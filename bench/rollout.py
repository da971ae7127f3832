"""Tokens per second of TransformersEngine beside `model.generate`, at equal and at spread response lengths.

    OMP_NUM_THREADS=1 python bench/rollout.py             # the toy and a random model of 100 M parameters
    OMP_NUM_THREADS=1 python bench/rollout.py --models toy --repeats 5

32 prompts x 8 samples. Both sides draw the same number of tokens for the same sample: its end-of-sequence id is
forced at a given length and forbidden before. Spread: log-normal with sigma 1, cut off at 16 times the median. `generate`
gets all 256 rows in one batch, left-padded; it returns no log-probabilities and has one random stream, the engine
returns them and has 256. Seconds are of the process's CPU time, so that a busy machine does not matter, unless there
is a GPU.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout  # noqa: E402

TOY = Path(__file__).parent.parent / "toy"
PROMPTS, SAMPLES = 32, 8


def random_model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, eos_token_id=272, max_position_embeddings=4096,
    ))  # fmt: skip


def spread_lengths(median: int) -> torch.Tensor:
    normal = torch.randn(PROMPTS * SAMPLES, generator=torch.Generator().manual_seed(0))
    lengths = (median * normal.exp()).long().clamp(1, 16 * median)
    lengths[0] = 16 * median  # the cap is reached, as one in 200 does
    return lengths


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


def with_engine(model, tokenizer, prompts, lengths, eos):
    """Sample i has seed i, by which the patched `draw` knows it wherever its row has moved to."""
    uniforms, draw, row = rollout.uniforms, rollout.draw, {}

    def seen(seeds, index):
        row["due"] = lengths[seeds] == index + 1
        return uniforms(seeds, index)

    def forced(*args, **kwargs):
        ids, logprobs = draw(*args, **kwargs)
        return torch.where(row["due"], eos, torch.where(ids == eos, 0, ids)), logprobs

    rollout.uniforms, rollout.draw = seen, forced
    try:
        engine = rollout.TransformersEngine(model, tokenizer)
        seeds = torch.arange(PROMPTS * SAMPLES).view(PROMPTS, SAMPLES).tolist()
        groups = engine.generate(prompts, SAMPLES, temperature=1.0, max_new_tokens=int(lengths.max()), seeds=seeds)
    finally:
        rollout.uniforms, rollout.draw = uniforms, draw
    assert [len(s.token_ids) for group in groups for s in group] == lengths.tolist()


def with_generate(model, tokenizer, prompts, lengths, eos):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_return_sequences=SAMPLES, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, max_new_tokens=int(lengths.max()), eos_token_id=eos, pad_token_id=0,
        logits_processor=[Forced(lengths, eos, longest)],
    )  # fmt: skip
    assert (out[:, longest:] == eos).float().argmax(-1).tolist() == (lengths - 1).tolist()


def seconds(run, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    run()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["toy", "100M"], choices=["toy", "100M"])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--median", type=int, nargs=2, default=[32, 8], help="response length, for the toy and for 100M")
    parser.add_argument("--lengths", nargs="+", default=["equal", "spread"], choices=["equal", "spread"])
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    problems = rollout.load_problems(str(TOY / "test.jsonl"))[:PROMPTS]
    prompts = [rollout.render(tokenizer, p.problem) for p in problems]
    print(f"{'model':8}{'lengths':10}{'tokens':>8}{'generate':>12}{'engine':>12}   tokens/s{'ratio':>8}")
    for name in arguments.models:
        model = AutoModelForCausalLM.from_pretrained(TOY) if name == "toy" else random_model()
        model = model.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32).eval()
        median = arguments.median[name != "toy"]
        for kind in arguments.lengths:
            lengths = spread_lengths(median) if kind == "spread" else torch.full((PROMPTS * SAMPLES,), 2 * median)
            lengths = lengths.to(model.device)
            rate = {}
            for _ in range(arguments.repeats):
                for side in (with_generate, with_engine):  # in turn, so that both meet the same machine
                    took = seconds(lambda: side(model, tokenizer, prompts, lengths, 272), cuda)
                    rate[side] = max(rate.get(side, 0), int(lengths.sum()) / took)
            theirs, ours = rate.values()
            print(f"{name:8}{kind:10}{int(lengths.sum()):8}{theirs:12,.0f}{ours:12,.0f}{ours / theirs:19.2f}", flush=True)


if __name__ == "__main__":
    main()
