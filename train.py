"""ScRPO, Self-correction Relative Policy Optimization ("From Errors to Insights", 2511.06065).

    torchrun --standalone train.py                     # the embedded toy: a minute on 2 CPU cores
    torchrun --standalone --nproc_per_node=2 train.py  # the same samples, shared by two ranks
    torchrun --standalone train.py --algorithm grpo    # the baselines, by the same loop: grpo, dapo
    torchrun --standalone train.py --output_dir runs/mine --resume    # starts the run or resumes it
    torchrun --standalone --nproc_per_node=8 --shutdown-timeout=900 train.py \\
        configs/r1_distill_1.5b_8gpu.yaml              # Ctrl-C has 900 s to finish the step

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
   Everything after it but the forward passes is the same pure computation on every rank: the pool,
   the denominators, and which rank trains on which samples.
2. All randomness is a function of (seed, step, question, sample), never of a generator's history.
   So a checkpoint needs no random state, and batches and ranks change no random number.
3. Loss tokens are counted over the whole optimizer step before the first micro-batch. Sums are
   divided by that count and multiplied by the number of ranks, because DDP averages. With a mean
   per micro-batch, a token in a small micro-batch would weigh more than one in a large one.
4. Weights are kept in fp32 even where bf16 computes: at a rate of 1e-6 most updates are smaller
   than half a bf16 step, and rounding would lose them.

Left out on purpose: tensor parallelism, sampling during updates, a reward model.
"""

import rollout  # before torch, whose import takes seconds: see rollout.PARENT

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
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
)
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

import error_pool
import evaluate
import loss
import reward
from rollout import Group, Task, fail, flag, gather, warn

HERE = Path(__file__).resolve().parent
TOY = HERE / "toy"
RUNS = HERE / "runs"
warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # newer torch renames the option


# ====================================================================================== 1. settings


@dataclass
class Config:
    """ScRPO on one or many GPUs, or on a CPU. A YAML file of these settings may come first; flags
    after it win. Without a file and without --model: the embedded toy, by configs/toy.yaml."""

    # What is trained, on what
    model: Optional[str] = flag(None, "folder or hub id of a Hugging Face causal language model")
    train_data: Optional[str] = flag(None, "file of problems, or hub dataset as id:config:split")
    eval_data: Optional[str] = flag(None, "held-out problems, likewise; unset: no evaluation")
    output_dir: Optional[str] = flag(None, "folder of all results; unset: a fresh runs/NNN")
    resume: bool = flag(False, "continue from the newest whole checkpoint in output_dir, if any")
    seed: int = flag(0, "all randomness is a function of (seed, step, question, sample)")
    # The algorithm
    algorithm: Literal["scrpo", "grpo", "dapo"] = flag("scrpo", "grpo and dapo are baselines")
    steps: int = flag(500, "rollouts of either stage [ours] (TRL: max_steps / updates_per_rollout)")
    questions_per_step: int = flag(16, "B; 16: Dr. GRPO (TRL: generation_batch_size / G)")
    group_size: int = flag(8, "G, samples a question; 8: Dr. GRPO (TRL: num_generations)")
    max_new_tokens: int = flag(3000, "of a response; 3000: Dr. GRPO (TRL: max_completion_length)")
    temperature: float = flag(1.0, "of sampling and of log p; 1: R1, DAPO (TRL: temperature)")
    updates_per_rollout: int = flag(1, "optimizer steps it is cut into, each sample used once")
    scale: Literal["std", "none"] = flag("std", "Eq. 2; none: Dr. GRPO (TRL: scale_rewards)")
    clip_low: float = flag(0.2, "Eq. 5's lower clip; 0.2 is usual with GRPO (TRL: epsilon)")
    clip_high: Optional[float] = flag(None, "unset: 0.2, with dapo 0.28 (TRL: epsilon_high)")
    beta: float = flag(0.0, "Eq. 5's KL weight; DeepSeekMath 0.04, R1 0.001, DAPO 0 (TRL: beta)")
    reduction: Optional[Literal[loss.REDUCTIONS]] = flag(None, "Eq. 6's mean (TRL: loss_type)")
    importance_cap: float = flag(2.0, "Eq. 14; 0: off (TRL: vllm_importance_sampling_clip_max)")
    # Error pool and stage 2
    pool_trigger: int = flag(32, "N of Eq. 9: errors that start stage 2 [ours]")
    min_variance: float = flag(0.15, "tau of Eq. 7; 0: no filter [ours: 2 to 6 right of 8]")
    errors_per_question: int = flag(1, "Eq. 8: most errors kept of a group [ours]")
    train_stages: Literal["both", "1", "2"] = flag("both", "ablation: stages with updates")
    success_conditioned: bool = flag(True, "Eq. 12; false: credit failed ones too")
    credit: Literal["analysis", "response"] = flag("analysis", "Eq. 12; response: an ablation")
    analysis_span: Literal["sections", "prefix"] = flag("sections", "prefix: from token 0")
    # DAPO's own
    dynamic_sampling: Optional[int] = flag(None, "most rounds of drawing; 1: off, dapo 4 [ours]")
    overlong_cache: Optional[int] = flag(None, "Eq. 15: tokens of the ramp; with dapo L_max / 5")
    # Optimizer
    learning_rate: float = flag(1e-6, "AdamW's; 1e-6: DeepSeekMath, DAPO (TRL: learning_rate)")
    schedule: Literal["constant", "cosine"] = flag("constant", "DAPO's (TRL: lr_scheduler_type)")
    warmup_steps: int = flag(0, "rollouts of linear warm-up; DAPO: 20 (TRL: in updates)")
    weight_decay: float = flag(0.0, "AdamW's, of matrices only [ours] (TRL: weight_decay)")
    max_grad_norm: float = flag(1.0, "of clipping; 0: none [ours] (TRL: max_grad_norm)")
    # Machine
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "the engine (TRL: use_vllm)")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "auto: bf16 on a GPU (TRL: bf16)")
    micro_batch_tokens: Optional[int] = flag(None, "of a forward pass; unset: by model size")
    logprob_chunk: int = flag(1024, "positions whose logits exist at the same time")
    gradient_checkpointing: bool = flag(False, "compute activations twice (TRL: the same)")
    compile: bool = flag(False, "faster on a GPU, after two minutes (TRL: torch_compile)")
    max_context: Optional[int] = flag(None, "unset: by need (TRL: vllm_max_model_length)")
    memory_share: float = flag(0.3, "the engine's (TRL, vLLM: vllm_gpu_memory_utilization)")
    # What is written, and when
    eval_every: int = flag(50, "rollouts between evaluations; 0: both ends only (TRL: eval_steps)")
    eval_questions: int = flag(512, "held-out problems of an evaluation, from the top; 0: none")
    save_every: int = flag(20, "rollouts between checkpoints; two are kept (TRL: save_steps)")


LEAST = {"group_size": 2} | dict.fromkeys((
    "questions_per_step", "max_new_tokens", "updates_per_rollout", "errors_per_question",
    "dynamic_sampling", "micro_batch_tokens", "logprob_chunk", "save_every",
), 1)  # all other numbers may be 0
# What may differ when a run is resumed, because it does not change what is computed.
FREE_TO_CHANGE = {"output_dir", "resume", "steps", "eval_every", "save_every"}


