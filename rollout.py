"""Problems -> prompts -> sampled responses, by one of two engines with one interface.

    engine = make_engine("auto", model, tokenizer, model_path=path)  # vLLM where there is a GPU for it
    engine.wake()                                                    # before each rollout
    engine.update_weights(model)
    groups = engine.generate(prompts, n, temperature=1.0, max_new_tokens=1024, seeds=seeds)
    engine.sleep()                                                   # before the update

Both give the trainer the sampled ids themselves (to decode and encode again does not return them), the log-probability
log mu of each under the distribution that it was drawn from, and whether the response ended by itself.

TransformersEngine runs anywhere and is reproducible: each sample has a private random stream, so it is the same in
any batch, on any rank. VLLMEngine is the fast one on a GPU. Is it right on yours? `python rollout.py --selftest MODEL`
(with torchrun in front, as the training) compares the two sides' log-probabilities before and after weights are pushed.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from reward import final_answer


# ---------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    source: str


@dataclass
class Sample:
    token_ids: list[int]  # as sampled; the end-of-sequence id is the last one iff `finished`
    logprobs: list[float]  # log mu of each id, at the sampling temperature
    text: str  # without special tokens; begins with `<think>` if the prompt ended with it
    finished: bool  # False: cut off at max_new_tokens


def from_chat(messages):
    """DAPO-Math-17k's chat, and its problem out of an instruction that contradicts ours."""
    text = messages if isinstance(messages, str) else messages[-1]["content"]
    return re.sub(r"^Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your.*$", r"\1", text, flags=re.S)


# Column -> how to read it; the first column that a row has counts. They cover AIME-2024 (Maxwell-Jia, HuggingFaceH4,
# math-ai), AMC (AI-MO, math-ai), MATH-500, OlympiadBench (Hothan, math-ai), GSM8K, MATH-lighteval, DAPO-Math-17k
# and its -Processed, DeepScaleR. Gold answers are cut out of solutions by the rule that responses are graded by.
COLUMNS = {
    "problem": {"problem": str, "Problem": str, "question": str, "prompt": from_chat},
    "answer": {
        "answer": lambda value: value.rpartition("####")[2] if isinstance(value, str) else value,  # GSM8K
        "Answer": lambda value: value,
        "final_answer": lambda values: ", ".join(values).replace("$", ""),  # OlympiadBench
        "reward_model": lambda value: value["ground_truth"],  # DAPO
        "solution": lambda text: final_answer(text) if "\\boxed" in text else text,  # MATH
    },
}


def to_problem(row: dict) -> tuple[str, str]:
    """A row in any of these layouts -> (problem, answer); ValueError names the field at fault and the remedy.

    >>> to_problem({"question": "2+3?", "answer": "Two and three make 5.\\n#### 5"})
    ('2+3?', '5')
    >>> to_problem({"Problem": "2+3?", "Solution": "...", "Answer": 5.0})
    ('2+3?', '5')
    >>> to_problem({"problem": "2+3?", "solution": "They make \\\\boxed{5}."})
    ('2+3?', '5')
    """
    found = []
    for part, readers in COLUMNS.items():
        column = next((c for c in readers if row.get(c) is not None), None)
        if column is None:
            raise ValueError(f"no {part}: give it a field {' or '.join(map(repr, readers))}; there are {list(row)}")
        try:
            value = readers[column](row[column])
        except (LookupError, TypeError):
            raise ValueError(f"field {column!r} is not as datasets with that name have it: give text in {part!r}") from None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # AMC's 142.0
        if isinstance(value, (bool, dict, list)):
            raise ValueError(f"field {column!r} must be text or a number, not {type(value).__name__}")
        text = "" if value is None else str(value).strip()
        if not text:
            raise ValueError(f"field {column!r} holds no {part}: fill it or delete the line")
        found.append(text)
    return tuple(found)


