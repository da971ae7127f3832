"""What users bring: models, tokenizers, templates, files, terminals. Each test is a kind of fault
from public reports: it works, or one line at the start says what is wrong."""

import ctypes
import io
import json
import os
from contextlib import redirect_stdout
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, same_weights
from pyarrow import parquet, table
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reward
import rollout
import train
from rollout import Problem, Sample, solution_task, load_problems, render

SHARED = ROOT.parent / "shared" / "tokenizers"
FLAGS = ("--questions_per_step 4 --group_size 4 --pool_trigger 4 --eval_questions 2 --steps 1 "
         "--schedule constant --max_new_tokens 16").split()  # fmt: skip
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=1024)  # fmt: skip


def toy_tokenizer(template="TOY", special=(), **tokens):
    """The toy's with another template, further special tokens, another EOS or BOS."""
    tokenizer = AutoTokenizer.from_pretrained(TOY, **tokens)
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template.replace("TOY", tokenizer.chat_template)
    return tokenizer


def tiny(folder, kind="qwen3", tokenizer=None, **config):
    """A random model of this architecture; its head is large, so that faults show in log p."""
    tokenizer = tokenizer or toy_tokenizer()
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=273)
    config = {**ids, "bos_token_id": None, **SIZE, **config}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    model.get_output_embeddings().weight.data *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(launch, tmp_path, monkeypatch):
    """run(*flags) -> Result; a coin grades, so that a random model has something to learn from."""
    sums = [{"problem": f"{i}+{i}?", "answer": str(2 * i)} for i in range(9)]
    few = write(tmp_path / "few.jsonl", *sums)
    monkeypatch.setattr(train, "plot", lambda *_, **__: None)  # a second each

    def main(*flags, one_right_of=3, out="out"):
        def coin(_, responses, golds, problems):
            return ["wrong" if (i + 1) % one_right_of else "right" for i in range(len(golds))]

        monkeypatch.setattr(reward.Grader, "verdicts", coin)
        data = ("--train_data", few, "--eval_data", few)
        return launch(tmp_path / out, *data, *flags, first=FLAGS)

    return main


def refused(done, *words):
    assert done.code == 2 and len(done.errors) == 1 and not (done.folder / "metrics.jsonl").exists()
    return done.errors[0].startswith("error: ") and all(word in done.errors[0] for word in words)


TRAINS = {
    "gpt2": dict(n_positions=1024),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": {},
    "bloom": {},
    "phi": {},  # its head has a bias
    "mistral": dict(sliding_window=64),
    "phi3": dict(sliding_window=64, original_max_position_embeddings=1024),
    "qwen2": dict(sliding_window=16, use_sliding_window=True, max_window_layers=1, vocab_size=300),
    "gemma2": dict(layer_types=["full_attention"] * 2, attn_logit_softcapping=0.01, head_dim=64,
                   final_logit_softcapping=None),
    "gemma3_text": dict(sliding_window=16),
    "lfm2": dict(layer_types=["conv", "full_attention"]),  # a layer without keys
    # Experts that a batch does not use are trained with the next one.
    "mixtral": dict(num_local_experts=32, num_experts_per_tok=1),
}  # fmt: skip
HALVES = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
              is_decoder=True, is_encoder_decoder=False)  # fmt: skip
INDEXED = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
               qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=16, n_routed_experts=4,
               num_experts_per_tok=2, n_group=1, topk_group=1, index_n_heads=4, index_head_dim=16,
               index_topk=1024)  # fmt: skip
UNUSED = {  # models with parameters that no gradient reaches, and the first of these
    "ernie4_5_moe": (dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
                          moe_layer_start_index=1), "layers.1.mlp.gate.moe_statics"),
    "bart": (HALVES, "layers.0.encoder_attn"),
    "whisper": (HALVES | dict(max_target_positions=1024), "layers.0.encoder_attn"),
    "deepseek_v32": (INDEXED, "layers.0.self_attn.indexer"),
}  # fmt: skip
TRAINS |= {kind: config for kind, (config, _) in UNUSED.items()}


