"""What users bring: models, tokenizers, templates, files, terminals. Each test is a kind of fault
from public reports: it works, or one line at the start says what is wrong."""

import io
import json
import os
from contextlib import redirect_stdout
from decimal import Decimal

import pytest
import torch
from conftest import ROOT, TOY
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
    monkeypatch.setattr(train, "plot", lambda *_: None)  # a second each

    def main(*flags, one_right_of=3, out="out"):
        def coin(_, responses, golds):
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
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINS)
def test_a_model_trains_on_its_own_log_probabilities(kind, run, tmp_path):
    """Prompts of 17 to 324 tokens, windows of 16 and 64: engine (cache, padding on the left, rows
    dropped) and trainer (none of it) agree, and final/ has the same tensors, moved."""
    rows = [{"problem": "Add 1+2" + " again" * n, "answer": "3"} for n in (0, 3, 154, 40)]
    longest = render(toy_tokenizer(), rollout.solution_prompt(rows[2]["problem"]))
    model, data = tiny(tmp_path / "m", kind, **TRAINS[kind]), write(tmp_path / "p.jsonl", *rows)
    done = run("--model", model, "--train_data", data, "--gradient_checkpointing", kind == "gpt2")
    assert done.code == 0 and not done.errors and len(longest) >= 324
    assert done.steps[0]["logp_gap_max"] < 1e-3
    before, after = load_file(model / "model.safetensors"), done.weights
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


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
    "no cache": (lambda m: tiny(m, "mamba"), "--rollout transformers cannot be had"),
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
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_cannot_be_used_gets_one_line(fault, run, tmp_path):
    """Whatever a model does to its logits is seen by comparing once with the model itself."""
    make, says = REFUSED[fault]
    make(tmp_path / "m")
    assert refused(run("--model", tmp_path / "m"), says)


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
    with reward.Grader() as grader:
        of = [rollout.grade_groups(grader, tokenizer, [task], [samples], span)[0]
              for span in (None, "sections", "prefix")]  # fmt: skip
    answers, corrections, prefix = of
    assert list(zip(answers.verdicts, corrections.verdicts)) == list(THOUGHTS.values())
    assert [sample.text for sample in samples] == texts
    assert [bool(span) for span in corrections.spans] == [False, False, True, True, False]
    start, end = corrections.spans[2]
    assert tokenizer.decode(samples[2].token_ids[start:end]).strip() == "It must be 5."
    assert prefix.spans[2] == (0, end)


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


def test_a_run_leaves_no_variable_behind(run):
    """A RANK would make the next call, or a child, believe in a torchrun that is not there."""
    before = set(os.environ)
    assert run("--steps", 0).code == 0 and set(os.environ) == before


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
    monkeypatch.setattr(rollout, "find_correction", lambda *_: None)
    shapeless = run(*toy, "--steps", 3, out="shapeless")
    (of_cut,), (of_wrong,), (of_shapeless,) = cut.errors, wrong.errors, shapeless.errors
    assert "every response was cut off; usually --max_new_tokens is low" in of_cut
    assert "every response was wrong" in of_wrong and "boxed" in of_wrong
    assert "visit 1 to stage 2 trained on nothing" in of_shapeless
    assert "`Corrected Solution:`" in of_shapeless