def parse(arguments: list[str]) -> Config:
    """The command line, after an optional YAML file of settings. ValueError where it is wrong."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=Config.__doc__)
    parser.error = usage_error
    names = [argument.partition("=")[0] for argument in arguments]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = read_settings(arguments[0]) + arguments[1:]
    elif "--model" not in names:
        arguments = read_settings(HERE / "configs/toy.yaml") + arguments
    config = Config(**vars(parser.parse_args(arguments)))
    if config.model is None:
        config.model = str(TOY)
        config.train_data = config.train_data or str(TOY / "train.jsonl")
        config.eval_data = config.eval_data or str(TOY / "test.jsonl")
    fill_in(config)
    check(config)
    return config


def usage_error(message: str):
    fail(f"{message}; see --help")  # one line from rank 0; argparse's usage would come from all


def read_settings(path) -> list[str]:
    """The flags that a YAML file stands for; a setting without a value keeps its default."""
    try:
        # BaseLoader gives every value as it is written: YAML itself would read 010 as 8.
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader).items()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        fault = f"{path}: cannot be read as YAML lines `name: value` ({error})"
        raise ValueError(fault) from None
    arguments = []
    for name, value in settings:
        if re.fullmatch(r"[-+]?0\d+", str(value)):
            raise ValueError(f"{path}: {name}: {value} is not a plain number")
        if value not in ("", "~", "null"):
            arguments.append(f"--{name}={value}")
    return arguments


def fill_in(config: Config) -> None:
    """Sets what --algorithm decides and no flag has set."""
    defaults = {"clip_high": 0.2, "reduction": "grpo", "dynamic_sampling": 1, "overlong_cache": 0}
    if config.algorithm == "dapo":
        ramp = config.max_new_tokens // 5
        defaults = {"clip_high": 0.28, "reduction": "dapo", "dynamic_sampling": 4,
                    "overlong_cache": ramp}
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def check(config: Config) -> None:
    """ValueError, one line, if settings contradict each other or the method."""
    c = config
    for name, value in asdict(c).items():
        least = LEAST.get(name, 0)
        if isinstance(value, (int, float)) and not value >= least:  # not `<`: nan is never less
            raise ValueError(f"--{name} {value}: must be at least {least}")
    if c.train_data is None:
        raise ValueError(f"--train_data is missing: name the problems to train {c.model} on, "
                         "a file or a dataset on the hub as id:config:split")
    if c.temperature == 0:
        raise ValueError("--temperature 0: training samples, so it must be above 0")
    if c.resume and c.output_dir is None:
        raise ValueError("--resume continues the run in --output_dir, which is missing: name it")
    if c.questions_per_step % c.updates_per_rollout:
        raise ValueError(f"--updates_per_rollout {c.updates_per_rollout} does not divide "
                         f"--questions_per_step {c.questions_per_step}; choose a divisor")
    if c.overlong_cache > c.max_new_tokens:
        raise ValueError(f"--overlong_cache {c.overlong_cache} exceeds --max_new_tokens; lower it")
    if c.algorithm == "scrpo":
        check_stage_2(c)
    elif c.train_stages == "2":
        raise ValueError(f"--train_stages 2: --algorithm {c.algorithm} has no stage 2")


def check_stage_2(c: Config) -> None:
    if c.pool_trigger < c.questions_per_step:
        raise ValueError(f"--pool_trigger {c.pool_trigger} is less than --questions_per_step "
                         f"{c.questions_per_step}: stage 2 would begin with too few errors; "
                         "raise it")
    half = c.group_size // 2  # right of G: the largest variance
    if c.min_variance > 0.25 or not error_pool.informative(half, c.group_size, c.min_variance):
        raise ValueError(f"--min_variance {c.min_variance}: the rewards of --group_size "
                         f"{c.group_size} cannot vary so much, and no question would be "
                         "informative; lower it")


# ================================================================================= 2. the algorithm


@dataclass
class State:
    """Where a run stands: what a checkpoint holds beside weights, optimizer and pool."""

    step: int = 0  # the last completed one
    stage: int = 1
    questions: int = 0  # drawn so far: the place in the stream of `question_order`
    samples: int = 0  # drawn so far, those of discarded groups too
    tokens: int = 0  # sampled so far
    visits: int = 0  # to stage 2
    visit_loss_tokens: int = 0  # of the current visit
    dropped_errors: int = 0  # whose correction prompt did not fit the context
    barren: int = 0  # stage-1 steps in a row with every response wrong, or every one cut off


@dataclass
class Run:
    """Everything that a run holds; `set_up` makes it."""

    config: Config
    rank: int
    device: torch.device
    output: Path
    model: PreTrainedModel  # the policy's weights, as the engine and save_pretrained see them
    tokenizer: PreTrainedTokenizerBase
    tasks: list[Task]  # the questions of --train_data that fit the context
    eval_tasks: list[Task]  # those of --eval_data
    optimizer: "MasterAdamW"
    engine: "rollout.TransformersEngine | rollout.VLLMEngine"
    grader: reward.Grader
    policy: DistributedDataParallel  # pi_theta: a `Policy` around the model
    reference: Optional["Policy"]  # pi_ref; None where beta = 0
    pool: Optional[error_pool.ErrorPool]  # E; None for the baselines
    state: State = field(default_factory=State)
    seconds: Counter = field(default_factory=Counter)  # of the current step: {part: duration}
    signalled: bool = False  # SIGTERM or Ctrl-C has come
    exit_code: int = 0

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def interrupt(self, number: int, _) -> None:
        """SIGTERM or Ctrl-C: the step is finished and saved, then the run ends."""
        self.signalled = True
        self.exit_code = 130 if number == signal.SIGINT else 0
        with suppress(RuntimeError):  # it may have come in the middle of another line
            warn(f"{signal.Signals(number).name}: the current step is finished and saved first; "
                 "torchrun leaves it the time of --shutdown-timeout, 30 s by default")


def train(run: Run) -> None:
    """The algorithm box at the top of this file."""
    config = run.config
    state = run.state
    if state.step == 0:
        log(run, {"step": 0} | evaluate_policy(run), groups=[])
    saved_step = state.step
    bar = tqdm(total=config.steps, initial=state.step, disable=run.rank > 0, desc=config.algorithm)
    # A signal may reach the ranks in different steps; they stop after the same one.
    while state.step < config.steps and not any(gather([run.signalled])):
        step = state.step + 1
        run.seconds.clear()
        entered = switch_stage(run)  # Eq. 9
        with measured(run.seconds, "rollout"):
            run.engine.update_weights(run.model)  # which also wakes the engine
            if state.stage == 1:
                groups, examples, metrics = trial_and_error(run, step)  # Eqs. 1, 2, 7, 8
            else:
                groups, examples, metrics = self_correction(run, step)  # Eqs. 10, 11, 2, 12
            run.engine.sleep()
        if entered:
            show_correction(run, groups, examples)
        if config.train_stages in ("both", str(state.stage)):
            with measured(run.seconds, "update"):
                metrics |= update(run.policy, run.reference, run.optimizer, config, step,
                                  groups, examples)  # Eqs. 3 to 6, 13, 14
            if state.stage == 2:
                state.visit_loss_tokens += metrics["loss_tokens"]
        state.step = step
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            metrics |= evaluate_policy(run)
        log(run, {"step": step, "stage": state.stage} | metrics, groups)
        watch(run, metrics, groups)
        right = metrics["accuracy"] if state.stage == 1 else metrics["correction_success"]
        bar.set_postfix(stage=state.stage, right=right, pool=len(run.pool or ()))
        bar.update()
        if step % config.save_every == 0:
            save_checkpoint(run)
            saved_step = step
    if saved_step < state.step:
        save_checkpoint(run)
    bar.close()


@contextmanager
def measured(seconds: Counter, part: str):
    started = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - started


def switch_stage(run: Run) -> bool:
    """Eq. 9. True where stage 2 is entered. Warns if a visit to it trained on nothing."""
    if run.pool is None:
        return False
    config = run.config
    state = run.state
    before = state.stage
    state.stage = error_pool.next_stage(
        before, len(run.pool), config.pool_trigger, config.questions_per_step
    )  # Eq. 9
    if before == 2 and state.stage == 1:
        if state.visit_loss_tokens == 0 and config.train_stages != "1":
            warn(f"visit {state.visits} to stage 2 trained on nothing: no correction had both "
                 "headers, `Analysis:` and `Corrected Solution:`, or none was right where "
                 "another was wrong")
    entered = before == 1 and state.stage == 2
    if entered:
        state.visits += 1
        state.visit_loss_tokens = 0
    return entered


def trial_and_error(run: Run, step: int) -> tuple[list[Group], list["Example"], dict]:
    """Stage 1: B questions -> G responses each -> R (Eq. 1) -> Â (Eq. 2); fills E (Eqs. 7, 8)."""
    config = run.config
    groups, discarded = draw_questions(run, step)
    rewards = torch.tensor([group.rewards for group in groups])  # R, Eq. 1 [B,G]
    lengths = [[len(sample.token_ids) for sample in group.samples] for group in groups]  # |o_i|
    shaped = rewards
    if config.overlong_cache:
        shaped = rewards + loss.overlong_punishment(
            torch.tensor(lengths), config.max_new_tokens, config.overlong_cache
        )  # Eq. 15
    advantages = loss.group_advantages(shaped, config.scale)  # Â, Eq. 2
    if run.pool is not None:
        for group in groups:
            add_errors(run.pool, group)  # Eqs. 7, 8
    examples = make_examples(groups, advantages, all_tokens(lengths), lengths)
    metrics = {"accuracy": rewards.mean().item(), "discarded_groups": discarded}
    return groups, examples, metrics


def all_tokens(lengths: list[list[int]]) -> list[list[torch.Tensor]]:
    """The masks of stage 1: every token of every response carries loss."""
    return [[torch.ones(n, dtype=torch.bool) for n in row] for row in lengths]


def add_errors(pool: error_pool.ErrorPool, group: Group) -> None:
    """E <- E + the wrong responses of this group (Eqs. 7, 8)."""
    responses = [sample.text for sample in group.samples]
    # A response that could not be graded is not known to be wrong.
    usable = [sample.finished and sample.verdict != "ungradable" for sample in group.samples]
    pool.add(group.problem, group.answer, responses, group.rewards, usable)


def self_correction(run: Run, step: int) -> tuple[list[Group], list["Example"], dict]:
    """Stage 2: B errors -> x' (Eq. 10) -> G corrections each -> R' (Eq. 11) -> Â', m (Eq. 12)."""
    config = run.config
    tasks = take_errors(run)
    if not tasks:  # none fitted the context
        return [], [], {"correction_success": None, "well_formed": None}
    groups = draw_samples(run, step, tasks, span=config.analysis_span)
    rewards = torch.tensor([group.rewards for group in groups])  # R', Eq. 11 [B,G]
    advantages = loss.group_advantages(rewards, config.scale)  # Â', Eq. 2
    masks = []
    credited_lengths = []
    for group in groups:
        lengths = [len(sample.token_ids) for sample in group.samples]
        spans = [sample.analysis for sample in group.samples]
        if config.credit == "response":
            spans = [(0, n) for n in lengths]
        success = None
        if config.success_conditioned:
            success = [sample.reward == 1 for sample in group.samples]
        masks.append(loss.analysis_mask(spans, max(lengths), success))  # m, Eq. 12
        # |Analysis(y_j)|, of failed corrections too: the denominator of Eq. 13 counts them all.
        credited_lengths.append([0 if s is None else s[1] - s[0] for s in spans])
    examples = make_examples(groups, advantages, masks, credited_lengths)
    well_formed = [s.analysis is not None for _, s in rollout.each_sample(groups)]
    metrics = {"correction_success": rewards.mean().item(), "well_formed": np.mean(well_formed)}
    return groups, examples, metrics


