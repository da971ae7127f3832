"""Problems -> prompts -> sampled responses, by one of two engines with one interface.

    engine = make_engine("auto", model, tokenizer, model_path=path)  # vLLM where there is a GPU for it
    engine.wake()                                                    # before each rollout
    engine.update_weights(model)
    groups = engine.generate(prompts, n, temperature=1.0, max_new_tokens=1024, seeds=seeds)
    engine.sleep()                                                   # before the update

Both give the trainer the sampled ids themselves (decoding and encoding again would not return them), log mu of each
under the distribution that it was drawn from, and whether the response ended by itself.

TransformersEngine runs anywhere and is reproducible: each sample has a private random stream, so it is the same in
any batch, on any rank. VLLMEngine is the fast one on a GPU. Is it right on yours? In a minute,

    python rollout.py --selftest MODEL        # with torchrun in front, as for training

compares the engine's log-probabilities with the trainer's before and after weights are pushed.
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

from reward import final_answer  # a gold answer is cut out of its solution by the rule that responses are graded by

# -------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    source: str  # the file and line, or what the row itself says


def from_chat(messages) -> str:
    """DAPO-Math-17k: a chat, and the problem in it inside an instruction that contradicts ours."""
    text = messages if isinstance(messages, str) else messages[-1]["content"]
    wrapping = r"Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your answer.*"
    match = re.fullmatch(wrapping, text, re.DOTALL)
    return match[1] if match else text


# Column -> how to read it; the first column that a row has counts. They cover AIME-2024 (Maxwell-Jia,
# HuggingFaceH4, math-ai), AMC (AI-MO, math-ai), MATH-500, OlympiadBench (Hothan, math-ai), GSM8K, MATH-lighteval,
# DAPO-Math-17k and its -Processed, DeepScaleR.
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
            names = " or ".join(map(repr, readers))
            raise ValueError(f"no {part}: give it a field {names}; there are {list(row)}")
        try:
            value = readers[column](row[column])
        except (LookupError, TypeError):
            raise ValueError(f"field {column!r} has not the usual form: give text in a field {part!r}") from None
        if isinstance(value, (bool, dict, list)):
            raise ValueError(f"field {column!r} must be text or a number, not {type(value).__name__}")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # AMC's 142.0
        text = "" if value is None else str(value).strip()
        if not text:
            raise ValueError(f"field {column!r} holds no {part}: fill it or delete the line")
        found.append(text)
    return tuple(found)


def load_problems(source: str) -> list[Problem]:
    """Problems of a JSONL file, of a dataset on the Hugging Face hub, or of a folder in a dataset's form.

    A dataset is named `id`, `id:config` or `id:config:split` (the config may be empty): `openai/gsm8k:main:test`,
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
        # DAPO-Math-17k holds each problem about 100 times. Elsewhere a repeat stays: a benchmark counts it.
        key = (problem, answer) if "reward_model" in row else where
        problems.setdefault(key, Problem(problem, answer, str(row.get("source", where))))
    if not problems:
        raise ValueError(f"{source}: no problems in it; give a JSON object with problem and answer on each line")
    return list(problems.values())


def read_jsonl(path: str):
    """Yield (where, row) for each line that is not blank."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give a JSONL file, or a dataset on the hub as id:config:split")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); write one object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
            yield where, row


def read_dataset(source: str):
    """The rows of `id[:config[:split]]`."""
    from datasets import load_dataset  # here, because a JSONL file needs none of what it imports

    name, config, split, *_ = *source.split(":"), "", ""
    try:
        splits = load_dataset(name, config or None)
    except Exception as error:  # offline, no such id, no such config: datasets has no one class for them
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{source}: not a file, nor a dataset that loads ({reason})") from None
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        example = f"{name}:{config}:{next(iter(splits))}"
        raise ValueError(f"{source}: name one of the splits {list(splits)}, for example {example}")
    return splits[split]


# --------------------------------------------------------------------------------------------------- prompts

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def solution_prompt(problem: str) -> str:
    """Stage 1's user turn: R1-Distill's protocol, which has no system prompt."""
    return f"{problem}\n{INSTRUCTION}"


def render(tokenizer, user_text: str) -> list[int]:
    """One user turn -> prompt ids, up to where the response begins. A template writes its own BOS: none is added."""
    if tokenizer.chat_template is None:
        return tokenizer(user_text + "\n").input_ids
    turn = [{"role": "user", "content": user_text}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def fits(prompt: list[int], max_new_tokens: int, max_context: int) -> bool:
    return len(prompt) + max_new_tokens <= max_context


@dataclass
class Sample:
    token_ids: list[int]  # as sampled; the end-of-sequence id is the last one iff `finished`
    logprobs: list[float]  # log mu of each, at the sampling temperature
    text: str  # without special tokens; begins with `<think>` if the prompt ended with it
    finished: bool  # False: cut off at max_new_tokens


def to_text(tokenizer, prompt: list[int], token_ids: list[int]) -> str:
    """R1-Distill's template ends the prompt with `<think>`, which graders and readers miss: it is put back in front."""
    prefilled = tokenizer.decode(prompt[-12:]).rstrip().endswith("<think>")
    return "<think>\n" * prefilled + tokenizer.decode(token_ids, skip_special_tokens=True)