@pytest.mark.parametrize("kind", TRAINS)
def test_a_model_trains_on_its_own_log_probabilities(kind, run, tmp_path):
    """Prompts of 17 to 324 tokens, windows of 16 and 64: engine (cache, padding on the left, rows
    dropped) and trainer (none of it) agree, and final/ has the same tensors, moved."""
    rows = [{"problem": "Add 1+2" + " again" * n, "answer": "3"} for n in (0, 3, 154, 40)]
    longest = render(toy_tokenizer(), rollout.solution_prompt(rows[2]["problem"]))
    model, data = tiny(tmp_path / "m", kind, **TRAINS[kind]), write(tmp_path / "p.jsonl", *rows)
    done = run("--model", model, "--train_data", data, "--gradient_checkpointing", kind == "gpt2")
    assert done.code == 0 and len(longest) >= 324
    assert done.steps[0]["logp_gap_max"] < 1e-3
    before, after = load_file(model / "model.safetensors"), done.weights
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and len(done.errors) == (kind in UNUSED)
    for line in done.errors:
        _, first = UNUSED[kind]
        assert "frozen" in line and first in line and not any(first in name for name in moved)


COIN = """
import reward
reward.Grader.verdicts = lambda _, texts, *__: ["right", "wrong"] * (len(texts) // 2)
"""


def test_two_ranks_do_not_wait_for_a_parameter_without_gradient(ranks, tmp_path):
    model = tiny(tmp_path / "m", "ernie4_5_moe", **TRAINS["ernie4_5_moe"])
    flags = ("--model", model, "--steps", 2, "--max_new_tokens", 16, "--precision", "bf16")
    done = ranks(tmp_path / "out", *flags, patch=COIN).result()
    assert done.code == 0 and len(done.errors) == 1 and "frozen" in done.err, done.err
    assert not same_weights(load_file(model / "model.safetensors"), done.weights)


@pytest.mark.parametrize("layers, hidden, tokens", [
    (2, 32, 16384),  # the size of the toy
    (30, 576, 2048),  # of SmolLM2-135M, whose activations take 0.9 to 1.3 MiB a token [measured]
    (28, 3584, 512),  # of a 7B
])  # fmt: skip
def test_micro_batches_follow_the_model_s_size(layers, hidden, tokens, run, tmp_path):
    model = tiny(tmp_path / "m", num_hidden_layers=layers, hidden_size=hidden)
    done = run("--model", model, "--steps", 0, "--eval_questions", 0)
    assert json.loads((done.folder / "settings.json").read_text())["micro_batch_tokens"] == tokens


def lose_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def templated(template):
    return lambda folder: tiny(folder, tokenizer=toy_tokenizer(template))


