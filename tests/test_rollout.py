"""rollout.py without vLLM: problems, prompts, seeds, the draw, the Transformers engine, and vLLM's call order on a fake."""

import copy
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rollout
from rollout import Problem, TransformersEngine, VLLMEngine, draw, load_problems, make_engine, render, sample_seed, uniforms

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "toy")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


@pytest.fixture(scope="module")
def toy():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(TOY).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [render(tokenizer, p.problem) for p in load_problems(f"{TOY}/test.jsonl")[:64]]


def seeds_for(places, n=8):
    return [[sample_seed(0, 3, b, i) for i in range(n)] for b in places]


def ids(groups):
    return [[sample.token_ids for sample in group] for group in groups]


# ---------------------------------------------------------------------------------------------------- problems

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\nWhat is\n\n2+3?\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
LAYOUTS = {
    "ours": ({"problem": "2+3?", "answer": "5", "source": "here"}, "2+3?", "5"),
    "Maxwell-Jia/AIME_2024": ({"ID": "2024-II-4", "Problem": "2+3?", "Solution": "so \\boxed{7}", "Answer": 5}, "2+3?", "5"),
    "HuggingFaceH4/aime_2024": ({"id": 60, "problem": "2+3?", "solution": "..", "answer": "025", "url": "", "year": "2024"}, "2+3?", "025"),
    "math-ai/aime24": ({"id": 60, "problem": "2+3?", "solution": "\\boxed{5}", "url": ""}, "2+3?", "5"),
    "AI-MO/aimo-validation-amc": ({"id": 0, "problem": "2+3?", "answer": 142.0, "url": ""}, "2+3?", "142"),
    "math-ai/amc23": ({"id": 0, "question": "2+3?", "answer": "5.5", "url": ""}, "2+3?", "5.5"),
    "HuggingFaceH4/MATH-500": ({"problem": "2+3?", "solution": "\\boxed{7}", "answer": "\\frac{1}{2}", "level": 2}, "2+3?", "\\frac{1}{2}"),
    "Hothan/OlympiadBench": ({"question": "2+3?", "solution": ["a", "b"], "final_answer": ["$2$", "3"], "context": None}, "2+3?", "2, 3"),
    "openai/gsm8k": ({"question": "2+3?", "answer": "2+3 = <<2+3=5>>5\n#### 1,005"}, "2+3?", "1,005"),
    "MATH-lighteval": ({"problem": "2+3?", "level": "1", "solution": "\\boxed{1}, so \\boxed{\\frac{1}{2}}."}, "2+3?", "\\frac{1}{2}"),
    "DAPO-Math-17k": ({"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "5", "style": "rule"}}, "What is\n\n2+3?", "5"),
    "DAPO-Math-17k-Processed": ({"prompt": "2+3?", "solution": "5", "reward_model": {"ground_truth": "5"}}, "2+3?", "5"),
    "DeepScaleR": ({"problem": "2+3?", "answer": "5", "solution": "long"}, "2+3?", "5"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_the_usual_datasets(layout, tmp_path):
    row, problem, answer = LAYOUTS[layout]
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    found = load_problems(str(tmp_path / "p.jsonl"))
    assert {(p.problem, p.answer) for p in found} == {(problem, answer)}
    assert len(found) == (1 if "reward_model" in row else 2)  # DAPO's repeats are dropped, a benchmark's are counted


def test_a_dataset_through_the_datasets_library(tmp_path):
    """As from the hub, from a folder: the columns come back with nulls for what a row lacks."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "answer": f"so\n#### {i}"}) + "\n" for i in range(3)))
    assert [p.answer for p in load_problems(str(tmp_path))] == ["0", "1", "2"]
    (tmp_path / "test.jsonl").write_text('{"question": "9?", "answer": "#### 9"}\n')
    assert load_problems(f"{tmp_path}::test") == [Problem("9?", "9", f"{tmp_path}::test, row 0")]
    with pytest.raises(ValueError, match="name one of the splits .*'train'"):
        load_problems(str(tmp_path))
    with pytest.raises(ValueError, match="name one of the splits"):
        load_problems(f"{tmp_path}::dev")


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "p.jsonl: no such file"),
        ("", "p.jsonl: no problems in it"),
        ('{"problem": "1?", "answer": 1}\n{"problem": ', "p.jsonl, line 2: not JSON"),
        ("[1, 2]", "p.jsonl, line 1: a list, not an object"),
        ('{"problem": "1?"}', "p.jsonl, line 1: no answer: give it a field 'answer' or"),
        ('{"answer": "1"}', "p.jsonl, line 1: no problem: give it a field 'problem' or"),
        ('\n{"problem": "1?", "answer": null}', "p.jsonl, line 2: no answer"),
        ('{"problem": "1?", "answer": " "}', "p.jsonl, line 1: field 'answer' holds no answer"),
        ('{"problem": "", "answer": "1"}', "p.jsonl, line 1: field 'problem' holds no problem"),
        ('{"problem": "1?", "answer": true}', "p.jsonl, line 1: field 'answer' must be text or a number"),
        ('{"problem": "1?", "answer": []}', "p.jsonl, line 1: field 'answer' must be text or a number"),
        ('{"problem": "1?", "solution": "see \\\\boxed{}"}', "p.jsonl, line 1: field 'solution' holds no answer"),
        ('{"problem": "1?", "reward_model": {"style": "rule"}}', "p.jsonl, line 1: field 'reward_model' has not the usual form"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', "p.jsonl, line 1: field 'prompt' has not the usual form"),
    ],
)
def test_bad_problems_get_one_line(text, says, tmp_path):
    if text is not None:
        (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError) as error:
        load_problems(str(tmp_path / "p.jsonl"))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_dataset_gets_one_line(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("no route\nto host")))
    with pytest.raises(ValueError) as error:
        load_problems("nobody/nothing:main:test")
    assert "nobody/nothing:main:test" in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- prompts


def with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    other.bos_token = "<|user|>"
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", other.bos_token_id)]
    )
    assert other("x").input_ids[0] == other.bos_token_id
    return other


def test_the_template_s_bos_is_not_doubled(tokenizer):
    ours = render(with_bos(tokenizer), "Add 1+2")
    assert ours.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1
    assert tokenizer.decode(ours) == "<|user|>Add 1+2<|assistant|>"


def test_a_model_without_a_template_gets_text_and_bos(tokenizer):
    other = with_bos(tokenizer)
    other.chat_template = None
    assert tokenizer.decode(render(other, "Add 1+2")) == "<|user|>Add 1+2\n"


def test_a_prefilled_think_is_put_back(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|><think>\n")
    prompt, response = render(other, "Add 1+2"), other("a</think>b").input_ids
    assert tokenizer.decode(prompt).endswith("<think>\n")
    assert rollout.to_text(other, prompt, response) == "<think>\na</think>b"
    assert rollout.to_text(tokenizer, render(tokenizer, "<think>"), response) == "a</think>b"


def test_what_fits():
    assert rollout.fits([1] * 6, 4, 10) and not rollout.fits([1] * 7, 4, 10)


# ---------------------------------------------------------------------------------------------------- randomness


def test_seeds_are_pure_distinct_and_in_range():
    grid = [(r, s, q, i) for r in range(4) for s in range(6) for q in range(10) for i in range(8)]
    seeds = [sample_seed(*place) for place in grid]
    assert len(set(seeds)) == len(grid) and all(0 <= s < 2**63 for s in seeds)
    assert sample_seed(0, 0, 0, 0) == 2235979303852607087 and sample_seed(1, 22, 3, 4) != sample_seed(12, 2, 3, 4)


def test_uniforms_are_splitmix64():
    def reference(seed, index):  # Steele, Lea, Flood 2014, in Python's integers
        mask = (1 << 64) - 1
        z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    seeds = torch.tensor([0, 1, 2**62, 2**63 - 1, sample_seed(0, 0, 0, 0)])
    for index in (0, 1, 77, 100_000):
        expected = [reference(s, index) for s in seeds.tolist()]
        assert uniforms(seeds, torch.full_like(seeds, index)).tolist() == expected
    many = uniforms(torch.tensor(5), torch.arange(200_000))
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.003
    assert torch.histc(many.float(), 10).sub(20_000).abs().max() < 600


def test_draw_follows_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0]).expand(200_000, 5)
    u = uniforms(torch.arange(200_000), torch.zeros(200_000, dtype=torch.int64))
    drawn, logprobs = draw(logits, u, temperature=0.7, top_p=1.0, vocabulary=4)
    expected = (logits[0, :4] / 0.7).softmax(-1)
    assert torch.allclose(torch.bincount(drawn, minlength=5)[:4] / 200_000, expected, atol=0.005)
    assert (drawn < 4).all() and torch.allclose(logprobs, expected.log()[drawn], atol=1e-6)
    halves = draw(torch.zeros(2, 2), torch.tensor([0.5 - 2**-53, 0.5], dtype=torch.float64), temperature=1.0, top_p=1.0, vocabulary=2)
    assert halves[0].tolist() == [0, 1]
    drawn, logprobs = draw(logits, u, temperature=0.0, top_p=1.0, vocabulary=4)
    assert (drawn == 0).all() and torch.allclose(logprobs, logits[0, :4].log_softmax(-1)[drawn], atol=1e-6)
    drawn, logprobs = draw(logits, u, temperature=1.0, top_p=0.7, vocabulary=4)  # 0.61 + 0.22 cover it
    kept = logits[0, [0, 3]].softmax(-1)
    assert set(drawn.tolist()) == {0, 3} and torch.allclose(logprobs, kept.log()[(drawn == 3).long()], atol=1e-6)


def test_draw_leaves_the_model_s_logits_alone():
    logits = torch.randn(3, 8)
    before = logits.clone()
    draw(logits, torch.full((3,), 0.5).double(), temperature=1.0, top_p=0.9, vocabulary=6)
    assert torch.equal(logits, before)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -1e-3, 30.0, -200.0, 88.0, -float("inf")]), min_size=1, max_size=40),
    st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]),
    st.integers(0, 3),
)
def test_draw_never_takes_an_impossible_id(values, u, padding):
    values[0] = 0.0
    logits = torch.tensor([values + [99.0] * padding])
    (drawn,), (logprob,) = draw(logits, torch.tensor([u], dtype=torch.float64), temperature=1.0, top_p=1.0, vocabulary=len(values))
    assert drawn < len(values) and logits[0, : len(values)].softmax(-1)[drawn] > 0 and logprob > -200


def test_draw_survives_a_sum_that_is_not_monotone(monkeypatch):
    """As a parallel sum on a GPU may be by a last bit: the id hit has no weight, the likeliest is taken instead."""
    monkeypatch.setattr(torch, "searchsorted", lambda mass, *_, **__: torch.full((len(mass), 1), 7))
    drawn, _ = draw(torch.tensor([[0.0, 1.0, -float("inf")]]), torch.tensor([0.5]).double(), temperature=1, top_p=1, vocabulary=3)
    assert drawn.tolist() == [1]


# ---------------------------------------------------------------------------------------------------- Transformers


def test_a_sample_is_the_same_in_any_batch_on_any_rank(toy, tokenizer, prompts):
    def run(places, max_batch):
        engine = TransformersEngine(toy, tokenizer, max_batch=max_batch)
        groups = engine.generate([prompts[b] for b in places], 8, temperature=1.0, max_new_tokens=60, seeds=seeds_for(places))
        return dict(zip(places, ids(groups)))

    whole = run(range(64), 512)
    assert len({tuple(s) for group in whole.values() for s in group}) > 300
    assert run(range(64), 37) == whole
    assert run(range(63, -1, -1), 512) == whole
    for world in (2, 3):
        ranks = [run(range(rank, 64, world), 512) for rank in range(world)]
        assert {b: s for rank in ranks for b, s in rank.items()} == whole
    assert run(range(2), 5) == {b: whole[b] for b in range(2)}  # fewer rows than a group has samples
    engine = TransformersEngine(toy, tokenizer)
    other = engine.generate(prompts[:4], 8, temperature=1.0, max_new_tokens=60, seeds=seeds_for(range(4, 8)))
    assert ids(other) != [whole[b] for b in range(4)]


def random_model(kind, tokenizer):
    torch.manual_seed(1)
    size = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
    if kind == "llama":  # as many key heads as query heads, head_dim from the hidden size
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=4, **size))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=32, **size))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    for weight in model.parameters():
        weight.data *= 3 if weight.dim() > 1 else 1
    return model.eval()


@pytest.mark.parametrize("kind", ["toy", "llama", "qwen3", "toy in bf16"])
def test_ids_and_logprobs_are_the_trainer_s(kind, toy, tokenizer, prompts):
    """Prompts of many lengths, rows that end at many, and refills: against plain forwards and model.generate."""
    model = copy.deepcopy(toy).bfloat16() if "bf16" in kind else toy if kind == "toy" else random_model(kind, tokenizer)
    long = [prompts[b][:1] * (b % 5 * 9) + prompts[b][b % 3 :] for b in range(20)] + [prompts[0][:1]]
    for max_batch in (512, 11):
        engine = TransformersEngine(model, tokenizer, max_batch=max_batch)
        engine.prefill_tokens = 100
        groups = engine.generate(long, 3, temperature=0.7, max_new_tokens=50, seeds=seeds_for(range(21), 3))
        mean, most, _ = rollout.disagreement(model, long, groups, 0.7)
        assert (mean < 1e-5 and most < 2e-4) if "bf16" not in kind else mean < 0.05
        if "bf16" in kind:
            continue
        greedy = engine.generate(long, 1, temperature=0.0, max_new_tokens=50, seeds=seeds_for(range(21), 1))
        for prompt, (sample,) in zip(long, greedy):
            theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=50, attention_mask=torch.ones(1, len(prompt)),
                                    eos_token_id=tokenizer.eos_token_id, pad_token_id=0)  # fmt: skip
            assert theirs[0, len(prompt) :].tolist() == sample.token_ids


def test_endings(toy, tokenizer, prompts):
    groups = TransformersEngine(toy, tokenizer).generate(prompts[:8], 8, temperature=1.0, max_new_tokens=42, seeds=seeds_for(range(8)))
    samples = [s for group in groups for s in group]
    assert any(s.finished for s in samples) and not all(s.finished for s in samples)
    for s in samples:
        assert s.finished == (s.token_ids[-1] == tokenizer.eos_token_id) and tokenizer.eos_token_id not in s.token_ids[:-1]
        assert len(s.token_ids) == len(s.logprobs) and (s.finished or len(s.token_ids) == 42)
        assert s.text == tokenizer.decode(s.token_ids, skip_special_tokens=True) and "<|end|>" not in s.text


def test_every_stop_id_of_the_generation_config_counts(toy, tokenizer, prompts):
    model = copy.deepcopy(toy)
    newline = tokenizer("\n").input_ids[0]
    model.generation_config.eos_token_id = [newline, 5]
    assert rollout.stop_ids(model, tokenizer) == {newline, 5, tokenizer.eos_token_id}
    (sample,) = TransformersEngine(model, tokenizer).generate(prompts[:1], 1, temperature=1.0, max_new_tokens=50, seeds=[[0]])[0]
    assert sample.finished and sample.token_ids[-1] == newline and sample.text.startswith("Step 1:")


def test_padding_of_the_embedding_is_never_sampled(tokenizer, prompts):
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer) + 100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=16)).eval()  # fmt: skip
    model.generation_config.eos_token_id = None
    groups = TransformersEngine(model, tokenizer).generate(prompts[:8], 8, temperature=1.0, max_new_tokens=40, seeds=seeds_for(range(8)))
    assert max(t for group in groups for s in group for t in s.token_ids) < len(tokenizer)
    sample = groups[0][0]
    logits = model(torch.tensor([prompts[0] + sample.token_ids])).logits[0, len(prompts[0]) - 1 : -1, : len(tokenizer)]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)


def test_no_row_is_run_for_nothing(toy, tokenizer, prompts, monkeypatch):
    """Each prompt is prefilled once; decoding runs each sampled token's row once, and never more rows than allowed."""
    decoded, prefilled, progress = [], [], []
    engine = TransformersEngine(toy, tokenizer, max_batch=40)
    step, prefill = rollout.Slots.step, engine.prefill
    monkeypatch.setattr(rollout.Slots, "step", lambda slots, width: decoded.append(slots.live) or step(slots, width))
    monkeypatch.setattr(engine, "prefill", lambda slots, batch, *rest: prefilled.extend(b for b, _ in batch) or prefill(slots, batch, *rest))
    groups = engine.generate(prompts, 8, temperature=1.0, max_new_tokens=80, seeds=seeds_for(range(64)), progress=progress.append)
    assert sum(decoded) == sum(len(s.token_ids) for group in groups for s in group)
    assert sorted(prefilled) == list(range(64)) and max(decoded) == 40
    assert sum(progress) == 64 * 8 and all(progress)


def test_a_long_row_holds_up_nobody(toy, tokenizer, prompts, monkeypatch):
    """Lengths from 4 to the cut at 100, median 43: 0.85 of the places are in use, 0.49 if they were not refilled."""
    decoded, step = [], rollout.Slots.step
    monkeypatch.setattr(rollout.Slots, "step", lambda slots, width: decoded.append(slots.live) or step(slots, width))
    engine = TransformersEngine(toy, tokenizer, max_batch=40)
    engine.generate(prompts, 8, temperature=1.5, max_new_tokens=100, seeds=seeds_for(range(64)))
    assert sum(decoded) > 0.7 * 40 * len(decoded)


def test_rows_are_bounded_by_memory(toy, tokenizer, prompts, monkeypatch):
    widest, step = [], rollout.Slots.step
    monkeypatch.setattr(rollout.Slots, "step", lambda slots, width: widest.append(slots.live) or step(slots, width))
    engine = TransformersEngine(toy, tokenizer)
    assert engine.cache_tokens > 10_000
    engine.cache_tokens = 20 * (len(prompts[0]) + 60) + 1
    engine.generate(prompts[:8], 8, temperature=1.0, max_new_tokens=60, seeds=seeds_for(range(8)))
    assert max(widest) == 20


def test_the_model_is_left_as_it_was(toy, tokenizer, prompts):
    model = copy.deepcopy(toy)
    model.gradient_checkpointing_enable()
    model.train()
    before = model.config._attn_implementation
    engine = TransformersEngine(model, tokenizer)
    ask = dict(temperature=1.0, max_new_tokens=20)
    modes, forward = set(), model.model.forward
    model.model.forward = lambda *a, **k: modes.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled())) or forward(*a, **k)
    sampled = engine.generate(prompts[:2], 2, seeds=seeds_for(range(2), 2), **ask)
    assert modes == {(False, False)}  # what a model keeps of inference mode can't be trained with
    assert model.training and model.model.layers[0].training and model.config._attn_implementation == before
    assert ids(sampled) == ids(TransformersEngine(toy, tokenizer).generate(prompts[:2], 2, seeds=seeds_for(range(2), 2), **ask))
    model(torch.tensor([prompts[0]])).logits.sum().backward()

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[:2], 2, seeds=seeds_for(range(2), 2), progress=stop, temperature=1.0, max_new_tokens=60)
    assert model.training and model.config._attn_implementation == before
    assert engine.generate([], 2, seeds=[], **ask) == []


def test_engines_are_chosen(toy, tokenizer):
    engine = make_engine("auto", toy, tokenizer, model_path=TOY, seed=1, max_context=99, memory_share=0.1)
    assert engine.name == "transformers" or torch.cuda.is_available()
    assert engine.max_context == 99 and make_engine("transformers", toy, tokenizer, model_path=TOY).max_context == 2048
    model = copy.deepcopy(toy)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="Qwen3ForCausalLM.*use vLLM"):
        make_engine("transformers", model, tokenizer, model_path=TOY)