def take_errors(run: Run) -> list[Task]:
    """Takes errors off E, oldest first, until B fit the context; drops and counts the others."""
    config = run.config
    tasks = []
    while len(tasks) < config.questions_per_step and len(run.pool) > 0:
        (error,) = run.pool.take(1)
        task = rollout.correction_task(
            run.tokenizer, error.problem, error.answer, error.response, question=len(tasks)
        )  # x', Eq. 10
        if rollout.fits(task.prompt, config.max_new_tokens, run.engine.max_context):
            tasks.append(task)
        else:
            run.state.dropped_errors += 1
    return tasks


def draw_questions(run: Run, step: int) -> tuple[list[Group], int]:
    """The B groups of a stage-1 step, and how many were discarded on the way.

    With DAPO's dynamic sampling, groups of equal rewards are replaced by fresh questions, a bounded
    number of times. What is still missing is filled with the groups that were discarded last.
    """
    config = run.config
    B = config.questions_per_step
    kept = []
    discarded = []
    for attempt in range(config.dynamic_sampling):
        n = B - len(kept)
        tasks = []
        for place in question_order(config.seed, len(run.tasks), run.state.questions, n):
            # Numbers continue across rounds: a second round must not reuse the first's seeds.
            tasks.append(replace(run.tasks[place], question=attempt * B + len(tasks)))
        run.state.questions += n
        for group in draw_samples(run, step, tasks):
            mixed = len(set(group.rewards)) > 1
            if mixed or config.dynamic_sampling == 1:
                kept.append(group)
            else:
                discarded.append(group)
        if len(kept) == B:
            break
    missing = B - len(kept)
    left_out = len(discarded) - missing
    return kept + discarded[left_out:], left_out


def question_order(seed: int, count: int, start: int, n: int) -> list[int]:
    """Places start .. start + n - 1 of an endless stream in which every epoch is a fresh shuffle.

    >>> order = question_order(seed=0, count=5, start=0, n=10)
    >>> sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4], order[:5] == order[5:]
    (True, False)
    >>> question_order(seed=0, count=5, start=3, n=4) == order[3:7]   # any part can be asked for
    True
    """
    order = []
    for place in range(start, start + n):
        epoch, offset = divmod(place, count)
        order.append(shuffled(seed, epoch, count)[offset])
    return order


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def draw_samples(run: Run, step: int, tasks: list[Task], span: Optional[str] = None) -> list[Group]:
    """G graded samples of each task at the run's settings; every rank gets all groups."""
    config = run.config
    groups = rollout.sample_groups(
        run.engine, run.tokenizer, run.grader, tasks, range(config.group_size), seed=config.seed,
        step=step, temperature=config.temperature, max_new_tokens=config.max_new_tokens, span=span,
    )
    for _, sample in rollout.each_sample(groups):
        run.state.samples += 1
        run.state.tokens += len(sample.token_ids)
    return groups


