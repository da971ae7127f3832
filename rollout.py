"""Problems -> prompts -> samples -> graded groups, on all ranks together, by one of two engines.

1. Task b is the work of rank b mod world. Every rank returns all groups, in the order of the tasks.
2. A sample is a function of the weights and of its place (run seed, step, question, sample). Ranks
   and batches change nothing but the rounding of logits.
3. The trainer gets the sampled ids themselves (decoding and encoding again would not return them)
   and log mu of each, under the distribution that it was drawn from.

TransformersEngine samples from the live model and runs anywhere; VLLMEngine is for speed on a GPU.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache, partial
from inspect import signature
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple, NoReturn, Optional

PARENT = os.getppid()  # torchrun, if it started us; noted before the slow imports that follow

import numpy
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import AttentionInterface
from transformers.utils.logging import disable_progress_bar

import error_pool
import reward

# -------------------------------------------------------------------------- tasks, samples, groups


@dataclass
class Task:
    """What is asked: a question, or in stage 2 the correction of a wrong answer to one."""

    problem: str
    answer: str  # the gold final answer
    prompt: list[int]
    question: int  # its number in the step, or in an evaluation's file: it decides the seeds
    corrects: Optional[int] = None  # in an evaluation: the sample that this asks to correct


@dataclass
class Sample:
    """One response. The engine fills the first four fields, grading the others."""

    token_ids: list[int]  # as sampled; the end-of-turn id is the last one iff `finished`
    logprobs: list[float]  # log mu of each, at the sampling temperature
    text: str  # without the end-of-turn token; begins with `<think>` if the prompt ended with it
    finished: bool  # False: cut off at max_new_tokens
    verdict: str = ""  # "right", "wrong" or "ungradable"
    reward: float = 0.0  # R, Eq. 1, or R', Eq. 11; in a fork any number from 0 to 1 (1: right)
    analysis: Optional[tuple[int, int]] = None  # of a correction: (start, end) in token_ids
    solution: Optional[str] = None  # of a correction: what is graded; "" if not well-formed


@dataclass(kw_only=True)
class Group(Task):
    """A task and its G samples."""

    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]


# ----------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    source: str  # file and row, or what the row itself says


# The first of these fields that a row has is used. They cover the paper's benchmarks as the hub has
# them, and for training MATH, NuminaMath, OpenMathReasoning, DAPO-Math-17k and DeepScaleR.
PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = (
    "answer", "final_answer", "expected_answer", "ground_truth", "reward_model", "solution",
)
NO_ANSWER = ("proof", "notfound")  # in NuminaMath's words


def load_problems(source: str) -> list[Problem]:
    """Problems of a JSONL, JSON or Parquet file, or of a dataset on the hub, `id[:config[:split]]`.

    Rows without a final answer are left out and counted in a warning. ValueError, one line with
    file, row, field and remedy, for what cannot be read.
    """
    problems = {}
    unanswered = []
    for i, row in enumerate(read_rows(source)):
        where = f"{source}, row {i}"
        try:
            problem = read_field(row, PROBLEM_FIELDS, read_prompt)
            answer = read_field(row, ANSWER_FIELDS, read_answer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if answer.lower() in NO_ANSWER:
            unanswered.append(where)
            continue
        # DAPO-Math-17k holds each problem 100 times. Elsewhere a repeat stays: benchmarks count it.
        key = (problem, answer) if "reward_model" in row else where
        problems.setdefault(key, Problem(problem, answer, str(row.get("source", where))))
    if not problems:
        raise ValueError(f"{source}: no problem with a final answer; give `problem` and `answer`")
    if unanswered:
        warn(f"{unanswered[0]} has no final answer; {len(unanswered)} such rows are left out")
    return list(problems.values())


def digest(problems: list[Problem]) -> str:
    """Changes with what is asked or answered: the content behind a path may change."""
    content = repr([(p.problem, p.answer) for p in problems]).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def read_rows(source: str):
    """The rows of a file or of a dataset. ValueError, one line, where they cannot be read."""
    try:
        if source.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(source).to_pylist()
        if os.path.isfile(source) or re.search(r"\.(jsonl?|csv|txt|gz)$", source):
            # Not by pandas: where a row lacks a field, it makes floats of the other rows' integers.
            text = Path(source).read_text(encoding="utf-8-sig")
            if not text.lstrip().startswith("["):  # a row a line, which an error then names
                text = "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]"
            return json.loads(text)
        from datasets import load_dataset

        name, _, rest = source.partition(":")
        config, _, split = rest.partition(":")
        splits = load_dataset(name, config or None)
        if not split and len(splits) > 1:  # a guess is how a test set gets trained on
            raise ValueError(f"name one of its splits {list(splits)}, as in {name}:{config}:train")
        return splits[split or next(iter(splits))]
    except Exception as error:  # these libraries have no common class for what can go wrong
        remedy = "give JSON lines in UTF-8 or Parquet, or a dataset on the hub as id:config:split"
        raise ValueError(f"{source}: {type(error).__name__}: {error}; {remedy}") from None


def read_field(row, names: tuple, read) -> str:
    """The text of the first of these fields that a row has; ValueError says what is wrong with it.

    >>> read_field({"question": "2+3?", "answer": "2 and 3.\\n#### 5"}, ANSWER_FIELDS, read_answer)
    '5'
    """
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object with fields")
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"give it a field {' or '.join(names)}; there are {list(row)}")
    try:
        text = read(row[name], name).strip()
        text.encode()  # half of a surrogate pair is no text
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        message = f"field {name!r} holds {row[name]!r:.60} ({error}); give text in `{names[0]}`"
        raise ValueError(message) from None
    if not text:
        raise ValueError(f"field {name!r} is empty: fill it, or delete the row")
    return text


def read_prompt(value, _field) -> str:
    """Text, or the last user turn of a chat, without the instruction that DAPO-Math-17k adds."""
    if not isinstance(value, str):
        value = [turn["content"] for turn in value if turn["role"] == "user"][-1]
    if isinstance(value, list):  # of parts, which must all be text
        value = "".join(part["text"] for part in value)
    instructed = r"\ASolve the following math problem step by.*?\n\n(.*)\n\nRemember to put.*\Z"
    return re.sub(instructed, r"\1", value, flags=re.DOTALL)


def read_answer(value, field="answer") -> str:
    r"""Text, a number, a list of them (OlympiadBench), or the end of a solution (GSM8K, MATH).

    >>> [read_answer(value) for value in (142.0, 0.1 + 0.2, 1e22, -0.0, [1, "2"], "$2$")]
    ['142', '0.3', '10000000000000000000000', '0', '1, 2', '2']
    >>> read_answer(r"$x=\fbox{2}$ or $\boxed{-2}$", "solution"), read_answer("Trivial", "solution")
    ('2, -2', 'notfound')
    """
    if field == "reward_model":  # DAPO's, or its JSON text
        if isinstance(value, str):
            value = json.loads(value)
        value = value["ground_truth"]
    if isinstance(value, list):
        return ", ".join(map(read_answer, value))
    is_number = isinstance(value, (int, float, Decimal)) and -math.inf < value < math.inf
    if isinstance(value, bool) or not (is_number or isinstance(value, str)):
        raise TypeError("neither text nor a number")
    if isinstance(value, float):  # it holds 15 digits of a decimal, but all of an integer
        value = format(Decimal(f"{value + 0:.{15 if value % 1 else 17}g}"), "f")
    text = str(value)
    answer = text.rpartition("####")[2]  # GSM8K
    if re.search(r"\\(boxed|fbox)", answer):  # MATH; all that differ: x^2 = 4 has two answers
        parts = reward.after_thinking(answer).replace("\\fbox", "\\boxed").split("\\boxed")[1:]
        boxes = dict.fromkeys(reward.final_answer("\\boxed" + part) for part in parts)
        answer = ", ".join(filter(None, boxes))
    if field == "solution" and answer in (text, ""):  # a proof, or a box that never ends
        return NO_ANSWER[1]
    return re.sub(r"(?<!\\)\$", "", answer)  # OlympiadBench


# ------------------------------------------------------------------------------------------ prompts

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def solution_prompt(problem: str) -> str:
    """Stage 1's user turn: R1-Distill's protocol, which has no system prompt."""
    return f"{problem}\n{INSTRUCTION}"


@lru_cache(maxsize=4)
def control_tokens(tokenizer) -> re.Pattern:
    """What a problem must not be able to write into a prompt: `<|im_end|>`, `</s>`, `[THINK]`."""
    marks = {*reward.THINKING, *reward.THINKING.values()}
    names = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or str(token) in marks or re.fullmatch(r"<\|.+\|>", str(token)):
            names.append(re.escape(str(token)))
    names.sort(key=len, reverse=True)  # of two that begin alike the longer one
    return re.compile("|".join(names) or r"(?!)")


def apply_template(tokenizer, turns: list[dict], **options) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        failed = f"the chat template of --model fails on a turn of {turns[-1]['role']}"
        raise ValueError(f"{failed}: {error}") from None


def render(tokenizer, user_text: str) -> list[int]:
    """One user turn -> prompt ids, up to where the response begins. A template writes its own BOS.

    Control tokens in the text are left out. ValueError, one line, where the chat template fails or
    leaves the text out.
    """
    while control_tokens(tokenizer).search(user_text):  # removing one may form another
        user_text = control_tokens(tokenizer).sub("", user_text)
    if tokenizer.chat_template is None:
        return tokenizer(user_text + "\n").input_ids
    turn = [{"role": "user", "content": user_text}]
    text = apply_template(tokenizer, turn, add_generation_prompt=True)
    if user_text.strip() not in text:
        raise ValueError("the chat template of --model leaves out what the user says; mend it")
    return tokenizer(text, add_special_tokens=False).input_ids


def fits(prompt: list[int], max_new_tokens: int, max_context: int) -> bool:
    return len(prompt) + max_new_tokens <= max_context


def needed_context(longest_prompt: int, template: int, max_new_tokens: int, limit: int) -> int:
    """Tokens of the longest sequence a run can meet, at most the model's `limit` [ours].

    That is a correction: question, wrong response, the correction prompt's `template`, response.

    >>> needed_context(longest_prompt=300, template=80, max_new_tokens=1024, limit=32768)
    2428
    """
    return min(limit, longest_prompt + template + 2 * max_new_tokens)


def to_text(tokenizer, prompt: list[int], token_ids: list[int]) -> str:
    """What a response says; R1-Distill's template ends the prompt with `<think>`: it is put back.

    Not `skip_special_tokens`: where the marks of thinking are special, graders would miss them.
    """
    silent = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    text = tokenizer.decode([token for token in token_ids if token not in silent])
    end_of_prompt = tokenizer.decode(prompt[-20:]).rstrip()  # they hold any mark, even by bytes
    for mark in reward.THINKING:
        if end_of_prompt.endswith(mark):
            text = f"{mark}\n{text}"
    return text


def fill_text(tokenizer, prompt: list[int], sample: Sample) -> None:
    """The text of what an engine drew, without the id that ended it."""
    said = sample.token_ids
    if sample.finished:
        said = said[:-1]
    sample.text = to_text(tokenizer, prompt, said)


def stop_ids(model, tokenizer) -> set[int]:
    """The ids that end a response: the generation config's, the tokenizer's, and what the template
    writes after an assistant's turn, which in base models is not the EOS."""
    configured = model.generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    stops = {tokenizer.eos_token_id, *configured}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2."}]
        _, _, after_turn = apply_template(tokenizer, turns).partition("It is 2.")
        end = control_tokens(tokenizer).search(after_turn)
        if end:
            stops.add(tokenizer.convert_tokens_to_ids(end[0]))
    return stops - {None}