def stop_ids(model, tokenizer) -> set[int]:
    """The ids that end a response: the generation config's (a number or a list) and the tokenizer's."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return {i for i in (*of_model, tokenizer.eos_token_id) if i is not None}


# ------------------------------------------------------------------------------------------------ randomness


def sample_seed(run_seed: int, step: int, question: int, sample: int) -> int:
    """In [0, 2**63): a pure function of the sample's place in the run, never of rank or batch. `question` is its number
    in an evaluation, and its place among the step's questions in training.

    A hash, not a sum: with run_seed + step, run 1 would begin with the samples of run 0's second step.
    """
    digest = hashlib.blake2b(f"{run_seed},{step},{question},{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seeds: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """splitmix64 of (seed, index), elementwise on int64 tensors -> float64 in [0, 1).

    Counter-based: the number for token t of a sample needs no state, so no generator follows a row around.
    """

    def xorshift(z, k):  # z ^ (z >>> k): torch's >> would carry the sign in
        return z ^ ((z >> k) & ((1 << (64 - k)) - 1))

    z = seeds + (index + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64; products wrap, as they should
    z = xorshift(z, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = xorshift(z, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return ((xorshift(z, 31) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw(logits, uniform, *, temperature: float, top_p: float, vocabulary: int):
    """One id a row by inverse CDF: [R,V] logits and [R] uniforms -> [R] ids and [R] log mu (float32).

    mu = softmax(logits / T) over the tokenizer's `vocabulary` ids. An embedding padded beyond them has rows that mean
    nothing; the trainer's softmax runs over those too, so that log pi - log mu = log(1 - their mass): next to nothing
    in a trained model, and visible in the alarm where it is not. T = 0 takes the likeliest id, log mu is then at T = 1:
    both as in vLLM.
    """
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= vocabulary
    logits = (logits.float() / (temperature or 1.0)).masked_fill(beyond, float("-inf"))
    if top_p < 1:  # the smallest set of likeliest ids that holds top_p; for evaluation, it would bias Eq. 3
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(-1, ids, ordered.masked_fill(before >= top_p, float("-inf")))
    top, likeliest = logits.max(-1, keepdim=True)
    weight = (logits - top).exp()
    mass = weight.cumsum(-1, dtype=torch.float64)  # float32 would lose the tail of 150,000 ids
    ids = likeliest
    if temperature > 0:
        ids = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        # A parallel sum need not be monotone to the last bit: an id of no weight must not come of it.
        ids = torch.where(weight.gather(-1, ids) > 0, ids, likeliest)
    logprobs = logits.gather(-1, ids) - top - mass[:, -1:].log().float()
    return ids[:, 0], logprobs[:, 0]


# ---------------------------------------------------------------------------------------------- Transformers


def grouped_decode(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one new token a row that leaves the cache where it is: [R,KG,1,D] queries, [R,K,C,D] keys.

    The G query heads that share a key head are handed over as G query positions. Transformers' own sdpa repeats
    the cache G times as soon as there is a mask, at every token.
    """
    rows, heads, _, size = query.shape
    query = query.reshape(rows, key.shape[1], -1, size)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_decode", grouped_decode)