def evaluate_policy(run: Run) -> dict:
    """Held-out accuracy, and the share of its own finished wrong answers that the policy corrects.

    The seeds are always the same, so that evaluations before and after training are paired.
    """
    if not run.eval_tasks:
        return {}
    with measured(run.seconds, "evaluation"):
        run.engine.update_weights(run.model)
        answers = draw_evaluation(run, run.eval_tasks)
        corrections = draw_evaluation(run, own_errors(run, answers), span=run.config.analysis_span)
        run.engine.sleep()
    right, right_se = evaluate.accuracy(answers)
    corrected, corrected_se = evaluate.accuracy(corrections)
    return {"eval_accuracy": right, "eval_accuracy_se": right_se,
            "eval_correction": corrected, "eval_correction_se": corrected_se}


def draw_evaluation(run: Run, tasks: list[Task], span: Optional[str] = None) -> list[Group]:
    """One graded sample of each task, from the seeds of step 0."""
    config = run.config
    return rollout.sample_groups(
        run.engine, run.tokenizer, run.grader, tasks, range(1), seed=config.seed, span=span,
        temperature=config.temperature, max_new_tokens=config.max_new_tokens,
    )


def own_errors(run: Run, answers: list[Group]) -> list[Task]:
    """The wrong ones of these answers as correction tasks, if finished and fitting the context."""
    config = run.config
    tasks = []
    for group in answers:
        (sample,) = group.samples
        shown = reward.after_thinking(sample.text)
        if sample.verdict != "wrong" or not sample.finished or not shown:
            continue
        task = rollout.correction_task(
            run.tokenizer, group.problem, group.answer, shown, group.question, corrects=0
        )  # Eq. 10
        if rollout.fits(task.prompt, config.max_new_tokens, run.engine.max_context):
            tasks.append(task)
    return tasks


# ==================================================================================== 3. the update


@dataclass
class Example:
    """One sample as the loss sees it: what follows its last loss token is not even run."""

    group: int  # its place in the rollout, which decides the optimizer step it belongs to
    sample: int  # its place in the group
    advantage: float
    denominator_tokens: int  # what it adds to the denominator's lengths (Eqs. 6, 13)
    ids: list[int]  # prompt and response, up to the last loss token
    first: int  # place in `ids` of the first loss token; `mask` and `engine_logp` begin there
    mask: torch.Tensor  # bool, m of Eq. 12; all True in stage 1
    engine_logp: list[float]  # log mu


def make_examples(groups, advantages, masks, denominator_tokens) -> list[Example]:
    """Cuts each sample to its loss tokens; one without any keeps its place in the denominator.

    advantages [B,G]; masks[b][i], bool, and denominator_tokens[b][i] are those of sample i of
    group b. A mask may have holes, and may be longer than its sample.
    """
    examples = []
    for b, group in enumerate(groups):
        for i, sample in enumerate(group.samples):
            loss_tokens = masks[b][i].nonzero().flatten().tolist()
            start, end = 0, 0
            if loss_tokens:
                start, end = loss_tokens[0], loss_tokens[-1] + 1
            examples.append(Example(
                group=b,
                sample=i,
                advantage=advantages[b, i].item(),
                denominator_tokens=denominator_tokens[b][i],
                ids=group.prompt + sample.token_ids[:end],
                first=len(group.prompt) + start,
                mask=masks[b][i][start:end],
                engine_logp=sample.logprobs[start:end],
            ))
    return examples


@dataclass
class MicroBatch:
    """Examples padded on the right: S sequences of L tokens, T loss columns.

    T is the widest mask and also the longest `len(ids) - first`: ids end at the last loss token.
    """

    ids: torch.Tensor  # [S,L]
    attention: torch.Tensor  # [S,L], 1 where there is a token
    first: torch.Tensor  # [S]
    mask: torch.Tensor  # m [S,T]
    engine_logp: torch.Tensor  # log mu [S,T]
    advantages: torch.Tensor  # Â [S]
    old_logp: Optional[torch.Tensor] = None  # log pi_old [S,T]; None: pi_theta is still pi_old


def collate(examples: list[Example], device) -> MicroBatch:
    def pad(rows, dtype):
        rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(rows, batch_first=True).to(device)

    return MicroBatch(
        ids=pad([e.ids for e in examples], torch.long),
        # from the lengths, not from the ids: the padding's id may also be the EOS
        attention=pad([[1] * len(e.ids) for e in examples], torch.long),
        first=torch.tensor([e.first for e in examples], device=device),
        mask=pad([e.mask for e in examples], torch.bool),
        engine_logp=pad([e.engine_logp for e in examples], torch.float32),
        advantages=torch.tensor([e.advantage for e in examples], device=device),
    )


def carries_gradient(example: Example, beta: float) -> bool:
    """True if the sample needs a forward pass: it has a loss token, and an advantage or a KL term.

    Its place in the denominator does not depend on that.
    """
    return bool(example.mask.any()) and (example.advantage != 0 or beta != 0)


