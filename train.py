"""ScRPO, Self-correction Relative Policy Optimization ("From Errors to Insights", arXiv 2511.06065).

    torchrun --standalone train.py                                     # the embedded toy: minutes on 2 CPU cores
    torchrun --standalone --nproc_per_node=2 train.py                  # the same samples, shared by two ranks
    torchrun --standalone train.py --algorithm grpo                    # the baselines, by the same loop: grpo, dapo
    torchrun --standalone --nproc_per_node=8 train.py configs/r1_distill_1.5b_8gpu.yaml    # the paper's setting
    torchrun --standalone train.py --output_dir runs/mine --resume     # starts it, or goes on exactly where it stopped

The algorithm (numbers are this project's, README maps each to its line; B questions a step, G samples each):

    E = {}; stage = 1
    for step in 1, 2, ...:
        1. stage 1 -> 2 when |E| >= N, back when |E| < B                                      Eq. 9    next_stage
        2. stage 1, trial and error: B questions, G responses each, reward R,                 Eq. 1    trial_and_error
           advantage Â relative to the group,                                                 Eq. 2
           wrong responses to informative questions go to the pool E                          Eqs. 7, 8
        3. stage 2, self-correction: the B oldest errors, G corrections each, reward R',      Eqs. 10, 11 self_correction
           and m, which lets only the analysis of a successful correction carry gradient      Eq. 12
        4. one or more optimizer steps on the clipped surrogate                               Eqs. 3-6, 13, 14  update

How it stays simple at any size:

1. Every rank samples and grades its own questions; then one gather gives all groups to all ranks. From there on
   everything but the forward passes is the same pure computation on every rank: the pool, the denominators, who
   trains on what. Only weights are broadcast, by their owner, and there is no special rank in the algorithm.
2. All randomness is a function of (seed, step, question, sample), the question by its place in the step, never of a
   generator's history. So rank count, batch size and restarts change nothing, and a checkpoint needs no random state.
3. Loss tokens are counted over the whole optimizer step before the first micro-batch; sums are divided by that count
   and multiplied by the number of ranks, because DDP averages. Not a mean per micro-batch: it would weigh tokens by
   the company they happen to be in.
4. Weights are computed with in bf16 on a GPU, and kept in fp32, each parameter's master and Adam moments on one rank.
   At lr 1e-6 an update is smaller than half a bf16 step, and most of it would be rounded away.

Left out on purpose: tensor parallelism, off-policy rollouts, a reward model, more than one turn of correction.
"""

import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from error_pool import ErrorPool, after_thinking, correction_prompt, informative, next_stage
from evaluate import (accuracy, askable, check_golds, fail, flag, gather, load_policy, lock, sample_answers,
                      sample_corrections, start_distributed, warn)
from loss import (analysis_mask, carries_gradient, deal, group_advantages, importance_weights, overlong_punishment,
                  policy_loss, step_denominator, token_logprobs)
from reward import Grader, find_correction
from rollout import Problem, Sample, fits, load_problems, make_engine, render, sample_seed, solution_prompt

HERE = Path(__file__).resolve().parent
disable_progress_bar()  # of Hugging Face's loading and saving
warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # its successor is not in torch 2.11 yet


# ============================================================================================= 1. settings


@dataclass
class Config:
    """ScRPO on one or many GPUs, or on a CPU. Without a flag: the embedded toy. A YAML file of these names may come
    first; flags after it win."""

    # What is trained, on what
    model: str = flag(str(HERE / "toy"), "folder or hub id of a Hugging Face causal language model")
    train_data: str = flag(str(HERE / "toy" / "train.jsonl"), "JSONL with `problem` and `answer`, or a hub dataset id")
    eval_data: str = flag(str(HERE / "toy" / "test.jsonl"), "held-out problems, in the same form")
    output_dir: Optional[str] = flag(None, "where everything is written; default: a fresh runs/NNN")
    resume: bool = flag(False, "go on from the newest whole checkpoint in output_dir, or start if there is none")
    seed: int = flag(0, "all randomness is a function of (seed, step, question, sample)")
    # The algorithm
    algorithm: Literal["scrpo", "grpo", "dapo"] = flag("scrpo", "grpo, dapo: the baselines, stage 1 only")
    steps: int = flag(60, "rollouts, each with its update(s), in either stage (TRL: max_steps)")
    epochs: int = flag(0, "stop after so many passes over the training questions; 0: only `steps` counts")
    questions_per_step: int = flag(32, "B, over all ranks (TRL: generation_batch_size / num_generations)")
    group_size: int = flag(8, "G, samples a question (TRL: num_generations)")
    max_new_tokens: int = flag(160, "longest response; also L_max of Eq. 6's dr_grpo (TRL: max_completion_length)")
    temperature: float = flag(1.0, "of sampling, and of every log-probability (TRL: temperature)")
    updates_per_rollout: int = flag(2, "optimizer steps a rollout is cut into (TRL: steps_per_generation)")
    scale: Literal["std", "none"] = flag("std", "Eq. 2; none: Dr. GRPO (TRL: scale_rewards)")
    clip_low: float = flag(0.2, "Eq. 5's lower clip; 0.2: usual with GRPO (TRL: epsilon)")
    clip_high: Optional[float] = flag(None, "Eq. 5's upper clip; default 0.2, with dapo 0.28 (TRL: epsilon_high)")
    beta: float = flag(0.0, "Eq. 5's KL weight; DeepSeekMath 0.04, R1 0.001, DAPO 0: no reference model (TRL: beta)")
    reduction: Optional[Literal["grpo", "dapo", "dr_grpo"]] = flag(None, "Eq. 6; default: as --algorithm (TRL: loss_type)")
    importance_cap: float = flag(2.0, "C of Eq. 14 [ours], 0: off (TRL: vllm_importance_sampling_cap)")
    # Error pool and stage 2
    pool_trigger: int = flag(32, "N of Eq. 9: errors that start stage 2 [ours]")
    min_variance: float = flag(0.15, "tau of Eq. 7, at most 0.25; 0: no filter [0.15 is ours: 2 to 6 right of 8]")
    errors_per_question: int = flag(1, "Eq. 8: wrong responses kept of a group [ours]")
    train_stages: Literal["both", "1", "2"] = flag("both", "ablation: which are trained; both are sampled")
    success_conditioned: bool = flag(True, "Eq. 12; off (ablation): failed analyses carry their negative Â")
    credit: Literal["analysis", "response"] = flag("analysis", "Eq. 12; response (ablation): every token")
    analysis_span: Literal["sections", "prefix"] = flag("sections", "Eq. 12; prefix: all before the solution")
    # DAPO's own
    dynamic_sampling: Optional[int] = flag(None, "rounds of drawing anew for equal groups; default 1, dapo 4 [ours]")
    overlong_cache: Optional[int] = flag(None, "C of Eq. 15; default 0: off; dapo: max_new_tokens / 5, as 4k of 20k")
    # Optimizer
    learning_rate: float = flag(5e-4, "5e-4 suits the toy; 1e-6 is usual for 1.5B and 7B (TRL: learning_rate)")
    schedule: Literal["constant", "cosine"] = flag("cosine", "after warm-up; as open-rs (TRL: lr_scheduler_type)")
    warmup_steps: int = flag(0, "steps of linear warm-up; DAPO 20 (TRL: warmup_steps)")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (TRL: weight_decay)")
    max_grad_norm: float = flag(1.0, "global norm to which gradients are clipped (TRL: max_grad_norm)")
    # Machine
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "auto: vLLM, if installed, on a GPU (TRL: use_vllm)")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "of compute; masters are fp32 (TRL: bf16)")
    micro_batch_tokens: int = flag(16384, "padded tokens of a forward pass (TRL: per_device_train_batch_size)")
    logprob_chunk: int = flag(1024, "positions whose logits exist at the same time")
    gradient_checkpointing: bool = flag(False, "recompute activations (TRL: gradient_checkpointing)")
    max_context: Optional[int] = flag(None, "of prompt + response; default: the model's (TRL: vllm_max_model_length)")
    memory_share: float = flag(0.3, "share of GPU memory that vLLM may use (TRL: vllm_gpu_memory_utilization)")
    grader_workers: int = flag(2, "grading processes a rank")
    # What is written, and when
    eval_every: int = flag(10, "steps between evaluations; before and after are measured anyway (TRL: eval_steps)")
    eval_questions: int = flag(512, "held-out problems of an evaluation, from the file's top; 0: none at all")
    save_every: int = flag(20, "steps between checkpoints; one is written at the end too (TRL: save_steps)")
    keep_checkpoints: int = flag(2, "newest checkpoints kept (TRL: save_total_limit)")
    samples_per_step: int = flag(16, "samples a step written to samples.jsonl; -1: all")
    wandb: bool = flag(False, "log to Weights & Biases too, if it is installed")


