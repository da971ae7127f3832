"""What one GPU makes of this project, in a few minutes. RESULTS.md says on which card it was run.

    python bench/gpu.py                 # prints a JSON object; --only matmul|update|engine|run: one part

1. matmul: the card's own bf16 rate, products of 8,192 x 8,192 matrices, the ceiling of all else.
2. update: train.py's update of a random model with the shape of R1-Distill-Qwen-1.5B, in bf16 with
   fp32 masters and gradient checkpointing, 16,384 tokens a micro-batch in sequences of 4,096, of which
   512 are the prompt. Its model FLOP/s (recomputation not counted) over the ceiling, and its peak
   memory over bench/plan.py's formula (without the 3 GB that it adds for CUDA and vLLM).
3. engine: the Transformers engine with the same model, 256 rows in flight.
4. run: the default run of train.py, as a user starts it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

SHAPE = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SEQUENCES, LENGTH, PROMPT = 32, 4096, 512


def seconds(action, times: int) -> float:
    """Of one call, after one that warms up."""
    action()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        action()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def matmul() -> dict:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"matmul TFLOP/s": 2 * 8192**3 / seconds(lambda: a @ b, times=20) / 1e12}


def random_model():
    from plan import SHAPES
    from transformers import Qwen2Config, Qwen2ForCausalLM

    N, D, F, K, V, _ = SHAPES[SHAPE]
    config = Qwen2Config(
        num_hidden_layers=N, hidden_size=D, intermediate_size=F, num_attention_heads=D // 128,
        num_key_value_heads=K // 128, vocab_size=V, tie_word_embeddings=False, max_position_embeddings=32_768,
    )  # fmt: skip
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config)


def update(ceiling: float) -> dict:
    from plan import SHAPES, parameters, plan
    import train

    config = train.Config(precision="bf16", micro_batch_tokens=16_384, updates_per_rollout=1)
    train.check(config)
    model = random_model()
    optimizer = train.MasterAdamW(model, torch.bfloat16, weight_decay=0.0, max_norm=1.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    policy = train.DistributedDataParallel(train.Policy(model, 1.0, config.logprob_chunk),
                                           gradient_as_bucket_view=True, broadcast_buffers=False)  # fmt: skip
    n, (N, D, _, _, V, _) = LENGTH - PROMPT, SHAPES[SHAPE]
    mask = torch.ones(n, dtype=torch.bool)
    examples = []
    for i in range(SEQUENCES):
        ids = torch.randint(V, (LENGTH,)).tolist()
        examples.append(train.Example(i // 8, i % 8, (-1.0) ** i, n, ids, PROMPT, mask, [-12.0] * n))
    step = lambda: train.update(policy, None, optimizer, config, 1, [None] * (SEQUENCES // 8), examples)  # noqa: E731
    step()
    torch.cuda.reset_peak_memory_stats()
    took, peak = seconds(step, times=2), torch.cuda.max_memory_allocated() / 1e9
    # A multiplication and an addition, forward once and backward twice: 6 a weight and token; the head
    # only for the response; causal attention 6 N D a token and position before it, on average.
    layers = parameters(*SHAPES[SHAPE]) - 2 * V * D
    flops = SEQUENCES * (LENGTH * (6 * layers + 6 * N * D * LENGTH) + n * 6 * V * D)
    settings = {"model": SHAPE, "micro_batch_tokens": 16_384, "memory_share": 0.0}
    planned = plan(settings, 1, 80)["update"] - 3.0
    return {"update tokens/s": SEQUENCES * LENGTH / took, "update model TFLOP/s": flops / took / 1e12,
            "update over matmul": flops / took / 1e12 / ceiling, "peak GB": peak, "planned GB": planned}  # fmt: skip


def engine() -> dict:
    import rollout
    from transformers import AutoTokenizer

    model = random_model().to(torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    made = rollout.make_engine("transformers", model, tokenizer, model_path="", max_context=4096)
    made.stop = set()  # random weights end nowhere
    prompts = torch.randint(270, (64, PROMPT)).tolist()
    seeds = [[rollout.sample_seed(0, 1, b, i) for i in range(4)] for b in range(64)]
    how = dict(temperature=1.0, max_new_tokens=256, seeds=seeds)
    return {"engine tokens/s, 256 rows": 256 * 256 / seconds(lambda: made.generate(prompts, 4, **how), times=1)}


def run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--output_dir", f"{folder}/run"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - start
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    return {"default run, seconds": took, "before": lines[0]["eval_accuracy"], "after": lines[-1]["eval_accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["matmul", "update", "engine", "run"])
    only = parser.parse_args().only
    sys.path.insert(0, str(ROOT))
    from rollout import start_distributed

    start_distributed()
    figures = {"card": torch.cuda.get_device_name(), "torch": torch.__version__} | matmul()
    for name, part in (("update", lambda: update(figures["matmul TFLOP/s"])), ("engine", engine), ("run", run)):
        if only in (None, name):
            figures |= part()
            torch.cuda.empty_cache()
            print(json.dumps(figures, indent=1), flush=True)


if __name__ == "__main__":
    main()