def split_by_tokens(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Splits sequences of these lengths into micro-batches: [ranks][rounds][indices].

    A micro-batch, padded to its longest sequence, has at most `budget` tokens, and at most `budget`
    / 8 of padding [ours]; a longer sequence stands alone. All ranks get about as many tokens,
    and equally many rounds, some of them empty: DDP waits for every rank.

    >>> split_by_tokens([40, 5, 5, 5, 4], ranks=2, budget=20)
    [[[0], [3, 4]], [[1, 2], []]]
    """

    def has_room(batch):
        padded = lengths[batch[0]] * len(batch)  # the longest comes first
        padding = padded - sum(lengths[i] for i in batch)
        return padded <= budget and padding <= budget / 8

    batches: list[list[list[int]]] = [[] for _ in range(ranks)]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for place, i in enumerate(longest_first):
        turn, rank = divmod(place, ranks)
        if turn % 2 == 1:  # back and forth, or rank 0 would get the longest of every turn
            rank = ranks - 1 - rank
        own = batches[rank]
        if own and has_room(own[-1] + [i]):
            own[-1].append(i)
        else:
            own.append([i])
    rounds = max(map(len, batches))
    for own in batches:
        own.extend([] for _ in range(rounds - len(own)))
    return batches


@dataclass
class Minibatch:
    """What one optimizer step trains on, on this rank."""

    denominator: float  # of the whole step, over all ranks (Eqs. 6, 13)
    micro_batches: list[Optional[MicroBatch]]  # as many on every rank; None: nothing left here


def make_minibatches(config: Config, groups, examples, device) -> list[Minibatch]:
    """Cuts a rollout by group into `updates_per_rollout` optimizer steps, each shared by all ranks.

    The denominators count every sample; samples without gradient are dropped afterwards.
    """
    minibatches = []
    updates = config.updates_per_rollout
    for u in range(updates):
        # Groups 0, 1, ... in `updates` equal parts, one after another.
        part = [e for e in examples if e.group * updates // len(groups) == u]
        lengths = [e.denominator_tokens for e in part]
        denominator = loss.step_denominator(lengths, config.reduction, config.max_new_tokens)
        part = [e for e in part if carries_gradient(e, config.beta)]
        batches = split_by_tokens(
            [len(e.ids) for e in part], dist.get_world_size(), config.micro_batch_tokens
        )
        minibatch = Minibatch(denominator, micro_batches=[])
        for indices in batches[dist.get_rank()]:
            batch = collate([part[i] for i in indices], device) if indices else None
            minibatch.micro_batches.append(batch)
        minibatches.append(minibatch)
    return minibatches


class Policy(torch.nn.Module):
    """The model as DDP has to see it: its forward pass gives log-probabilities, never logits."""

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.options = options  # of loss.token_logprobs: temperature, chunk, vocabulary, ...

    def forward(self, ids, attention, first):
        return loss.token_logprobs(self.model, ids, attention, first, **self.options)


def update(policy, reference, optimizer, config: Config, step: int, groups, examples) -> dict:
    """Ascends J_1 (Eq. 6) or J_2 (Eq. 13) in `updates_per_rollout` optimizer steps, each on its own
    part of the groups: every sample is used once."""
    # Dropout is off, so the mode matters for gradient checkpointing alone, which Transformers does
    # in training mode only. The engine has called eval(). (DDP's module is Policy, Policy's model.)
    policy.train(policy.module.model.is_gradient_checkpointing)
    device = next(policy.parameters()).device
    minibatches = make_minibatches(config, groups, examples, device)
    # pi_old is the policy before the first of these optimizer steps. That one needs no extra pass:
    # its log pi_old is log pi_theta, detached. Before the later ones the weights will have moved,
    # so theirs is computed now.
    with torch.no_grad():
        for minibatch in minibatches[1:]:
            for batch in filter(None, minibatch.micro_batches):
                batch.old_logp, _ = policy.module(batch.ids, batch.attention, batch.first)
    sums = Counter()  # over this rank's loss tokens
    norms = []
    empty_updates = 0
    for minibatch in minibatches:
        # A step without a gradient is skipped, or Adam's momentum would move the weights. All
        # ranks have equally many micro-batches, so all of them skip it.
        if not minibatch.micro_batches:
            empty_updates += 1
            continue
        backward(policy, reference, optimizer, config, minibatch, sums)
        norms.append(optimizer.step(learning_rate(config, step)))
    torch.cuda.empty_cache()  # vLLM cannot use memory that torch keeps for itself
    return update_metrics(config, gather([sums]), norms) | {"empty_updates": empty_updates}


def backward(policy, reference, optimizer, config: Config, minibatch: Minibatch, sums) -> None:
    """The gradient of -J over all ranks, summed up over micro-batches."""
    world = dist.get_world_size()
    last = len(minibatch.micro_batches) - 1
    for i, batch in enumerate(minibatch.micro_batches):
        # fp32: p.grad adds up on each rank; DDP averages it once, in the last backward.
        # bf16: DDP averages after every micro-batch, and `accumulate` adds up in fp32.
        local = i < last and not optimizer.bf16
        with policy.no_sync() if local else nullcontext():
            if batch is None:
                part = no_loss(policy)
            else:
                part = batch_loss(policy, reference, config, batch, minibatch.denominator, sums)
            # DDP averages over the ranks, but the denominator counts the samples of all of them.
            (part * world).backward()
        optimizer.accumulate()


def no_loss(policy) -> torch.Tensor:
    """0 times a forward pass: DDP waits for a gradient of every parameter from every rank."""
    ids = torch.ones(1, 2, dtype=torch.long, device=next(policy.parameters()).device)
    logp, _ = policy(ids, attention=torch.ones_like(ids), first=ids.new_ones(1))
    return logp.sum() * 0.0


def batch_loss(policy, reference, config: Config, batch: MicroBatch, denominator: float, sums):
    """This micro-batch's part of -J; its part of the step's statistics is added to `sums`."""
    logp, entropy = policy(batch.ids, batch.attention, batch.first)  # [S,T]
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    ref_logp = None
    if reference is not None:
        with torch.no_grad():
            ref_logp, _ = reference(batch.ids, batch.attention, batch.first)
    weights = None
    if config.importance_cap:
        weights = loss.importance_weights(old_logp, batch.engine_logp, config.importance_cap)
    part, stats = loss.policy_loss(
        logp, old_logp, ref_logp, batch.advantages, batch.mask, clip_low=config.clip_low,
        clip_high=config.clip_high, beta=config.beta, reduction=config.reduction, weights=weights,
        denominator=denominator,
    )  # Eqs. 3 to 6, 13, 14
    gap = (old_logp - batch.engine_logp)[batch.mask]  # log pi_old - log mu: 0 but for numerics
    stats["gap"] = gap.abs().sum()
    stats["entropy"] = entropy[batch.mask].sum()
    stats["loss"] = part.detach()
    if config.importance_cap:
        stats["capped"] = (gap.exp() > config.importance_cap).sum()
    for name, value in stats.items():
        sums[name] += value.item()
    sums["largest gap"] = max(sums["largest gap"], gap.abs().max().item())
    return part


def update_metrics(config: Config, sums_of_ranks: list[Counter], norms: list[float]) -> dict:
    """Means over the loss tokens of all ranks; None where nothing was trained on."""
    total = Counter()
    for sums in sums_of_ranks:
        total.update(sums)
    tokens = total["tokens"]
    finite = [norm for norm in norms if math.isfinite(norm)]

    def mean(name):
        return total[name] / tokens if tokens else None

    largest_gap = max(sums["largest gap"] for sums in sums_of_ranks)
    return {
        "loss": total["loss"] / len(norms) if finite else None,
        "grad_norm": sum(finite) / len(finite) if finite else None,
        "loss_tokens": int(tokens),
        "clip_fraction": mean("clipped"),
        "entropy": mean("entropy"),
        "kl": mean("kl") if config.beta else None,
        "capped_fraction": mean("capped"),
        "logp_gap": mean("gap"),
        "logp_gap_max": largest_gap if tokens else None,
        "nonfinite_updates": len(norms) - len(finite),
    }


def learning_rate(config: Config, step: int) -> float:
    """Of step 1, 2, ...: linear warm-up, then constant or a cosine to 0 after the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def compile_layers(model, recompute: bool) -> None:
    """Fuses what stands between a layer's matrix products into few kernels [ours].

    With `recompute`, as with gradient checkpointing, backward computes a layer's activations again,
    but for attention's output, which is small and slow to compute. To choose what is kept pays off
    only with compiled layers.
    """

    def choose(_, operation, *args, **kwargs):
        if "attention" in str(operation):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    rollout.silence("torch._higher_order_ops.wrap", "context_fn")  # it is intended
    contexts = partial(create_selective_checkpoint_contexts, choose)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            forward = layer.forward
            if recompute:
                forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
            layer.forward = torch.compile(forward, dynamic=True)


# ================================================================================== 4. fp32 masters


class MasterAdamW:
    """AdamW on fp32 masters. A parameter's master and moments live on one rank, its owner.

    With bf16 compute on W ranks, P parameters take 2P + 2P + 16P/W bytes a rank (weights and
    gradients; master, gradient sum, two moments). With fp32 compute the parameters are their own
    masters. PyTorch's ZeroRedundancyOptimizer shards the moments only.
    """

    def __init__(self, model, dtype: torch.dtype, *, weight_decay: float, max_norm: float):
        self.bf16 = dtype != torch.float32
        self.max_norm = max_norm
        self.skipped_in_a_row = 0
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.owner = share_out([p.numel() for p in self.params], dist.get_world_size())
        self.masters = {}
        for i, p in enumerate(self.params):
            if self.owner[i] == dist.get_rank():
                # bf16: from the weights as stored, before they are rounded. fp32: p itself.
                self.masters[i] = p.detach().float().clone() if self.bf16 else p
        for p in model.parameters():  # not model.to(dtype): rotary frequencies must not be rounded
            p.data = p.data.to(dtype)
        matrices = [m for m in self.masters.values() if m.dim() >= 2]
        vectors = [m for m in self.masters.values() if m.dim() < 2]
        self.adam = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                       {"params": vectors, "weight_decay": 0.0}])

    @torch.no_grad()
    def accumulate(self) -> None:
        """bf16: moves the averaged gradients into the owners' fp32 sums, for bf16 sums would lose
        most of what is added. fp32: nothing to do, the gradients add up where they are."""
        if not self.bf16:
            return
        for i, master in self.masters.items():
            grad = self.params[i].grad
            if master.grad is None and grad is not None:
                master.grad = grad.float()
            elif grad is not None:  # None: frozen by try_model
                master.grad += grad
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Clips by the global norm, steps, publishes. Returns the norm before clipping.

        A norm that is not finite takes no step: a NaN in the weights never goes away.
        """
        grads = [m.grad for m in self.masters.values() if m.grad is not None]  # None: frozen
        square = torch.nn.utils.get_total_norm(grads).square()
        dist.all_reduce(square)
        norm = square.sqrt().item()
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            if self.max_norm > 0:
                torch._foreach_mul_(grads, min(1.0, self.max_norm / (norm + 1e-6)))
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
            self.publish()
        else:
            self.skipped_in_a_row += 1
        for p in self.params:
            p.grad = None
        for master in self.masters.values():
            master.grad = None
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> the weights that every rank computes with."""
        for i, master in self.masters.items():
            self.params[i].copy_(master)
        if dist.get_world_size() > 1:
            for i, p in enumerate(self.params):
                dist.broadcast(p.data, self.owner[i])

    def state_dict(self) -> dict:
        return {
            "masters": {i: master.detach() for i, master in self.masters.items()},
            "adam": self.adam.state_dict(),
            "skipped": self.skipped_in_a_row,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for i, master in self.masters.items():
            master.copy_(state["masters"][i])
        self.adam.load_state_dict(state["adam"])
        self.skipped_in_a_row = state["skipped"]
        self.publish()


def share_out(sizes: list[int], ranks: int) -> list[int]:
    """The owner of each of these parameters: the largest first, each to the rank with the least.

    >>> share_out([10, 30, 15], ranks=2)
    [1, 0, 1]
    """
    held = [0] * ranks
    owner = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = held.index(min(held))
        held[owner[i]] += sizes[i]
    return owner


# ================================================================================ 5. logs and plots


def log(run: Run, metrics: dict, groups: list[Group]) -> None:
    """A line in metrics.jsonl, the step's first 16 samples in samples.jsonl."""
    if run.rank > 0:
        return
    drawn = rollout.each_sample(groups)
    metrics = {"accuracy": None, "correction_success": None} | metrics
    if drawn:
        verdicts = [sample.verdict for _, sample in drawn]
        lengths = [len(sample.token_ids) for _, sample in drawn]
        seconds = run.seconds["rollout"] + run.seconds["update"]
        metrics |= {name: verdicts.count(name) for name in ("right", "wrong", "ungradable")}
        metrics["mixed_groups"] = np.mean([len(set(group.rewards)) > 1 for group in groups])
        metrics["truncated"] = np.mean([not sample.finished for _, sample in drawn])
        metrics["mean_length"] = np.mean(lengths)
        metrics["tokens_per_second"] = sum(lengths) / seconds
    for name in ("visits", "dropped_errors", "questions", "samples", "tokens"):
        metrics[name] = getattr(run.state, name)
    metrics["pool_size"] = None if run.pool is None else len(run.pool)
    metrics["seconds"] = {part: round(seconds, 4) for part, seconds in run.seconds.items()}
    metrics["peak_memory_gb"] = peak_memory(run.device) / 2**30
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no nan
            metrics[name] = None
    append_lines(run.output / "metrics.jsonl", [metrics])
    append_lines(run.output / "samples.jsonl", [
        {"step": run.state.step, "stage": run.state.stage, "problem": group.problem,
         "answer": group.answer, "prompt": run.tokenizer.decode(group.prompt),
         "response": sample.text, "verdict": sample.verdict, "finished": sample.finished,
         "analysis": sample.analysis}
        for group, sample in drawn[:16]
    ])


def append_lines(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def peak_memory(device: torch.device) -> int:
    """Bytes that torch allocated on the GPU, a sleeping vLLM's included (vllm#17117), or that this
    process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def healthy_gap(bf16: bool) -> float:
    """What the mean |log pi_old - log mu| stays below. Others report 0.01 to 0.02 in bf16; in fp32
    it is 1e-5."""
    return 0.05 if bf16 else 0.002


def watch(run: Run, metrics: dict, groups: list[Group]) -> None:
    """Warns of a stale engine and of a run that cannot learn; ends one without finite gradients."""
    state = run.state
    gap = metrics.get("logp_gap")
    limit = healthy_gap(run.optimizer.bf16)
    if gap is not None and gap > limit:
        warn(f"step {state.step}: engine and trainer disagree by {gap:.3g} in log p on average, "
             f"more than {limit}: it has stale weights, or computes something else")
    if run.optimizer.skipped_in_a_row >= 3:
        fail(f"step {state.step}, stage {state.stage}: three gradients in a row were not finite, "
             "none was used; lower --learning_rate, look at samples.jsonl, and --resume from the "
             "last checkpoint")
    if state.stage == 2:
        return
    finished = any(sample.finished for group in groups for sample in group.samples)
    if finished and metrics["accuracy"] > 0:
        state.barren = 0
        return
    state.barren += 1
    if state.barren == 4 and finished:
        warn("four steps in a row every response was wrong; usually nothing is boxed, the problems "
             "are too hard, or --train_data has other answers: see samples.jsonl")
    elif state.barren == 4:
        warn("four steps in a row every response was cut off; usually --max_new_tokens is low, or "
             "the model ends no turn: see samples.jsonl")


def show_correction(run: Run, groups: list[Group], examples: list[Example]) -> None:
    """Prints one correction in full; only what is marked carries gradient (Eq. 12)."""
    if not examples:
        return
    trained = [e for e in examples if e.mask.any() and e.advantage]
    example = trained[0] if trained else examples[0]
    group = groups[example.group]
    ids = group.prompt + group.samples[example.sample].token_ids
    prompt, start, end = len(group.prompt), example.first, len(example.ids)
    on, off = (">>>", "<<<")
    if sys.stdout.isatty():
        on, off = ("\033[30;42m", "\033[0m")
    decode = run.tokenizer.decode
    run.say(
        f"\n--- stage 2, visit {run.state.visits}: a prompt and a correction with "
        f"Â' {example.advantage:.2f}; what carries gradient is between {on} and {off}\n"
        f"{decode(ids[:prompt])}\n---\n"
        f"{decode(ids[prompt:start])}{on}{decode(ids[start:end])}{off}{decode(ids[end:])}\n---"
    )


def summary(run: Run) -> None:
    """The table and the picture at the end."""
    if run.rank > 0:
        return
    lines = read_lines(run.output / "metrics.jsonl")
    if run.eval_tasks:
        evaluations = [line for line in lines if "eval_accuracy" in line]
        before, after = evaluations[0], evaluations[-1]
        run.say(f"\n{'held-out problems':<28}{'before':>16}{'after':>16}")
        for key, name in (("eval_accuracy", "answered right"),
                          ("eval_correction", "own errors corrected")):
            run.say(f"{name:<28}{with_error(before, key):>16}{with_error(after, key):>16}")
    spent = Counter()
    for line in lines:
        spent.update(line["seconds"])
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in spent.most_common())
    run.say(f"{run.state.samples:,} samples, {run.state.visits} visits to stage 2; {parts}")
    plot(lines, run.output / "curves.png", held_out=len(run.eval_tasks))
    run.say(f"written: {run.output}/ (metrics, samples, curves.png, checkpoints/, final/)")


def with_error(line: dict, key: str) -> str:
    """Share and standard error; `-` where there was nothing to measure."""
    if line[key] is None:
        return "-"
    error = line[f"{key}_se"] or 0  # None for one observation
    return f"{line[key]:.3f} ± {error:.3f}"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot(lines: list[dict], path: Path, held_out: int) -> None:
    """curves.png: accuracy, correction success and pool size over steps, stage 2 shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    def curve(axis, key, style, color, label):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axis.plot([x for x, _ in points], [y for _, y in points], style, color=color, label=label)

    errors = [round(held_out * (1 - (line.get("eval_accuracy") or 0))) for line in lines]
    curve(above, "accuracy", ".-", "lightskyblue", "accuracy of the step's groups (stage 1)")
    curve(above, "correction_success", ".-", "lightgreen", "correction success (stage 2)")
    curve(above, "eval_accuracy", "o-", "tab:blue", "held-out: answered right")
    curve(above, "eval_correction", "s-", "tab:green",
          f"held-out: own errors corrected, {errors[0]} at the start, {errors[-1]} at the end")
    curve(below, "pool_size", "-", "tab:gray", "error pool")
    for line in lines:
        if line.get("stage") == 2:
            for axis in (above, below):
                axis.axvspan(line["step"] - 0.5, line["step"] + 0.5, color="tab:green", alpha=0.12,
                             lw=0)
    above.set(ylim=(0, 1), ylabel="share")
    above.legend(loc="lower right", fontsize="small")
    below.set(ylabel="error pool", xlabel="step (shaded: stage 2)")
    figure.savefig(path, dpi=120)


# =================================================================================== 6. checkpoints

LOGS = ("metrics.jsonl", "samples.jsonl")


def save_checkpoint(run: Run) -> None:
    """checkpoints/step_NNNNNN/rank_K.pt, a shard of each rank. Such a folder is complete."""
    folder = run.output / "checkpoints" / f"step_{run.state.step:06d}"
    part = folder.with_suffix(".part")
    saved = {
        "state": asdict(run.state),
        "pool": None if run.pool is None else run.pool.state_dict(),
        "logs": {name: (run.output / name).stat().st_size for name in LOGS},
        "optimizer": run.optimizer.state_dict(),
    }
    try:
        part.mkdir(parents=True, exist_ok=True)
        torch.save(saved, part / f"rank_{run.rank}.pt")
    except (OSError, RuntimeError) as error:  # torch.save names no disk where it is full
        free = shutil.disk_usage(run.output).free / 2**30
        fail(f"{part} cannot be written ({error}): its disk has {free:.1f} GB left; free some and "
             "--resume", code=1)
    rollout.barrier()  # all shards are written
    if run.rank == 0:
        remove(folder)  # one that was found damaged
        part.rename(folder)
        for old in checkpoint_folders(run)[:-2]:
            if not old.is_symlink():
                shutil.rmtree(old)


def checkpoint_folders(run: Run) -> list[Path]:
    """The folders that save_checkpoint has written, oldest first."""
    folders = (run.output / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d{6,}", folder.name))


def remove(folder: Path) -> None:
    """Removes a folder of ours, or the link that stands for it, but not what the link points to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(run: Run) -> None:
    """Loads the newest step that is whole on every rank, if any is, and cuts the logs to it."""
    folders = checkpoint_folders(run)
    if not folders:
        assert_nothing_is_lost(run)
    log_sizes = dict.fromkeys(LOGS, 0)
    for folder in reversed(folders):
        file = folder / f"rank_{run.rank}.pt"
        saved = read_shard(file)
        damaged = gather([str(file)] if saved is None else [])
        if not damaged:
            run.state = State(**saved["state"])
            run.optimizer.load_state_dict(saved["optimizer"])
            if run.pool is not None:
                run.pool.load_state_dict(saved["pool"])
            log_sizes = saved["logs"]
            break
        warn(f"{', '.join(damaged)}: missing or damaged, so the checkpoint before it is used")
    if run.rank == 0:
        for name, size in log_sizes.items():
            path = run.output / name
            path.touch()
            if path.stat().st_size > size:  # what was logged later is done again
                os.truncate(path, size)


def read_shard(file: Path) -> Optional[dict]:
    """What a rank has saved, in the host's memory; None if the file is missing or damaged."""
    try:
        if zipfile.ZipFile(file).testzip() is None:  # torch.load does not notice a flipped byte
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # damaged bytes raise anything
        pass
    return None


def assert_nothing_is_lost(run: Run) -> None:
    """Without a checkpoint a run starts again, unless one had been saved and has disappeared."""
    metrics = run.output / "metrics.jsonl"
    steps = [line["step"] for line in read_lines(metrics)] if metrics.exists() else []
    # A step beyond the first that is saved is logged only once that one is saved.
    if (run.output / "final").exists() or max(steps, default=0) > run.config.save_every:
        fail(f"{run.output} holds the results of a run, but no checkpoint to resume from; restore "
             "its checkpoints/, or name another --output_dir")


def save_final(run: Run) -> None:
    """final/: a plain Hugging Face checkpoint, replaced as a whole."""
    if run.rank == 0:
        part = run.output / "final.part"
        run.model.save_pretrained(part)
        run.tokenizer.save_pretrained(part)
        remove(run.output / "final")
        part.rename(run.output / "final")


# ========================================================================================= 7. start


def set_up(config: Config, rank: int, device: torch.device, cleanup: ExitStack) -> Run:
    """Builds everything, on all ranks together. ValueError or OSError, one line, if it cannot.

    Nothing is written before data and model have been checked.
    """
    output = find_output(config)
    model, tokenizer = rollout.load_policy(config.model, "auto", device)
    model.generation_config.validate(strict=True)  # else final/ could not be written
    tasks = rollout.load_tasks(tokenizer, config.train_data)
    eval_tasks = []
    if config.eval_data:
        eval_tasks = rollout.load_tasks(tokenizer, config.eval_data)[: config.eval_questions]
    choose_sizes(config, model, tokenizer, tasks + eval_tasks)
    room = {"max_new_tokens": config.max_new_tokens, "max_context": config.max_context}
    tasks = rollout.fitting(tasks, source="--train_data", **room)
    eval_tasks = rollout.fitting(eval_tasks, source="--eval_data", **room)

    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    switch_off_dropout(model)
    optimizer = MasterAdamW(
        model, dtype, weight_decay=config.weight_decay, max_norm=config.max_grad_norm
    )
    engine = rollout.make_engine(
        config.rollout, model, tokenizer, model_path=config.model, max_context=config.max_context,
        memory_share=config.memory_share,
    )
    cleanup.callback(engine.close)
    if config.compile:
        compile_layers(model, recompute=config.gradient_checkpointing)
    elif config.gradient_checkpointing:  # after the engine has inspected the model's cache
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"temperature": config.temperature, "chunk": config.logprob_chunk,
               "vocabulary": len(tokenizer), "compile_head": config.compile}
    policy = Policy(model, **options)
    try_model(policy, engine, config, tasks, healthy_gap(bf16))
    cleanup.enter_context(lock_output(config, output, tasks, eval_tasks))

    reference = None
    if config.beta:  # else pi_ref is not even loaded
        frozen, _ = rollout.load_policy(config.model, dtype, device)
        reference = Policy(frozen.requires_grad_(False), **options)
    # Buffers are not broadcast: that would be a collective in every forward pass, of which the
    # ranks make different numbers.
    ddp = DistributedDataParallel(policy, gradient_as_bucket_view=True, broadcast_buffers=False)
    pool = None
    if config.algorithm == "scrpo":
        pool = error_pool.ErrorPool(config.min_variance, config.errors_per_question)
    grader = cleanup.enter_context(reward.Grader())
    return Run(
        config, rank, device, output, model, tokenizer, tasks, eval_tasks, optimizer=optimizer,
        engine=engine, grader=grader, policy=ddp, reference=reference, pool=pool,
    )


def find_output(config: Config) -> Path:
    """The output folder, which need not exist; ValueError if it is not ours to write into."""
    if config.output_dir is None:
        numbers = [int(folder.name) for folder in RUNS.glob("*") if folder.name.isdigit()]
        fresh = RUNS / f"{max(numbers, default=0) + 1:03d}"
        config.output_dir = gather([str(fresh)])[0]
    output = rollout.output_folder(config.output_dir)
    begun = (output / "metrics.jsonl").exists() or (output / "checkpoints").exists()
    if begun and not config.resume:
        raise ValueError(f"--output_dir {output} holds a run; add --resume, or name another")
    return output


def lock_output(config: Config, output: Path, tasks: list[Task], eval_tasks: list[Task]):
    """Locks the folder and writes settings.json; ValueError if its run has other settings."""
    settings = asdict(config) | {
        "ranks": dist.get_world_size(),
        # By content: what is behind a name may change, and a chat template may write the date.
        "first_prompt": tasks[0].prompt,
        "problems": rollout.digest(tasks + eval_tasks),
        "weights": rollout.weights_digest(config.model) if config.beta else None,  # pi_ref's
    }
    free = set(FREE_TO_CHANGE)
    if config.schedule == "cosine":  # the rate depends on the number of steps
        free.remove("steps")
    if not (output / "metrics.jsonl").exists():  # the run has not begun: all may change
        free = set(settings)
    return rollout.lock_folder(output, settings, free)


def switch_off_dropout(model) -> None:
    """With dropout pi_theta would be another function at each pass."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def choose_sizes(config: Config, model, tokenizer, tasks: list[Task]) -> None:
    """--max_context and --micro_batch_tokens where they are not given, by model and data."""
    if config.max_context is None:
        longest = max(len(task.prompt) for task in tasks)
        template = len(rollout.render(tokenizer, error_pool.correction_prompt("", "")))
        limit = rollout.context_limit(model.config, tokenizer)
        config.max_context = rollout.needed_context(
            longest, template, config.max_new_tokens, limit
        )
    if config.micro_batch_tokens is None:
        # 4 GiB for activations [ours], of about 16 hidden sizes a token and layer [measured].
        hidden_size = model.get_input_embeddings().embedding_dim
        token_bytes = 4 * 16 * hidden_size * getattr(model.config, "num_hidden_layers", 1)
        config.micro_batch_tokens = min(16384, 2 ** int(math.log2(2**32 / token_bytes)))


def try_model(policy: Policy, engine, config: Config, tasks: list[Task], limit: float) -> None:
    """Samples, and a forward and backward pass, of the longest and the shortest prompt.

    Parameters that get no gradient, such as a router's bias, are frozen: DDP would wait for them.
    ValueError, one line, where the model's own code fails, or engine and trainer disagree about log
    p: such a model scales or caps its logits (Granite, Gemma 2), or is no causal model.
    """
    model = policy.model
    by_length = sorted(tasks, key=lambda task: len(task.prompt))
    tried = [by_length[-1], by_length[0]]
    try:
        drawn = engine.generate(
            [task.prompt for task in tried], 2, temperature=config.temperature,
            max_new_tokens=min(16, config.max_new_tokens), seeds=[[0, 1], [2, 3]],
            bar=partial(tqdm, disable=True),
        )
        engine.sleep()  # as before every update: its memory may be needed
        groups = [Group(**vars(task), samples=samples) for task, samples in zip(tried, drawn)]
        lengths = [[len(sample.token_ids) for sample in group.samples] for group in groups]
        examples = make_examples(groups, torch.ones(2, 2), all_tokens(lengths), lengths)
        batch = collate(examples, model.device)
        policy.train(model.is_gradient_checkpointing)
        logp, _ = policy(batch.ids, batch.attention, batch.first)
        logp.sum().backward()
    except Exception as error:  # a model's own code may raise anything
        fault = f"--model {config.model} cannot be trained: {type(error).__name__}: {error}"
        raise ValueError(fault) from error
    gap = (logp - batch.engine_logp)[batch.mask].abs().mean().item()
    if not gap < limit:
        raise ValueError(f"--model {config.model} is no causal model, or scales or caps its logits:"
                         f" the {engine.name} engine and loss.py differ by {gap:.2g} in log p")
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        names = ", ".join(unused)
        warn(f"{len(unused)} parameters get no gradient and are frozen: {names:.200}")
    for p in model.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None


def introduce(run: Run) -> None:
    """Prints the run's main settings, three problems and the first prompt."""
    config = run.config
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    compute = "bf16" if run.optimizer.bf16 else "fp32"
    held_out = f"{len(run.eval_tasks)} held-out ones" if run.eval_tasks else "no evaluation"
    run.say(
        f"{config.algorithm}: {config.model} ({millions:.1f} M parameters, {compute}) on "
        f"{dist.get_world_size()} x {run.device.type}, {config.steps} steps\n"
        f"{run.engine.name} engine ({run.engine.why}), contexts of {config.max_context} "
        f"tokens, micro-batches of {config.micro_batch_tokens}; writing to {run.output}\n"
        f"{len(run.tasks):,} questions, {held_out}; the first questions and their answers:"
    )
    for task in run.tasks[:3]:
        run.say(f"  {task.problem:.70}  ->  {task.answer:.30}")
    run.say(f"--- the first prompt\n{run.tokenizer.decode(run.tasks[0].prompt)}\n---")
    if run.state.step:
        run.say(f"resumed after step {run.state.step}, in stage {run.state.stage}")


@record  # torchrun shows the traceback of the rank that broke first
def run_training(arguments: list[str], rank: int, device: torch.device, cleanup: ExitStack) -> int:
    """Returns the exit code."""
    try:
        run = set_up(parse(arguments), rank, device, cleanup)
    except (ValueError, OSError) as error:
        fail(error)
    # DDP must be gone before the process group is destroyed, or that can deadlock.
    cleanup.callback(setattr, run, "policy", None)
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, run.interrupt)
        cleanup.callback(signal.signal, number, before)
    load_checkpoint(run)
    introduce(run)
    train(run)
    if run.state.step < run.config.steps:
        run.say(f"stopped by a signal after step {run.state.step}; --resume continues from there")
    else:
        save_final(run)
        summary(run)
    return run.exit_code


def main(arguments: Optional[list[str]] = None) -> None:
    """May be called any number of times in a process."""
    rank, _, device = rollout.start_distributed()
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        with ExitStack() as cleanup:  # what is to be closed or put back when the run ends
            exit_code = run_training(arguments, rank, device, cleanup)
    finally:
        if dist.is_initialized():  # vLLM destroys it too
            dist.destroy_process_group()
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
