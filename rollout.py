"""Problems -> prompts -> samples -> graded groups, on all ranks together, by one of two engines.

1. Task b is the work of rank b mod world. Every rank returns all groups, in the order of the tasks.
2. A sample is a function of the weights and of its place (run seed, step, question, sample), so
   neither ranks nor batches change it.
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
import random
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache, partial
from itertools import chain, count
from pathlib import Path
from typing import Optional

PARENT = os.getppid()  # torchrun, if it started us; noted before the slow imports that follow

import numpy
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import AttentionInterface
from transformers.utils.logging import disable_progress_bar

import error_pool
import reward

# -------------------------------------------------------------------------------------- what is drawn


@dataclass
class Task:
    """What is asked: a question, or in stage 2 the correction of a wrong answer to one."""

    problem: str
    answer: str  # the gold final answer
    prompt: list[int]
    question: int  # its place among the step's questions; in an evaluation its number in the file
    corrects: Optional[int] = None  # in an evaluation: the sample that this asks to correct


@dataclass
class Sample:
    """One response. The engine fills the first four fields, grading the others."""

    token_ids: list[int]  # as sampled; the end-of-turn id is the last one iff `finished`
    logprobs: list[float]  # log mu of each, at the sampling temperature
    text: str  # without what ends it; begins with `<think>` if the prompt ended with it
    finished: bool  # False: cut off at max_new_tokens
    verdict: str = ""  # "right", "wrong" or "ungradable"
    reward: float = 0.0  # R of Eq. 1, R' of Eq. 11; a fork may give any number from 0 to 1
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


# The first of these fields that a row has counts. They cover the paper's benchmarks as the hub has
# them, and for training MATH, DAPO-Math-17k and DeepScaleR.
PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "reward_model", "solution")


def load_problems(source: str) -> list[Problem]:
    """Problems of a JSONL, JSON or Parquet file, or of a dataset on the hub, `id[:config[:split]]`.

    Raises ValueError, one line with file, row, field and remedy.
    """
    problems = {}
    for i, row in enumerate(read_rows(source)):
        where = f"{source}, row {i}"
        try:
            problem = read_field(row, PROBLEM_FIELDS, read_prompt)
            answer = read_field(row, ANSWER_FIELDS, read_answer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # DAPO-Math-17k holds each problem 100 times. Elsewhere a repeat stays: benchmarks count it.
        key = (problem, answer) if "reward_model" in row else where
        problems.setdefault(key, Problem(problem, answer, str(row.get("source", where))))
    if not problems:
        raise ValueError(f"{source}: no problems in it; give rows with `problem` and `answer`")
    return list(problems.values())


def digest(problems) -> str:
    """Of what is asked and answered: a file may change behind its path."""
    content = repr([(p.problem, p.answer) for p in problems]).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def read_rows(source: str):
    """The rows of a file or dataset. ValueError, one line, where it cannot be read."""
    rows = []
    try:
        if source.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(source).to_pylist()
        if os.path.isfile(source) or re.search(r"\.(jsonl?|csv|txt|gz)$", source):
            text = Path(source).read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("["):
                return json.loads(text)
            for line in filter(str.strip, text.split("\n")):
                rows.append(json.loads(line))
            return rows
        from datasets import load_dataset

        name, config, split = (source.split(":") + ["", ""])[:3]
        splits = load_dataset(name, config or None)
        if not split and len(splits) > 1:  # a guess is how a test set gets trained on
            raise ValueError(f"name one of its splits {list(splits)}, as in {name}:{config}:train")
        return splits[split or next(iter(splits))]
    except Exception as error:  # datasets has no one class for what can go wrong
        remedy = "give JSON lines in UTF-8 or Parquet, or a dataset on the hub as id:config:split"
        where = f"{source}, row {len(rows)}" if rows else source
        raise ValueError(f"{where}: {type(error).__name__}: {error}; {remedy}") from None


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
        text = read(row[name]).strip()
        text.encode()  # half of a surrogate pair is no text
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        message = f"field {name!r} holds {row[name]!r:.60} ({error}); give text in `{names[0]}`"
        raise ValueError(message) from None
    if not text:
        raise ValueError(f"field {name!r} is empty: fill it, or delete the row")
    return text


def read_prompt(value) -> str:
    """Text, or the last user turn of a chat, without the instruction that DAPO-Math-17k adds."""
    if not isinstance(value, str):
        value = [turn["content"] for turn in value if turn["role"] == "user"][-1]
    if isinstance(value, list):  # of parts, which must all be text
        value = "".join(part["text"] for part in value)
    wrapping = r"Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put.*"
    wrapped = re.fullmatch(wrapping, value, re.DOTALL)
    return wrapped[1] if wrapped else value


def read_answer(value) -> str:
    """Text, a number, a list of them (OlympiadBench), or the end of a solution (GSM8K, MATH).

    >>> [read_answer(value) for value in (142.0, 0.1 + 0.2, 1e22, -0.0, [1, "2"], "$2$")]
    ['142', '0.3', '10000000000000000000000', '0', '1, 2', '2']
    """
    if isinstance(value, dict):  # DAPO's reward_model
        value = value["ground_truth"]
    if isinstance(value, list):
        return ", ".join(map(read_answer, value))
    number = isinstance(value, (int, float, Decimal)) and -math.inf < value < math.inf
    if isinstance(value, bool) or not (number or isinstance(value, str)):
        raise TypeError("neither text nor a number")
    if isinstance(value, float):  # it holds 15 digits of a decimal, but all of an integer
        value = format(Decimal(f"{value + 0:.{15 if value % 1 else 17}g}"), "f")
    text = str(value).rpartition("####")[2]  # GSM8K
    text = reward.final_answer(text) if "\\boxed" in text else text  # MATH
    return re.sub(r"(?<!\\)\$", "", text)  # OlympiadBench


# ------------------------------------------------------------------------------------------ prompts

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def solution_prompt(problem: str) -> str:
    """Stage 1's user turn: R1-Distill's protocol, which has no system prompt."""
    return f"{problem}\n{INSTRUCTION}"


@lru_cache(maxsize=4)
def control_tokens(tokenizer) -> re.Pattern:
    """What a problem must not be able to write into a prompt: `<|im_end|>`, `</s>`, `<think>`."""
    added = tokenizer.added_tokens_decoder.values()
    names = [str(t) for t in added if t.special or re.fullmatch(r"<\|.+\|>|</?think>", str(t))]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


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
    while control_tokens(tokenizer).search(user_text):  # what is left may make up another one
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
    """What the response says; R1-Distill's template ends the prompt with `<think>`: it is put back.

    Not `skip_special_tokens`: where `<think>` is a special token, graders would miss it.
    """
    prefilled = tokenizer.decode(prompt[-12:]).rstrip().endswith("<think>")
    silent = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return "<think>\n" * prefilled + tokenizer.decode([t for t in token_ids if t not in silent])


def stop_ids(model, tokenizer) -> set[int]:
    """The ids that end a response: the generation config's, the tokenizer's, and what the template
    writes after an assistant's turn, which in base models is not the EOS."""
    of_model = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2."}]
        tail = apply_template(tokenizer, turns).partition("It is 2.")[2]
        end = control_tokens(tokenizer).search(tail)
        stops.add(tokenizer.convert_tokens_to_ids(end[0]) if end else None)
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
        question += 1_000_000_007 * (1 + corrects)
    place = f"{run_seed},{step},{question},{sample}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1


