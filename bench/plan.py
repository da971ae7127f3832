"""How much memory a run takes on each GPU, part by part, and whether it fits: without a GPU or the weights.

    python bench/plan.py configs/r1_distill_7b_8gpu.yaml             # on the machine the file is meant for
    python bench/plan.py configs/r1_distill_7b_8gpu.yaml --ranks 16 --gpu_gb 40  # and any flag of train.py
    python bench/plan.py --model my/checkpoint --ranks 1 --gpu_gb 24 --gradient_checkpointing
    python bench/plan.py --shape hidden_size=2048,num_hidden_layers=24,num_attention_heads=16,vocab_size=50000
    python bench/plan.py --all          # one line for every file in configs/
    python bench/plan.py --check        # beside measured peaks of train.py's update, on this machine's CPU

1. The model is built on the meta device: shapes without storage. `MasterAdamW` itself divides it among the
   ranks, so that a large embedding which cannot be divided counts as it will.
2. Two moments compete for the peak: sampling (vLLM awake, with its own weights and its cache) and the update
   (vLLM asleep; gradients summed in fp32, activations, logits). The longest micro-batch is assumed: the larger
   of --micro_batch_tokens and --max_context, every token a loss token.
3. Activations are counted from the operations of a decoder layer (RMSNorm, attention that keeps no scores,
   gated MLP): Llama, Mistral, Qwen2, Qwen3. Other layers need another `layer_bytes`.
4. GB are 10^9 bytes. A card sold as 80 GB has 85 of these; what is over is left for fragmentation.
5. What was not measured here, for want of a GPU, is under CARD below.
"""

import json
import os
import resource
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train
from rollout import TransformersEngine


def qwen2(hidden, layers, heads, kv_heads, mlp, vocabulary, tied, context=32768) -> dict:
    """The numbers of a config.json that memory depends on."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
    }


# Models of the settings files, as their config.json has them, so that they are planned without a network.
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": qwen2(1536, 28, 12, 2, 8960, 151936, False, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": qwen2(3584, 28, 28, 4, 18944, 152064, False, 131072),
    "Qwen/Qwen2.5-0.5B-Instruct": qwen2(896, 24, 14, 2, 4864, 151936, True),
}
SETTINGS = {  # file: the machine it is meant for, (ranks, GB of each card); the toy needs no card
    "toy.yaml": (1, 0),
    "one_24gb.yaml": (1, 24),
    "one_80gb.yaml": (1, 80),
    "r1_distill_1.5b_8gpu.yaml": (8, 40),
    "r1_distill_7b_8gpu.yaml": (8, 80),
}
CARD = {  # [not measured here] bytes
    "CUDA context, cuBLAS, NCCL": 1.5e9,  # one process: about 0.5 + NCCL's channels of 8 ranks
    "vLLM asleep": 1.5e9,  # CUDA graphs, workspace; NeMo-RL#223 saw 0.8 with a 1B model on one GPU
    "vLLM's own activations": 2.0e9,  # a prefill of 8,192 tokens, the sampler's logits; within memory_share
}
MICRO_BATCHES = 2  # or more in an optimizer step


# ------------------------------------------------------------------------------------------------- the model


def shape_of(model_config) -> SimpleNamespace:
    """D hidden, F the MLP's, Q and K of all query and all key heads, V vocabulary, H heads, N layers."""
    c = model_config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return SimpleNamespace(
        D=c.hidden_size,
        F=c.intermediate_size,
        V=c.vocab_size,
        N=c.num_hidden_layers,
        H=c.num_attention_heads,
        Q=head * c.num_attention_heads,
        K=head * c.num_key_value_heads,
        tied=c.tie_word_embeddings,
        qk_norm=c.model_type == "qwen3",
        context=c.max_position_embeddings,
    )


def read_shape(model: str, text: str = ""):
    """A Hugging Face config: from name=value pairs, the table above, a folder's config.json, or the hub."""
    if text:
        values = dict(pair.split("=") for pair in text.split(","))
        return Qwen2Config(**{name: json.loads(value.lower()) for name, value in values.items()})
    return Qwen2Config(**SHAPES[model]) if model in SHAPES else AutoConfig.from_pretrained(model)