REFUSED = {  # what is given as --model, and what the one line has
    "Granite": (lambda m: tiny(m, "granite", logits_scaling=8.0), "scales or caps its logits"),
    "NanoChat": (lambda m: tiny(m, "nanochat"), "scales or caps its logits"),
    "Cohere": (lambda m: tiny(m, "cohere", logit_scale=0.0625), "scales or caps its logits"),
    "Gemma 2": (lambda m: tiny(m, "gemma2", final_logit_softcapping=3.0), "scales or caps"),
    "an encoder": (lambda m: tiny(m, "bert"), "no causal model"),
    "no cache": (lambda m: tiny(m, "mamba"), "--model"),
    "a mask of its own": (lambda m: tiny(m, "doge"), "--model"),
    "no hidden states": (lambda m: tiny(m, "llama4_text", num_local_experts=4), "--model"),
    "a cache of its own": (lambda m: tiny(m, "cpmant", dim_head=8, dim_ff=48), "--model"),
    "a window": (lambda m: tiny(m, "moshi", sliding_window=16, ffn_dim=48), "log p"),
    "an adapter": (lambda m: write(tiny(m) / "adapter_config.json"), "is an adapter: merge it"),
    "a layer without weights": (lambda m: lose_a_layer(tiny(m)), "no weights for ['model.layers.1"),
    "no tokenizer": (lambda m: [file.unlink() for file in tiny(m).glob("tokenizer*")], "tokenizer"),
    "ids beyond": (lambda m: tiny(m, vocab_size=275), "has 276 ids, its embedding 275 rows"),
    "temperature, no do_sample": (
        lambda m: write(tiny(m) / "generation_config.json", {"temperature": 0.6}), "do_sample"),
    "the problem left out": (templated("<|user|>{{ messages[0].role }}"), "leaves out"),
    "parts": (templated("{% for p in messages[0].content %}{{ p.text }}{% endfor %}"), "leaves"),
    "a text changed": (templated("<|user|>{{ messages[0].content | upper }}"), "leaves out"),
    "a raise": (templated("{{ raise_exception('system first') }}"), "turn of user: system first"),
    "no assistant": (templated("{{ messages[-1].content + {'user': ''}[messages[-1].role] }}"),
                     "fails on a turn of assistant"),
    "no positions": (lambda m: tiny(m, "gpt2", max_position_embeddings=128), "128 positions"),
    # Beyond it, log p of a row depends on the longest row of its batch (transformers#33129).
    "LongRoPE": (lambda m: tiny(m, "phi3", original_max_position_embeddings=64, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}), "64 positions"),
    "dynamic NTK": (lambda m: tiny(m, "llama", max_position_embeddings=64, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "64 positions"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_cannot_be_used_gets_one_line(fault, run, tmp_path):
    """Whatever a model does to its logits is seen by comparing once with the model itself."""
    make, says = REFUSED[fault]
    make(tmp_path / "m")
    room = ("--max_context", 200) if says.endswith("positions") else ()
    assert refused(run("--model", tmp_path / "m", *room), says)


def test_srun_alone_gets_one_line(run, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert refused(run(), "srun", "torchrun")


def test_the_end_of_a_turn_need_not_be_the_eos():
    """A base model with a chat template: its EOS ends documents, the template's `<|end|>` turns."""
    tokenizer = toy_tokenizer(eos_token="<|pad|>")
    model = AutoModelForCausalLM.from_pretrained(TOY)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    engine = rollout.TransformersEngine(model.eval(), tokenizer, max_context=512)
    how = dict(temperature=1.0, max_new_tokens=80, seeds=[[1, 2, 3, 4]])
    (samples,) = engine.generate([render(tokenizer, "Add 123+456 digit by digit.")], 4, **how)
    assert all(s.finished and s.token_ids[-1] == 272 and "<|" not in s.text for s in samples)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "\n<|end|>")
    assert rollout.stop_ids(model, tokenizer) == {272, 273}
    tokenizer.chat_template = None
    assert rollout.stop_ids(model, tokenizer) == {273}


SECTIONS = "\nAnalysis: It must be 5.\nCorrected Solution:\n"
THOUGHTS = {  # what follows `<think>`, and its verdicts as an answer and as a correction
    "Is it \\boxed{5}?</think>\nIt is \\boxed{4}.": ("wrong", "wrong"),
    "Is it \\boxed{4}?</think>\nIt is \\boxed{5}.": ("right", "wrong"),  # without sections
    "Hm.</think>" + SECTIONS + "\\boxed{5}": ("right", "right"),
    "Hm.</think>" + SECTIONS + "\\boxed{4}": ("wrong", "wrong"),
    "Hm." + SECTIONS + "\\boxed{5}": ("wrong", "wrong"),  # it never stopped thinking
}


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_answers_and_corrections_are_graded_whatever_the_think_tags_are(special, opening):
    """Eqs. 1, 11. Special tokens, dropped in decoding, would let a box in the thinking count."""
    template = f"TOY{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    tokenizer = toy_tokenizer(template, special)
    assert (len(tokenizer("<think>").input_ids) == 1) == bool(special)
    task, samples = solution_task(tokenizer, Problem("2+3?", "5", ""), 0), []
    texts = ["<think>\n" + thought for thought in THOUGHTS]
    for text in texts:
        ids = tokenizer(text.removeprefix(opening)).input_ids + [tokenizer.eos_token_id]
        said = rollout.to_text(tokenizer, task.prompt, ids)
        samples.append(Sample(ids, [0.0] * len(ids), said, True))
    graded = {}
    with reward.Grader() as grader:
        for span in (None, "sections", "prefix"):
            group = rollout.Group(**vars(task), samples=[replace(s) for s in samples])
            rollout.grade_groups(grader, tokenizer, [group], span)
            graded[span] = group.samples
    verdicts = [(a.verdict, b.verdict) for a, b in zip(graded[None], graded["sections"])]
    assert verdicts == list(THOUGHTS.values())
    assert [sample.text for sample in samples] == texts
    spans = [sample.analysis for sample in graded["sections"]]
    assert [bool(span) for span in spans] == [False, False, True, True, False]
    start, end = spans[2]
    assert tokenizer.decode(samples[2].token_ids[start:end]).strip() == "It must be 5."
    assert graded["prefix"][2].analysis == (0, end)


MARKS = [
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"), ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
]  # fmt: skip


def test_stage_2_quotes_no_thinking(run, monkeypatch):
    """Whatever the marks are: it would be paid for the correction of a thought."""

    def said(tokenizer, prompt, ids, *_):
        place = sum(ids) % len(MARKS)
        opening, closing = MARKS[place]
        return f"{opening}Perhaps \\boxed{{5}}?{closing}It is {place}."

    monkeypatch.setattr(rollout, "to_text", said)
    done = run("--steps", 12, "--errors_per_question", 4, "--max_new_tokens", 60)
    quoted = "".join(line["prompt"] for line in done.samples if line["stage"] == 2)
    assert all(f"solution:\nIt is {place}.\n" in quoted for place in range(len(MARKS)))
    assert "Perhaps" not in quoted


@pytest.mark.parametrize("name", ["toy", "r1_distill_qwen", "smollm2_135m_instruct"])
def test_a_problem_writes_no_control_token(name):
    """Nor does a wrong response: `<|im_end|>` in it would end the user's turn."""
    folder = TOY if name == "toy" else SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent: real tokenizers are no part of the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = tokenizer.added_tokens_decoder.items()
    control = {i: str(token) for i, token in added if token.special or "think" in str(token)}

    def written(text):
        return [i for i in render(tokenizer, text) if i in control]

    one = min(control.values())
    for evil in (*control.values(), one[:2] + one + one[2:]):  # what is left may be one again
        assert written(f"1 {evil} 2") == written("1  2"), evil
    if tokenizer.bos_token_id is not None:  # the template writes its own
        assert render(tokenizer, "1?")[:2] != [tokenizer.bos_token_id] * 2
    tokenizer.chat_template = None
    assert written(f"1 {one} 2") == written("1  2")
    assert tokenizer.decode(render(tokenizer, "Is 1 < 2 > 0?")).endswith("Is 1 < 2 > 0?\n")


ANSWERS = {
    "120": "120", "$2$": "2", "\\$5": "\\$5", "so\n#### 1,005": "1,005", 120: "120",
    "<think>\\boxed{1}</think>\\boxed{7}": "7", 142.0: "142", 0.1 + 0.2: "0.3", -0.0: "0",
    1e-7: "0.0000001", 1e30: "1" + "0" * 30, 9007199254740991.0: "9007199254740991",
    Decimal("1.50"): "1.50",
}  # fmt: skip
NO_ANSWERS = (
    float("nan"), float("inf"), True, [], [""], [None], {"value": 3}, " ", "####", "\\boxed{", b"1",
)  # fmt: skip


def test_answers_are_read_rightly_or_refused():
    def read(value, field="answer"):
        row = {"question": "1+1?", field: value}
        return rollout.read_field(row, rollout.ANSWER_FIELDS, rollout.read_answer)

    lists = [(["120"], "120"), ([1, [2, 3.0]], "1, 2, 3")]
    for value, text in [*ANSWERS.items(), *lists]:
        assert read(value) == read(value, "final_answer") == text  # a string is a sequence too
    for value in NO_ANSWERS:
        with pytest.raises(ValueError, match="^field 'answer'.*`answer`$|is empty: fill it"):
            read(value)


GOLDS = [
    ({"solution": "$x = \\fbox{2}$ or $\\boxed{-2}$, so \\boxed{2}."}, "2, -2"),  # all that differ
    ({"reward_model": '{"ground_truth": "7", "style": "rule"}'}, "7"),
    ({"expected_answer": "8"}, "8"), ({"ground_truth": 9}, "9"),
]  # fmt: skip
NO_GOLDS = [{"solution": "By Fermat, QED."}, {"answer": "proof"}, {"answer": "notfound"}]


def test_golds_are_final_answers_and_a_run_shows_three(run, tmp_path):
    """A sentence or half of an answer as gold would make every response wrong, in silence."""
    golds = [{"problem": f"Q{i}?"} | row for i, (row, _) in enumerate(GOLDS)]
    none = [{"problem": "Why?"} | row for row in NO_GOLDS]
    done = run("--train_data", write(tmp_path / "a", *golds, *none), "--steps", 0, "--seed", 1)
    (line,) = done.errors
    assert f"{tmp_path / 'a'}, row {len(GOLDS)}" in line and f"{len(NO_GOLDS)} " in line
    found = load_problems(str(tmp_path / "a"))
    assert [problem.answer for problem in found] == [answer for _, answer in GOLDS]
    shown = done.out.partition("the first prompt")[0]
    assert all(problem.problem in shown and problem.answer in shown for problem in found[:3])
    assert refused(run("--train_data", write(tmp_path / "b", *none), out="none"), "b", "answer")


def turn(content, role="user"):
    return {"role": role, "content": content}


CHATS = (
    [turn("Be brief.", "system"), turn("1+1?")],
    [turn("2+2?"), turn("4", "assistant"), turn("1+1?")],
    [turn("1+1?"), turn("<think>\n", "assistant")],
    [turn([{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}])],
)
NO_CHATS = (
    [], [turn("x", "system")], [{"content": "x"}], [turn(None)], [turn([{"type": "image"}])],
    [turn(" ")], ["a"], 5,
)  # fmt: skip


def test_the_last_user_turn_is_the_problem(tmp_path):
    for chat in CHATS:
        (found,) = load_problems(str(write(tmp_path / "p.jsonl", {"prompt": chat, "answer": 2})))
        assert found.problem == "1+1?"
    for chat in NO_CHATS:
        rows = {"problem": "1?", "answer": 1}, {"prompt": chat, "answer": 2}
        with pytest.raises(ValueError, match=r"p.jsonl, row 1: field 'prompt'[^\n]*$"):
            load_problems(str(write(tmp_path / "p.jsonl", *rows)))


ROWS = [{"problem": "é?", "answer": "007"}, {"problem": "2?", "answer": "2"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def test_usual_files_are_read(tmp_path):
    chats, golds = [[turn("é?")], [turn("2?")]], [{"ground_truth": "007"}, {"ground_truth": "2"}]
    parquet.write_table(table({"prompt": chats, "reward_model": golds}), tmp_path / "a.parquet")
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "bom.jsonl").write_text(LINES, encoding="utf-8-sig")
    (tmp_path / "windows.jsonl").write_bytes(LINES.replace("\n", "\r\n\r\n").encode())
    (tmp_path / "no_ending").write_text(LINES)
    for file in tmp_path.iterdir():
        found = [(p.problem, p.answer) for p in load_problems(str(file))]
        assert found == [("é?", "007"), ("2?", "2")], file


BAD_FILES = {
    "u16.jsonl": LINES.encode("utf-16"), "latin.jsonl": LINES.encode("latin-1"),
    "a.jsonl.gz": b"\x1f\x8b\x08", "a.csv": b"problem,answer\n1?,1\n", "empty.jsonl": b"",
    "empty.parquet": b"", "bad.parquet": b"PAR1", "l.jsonl": b"[1]", "s.jsonl": b'"abc"',
    "null.jsonl": b'{"problem": null}', "cut.jsonl": b'{"problem": ', "absent": None,
    "surrogate.jsonl": b'{"problem": "\\ud800", "answer": 1}', "absent.csv": None,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_other_files_get_one_line(name, tmp_path):
    if BAD_FILES[name] is not None:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}[^\n]*(give|not an object)[^\n]*$"):
        load_problems(str(tmp_path / name))


def test_a_template_that_writes_the_time_is_noticed_on_resume(run, tmp_path):
    dated = toy_tokenizer("{{ strftime_now('%H:%M:%S.%f') }}TOY")
    model = tiny(tmp_path / "m", tokenizer=dated)
    assert run("--model", model).code == 0
    assert "begun with first_prompt" in run("--model", model, "--resume").errors[0]


YAML = {  # a settings file's lines, and what they mean; None: one line that names the setting
    "clip_high:\noutput_dir: ~\nbeta: null": {"clip_high": 0.2, "output_dir": None, "beta": 0.0},
    "steps: 12\nlearning_rate: 1e-6\nschedule: cosine": {"steps": 12, "learning_rate": 1e-6},
    "steps: 010": None, "steps: 1:30": None, "steps: 0x10": None, "save_every: [1]": None,
}  # fmt: skip


@pytest.mark.parametrize("lines", YAML)
def test_a_settings_file_says_what_it_says(lines, tmp_path, capsys):
    """To YAML 1.1, 010 is 8, and 1:30 is 90."""
    (tmp_path / "a.yaml").write_text(lines)
    arguments = [str(tmp_path / "a.yaml"), "--model", "m", "--train_data", "t"]
    if YAML[lines]:
        found = vars(train.parse(arguments))
        assert {name: found[name] for name in YAML[lines]} == YAML[lines]
    else:
        with pytest.raises((ValueError, SystemExit)) as fault:
            train.parse(arguments)
        assert lines.partition(":")[0] in f"{fault.value}{capsys.readouterr().err}"


def test_a_model_needs_its_data(run, launch, tmp_path):
    """The toy's sums and settings are for the toy alone."""
    assert refused(launch(tmp_path / "a", "--model", TOY, first=()), "--train_data")
    data = ("--train_data", write(tmp_path / "few", {"problem": "1+1?", "answer": "2"}))
    short = ("--steps", 0, "--max_new_tokens", 99)
    done = launch(tmp_path / "b", *data, "--model", TOY, *short, first=())
    assert done.code == 0 and "no evaluation" in done.out and "eval_accuracy" not in done.metrics[0]
    toy = train.parse([])
    assert (toy.steps, toy.learning_rate, Path(toy.eval_data).parent) == (60, 5e-4, TOY)
    assert train.parse([*map(str, data), "--model", "m"]).learning_rate == 1e-6


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_run_writes_into_its_own_folder_only(run, launch, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign"
    (foreign / "final").mkdir(parents=True)
    (foreign / "final" / "thesis.tex").write_text("years of work")
    (tmp_path / "settings").mkdir()
    write(tmp_path / "settings" / "settings.json", {"editor.fontSize": 12})
    monkeypatch.chdir(foreign)
    for name in (foreign, "", ".", tmp_path / "settings"):
        before = contents(tmp_path)
        for resume in ((), ("--resume",)):
            done = run("--steps", 1, "--output_dir", name, *resume)
            assert done.code == 2 and len(done.errors) == 1 and contents(tmp_path) == before, name
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "home").mkdir()  # new or empty: the run's own
    assert run("--steps", 0, "--output_dir", "~/home").code == 0
    assert (tmp_path / "home" / "final").exists() and not (foreign / "~").exists()


def test_no_clipping_is_no_clipping(run):
    """As in TRL and verl; a multiple of 0 would look healthy and move nothing."""
    off, wide = (run("--max_grad_norm", norm, out=f"{norm}") for norm in (0, 1e9))
    assert same_weights(off.weights, wide.weights)
    assert not same_weights(off.weights, load_file(TOY / "model.safetensors"))


def test_the_reference_is_the_same_when_a_run_goes_on(run, tmp_path):
    """By content: runs/a/final may be another model by now. Without a KL term none is read."""
    for beta in (0.1, 0.0):
        flags = ("--model", tiny(tmp_path / "m"), "--beta", beta)
        assert run(*flags, out=f"{beta}").code == 0
        tiny(tmp_path / "m", initializer_range=0.03)
        done = run(*flags, "--resume", "--steps", 2, out=f"{beta}")
        if beta:
            assert done.code == 2 and "begun with weights" in done.errors[0]
        else:
            assert done.code == 0 and done.steps[-1]["step"] == 2


def test_a_run_leaves_no_variable_behind(run):
    """A RANK would make the next call, or a child, believe in a torchrun that is not there."""
    before = set(os.environ)
    assert run("--steps", 0).code == 0 and set(os.environ) == before
    death_signal = ctypes.c_int()  # and without torchrun, a run survives the shell that started it
    ctypes.CDLL(None).prctl(2, ctypes.byref(death_signal))  # PR_GET_PDEATHSIG
    assert death_signal.value == 0


def test_a_terminal_without_chinese_shows_escapes(tmp_path):
    data = write(tmp_path / "p.jsonl", {"problem": "一加一?", "answer": "2"})
    flags = ("--train_data", data, "--eval_data", data, "--output_dir", tmp_path / "out")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with redirect_stdout(terminal):
        train.main([*FLAGS, *map(str, flags)])
    terminal.flush()
    assert rb"\u4e00" in terminal.buffer.getvalue()


def test_a_run_that_cannot_learn_says_so_once(run, monkeypatch):
    toy = ("--max_new_tokens", 60, "--eval_questions", 0, "--train_data", TOY / "test.jsonl")
    cut = run(*toy, "--steps", 6, "--max_new_tokens", 2, out="cut", one_right_of=10**9)
    wrong = run(*toy, "--steps", 6, out="wrong", one_right_of=10**9)
    monkeypatch.setattr(reward, "find_correction", lambda *_: None)
    shapeless = run(*toy, "--steps", 3, out="shapeless")
    (of_cut,), (of_wrong,), (of_shapeless,) = cut.errors, wrong.errors, shapeless.errors
    assert "every response was cut off; usually --max_new_tokens is low" in of_cut
    assert "every response was wrong" in of_wrong and "boxed" in of_wrong
    assert "visit 1 to stage 2 trained on nothing" in of_shapeless
    assert "`Corrected Solution:`" in of_shapeless
