"""How much memory a run takes on each GPU: a formula, and its table for configs/*.yaml.

    python bench/plan.py                                          # every file, on its machine
    python bench/plan.py configs/r1_distill_7b_8gpu.yaml 16 40    # one, on 16 GPUs of 40 GB

P parameters, W GPUs; N layers, D hidden, F the MLP's, K all key heads', V vocabulary; T tokens of a
micro-batch (micro_batch_tokens), C positions whose logits exist at a time (logprob_chunk). Bytes on
each GPU in bf16, with gradient checkpointing:

    weights          2 P           gradients  2 P         reference model  2 P, with beta > 0 only
    masters         16 P/W         in fp32: master 4, sum of gradients 4, Adam's moments 8
    activations      T (4 N D + the larger of a layer made again and the last norm with the head):
                     what enters a layer, and with --compile, else 2 N D, what its attention gives
    other            3 GB          CUDA, cuBLAS and NCCL 1.5, what vLLM keeps asleep 1.5
    while sampling   vLLM's share of the card (memory_share), instead of activations and of the sum
                     of gradients; its cache is what weights and a prefill leave of the share

An estimate. On one H200 the update of bench/gpu.py peaked at 43.0 GB where this plans 42.7, both
without the 3 GB of `other`, which are a guess; nothing was measured on eight GPUs, or with vLLM.
GB are 10^9 bytes; an "80 GB" card has 85 of them.
"""

import argparse
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Of the models' config.json: N, D, F, K, V, and 2 where the head is not the embedding, else 1.
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (24, 896, 4864, 128, 151_936, 1),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (28, 1536, 8960, 256, 151_936, 2),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (28, 3584, 18944, 512, 152_064, 2),
}
MACHINES = {  # (GPUs, GB of each) that a settings file is meant for
    "one_24gb.yaml": (1, 24),
    "one_80gb.yaml": (1, 80),
    "r1_distill_1.5b_8gpu.yaml": (8, 40),
    "r1_distill_7b_8gpu.yaml": (8, 80),
}


def parameters(N: int, D: int, F: int, K: int, V: int, embeddings: int) -> int:
    """Of Qwen2: q, k, v with biases and o; gate, up, down; two norms a layer and a last one."""
    layer = (2 * D * D + D) + 2 * (D * K + K) + 3 * D * F + 2 * D
    return embeddings * V * D + N * layer + D


def plan(settings: dict, gpus: int, gpu_gb: float) -> dict[str, float]:
    """{part: GB on each GPU}, the sums of both phases, and the tokens that vLLM's cache holds."""
    N, D, F, K, V, _ = shape = SHAPES[settings["model"]]
    P, T = parameters(*shape), settings["micro_batch_tokens"]
    C = min(settings.get("logprob_chunk", 1024), T)
    # No parameter is divided, so the rank that owns an embedding may have more than its share.
    owned = max(P / gpus, V * D)
    # What a layer keeps: norms 16 D, attention 4 D + 4 K, MLP 8 F. Its gradients: 4 D + 4 F.
    layer = T * (24 * D + 4 * K + 12 * F)
    # The last norm; logits of a chunk in fp32 and bf16; the head's gradient, likewise.
    head = 12 * T * D + 6 * C * V + 6 * V * D
    part = {
        "weights": 2 * P,
        "gradients": 2 * P,
        "reference": 2 * P if settings.get("beta") else 0,
        "masters": 16 * owned,
        "activations": (4 if settings.get("compile") else 2) * T * N * D + max(layer, head),
        "other": 3e9,
        "vLLM": settings["memory_share"] * gpu_gb * 1e9,
    }
    held = part["weights"] + part["gradients"] + part["reference"] + part["other"]
    # AdamW takes the roots of all second moments at once, when the activations are gone.
    part["update"] = held + part["masters"] + max(part["activations"], 4 * owned)
    part["sampling"] = held + 12 * owned + part["vLLM"]
    cache = part["vLLM"] - 2 * P - 2e9  # 2 GB: a prefill of 8,192 tokens, the sampler's logits
    plan = {name: value / 1e9 for name, value in part.items()}
    return plan | {"cached tokens": max(0, int(cache / (4 * N * K)))}


def fits(settings: dict, gpus: int, gpu_gb: float) -> bool:
    """Also one longest sequence into vLLM's cache; the settings give it to a micro-batch too."""
    parts = plan(settings, gpus, gpu_gb)
    peak = max(parts["update"], parts["sampling"])
    return peak <= gpu_gb and parts["cached tokens"] >= settings["micro_batch_tokens"]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="settings file; without: each one of configs/")
    parser.add_argument("gpus", nargs="?", type=int, help="without: the machine it is meant for")
    parser.add_argument("gb", nargs="?", type=float, help="of each GPU")
    args = parser.parse_args(arguments)
    machines = {CONFIGS / name: machine for name, machine in MACHINES.items()}
    if args.file:
        machine = (args.gpus, args.gb) if args.gb else MACHINES.get(Path(args.file).name)
        if machine is None:
            parser.error(f"{args.file}: name its machine too, as in FILE 8 80")
        machines = {Path(args.file): machine}
    for file, (gpus, gpu_gb) in machines.items():
        settings = yaml.safe_load(file.read_text())
        if settings.get("model") not in SHAPES:
            parser.error(f"{file}: its model is not in SHAPES; add its sizes")
        print(f"{file.name}: {settings['model']}, GB on each of {gpus} x {gpu_gb:g} GB")
        for name, value in plan(settings, gpus, gpu_gb).items():
            print(f"{name:>16} {value:,.1f}" if value < 1000 else f"{name:>16} {value:,}")
        print(f"{'':>16} {'fits' if fits(settings, gpus, gpu_gb) else 'DOES NOT FIT'}")


if __name__ == "__main__":
    main()