def load_problems(source: str) -> list[Problem]:
    """Problems of a JSONL file, a dataset on the Hugging Face hub, or a folder in the same form.

    A dataset is named `id`, `id:config` or `id:config:split` (config may be empty): `openai/gsm8k:main:test`,
    `HuggingFaceH4/MATH-500`. The split may be left out where there is only one: guessing is how a test set gets
    trained on. Raises ValueError with one line that names file, line, field and remedy.
    """
    if source.endswith((".jsonl", ".json")) or os.path.isfile(source):
        rows = read_jsonl(source)
    else:
        rows = ((f"{source}, row {i}", row) for i, row in enumerate(read_dataset(source)))
    problems = {}
    for where, row in rows:
        try:
            problem, answer = to_problem(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # DAPO-Math-17k holds each problem about 100 times over; elsewhere a repeat is kept, a benchmark counts it.
        key = (problem, answer) if "reward_model" in row else where
        problems.setdefault(key, Problem(problem, answer, str(row.get("source", where))))
    if not problems:
        raise ValueError(f"{source}: no problems in it; each line must be a JSON object with problem and answer")
    return list(problems.values())


def read_jsonl(path: str):
    """Yield (where, row) for each line that is not blank."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give a JSONL file or a dataset on the hub as id:config:split")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); write one object a line") from None
            if not isinstance(row, (dict, type(None))):
                raise ValueError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
            if row is not None:
                yield where, row


def read_dataset(source: str):
    """The rows of `id[:config[:split]]`, from the hub or from a folder."""
    from datasets import load_dataset  # 1 s to import, and a JSONL file needs none of it

    name, config, split, *_ = *source.split(":"), "", ""
    try:
        splits = load_dataset(name, config or None)
    except Exception as error:  # offline, no such id, no such config: datasets has no one class for them
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: not a file, nor a dataset that loads ({type(error).__name__}: {reason})") from None
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(f"{source}: name one of the splits {list(splits)}, as {name}:{config}:{next(iter(splits))}")
    return splits[split]


# ---------------------------------------------------------------------------------------------------- prompts

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def solution_prompt(problem: str) -> str:
    """Stage 1's user turn. Instruction after the problem, no system prompt: R1-Distill's protocol."""
    return f"{problem}\n{INSTRUCTION}"


def render(tokenizer, user_text: str) -> list[int]:
    """One user turn -> prompt ids, ready for the response. The template writes its own BOS, so none is added to it."""
    if tokenizer.chat_template is None:
        return tokenizer(user_text + "\n").input_ids
    turn = [{"role": "user", "content": user_text}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def fits(prompt: list[int], max_new_tokens: int, max_context: int) -> bool:
    return len(prompt) + max_new_tokens <= max_context


def decode(tokenizer, prompt: list[int], token_ids: list[int]) -> str:
    """A response's text. R1-Distill's template ends the prompt with `<think>`, which the text gets back in front."""
    thinking = tokenizer.decode(prompt[-12:]).rstrip().endswith("<think>")
    return "<think>\n" * thinking + tokenizer.decode(token_ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------- randomness


def sample_seed(run_seed: int, step: int, question: int, sample: int) -> int:
    """The seed of one sample, in [0, 2**63): a pure function of its place in the run, never of rank or batch. A hash,
    not a sum: run_seed + step would give run 1's step 0 the samples of run 0's step 1."""
    digest = hashlib.blake2b(f"{run_seed},{step},{question},{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seeds: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """splitmix64(seed, index) -> [0, 1) in float64, elementwise on int64 tensors, which wrap as the hash wants.

    Counter-based: token t of a sample needs no state, so no generator object per sample has to follow it around.
    """

    def xorshift(z, k):  # z ^ (z >>> k): torch's >> carries the sign in, a logical shift does not
        return z ^ ((z >> k) & ((1 << (64 - k)) - 1))

    z = seeds + (index + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed integer, and so on
    z = xorshift(z, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = xorshift(z, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return ((xorshift(z, 31) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw(logits, uniform, *, temperature: float, top_p: float, vocabulary: int):
    """One id per row by inverse CDF. [R, V] logits, [R] uniforms -> [R] ids, [R] log-probabilities (float32).

    mu = softmax(logits / T) over the tokenizer's ids: an embedding padded beyond them has rows that mean nothing
    (vLLM can't sample them either, see VLLMEngine). The trainer's softmax runs over all rows, so padding shows as
    log pi - log mu = log(1 - padding's mass): a trained model leaves it next to none. T = 0 takes the likeliest id,
    and reports log-probabilities at T = 1, as vLLM does.
    """
    logits = logits.float() / (temperature or 1.0)  # a copy, unless T is 1: never change what the model returned
    logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= vocabulary, float("-inf"))
    if top_p < 1:  # the smallest set of likeliest ids that holds top_p; for evaluation, it would bias Eq. 3
        ordered, ids = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) >= top_p
        logits = logits.scatter(-1, ids, ordered.masked_fill(beyond, float("-inf")))
    top, likeliest = logits.max(-1, keepdim=True)
    weight = (logits - top).exp_()
    mass = weight.cumsum(-1, dtype=torch.float64)  # float32 would lose the tail of 150,000 ids
    ids = likeliest
    if temperature > 0:
        ids = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        # A parallel sum need not be monotone to the last bit: where rounding hit an id of no weight, take the likeliest.
        ids = torch.where(weight.gather(-1, ids) > 0, ids, likeliest)
    logprobs = logits.gather(-1, ids) - top - mass[:, -1:].log().float()
    return ids[:, 0], logprobs[:, 0]


# ---------------------------------------------------------------------------------------------------- Transformers


def grouped_decode(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one new token a row, without copying keys and values for each query head.

    With one query token, the G heads that share a key head can be handed over as G query positions: [R, KG, 1, D] ->
    [R, K, G, D] costs nothing, where Transformers' sdpa repeats the whole cache G times as soon as there is a mask.
    """
    rows, heads, _, size = query.shape
    query = query.reshape(rows, key.shape[1], -1, size)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_decode", grouped_decode)


class Slots(Cache):
    """Keys, values and counters of the rows in flight. Row r is left-aligned: it holds tokens in columns [0, length[r]).

    Left-aligned, so that rows of any age share a batch: the last row moves into a finished one's place (one row is
    copied, not the cache) and new rows go behind. Preallocated: DynamicCache copies all of itself at every token.
    """

    def __init__(self, rows: int, columns: int, device):
        super().__init__(layers=[])  # given positions and a 4-D mask, a model calls nothing of it but `update`
        self.live, self.columns, self.most_columns = 0, 0, columns
        self.keys, self.values = [], []  # one [rows, K, columns, D] per layer
        self.counters = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.last, self.length, self.drawn, self.seed = self.counters  # views: id to feed, tokens held, tokens drawn
        self.row = torch.arange(rows, device=device)
        self.column = torch.arange(columns, device=device)

    def admit(self, prompts: list[list[int]], seeds: list[list[int]], cache) -> None:
        """One row for each seed of each prompt; `cache` is the prefill's, its rows right-padded."""
        counts = [len(s) for s in seeds]
        rows = slice(self.live, self.live + sum(counts))
        source = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(self.row.device)
        width = max(map(len, prompts))
        if not self.keys:
            for layer in cache.layers:
                self.keys.append(layer.keys.new_zeros(0, *layer.keys.shape[1:]))
                self.values.append(layer.values.new_zeros(0, *layer.values.shape[1:]))
        self.reserve(width)
        for keys, values, layer in zip(self.keys, self.values, cache.layers):
            keys[rows, :, :width], values[rows, :, :width] = layer.keys[source], layer.values[source]
        # The prompt's last token is fed once more, so that its logits come from the same step as all others.
        of_prompt = torch.tensor([[p[-1], len(p) - 1, 0] for p in prompts], device=self.row.device)
        self.counters[:3, rows] = of_prompt[source].T
        self.counters[3, rows] = torch.tensor([x for s in seeds for x in s], device=self.row.device)
        self.live = rows.stop

    def reserve(self, columns: int) -> None:
        """Grow to hold `columns`, by doubling. With zeros, not empty memory: a masked column still meets 0 * NaN."""
        if columns <= self.columns:
            return
        self.columns = min(max(columns, 2 * self.columns), self.most_columns)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros(len(self.row), old.shape[1], self.columns, old.shape[3])
                tensors[i][: self.live, :, : old.shape[2]] = old[: self.live]

    def step(self, width: int) -> dict:
        """The model's arguments for one token of every row; `width` is the longest row's length with it."""
        self.reserve(width)
        self.width, length = width, self.length[: self.live]
        self.new = (self.row[: self.live], slice(None), length)
        mask = (self.column[:width] <= length[:, None])[:, None, None]  # [R, 1, 1, width]
        return dict(input_ids=self.last[: self.live, None], position_ids=length[:, None], attention_mask=mask)

    def update(self, key, value, layer: int, *_, **__):
        """Called by each attention layer with the new token's [R, K, 1, D]; returns all that it is to attend to."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.new], values[self.new] = key[:, :, 0], value[:, :, 0]
        return keys[: self.live, :, : self.width], values[: self.live, :, : self.width]

    def drop(self, rows: list[int]) -> list[tuple[int, int]]:
        """Free these rows; returns the (from, to) moves of the rows that took their places."""
        self.live -= len(rows)
        gone = set(rows)
        movers = [r for r in range(self.live, self.live + len(rows)) if r not in gone]
        holes = [r for r in rows if r < self.live]
        if movers:
            old, new = torch.tensor([movers, holes], device=self.row.device)
            for tensor in (*self.keys, *self.values):
                tensor[new, :, : self.width] = tensor[old, :, : self.width]
            self.counters[:, new] = self.counters[:, old]
        return list(zip(movers, holes))


@contextlib.contextmanager
def attention(model, name: str):
    before, model.config._attn_implementation = model.config._attn_implementation, name
    try:
        yield
    finally:
        model.config._attn_implementation = before


class TransformersEngine:
    """Samples from the live model itself, with continuous batching: nothing to push, nothing to put to sleep."""

    name = "transformers"
    prefill_tokens = 16_384  # prompts go through the model in batches of at most so many tokens [ours]

    def __init__(self, model, tokenizer, *, max_context=None, memory_share=0.3, max_batch=512):
        config = model.config
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or not getattr(
            model, "_supports_attention_backend", False
        ):
            raise ValueError(f"the Transformers engine has no cache for {type(model).__name__}: full attention only; use vLLM")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.max_context = max_context or config.max_position_embeddings
        self.stop = stop_ids(model, tokenizer)
        heads = config.num_key_value_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        token_bytes = 2 * config.num_hidden_layers * heads * model.dtype.itemsize
        if model.device.type == "cuda":
            memory = torch.cuda.get_device_properties(model.device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.cache_tokens = int(memory_share * memory) // token_bytes

    def update_weights(self, model) -> None:
        self.model = model

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    @torch.no_grad()  # not inference_mode: a tensor the model keeps (a rotary table, say) could not be trained with
    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, progress=None):
        """n samples of each prompt. The rows in flight are at most `max_batch`, and as many as the memory share holds at
        full length; a place that falls free goes to the next prompt, so that a long row holds up nobody."""
        model, longest = self.model, max(map(len, prompts), default=0) + max_new_tokens
        capacity = max(1, min(self.max_batch, self.cache_tokens // longest, len(prompts) * n))
        samples = [[Sample([], [], "", False) for _ in range(n)] for _ in prompts]
        pieces = [(b, range(i, min(i + capacity, n))) for b in range(len(prompts)) for i in range(0, n, capacity)]
        pieces.sort(key=lambda piece: -len(prompts[piece[0]]))  # neighbours are padded to one length
        slots, live = Slots(capacity, longest, model.device), []  # live[r]: the (prompt, sample) in row r
        was_training = model.training
        model.eval()  # also what lets a model with gradient checkpointing use its cache
        try:
            while pieces or live:
                # Refill when an eighth is free: one prompt at a time would be many small prefills.
                while pieces and (not live or capacity - len(live) >= max(len(pieces[0][1]), capacity // 8)):
                    batch = self.next_batch(pieces, prompts, capacity - len(live))
                    self.prefill(slots, [prompts[b] for b, _ in batch], [[seeds[b][i] for i in of] for b, of in batch])
                    live += [(b, i) for b, of in batch for i in of]
                width = max(len(prompts[b]) + len(samples[b][i].token_ids) for b, i in live)
                with attention(model, "grouped_decode"):
                    logits = model(**slots.step(width), past_key_values=slots, use_cache=True).logits[:, -1]
                last, length, drawn, seed = slots.counters[:, : slots.live]
                ids, logprobs = draw(
                    logits, uniforms(seed, drawn), temperature=temperature, top_p=top_p, vocabulary=len(self.tokenizer)
                )
                last.copy_(ids), length.add_(1), drawn.add_(1)
                done = []
                for row, ((b, i), token, logprob) in enumerate(zip(live, ids.tolist(), logprobs.tolist())):
                    sample = samples[b][i]
                    sample.token_ids.append(token)
                    sample.logprobs.append(logprob)
                    sample.finished = token in self.stop
                    if sample.finished or len(sample.token_ids) == max_new_tokens:
                        sample.text = decode(self.tokenizer, prompts[b], sample.token_ids)
                        done.append(row)
                if done:
                    for old, new in slots.drop(done):
                        live[new] = live[old]
                    del live[slots.live :]
                    if progress:
                        progress(len(done))
        finally:
            model.train(was_training)
        return samples

    def next_batch(self, pieces: list, prompts: list, free: int) -> list:
        """Take from the front of `pieces` what fits into `free` rows and one prefill."""
        batch = []
        while pieces and len(pieces[0][1]) <= free:
            width = len(prompts[(batch or pieces)[0][0]])
            if batch and width * (len(batch) + 1) > self.prefill_tokens:
                break
            free -= len(pieces[0][1])
            batch.append(pieces.pop(0))
        return batch

    def prefill(self, slots: Slots, prompts: list, seeds: list) -> None:
        """Each prompt once, right-padded: causal attention keeps the padding from the tokens before it, without a mask.
        The language head is not run."""
        width = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=slots.row.device)
        slots.admit(prompts, seeds, self.model.base_model(input_ids=ids, use_cache=True).past_key_values)


def stop_ids(model, tokenizer) -> set[int]:
    """The ids that end a response: the generation config's (a number or a list) and the tokenizer's."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return {i for i in (*of_model, tokenizer.eos_token_id) if i is not None}


# ---------------------------------------------------------------------------------------------------- vLLM


class VLLMEngine:
    """vLLM 0.32.0 in the trainer's process, one engine per rank on the rank's own device. All of vLLM is in here.

    Build it on all ranks together, after torch.distributed, and keep it until exit: deleting it destroys the trainer's
    process group. Its construction reseeds torch, numpy and random. Lines marked CUDA were only read in vLLM's source.
    """

    name = "vllm"

    def __init__(self, model, tokenizer, *, model_path, seed=0, max_context=None, memory_share=0.3, **options):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the engine moves to a process of its own
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams

        self.tokenizer, self.parameters = tokenizer, SamplingParams
        self.max_context = max_context or model.config.max_position_embeddings
        self.stop = sorted(stop_ids(model, tokenizer))
        # An embedding padded beyond the tokenizer: those ids must not be sampled. -100 is the strongest bias vLLM takes,
        # and leaves them e^-100; `allowed_token_ids` would be checked id by id, 150,000 of them, for each request.
        self.forbidden = {i: -100.0 for i in range(len(tokenizer), model.config.vocab_size)}
        self.cuda = model.device.type == "cuda"
        settings = dict(
            skip_tokenizer_init=True,
            # The plain backend would put every rank on cuda:0; this one takes torchrun's LOCAL_RANK.
            distributed_executor_backend="external_launcher" if torch.distributed.is_initialized() else "uni",
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=self.max_context,
            gpu_memory_utilization=memory_share,
            logprobs_mode="processed_logprobs",  # after the temperature; the default is before
            enable_sleep_mode=self.cuda,
            seed=seed,
        )
        if not self.cuda:  # for tests: the CPU sampler fails when a seeded request's prefill is cut in chunks
            settings |= dict(enforce_eager=True, enable_chunked_prefill=False, kv_cache_memory_bytes=1 << 28)
            settings |= dict(max_num_batched_tokens=max(8192, self.max_context))
        self.llm = LLM(model_path, **settings | options)
        self.asleep, self.fresh = False, True  # fresh: it has the weights of the checkpoint, or of the last push

    def wake(self) -> None:
        """CUDA: memory for the weights only, whose content is lost; `update_weights` fills it and wakes the rest."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])

    def update_weights(self, model) -> None:
        # state_dict, not named_parameters: that leaves out a tied lm_head, of which vLLM may hold a copy.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # CUDA: after the push, so that the two need not be held at once
        self.llm.reset_prefix_cache()  # keys and values of the old weights
        self.asleep, self.fresh = False, True

    def sleep(self) -> None:
        """CUDA: level 2 gives back keys, values and weights, which the next push brings anew. On CPU there is none."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep, self.fresh = True, False

    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, progress=None):
        """As TransformersEngine.generate. A request a sample, so that each has its own seed; the prefix cache lets the
        n of a prompt share its prefill."""
        if not self.fresh:
            raise RuntimeError("vLLM engine: generate() after sleep() needs wake() and update_weights() first")
        how = dict(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, stop_token_ids=self.stop)
        how |= dict(logprobs=0, flat_logprobs=True, detokenize=False, logit_bias=self.forbidden or None)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(n)]
        outputs = []
        try:
            self.llm.enqueue(requests, [self.parameters(seed=x, **how) for of in seeds for x in of], use_tqdm=False)
            while self.llm.llm_engine.has_unfinished_requests():
                done = [output for output in self.llm.llm_engine.step() if output.finished]
                outputs += done
                if progress and done:
                    progress(len(done))
        except Exception as error:  # vLLM's own errors come with pages of context; the first line names them
            reason = next(iter(str(error).splitlines()), "")
            raise RuntimeError(f"vLLM engine: {type(error).__name__}: {reason}") from error
        outputs.sort(key=lambda output: int(output.request_id))  # a counter: the order they were given in
        samples = []
        for request, (out,) in zip(requests, (output.outputs for output in outputs)):
            ids, logprobs = list(out.token_ids), list(out.logprobs.logprobs)
            text = decode(self.tokenizer, request["prompt_token_ids"], ids)
            samples.append(Sample(ids, logprobs, text, finished=out.finish_reason == "stop"))
        return [samples[b : b + n] for b in range(0, len(samples), n)]


def make_engine(kind: str, model, tokenizer, *, model_path: str, **options):
    """`auto`: vLLM if it is installed and there is a GPU. `model` is the live Hugging Face model; options are seed,
    max_context (longest prompt + response; default: the model's), memory_share (of the device's memory), and others
    that the engine of that kind takes: max_batch, or any argument of vllm.LLM."""
    if kind == "auto":
        kind = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        return VLLMEngine(model, tokenizer, model_path=model_path, **options)
    options.pop("seed", None)  # nothing here is random but by the seeds given to generate()
    return TransformersEngine(model, tokenizer, **options)


# ---------------------------------------------------------------------------------------------------- self-test


@torch.no_grad()
def disagreement(model, prompts, groups, temperature: float) -> tuple[float, float, float]:
    """Mean and max |log pi - log mu| over the sampled tokens, pi by a plain forward of `model`, and the share of tokens
    that are pi's likeliest."""
    gaps, likeliest = [], []
    for prompt, group in zip(prompts, groups):
        for sample in group:
            ids = torch.tensor([prompt + sample.token_ids], device=model.device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature  # [T, V]
            sampled = ids[0, len(prompt) :, None]
            logprobs = logits.log_softmax(-1).gather(-1, sampled)[:, 0]
            gaps.append((logprobs - torch.tensor(sample.logprobs, device=model.device)).abs())
            likeliest.append((logits.argmax(-1) == sampled[:, 0]).double())
    gaps = torch.cat(gaps)
    return gaps.mean().item(), gaps.max().item(), torch.cat(likeliest).mean().item()


@torch.no_grad()
def perturb(model, seed: int, size: float = 0.05) -> None:
    """Noise of 5 % on every weight: enough that stale weights show, whatever the model."""
    noise = torch.Generator(device=model.device).manual_seed(seed)
    for weight in model.parameters():
        scale = size * weight.float().square().mean().sqrt()
        weight += torch.randn(weight.shape, generator=noise, device=weight.device) * scale


def selftest(model_path: str, kind: str, **options) -> bool:
    """Is what the engine samples what the trainer's weights say? Loads a model, changes its weights again and again,
    pushes them or not, and compares log-probabilities (at T = 0.7) and greedy tokens. A minute on a GPU.

    Limits [ours]: float32 agrees to 1e-3; bfloat16 engines differ from any other code by about 0.02 on average.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
    engine = make_engine(kind, model, tokenizer, model_path=model_path, max_context=512, **options)
    mean_limit, max_limit, greedy_limit = (1e-4, 1e-3, 1.0) if dtype == torch.float32 else (0.05, 1.0, 0.95)
    prompts = [render(tokenizer, solution_prompt(f"What is {a} + {7 * a}?")) for a in range(101, 109)]
    passed = True

    def row(label, stale=False):
        nonlocal passed
        seeds = [[sample_seed(0, 0, b, i) for i in range(4)] for b in range(len(prompts))]
        groups = engine.generate(prompts, 4, temperature=0.7, max_new_tokens=64, seeds=seeds)
        greedy = engine.generate(prompts, 1, temperature=0.0, max_new_tokens=64, seeds=seeds_of_one)
        mean, most, _ = disagreement(model, prompts, groups, 0.7)
        *_, same = disagreement(model, prompts, greedy, 1.0)
        good = mean > mean_limit if stale else mean <= mean_limit and most <= max_limit and same >= greedy_limit
        passed &= good
        print(f"{label:38}{mean:12.2e}{most:12.2e}{same:12.2%}   {'ok' if good else 'FAILED'}", flush=True)

    def push(times):
        for seed in range(times):
            perturb(model, seed)
            engine.sleep()
            engine.wake()
            engine.update_weights(model)

    seeds_of_one = [[0]] * len(prompts)
    print(f"{engine.name} engine, {str(dtype)[6:]} on {device}\n{'|log pi - log mu|':38}{'mean':>12}{'max':>12}{'greedy':>12}")
    row("weights as loaded")
    perturb(model, 99)
    if engine.name == "vllm":
        row("weights changed, not pushed (must differ)", stale=True)
    push(1)
    row("after a push")
    push(10)
    row("after ten more")
    print("PASS: engine and trainer agree" if passed else "FAIL: do not train with this engine on this machine")
    return passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=selftest.__doc__)
    parser.add_argument("--selftest", metavar="MODEL", required=True, help="a checkpoint's folder or its id on the hub")
    parser.add_argument("--rollout", default="auto", choices=["auto", "vllm", "transformers"])
    parser.add_argument("--memory_share", type=float, default=0.3, help="share of the GPU's memory that vLLM may use")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
    sys.exit(not selftest(arguments.selftest, arguments.rollout, memory_share=arguments.memory_share))
