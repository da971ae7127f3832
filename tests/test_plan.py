"""bench/plan.py: by its formula the settings files fit their machines. It is to 1 % the first
edition's longer plan, which was within 3 % of what was measured on a CPU."""

import pytest
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench import plan

SETTINGS = {file: yaml.safe_load((plan.CONFIGS / file).read_text()) for file in plan.MACHINES}


def test_every_settings_file_fits_its_machine():
    assert {file.name for file in plan.CONFIGS.glob("*.yaml")} == {*plan.MACHINES, "toy.yaml"}
    assert all(plan.fits(SETTINGS[file], *machine) for file, machine in plan.MACHINES.items())


@pytest.mark.parametrize("file, update, sampling", [
    ("one_24gb.yaml", 16.50, 21.49), ("one_80gb.yaml", 45.65, 63.43),
    ("r1_distill_1.5b_8gpu.yaml", 22.14, 36.46), ("r1_distill_7b_8gpu.yaml", 59.27, 76.89),
])  # fmt: skip
def test_the_sums_are_those_of_the_first_editions_plan(file, update, sampling):
    # ... whose micro-batches these were; the settings may change.
    tokens = 20480 if "8gpu" in file else 16384
    settings = SETTINGS[file] | {"micro_batch_tokens": tokens, "compile": False}
    parts = plan.plan(settings, *plan.MACHINES[file])
    assert parts["update"] == pytest.approx(update, rel=0.01)
    assert parts["sampling"] == pytest.approx(sampling, rel=0.01)


def test_it_knows_what_does_not_fit():
    seven, small = SETTINGS["r1_distill_7b_8gpu.yaml"], SETTINGS["r1_distill_1.5b_8gpu.yaml"]
    assert not plan.fits(seven, 8, 40)
    assert not plan.fits(seven | {"beta": 0.001}, 8, 80)  # a reference model
    assert not plan.fits(small, 1, 40)  # one rank holds all masters
    assert not plan.fits(seven | {"memory_share": 0.22}, 8, 80)  # no room for one sequence


def test_parameters_are_counted_as_they_are():
    assert plan.parameters(*plan.SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"]) == 7_615_616_512
    N, D, F, K, V = 2, 64, 160, 32, 500
    small = dict(num_hidden_layers=N, hidden_size=D, intermediate_size=F, vocab_size=V)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    for embeddings in (1, 2):
        config = Qwen2Config(**small, **heads, tie_word_embeddings=embeddings == 1)
        parameters = Qwen2ForCausalLM(config).num_parameters()
        assert parameters == plan.parameters(N, D, F, K, V, embeddings)