def shards(model_config, config, bf16: bool, ranks: int) -> tuple[int, int]:
    """(parameters, parameters of the rank that owns most) by MasterAdamW's own division."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    dtype = torch.bfloat16 if bf16 else torch.float32
    owned = [train.MasterAdamW(model, dtype, config, rank, ranks).masters for rank in range(ranks)]
    return model.num_parameters(), max(sum(m.numel() for m in masters.values()) for masters in owned)


# ----------------------------------------------------------------------------------------------- activations


def layer_bytes(s, b: int) -> int:
    """What one decoder layer keeps of one token for its backward pass; b bytes a number (bf16 2, fp32 4)."""
    # RMSNorm computes in fp32: its input (4), that over its root mean square (b), and times the weight (b).
    norm = 4 + 2 * b
    attention = (
        b * (2 * s.Q + 2 * s.K) + 4 * s.H
    )  # q, k, v, the output; the log-sum-exp of each head's scores
    if s.qk_norm:
        attention += (4 + b) * (s.Q + s.K)
    return 2 * norm * s.D + attention + 4 * b * s.F  # the MLP: gate, silu(gate), up, their product


def forward_bytes(s, b: int, tokens: int, chunk: int) -> int:
    """A forward pass that keeps nothing: the residual stream, a layer's widest point, and the head's: logits
    and probabilities of a chunk, in fp32."""
    return tokens * (b * s.D + max(3 * b * s.F, 12 * s.D)) + 8 * s.V * chunk


def activation_bytes(s, b: int, tokens: int, config, cpu: bool) -> dict:
    """What comes and goes with a micro-batch, at the moment when it is largest."""
    checkpointing, chunk = config.gradient_checkpointing, min(config.logprob_chunk, tokens)
    kept = s.N * (b * s.D if checkpointing else layer_bytes(s, b)) * tokens
    final = (
        (4 + 4 * b) * s.D * tokens
    )  # the last norm, as in a layer; what the head takes of it, and the gradient
    head = s.V * s.D  # entries of the head's weight, as of the embedding's
    # ChunkedLogprobs.backward: W's gradient in fp32; with bf16 also a chunk's part of it (which a CPU casts
    # before it adds), and the chunk's probabilities, which become their gradient, in fp32 and in bf16.
    of_head = head * (4 if b == 4 else 10 if cpu else 6)
    logits = s.V * chunk * (4 if b == 4 else 6)
    moments = [
        {
            "kept for the backward pass": kept,
            "last norm": final,
            "logits of a chunk": logits,
            "gradient of the head": of_head,
        },
        {
            "kept for the backward pass": kept,
            "a layer, made again": layer_bytes(s, b) * tokens if checkpointing else 0,
            "gradients within a layer": 2
            * b
            * (s.F + s.D)
            * tokens,  # two of the MLP's width, two of the residual's
            "gradient of the head": b * head if s.tied else 0,
        },  # waits for that of the embedding, to be added to it
        {"gradient of the embedding": b * head * (2 if s.tied else 1)},
    ]
    if config.beta:
        moments.append(
            {
                "kept for the backward pass": kept,
                "last norm": final,
                "reference's pass": forward_bytes(s, b, tokens, chunk),
            }
        )
    return max(moments, key=lambda moment: sum(moment.values()))


# -------------------------------------------------------------------------------------------------- the plan


def plan(config, model_config, ranks: int, gpu_bytes: float = 0) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes}} of the rank that holds most; without a card (gpu_bytes 0) of a CPU's process."""
    s, cpu = shape_of(model_config), not gpu_bytes
    bf16 = config.precision == "bf16" or (config.precision == "auto" and not cpu)
    b = 2 if bf16 else 4
    parameters, shard = shards(model_config, config, bf16, ranks)
    always = {
        "weights": b * parameters,
        "gradients, in DDP's buckets": b * parameters,
        "Adam's moments, shard": 8 * shard,
    }
    if bf16:
        always["master weights, shard"] = 4 * shard
    if config.beta:
        always["reference model"] = b * parameters
    if not cpu:
        always["CUDA context, cuBLAS, NCCL"] = CARD["CUDA context, cuBLAS, NCCL"]
    asleep = {"gradient sum, shard": 4 * shard} if bf16 else {}
    if not cpu and config.rollout != "transformers":
        asleep["vLLM: graphs, workspace"] = CARD["vLLM asleep"]
    tokens = max(config.micro_batch_tokens, config.max_context or 0)
    phases = {
        "update": always | asleep | activation_bytes(s, b, tokens, config, cpu),
        "optimizer step": always | asleep,
    }
    if not cpu:
        phases["optimizer step"]["AdamW's temporaries"] = (
            4 * shard
        )  # `foreach` takes the root of all second moments at once
        phases["sampling"] = always | engine_bytes(config, s, b, parameters, ranks, gpu_bytes)
    return phases