# ---------------------------------------------------------------------------------------------------- self-test


def test_the_self_test_passes_and_can_fail(monkeypatch, capsys):
    assert rollout.selftest(TOY, "transformers")
    assert "PASS" in capsys.readouterr().out

    class Stale(TransformersEngine):
        """Samples from a copy of the weights that a push does not reach."""

        name = "vllm"  # so that the row without a push is run too

        def __init__(self, model, *args, **kwargs):
            super().__init__(copy.deepcopy(model), *args, **kwargs)

        def update_weights(self, model):
            pass

    monkeypatch.setattr(rollout, "TransformersEngine", Stale)
    assert not rollout.selftest(TOY, "transformers")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in rows[2:6]] == ["ok", "ok", "FAILED", "FAILED"]

    class Hot(TransformersEngine):
        """Samples at T = 1 whatever it is told."""

        def generate(self, *args, temperature, **kwargs):
            return super().generate(*args, temperature=temperature and 1.0, **kwargs)

    monkeypatch.setattr(rollout, "TransformersEngine", Hot)
    assert not rollout.selftest(TOY, "transformers")


def test_the_self_test_as_a_command():
    command = [sys.executable, "rollout.py", "--selftest", "toy", "--rollout", "transformers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("PASS")


# ---------------------------------------------------------------------------------------------------- vLLM's call order


def test_the_order_of_calls_to_vllm(toy, tokenizer, monkeypatch):
    """On a GPU memory is woken in two parts around the push, the prefix cache is reset after it, and sleeping loses the
    weights: generating without a push is refused."""
    calls = []

    class LLM:
        def __init__(self, path, **settings):
            calls.append(("LLM", settings))
            self.llm_engine = types.SimpleNamespace(has_unfinished_requests=lambda: False)

        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, *args, *kwargs.values()))

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    engine = VLLMEngine(toy, tokenizer, model_path=TOY, memory_share=0.4, max_context=128)
    chosen = calls.pop()[1]
    assert chosen["logprobs_mode"] == "processed_logprobs" and chosen["gpu_memory_utilization"] == 0.4
    assert chosen["max_model_len"] == 128 and chosen["dtype"] == "float32"
    engine.cuda = True

    def ask():
        return engine.generate([], 1, temperature=1.0, max_new_tokens=1, seeds=[])

    ask()
    engine.wake()  # awake already: nothing to do
    assert [c[0] for c in calls] == ["enqueue"]
    calls.clear()
    engine.sleep()
    engine.wake()
    with pytest.raises(RuntimeError, match="wake.. and update_weights.. first"):
        ask()
    engine.update_weights(toy)
    ask()
    assert [c[:2] for c in calls] == [
        ("sleep", 2), ("wake_up", ["weights"]), ("collective_rpc", "reload_weights"), ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",), ("enqueue", []),
    ]  # fmt: skip
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= dict(calls[2][2]["weights_iterator"]).keys()
