"""ScRPO, Self-correction Relative Policy Optimization ("From Errors to Insights", 2511.06065).

    torchrun --standalone train.py                     # the embedded toy: a minute on 2 CPU cores
    torchrun --standalone --nproc_per_node=2 train.py  # the same samples, shared by two ranks
    torchrun --standalone train.py --algorithm grpo    # the baselines by the same loop: grpo, dapo
    torchrun --standalone train.py --output_dir runs/mine --resume    # starts it, or goes on
    torchrun --standalone --nproc_per_node=8 train.py configs/r1_distill_1.5b_8gpu.yaml

The algorithm (equation numbers are this project's; B questions a step, G samples each):

    E = {}; stage = 1
    for step in 1, 2, ...:
        1. stage 1 -> 2 when |E| >= N, back when |E| < B               Eq. 9        next_stage
        2. stage 1: B questions, G responses each, reward R,           Eq. 1        trial_and_error
           advantage Â relative to the group,                          Eq. 2
           wrong responses to informative questions go to the pool E   Eqs. 7, 8
        3. stage 2: the B oldest errors, G corrections each,           Eq. 10       self_correction
           reward R', advantage Â' relative to the group,              Eqs. 11, 2
           and m: only the analysis of a right one carries gradient    Eq. 12
        4. optimizer steps on the clipped surrogate                    Eqs. 3-6, 13, 14      update

How it stays simple at any size:

1. Every rank samples and grades its own questions, then one gather gives all groups to all ranks.
   From there on all but the forward passes is the same pure computation on every rank: the pool,
   the denominators, who trains on what.
2. All randomness is a function of (seed, step, question, sample), never of a generator's history.
   So batches and restarts change nothing, and a checkpoint needs no random state.
3. Loss tokens are counted over the whole optimizer step before the first micro-batch; sums are
   divided by that count and multiplied by the number of ranks, because DDP averages. A mean per
   micro-batch would weigh tokens by the company they happen to be in.
4. Weights are kept in fp32, also where bf16 computes: at lr 1e-6 most of an update is smaller than
   half a bf16 step, and would be rounded away.

Left out on purpose: tensor parallelism, rollouts beside updates, a reward model.
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import (
    CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts,
)  # fmt: skip
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer

from error_pool import ErrorPool, correction_prompt, informative, next_stage
from evaluate import accuracy, correction_tasks, records
from loss import (
    REDUCTIONS, analysis_mask, carries_gradient, deal, group_advantages, importance_weights,
    overlong_punishment, policy_loss, step_denominator, token_logprobs,
)  # fmt: skip
from reward import Grader
from rollout import (
    Group, Task, claim, digest, fail, fits, fitting, flag, gather, load_policy, load_problems,
    make_engine, needed_context, render, sample_groups, solution_task, start_distributed, warn,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # newer torch has a successor


# ====================================================================================== 1. settings


@dataclass
class Config:
    """ScRPO on one or many GPUs, or on a CPU. Without a flag: the embedded toy. A YAML file of
    these names may come first; flags after it win."""

    # What is trained, on what
    model: str = flag(str(HERE / "toy"), "folder or hub id of a Hugging Face causal language model")
    train_data: str = flag(str(HERE / "toy/train.jsonl"), "file, or hub dataset as id:config:split")
    eval_data: str = flag(str(HERE / "toy/test.jsonl"), "held-out problems, in the same form")
    output_dir: Optional[str] = flag(None, "where all is written; default: a fresh runs/NNN")
    resume: bool = flag(False, "go on from the newest whole checkpoint in output_dir, or start")
    seed: int = flag(0, "all randomness is a function of (seed, step, question, sample)")
    # The algorithm
    algorithm: Literal["scrpo", "grpo", "dapo"] = flag("scrpo", "grpo, dapo: baselines")
    steps: int = flag(60, "rollouts, of either stage (TRL: max_steps / updates_per_rollout)")
    questions_per_step: int = flag(32, "B, over all ranks (TRL: generation_batch_size / G)")
    group_size: int = flag(8, "G, samples a question (TRL: num_generations)")
    max_new_tokens: int = flag(160, "longest response, also L_max (TRL: max_completion_length)")
    temperature: float = flag(1.0, "of sampling and of every log-probability (TRL: temperature)")
    updates_per_rollout: int = flag(2, "a rollout (TRL: steps_per_generation / accumulation)")
    scale: Literal["std", "none"] = flag("std", "Eq. 2; none: Dr. GRPO (TRL: scale_rewards)")
    clip_low: float = flag(0.2, "Eq. 5's lower clip; 0.2 is usual with GRPO (TRL: epsilon)")
    clip_high: Optional[float] = flag(None, "default 0.2, dapo 0.28 (TRL: epsilon_high)")
    beta: float = flag(0.0, "Eq. 5's KL weight; DeepSeekMath 0.04, R1 0.001, DAPO 0 (TRL: beta)")
    reduction: Optional[Literal[REDUCTIONS]] = flag(None, "Eq. 6; default grpo (TRL: loss_type)")
    importance_cap: float = flag(
        2.0, "C of Eq. 14; 0: w = 1 [ours] (TRL: vllm_importance_sampling_clip_max)"
    )
    # Error pool and stage 2
    pool_trigger: int = flag(32, "N of Eq. 9: errors that start stage 2 [ours]")
    min_variance: float = flag(0.15, "tau of Eq. 7; 0: no filter [ours: 2 to 6 right of 8]")
    errors_per_question: int = flag(1, "Eq. 8: wrong responses kept of a group [ours]")
    train_stages: Literal["both", "1", "2"] = flag("both", "ablation; both are sampled anyway")
    success_conditioned: bool = flag(True, "Eq. 12; off (ablation): failed ones carry their Â too")
    credit: Literal["analysis", "response"] = flag("analysis", "Eq. 12; response: all (ablation)")
    analysis_span: Literal["sections", "prefix"] = flag("sections", "prefix: till the solution")
    # DAPO's own
    dynamic_sampling: Optional[int] = flag(None, "rounds of drawing; default 1, dapo 4 [ours]")
    overlong_cache: Optional[int] = flag(None, "Eq. 15: length of the ramp; dapo L_max / 5")
    # Optimizer
    learning_rate: float = flag(5e-4, "5e-4: the toy's; usual for 1.5B: 1e-6 (TRL: learning_rate)")
    schedule: Literal["constant", "cosine"] = flag("cosine", "of the rate (TRL: lr_scheduler_type)")
    warmup_steps: int = flag(0, "steps of linear warm-up; DAPO 20 (TRL: warmup_steps)")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (TRL: weight_decay)")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm (TRL: max_grad_norm)")
    # Machine
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "the engine (TRL: use_vllm)")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "auto: bf16 on a GPU (TRL: bf16)")
    micro_batch_tokens: Optional[int] = flag(None, "of a forward pass; default: by model size")
    logprob_chunk: int = flag(1024, "positions whose logits exist at the same time")
    gradient_checkpointing: bool = flag(False, "recompute activations (TRL: the same)")
    compile: bool = flag(False, "fewer, larger GPU kernels, after two minutes (TRL: torch_compile)")
    max_context: Optional[int] = flag(None, "default: by need (TRL: vllm_max_model_length)")
    memory_share: float = flag(0.3, "for the engine (TRL: vllm_gpu_memory_utilization)")
    # What is written, and when
    eval_every: int = flag(10, "steps between evaluations, 0: at both ends only (TRL: eval_steps)")
    eval_questions: int = flag(512, "held-out problems of an evaluation, from the top; 0: none")
    save_every: int = flag(20, "steps between checkpoints; two are kept (TRL: save_steps)")


AT_LEAST_ONE = (
    "questions_per_step", "max_new_tokens", "updates_per_rollout", "errors_per_question",
    "dynamic_sampling", "micro_batch_tokens", "logprob_chunk", "save_every",
)  # fmt: skip
# What may differ between a run and its resumption: it does not change what is computed.
FREE = {"output_dir", "resume", "steps", "eval_every", "save_every"}


def parse(arguments: list[str]) -> Config:
    """The command line, after an optional YAML file of defaults. ValueError where it is wrong."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=Config.__doc__)
    parser.error = lambda message: fail(f"{message}; see --help")  # else all ranks print the usage
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path, *arguments = arguments
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")).items()
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            fault = f"{path}: cannot be read as YAML lines `name: value` ({error})"
            raise ValueError(fault) from None
        # As flags, not as set_defaults: so their types and choices are checked too.
        arguments = [f"--{name}={value}" for name, value in settings] + arguments
    config = Config(**vars(parser.parse_args(arguments)))
    check(config)
    return config


