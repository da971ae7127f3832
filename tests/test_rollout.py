"""rollout.py without vLLM: problems, seeds, draws, the Transformers engine, groups over ranks."""

import io
import json

import numpy
import pytest
import torch
import yaml
from conftest import ROOT, TOY
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
from rollout import Problem, TransformersEngine, draw, load_problems, sample_seed

BENCHMARKS = ROOT.parent / "shared" / "benchmarks"
END, VOCABULARY = 272, 276


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


@pytest.fixture
def toy():
    return AutoModelForCausalLM.from_pretrained(TOY).eval()


@pytest.fixture
def engine(toy, tokenizer):
    return TransformersEngine(toy, tokenizer, max_context=512)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Of many lengths, the longest neither first nor last."""
    problems = enumerate(load_problems(f"{TOY}/test.jsonl")[:24])
    return [rollout.render(tokenizer, p.problem + " Quickly." * (b % 5)) for b, p in problems]


def sample(engine, prompts, places=None, n=4, **how):
    """{place: samples} of the prompts at these places, in the order of `places`."""
    places = range(len(prompts)) if places is None else places
    seeds = [[sample_seed(0, 3, b, i) for i in range(n)] for b in places]
    how = {"temperature": 1.0, "max_new_tokens": 60, **how}
    return dict(zip(places, engine.generate([prompts[b] for b in places], n, seeds=seeds, **how)))


def ids(groups):
    return {b: [s.token_ids for s in group] for b, group in groups.items()}


# ----------------------------------------------------------------------------------------- problems

DAPO = (
    "Solve the following math problem step by step. The last line is Answer: $Answer.\n\n"
    'What is\n\n2+3?\n\nRemember to put your answer on its own line after "Answer:".'
)


def test_columns_of_the_usual_datasets(tmp_path):
    """MATH-500 has a solution beside the answer, MATH the solution alone; DAPO repeats itself."""
    boxed = "It is \\fbox{\\frac{1}{2}}, so \\boxed{ \\frac{1}{2} }."
    chat, file = [{"role": "user", "content": DAPO}], tmp_path / "p.jsonl"
    rows = [
        {"problem": "2+3?", "answer": "5", "solution": boxed, "source": "here"},
        *[{"problem": "1/2?", "solution": boxed, "answer": None}] * 2,  # a benchmark's count
        {"prompt": DAPO, "answer": 5},
        *[{"prompt": chat, "reward_model": {"ground_truth": "5"}}] * 2,
    ]
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    halves = [Problem("1/2?", "\\frac{1}{2}", f"{file}, row {i}") for i in (1, 2)]
    dapo = [Problem("What is\n\n2+3?", "5", f"{file}, row {i}") for i in (3, 4)]
    assert load_problems(str(file)) == [Problem("2+3?", "5", "here"), *halves, *dapo]


def test_numbers_of_a_file_stay_as_they_are_written(tmp_path):
    """Integers beyond a float's digits, beside rows that lack the field; a fault names its line."""
    file = tmp_path / "p.jsonl"
    large = [9007199254740993, 123456789012345678901234567890]
    rows = [{"problem": "?", "answer": n} for n in large] + [{"problem": "?", "solution": "#### 1"}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    assert [p.answer for p in load_problems(str(file))] == [*map(str, large), "1"]
    file.write_text('{"problem": "1?", "answer": 1}\n{"problem": "2?", "answer":}\n')
    with pytest.raises(ValueError, match=f"^{file}: .* line 2 column"):
        load_problems(str(file))


def test_a_dataset_through_the_datasets_library(tmp_path):
    """As from the hub, from a folder; with several splits one must be named."""
    (tmp_path / "train.jsonl").write_text('{"question": "1?", "answer": "so\\n#### 1"}\n')
    assert [p.answer for p in load_problems(str(tmp_path))] == ["1"]
    (tmp_path / "test.jsonl").write_text('{"question": "9?", "answer": "#### 9"}\n')
    where = f"{tmp_path}::test"
    assert load_problems(where) == [Problem("9?", "9", f"{where}, row 0")]
    with pytest.raises(ValueError, match="name one of its splits .*'train'"):
        load_problems(str(tmp_path))


@pytest.mark.skipif(not BENCHMARKS.exists(), reason=f"{BENCHMARKS} is absent")
def test_the_benchmarks_are_read():
    for name, size in dict(aime24=30, amc23=40, gsm8k=1319, math500=500, olympiad=675).items():
        problems = load_problems(str(BENCHMARKS / f"{name}.jsonl"))
        assert len(problems) == size and all(p.problem and p.answer for p in problems)


def test_a_micro_batch_of_the_settings_files_holds_the_longest_sequence():
    """The context is what the run needs: a question, Eq. 10's words, two whole responses."""
    for path in (ROOT / "configs").glob("[!t]*.yaml"):  # not the toy's
        config = yaml.safe_load(path.read_text())
        context = rollout.needed_context(1024, 80, config["max_new_tokens"], limit=131_072)
        assert context <= config["micro_batch_tokens"] and "max_context" not in config
    assert rollout.needed_context(1024, 80, 32_768, limit=32_768) == 32_768  # the model's own
    assert rollout.fits([1] * 30, 70, 100) and not rollout.fits([1] * 31, 70, 100)


MARKS = ["<think>", "[THINK]", "<seed:think>", "◁think▷"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_thinking_are_put_back_and_cannot_be_written(mark, special):
    """Of DeepSeek and Qwen, Magistral, Seed-OSS, Kimi; also where they are no tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    if special:
        tokenizer.add_tokens([mark])  # as Qwen does it: added, but not as a special token
    start = "{% if add_generation_prompt %}" + mark + "\n{% endif %}"
    tokenizer.chat_template += start
    prompt = rollout.render(tokenizer, "1+1?")
    ids = tokenizer("Hm. 2.").input_ids
    assert rollout.to_text(tokenizer, prompt, ids) == f"{mark}\nHm. 2."
    assert rollout.to_text(tokenizer, prompt[:-3], ids) == "Hm. 2."
    written = rollout.render(tokenizer, f"1 {mark}+1?") != rollout.render(tokenizer, "1 +1?")
    assert written != special


# ----------------------------------------------------------------------------------------- samples


def test_seeds_are_pure_distinct_and_in_range():
    grid = [(r, s, q, i) for r in range(4) for s in range(6) for q in range(10) for i in range(8)]
    grid += [(0, 0, q, 0, corrected) for q in range(10) for corrected in range(4)]
    seeds = [sample_seed(*place) for place in grid]
    assert len(set(seeds)) == len(grid) and all(0 <= s < 2**63 for s in seeds)
    assert sample_seed(0, 0, 0, 0) == 2235979303852607087  # as in the first edition
    assert sample_seed(1, 22, 3, 4) != sample_seed(12, 2, 3, 4)


def test_uniforms_are_splitmix64():
    def reference(seed, index):  # Steele, Lea, Flood 2014, in Python's integers
        mask = (1 << 64) - 1
        z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    seeds = [0, 1, 2**62, 2**63 - 1, sample_seed(0, 0, 0, 0)]
    for index in (0, 1, 77, 100_000):
        expected = [reference(seed, index) for seed in seeds]
        assert rollout.uniforms(numpy.array(seeds, numpy.uint64), index).tolist() == expected


def test_draw_follows_the_softmax():
    """At T, among the likeliest ids that hold top_p, greedily at T = 0; never an id of padding."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 9.0]).expand(200_000, 5)  # id 4 is padding
    before, u = logits.clone(), torch.tensor(rollout.uniforms(numpy.arange(200_000, dtype="u8"), 0))
    real = logits[0, :4]

    def check(temperature, top_p, expected):
        how = dict(temperature=temperature, top_p=top_p, vocabulary=4)
        drawn, logprobs = draw(logits, u, **how)
        share = torch.bincount(drawn, minlength=4) / 200_000
        assert len(share) == 4 and torch.allclose(share, expected, atol=0.005)
        return drawn, logprobs

    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.7)):  # 0.61 + 0.22 hold 0.7
        kept = (real / temperature).masked_fill(torch.tensor([0, 1, 1, 0]) > top_p, -torch.inf)
        drawn, logprobs = check(temperature, top_p, kept.softmax(-1))
        assert torch.allclose(logprobs, kept.log_softmax(-1)[drawn], atol=1e-6)
    drawn, logprobs = check(0.0, 1.0, torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(logprobs, real.log_softmax(-1)[drawn], atol=1e-6)  # log mu is at T = 1
    assert torch.equal(logits, before)


def test_a_sample_is_the_same_in_any_batch(engine, prompts):
    whole = ids(sample(engine, prompts))
    assert len({tuple(s) for group in whole.values() for s in group}) > 50
    assert ids(sample(engine, prompts, range(23, -1, -1))) == whole
    odd = range(1, 24, 2)
    assert ids(sample(engine, prompts, odd)) == {b: whole[b] for b in odd}
    for engine.max_rows in (37, 3):  # 3: fewer than a group has samples
        assert ids(sample(engine, prompts, range(9))) == {b: whole[b] for b in range(9)}
    assert ids(sample(engine, [prompts[0]] * 9, [8]))[8] != whole[0]  # its place decides too


@pytest.mark.parametrize("kind", ["toy", "padded", "bf16"])
def test_ids_and_logprobs_are_the_model_s_own(kind, toy, tokenizer, prompts):
    """Left padding, rows that end at many lengths, refills: against plain forwards and generate.
    An embedding that is padded beyond the tokenizer's ids gives none of them."""
    if kind == "bf16":
        toy.bfloat16()
    if kind == "padded":  # with ids that would be likely
        toy.resize_token_embeddings(VOCABULARY + 100)
        embedding = toy.get_output_embeddings().weight.data
        embedding[VOCABULARY:] = 1.5 * embedding[tokenizer("Step 1").input_ids[-1]]
    engine = TransformersEngine(toy, tokenizer, max_context=512)
    engine.max_rows, engine.prefill_tokens = 11, 100
    gaps = []
    for b, group in sample(engine, prompts[:12], n=3, temperature=0.7, max_new_tokens=50).items():
        for s in group:
            logits = toy(torch.tensor([prompts[b] + s.token_ids])).logits[0, :, :VOCABULARY]
            logp = (logits[len(prompts[b]) - 1 : -1].float() / 0.7).log_softmax(-1)
            logp = logp.gather(-1, torch.tensor(s.token_ids)[:, None])[:, 0]
            gaps.append(logp - torch.tensor(s.logprobs))
    gaps = torch.cat(gaps).abs()
    assert gaps.mean() < 0.05 if kind == "bf16" else gaps.max() < 2e-4
    for b, (s,) in sample(engine, prompts[:6], n=1, temperature=0.0).items():
        theirs = toy.generate(torch.tensor([prompts[b]]), do_sample=False, max_new_tokens=60)
        assert kind != "toy" or theirs[0, len(prompts[b]) :].tolist() == s.token_ids


def test_a_stop_id_ends_a_sample_and_is_no_part_of_its_text(engine, tokenizer, prompts):
    samples = sum(sample(engine, prompts, max_new_tokens=42).values(), [])
    assert {s.finished for s in samples} == {True, False}
    for s in samples:
        ended = [token == END for token in s.token_ids]
        assert s.finished == ended[-1] and not any(ended[:-1]) and len(s.logprobs) == len(ended)
        assert s.text == tokenizer.decode(s.token_ids[: len(ended) - s.finished])
        assert s.finished or len(ended) == 42
    engine.model.generation_config.eos_token_id = [4, 5]
    assert rollout.stop_ids(engine.model, tokenizer) == {4, 5, END}


def test_no_row_is_run_for_nothing(engine, prompts, monkeypatch):
    """Each prompt goes through the model once, each sampled token too; memory bounds the rows."""
    shapes, bars, forward = [], [], engine.forward

    def spy(x, *rest):
        shapes.append(x.shape)
        return forward(x, *rest)

    monkeypatch.setattr(engine, "forward", spy)

    def bar(**how):
        bars.append(tqdm(file=io.StringIO(), **how))
        return bars[-1]

    samples = sum(sample(engine, prompts, n=8, bar=bar).values(), [])
    tokens = sum(len(s.token_ids) for s in samples)
    assert sum(rows for rows, width in shapes if width > 1) == len(prompts)
    assert sum(rows for rows, width in shapes if width == 1) == tokens - len(samples)
    assert bars[0].n == bars[0].total == len(samples)
    assert engine.grouped and engine.cache_tokens > 10_000
    shapes.clear()
    engine.cache_tokens = 20 * (len(prompts[0]) + 60) + 1
    sample(engine, [prompts[0]] * 8, n=8)
    assert max(rows for rows, _ in shapes) == 20


def test_a_model_that_trains_can_be_sampled_from(engine, prompts):
    """With gradient checkpointing too, which allows no cache in training mode."""
    whole, model = ids(sample(engine, prompts[:2])), engine.model
    model.gradient_checkpointing_enable()
    model.train()
    before = model.config._attn_implementation
    assert ids(sample(engine, prompts[:2])) == whole
    model(torch.tensor(prompts[:1])).logits.sum().backward()  # nothing is kept of inference mode
    assert model.config._attn_implementation == before
    assert sample(engine, []) == {}


class Echo:
    """Right is what contains the gold."""

    def verdicts(self, responses, golds, problems):
        return ["right" if g in r else "wrong" for r, g in zip(responses, golds, strict=True)]


def test_all_ranks_get_all_groups_whatever_their_number(engine, tokenizer, monkeypatch):
    """Five tasks on 1 to 3 ranks, and one on two: one of them has nothing to do."""
    problems = load_problems(f"{TOY}/test.jsonl")[:5]
    tasks = [rollout.solution_task(tokenizer, problem, q) for q, problem in enumerate(problems)]
    how = dict(seed=3, temperature=1.0, max_new_tokens=60)

    def groups(world, tasks, samples=range(4), step=2):
        parts, results = [[None] * len(tasks[r::world]) for r in range(world)], [None] * world

        def gather(items):
            (parts[rank],) = items
            return parts

        monkeypatch.setattr(rollout, "gather", gather)
        monkeypatch.setattr(rollout.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(rollout.dist, "get_world_size", lambda: world)
        for rank in [*range(world)] * 2:  # the second time every rank has said its part
            work = (engine, tokenizer, Echo(), tasks, samples)
            results[rank] = rollout.sample_groups(*work, step=step, **how)
        assert all(result == results[0] for result in results)
        assert [g.problem for g in results[0]] == [task.problem for task in tasks]
        return [[(s.token_ids, s.verdict) for s in g.samples] for g in results[0]]

    whole = groups(1, tasks)
    assert {len(group) for group in whole} == {4}
    assert groups(2, tasks) == groups(3, tasks) == whole and groups(2, tasks[3:4]) == whole[3:4]
    # An evaluation draws one sample of each question at a time.
    assert groups(2, tasks, range(2, 3)) == [group[2:3] for group in whole]
    how_alone = dict(temperature=1.0, max_new_tokens=60, seeds=[[sample_seed(3, 2, 4, 2)]])
    ((alone,),) = engine.generate([tasks[4].prompt], 1, **how_alone)
    assert alone.token_ids == whole[4][2][0]
    assert groups(1, tasks, step=3) != whole and groups(1, []) == []