def uniforms(seeds: torch.Tensor, index: int) -> torch.Tensor:
    """splitmix64 of (seed, index), elementwise on int64 seeds -> float64 in [0, 1).

    Counter-based: the number for token t of a sample needs no state, so no generator follows a row.
    """

    def xorshift(z, k):  # z ^ (z >>> k): torch's >> would carry the sign in
        return z ^ ((z >> k) & ((1 << (64 - k)) - 1))

    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64; products wrap, as they should
    z = seeds + torch.tensor(index + 1, device=seeds.device) * golden
    z = xorshift(z, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = xorshift(z, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return ((xorshift(z, 31) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw(logits, uniform, *, temperature: float, top_p: float, vocabulary: int):
    """One id a row by inverse CDF: [R,V] logits, [R] uniforms -> [R] ids and [R] log mu (float32).

    mu = softmax(logits / T) over the tokenizer's `vocabulary` ids: what an embedding has beyond
    them means nothing. T = 0 takes the likeliest id, log mu is then at T = 1: both as in vLLM.
    """
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= vocabulary
    logits = (logits.float() / (temperature or 1.0)).masked_fill(beyond, float("-inf"))
    if top_p < 1:  # the fewest likeliest ids that hold top_p; in training it would bias Eq. 3
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(-1, ids, ordered.masked_fill(before >= top_p, float("-inf")))
    top, likeliest = logits.max(-1, keepdim=True)
    weight = (logits - top).exp()
    mass = weight.cumsum(-1, dtype=torch.float64)  # float32 would lose the tail of 150,000 ids
    ids = likeliest
    if temperature > 0:
        ids = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
        ids = ids.clamp(max=logits.shape[-1] - 1)
        # A parallel sum need not be monotone: an id of no weight must not come of it.
        ids = torch.where(weight.gather(-1, ids) > 0, ids, likeliest)
    logprobs = logits.gather(-1, ids) - top - mass[:, -1:].log().float()
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

    room = ()  # keys, values [R,K,more,D], of which the first columns are in use

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if not self.room or end > self.room[0].shape[2]:
            more = (*key_states.shape[:2], end - start + 32)
            self.room = [torch.cat((old, old.new_empty(*more, old.shape[3])), dim=2)
                         for old in (self.keys, self.values)]  # fmt: skip
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, rows):
        super().reorder_cache(rows)
        self.room = ()


class TransformersEngine:
    """Samples from the live model itself: nothing to push, nothing to put to sleep.

    Cache and layers are the library's own, so every causal model works; where all layers attend to
    everything, RoomyLayer and grouped_decode make them faster. Finished rows are dropped; their
    places stay empty until all in flight have finished [ours], which keeps the cache simple.
    """

    name = "transformers"
    max_rows = 512  # in flight at a time [ours]
    prefill_tokens = 32_768  # of the prompts that go through the model together [ours]

    def __init__(self, model, tokenizer, *, max_context: int, memory_share=0.3, model_path=None):
        self.model, self.tokenizer, self.max_context = model, tokenizer, max_context
        self.stop, self.grouped = stop_ids(model, tokenizer), False
        one = torch.ones(1, 1, dtype=torch.long, device=model.device)
        with torch.no_grad():
            _, cache = self.forward(one, one, one)
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

    def sleep(self) -> None:
        """There is nothing to put to sleep, and nothing to close."""

    close = sleep

    def update_weights(self, model) -> None:
        self.model = model

    @torch.compiler.set_stance("force_eager")  # or each new width would be compiled
    @torch.no_grad()  # not inference_mode: a rotary table kept from it could not be trained with
    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, bar=tqdm):
        """n samples of each prompt, [prompts][n]; seeds[b][i] is that of sample i of prompt b.

        `bar` makes the progress bar; it gets its total.
        """
        sampling = dict(temperature=temperature, top_p=top_p, vocabulary=len(self.tokenizer))
        samples = [[Sample([], [], "", False) for _ in range(n)] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda b: -len(prompts[b]))  # so little is padded
        waiting = [(prompts[b], seeds[b][i], samples[b][i]) for b in order for i in range(n)]
        self.model.eval()  # which also lets a model with gradient checkpointing use a cache
        with bar(total=len(waiting)) as progress:
            while waiting:
                width = len(waiting[0][0])
                rows = min(self.max_rows, self.cache_tokens // (width + max_new_tokens))
                rows = max(1, min(rows, n * (self.prefill_tokens // width)))
                self.decode(waiting[:rows], max_new_tokens, sampling, progress)
                waiting = waiting[rows:]
        return samples

    def decode(self, live: list, max_new_tokens: int, sampling: dict, progress) -> None:
        """Fills the samples of `live`, rows of (prompt, seed, sample), a token each at a time."""
        device = self.model.device
        prompts = {id(prompt): prompt for prompt, _, _ in live}  # each goes through the model once
        width = len(live[0][0])
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts.values()], device=device)
        length = torch.tensor([len(p) for p in prompts.values()], device=device)
        # Padded on the left, so that all rows grow by the same column.
        mask = torch.arange(width, device=device) >= width - length[:, None]
        logits, cache = self.forward(ids, mask.long(), (mask.cumsum(1) - 1).clamp(min=0))  # [P,V]
        place = {key: row for row, key in enumerate(prompts)}
        rows = torch.tensor([place[id(prompt)] for prompt, _, _ in live], device=device)
        cache.reorder_cache(rows)
        logits, mask, length = logits[rows], mask[rows], length[rows]
        seed = torch.tensor([seed for _, seed, _ in live], device=device)
        for t in range(max_new_tokens):
            ids, logprobs = draw(logits, uniforms(seed, t), **sampling)
            going = []
            for row, (token, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist())):
                prompt, _, sample = live[row]
                sample.token_ids.append(token)
                sample.logprobs.append(logprob)
                sample.finished = token in self.stop
                if sample.finished or t + 1 == max_new_tokens:
                    said = sample.token_ids[:-1] if sample.finished else sample.token_ids
                    sample.text = to_text(self.tokenizer, prompt, said)
                else:
                    going.append(row)
            progress.update(len(live) - len(going))
            if not going:
                return
            if len(going) < len(live):
                live, rows = [live[row] for row in going], torch.tensor(going, device=device)
                cache.reorder_cache(rows)
                ids, mask, length, seed = ids[rows], mask[rows], length[rows], seed[rows]
            mask = F.pad(mask, (0, 1), value=True)
            columns = mask[:, None, None] if self.grouped else mask.long()
            logits, _ = self.forward(ids[:, None], columns, (length + t)[:, None], cache)

    def forward(self, ids, mask, position, cache=None):
        """The model over new tokens [R,t]: the logits after the last one [R,V], and the cache."""
        config, own = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = "grouped_decode" if self.grouped and cache else own
        if self.grouped and not cache:
            cache = Cache(layer_class_to_replicate=RoomyLayer)
        try:
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=position,
                             past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
        finally:
            config._attn_implementation = own
        return out.logits[:, -1], out.past_key_values


# --------------------------------------------------------------------------------------------- vLLM


@contextmanager
def trainer_state():
    """Puts back what building a vLLM engine changes in the process, which is the trainer's: random
    states, threads, float32 precision. Its CPU build even makes torch.set_num_threads a dummy."""
    states = random.getstate(), numpy.random.get_state()
    precision = torch.get_float32_matmul_precision()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


class VLLMEngine:
    """vLLM 0.32.0 in the trainer's process, one engine a rank on the rank's own device.

    Build it on all ranks together, after torch.distributed. `close()` is for the end of a run.
    """

    name = "vllm"

    def __init__(self, model, tokenizer, *, model_path, max_context, memory_share=0.3):
        self.tokenizer, self.max_context = tokenizer, max_context
        self.cuda = model.device.type == "cuda"
        self.stop = sorted(stop_ids(model, tokenizer))
        # Ids past the tokenizer, see `draw`. -100 is the strongest bias that vLLM takes.
        self.forbidden = {i: -100.0 for i in range(len(tokenizer), model.config.vocab_size)}
        if self.cuda and len(self.forbidden) > 1024:  # more its GPU sampler refuses, in mid-step
            raise ValueError(f"--model {model_path}: {len(self.forbidden):,} rows of its embedding "
                             "have no token, and vLLM can forbid 1,024 ids; take a checkpoint that "
                             "is padded less, or --rollout transformers")  # fmt: skip
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else it gets a process of its own
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Seeded samples never pass through it, and building it stops some starts (vllm#49497).
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        noise = "RotaryEmbedding: Failed to load weights"  # at every push; it has none to load
        log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        log.addFilter(lambda record: noise not in record.getMessage())
        settings = dict(
            skip_tokenizer_init=True,
            # takes torchrun's LOCAL_RANK for the device; the plain one puts every rank on cuda:0
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_context,
            max_num_batched_tokens=8192,  # what is longer is prefilled in chunks
            gpu_memory_utilization=memory_share,
            logprobs_mode="processed_logprobs",  # after the temperature; the default is before
            enable_sleep_mode=self.cuda,
        )
        if not self.cuda:  # for tests. Its sampler fails when a seeded prompt is cut into chunks
            settings |= dict(enforce_eager=True, kv_cache_memory_bytes=1 << 28,
                             enable_chunked_prefill=False,
                             max_num_batched_tokens=max(8192, max_context))  # fmt: skip
        with trainer_state():
            from vllm import LLM, SamplingParams

            self.llm, self.parameters = LLM(model_path, **settings), SamplingParams
        self.asleep, self.fresh = False, True  # fresh: has the checkpoint's or the pushed weights

    def update_weights(self, model) -> None:
        """Pushes the trainer's weights; after a sleep, into memory that comes back for them."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        # Not named_parameters(): it leaves out a tied lm_head, of which vLLM may hold a copy.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # CUDA: after the push, whose copies need room
        self.asleep, self.fresh = False, self.llm.reset_prefix_cache()
        if not self.fresh:
            raise RuntimeError("vLLM kept keys and values of the old weights, which happens if a "
                               "generate() was broken off; go on with --resume")  # fmt: skip

    def sleep(self) -> None:
        """CUDA: gives its memory to the update, weights included: the next push brings them."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep, self.fresh = True, False

    def close(self) -> None:
        """Gives all memory back, and destroys the process group, the trainer's own included."""
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, bar=tqdm):
        """As TransformersEngine.generate. A request for each sample, since each has its seed;
        through the prefix cache the n of a prompt share its keys and values."""
        if not self.fresh:
            raise RuntimeError("generate() after sleep() needs update_weights() first")
        sampling = dict(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens,
                        stop_token_ids=self.stop, logit_bias=self.forbidden or None,
                        logprobs=0, flat_logprobs=True, detokenize=False)  # fmt: skip
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(n)]
        parameters = [self.parameters(seed=seed, **sampling) for row in seeds for seed in row]
        samples = []
        outputs = self.llm.generate(requests, parameters, use_tqdm=bar)
        for request, output in zip(requests, outputs, strict=True):
            (out,) = output.outputs
            ids, finished = list(out.token_ids), out.finish_reason == "stop"
            said = ids[:-1] if finished else ids
            text = to_text(self.tokenizer, request["prompt_token_ids"], said)
            samples.append(Sample(ids, list(out.logprobs.logprobs), text, finished))
        return [samples[first : first + n] for first in range(0, len(samples), n)]


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
                         f"{rows} rows; take the right one, or resize the other")  # fmt: skip
    return model.to(device).eval(), tokenizer


def make_engine(kind: str, model, tokenizer, **options):
    """The engine `kind`: vllm, transformers, or auto: vllm if it is installed and there is a GPU.

    `options` are max_context, memory_share and model_path, where the checkpoint of `model` is.
    ValueError, one line, if the engine cannot be had.
    """
    why = "as --rollout says"
    if kind == "auto":
        gpu, installed = torch.cuda.is_available(), importlib.util.find_spec("vllm")
        kind = "vllm" if gpu and installed else "transformers"
        why = f"vLLM is {'' if installed else 'not '}installed" if gpu else "there is no GPU"
    try:
        engine = {"vllm": VLLMEngine, "transformers": TransformersEngine}[kind]
        engine = engine(model, tokenizer, **options)
    except ValueError:
        raise
    except Exception as problem:  # not installed, or a model without a cache
        remedy = "install requirements-vllm.txt, or choose the other engine"
        raise ValueError(f"--rollout {kind} cannot be had: {problem}; {remedy}") from problem
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
) -> list[Group]:  # fmt: skip
    """Samples number `samples`, a range, of each task, graded; every rank returns all, in order.

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
    )  # fmt: skip
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
    if not reward.after_thinking(sample.text):  # thinking that never ends holds no correction
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
    if folder.exists() and not (folder / "settings.json").exists():
        foreign = [path.name for path in folder.glob("[!.]*")]
        if foreign:
            raise ValueError(f"{folder} holds {min(foreign)} and no run; name a new folder")
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
                             f"not {settings[name]!r:.80}; name another")  # fmt: skip
    if rank == 0:
        part = file.with_suffix(".part")
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
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no Chinese shows escapes
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
    gather([])  # a rank that fails now would break the connections of those still on their way
    return rank, world, device


def end_with_torchrun() -> None:
    """Asks Linux to end this process when torchrun dies: it would hold its GPU to the run's end.

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


def warn(message, kind: str = "warning") -> None:
    """One line from rank 0, above its progress bar."""
    if os.environ.get("RANK", "0") == "0":
        line = " ".join(str(message).split())
        tqdm.write(f"{kind}: {line}", file=sys.stderr)


def fail(message, code: int = 2) -> None:
    """One line from rank 0, then exit code 2 on all ranks.

    torchrun ends all ranks with the first that ends. So the others wait until rank 0 has spoken,
    and then speak too: a rank may be alone in its failure.
    """
    warn(message, "error")
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
        print(f"error: rank {os.environ['RANK']}: {message}", file=sys.stderr)
    raise SystemExit(code)