def check(config: Config) -> None:
    """Fills in what --algorithm decides. ValueError, one line, for what the method rules out."""
    c, scrpo, dapo = config, config.algorithm == "scrpo", config.algorithm == "dapo"
    of_algorithm = {
        "clip_high": 0.28 if dapo else 0.2,
        "reduction": "dapo" if dapo else "grpo",
        "dynamic_sampling": 4 if dapo else 1,
        "overlong_cache": c.max_new_tokens // 5 if dapo else 0,
    }
    for name, value in asdict(c).items():
        if value is None and name in of_algorithm:
            setattr(c, name, of_algorithm[name])
        elif isinstance(value, (int, float)):
            least = 2 if name == "group_size" else int(name in AT_LEAST_ONE)
            if not value >= least:  # not `<`: nan is never less
                raise ValueError(f"--{name} {value}: must be at least {least}")
    B, G = c.questions_per_step, c.group_size
    if c.temperature == 0:
        raise ValueError("--temperature 0: training samples, so it must be above 0")
    if c.resume and not c.output_dir:
        raise ValueError("--resume goes on in --output_dir, which is missing: name it")
    if scrpo and c.pool_trigger < B:
        raise ValueError(f"--pool_trigger {c.pool_trigger} is less than --questions_per_step {B}: "
                         "stage 2 would begin with too few errors; raise it")  # fmt: skip
    if scrpo and (c.min_variance > 0.25 or not informative(G // 2, G, c.min_variance)):
        raise ValueError(f"--min_variance {c.min_variance}: the rewards of --group_size {G} cannot "
                         "vary so much, and nothing would be informative; lower it")  # fmt: skip
    if not scrpo and c.train_stages == "2":
        raise ValueError(f"--train_stages 2: --algorithm {c.algorithm} has no stage 2")
    if B % c.updates_per_rollout:
        raise ValueError(f"--updates_per_rollout {c.updates_per_rollout} does not divide "
                         f"--questions_per_step {B}; choose a divisor")  # fmt: skip
    if c.overlong_cache > c.max_new_tokens:
        raise ValueError(f"--overlong_cache {c.overlong_cache} exceeds --max_new_tokens; lower it")


# ================================================================================= 2. the algorithm


@dataclass
class State:
    """Where a run stands: what a checkpoint holds beside weights, optimizer and pool."""

    step: int = 0  # the last one that is finished
    stage: int = 1
    questions: int = 0  # drawn so far: the place in the stream of `question_order`
    samples: int = 0  # drawn so far, those of discarded groups too
    tokens: int = 0  # sampled so far
    visits: int = 0  # to stage 2
    visit_loss_tokens: int = 0  # of the current visit
    dropped_errors: int = 0  # whose correction prompt did not fit
    barren: int = 0  # stage-1 steps in a row all wrong, or all cut off


def train(run) -> None:
    """The algorithm box of the paper. `run` holds what `set_up` built: see `Run`."""
    config, state = run.config, run.state
    if state.step == 0:
        log(run, {"step": 0, **evaluate_policy(run)}, [])
    bar = tqdm(total=config.steps, initial=state.step, disable=run.rank > 0, desc=config.algorithm)
    saved = state.step
    # Stopped together: a signal may reach the ranks in different steps.
    while state.step < config.steps and not any(gather([run.signalled])):
        step, run.seconds, started = state.step + 1, Counter(), time.perf_counter()
        switched = switch_stage(run)  # Eq. 9
        run.engine.update_weights(run.model)
        act = trial_and_error if state.stage == 1 else self_correction
        groups, examples, metrics = act(run, step)  # Eqs. 1, 2, 7, 8 or 2, 10, 11, 12
        run.engine.sleep()
        run.seconds["rollout"] = time.perf_counter() - started
        if switched and state.stage == 2:
            show_correction(run, groups, examples)
        if config.train_stages in ("both", str(state.stage)):
            trained = (run.policy, run.reference, run.optimizer)
            metrics |= update(*trained, config, step, groups, examples)  # Eqs. 3 to 6, 13, 14
            run.seconds["update"] = time.perf_counter() - started - run.seconds["rollout"]
        state.step = step
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            metrics |= evaluate_policy(run)
        log(run, {"step": step, "stage": state.stage} | metrics, groups)
        watch(run, metrics, groups)
        share = metrics["accuracy"] if state.stage == 1 else metrics["correction_success"]
        bar.set_postfix(stage=state.stage, right=share, pool=len(run.pool or ()))
        bar.update()
        if step % config.save_every == 0:
            save_checkpoint(run)
            saved = step
    if saved < state.step:
        save_checkpoint(run)
    bar.close()


def trial_and_error(run, step: int) -> tuple[list[Group], list["Example"], dict]:
    """Stage 1: B questions -> G responses each -> R (Eq. 1) -> Â (Eq. 2); fills E (Eqs. 7, 8)."""
    config = run.config
    groups, discarded = draw_questions(run, step)
    rewards = torch.tensor([group.rewards for group in groups])  # Eq. 1 [B,G]
    lengths = torch.tensor([[len(s.token_ids) for s in g.samples] for g in groups])  # |o_i| [B,G]
    longest, cache = config.max_new_tokens, config.overlong_cache
    shaped = rewards + overlong_punishment(lengths, longest, cache) if cache else rewards  # Eq. 15
    advantages = group_advantages(shaped, config.scale)  # Eq. 2
    if run.pool is not None:
        for g in groups:
            responses, finished = [s.text for s in g.samples], [s.finished for s in g.samples]
            run.pool.add(g.problem, g.answer, responses, g.rewards, finished)  # Eqs. 7, 8
    masks = [[torch.ones(n, dtype=torch.bool) for n in row] for row in lengths.tolist()]
    examples = make_examples(groups, advantages, masks, lengths.tolist())
    return groups, examples, {"accuracy": rewards.mean().item(), "discarded_groups": discarded}


def self_correction(run, step: int) -> tuple[list[Group], list["Example"], dict]:
    """Stage 2: B errors -> x' (Eq. 10) -> G corrections each -> R' (Eq. 11) -> Â', m (Eq. 12)."""
    config, tasks = run.config, []
    while len(tasks) < config.questions_per_step and len(run.pool):
        (error,) = run.pool.take(1)
        prompt = render(run.tokenizer, correction_prompt(error.problem, error.response))  # Eq. 10
        if fits(prompt, config.max_new_tokens, run.engine.max_context):
            tasks.append(Task(error.problem, error.answer, prompt, question=len(tasks)))
        else:
            run.state.dropped_errors += 1
    if not tasks:
        return [], [], {"correction_success": None, "well_formed": None}
    groups = draw_samples(run, step, tasks, span=config.analysis_span)
    rewards = torch.tensor([group.rewards for group in groups])  # R', Eq. 11 [B,G]
    advantages = group_advantages(rewards, config.scale)  # Â', Eq. 2
    masks, counted = [], []
    for g in groups:
        lengths = [len(s.token_ids) for s in g.samples]
        spans = g.spans if config.credit == "analysis" else [(0, n) for n in lengths]
        right = [reward == 1 for reward in g.rewards] if config.success_conditioned else None
        masks.append(analysis_mask(spans, max(lengths), right))  # m, Eq. 12
        counted.append([end - start for start, end in (span or (0, 0) for span in spans)])
    examples = make_examples(groups, advantages, masks, counted)
    well_formed = np.mean([span is not None for g in groups for span in g.spans])
    success = rewards.mean().item()
    return groups, examples, {"correction_success": success, "well_formed": well_formed}


def draw_questions(run, step: int) -> tuple[list[Group], int]:
    """The B groups of a stage-1 step, and how many were discarded on the way.

    With DAPO's dynamic sampling, groups of equal rewards are replaced by fresh questions, a bounded
    number of times; what is then missing is filled with the groups discarded last.
    """
    B, rounds = run.config.questions_per_step, run.config.dynamic_sampling
    kept, equal = [], []
    for attempt in range(rounds):
        n = B - len(kept)
        order = question_order(run.config.seed, len(run.problems), run.state.questions, n)
        run.state.questions += n
        # Numbered on from round to round: a second round's seeds are not the first's.
        tasks = [solution_task(run.tokenizer, run.problems[q], attempt * B + b)
                 for b, q in enumerate(order)]  # fmt: skip
        for group in draw_samples(run, step, tasks):
            (kept if rounds == 1 or len(set(group.rewards)) > 1 else equal).append(group)
        if len(kept) == B:
            return kept, len(equal)
    missing = B - len(kept)
    return kept + equal[-missing:], len(equal) - missing


def question_order(seed: int, count: int, start: int, n: int) -> list[int]:
    """Places start .. start + n - 1 of an endless stream in which every epoch is a fresh shuffle.

    >>> order = question_order(seed=0, count=5, start=0, n=10)
    >>> sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4], order[:5] == order[5:]
    (True, False)
    >>> question_order(seed=0, count=5, start=3, n=4) == order[3:7]   # any part can be asked for
    True
    """
    epochs = range(start // count, (start + n - 1) // count + 1)
    stream = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs]
    return np.concatenate(stream)[start % count :][:n].tolist()


def draw_samples(run, step: int, tasks: list[Task], span: Optional[str] = None) -> list[Group]:
    """G graded samples of each task at the run's settings; every rank gets all groups."""
    config = run.config
    groups = sample_groups(
        run.engine, run.tokenizer, run.grader, tasks, range(config.group_size), seed=config.seed,
        step=step, temperature=config.temperature, max_new_tokens=config.max_new_tokens, span=span,
    )  # fmt: skip
    run.state.samples += sum(len(g.samples) for g in groups)
    run.state.tokens += sum(len(s.token_ids) for g in groups for s in g.samples)
    return groups


def switch_stage(run) -> bool:
    """Eq. 9. True if the stage changed; a visit to stage 2 that taught nothing gets a warning."""
    config, state, before = run.config, run.state, run.state.stage
    if run.pool is None:
        return False
    N, B = config.pool_trigger, config.questions_per_step
    state.stage = next_stage(before, len(run.pool), N, B)  # Eq. 9
    if before < state.stage:
        state.visits, state.visit_loss_tokens = state.visits + 1, 0
    if before > state.stage and not state.visit_loss_tokens and config.train_stages != "1":
        warn(f"visit {state.visits} to stage 2 trained on nothing: no correction had both headers, "
             "`Analysis:` and `Corrected Solution:`, or none was right where another was wrong")
    return before != state.stage


def evaluate_policy(run) -> dict:
    """Held-out accuracy, and the share of its own finished wrong answers that the policy corrects.

    Always with the same seeds, so that before and after are paired.
    """
    config, started = run.config, time.perf_counter()
    if not run.eval_tasks:
        return {}
    run.engine.update_weights(run.model)
    longest, one = config.max_new_tokens, range(1)
    sampling = dict(seed=config.seed, temperature=config.temperature, max_new_tokens=longest)
    by = (run.engine, run.tokenizer, run.grader)
    answers = sample_groups(*by, run.eval_tasks, one, **sampling)
    wrong = [group for group in answers if group.verdicts != ["right"]]
    tasks = correction_tasks(run.tokenizer, records(wrong), longest, run.engine.max_context)
    corrections = sample_groups(*by, tasks, one, span=config.analysis_span, **sampling)
    run.engine.sleep()
    run.seconds["evaluation"] = time.perf_counter() - started
    (right, right_se), (corrected, corrected_se) = accuracy(answers), accuracy(corrections)
    return {"eval_accuracy": right, "eval_accuracy_se": right_se,
            "eval_correction": corrected, "eval_correction_se": corrected_se}  # fmt: skip


# ==================================================================================== 3. the update


@dataclass
class Example:
    """One sample as the loss sees it: what follows its last loss token is not even run."""

    group: int  # its place in the rollout, which decides the optimizer step it belongs to
    sample: int  # its place in the group
    advantage: float
    counted: int  # tokens it has in the denominator (Eqs. 6, 13)
    ids: list[int]  # prompt and response, up to the last loss token
    first: int  # place of the first loss token; `mask` and `engine_logp` begin there
    mask: torch.Tensor  # bool, m of Eq. 12; all True in stage 1
    engine_logp: list[float]  # log mu


def make_examples(groups, advantages, masks, counted) -> list[Example]:
    """Cuts each sample to its loss tokens; one without any keeps its place in the denominator.

    masks[b][i], bool, and counted[b][i], a length, are those of sample i of group b.
    """
    examples = []
    for b, group in enumerate(groups):
        for i, s in enumerate(group.samples):
            tokens = masks[b][i].nonzero().flatten().tolist()
            start, end = (tokens[0], tokens[-1] + 1) if tokens else (0, 0)
            ids, first = group.prompt + s.token_ids[:end], len(group.prompt) + start
            mask, engine_logp = masks[b][i][start:end], s.logprobs[start:end]
            advantage = advantages[b, i].item()
            examples.append(Example(b, i, advantage, counted[b][i], ids, first, mask, engine_logp))
    return examples


class Policy(torch.nn.Module):
    """The model as DDP has to see it: its forward pass gives log-probabilities, never logits."""

    def __init__(self, model, *how):
        super().__init__()
        self.model, self.how = model, how  # temperature, chunk, vocabulary, fuse

    def forward(self, ids, attention, first):
        return token_logprobs(self.model, ids, attention, first, *self.how)


def compile_layers(model, recompute: bool) -> None:
    """Makes few kernels of all that stands between a layer's matrix products [ours].

    With `recompute`, as gradient checkpointing, backward makes a layer's activations again, but not
    attention's: small, and dear to compute. Not compiled, such a choice costs more than it saves.
    """
    kept, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE

    def choose(_, operation, *args, **kwargs):
        return kept if "attention" in str(operation) else again

    contexts = partial(create_selective_checkpoint_contexts, choose)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            forward = layer.forward
            if recompute:
                forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
            layer.forward = torch.compile(forward, dynamic=True)


def collate(examples: list[Example], device) -> SimpleNamespace:
    """One micro-batch, padded on the right: S sequences of L tokens, T loss columns."""

    def pad(rows, dtype):
        rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(rows, batch_first=True).to(device)

    return SimpleNamespace(
        ids=pad([e.ids for e in examples], torch.long),  # [S,L]
        # from lengths, not from ids: a pad id may also be the EOS
        attention=pad([[1] * len(e.ids) for e in examples], torch.long),  # [S,L]
        first=torch.tensor([e.first for e in examples], device=device),  # [S]
        mask=pad([e.mask for e in examples], torch.bool),  # [S,T]
        engine_logp=pad([e.engine_logp for e in examples], torch.float32),  # log mu [S,T]
        advantages=torch.tensor([e.advantage for e in examples], device=device),  # [S]
        old_logp=None,  # log pi_old [S,T]; None: pi_theta's own, without gradient
    )


def minibatches(config: Config, groups, examples, device) -> list[tuple]:
    """(denominator, this rank's micro-batches) of each optimizer step; None: this rank has no more.

    Cut by group before anything is skipped, so that what is skipped changes no denominator.
    """
    updates, ranks, cut = config.updates_per_rollout, dist.get_world_size(), []
    for u in range(updates):
        part = [e for e in examples if e.group * updates // len(groups) == u]
        counted, longest = [e.counted for e in part], config.max_new_tokens
        denominator = step_denominator(counted, config.reduction, longest)  # Eqs. 6, 13
        part = [e for e in part if carries_gradient(int(e.mask.sum()), e.advantage, config.beta)]
        mine = deal([len(e.ids) for e in part], ranks, config.micro_batch_tokens)[dist.get_rank()]
        batches = [collate([part[i] for i in batch], device) if batch else None for batch in mine]
        cut.append((denominator, batches))
    return cut


def update(policy, reference, optimizer, config: Config, step: int, groups, examples) -> dict:
    """Ascends J_1 (Eq. 6) or J_2 (Eq. 13) in `updates_per_rollout` optimizer steps."""
    # Only in training mode does a model recompute; the engine has left it in the other one.
    policy.train(policy.module.model.is_gradient_checkpointing)
    world, totals = dist.get_world_size(), Counter()
    cut = minibatches(config, groups, examples, next(policy.parameters()).device)
    # pi_old is the policy at the rollout. The first optimizer step has it for nothing; before the
    # later ones the weights will have moved, so they get theirs now.
    with torch.no_grad():
        for _, batches in cut[1:]:
            for batch in filter(None, batches):
                batch.old_logp, _ = policy.module(batch.ids, batch.attention, batch.first)
    for denominator, batches in cut:
        if not batches:  # on any rank: a step would let Adam's momentum move the weights on its own
            totals["empty_updates"] += 1
            continue
        for i, batch in enumerate(batches):
            # fp32 gradients add up locally and are averaged with the last backward; bf16 ones are
            # averaged each time, to be summed in fp32 by their owner alone.
            local = i < len(batches) - 1 and not optimizer.bf16
            with policy.no_sync() if local else nullcontext():
                loss = batch_loss(policy, reference, config, batch, denominator, totals)
                (loss * world).backward()  # DDP averages over ranks; the denominator is of all
            optimizer.accumulate()
        norm = optimizer.step(learning_rate(config, step))
        if math.isfinite(norm):
            totals["updates"] += 1
            totals["norm"] += norm
        else:
            totals["nonfinite_updates"] += 1
    torch.cuda.empty_cache()  # vLLM wakes past torch's allocator, and cannot use what that keeps
    return average(totals, gather([totals]), config.beta)


def batch_loss(policy, reference, config: Config, batch, denominator: float, totals: Counter):
    """This micro-batch's part of -J; its part of the step's statistics is added to `totals`."""
    if batch is None:  # nothing left for this rank, but DDP waits for a gradient of every parameter
        two = torch.ones(1, 2, dtype=torch.long, device=next(policy.parameters()).device)  # tokens
        return policy(two, two, two[:, 0])[0].sum() * 0.0
    logp, entropy = policy(batch.ids, batch.attention, batch.first)  # [S,T]
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    ref_logp, weights = None, None
    if reference is not None:
        with torch.no_grad():
            ref_logp, _ = reference(batch.ids, batch.attention, batch.first)
    if config.importance_cap:
        weights = importance_weights(old_logp, batch.engine_logp, config.importance_cap)  # Eq. 14
    loss, stats = policy_loss(
        logp, old_logp, ref_logp, batch.advantages, batch.mask, clip_low=config.clip_low,
        clip_high=config.clip_high, beta=config.beta, reduction=config.reduction, weights=weights,
        denominator=denominator,
    )  # fmt: skip
    gap = (old_logp - batch.engine_logp)[batch.mask]  # 0 but for numerics, or the engine is stale
    stats |= {"loss": loss.detach(), "entropy": entropy[batch.mask].sum()}
    for name, value in stats.items():
        totals[name] += value.item()
    totals["gap"] += gap.abs().sum().item()
    totals["gap_max"] = max(totals["gap_max"], gap.abs().max().item())
    totals["capped"] += (gap.exp() > (config.importance_cap or math.inf)).sum().item()
    return loss


def average(mine: Counter, ranks: list[Counter], beta: float) -> dict:
    """Sums over all ranks' loss tokens -> the step's metrics; None where nothing was trained on."""
    total = {name: sum(rank[name] for rank in ranks) for name in set().union(*ranks)}
    updates, n = mine["updates"], total.get("tokens")

    def mean(name):
        return total[name] / n if n else None

    return {
        "loss": total["loss"] / updates if updates else None,
        "grad_norm": mine["norm"] / updates if updates else None,
        "loss_tokens": int(n or 0), "clip_fraction": mean("clipped"), "entropy": mean("entropy"),
        "kl": mean("kl") if beta else None, "capped_fraction": mean("capped"),
        "logp_gap": mean("gap"),
        "logp_gap_max": max(rank["gap_max"] for rank in ranks) if n else None,
        "empty_updates": mine["empty_updates"], "nonfinite_updates": mine["nonfinite_updates"],
    }  # fmt: skip


def learning_rate(config: Config, step: int) -> float:
    """Of step 1, 2, ...: linear warm-up, then constant or a cosine to 0 after the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


# ================================================================================== 4. fp32 masters


class MasterAdamW:
    """AdamW on fp32 masters. A parameter's master and moments live on one rank, which publishes it.

    With bf16 compute on W ranks and P parameters this is 2P + 2P + 16P/W bytes a rank (weights,
    gradients; master, gradient sum, two moments). With fp32 compute the parameters are their own
    masters. PyTorch's ZeroRedundancyOptimizer shards the moments only.
    """

    def __init__(self, model, dtype: torch.dtype, *, weight_decay: float, max_norm: float):
        self.bf16, self.max_norm, self.skipped_in_a_row = dtype != torch.float32, max_norm, 0
        self.params = [p for p in model.parameters() if p.requires_grad]
        load, self.owner = [0] * dist.get_world_size(), {}
        largest_first = sorted(range(len(self.params)), key=lambda i: -self.params[i].numel())
        for i in largest_first:
            self.owner[i] = load.index(min(load))
            load[self.owner[i]] += self.params[i].numel()
        self.masters = {i: p for i, p in enumerate(self.params) if self.owner[i] == dist.get_rank()}
        if self.bf16:  # from the weights as they were stored, before they are rounded
            self.masters = {i: p.detach().float().clone() for i, p in self.masters.items()}
        for p in model.parameters():  # not model.to(dtype): rotary frequencies must not be rounded
            p.data = p.data.to(dtype)
        decayed = [m for m in self.masters.values() if m.dim() >= 2]
        plain = [m for m in self.masters.values() if m.dim() < 2]
        self.adam = torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                                       {"params": plain, "weight_decay": 0.0}])  # fmt: skip

    @torch.no_grad()
    def accumulate(self) -> None:
        """bf16: adds the averaged gradients to fp32 sums, as many bf16 additions lose most of what
        is added. fp32: the gradients add up where they are."""
        if self.bf16:
            for i, master in self.masters.items():
                grad = self.params[i].grad
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            for p in self.params:
                p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Clips by the global norm, steps, publishes. Returns the norm before clipping.

        A norm that is not finite takes no step: one NaN in the weights is NaN for ever.
        """
        grads = [m.grad for m in self.masters.values()]
        square = torch.nn.utils.get_total_norm(grads).square()
        dist.all_reduce(square)
        norm = square.sqrt().item()
        self.skipped_in_a_row += 1
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            torch._foreach_mul_(grads, min(1.0, self.max_norm / (norm + 1e-6)))
            for group in self.adam.param_groups:
                group["lr"] = rate
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
        if dist.get_world_size() > 1:
            for i, p in enumerate(self.params):
                dist.broadcast(p.data, self.owner[i])

    def state_dict(self) -> dict:
        masters = {i: m.detach() for i, m in self.masters.items()}
        adam, skipped = self.adam.state_dict(), self.skipped_in_a_row
        return {"masters": masters, "adam": adam, "skipped": skipped}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for i, master in self.masters.items():
            master.copy_(state["masters"][i])
        self.adam.load_state_dict(state["adam"])
        self.skipped_in_a_row = state["skipped"]
        self.publish()


# ================================================================================= 5. what one sees


def log(run, metrics: dict, groups: list[Group]) -> None:
    """A line in metrics.jsonl, the step's first 16 samples in samples.jsonl."""
    if run.rank > 0:
        return
    state, samples = run.state, [s for g in groups for s in g.samples]
    metrics = {"accuracy": None, "correction_success": None} | metrics
    if groups:
        verdicts = [verdict for g in groups for verdict in g.verdicts]
        lengths = [len(s.token_ids) for s in samples]
        metrics |= {name: verdicts.count(name) for name in ("right", "wrong", "ungradable")}
        metrics["mixed_groups"] = np.mean([len(set(g.rewards)) > 1 for g in groups])
        metrics["truncated"] = np.mean([not s.finished for s in samples])
        metrics["mean_length"] = np.mean(lengths)
        seconds = run.seconds["rollout"] + run.seconds["update"]
        metrics["tokens_per_second"] = sum(lengths) / seconds
    for name in ("visits", "dropped_errors", "questions", "samples", "tokens"):
        metrics[name] = getattr(state, name)
    metrics["pool_size"] = len(run.pool) if run.pool is not None else None
    metrics["seconds"] = {part: round(seconds, 4) for part, seconds in run.seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_gpu = run.device.type == "cuda"
    metrics["peak_memory_gb"] = (torch.cuda.max_memory_allocated() if on_gpu else peak) / 2**30
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no nan
            metrics[name] = None
    lines = [
        {"step": state.step, "stage": state.stage, "problem": g.problem, "answer": g.answer,
         "prompt": run.tokenizer.decode(g.prompt), "response": s.text, "verdict": verdict,
         "finished": s.finished, "analysis": span}
        for g in groups for s, verdict, span in zip(g.samples, g.verdicts, g.spans)
    ]  # fmt: skip
    for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", lines[:16])):
        with open(run.output / name, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


# Mean |log pi_old - log mu| is usually 0.01 to 0.02 where bf16 computes (True), 1e-5 in fp32.
HEALTHY_GAP = {True: 0.05, False: 0.002}


def watch(run, metrics: dict, groups: list[Group]) -> None:
    """Warns of a stale engine and of a run that cannot learn; ends one without finite gradients."""
    state, gap, limit = run.state, metrics.get("logp_gap"), HEALTHY_GAP[run.optimizer.bf16]
    if gap is not None and gap > limit:
        warn(f"step {state.step}: engine and trainer disagree by {gap:.3g} in log p on average, "
             f"more than {limit}: it has stale weights, or computes something else")  # fmt: skip
    if run.optimizer.skipped_in_a_row >= 3:
        fail(f"step {state.step}, stage {state.stage}: three gradients in a row were not finite, "
             "none was used; lower --learning_rate, and look at samples.jsonl")  # fmt: skip
    if state.stage == 2:
        state.visit_loss_tokens += metrics.get("loss_tokens", 0)
        return
    finished = any(s.finished for g in groups for s in g.samples)
    state.barren = 0 if finished and metrics["accuracy"] else state.barren + 1
    if state.barren == 4:
        usual = ("nothing is boxed, the problems are too hard, or --train_data has other answers"
                 if finished else "--max_new_tokens is low, or the model ends no turn")  # fmt: skip
        what = "wrong" if finished else "cut off"
        warn(f"four steps in a row every response was {what}; usually {usual}: see samples.jsonl")


def show_correction(run, groups: list[Group], examples: list[Example]) -> None:
    """One correction in full; what is marked, and nothing else, carries gradient (Eq. 12)."""
    if not examples:
        return
    e = next((e for e in examples if e.mask.any() and e.advantage), examples[0])
    group, decode = groups[e.group], run.tokenizer.decode
    on, off = ("\033[30;42m", "\033[0m") if sys.stdout.isatty() else (">>>", "<<<")
    ids = group.prompt + group.samples[e.sample].token_ids
    prompt, start, end = len(group.prompt), e.first, len(e.ids)
    run.say(
        f"\n--- stage 2, visit {run.state.visits}: a prompt and correction, Â' {e.advantage:.2f}; "
        f"what carries gradient stands between {on} and {off}\n{decode(ids[:prompt])}\n---\n"
        f"{decode(ids[prompt:start])}{on}{decode(ids[start:end])}{off}{decode(ids[end:])}\n---"
    )


def summary(run) -> None:
    """The table and the picture at the end."""
    if run.rank > 0:
        return
    lines = [json.loads(line) for line in open(run.output / "metrics.jsonl")]
    measured = [line for line in lines if line.get("eval_accuracy") is not None]
    run.say(f"\n{'held-out problems':<28}{'before':>16}{'after':>16}")
    shown = {"eval_accuracy": "answered right", "eval_correction": "own errors corrected"}
    for key, name in shown.items():
        cells = ["-" if line[key] is None else f"{line[key]:.3f} ± {line[f'{key}_se'] or 0:.3f}"
                 for line in measured[:1] + measured[-1:]]  # fmt: skip
        run.say(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells))
    spent = sum((Counter(line["seconds"]) for line in lines), Counter())
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in spent.most_common())
    run.say(f"{run.state.samples:,} samples, {run.state.visits} visits to stage 2; {parts}")
    plot(lines, run.output / "curves.png")
    run.say(f"written: {run.output}/ (metrics, samples, curves.png, checkpoints/, final/)")


def plot(lines: list[dict], path: Path) -> None:
    """curves.png: accuracy, correction success and pool size over steps, stage 2 shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axis, key, style, color, label in (
        (above, "accuracy", ".-", "lightskyblue", "accuracy of the step's groups (stage 1)"),
        (above, "correction_success", ".-", "lightgreen", "correction success (stage 2)"),
        (above, "eval_accuracy", "o-", "tab:blue", "held-out: answered right"),
        (above, "eval_correction", "s-", "tab:green", "held-out: own errors corrected"),
        (below, "pool_size", "-", "tab:gray", "error pool"),
    ):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axis.plot([x for x, _ in points], [y for _, y in points], style, color=color, label=label)
    for step in (line["step"] for line in lines if line.get("stage") == 2):
        for axis in (above, below):
            axis.axvspan(step - 0.5, step + 0.5, color="tab:green", alpha=0.12, lw=0)
    above.set(ylim=(0, 1), ylabel="share")
    above.legend(loc="lower right", fontsize="small")
    below.set(ylabel="error pool", xlabel="step (shaded: stage 2)")
    figure.savefig(path, dpi=120)


# =================================================================================== 6. checkpoints


def save_checkpoint(run) -> None:
    """checkpoints/step_NNNNNN/rank_K.pt, a shard of each rank. What bears this name is whole."""
    folder = run.output / "checkpoints" / f"step_{run.state.step:06d}"
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    logs = {name: (run.output / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    pool = run.pool.state_dict() if run.pool is not None else None
    saved = {"state": asdict(run.state), "pool": pool, "logs": logs}
    torch.save(saved | {"optimizer": run.optimizer.state_dict()}, part / f"rank_{run.rank}.pt")
    gather([])  # all shards are written
    if run.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # one that was found damaged
        part.rename(folder)
        for old in sorted(folder.parent.glob("step_*[0-9]"))[:-2]:
            shutil.rmtree(old)


def load_checkpoint(run) -> None:
    """Loads the newest step that is whole on every rank, if any is, and cuts the logs to it."""
    sizes = {"metrics.jsonl": 0, "samples.jsonl": 0}
    for folder in sorted((run.output / "checkpoints").glob("step_*[0-9]"), reverse=True):
        file = folder / f"rank_{run.rank}.pt"
        saved = None
        try:
            if not zipfile.ZipFile(file).testzip():  # torch.load does not notice a flipped byte
                # To the host first: on the GPU the shard would be there twice.
                saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # damaged bytes raise anything
            pass
        bad = gather([str(file)] if saved is None else [])
        if not bad:
            run.state, sizes = State(**saved["state"]), saved["logs"]
            run.optimizer.load_state_dict(saved["optimizer"])
            if run.pool is not None:
                run.pool.load_state_dict(saved["pool"])
            break
        warn(f"{', '.join(bad)}: missing or damaged, so the checkpoint before it is used, if any")
    for name, size in sizes.items() if run.rank == 0 else ():
        (run.output / name).touch()
        os.truncate(run.output / name, size)  # what was logged after it is done again


def save_final(run) -> None:
    """final/: a plain Hugging Face checkpoint, replaced as a whole."""
    if run.rank == 0:
        part, final = run.output / "final.part", run.output / "final"
        run.model.save_pretrained(part)
        run.tokenizer.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)


# ========================================================================================= 7. start


class Run:
    """Everything a step needs, under one name. Beside what stands here, `set_up` and what it calls
    make config, model, tokenizer, engine, grader; problems, eval_tasks, first_prompt, output;
    optimizer, policy (the model in DDP), reference (None: no KL), pool (None: a baseline)."""

    def __init__(self, rank: int, world: int, device: torch.device):
        self.rank, self.world, self.device = rank, world, device
        self.state, self.seconds = State(), Counter()
        self.signalled, self.exit_code = False, 0
        self.end = ExitStack()  # what is to be closed or put back when the run ends

    def interrupt(self, number: int, _) -> None:
        """SIGTERM or Ctrl-C: the step is finished, saved, and the run left."""
        self.signalled, self.exit_code = True, 130 if number == signal.SIGINT else 0

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)


def set_up(run: Run) -> None:
    """Builds everything, on all ranks together. ValueError or OSError, one line, if it cannot."""
    config = run.config
    run.problems, held_out = load_problems(config.train_data), load_problems(config.eval_data)
    run.model, run.tokenizer = load_policy(config.model, "auto", run.device)
    run.model.generation_config.validate(strict=True)  # else final/ could not be written
    for module in run.model.modules():  # with dropout pi_theta would be a random function
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    settle(run, held_out)
    claim_output(run)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and run.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    decay, norm = config.weight_decay, config.max_grad_norm
    run.optimizer = MasterAdamW(run.model, dtype, weight_decay=decay, max_norm=norm)
    check_logprobs(run)
    run.grader = run.end.enter_context(Grader())
    run.engine = make_engine(
        config.rollout, run.model, run.tokenizer, model_path=config.model,
        max_context=config.max_context, memory_share=config.memory_share,
    )  # fmt: skip
    run.end.callback(run.engine.close)
    if config.compile:
        compile_layers(run.model, recompute=config.gradient_checkpointing)
    elif config.gradient_checkpointing:  # after the engine has looked at the model's cache
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    how = (config.temperature, config.logprob_chunk, len(run.tokenizer), config.compile)
    run.reference = None
    if config.beta:  # else pi_ref is not even loaded
        reference, _ = load_policy(config.model, dtype, run.device)
        run.reference = Policy(reference.requires_grad_(False), *how)
    # No buffers to broadcast: a collective in each forward pass, and ranks differ in their number.
    options = dict(gradient_as_bucket_view=True, broadcast_buffers=False)
    run.policy = DistributedDataParallel(Policy(run.model, *how), **options)
    # DDP must not be what ends the process group: that can deadlock.
    run.end.callback(setattr, run, "policy", None)
    run.pool = None
    if config.algorithm == "scrpo":
        run.pool = ErrorPool(config.min_variance, config.errors_per_question)


def settle(run: Run, held_out: list) -> None:
    """What follows from model and data: the context, the micro-batch, and which problems fit."""
    config, model = run.config, run.model.config
    asked = [solution_task(run.tokenizer, problem, q) for q, problem in enumerate(run.problems)]
    held_out = enumerate(held_out[: config.eval_questions])
    held_out = [solution_task(run.tokenizer, problem, q) for q, problem in held_out]
    if config.max_context is None:
        longest = max(len(task.prompt) for task in asked + held_out)
        template = len(render(run.tokenizer, correction_prompt("", "")))
        limit = getattr(model, "max_position_embeddings", None) or run.tokenizer.model_max_length
        config.max_context = needed_context(longest, template, config.max_new_tokens, limit)
    if config.micro_batch_tokens is None:
        # Activations of about 16 hidden sizes a layer [measured] may take 4 GiB [ours].
        affordable = 2**32 / (4 * 16 * model.hidden_size * model.num_hidden_layers)
        config.micro_batch_tokens = min(16384, 2 ** int(math.log2(affordable)))
    room = (config.max_new_tokens, config.max_context)
    run.problems = [run.problems[task.question] for task in fitting(asked, *room, "--train_data")]
    run.eval_tasks = fitting(held_out, *room, "--eval_data")
    run.first_prompt = asked[0].prompt


def check_logprobs(run: Run) -> None:
    """ValueError for a model that scales or caps what its head gives (Granite, Gemma 2)."""
    ids = torch.tensor([run.first_prompt], device=run.device)
    with torch.no_grad():
        ours, _ = token_logprobs(run.model, ids, torch.ones_like(ids), ids.new_ones(1))
        theirs = run.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    gap = (ours[0] - theirs.gather(-1, ids[0, 1:, None])[:, 0]).abs().mean().item()
    if not gap < HEALTHY_GAP[run.optimizer.bf16]:
        raise ValueError(f"--model {run.config.model} is no causal model, or scales or caps its "
                         f"logits: its log p is {gap:.2g} off what loss.py computes")  # fmt: skip


def claim_output(run: Run) -> None:
    """Finds or makes the output folder; ValueError for one that is not ours to write into."""
    config = run.config
    if config.output_dir is None:
        numbers = [int(f.name) for f in (HERE / "runs").glob("*") if f.name.isdigit()]
        fresh = HERE / "runs" / f"{max(numbers, default=0) + 1:03d}"
        config.output_dir = gather([str(fresh)])[0]
    run.output = Path(config.output_dir)
    begun = (run.output / "metrics.jsonl").exists() or (run.output / "checkpoints").exists()
    if begun and not config.resume:
        raise ValueError(f"--output_dir {run.output} holds a run; add --resume, or name another")
    # The prompt too: a chat template may write today's date.
    settings = asdict(config) | {"ranks": run.world, "first_prompt": run.first_prompt}
    settings["problems"] = digest([*run.problems, *run.eval_tasks])
    free = FREE - {"steps"} if config.schedule == "cosine" else FREE  # and all before it has begun
    run.end.enter_context(claim(run.output, settings, free if begun else settings.keys()))


def introduce(run: Run) -> None:
    """What is about to happen, and the first rendered prompt."""
    config, size = run.config, sum(p.numel() for p in run.model.parameters()) / 1e6
    compute = "bf16" if run.optimizer.bf16 else "fp32"
    run.say(
        f"{config.algorithm}: {config.model} ({size:.1f} M parameters, {compute}) on {run.world} x "
        f"{run.device.type}, {len(run.problems):,} questions, {config.steps} steps\n"
        f"{run.engine.name} engine ({run.engine.why}), contexts of {config.max_context} "
        f"tokens, micro-batches of {config.micro_batch_tokens}; writing to {run.output}\n"
        f"--- the first prompt\n{run.tokenizer.decode(run.first_prompt)}\n---"
    )
    if run.state.step:
        run.say(f"resumed after step {run.state.step}, in stage {run.state.stage}")


@record  # a rank that breaks leaves its traceback to torchrun, before the others miss it
def work(run: Run, arguments: list[str]) -> None:
    try:
        run.config = parse(arguments)
        set_up(run)
    except (ValueError, OSError) as error:
        fail(error)
    for number in (signal.SIGTERM, signal.SIGINT):
        run.end.callback(signal.signal, number, signal.signal(number, run.interrupt))
    load_checkpoint(run)
    introduce(run)
    train(run)
    if run.state.step < run.config.steps:
        run.say(f"stopped by a signal after step {run.state.step}; --resume goes on from there")
    else:
        save_final(run)
        summary(run)


def main(arguments: Optional[list[str]] = None) -> None:
    run = Run(*start_distributed())
    try:
        with run.end:
            work(run, sys.argv[1:] if arguments is None else arguments)
    finally:
        if dist.is_initialized():  # vLLM destroys it too
            dist.destroy_process_group()
    if run.exit_code:
        sys.exit(run.exit_code)


if __name__ == "__main__":
    main()