LEAST = {  # the smallest value that makes sense
    "group_size": 2, "steps": 0, "epochs": 0, "questions_per_step": 1, "max_new_tokens": 1, "temperature": 0,
    "updates_per_rollout": 1, "clip_low": 0, "clip_high": 0, "beta": 0, "importance_cap": 0, "min_variance": 0,
    "errors_per_question": 1, "dynamic_sampling": 1, "overlong_cache": 0, "learning_rate": 0, "warmup_steps": 0,
    "weight_decay": 0, "max_grad_norm": 1e-9, "micro_batch_tokens": 1, "logprob_chunk": 1, "grader_workers": 1,
    "eval_every": 0, "eval_questions": 0, "save_every": 1, "keep_checkpoints": 1, "seed": 0,
}
# Fields that may differ between a run and its resumption: they do not change what is computed.
FREE = ("output_dir", "resume", "steps", "epochs", "eval_every", "save_every", "keep_checkpoints", "samples_per_step",
        "wandb")


def parse(arguments: list[str]) -> Config:
    """The command line, after an optional YAML file of defaults. Ends the process with one line if it is wrong."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=Config.__doc__)
    parser.error = lambda message: fail(f"{message}; see train.py --help")  # else usage is printed on every rank
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        settings_file, *arguments = arguments
        try:
            settings = yaml.safe_load(Path(settings_file).read_text())
        except (OSError, yaml.YAMLError) as error:
            fail(f"{settings_file}: cannot be read as YAML: {' '.join(str(error).split())}")
        known = set(Config.__dataclass_fields__)
        if not isinstance(settings, dict) or set(settings) - known:
            wrong = sorted(set(settings) - known) if isinstance(settings, dict) else "the whole file"
            fail(f"{settings_file}: no such setting: {wrong}; `name: value` lines, names as in train.py --help")
        arguments = [f"--{name}={value}" for name, value in settings.items()] + arguments
    config, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    if unknown:
        fail(f"unknown argument {unknown[0]}; see train.py --help")
    try:
        check(config)
    except ValueError as error:
        fail(str(error))
    return config


def check(config: Config) -> None:
    """Fills in what --algorithm decides, and raises ValueError for what METHOD's limits forbid."""
    dapo = config.algorithm == "dapo"
    for name, value in {
        "clip_high": 0.28 if dapo else 0.2, "reduction": "dapo" if dapo else "grpo",
        "dynamic_sampling": 4 if dapo else 1, "overlong_cache": config.max_new_tokens // 5 if dapo else 0,
    }.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    for name, least in LEAST.items():
        if not getattr(config, name) >= least:  # not `<`: nan is never less
            raise ValueError(f"--{name} {getattr(config, name)}: must be at least {least}")
    c, scrpo = config, config.algorithm == "scrpo"
    for wrong, message in (
        (c.resume and not c.output_dir, "--resume goes on in --output_dir, which is missing: name the run's folder"),
        (scrpo and c.pool_trigger < c.questions_per_step, f"--pool_trigger {c.pool_trigger} is less than --questions_per_step "
         f"{c.questions_per_step}: stage 2 would end before it began; raise the one or lower the other"),
        (c.min_variance > 0.25, f"--min_variance {c.min_variance}: 0/1 rewards have a variance of at most 0.25, so "
         "nothing would be informative; choose 0 to 0.25"),
        (scrpo and c.min_variance <= 0.25 and not informative(c.group_size // 2, c.group_size, c.min_variance),
         f"--min_variance {c.min_variance} is more than the rewards of --group_size {c.group_size} can vary; lower it"),
        (not scrpo and c.train_stages == "2", f"--train_stages 2 contradicts --algorithm {c.algorithm}, "
         "which has no stage 2; leave one of them out"),
        (c.questions_per_step % c.updates_per_rollout, f"--updates_per_rollout {c.updates_per_rollout} does not divide "
         f"--questions_per_step {c.questions_per_step}; choose a divisor"),
        (c.temperature == 0, "--temperature 0: training samples, so it must be above 0"),
        (c.clip_low >= 1, f"--clip_low {c.clip_low}: a ratio is never below 0, so it must be below 1"),
        (c.overlong_cache > c.max_new_tokens, f"--overlong_cache {c.overlong_cache} exceeds --max_new_tokens "
         f"{c.max_new_tokens}; lower it"),
    ):
        if wrong:
            raise ValueError(message)


# ================================================================================================== 2. the two stages


@dataclass
class Group:
    """One prompt and its G samples, graded."""

    problem: str
    answer: str
    prompt: list[int]
    samples: list[Sample]
    verdicts: list[str]  # "right", "wrong" or "ungradable"
    spans: list  # stage 2: (start, end) of each correction's analysis in its tokens; None where not well-formed

    @property
    def rewards(self) -> list[float]:
        return [float(verdict == "right") for verdict in self.verdicts]  # Eqs. 1, 11


@dataclass
class Example:
    """One sample as the loss sees it. Tokens before its first or after its last loss token need no logits, and those
    after need not even be run: `ids` ends with the last loss token, `mask` and `engine_logp` begin at the first."""

    group: int  # its place in the rollout, which decides the optimizer step it belongs to
    advantage: float
    counted: int  # tokens it has in the denominator (Eqs. 6, 13)
    ids: list[int]
    first: int
    mask: torch.Tensor  # bool, m of Eq. 12; all True in stage 1
    engine_logp: list[float]  # log mu


def trial_and_error(run, step: int) -> tuple[list[Group], list[Example], dict]:
    """Stage 1: B questions -> G responses each -> R (Eq. 1) -> Â (Eq. 2); fills E (Eqs. 7, 8)."""
    config = run.config
    groups, discarded = draw_questions(run, step)
    rewards = torch.tensor([group.rewards for group in groups])  # Eq. 1 [B,G]
    lengths = torch.tensor([[len(sample.token_ids) for sample in group.samples] for group in groups])  # [B,G]
    shaped = rewards
    if config.overlong_cache:
        shaped = rewards + overlong_punishment(lengths, config.max_new_tokens, config.overlong_cache)  # Eq. 15
    advantages = group_advantages(shaped, config.scale)  # Eq. 2
    if run.pool is not None:
        for g in groups:
            finished = [sample.finished for sample in g.samples]
            run.pool.add(g.problem, g.answer, [s.text for s in g.samples], g.rewards, finished)  # Eqs. 7, 8
    masks = [[torch.ones(n, dtype=torch.bool) for n in row] for row in lengths.tolist()]  # every token of o_i
    examples = make_examples(groups, advantages, masks, lengths.tolist())
    return groups, examples, {"accuracy": rewards.mean().item(), "discarded_groups": discarded}


def self_correction(run, step: int) -> tuple[list[Group], list[Example], dict]:
    """Stage 2: B errors -> x' (Eq. 10) -> G corrections each -> R' (Eq. 11) -> Â' (Eq. 2), m (Eq. 12)."""
    config, tasks = run.config, []
    while len(tasks) < config.questions_per_step and len(run.pool):
        (error,) = run.pool.take(1)
        prompt = render(run.tokenizer, correction_prompt(error.problem, error.response))  # Eq. 10
        if fits(prompt, config.max_new_tokens, run.engine.max_context):
            tasks.append((error.problem, error.answer, prompt))
        else:
            run.state.dropped_errors += 1
            run.say(f"dropped an error: its correction prompt has {len(prompt)} tokens, too many for the context")
    groups = sample_groups(run, step, tasks, stage=2)
    if not groups:
        return [], [], {"correction_success": None, "well_formed": None}
    rewards = torch.tensor([group.rewards for group in groups])  # R', Eq. 11 [B,G]
    advantages = group_advantages(rewards, config.scale)  # Â', Eq. 2
    masks, counted = [], []
    for g in groups:
        spans = g.spans if config.credit == "analysis" else [(0, len(s.token_ids)) for s in g.samples]
        success = [reward == 1 for reward in g.rewards] if config.success_conditioned else None
        masks.append(analysis_mask(spans, max(len(s.token_ids) for s in g.samples), success))  # m, Eq. 12
        counted.append([end - start for start, end in (span or (0, 0) for span in spans)])
    well_formed = np.mean([span is not None for g in groups for span in g.spans])
    examples = make_examples(groups, advantages, masks, counted)
    return groups, examples, {"correction_success": rewards.mean().item(), "well_formed": float(well_formed)}


def draw_questions(run, step: int) -> tuple[list[Group], int]:
    """The B groups of a stage-1 step, and how many were discarded on the way.

    With DAPO's dynamic sampling, groups of equal rewards are replaced by fresh questions, a bounded number of times;
    what is then still missing is filled with the groups discarded last, so that a step always has B groups.
    """
    B, rounds = run.config.questions_per_step, run.config.dynamic_sampling
    kept, equal = [], []
    for attempt in range(rounds):
        order = question_order(run.config.seed, len(run.problems), run.state.questions, B - len(kept))
        problems = [run.problems[q] for q in order]
        run.state.questions += len(problems)
        tasks = [(p.problem, p.answer, render(run.tokenizer, solution_prompt(p.problem))) for p in problems]
        for group in sample_groups(run, step, tasks, stage=1, offset=attempt * B):
            (kept if rounds == 1 or len(set(group.rewards)) > 1 else equal).append(group)
        if len(kept) == B:
            return kept, len(equal)
    missing = B - len(kept)
    return kept + equal[-missing:], len(equal) - missing


def question_order(seed: int, count: int, start: int, n: int) -> list[int]:
    """Places start .. start + n - 1 of an endless stream in which every epoch is a fresh shuffle of all questions.

    >>> order = question_order(seed=0, count=5, start=0, n=10)
    >>> sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4], order[:5] == order[5:]
    (True, False)
    >>> question_order(seed=0, count=5, start=3, n=4) == order[3:7]     # no history: any part can be asked for
    True
    """
    return [int(shuffled(seed, place // count, count)[place % count]) for place in range(start, start + n)]


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def sample_groups(run, step: int, tasks: list, stage: int, offset: int = 0) -> list[Group]:
    """G samples of each (problem, answer, prompt) in `tasks`, graded. Every rank returns all groups, in their order.

    Task b is the work of rank b mod world. `offset` keeps a second round's seeds in one step apart from the first's.
    """
    config, mine = run.config, range(run.rank, len(tasks), run.world)
    with run.clock("push"):
        run.engine.wake()
        run.engine.update_weights(run.model)
    with run.clock("rollout"):
        seeds = [[sample_seed(config.seed, step, offset + b, i) for i in range(config.group_size)] for b in mine]
        run.sampling = True
        if run.stop:  # SIGTERM came earlier, while a checkpoint was written or weights were pushed
            raise Preempted
        with run.bar("rollout", len(mine) * config.group_size) as bar:
            samples = run.engine.generate(
                [tasks[b][2] for b in mine], config.group_size, temperature=config.temperature,
                max_new_tokens=config.max_new_tokens, seeds=seeds, progress=bar.update,
            )
        run.engine.sleep()
    with run.clock("grading"):
        graded = grade_samples(run, [tasks[b] for b in mine], samples, stage)
    with run.clock("waiting"):  # for the slowest rank
        groups = [group for _, group in sorted(gather(list(zip(mine, graded))), key=lambda pair: pair[0])]
    run.sampling = False
    run.state.samples += sum(len(group.samples) for group in groups)
    run.state.tokens += sum(len(sample.token_ids) for group in groups for sample in group.samples)
    return groups


def grade_samples(run, tasks: list, samples: list[list[Sample]], stage: int) -> list[Group]:
    """R of Eq. 1 in stage 1; R' and the span of the analysis (Eqs. 11, 12) in stage 2."""
    def sections(sample: Sample):
        if stage == 1 or not after_thinking(sample.text):  # thinking that never closed holds no correction
            return None
        return find_correction(sample.token_ids, run.tokenizer, run.config.analysis_span)

    found = [[sections(sample) for sample in row] for row in samples]
    spans = [[correction and correction[:2] for correction in row] for row in found]
    if stage == 1:
        texts = [sample.text for row in samples for sample in row]
    else:  # Eq. 11: without both sections there is no solution, and an empty one is wrong
        texts = [correction[2] if correction else "" for row in found for correction in row]
    golds = [answer for (_, answer, _), row in zip(tasks, samples) for _ in row]
    verdicts = iter(run.grader.verdicts(texts, golds))  # Eqs. 1, 11
    return [
        Group(problem, answer, prompt, row, [next(verdicts) for _ in row], row_spans)
        for (problem, answer, prompt), row, row_spans in zip(tasks, samples, spans)
    ]


def make_examples(groups, advantages, masks, counted) -> list[Example]:
    """Cuts each sample to its loss tokens; one without any keeps its place in the denominator."""
    examples = []
    for b, group in enumerate(groups):
        for i, sample in enumerate(group.samples):
            tokens = masks[b][i].nonzero().flatten().tolist()
            start, end = (tokens[0], tokens[-1] + 1) if tokens else (0, 0)
            examples.append(Example(
                b, advantages[b, i].item(), counted[b][i], group.prompt + sample.token_ids[:end],
                len(group.prompt) + start, masks[b][i][start:end], sample.logprobs[start:end],
            ))
    return examples


# ================================================================================================== 3. the update


class Policy(torch.nn.Module):
    """The model as DDP has to see it: its forward pass gives log-probabilities, never logits."""

    def __init__(self, model, temperature: float, chunk: int):
        super().__init__()
        self.model, self.temperature, self.chunk = model, temperature, chunk

    def forward(self, ids, attention, first):
        return token_logprobs(self.model, ids, attention, first, self.temperature, self.chunk)


class MasterAdamW:
    """AdamW on fp32 master weights. Each parameter's master and moments live on one rank, which broadcasts the result.

    With bf16 compute on W ranks and P parameters this is 2P + 2P + 16P/W bytes a rank (weights, gradients; master,
    gradient sum and two moments in fp32). With fp32 compute the parameters are their own masters. Not PyTorch's
    ZeroRedundancyOptimizer: it shards the moments only, and the masters would be whole on every rank.
    """

    def __init__(self, model, dtype: torch.dtype, config: Config, rank: int, world: int):
        self.bf16, self.world = dtype != torch.float32, world
        if not self.bf16:
            model.float()
        self.params = [p for p in model.parameters() if p.requires_grad]
        load, self.owner = [0] * world, {}
        for i in sorted(range(len(self.params)), key=lambda i: -self.params[i].numel()):  # the largest first
            self.owner[i] = load.index(min(load))
            load[self.owner[i]] += self.params[i].numel()
        mine = {i: p for i, p in enumerate(self.params) if self.owner[i] == rank}
        # From the weights as they were stored, before they are rounded to bf16.
        self.masters = {i: p.detach().to(torch.float32, copy=True) if self.bf16 else p for i, p in mine.items()}
        for p in model.parameters():  # not model.to(dtype): rounded rotary frequencies would turn late positions
            p.data = p.data.to(dtype)
        decayed = [m for m in self.masters.values() if m.dim() >= 2]
        plain = [m for m in self.masters.values() if m.dim() < 2]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        )
        self.max_norm = config.max_grad_norm

    @torch.no_grad()
    def accumulate(self) -> None:
        """bf16: adds the synchronised gradients to fp32 sums, since many small bf16 additions lose most of what is
        added. fp32: the gradients add up where they are."""
        if self.bf16:
            for i, master in self.masters.items():
                grad = self.params[i].grad
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            for p in self.params:  # not zero_(): DDP moves to new buckets once, and must not find the old ones held
                p.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Clips by the global norm, steps, hands the new weights to all ranks. Returns the norm before clipping.

        A norm that is not finite takes no step: one NaN in the weights is a NaN in every later step.
        """
        grads = [m.grad for m in self.masters.values()]
        square = torch.nn.utils.get_total_norm(grads).square()
        dist.all_reduce(square)
        norm = square.sqrt().item()
        if math.isfinite(norm):
            torch._foreach_mul_(grads, min(1.0, self.max_norm / (norm + 1e-6)))
            for group in self.adam.param_groups:
                group["lr"] = learning_rate
            self.adam.step()
            self.publish()
        for p in [*self.params, *self.masters.values()]:
            p.grad = None
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> the weights that are computed with, on every rank."""
        for i, master in self.masters.items():
            self.params[i].copy_(master)
        if self.world > 1:
            for work in [dist.broadcast(p.data, self.owner[i], async_op=True) for i, p in enumerate(self.params)]:
                work.wait()

    def state_dict(self) -> dict:
        return {"masters": {i: m.detach() for i, m in self.masters.items()}, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for i, master in self.masters.items():
            master.copy_(state["masters"][i])
        self.adam.load_state_dict(state["adam"])
        self.publish()


@dataclass
class Batch:
    """One micro-batch, padded on the right: S sequences of L tokens, T loss columns."""

    ids: torch.Tensor  # [S,L]
    attention: torch.Tensor  # [S,L]
    first: torch.Tensor  # [S]
    mask: torch.Tensor  # [S,T]
    engine_logp: torch.Tensor  # log mu [S,T]
    advantages: torch.Tensor  # [S]
    old_logp: Optional[torch.Tensor] = None  # log pi_old [S,T]; None: pi_old = pi_theta, by stop-gradient


def collate(examples: list[Example], device) -> Batch:
    def pad(rows, dtype):
        return pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True).to(device)

    return Batch(
        ids=pad([e.ids for e in examples], torch.long),
        attention=pad([[1] * len(e.ids) for e in examples], torch.long),  # from lengths: a pad id may also be the EOS
        first=torch.tensor([e.first for e in examples], device=device),
        mask=pad([e.mask for e in examples], torch.bool),
        engine_logp=pad([e.engine_logp for e in examples], torch.float32),
        advantages=torch.tensor([e.advantage for e in examples], device=device),
    )


def batch_loss(run, batch: Batch, denominator: float, totals: Counter) -> torch.Tensor:
    """This micro-batch's part of -J, and its part of the step's statistics, as sums, in `totals`."""
    config = run.config
    logp, entropy = run.policy(batch.ids, batch.attention, batch.first)  # [S,T]
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    ref_logp = None
    if run.reference is not None:
        with torch.no_grad():
            ref_logp, _ = run.reference(batch.ids, batch.attention, batch.first)
    weights = importance_weights(old_logp, batch.engine_logp, config.importance_cap) if config.importance_cap else None
    loss, stats = policy_loss(
        logp, old_logp, ref_logp, batch.advantages, batch.mask, clip_low=config.clip_low, clip_high=config.clip_high,
        beta=config.beta, reduction=config.reduction, weights=weights, denominator=denominator,
    )
    gap = (old_logp - batch.engine_logp)[batch.mask]  # 0 but for numerics, unless the engine has stale weights
    totals.update({name: value.item() for name, value in stats.items()})
    totals["loss"] += loss.item()
    totals["entropy"] += entropy.detach()[batch.mask].sum().item()
    totals["gap"] += gap.abs().sum().item()
    totals["gap_max"] = max(totals["gap_max"], gap.abs().max().item())
    if config.importance_cap:
        totals["capped"] += (gap.exp() > config.importance_cap).sum().item()
    return loss


def update(run, step: int, groups: int, examples: list[Example]) -> dict:
    """Ascends J_1 (Eq. 6) or J_2 (Eq. 13): a rollout's groups in `updates_per_rollout` optimizer steps."""
    config, minibatches, totals = run.config, [], Counter()
    for u in range(config.updates_per_rollout):
        # Cut by group before anything is skipped, so that what is skipped changes no denominator.
        minibatch = [e for e in examples if e.group * config.updates_per_rollout // groups == u]
        denominator = step_denominator([e.counted for e in minibatch], config.reduction, config.max_new_tokens)
        running = [e for e in minibatch if carries_gradient(int(e.mask.sum()), e.advantage, config.beta)]
        hand = deal([len(e.ids) for e in running], run.world, config.micro_batch_tokens)[run.rank]
        batches = [collate([running[i] for i in part], run.device) if part else None for part in hand]
        minibatches.append((denominator, batches))
    # pi_old is the policy at the rollout. The first optimizer step has it for nothing; before the later ones the
    # weights will have moved, so they get theirs now.
    with torch.no_grad():
        for _, batches in minibatches[1:]:
            for batch in filter(None, batches):
                batch.old_logp, _ = run.policy.module(batch.ids, batch.attention, batch.first)
    for denominator, batches in minibatches:
        if not batches:  # nothing left on any rank: a step would let Adam's momentum move the weights on its own
            totals["empty_updates"] += 1
            continue
        for i, batch in enumerate(batches):
            # fp32 gradients add up locally and are averaged with the last backward; bf16 ones are averaged each time,
            # to be summed in fp32 by their owner alone.
            local = i < len(batches) - 1 and not run.optimizer.bf16
            with run.policy.no_sync() if local else nullcontext():
                loss = anchor(run) if batch is None else batch_loss(run, batch, denominator, totals)
                (loss * run.world).backward()  # DDP averages over ranks, the denominator is that of all of them
            run.optimizer.accumulate()
        run.boundary = None  # the weights move now
        norm = run.optimizer.step(learning_rate(config, step))
        totals["updates"] += 1
        if math.isfinite(norm):
            totals["norm"] += norm
            run.state.nonfinite_in_a_row = 0
        else:
            totals["nonfinite"] += 1
            run.state.nonfinite_in_a_row += 1
            if run.state.nonfinite_in_a_row == 3:
                break  # `alarm` ends the run
    torch.cuda.empty_cache()  # vLLM wakes past torch's allocator, and cannot use what that keeps; on a CPU, nothing
    return average(totals, gather([totals]), config)


def anchor(run) -> torch.Tensor:
    """A zero that depends on every parameter, for a rank without a sample: DDP waits for its gradients."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=run.device)
    return run.policy(ids, torch.ones_like(ids), torch.ones(1, dtype=torch.long, device=run.device))[0].sum() * 0.0


def average(mine: Counter, ranks: list[Counter], config: Config) -> dict:
    """Sums over all ranks' loss tokens -> the step's metrics; None where nothing was trained on."""
    names = ("tokens", "clipped", "kl", "entropy", "gap", "capped", "loss")
    total = {name: sum(rank[name] for rank in ranks) for name in names}
    n, updates = total["tokens"], mine["updates"] - mine["nonfinite"]
    per_token = {"clip_fraction": "clipped", "entropy": "entropy", "logp_gap": "gap", "capped_fraction": "capped"}
    if config.beta:
        per_token["kl"] = "kl"
    metrics = {name: total[key] / n if n else None for name, key in per_token.items()}
    return {
        "loss": total["loss"] / updates if updates else None,
        "grad_norm": mine["norm"] / updates if updates else None,
        "loss_tokens": int(n), **metrics, "kl": metrics.get("kl"),
        "logp_gap_max": max(rank["gap_max"] for rank in ranks) if n else None,
        "empty_updates": mine["empty_updates"], "nonfinite_updates": mine["nonfinite"],
    }


def learning_rate(config: Config, step: int) -> float:
    """Of step 1, 2, ...: linear warm-up, then constant or a cosine to 0 after the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


# ================================================================================================== 4. the loop


@dataclass
class State:
    """What a checkpoint holds beside weights, optimizer and pool."""

    step: int = 0  # the last one that is finished
    stage: int = 1
    questions: int = 0  # drawn so far: the place in the stream of `question_order`
    visits: int = 0  # to stage 2
    visit_loss_tokens: int = 0  # of the current visit
    samples: int = 0  # drawn so far, those of discarded groups too
    tokens: int = 0  # sampled so far
    dropped_errors: int = 0  # whose correction prompt did not fit
    nonfinite_in_a_row: int = 0


class Preempted(BaseException):
    """SIGTERM came while samples were drawn. No Exception: an engine that catches those must let it through."""


class Run:
    """Everything a step needs, under one name. No logic but the stopwatch, the ear for SIGTERM and rank 0's voice."""

    config: Config
    rank: int
    world: int
    device: torch.device
    output: Path
    tokenizer: object
    model: torch.nn.Module
    policy: DistributedDataParallel  # of Policy(model)
    reference: Optional[Policy]  # only with beta > 0
    optimizer: MasterAdamW
    engine: object
    grader: Grader
    pool: Optional[ErrorPool]  # None for the baselines
    problems: list[Problem]
    eval_problems: list[Problem]
    eval_asked: list[int]  # which of them are asked at an evaluation
    state: State

    boundary: Optional[dict] = None  # `boundary` before the current step, as long as the weights are those of then

    def __init__(self, config: Config):
        self.config, self.state, self.seconds = config, State(), Counter()
        self.stop = self.sampling = False
        self.exit_code = 0

    def interrupt(self, number: int, *_) -> None:
        """SIGTERM or Ctrl-C. While samples are drawn, which may take minutes, the weights are still those of the last boundary,
        and the step is given up; during the short update it is finished first."""
        again, self.stop = self.stop, True
        self.exit_code = 130 if number == signal.SIGINT else 0  # Ctrl-C: the shell's next command is not wanted either
        if self.sampling and not again:
            raise Preempted

    @contextmanager
    def clock(self, part: str):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start

    def say(self, text: str = "") -> None:
        if self.rank == 0:
            tqdm.write(text)

    def bar(self, what: str, total: int) -> tqdm:
        """For long work within a step; it shows up after 5 seconds, so never on the toy."""
        return tqdm(total=total, desc=what, unit="sample", leave=False, delay=5, disable=self.rank != 0)


def train(run: Run) -> None:
    """The algorithm box of the paper."""
    config, state = run.config, run.state
    if state.step == 0:
        record(run, {"step": 0, **evaluate_policy(run)}, [])
    bar = tqdm(total=config.steps, initial=state.step, disable=run.rank != 0, desc=config.algorithm, unit="step")
    for step in range(state.step + 1, config.steps + 1):
        if epochs_over(run):  # already: a finished run was resumed
            break
        started, tokens, run.seconds = time.perf_counter(), state.tokens, Counter()
        run.boundary = boundary(run)
        switched = switch_stage(run, step)  # Eq. 9
        act = trial_and_error if state.stage == 1 else self_correction
        groups, examples, metrics = act(run, step)  # Eqs. 1, 2, 7, 8 or 2, 10, 11, 12
        if switched and state.stage == 2:
            show_correction(run, groups, examples)
        if config.train_stages in ("both", str(state.stage)):
            with run.clock("update"):
                metrics |= update(run, step, len(groups), examples)  # Eqs. 3 to 6, 13, 14
        state.visit_loss_tokens += metrics.get("loss_tokens", 0) if state.stage == 2 else 0
        state.step = step
        last = step == config.steps or epochs_over(run)
        if last or (config.eval_every and step % config.eval_every == 0):
            metrics |= evaluate_policy(run)
        metrics |= {"tokens_per_second": (state.tokens - tokens) / (time.perf_counter() - started)}
        record(run, {"step": step, "stage": state.stage, "accuracy": None, "correction_success": None} | metrics, groups)
        alarm(run, metrics)
        show_progress(bar, run, metrics)
        stop = any(gather([run.stop]))  # SIGTERM may reach the ranks in different steps
        run.stop |= stop  # not `=`: it may have come during the gather, and holds for the next step then
        if last or stop or step % config.save_every == 0:
            save_checkpoint(run, boundary(run))
            prune_checkpoints(run)
        if last or stop:
            break
    bar.close()


def epochs_over(run: Run) -> bool:
    return 0 < run.config.epochs * len(run.problems) <= run.state.questions


def switch_stage(run: Run, step: int) -> bool:
    """Eq. 9, and what is said at the border. True if the stage changed."""
    state, before = run.state, run.state.stage
    if run.pool is None:
        return False
    state.stage = next_stage(before, len(run.pool), run.config.pool_trigger, run.config.questions_per_step)  # Eq. 9
    if (before, state.stage) == (1, 2):
        state.visits, state.visit_loss_tokens = state.visits + 1, 0
    elif (before, state.stage) == (2, 1) and state.visit_loss_tokens == 0 and run.config.train_stages != "1":
        warn(f"step {step}: visit {state.visits} to stage 2 ended without a single loss token: no correction was both "
             "well-formed and right with an advantage; see well_formed and correction_success in metrics.jsonl")
    return before != state.stage


def alarm(run: Run, metrics: dict) -> None:
    """Loud words about numbers that are silently wrong, and the end of a run that is beyond help."""
    gap, limit = metrics.get("logp_gap"), 0.05 if run.optimizer.bf16 else 0.002
    if gap is not None and gap > limit:
        warn(f"step {run.state.step}: engine and trainer disagree by {gap:.3g} in log p on average (expected: below "
             f"{limit}). Usually the engine has stale weights, or another temperature; try rollout.py --selftest")
    if run.state.nonfinite_in_a_row >= 3:
        raise FloatingPointError(
            f"step {run.state.step}, stage {run.state.stage}: the gradient was not finite "
            f"{run.state.nonfinite_in_a_row} times in a row; no such step was taken. The samples are in "
            f"{run.output / 'nonfinite.jsonl'}"
        )


def evaluate_policy(run: Run) -> dict:
    """Held-out accuracy, and the share of its own wrong answers that the policy then corrects. Always the same seeds,
    so that before and after are paired."""
    config = run.config
    if not run.eval_asked:
        return {}
    with run.clock("evaluation"):
        run.engine.wake()
        run.engine.update_weights(run.model)
        how = {"temperature": config.temperature, "top_p": 1.0, "max_new_tokens": config.max_new_tokens,
               "seed": config.seed}
        with run.bar("evaluation", len(run.eval_asked) // run.world) as bar:
            answers = sample_answers(run.engine, run.tokenizer, run.eval_problems, run.grader, k=1,
                                     questions=run.eval_asked, progress=bar.update, **how)
        wrong = [r for r in answers if r["verdict"] != "right"]
        corrections = sample_corrections(run.engine, run.tokenizer, wrong, run.grader, k=1, **how)
        run.engine.sleep()
    figures = (*accuracy(answers), *accuracy(corrections))
    return dict(zip(("eval_accuracy", "eval_accuracy_se", "eval_correction", "eval_correction_se"), figures))


# ================================================================================================== 5. what one sees


def record(run: Run, metrics: dict, groups: list[Group]) -> None:
    """One line in metrics.jsonl, some in samples.jsonl; numbers that are not finite become null."""
    if run.rank != 0:
        return
    config, state = run.config, run.state
    samples = [sample for group in groups for sample in group.samples]
    if groups:
        metrics |= {
            "mixed_groups": float(np.mean([0 < sum(g.rewards) < len(g.rewards) for g in groups])),
            "truncated": float(np.mean([not sample.finished for sample in samples])),
            "mean_length": float(np.mean([len(sample.token_ids) for sample in samples])),
            **{name: sum(group.verdicts.count(name) for group in groups) for name in ("right", "wrong", "ungradable")},
        }
    on_gpu = run.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics |= {
        "pool_size": len(run.pool) if run.pool is not None else None,
        "visits": state.visits, "dropped_errors": state.dropped_errors, "questions": state.questions,
        "samples": state.samples, "tokens": state.tokens,
        "seconds": {part: round(value, 4) for part, value in run.seconds.items()}, "peak_memory_gb": peak / 2**30,
    }
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    append(run.output / "metrics.jsonl", [metrics])
    kept = len(samples) if config.samples_per_step < 0 else config.samples_per_step
    lines = [
        {"step": state.step, "stage": state.stage, "problem": g.problem, "answer": g.answer,
         "prompt": run.tokenizer.decode(g.prompt), "response": s.text, "verdict": verdict, "finished": s.finished,
         "analysis": span}
        for g in groups for s, verdict, span in zip(g.samples, g.verdicts, g.spans)
    ]
    append(run.output / "samples.jsonl", lines[:kept])
    if state.nonfinite_in_a_row >= 3:
        append(run.output / "nonfinite.jsonl", lines)
    if config.wandb:
        import wandb

        wandb.log({k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step=state.step)


def append(path: Path, lines: list[dict]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def show_progress(bar, run: Run, metrics: dict) -> None:
    name, value = ("acc", "accuracy") if run.state.stage == 1 else ("corrected", "correction_success")
    pool = f"{len(run.pool)}/{run.config.pool_trigger}" if run.pool is not None else "-"
    share = f"{metrics[value]:.2f}" if metrics[value] is not None else "-"
    speed = f"{metrics['tokens_per_second']:,.0f} tok/s"
    bar.set_postfix_str(f"stage {run.state.stage}, {name} {share}, pool {pool}, {speed}")
    bar.update()


def show_correction(run: Run, groups: list[Group], examples: list[Example]) -> None:
    """One correction in full, with its prompt; what is highlighted, and nothing else, carries gradient (Eq. 12)."""
    if not examples:
        return
    chosen = next((e for e in examples if e.mask.any() and e.advantage), examples[0])
    group, decode = groups[chosen.group], run.tokenizer.decode
    prompt, start, end = len(group.prompt), chosen.first, len(chosen.ids)
    ids = group.prompt + next(s.token_ids for s in group.samples if (group.prompt + s.token_ids)[:end] == chosen.ids)
    on, off = ("\033[30;42m", "\033[0m") if sys.stdout.isatty() else (">>>", "<<<")
    run.say(
        f"\n--- stage 2, visit {run.state.visits}: a prompt and one correction, Â' = {chosen.advantage:.2f}; what carries "
        f"gradient stands between {on} and {off}\n{decode(ids[:prompt])}\n---\n"
        f"{decode(ids[prompt:start])}{on}{decode(ids[start:end])}{off}{decode(ids[end:])}\n---"
    )


def summary(run: Run) -> None:
    """The table and the picture at the end."""
    if run.rank != 0:
        return
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line.get("eval_accuracy") is not None]
    spent = Counter()
    for line in lines:
        spent.update(line["seconds"])
    run.say()
    if measured:
        run.say(f"{'held-out problems':<28}{'before':>16}{'after':>16}")
        for name, key in (("answered right", "eval_accuracy"), ("own errors corrected", "eval_correction")):
            ends = ((m[key], m[key + "_se"]) for m in (measured[0], measured[-1]))
            cells = ["-" if mean is None else f"{mean:.3f} ± {error or 0:.3f}" for mean, error in ends]
            run.say(f"{name:<28}{cells[0]:>16}{cells[1]:>16}")
    total = sum(spent.values())
    run.say("time: " + ", ".join(f"{part} {s:.0f} s ({100 * s / total:.0f} %)" for part, s in spent.most_common()))
    run.say(f"{run.state.samples:,} samples, {run.state.tokens:,} tokens, {run.state.visits} visits to stage 2")
    plot(lines, run.output / "curves.png")
    run.say(f"written: {run.output}/ (metrics.jsonl, samples.jsonl, curves.png, checkpoints/, final/)")


def plot(lines: list[dict], path: Path) -> None:
    """curves.png: accuracy, correction success and pool size over steps, visits to stage 2 shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def curve(axis, key, *style, **more):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points), *style, **more)

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    curve(above, "accuracy", ".-", color="tab:blue", alpha=0.5, label="accuracy of the step's groups (stage 1)")
    curve(above, "correction_success", ".-", color="tab:green", alpha=0.5, label="correction success (stage 2)")
    curve(above, "eval_accuracy", "o-", color="tab:blue", label="held-out: answered right")
    curve(above, "eval_correction", "s-", color="tab:green", label="held-out: own errors corrected")
    curve(below, "pool_size", "-", color="tab:gray")
    for line in lines:
        if line.get("stage") == 2:
            for axis in (above, below):
                axis.axvspan(line["step"] - 0.5, line["step"] + 0.5, color="tab:green", alpha=0.12, lw=0)
    above.set(ylim=(0, 1), ylabel="share")
    below.set(ylabel="error pool", xlabel="step (shaded: stage 2)")
    if above.lines:
        above.legend(loc="lower right", fontsize="small")
    above.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ================================================================================================== 6. checkpoints


def boundary(run: Run) -> dict:
    """What a checkpoint holds beside weights and optimizer. Only `update` changes those, so together with the weights
    of any later moment before the update it is still the state between two steps."""
    return {"state": asdict(run.state), "pool": run.pool.state_dict() if run.pool is not None else None}


def save_checkpoint(run: Run, between_steps: dict) -> None:
    """checkpoints/step_NNNNNN/rank_K.pt, each rank its own shard; rank_K.sha256 beside it says that it is whole.

    A rank's file counts only with a digest that fits, and a step only if every rank has one: a kill at any moment
    leaves the one before it. Works on a shared file system and on separate ones. `sha256sum -c` reads the digest.
    """
    with run.clock("checkpoint"):
        folder = run.output / "checkpoints" / f"step_{between_steps['state']['step']:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({**between_steps, "optimizer": run.optimizer.state_dict()}, buffer)
        data = folder / f"rank_{run.rank}.pt"
        write_whole(data, buffer.getbuffer())
        write_whole(data.with_suffix(".sha256"), sha256sum(data.name, buffer.getbuffer()))


def sha256sum(name: str, data) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def prune_checkpoints(run: Run) -> None:
    """Removes the oldest, once the newest is whole on every rank."""
    gather([None])
    remove_shards(run, sorted((run.output / "checkpoints").glob("step_*"))[: -run.config.keep_checkpoints])


def remove_shards(run: Run, folders: list[Path]) -> None:
    for folder in folders:
        for file in sorted(folder.glob(f"rank_{run.rank}.*"), reverse=True):  # first the digest: half is not whole
            file.unlink()
        with suppress(OSError):  # another rank's files are still in it
            folder.rmdir()


def set_aside(run, folders: list[Path]) -> None:
    """Moves shards that cannot be used, so that they are not counted, nor mixed with new ones, nor lost."""
    for folder in folders:
        unused = folder.parent / "unused" / folder.name
        for file in folder.glob(f"rank_{run.rank}.*"):
            unused.mkdir(parents=True, exist_ok=True)
            file.replace(unused / file.name)
        with suppress(OSError):  # another rank's files are still in it
            folder.rmdir()


def write_whole(path: Path, data) -> None:
    """Writes the file under another name, flushes it to the disk, then renames it: it is there wholly or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_checkpoint(run: Run) -> bool:
    """Loads the newest step that is whole on every rank; damaged ones are named. False if there is none."""
    whole, damaged = {}, []
    for digest in sorted((run.output / "checkpoints").glob(f"step_*/rank_{run.rank}.sha256"), reverse=True):
        data = digest.with_suffix(".pt")
        if data.exists() and digest.read_bytes() == sha256sum(data.name, data.read_bytes()):
            whole[int(digest.parent.name.removeprefix("step_"))] = data
        else:
            damaged.append(data)
    for data in gather(damaged):
        warn(f"{data} is damaged and not used")
    found = gather([list(whole)])
    common = set.intersection(*map(set, found))
    if not common:
        if any(found):
            warn(f"no checkpoint in {run.output} is whole on every rank, so the run starts from its beginning, and what is "
                 "there goes to checkpoints/unused; on separate disks each node must get the ranks that it had")
        set_aside(run, list((run.output / "checkpoints").glob("step_*")))
        return False
    # Later steps are done again; a shard written then and one of now must not be taken for one checkpoint.
    remove_shards(run, [f for f in (run.output / "checkpoints").glob("step_*") if f > whole[max(common)].parent])
    # To the host first: on the GPU, where vLLM is awake by now, the shard would be there twice.
    saved = torch.load(whole[max(common)], map_location="cpu", weights_only=True)
    run.state.__dict__.update(saved["state"])
    run.optimizer.load_state_dict(saved["optimizer"])
    if run.pool is not None:
        run.pool.load_state_dict(saved["pool"])
    return True


def rewind_logs(run: Run) -> None:
    """Drops what was logged after the checkpoint, and a last line cut short: those steps are done again. So is the
    evaluation before the first step, if that is where the run goes on."""
    last = run.state.step or -1
    for name in ("metrics.jsonl", "samples.jsonl") if run.rank == 0 else ():
        path, kept = run.output / name, []
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            if line.endswith("\n") and json.loads(line)["step"] <= last:
                kept.append(line)
        write_whole(path, "".join(kept).encode())


def save_final(run: Run) -> None:
    """final/: a plain Hugging Face checkpoint, replaced as a whole."""
    if run.rank == 0:
        part, final = run.output / "final.part", run.output / "final"
        run.model.save_pretrained(part)
        run.tokenizer.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)


# ================================================================================================== 7. start and end


def agree(error: Optional[str]) -> None:
    """Ends all ranks with one line if any of them has an error."""
    for message in filter(None, gather([error])):
        fail(message)


def find_output(config: Config, restart: bool, launch: str) -> str:
    """--output_dir. Without it, the folder of this launch after a restart, else a fresh runs/NNN, made at once: no
    other start gets it too."""
    if config.output_dir:
        return config.output_dir
    numbers = sorted(int(folder.name) for folder in (HERE / "runs").glob("*") if folder.name.isdigit())
    known = [file for file in (HERE / "runs" / f"{n:03d}" / "settings.json" for n in numbers) if file.exists()]
    if restart and (mine := [file for file in known if json.loads(file.read_text())["launch"] == launch]):
        return str(mine[-1].parent)
    for n in count(max(numbers, default=0) + 1):
        with suppress(FileExistsError):
            (HERE / "runs" / f"{n:03d}").mkdir(parents=True)
            return str(HERE / "runs" / f"{n:03d}")


def claim_output(run: Run) -> None:
    """Finds the output folder, refuses one that is not ours to continue, and writes the settings into it."""
    config, error, name = run.config, None, None
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a failure
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    try:
        if run.rank == 0:  # on separate disks only its node has settings.json
            name = find_output(config, restart, launch)
    except OSError as problem:
        error = f"--output_dir: {HERE / 'runs'}: {problem.strerror}; name a folder that can be written"
    agree(error)
    config.output_dir = gather([name])[0]
    run.output = Path(config.output_dir)
    settings = json.loads(json.dumps({**asdict(config), "ranks": run.world, "launch": launch}))
    path, metrics = run.output / "settings.json", run.output / "metrics.jsonl"
    try:
        measured = metrics.exists() and metrics.stat().st_size > 0
        shards = any((run.output / "checkpoints").glob("step_*"))
        if path.exists() and (measured or shards):  # a start that failed before it had either is not in the way
            saved = json.loads(path.read_text())
            free = {*FREE, "launch"} - ({"steps"} if config.schedule == "cosine" else set())
            changed = [name for name in saved if name not in free and saved[name] != settings.get(name)]
            if not (config.resume or (restart and saved["launch"] == launch)):  # a restart may find a refused run
                error = f"--output_dir {run.output} already holds a run; add --resume to go on, or name another folder"
            elif changed:
                error = (f"--resume with another {changed[0]} ({saved[changed[0]]} in {path}, now "
                         f"{settings.get(changed[0])}) would be another run; put it back, or choose another --output_dir")
        elif measured:
            error = f"--output_dir {run.output} holds metrics.jsonl but no settings.json; choose another folder"
        elif run.rank == 0 and shards:  # separate disks, nodes in another order
            error = (f"--output_dir {run.output} holds another rank's checkpoints and no settings.json: rank 0 must be on "
                     "the node it was on; torchrun --node_rank with a static rendezvous fixes the order")
        agree(error)  # and only then does anybody write
        run.output.mkdir(parents=True, exist_ok=True)
        if run.rank == 0:
            run.lock = lock(run.output)  # until this process ends, however it ends
            write_whole(path, json.dumps(settings, indent=1).encode())
    except BlockingIOError:
        error = f"--output_dir {run.output}: another run is writing there; wait for its end, or name another folder"
    except OSError as problem:
        error = f"--output_dir {run.output}: {problem.strerror}; choose a folder that can be written"
    agree(error)


def load_all(run: Run) -> None:
    """Tokenizer, model and problems; ValueError or OSError, in words for the user, where one cannot be had."""
    config = run.config
    run.problems, run.eval_problems = load_problems(config.train_data), load_problems(config.eval_data)
    run.model, run.tokenizer = load_policy(config.model, "auto", run.device)
    for module in run.model.modules():  # with dropout pi_theta would be a random function, and the ratio never 1
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if config.gradient_checkpointing:
        run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model.train(config.gradient_checkpointing)


def settle_problems(run: Run) -> None:
    """Leaves out what does not fit the context, and names golds nobody can be right about; ValueError if nothing is left."""
    config, source = run.config, f"--train_data {run.config.train_data}"
    check_golds(run.grader, run.problems, source)
    asked = askable(run.engine, run.tokenizer, run.problems, config.max_new_tokens, source)
    run.problems = [run.problems[q] for q in asked]
    held_out = run.eval_problems[: config.eval_questions]
    run.eval_asked = askable(run.engine, run.tokenizer, held_out, config.max_new_tokens, f"--eval_data {config.eval_data}")


def start_wandb(run: Run) -> None:
    if not run.config.wandb or run.rank != 0:
        return
    try:
        import wandb

        wandb.init(project="scrpo", config=asdict(run.config))
    except Exception as problem:  # not installed, not logged in, no network: wandb has no one class for them
        raise ValueError(f"--wandb: {problem}; pip install wandb and log in, or leave the flag out") from problem


def build(run: Run) -> None:
    """What needs model and output folder: reference, optimizer, grader, engine, DDP, pool."""
    config = run.config
    bf16 = config.precision == "bf16" or (config.precision == "auto" and run.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    if config.beta:
        reference, _ = load_policy(config.model, dtype, run.device)
        run.reference = Policy(reference.requires_grad_(False), config.temperature, config.logprob_chunk)
    else:
        run.reference = None  # pi_ref is not even loaded
    run.optimizer = MasterAdamW(run.model, dtype, config, run.rank, run.world)
    run.grader = Grader(workers=config.grader_workers)
    run.engine = make_engine(
        config.rollout, run.model, run.tokenizer, model_path=config.model, seed=config.seed,
        max_context=config.max_context, memory_share=config.memory_share,
    )
    settle_problems(run)
    # No buffers to broadcast: that would be a collective in each forward pass, and ranks differ in how many they run.
    policy = Policy(run.model, config.temperature, config.logprob_chunk)
    run.policy = DistributedDataParallel(policy, gradient_as_bucket_view=True, broadcast_buffers=False)
    run.pool = None
    if config.algorithm == "scrpo":
        run.pool = ErrorPool(config.pool_trigger, config.min_variance, config.errors_per_question)


def set_up(arguments: list[str]) -> Run:
    """Builds everything, on all ranks together."""
    # First of all: if a rank failed while rank 0 is still importing, torchrun would end rank 0 before it says why.
    rank, world, device = start_distributed()
    gather([])  # nor may one leave while another is still being connected
    config, error = parse(arguments), None
    run = Run(config)
    run.rank, run.world, run.device = rank, world, device
    try:
        start_wandb(run)
        load_all(run)
    except (ImportError, ValueError, OSError) as problem:
        error = " ".join(str(problem).split())
    agree(error)
    claim_output(run)
    try:
        build(run)
    except ValueError as problem:
        fail(" ".join(str(problem).split()), alone=True)
    except RuntimeError as problem:  # perhaps on this rank alone: one GPU of many may be full
        told = "".join(traceback.format_exception(problem))
        fail(f"{' '.join(str(problem).split())[:300]} (traceback: {keep_traceback(run, told)})", alone=True)
    return run


def introduce(run: Run, resumed: bool) -> None:
    """What is about to happen, and the first rendered prompt."""
    config, million = run.config, sum(p.numel() for p in run.model.parameters()) / 1e6
    run.say(
        f"{config.algorithm}: {config.model} ({million:.1f} M parameters, {'bf16' if run.optimizer.bf16 else 'fp32'}), "
        f"{len(run.problems):,} questions, {run.world} rank(s) on {run.device.type}, {run.engine.name} engine\n"
        f"{config.steps} steps of {config.questions_per_step} x {config.group_size} samples; stage 2 when "
        f"{config.pool_trigger} errors wait\nwriting to {run.output}\n--- stage 1: the first prompt\n"
        f"{run.tokenizer.decode(render(run.tokenizer, solution_prompt(run.problems[0].problem)))}\n---"
    )
    if resumed:
        waiting = len(run.pool or ())
        run.say(f"resumed after step {run.state.step}, in stage {run.state.stage}, with {waiting} errors waiting")
    toy = Config()
    if config.model != toy.model and config.eval_data == toy.eval_data and run.eval_asked:
        warn("--eval_data is still the toy's sums; name held-out problems of your own, or give --eval_questions 0")
    if config.algorithm == "dapo" and (config.beta or config.reduction != "dapo"):
        warn(f"--algorithm dapo with --beta {config.beta} --reduction {config.reduction}: DAPO has beta 0 and reduction dapo")
    if million > 100 and config.learning_rate > 2e-5:
        warn(f"--learning_rate {config.learning_rate} suits the toy; {million:,.0f} M parameters usually get 1e-6")


def keep_traceback(run: Run, told: str) -> Path:
    file = run.output / f"error_rank_{run.rank}.txt"
    with suppress(OSError):
        file.write_text(told)
    return file


def say_stopped(run: Run) -> None:
    run.say(f"stopped by a signal after step {run.state.step}; --output_dir {run.output} --resume goes on from there")


def leave(run: Run, error: BaseException) -> None:
    """Ends this rank by itself: another may have died or left, so nothing here is collective and no destructor runs.

    Where the weights are still those of the last boundary, it is saved first. Then one line about the cause: our own,
    or, if a collective failed, which rank was lost: those alive sign in torchrun's store, which outlives them.
    """
    run.sampling = False  # a SIGTERM that comes only now interrupts nothing
    if run.boundary and not isinstance(error, OSError):
        with suppress(OSError):
            save_checkpoint(run, run.boundary)
    store, code, lost = dist.distributed_c10d._get_default_store(), run.exit_code, []
    told = "".join(traceback.format_exception(error))
    try:
        store.set(f"alive_{run.rank}", "")
        if "torch/distributed" in told or "gloo" in told or "NCCL" in told:  # a collective failed, DDP's own included
            time.sleep(2)
            lost = [rank for rank in range(run.world) if not store.check([f"alive_{rank}"])]
    except RuntimeError:  # without torchrun the store is rank 0's, and gone with it
        lost = [0]
    if not isinstance(error, Preempted) and (lost or not run.stop):  # else all got SIGTERM, and some left before us
        code, traceback_file = 1, keep_traceback(run, told)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        cause = f"lost rank {', '.join(map(str, lost))}" if lost else cause
        print(f"error: rank {run.rank}, after step {run.state.step}: {cause[:300]} (traceback: {traceback_file}); "
              f"--output_dir {run.output} --resume goes on from the last whole checkpoint", file=sys.stderr)
    elif isinstance(error, Preempted):
        say_stopped(run)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def main(arguments: Optional[list[str]] = None) -> None:
    run = set_up(sys.argv[1:] if arguments is None else arguments)
    interruptions = (signal.SIGTERM, signal.SIGINT)  # the machine is wanted for another; Ctrl-C
    handlers = [signal.signal(number, run.interrupt) for number in interruptions]
    try:
        with run.grader:
            resumed = load_checkpoint(run)
            rewind_logs(run)
            introduce(run, resumed)
            train(run)
            if run.stop:
                say_stopped(run)
            else:
                save_final(run)
                summary(run)
    except FloatingPointError as error:
        fail(str(error))
    except (Preempted, RuntimeError, OSError) as error:  # SIGTERM; a lost rank or no memory; a full disk
        leave(run, error)
    finally:
        for number, handler in zip(interruptions, handlers):
            signal.signal(number, handler)
    dist.destroy_process_group()
    if run.exit_code:
        sys.exit(run.exit_code)


if __name__ == "__main__":
    main()