# --------------------------------------------------------------------------------------- randomness


def sample_seed(run_seed: int, step: int, question: int, sample: int, corrects=None) -> int:
    """In [0, 2**63): a pure function of the sample's place in the run, never of rank or batch.

    step      of training; 0 in an evaluation, whose samples are thus the same before and after
    question  its place among the step's questions; in an evaluation its number in the file
    corrects  in an evaluation, which of the question's answers this is a correction of

    A hash, not a sum: with run_seed + step, run 1 would begin with run 0's second step.
    """
    if corrects is not None:
        question += 1_000_000_007 * (1 + corrects)  # beyond every number of a question
    place = f"{run_seed},{step},{question},{sample}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1


def uniforms(seeds: numpy.ndarray, index: int) -> numpy.ndarray:
    """splitmix64 of (seed, index), elementwise on uint64 seeds -> float64 in [0, 1).

    Counter-based: the number for token t of a sample needs no state, so rows carry no generator.
    """
    z = seeds + numpy.uint64((index + 1) * 0x9E3779B97F4A7C15 % 2**64)  # arithmetic modulo 2**64
    z = (z ^ (z >> 30)) * numpy.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * numpy.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def draw(logits, uniform, *, temperature: float, top_p: float, vocabulary: int):
    """One id a row by inverse CDF: [R,V] logits, [R] uniforms -> [R] ids and [R] log mu (float32).

    mu = softmax(logits / T) over the tokenizer's `vocabulary` ids: what an embedding has beyond
    them means nothing. T = 0 takes the likeliest id, log mu is then at T = 1: both as in vLLM.
    """
    logits = logits.float() / (temperature or 1.0)
    logits[:, vocabulary:] = -math.inf
    if top_p < 1:  # the fewest likeliest ids that hold top_p; in training it would bias Eq. 3
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(-1, ids, ordered.masked_fill(before >= top_p, -math.inf))
    top, likeliest = logits.max(-1, keepdim=True)
    weight = (logits - top).exp()
    mass = weight.cumsum(-1, dtype=torch.float64)  # float32 would lose the tail of 150,000 ids
    total = mass[:, -1:]
    ids = likeliest
    if temperature > 0:
        ids = torch.searchsorted(mass, uniform[:, None] * total, right=True)
        ids = ids.clamp(max=logits.shape[-1] - 1)
        # A parallel sum need not be monotone: never return an id of no weight.
        ids = torch.where(weight.gather(-1, ids) > 0, ids, likeliest)
    logprobs = logits.gather(-1, ids) - top - total.log().float()
    return ids[:, 0], logprobs[:, 0]