@contextlib.contextmanager
def attention(model, name: str):
    before, model.config._attn_implementation = model.config._attn_implementation, name
    try:
        yield
    finally:
        model.config._attn_implementation = before


class Slots(Cache):
    """Keys, values and counters of the rows in flight: row r's tokens are in columns [0, length[r]).

    Left-aligned, so that rows of any age share a batch: the last row moves into a finished one's place (one row is
    copied, not the cache), new rows go behind. Preallocated: DynamicCache copies all of itself at every token.
    """

    def __init__(self, rows: int, columns: int, device):
        super().__init__(layers=[])  # a model that gets positions and a 4-D mask calls only `update`
        self.live, self.columns, self.most_columns = 0, 0, columns
        self.keys, self.values = [], []  # one [rows,K,columns,D] a layer
        self.counters = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.last, self.length, self.drawn, self.seed = self.counters  # views; last: the id to feed, not yet held
        self.row = torch.arange(rows, device=device)
        self.column = torch.arange(columns, device=device)

    def admit(self, prompts: list[list[int]], seeds: list[list[int]], cache) -> None:
        """A row for each seed of each prompt; `cache` is the prefill's, a row for each prompt, right-padded."""
        device, width, counts = self.row.device, max(map(len, prompts)), [len(s) for s in seeds]
        rows = slice(self.live, self.live + sum(counts))
        of_prompt = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(device)
        for layer in cache.layers[len(self.keys) :]:  # the first time
            self.keys.append(layer.keys.new_empty(0, layer.keys.shape[1], 0, layer.keys.shape[3]))
            self.values.append(layer.values.new_empty(0, layer.values.shape[1], 0, layer.values.shape[3]))
        self.reserve(width)
        for keys, values, layer in zip(self.keys, self.values, cache.layers):
            keys[rows, :, :width], values[rows, :, :width] = layer.keys[of_prompt], layer.values[of_prompt]
        # The prompt's last token is fed once more: its logits then come of the same step as all others.
        self.counters[:3, rows] = torch.tensor([[p[-1], len(p) - 1, 0] for p in prompts], device=device)[of_prompt].T
        self.seed[rows] = torch.tensor([x for s in seeds for x in s], device=device)
        self.live = rows.stop

    def reserve(self, columns: int) -> None:
        """Grow by doubling. Zeros, not empty memory: a masked column still enters the sum, as 0 times what is there."""
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
        mask = (self.column[:width] <= length[:, None])[:, None, None]  # [R,1,1,width]
        return dict(input_ids=self.last[: self.live, None], position_ids=length[:, None], attention_mask=mask)

    def update(self, key, value, layer: int, *_, **__):
        """Called by each attention layer with the new tokens' [R,K,1,D]; returns all that they may attend to."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.new], values[self.new] = key[:, :, 0], value[:, :, 0]
        return keys[: self.live, :, : self.width], values[: self.live, :, : self.width]

    def drop(self, rows: list[int]) -> list[tuple[int, int]]:
        """Free these rows; returns (from, to) of each row that moved into a freed place."""
        self.live -= len(rows)
        moved = [r for r in range(self.live, self.live + len(rows)) if r not in rows]
        freed = [r for r in rows if r < self.live]
        if moved:
            old, new = torch.tensor([moved, freed], device=self.row.device)
            for tensor in (*self.keys, *self.values):
                tensor[new, :, : self.width] = tensor[old, :, : self.width]
            self.counters[:, new] = self.counters[:, old]
        return list(zip(moved, freed))


class TransformersEngine:
    """Samples from the live model itself, with continuous batching: nothing to push, nothing to put to sleep."""

    name = "transformers"
    prefill_tokens = 16_384  # prompts go through the model in batches of at most so many [ours]

    def __init__(self, model, tokenizer, *, max_context=None, memory_share=0.3, max_batch=512):
        config = model.config
        full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        if not (full and model._supports_attention_backend):
            raise ValueError(f"the Transformers engine knows full attention only, not {type(model).__name__}: use vLLM")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.max_context = max_context or config.max_position_embeddings
        self.stop = stop_ids(model, tokenizer)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * model.dtype.itemsize
        if model.device.type == "cuda":
            memory = torch.cuda.get_device_properties(model.device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.cache_tokens = int(memory_share * memory) // token_bytes

    def update_weights(self, model) -> None:
        self.model = model

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    @torch.no_grad()  # not inference_mode: what the model keeps of it, a rotary table say, could not be trained with
    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, progress=None):
        """n samples of each prompt, in order; seeds[b][i] is sample i of prompt b's.

        In flight are at most `max_batch` rows, and no more than the memory share would hold at full length. A place
        that falls free goes to the next prompt, so that a long row holds up nobody.
        """
        longest = max(map(len, prompts), default=0) + max_new_tokens
        capacity = max(1, min(self.max_batch, self.cache_tokens // longest, len(prompts) * n))
        samples = [[Sample([], [], "", False) for _ in range(n)] for _ in prompts]
        groups = [(b, range(i, min(i + capacity, n))) for b in range(len(prompts)) for i in range(0, n, capacity)]
        groups.sort(key=lambda group: -len(prompts[group[0]]))  # neighbours are padded to one length
        slots, live = Slots(capacity, longest, self.model.device), []  # live[r]: the (prompt, sample) of row r
        was_training = self.model.training
        self.model.eval()  # which is also what lets a model with gradient checkpointing use a cache
        try:
            while groups or live:
                # Refill once an eighth is free [ours]: one prompt at a time would be many small prefills.
                while groups and (not live or capacity - len(live) >= max(len(groups[0][1]), capacity // 8)):
                    live += self.prefill(slots, self.next_batch(groups, prompts, capacity - len(live)), prompts, seeds)
                width = max(len(prompts[b]) + len(samples[b][i].token_ids) for b, i in live)
                with attention(self.model, "grouped_decode"):
                    logits = self.model(**slots.step(width), past_key_values=slots, use_cache=True).logits[:, -1]
                last, length, drawn, seed = slots.counters[:, : slots.live]
                how = dict(temperature=temperature, top_p=top_p, vocabulary=len(self.tokenizer))
                ids, logprobs = draw(logits, uniforms(seed, drawn), **how)
                last.copy_(ids), length.add_(1), drawn.add_(1)
                done = []
                for row, ((b, i), token, logprob) in enumerate(zip(live, ids.tolist(), logprobs.tolist())):
                    sample = samples[b][i]
                    sample.token_ids.append(token)
                    sample.logprobs.append(logprob)
                    sample.finished = token in self.stop
                    if sample.finished or len(sample.token_ids) == max_new_tokens:
                        sample.text = to_text(self.tokenizer, prompts[b], sample.token_ids)
                        done.append(row)
                for old, new in slots.drop(done):
                    live[new] = live[old]
                del live[slots.live :]
                if progress and done:
                    progress(len(done))
        finally:
            self.model.train(was_training)
        return samples

    def next_batch(self, groups: list, prompts: list, free: int) -> list:
        """Take from the front of `groups` what fits into `free` rows and one prefill."""
        batch, width = [], len(prompts[groups[0][0]])
        while groups and len(groups[0][1]) <= free and (not batch or width * (len(batch) + 1) <= self.prefill_tokens):
            free -= len(groups[0][1])
            batch.append(groups.pop(0))
        return batch

    def prefill(self, slots: Slots, batch: list, prompts: list, seeds: list) -> list[tuple[int, int]]:
        """Run each prompt once, without the language head, and admit its samples; returns their (prompt, sample).

        Padded on the right, where causal attention keeps it from the tokens before: no mask.
        """
        given = [prompts[b] for b, _ in batch]
        width = max(map(len, given))
        ids = torch.tensor([p + [0] * (width - len(p)) for p in given], device=self.model.device)
        cache = self.model.base_model(input_ids=ids, use_cache=True).past_key_values
        slots.admit(given, [[seeds[b][i] for i in of] for b, of in batch], cache)
        return [(b, i) for b, of in batch for i in of]


# ------------------------------------------------------------------------------------------------------ vLLM


class VLLMEngine:
    """vLLM 0.32.0 in the trainer's process, one engine a rank on the rank's own device; all of vLLM is in here.

    Build it on all ranks together, after torch.distributed, and keep it until exit: deleting it destroys the trainer's
    process group. Building it reseeds torch, numpy and random. What happens on a GPU alone is marked CUDA: it was
    written from vLLM's source and not run; --selftest checks it.
    """

    name = "vllm"

    def __init__(self, model, tokenizer, *, model_path, seed=0, max_context=None, memory_share=0.3, **options):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the engine gets a process of its own
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams

        self.tokenizer, self.parameters = tokenizer, SamplingParams
        self.max_context = max_context or model.config.max_position_embeddings
        self.stop = sorted(stop_ids(model, tokenizer))
        # Ids past the tokenizer, see `draw`. -100 is the strongest bias vLLM takes, e^-100 the most that is left of
        # them; `allowed_token_ids` would be 150,000 numbers checked for each request, and takes 1,024 on a GPU.
        self.forbidden = {i: -100.0 for i in range(len(tokenizer), model.config.vocab_size)}
        self.cuda = model.device.type == "cuda"
        settings = dict(
            skip_tokenizer_init=True,
            # takes torchrun's LOCAL_RANK for the device; the plain backend puts every rank on cuda:0
            distributed_executor_backend="external_launcher" if torch.distributed.is_initialized() else "uni",
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=self.max_context,
            gpu_memory_utilization=memory_share,
            logprobs_mode="processed_logprobs",  # after the temperature; the default is before
            enable_sleep_mode=self.cuda,
            seed=seed,
        )
        if not self.cuda:  # for tests. The CPU sampler fails when a seeded request's prompt is cut into chunks
            settings |= dict(enforce_eager=True, kv_cache_memory_bytes=1 << 28, enable_chunked_prefill=False)
            settings |= dict(max_num_batched_tokens=max(8192, self.max_context))
        self.llm = LLM(model_path, **settings | options)
        self.asleep, self.fresh = False, True  # fresh: it has the checkpoint's weights, or those of the last push

    def wake(self) -> None:
        """CUDA: memory for the weights comes back, not what was in it: `update_weights` brings that, and the rest."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])

    def update_weights(self, model) -> None:
        # Not named_parameters(): that leaves out a tied lm_head, of which vLLM may hold a copy of its own.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # CUDA: after the push, whose temporary copies need room
        self.llm.reset_prefix_cache()  # its keys and values are the old weights'
        self.asleep, self.fresh = False, True

    def sleep(self) -> None:
        """CUDA: gives its memory to the update, weights included (level 2): the next push brings them anew."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep, self.fresh = True, False

    def generate(self, prompts, n, *, temperature, top_p=1.0, max_new_tokens, seeds, progress=None):
        """As TransformersEngine.generate. A request for each sample, since each has its seed; by the prefix cache the
        n of a prompt share its keys and values."""
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
        except Exception as error:  # its own errors bring pages of context: the first line is the message
            reason = next(iter(str(error).splitlines()), "")
            raise RuntimeError(f"vLLM engine: {type(error).__name__}: {reason}") from error
        outputs.sort(key=lambda output: int(output.request_id))  # a counter: the order in which they were given
        samples = []
        for request, output in zip(requests, outputs, strict=True):
            (out,) = output.outputs
            ids, logprobs = list(out.token_ids), list(out.logprobs.logprobs)
            text = to_text(self.tokenizer, request["prompt_token_ids"], ids)
            samples.append(Sample(ids, logprobs, text, finished=out.finish_reason == "stop"))
        return [samples[first : first + n] for first in range(0, len(samples), n)]


def make_engine(kind: str, model, tokenizer, *, model_path: str, **options):
    """`kind`: vllm, transformers, or auto, which is vLLM if it is installed and there is a GPU. `model` is the live
    Hugging Face model. ValueError, one line, if the engine cannot be had. Options: seed, max_context (longest prompt + response; default: the model's), memory_share (of
    the device's memory), and what else that engine takes: max_batch, or any argument of vllm.LLM."""
    if kind == "auto":
        kind = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        try:
            return VLLMEngine(model, tokenizer, model_path=model_path, **options)
        except ImportError as problem:
            remedy = "install requirements-vllm.txt, or choose --rollout transformers"
            raise ValueError(f"--rollout vllm: {problem}; {remedy}") from problem
    options.pop("seed", None)  # nothing here is random but by the seeds that generate() gets
    return TransformersEngine(model, tokenizer, **options)


# ------------------------------------------------------------------------------------------------- self-test


@torch.no_grad()
def disagreement(model, prompts, groups, temperature: float) -> tuple[float, float, float]:
    """Mean and max |log pi - log mu| over the sampled tokens, with log pi by plain forwards of `model`, and the share
    of the tokens that are the model's likeliest."""
    gaps, likeliest = [], []
    for prompt, group in zip(prompts, groups):
        for sample in group:
            ids = torch.tensor([prompt + sample.token_ids], device=model.device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature  # [T,V]
            sampled = ids[0, len(prompt) :, None]
            logprobs = logits.log_softmax(-1).gather(-1, sampled)[:, 0]
            gaps.append((logprobs - torch.tensor(sample.logprobs, device=model.device)).abs())
            likeliest.append((logits.argmax(-1) == sampled[:, 0]).double())
    gaps = torch.cat(gaps)
    return gaps.mean().item(), gaps.max().item(), torch.cat(likeliest).mean().item()


@torch.no_grad()
def perturb(model, seed: int) -> None:
    """Noise of 5 % on all weights: enough for stale ones to show, whatever the model."""
    noise = torch.Generator(device=model.device).manual_seed(seed)
    for weight in model.parameters():
        size = 0.05 * weight.float().square().mean().sqrt()
        weight += size * torch.randn(weight.shape, generator=noise, device=weight.device)


def selftest(model_path: str, kind: str, **options) -> bool:
    """Does the engine sample what the trainer's weights say? The weights are changed and pushed, or not pushed, and the
    two sides' log-probabilities (at T = 0.7) and greedy tokens compared.

    Limits [ours]: float32 agrees to 1e-3; a bfloat16 engine differs from any other code by some 0.02 on average.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16 if cuda else torch.float32)
    model.to(device).eval()
    engine = make_engine(kind, model, tokenizer, model_path=model_path, max_context=512, **options)
    mean_limit, max_limit, greedy_limit = (0.05, 1.0, 0.95) if cuda else (1e-4, 1e-3, 1.0)
    prompts = [render(tokenizer, solution_prompt(f"What is {a} + {7 * a}?")) for a in range(101, 109)]
    seeds = [[sample_seed(0, 0, b, i) for i in range(4)] for b in range(8)]
    verdicts = []

    def compare(label, stale=False):
        sampled = engine.generate(prompts, 4, temperature=0.7, max_new_tokens=64, seeds=seeds)
        greedy = engine.generate(prompts, 1, temperature=0.0, max_new_tokens=64, seeds=[s[:1] for s in seeds])
        mean, most, _ = disagreement(model, prompts, sampled, 0.7)
        *_, same = disagreement(model, prompts, greedy, 1.0)
        agree = mean <= mean_limit and most <= max_limit and same >= greedy_limit
        verdicts.append(mean > mean_limit if stale else agree)
        print(f"{label:42}{mean:10.2e}{most:10.2e}{same:10.2%}  {'ok' if verdicts[-1] else 'FAILED'}", flush=True)

    def push(times):
        for seed in range(times):
            perturb(model, seed)
            engine.sleep()
            engine.wake()
            engine.update_weights(model)

    print(f"{engine.name} engine, {model.dtype} on {device}\n{'|log pi - log mu|':42}{'mean':>10}{'max':>10}{'greedy':>10}")
    compare("weights as loaded")
    if engine.name == "vllm":  # the other has no weights of its own that could be stale
        perturb(model, 99)
        compare("weights changed, not pushed: must differ", stale=True)
    push(1)
    compare("after a push")
    push(10)
    compare("after ten more")
    print("PASS: engine and trainer agree" if all(verdicts) else "FAIL: do not train with this engine here")
    return all(verdicts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=selftest.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--selftest", metavar="MODEL", required=True, help="a checkpoint's folder, or its id on the hub")
    parser.add_argument("--rollout", default="auto", choices=["auto", "vllm", "transformers"], help="engine")
    parser.add_argument("--memory_share", type=float, default=0.3, help="share of GPU memory that vLLM may use")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
    sys.exit(not selftest(arguments.selftest, arguments.rollout, memory_share=arguments.memory_share))