def engine_bytes(config, s, b: int, parameters: int, ranks: int, gpu_bytes: float) -> dict[str, float]:
    """The engine while it samples."""
    token, context = 2 * s.N * s.K * b, config.max_context or s.context  # bytes of a token's keys and values
    if config.rollout != "transformers":
        parts = {"vLLM: weights": b * parameters, "vLLM: activations": CARD["vLLM's own activations"]}
        parts["vLLM: cache"] = config.memory_share * gpu_bytes - sum(parts.values())
        return parts | {"vLLM: graphs, workspace": CARD["vLLM asleep"]}
    samples = -(-config.questions_per_step // ranks) * config.group_size
    rows = max(1, min(512, int(config.memory_share * gpu_bytes) // token // context, samples))
    prefill = TransformersEngine.prefill_tokens
    return {
        "Transformers: cache": rows * context * token,
        "Transformers: a prefill": forward_bytes(s, b, prefill, 0) + prefill * token,
        "Transformers: logits": rows * s.V * (b + 12 + 16),  # three copies in fp32, two of sums in fp64
    }


def report(name: str, config, model_config, ranks: int, gpu_gb: float) -> bool:
    """Prints the table; True if every phase fits."""
    phases, s = plan(config, model_config, ranks, gpu_gb * 1e9), shape_of(model_config)
    print(f"{name}, GB on each of {ranks} rank(s)")
    print(f"{'':<30}" + "".join(f"{phase:>16}" for phase in phases))
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        print(
            f"{part:<30}"
            + "".join(f"{p[part] / 1e9:>16.2f}" if p.get(part) else f"{'-':>16}" for p in phases.values())
        )
    totals = [sum(parts.values()) for parts in phases.values()]
    print(f"{'sum':<30}" + "".join(f"{total / 1e9:>16.2f}" for total in totals))
    shard = sum(
        phases["optimizer step"].get(part, 0) for part in ("Adam's moments, shard", "master weights, shard")
    )
    print(
        f"A checkpoint is {shard / 1e9:.1f} GB a rank, on disk, and in the host's memory while written."
    )
    if not gpu_gb:
        return True
    fits = max(totals) <= gpu_gb * 1e9
    if "vLLM: cache" in phases["sampling"]:
        context = config.max_context or s.context
        full = phases["sampling"]["vLLM: cache"] / (4 * s.N * s.K * context)
        fits &= full >= 1
        print(f"vLLM's cache holds {max(0, full):.1f} sequences of {context:,} tokens; it needs to hold 1.")
    print(f"{'FITS' if fits else 'DOES NOT FIT'}: {max(totals) / 1e9:.1f} of {gpu_gb:g} GB")
    return fits


# -------------------------------------------------------------------------------------- beside a measurement

CHECKS = {  # name: (shape, ranks, train.py's flags); 55 to 140 M parameters
    "deep, all activations kept": (
        qwen2(512, 12, 8, 2, 2048, 8192, False),
        1,
        ["--micro_batch_tokens=1024", "--logprob_chunk=256"],
    ),
    "wide, checkpointing, 2 ranks": (
        qwen2(1024, 8, 16, 4, 4096, 8192, False),
        2,
        ["--micro_batch_tokens=1024", "--logprob_chunk=256", "--gradient_checkpointing"],
    ),
    "large vocabulary, tied, KL": (
        qwen2(768, 4, 12, 2, 2048, 65536, True),
        1,
        ["--micro_batch_tokens=1024", "--logprob_chunk=512", "--beta=0.04"],
    ),
}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def examples(config, vocabulary: int, length: int, count: int) -> list:
    """`count` random samples of `length` tokens, all but the first eight with loss."""
    n = length - 8
    return [
        train.Example(
            i,
            1.0,
            n,
            torch.randint(vocabulary, (length,)).tolist(),
            8,
            torch.ones(n, dtype=torch.bool),
            [-1.0] * n,
        )
        for i in range(count)
    ]


def build(config, model_config, rank: int, world: int):
    """What `update` needs of train.set_up: a model, its weights random instead of a checkpoint's; no engine."""
    run = train.Run(config)
    run.rank, run.world, run.device = rank, world, torch.device("cpu")
    run.model = AutoModelForCausalLM.from_config(model_config)
    if config.gradient_checkpointing:
        run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model.train(config.gradient_checkpointing)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    run.reference = None
    if config.beta:
        reference = AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval().requires_grad_(False)
        run.reference = train.Policy(reference, config.temperature, config.logprob_chunk)
    run.optimizer = train.MasterAdamW(run.model, dtype, config, rank, world)
    policy = train.Policy(run.model, config.temperature, config.logprob_chunk)
    run.policy = train.DistributedDataParallel(policy, gradient_as_bucket_view=True, broadcast_buffers=False)
    return run


def measure(name: str, precision: str) -> None:
    """In a process of its own: train.update's peak of resident memory, over what the libraries had before."""
    shape, _, flags = CHECKS[name]
    rank, world, _ = train.start_distributed()
    torch.set_num_threads(1)
    config = train.parse(["--precision", precision, "--updates_per_rollout=1", "--temperature=0.7", *flags])
    small = dict(
        shape,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        vocab_size=64,
    )
    train.update(
        build(config, Qwen2Config(**small), rank, world), 1, 4, examples(config, 64, 32, 4)
    )  # loads every kernel
    before = resident()
    run = build(config, Qwen2Config(**shape), rank, world)
    train.update(
        run, 1, 2, examples(config, shape["vocab_size"], 16, 2 * world)
    )  # Adam's moments come with the first step
    count = config.micro_batch_tokens // 256 * MICRO_BATCHES * world
    train.update(run, 2, count, examples(config, shape["vocab_size"], 256, count))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    peak = max(train.gather([peak]))
    if rank == 0:
        print(json.dumps(peak))
    train.dist.destroy_process_group()


def check() -> bool:
    """Prints planned and measured peaks; True if all agree within 10 %."""
    # malloc keeps freed blocks of up to 32 MB for itself; with this it returns all but the small ones, as
    # CUDA's allocator gives them to the next tensor.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    print(f"{'':<30}{'M parameters':>14}{'precision':>12}{'planned GB':>12}{'measured GB':>13}{'error':>8}")
    good = True
    for name, (shape, ranks, flags) in CHECKS.items():
        for precision in ("fp32", "bf16"):
            config, model_config = train.parse(["--precision", precision, *flags]), Qwen2Config(**shape)
            planned = max(sum(parts.values()) for parts in plan(config, model_config, ranks).values())
            launch = (
                ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
                if ranks > 1
                else []
            )
            done = subprocess.run(
                [sys.executable, *launch, __file__, "--measure", name, precision],
                env=os.environ | malloc,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            measured = json.loads(done.stdout.splitlines()[-1])
            error = planned / measured - 1
            good &= abs(error) <= 0.1
            print(
                f"{name:<30}{shards(model_config, config, False, 1)[0] / 1e6:>14.0f}{precision:>12}"
                f"{planned / 1e9:>12.2f}{measured / 1e9:>13.2f}{error:>+8.1%}",
                flush=True,
            )
    return good


def main() -> None:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All other arguments are train.py's.", allow_abbrev=False
    )
    parser.add_argument(
        "--ranks", type=int, help="GPUs, over all nodes; default: those the settings file is meant for, or 1"
    )
    parser.add_argument(
        "--gpu_gb",
        type=float,
        help="memory of each, in 10^9 bytes; 0: plan a process on a CPU; default: likewise, or 80",
    )
    parser.add_argument(
        "--shape", default="", help="hidden_size=...,num_hidden_layers=...: a Qwen2 model of this shape"
    )
    parser.add_argument("--all", action="store_true", help="every file in configs/, a line each")
    parser.add_argument("--check", action="store_true", help="plan beside measured peaks, on a CPU")
    parser.add_argument(
        "--measure", nargs=2, metavar=("SHAPE", "PRECISION"), help="one of these measurements"
    )
    ours, rest = parser.parse_known_args()
    if ours.measure:
        return measure(*ours.measure)
    if ours.check:
        raise SystemExit(not check())
    if ours.all:
        fits = [summary_line(*item) for item in SETTINGS.items()]
        raise SystemExit(not all(fits))
    config, (ranks, gpu_gb) = train.parse(rest), SETTINGS.get(Path((rest or [""])[0]).name, (1, 80))
    ranks, gpu_gb = ours.ranks or ranks, gpu_gb if ours.gpu_gb is None else ours.gpu_gb
    raise SystemExit(
        not report(ours.shape or config.model, config, read_shape(config.model, ours.shape), ranks, gpu_gb)
    )


def summary_line(file: str, machine: tuple[int, float]) -> bool:
    (ranks, gpu_gb), config = machine, train.parse([str(HERE.parent / "configs" / file)])
    phases = plan(config, read_shape(config.model), ranks, gpu_gb * 1e9)
    totals = {phase: sum(parts.values()) / 1e9 for phase, parts in phases.items()}
    fits = not gpu_gb or max(totals.values()) <= gpu_gb
    print(
        f"{file:<28}{ranks:>2} x {gpu_gb:>2} GB  "
        + ", ".join(f"{phase} {total:.2f}" for phase, total in totals.items())
        + ("" if not gpu_gb else ": fits" if fits else ": DOES NOT FIT")
    )
    return fits


if __name__ == "__main__":
    main()