# ------------------------------------------------------------------------------------- Transformers


def grouped_decode(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one new token a row that leaves the cache where it is: [R,KG,1,D] and [R,K,C,D].

    The G query heads that share a key head are handed over as G query positions. Transformers' own
    sdpa repeats the cache G times as soon as there is a mask, at every token.
    """
    rows, heads, _, size = query.shape
    query = query.reshape(rows, key.shape[1], -1, size)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_decode", grouped_decode)


class RoomyLayer(DynamicLayer):
    """The library's cache of a layer copies all of itself at every token; this one has room."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            return super().update(key_states, value_states)
        self.keys = append_columns(self.keys, key_states)
        self.values = append_columns(self.values, value_states)
        return self.keys, self.values


def append_columns(used, new):
    """[R,K,C,D] and [R,K,t,D] -> [R,K,C+t,D], a part of a tensor with room for more columns."""
    end = used.shape[2] + new.shape[2]
    room = used._base  # what `used` is a part of; None if it is whole
    if room is None or end > room.shape[2]:
        room = torch.cat((used, F.pad(new, (0, 0, 0, 32))), dim=2)
    room[:, :, used.shape[2] : end] = new
    return room[:, :, :end]


class Row(NamedTuple):
    """A sample that the engine is about to draw."""

    prompt: list[int]
    seed: int
    sample: Sample


class TransformersEngine:
    """Samples from the live model itself: nothing to push, nothing to put to sleep.

    Cache and layers are the library's own, so every causal model works; where all layers attend to
    everything, RoomyLayer and grouped_decode make them faster. A finished row leaves its batch, and
    no new one joins before the batch is done [ours]: that keeps the cache simple.
    """

    name = "transformers"
    max_rows = 512  # of a batch [ours]
    prefill_tokens = 32_768  # of the prompts that go through the model together [ours]

    def __init__(self, model, tokenizer, *, max_context: int, memory_share=0.3, model_path=None):
        self.model = model
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.stop = stop_ids(model, tokenizer)
        self.takes_positions = "position_ids" in signature(model.forward).parameters  # BART: no
        self.grouped = False
        one = torch.ones(1, 1, dtype=torch.long, device=model.device)
        with torch.no_grad():
            _, cache = self.forward(one, one > 0)
        full = all(type(layer) is DynamicLayer for layer in cache.layers)  # no windows
        capped = getattr(model.config, "attn_logit_softcapping", None)
        self.grouped = full and not capped and model._supports_attention_backend
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if model.device.type == "cuda":
            memory = torch.cuda.get_device_properties(model.device).total_memory
        growing = [layer for layer in cache.layers if hasattr(layer, "keys")]  # not linear ones
        token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in growing)
        self.cache_tokens = int(memory_share * memory / token_bytes)

    def update_weights(self, model) -> None:
        self.model = model

    def sleep(self) -> None:
        """There is nothing to put to sleep."""

    def close(self) -> None:
        """There is nothing to close."""

    @torch.compiler.set_stance("force_eager")  # a compiled layer would be compiled for each width
    @torch.no_grad()  # not inference_mode: backward cannot use what a model keeps of that
    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, bar=tqdm):
        """n samples of each prompt, [prompts][n]; seeds[b][i] is that of sample i of prompt b.

        `bar` makes the progress bar; it gets its total.
        """
        sampling = dict(temperature=temperature, top_p=top_p, vocabulary=len(self.tokenizer))
        rows = []
        for prompt, row_seeds in zip(prompts, seeds, strict=True):
            rows += [Row(prompt, seed, Sample([], [], "", False)) for seed in row_seeds]
        waiting = sorted(rows, key=lambda row: -len(row.prompt))  # so little is padded
        self.model.eval()  # which also lets a model with gradient checkpointing use a cache
        with bar(total=len(rows)) as progress:
            while waiting:
                width = len(waiting[0].prompt)
                in_memory = self.cache_tokens // (width + max_new_tokens)
                prefilled = n * (self.prefill_tokens // width)
                size = max(1, min(self.max_rows, in_memory, prefilled))
                if not self.takes_positions:  # padding on the left would shift its own
                    size = min(size, sum(len(row.prompt) == width for row in waiting))
                self.decode(waiting[:size], max_new_tokens, sampling, progress)
                waiting = waiting[size:]
        samples = []
        for prompt, _, sample in rows:
            fill_text(self.tokenizer, prompt, sample)
            samples.append(sample)
        return [samples[first : first + n] for first in range(0, len(samples), n)]

    def decode(self, rows: list[Row], max_new_tokens: int, sampling: dict, progress) -> None:
        """Draws the samples of these rows, a token each at a time."""
        device = self.model.device
        logits, mask, cache = self.prefill([tuple(row.prompt) for row in rows])
        seeds = numpy.array([row.seed for row in rows], dtype=numpy.uint64)
        for t in range(max_new_tokens):
            uniform = torch.from_numpy(uniforms(seeds, t)).to(device)
            ids, logprobs = draw(logits, uniform, **sampling)
            going = []
            for r, (token, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist())):
                sample = rows[r].sample
                sample.token_ids.append(token)
                sample.logprobs.append(logprob)
                sample.finished = token in self.stop
                if not sample.finished and t + 1 < max_new_tokens:
                    going.append(r)
            progress.update(len(rows) - len(going))
            if not going:
                return
            if len(going) < len(rows):
                rows = [rows[r] for r in going]
                seeds = seeds[going]
                kept = torch.tensor(going, device=device)
                cache.reorder_cache(kept)
                ids = ids[kept]
                mask = mask[kept]
            mask = F.pad(mask, (0, 1), value=True)
            logits, _ = self.forward(ids[:, None], mask, cache)

    def prefill(self, prompts: list[tuple]):
        """The prompts [R], each of them through the model once -> logits [R,V], mask [R,C], cache.

        They are padded on the left, so that all rows grow by the same column.
        """
        device = self.model.device
        distinct = list(dict.fromkeys(prompts))
        places = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        ids = pad_sequence([torch.tensor(prompt) for prompt in distinct], batch_first=True,
                           padding_value=-1, padding_side="left").to(device)
        mask = ids >= 0
        logits, cache = self.forward(ids.clamp(min=0), mask)
        cache.reorder_cache(places)
        return logits[places], mask[places], cache

    def forward(self, ids, mask, cache=None):
        """The model over the newest tokens [R,t] -> the last one's logits [R,V], and the cache.

        mask [R,C] says of all tokens, those in the cache too, which ones are no padding.
        """
        config = self.model.config
        own = config._attn_implementation
        position = (mask.cumsum(1)[:, -ids.shape[1] :] - 1).clamp(min=0)
        columns = mask.long()
        if self.grouped and cache is None:
            cache = Cache(layer_class_to_replicate=RoomyLayer)
        elif self.grouped:
            config._attn_implementation = "grouped_decode"
            columns = mask[:, None, None]
        try:
            out = self.model(input_ids=ids, attention_mask=columns, position_ids=position,
                             past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            config._attn_implementation = own
        return out.logits[:, -1], out.past_key_values


# --------------------------------------------------------------------------------------------- vLLM


@contextmanager
def trainer_state():
    """Puts back what importing and building vLLM changes for the trainer, in the same process."""
    set_num_threads = torch.set_num_threads  # vLLM's CPU build makes it do nothing
    threads = torch.get_num_threads()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # the fastest attention on Hopper
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def silence(log: str, text: str) -> None:
    """Drops the lines with this text from that log."""
    logging.getLogger(log).addFilter(lambda line: text not in line.getMessage())


class VLLMEngine:
    """vLLM 0.32.0 in the trainer's process, one engine a rank on the rank's own device.

    Build it on all ranks together, after torch.distributed. `close()` is for the end of a run.
    """

    name = "vllm"

    def __init__(self, model, tokenizer, *, model_path, max_context, memory_share=0.3):
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.cuda = model.device.type == "cuda"
        self.stop = sorted(stop_ids(model, tokenizer))
        # Ids past the tokenizer, see `draw`. -100 is the lowest bias that vLLM accepts.
        self.forbidden = {i: -100.0 for i in range(len(tokenizer), model.config.vocab_size)}
        if self.cuda and len(self.forbidden) > 1024:  # its GPU sampler rejects more, in mid-step
            raise ValueError(f"--model {model_path}: {len(self.forbidden):,} rows of its embedding "
                             "have no token, and vLLM can forbid 1,024 ids; take a checkpoint that "
                             "is padded less, or --rollout transformers")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else it gets a process of its own
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Seeded samples never pass through it, and building it stops some starts (vllm#49497).
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        reload = "vllm.model_executor.model_loader.reload.layerwise"
        silence(reload, "RotaryEmbedding: Failed to load weights")  # at every push; it has none
        silence("vllm.engine.arg_utils", "The global random seed is set")  # which nobody uses
        executor = "uni"
        if "RANK" in os.environ:  # "uni" would put every rank on cuda:0, this one reads LOCAL_RANK
            executor = "external_launcher"
        settings = dict(
            skip_tokenizer_init=True,
            distributed_executor_backend=executor,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_context,
            max_num_batched_tokens=8192,  # what is longer is prefilled in chunks
            gpu_memory_utilization=memory_share,
            logprobs_mode="processed_logprobs",  # after the temperature; the default is before
            enable_sleep_mode=self.cuda,
            enable_flashinfer_autotune=False,  # minutes, for kernels that are not used
        )
        if not self.cuda:  # for tests. Its sampler fails when a seeded prompt is cut into chunks
            settings |= dict(enforce_eager=True, kv_cache_memory_bytes=1 << 28,
                             enable_chunked_prefill=False,
                             max_num_batched_tokens=max(8192, max_context))
        try:
            with trainer_state():
                from vllm import LLM, SamplingParams

                warn("vLLM starts, which takes about two minutes on a GPU; machines of different "
                     "kinds with one home folder need a VLLM_CACHE_ROOT each", kind="note")
                self.llm = LLM(model_path, **settings)
        except ImportError as error:
            raise ValueError(f"--rollout vllm cannot be had: {error}; install "
                             "requirements-vllm.txt, or take the other engine") from error
        except (ValueError, OSError) as error:  # train.py would drop the traceback of these
            raise RuntimeError("vLLM does not start") from error
        self.parameters = SamplingParams
        self.asleep = False
        self.fresh = True  # it has the checkpoint's or the pushed weights

    def update_weights(self, model) -> None:
        """Pushes the trainer's weights; after a sleep, into memory that comes back for them."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        # Not named_parameters(): it leaves out a tied lm_head, of which vLLM may hold a copy.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # CUDA: after the push, whose copies need room
        self.asleep = False
        self.fresh = self.llm.reset_prefix_cache()
        if not self.fresh:
            raise RuntimeError("vLLM kept keys and values of the old weights, which happens if a "
                               "generate() was broken off; go on with --resume")

    def sleep(self) -> None:
        """CUDA: gives its memory to the update, weights included: the next push brings them."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep = True
            self.fresh = False

    def close(self) -> None:
        """Gives all memory back, and destroys the process group, the trainer's own included."""
        if self.asleep:  # what it has given away cannot be freed (vllm#36651)
            self.llm.wake_up()
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, bar=tqdm):
        """As TransformersEngine.generate. A request for each sample, since each has its seed;
        through the prefix cache the n of a prompt share its keys and values."""
        if not self.fresh:
            raise RuntimeError("generate() after sleep() needs update_weights() first")
        sampling = dict(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens,
                        stop_token_ids=self.stop, logit_bias=self.forbidden or None,
                        logprobs=0, flat_logprobs=True, detokenize=False)
        requests = []
        parameters = []
        for prompt, row_seeds in zip(prompts, seeds, strict=True):
            for seed in row_seeds:
                requests.append({"prompt_token_ids": prompt})
                parameters.append(self.parameters(seed=seed, **sampling))
        samples = []
        outputs = self.llm.generate(requests, parameters, use_tqdm=bar)
        for request, output in zip(requests, outputs, strict=True):
            (out,) = output.outputs
            finished = out.finish_reason == "stop"
            sample = Sample(list(out.token_ids), list(out.logprobs.logprobs), "", finished)
            fill_text(self.tokenizer, request["prompt_token_ids"], sample)
            samples.append(sample)
        return [samples[first : first + n] for first in range(0, len(samples), n)]


# -------------------------------------------------------------------------------- model and engine


def load_policy(source: str, dtype, device):
    """(evaluating model, tokenizer) of a folder or hub id. ValueError, one line, if it is none."""
    if os.path.exists(os.path.join(source, "adapter_config.json")):
        raise ValueError(f"--model {source} is an adapter: merge it into its model first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        options = dict(dtype=dtype, output_loading_info=True)
        model, loaded = AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # OSError, ValueError, SafetensorError: loaders have no common class
        raise ValueError(f"--model {source}: not a causal language model ({error})") from error
    if loaded["missing_keys"]:  # they would be random
        raise ValueError(f"--model {source}: no weights for {sorted(loaded['missing_keys'])[:3]}")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"--model {source} takes more than text; give its language model alone")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows or not tokenizer.tokenize("1+1"):
        raise ValueError(f"--model {source}: its tokenizer has {len(tokenizer)} ids, its embedding "
                         f"{rows} rows; take the right one, or resize the other")
    return model.to(device).eval(), tokenizer


def context_limit(config, tokenizer) -> int:
    """The longest sequence that a model of this configuration takes.

    With LongRoPE that is the pretraining's: beyond it, one long row changes the frequencies of its
    whole batch (transformers#33129), and log p of a row would depend on its company.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length


def make_engine(kind: str, model, tokenizer, *, max_context: int, **options):
    """The engine `kind`: vllm, transformers, or auto: vllm if it is installed and there is a GPU.

    `options` are memory_share and model_path, where the checkpoint of `model` is. ValueError, one
    line, if the engine cannot be had.
    """
    limit = context_limit(model.config, tokenizer)
    if max_context > limit:
        raise ValueError(f"a context of {max_context:,} tokens passes the {limit:,} positions "
                         "of --model; lower --max_context or --max_new_tokens")
    why = "as --rollout says"
    if kind == "auto":
        kind = "transformers"
        why = "vLLM is not installed"
        if not torch.cuda.is_available():
            why = "there is no GPU"
        elif importlib.util.find_spec("vllm"):
            kind = "vllm"
            why = "vLLM is installed"
    options["max_context"] = max_context
    if kind == "vllm":
        engine = VLLMEngine(model, tokenizer, **options)
    else:
        try:
            engine = TransformersEngine(model, tokenizer, **options)
        except ValueError:
            raise
        except Exception as error:  # a model without the library's cache raises what it likes
            raise ValueError("--rollout transformers cannot be had: --model is no causal model "
                             f"with the library's cache ({error})") from error
    engine.why = why
    return engine


# ------------------------------------------------------------------------------------------- groups


def solution_task(tokenizer, problem: Problem, question: int) -> Task:
    """Stage 1's task: the question itself."""
    prompt = render(tokenizer, solution_prompt(problem.problem))
    return Task(problem.problem, problem.answer, prompt, question)


def load_tasks(tokenizer, source: str) -> list[Task]:
    """The problems of a file or dataset as tasks of stage 1, numbered as they stand there."""
    return [solution_task(tokenizer, p, q) for q, p in enumerate(load_problems(source))]


def correction_task(tokenizer, problem, answer, response, question, corrects=None) -> Task:
    """Stage 2's task: x' of Eq. 10, which shows a response without its thinking."""
    prompt = render(tokenizer, error_pool.correction_prompt(problem, response))  # Eq. 10
    return Task(problem, answer, prompt, question, corrects)


def fitting(tasks: list[Task], max_new_tokens: int, max_context: int, source: str) -> list[Task]:
    """The tasks that fit the context; a warning counts the others. ValueError if none fits."""
    kept = [task for task in tasks if fits(task.prompt, max_new_tokens, max_context)]
    room = f"the context of {max_context} tokens with --max_new_tokens {max_new_tokens}"
    if tasks and not kept:
        raise ValueError(f"{source}: no prompt fits {room}; lower it, or raise --max_context")
    if len(kept) < len(tasks):
        warn(f"{source}: {len(tasks) - len(kept)} of {len(tasks)} do not fit {room}; left out")
    return kept


def sample_groups(
    engine, tokenizer, grader, tasks: list[Task], samples: range, *,
    seed: int, step=0, temperature, top_p=1.0, max_new_tokens, span: Optional[str] = None,
) -> list[Group]:
    """Draws and grades samples of each task; every rank returns all groups, in the tasks' order.

    samples which ones: a range of their numbers, which decide their seeds
    span    None: the samples are answers (Eq. 1); "sections" or "prefix": corrections (Eqs. 11, 12)
    step    of training, 0 in an evaluation; with the run's `seed` it decides all randomness
    grader  None: the samples get no verdicts
    """
    rank = dist.get_rank()
    mine = tasks[rank :: dist.get_world_size()]  # task b is the work of rank b mod world

    def seeds_of(task):
        return [sample_seed(seed, step, task.question, i, task.corrects) for i in samples]

    drawn = engine.generate(
        [task.prompt for task in mine], len(samples), temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens, seeds=[seeds_of(task) for task in mine],
        bar=partial(tqdm, unit="sample", leave=False, delay=5, disable=rank > 0),
    )
    groups = [Group(**vars(task), samples=row) for task, row in zip(mine, drawn)]
    grade_groups(grader, tokenizer, groups, span)
    return interleave(gather([groups]))


def interleave(parts: list[list]) -> list:
    """The ranks' parts `items[rank::world]` -> all items, in their order.

    >>> interleave([["a", "c"], ["b"]])
    ['a', 'b', 'c']
    """
    world = len(parts)
    return [parts[b % world][b // world] for b in range(sum(map(len, parts)))]


def each_sample(groups: list[Group]) -> list[tuple[Group, Sample]]:
    """Every sample beside its group, in order."""
    pairs = []
    for group in groups:
        pairs.extend((group, sample) for sample in group.samples)
    return pairs


def grade_groups(grader, tokenizer, groups: list[Group], span: Optional[str]) -> None:
    """Fills in what grading adds to each sample; see `sample_groups`."""
    drawn = each_sample(groups)
    if span is not None:
        for _, sample in drawn:
            find_sections(sample, tokenizer, span)  # Eqs. 11, 12
    if grader is None:
        return
    texts = [s.text if s.solution is None else s.solution for _, s in drawn]
    golds = [group.answer for group, _ in drawn]
    problems = [group.problem for group, _ in drawn]
    verdicts = grader.verdicts(texts, golds, problems)
    for (_, sample), verdict in zip(drawn, verdicts, strict=True):
        sample.verdict = verdict
        sample.reward = float(verdict == "right")  # Eqs. 1, 11


def find_sections(sample: Sample, tokenizer, span: str) -> None:
    """Notes a correction's analysis and solution; without both sections it is wrong (Eq. 11)."""
    sample.solution = ""
    # The ids lack the `<think>` of the prompt, so only the text shows thinking that never ends.
    if not reward.after_thinking(sample.text):
        return
    correction = reward.find_correction(sample.token_ids, tokenizer, span)
    if correction is not None:
        start, end, solution = correction
        sample.analysis = (start, end)
        sample.solution = solution


# ----------------------------------------------------------------------------------------- programs

START_NUMBERS = count()


def flag(default, text: str):
    """A field of a dataclass of settings, which is a flag of the command line, and its help."""
    return field(default=default, metadata={"help": text})


def output_folder(name: str) -> Path:
    """The folder of this name; ValueError where writing into it could harm somebody's files."""
    if not name.strip():
        raise ValueError("the name of the output folder is empty: is a shell variable unset?")
    folder = Path(name).expanduser()
    settings = folder / "settings.json"
    ours = settings.exists() and '"model"' in settings.read_text()
    foreign = sorted(path.name for path in folder.glob("[!.]*"))  # none where there is no folder
    if foreign and not ours:
        raise ValueError(f"{folder} holds {foreign[0]} and no run; name a new folder")
    return folder


def lock_folder(folder: Path, settings: dict, free=frozenset()):
    """Locks an output folder and writes settings.json. Returns the lock, an open file.

    Each rank holds its own lock until its process ends. ValueError if another process holds it, or
    if the folder was begun with other settings, but for those in `free`.
    """
    rank = dist.get_rank()
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / f".lock{rank}", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is writing there; name another") from None
    file = folder / "settings.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    for name in settings.keys() & stored.keys() - free:
        if stored[name] != settings[name]:
            raise ValueError(f"{folder} was begun with {name} {stored[name]!r:.80}, "
                             f"not {settings[name]!r:.80}; name another")
    if rank == 0:
        part = folder / ".settings"  # a name with a dot: after a kill the folder counts as empty
        part.write_text(json.dumps(stored | settings, indent=1))
        part.replace(file)
    return lock


def weights_digest(source: str) -> list[str] | str | None:
    """What changes with a model's weights: digests of its folder's files, or its hub commit."""
    if not os.path.isdir(source):
        return getattr(AutoConfig.from_pretrained(source), "_commit_hash", None)
    digests = []
    for pattern in ("*.safetensors", "*.bin", "*.json"):
        for path in sorted(Path(source).glob(pattern)):
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest()[:12])
    return digests


def start_distributed() -> tuple[int, int, torch.device]:
    """(rank, world, device), under torchrun or plain python, any number of times in a process.

    Alone, a HashStore serves: no port is opened, so any number of runs fit on a machine. Python
    objects travel over gloo, tensors on a GPU over NCCL.
    """
    disable_progress_bar()  # of Hugging Face's loading and saving
    for stream in (sys.stdout, sys.stderr):  # escapes where a terminal lacks the characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    end_with_torchrun()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    elif torch.version.cuda:
        warn("torch is built for CUDA and sees no GPU, so the CPU computes; is the driver too old?")
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun's store outlives the process group, so each start gets keys of its own.
        store = dist.PrefixStore(f"start_{next(START_NUMBERS)}", store)
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        fail("srun alone starts runs that know nothing of each other; let it start torchrun")
    else:
        store = dist.HashStore()
    # A rank may wait for the longest rollout of another. torchrun ends all if one dies.
    timeout = timedelta(hours=24)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    barrier()  # a rank that fails now would break the connections of those still on their way
    return rank, world, device


def end_with_torchrun() -> None:
    """Asks Linux to end this process when torchrun dies; else it would keep its GPU until the end.

    Only under torchrun: a plain `nohup python train.py &` must survive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != PARENT:  # it died before it could be asked for
        raise SystemExit("torchrun is gone")


def gather(items: list) -> list:
    """All ranks' lists as one, in rank order, on every rank."""
    if dist.get_world_size() == 1:  # gloo's threads would copy it, and slow those of OpenMP down
        return list(items)
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return list(chain.from_iterable(lists))


def barrier() -> None:
    """Returns when all ranks have come here."""
    gather([])


def warn(message, kind: str = "warning") -> None:
    """One line from rank 0, above its progress bar."""
    if os.environ.get("RANK", "0") == "0":
        line = " ".join(str(message).split())
        tqdm.write(f"{kind}: {line}", file=sys.stderr)


def fail(message, code: int = 2) -> NoReturn:
    """One line from rank 0, then exit code 2 on all ranks.

    torchrun ends all ranks with the first that ends. So the others wait until rank 0 has spoken,
    and then speak too: a rank may be alone in its failure.
    """
    warn(message, "error")
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
        print(f"error: rank {os.environ['RANK']}: {message}", file=sys.stderr)
    raise SystemExit(code)
