"""bench/real_model.py on a random model of two layers, from the warm start to the report."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench import real_model
from reward import final_answer, find_correction

ROOT = Path(real_model.__file__).resolve().parents[1]
SMALL = ("--demonstrations 20 --training 16 --held_out 6 --max_new_tokens 24 --steps 1 "
         "--rates 1e-4 --seeds 0 --jobs 2 --train_flags=--questions_per_step=2 --methods").split()
TIMES = "seconds", "tokens_per_second", "peak_memory_gb"


@pytest.fixture(scope="module")
def tokenizer():
    real = ROOT.parent / "shared" / "tokenizers" / "smollm2_135m_instruct"
    return AutoTokenizer.from_pretrained(real if real.exists() else ROOT / "toy")


def test_a_demonstrated_correction_is_well_formed_and_right(tokenizer):
    rng, counts = random.Random(0), {"training": 200, "held_out": 100}
    sets = [real_model.make_stories(seed, counts, 60) for seed in (0, 0, 1)]
    stories = sets[0]["training"] + sets[0]["held_out"]
    assert sets[0] == sets[1] != sets[2] and len({story.problem for story in stories}) == 300
    for story in stories:
        wrong = real_model.make_mistake(story, rng)
        ids = tokenizer(real_model.correction_text(story, wrong)).input_ids
        start, end, solution = find_correction(ids, tokenizer, "sections")
        assert final_answer(solution) == story.answer != final_answer(wrong)
        for _, task, value in story.steps:
            assert eval(task) == value and f"{task} = {value}." in solution
            assert task in tokenizer.decode(ids[start:end])


@pytest.mark.slow
def test_all_parts_run_and_a_seed_twice_gives_the_same_figures(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id))  # fmt: skip
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    figures = []
    for work, methods in (tmp_path / "one", ["grpo", "scrpo"]), (tmp_path / "two", ["grpo"]):
        flags = ["--model", str(tmp_path / "model"), "--work", str(work), *SMALL, *methods]
        real_model.main(flags), real_model.main(flags)  # the second time nothing is left to do
        assert {f.stem for f in (work / "runs").glob("*.json")} == {f"{m}-1e-4-0" for m in methods}
        assert "grpo - before" in (work / "report.md").read_text()
        run = json.loads((work / "runs" / "grpo-1e-4-0.json").read_text())
        run["curve"] = [{k: v for k, v in row.items() if k not in TIMES} for row in run["curve"]]
        half, warm = (json.loads((work / name).read_text()) for name in ("half.json", "warm.json"))
        figures.append((run, half, warm, (work / "before.json").read_text()))
    assert figures[0] == figures[1] and warm["losses"][-1] < half["losses"][0]
