"""What one GPU makes of this project, in eight minutes: `python bench/gpu.py` prints a JSON object.

1. The card's own bf16 rate, products of 8,192 x 8,192 matrices: the ceiling of all else.
2. train.py's update of a random model shaped as R1-Distill-Qwen-1.5B, bf16, fp32 masters, with
   --compile and --gradient_checkpointing, micro-batches of 4 x 4,096 tokens, 512 of them prompt:
   its model FLOP/s (without recomputation), their share of that rate, and its peak memory beside
   bench/plan.py's estimate (both without its 3 GB for CUDA and vLLM).
3. The Transformers engine with the same model, 256 rows in flight.
4. The default run of train.py, as a user starts it.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import plan
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout, train  # noqa: E402, E401

SHAPE = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
N, D, F, K, V, _ = plan.SHAPES[SHAPE]
SEQUENCES, LENGTH, PROMPT = 32, 4096, 512


def seconds(action, times: int = 1) -> float:
    """Of one call, after two that warm up, or compile."""
    action()
    action()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(times):
        action()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def random_model():
    config = Qwen2Config(num_hidden_layers=N, hidden_size=D, intermediate_size=F, vocab_size=V,
                         num_attention_heads=D // 128, num_key_value_heads=K // 128)  # fmt: skip
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config)


def update() -> dict:
    config = train.Config(micro_batch_tokens=16_384)
    train.fill_in(config)
    model = random_model()
    optimizer = train.MasterAdamW(model, torch.bfloat16, weight_decay=0.0, max_norm=1.0)
    train.compile_layers(model, recompute=True)
    policy = train.Policy(model, temperature=1.0, chunk=config.logprob_chunk, compile_head=True)
    policy = train.DistributedDataParallel(policy, gradient_as_bucket_view=True)
    n = LENGTH - PROMPT  # tokens of a response
    examples = [
        train.Example(
            group=i // 8, sample=i % 8, advantage=(-1.0) ** i, denominator_tokens=n,
            ids=torch.randint(V, (LENGTH,)).tolist(), first=PROMPT,
            mask=torch.ones(n, dtype=torch.bool), engine_logp=[-12.0] * n,
        )
        for i in range(SEQUENCES)
    ]
    groups = [None] * (SEQUENCES // 8)  # only their number counts
    took = seconds(
        lambda: train.update(policy, None, optimizer, config, 1, groups, examples), times=2
    )
    # A product and a sum, forward once and backward twice: 6 a weight and token; the head only for
    # responses; causal attention 6 N D a token and position, half of them before it.
    layers = plan.parameters(*plan.SHAPES[SHAPE]) - 2 * V * D
    flops = SEQUENCES * (LENGTH * (6 * layers + 6 * N * D * LENGTH) + n * 6 * V * D)
    settings = {"model": SHAPE, "micro_batch_tokens": 16_384, "memory_share": 0.0, "compile": True}
    planned = plan.plan(settings, 1, 80)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"update tokens/s": SEQUENCES * LENGTH / took, "update TFLOP/s": flops / took / 1e12,
            "peak GB": peak, "planned GB": planned["update"] - 3.0}  # fmt: skip


def engine() -> dict:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    made = rollout.TransformersEngine(random_model().bfloat16(), tokenizer, max_context=4096)
    made.stop = set()  # nothing ends early
    prompts = torch.randint(270, (64, PROMPT)).tolist()
    seeds = [[4 * b + i for i in range(4)] for b in range(64)]
    took = seconds(
        lambda: made.generate(prompts, 4, temperature=1.0, max_new_tokens=256, seeds=seeds)
    )
    return {"engine tokens/s": 256 * 256 / took}


def default_run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "train.py", "--output_dir", folder], check=True)
        took = time.perf_counter() - start
        right = [json.loads(line).get("eval_accuracy") for line in open(f"{folder}/metrics.jsonl")]
    return {"default run, seconds": took, "answered right": [right[0], right[-1]]}


rollout.start_distributed()
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
figures = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
figures["matmul TFLOP/s"] = 2 * 8192**3 / seconds(lambda: a @ b, times=20) / 1e12
for part in (update, engine, default_run):
    figures |= part()
    figures["update / matmul"] = figures["update TFLOP/s"] / figures["matmul TFLOP/s"]
    torch.cuda.empty_cache()
    print(json.dumps(figures, indent=1), flush=True)
