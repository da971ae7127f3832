"""What users bring: models, tokenizers, templates, files, terminals. Each test is a kind of fault that public
reports name (LESSONS 23 to 32): the run must be right, or say in one line at the start what is wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pyarrow import parquet, table
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reward
import rollout
import train
from rollout import Problem, Sample, ask, load_problems, render, sample_seed

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy"
SHARED = ROOT.parent / "shared" / "tokenizers"
SMALL = "--questions_per_step 4 --group_size 4 --pool_trigger 4 --eval_questions 2 --steps 1 --schedule constant"
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, bos_token_id=None)  # fmt: skip


def toy_tokenizer(template=None, special=(), **settings):
    """The toy's tokenizer with another template, further special tokens, other attributes."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    tokenizer.add_tokens(list(special), special_tokens=True)
    if template:
        tokenizer.chat_template = template.replace("TOY", tokenizer.chat_template)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


def tiny(folder, kind="qwen3", tokenizer=None, **config):
    """A random model of this architecture. The head's weights are large, so that what is left out after it, or
    in the attention, shows in log p."""
    tokenizer = tokenizer or toy_tokenizer()
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**ids, **SIZE, **config}))
    model.get_output_embeddings().weight.data *= 20
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Coin:
    """Grades without looking, so that a random model has something to learn from."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def verdicts(self, responses, golds):
        return ["right" if i % 3 == 0 else "wrong" for i in range(len(responses))]


class Wrong(Coin):
    def verdicts(self, responses, golds):
        return ["wrong"] * len(responses)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags) -> exit code, lines of error and warning, metrics, folder; in this process, as one rank."""

    def main(*flags, grader=Coin, out=None, small=SMALL):
        folder = Path(out or tmp_path / "out")
        monkeypatch.setattr(train, "Grader", grader)
        monkeypatch.setattr(train, "plot", lambda *_: None)  # a second each
        said, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(said), redirect_stderr(err):
            try:
                where = [] if "--output_dir" in flags else ["--output_dir", folder]
                train.main([str(flag) for flag in (*small.split(), "--max_new_tokens", 16, *where, *flags)])
            except SystemExit as end:
                code = end.code
        metrics = folder / "metrics.jsonl"
        metrics = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        lines = re.findall(r"(?:error|warning): [^\r\n]*", err.getvalue())
        return SimpleNamespace(code=code, lines=lines, metrics=metrics, folder=folder, out=said.getvalue())

    return main


def refused(result, *words):
    """One line, exit code 2, nothing written."""
    assert result.code == 2 and len(result.lines) == 1, result.lines
    assert result.lines[0].startswith("error: ") and all(word in result.lines[0] for word in words), result.lines
    assert not result.folder.exists()
    return True


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------ models

TRAINS = {
    "gpt2": dict(n_positions=1024),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": {},
    "bloom": {},
    "phi": {},  # a bias on its head
    "mistral": dict(sliding_window=64),
    "phi3": dict(sliding_window=64, original_max_position_embeddings=1024),
    "qwen2": dict(use_sliding_window=True, sliding_window=16, max_window_layers=1, vocab_size=277),
    "gemma2": dict(sliding_window=16, final_logit_softcapping=None),  # attention that is capped
    "gemma3_text": dict(sliding_window=16),
    "lfm2": dict(layer_types=["conv", "full_attention"]),  # a layer without keys
}


@pytest.mark.parametrize("kind", TRAINS)
def test_a_model_trains_on_its_own_log_probabilities(kind, run, tmp_path):
    """Prompts of 17 to 324 tokens, a window of 16 or 64: engine (cache, padding) and trainer (neither) agree."""
    rows = [{"problem": "Add 1+2" + " again" * n, "answer": "3"} for n in (0, 3, 154, 40)]
    data = write(tmp_path / "p.jsonl", *rows)
    model = tiny(tmp_path / "m", kind, **TRAINS[kind])
    lengths = [len(render(toy_tokenizer(), rollout.solution_prompt(row["problem"]))) for row in rows]
    assert max(lengths) >= 324 and min(lengths) < 30
    done = run("--model", model, "--train_data", data, "--eval_data", data)
    assert done.code == 0 and done.lines == [] and done.metrics[1]["logp_gap_max"] < 1e-3
    before, after = load_file(model / "model.safetensors"), load_file(done.folder / "final" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


REFUSED = {
    "granite": dict(logits_scaling=8.0),
    "nanochat": {},
    "cohere": dict(logit_scale=0.0625),
    "gemma2": dict(final_logit_softcapping=3.0),
    "bert": {},  # looks both ways
    "mamba": {},  # has no cache
}


@pytest.mark.parametrize("kind", REFUSED)
def test_logits_that_are_not_the_head_s_are_refused(kind, run, tmp_path):
    """The trainer has hidden states and head alone; whatever a model does after it is seen by comparing once."""
    done = run("--model", tiny(tmp_path / "m", kind, **REFUSED[kind]))
    assert done.code == 2 and len(done.lines) == 1 and not done.metrics
    assert ("engine" if kind == "mamba" else "logits") in done.lines[0]


def edit(name, **changes):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def lose_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "an adapter": (lambda folder: write(folder / "adapter_config.json"), "adapter: merge it"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"123"), "causal language model"),
    "a layer without weights": (lose_a_layer, "no weights for ['model.layers.1.mlp"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "causal language model"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "its tokenizer has"),
    "temperature without do_sample": (edit("generation_config.json", temperature=0.6), "do_sample"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_folder_gets_one_line(fault, run, tmp_path):
    change, says = BROKEN[fault]
    change(tiny(tmp_path / "m"))
    assert refused(run("--model", tmp_path / "m"), says)


def test_settings_that_sampling_needs_are_no_fault(run, tmp_path):
    """do_sample beside temperature; several stop ids; half precision; padding is the end token, or there is none."""
    tokenizer = toy_tokenizer(pad_token="<|end|>")
    folder = tiny(tmp_path / "m", tokenizer=tokenizer)
    AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    edit("generation_config.json", temperature=0.6, do_sample=True, eos_token_id=[272, 5])(folder)
    done = run("--model", folder)
    assert done.code == 0 and done.lines == []
    assert load_file(done.folder / "final" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "layers, width, tokens", [(3, 96, 16384), (30, 576, 2048), (28, 1536, 1024), (28, 3584, 512)]
)
def test_micro_batches_follow_the_model_s_size(layers, width, tokens):
    """The toy's stay as they are; SmolLM2-135M takes 0.9 to 1.3 MiB of activations a token [measured]."""
    tokenizer = toy_tokenizer()
    config = SimpleNamespace(hidden_size=width, num_hidden_layers=layers, max_position_embeddings=2048)
    run = train.Run(train.Config(), 0, 1, torch.device("cpu"))
    run.problems, run.tokenizer, run.model = [Problem("1+1?", "2", "")], tokenizer, SimpleNamespace(config=config)
    train.settle(run, run.problems)
    assert run.config.micro_batch_tokens == tokens


# ------------------------------------------------------------------------------------- tokenizers and templates

TEMPLATES = {
    "leaves the user's text out": ("{% for m in messages %}<|user|>x{% endfor %}", "leaves out what the user says"),
    "changes it": ("<|user|>{{ messages[0].content | upper }}", "leaves out what the user says"),
    "wants content parts": ("<|user|>{% for p in messages[0].content %}{{ p.text }}{% endfor %}", "leaves out"),
    "raises": ("{{ raise_exception('a system turn, please') }}", "a system turn, please"),
    "wants parts, strictly": ("<|user|>{{ messages[0].content[0].text }}{{ x.y }}", "fails on a turn of user"),
    "is no template": ("{% for %}", "fails on a turn of user"),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_that_cannot_ask_gets_one_line(fault, run, tmp_path):
    template, says = TEMPLATES[fault]
    assert refused(run("--model", tiny(tmp_path / "m", tokenizer=toy_tokenizer(template))), "template", says)


def test_ids_beyond_the_embedding_get_one_line(run, tmp_path):
    tokenizer = toy_tokenizer(special=["<a>", "<b>"])
    assert refused(run("--model", tiny(tmp_path / "m", tokenizer=tokenizer, vocab_size=276)), "278 ids", "276 rows")


def test_the_end_of_a_turn_need_not_be_the_eos():
    """A base model with a chat template: its EOS ends documents, its template's `<|end|>` ends turns."""
    tokenizer, model = toy_tokenizer(eos_token="<|pad|>"), AutoModelForCausalLM.from_pretrained(TOY).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert rollout.stop_ids(model, tokenizer) == {272, 273}
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "\n<|end|>")
    assert rollout.stop_ids(model, tokenizer) == {272, 273}
    engine = rollout.TransformersEngine(model, tokenizer, max_context=512)
    how = dict(temperature=1.0, max_new_tokens=80, seeds=[[1, 2, 3, 4]])
    ((*samples,),) = engine.generate([render(tokenizer, "Add 123+456 digit by digit.")], 4, **how)
    assert all(s.finished and s.token_ids[-1] == 272 and "<|" not in s.text for s in samples)
    for template in ("{{ raise_exception('no') }}", None):  # without one there is nothing to look at
        tokenizer.chat_template = template
        if template:
            with pytest.raises(ValueError, match="fails on a turn of assistant"):
                rollout.stop_ids(model, tokenizer)
    assert rollout.stop_ids(model, tokenizer) == {273}


RESPONSES = {
    "<think>\nIs it \\boxed{5}?</think>\nIt is \\boxed{4}.": "wrong",
    "<think>\nIs it \\boxed{4}?</think>\nIt is \\boxed{5}.": "right",
    "<think>\nIt is \\boxed{5}": "wrong",
    "It is \\boxed{5}.": "right",
}
CORRECTION = "Analysis: It must be 5.\nCorrected Solution:\n\\boxed{5}"


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("prefilled", [False, True])
def test_think_tags_count_the_same_when_they_are_special_tokens(special, prefilled):
    """`skip_special_tokens` would drop them: then a box inside the thinking counts, or no answer is ever right."""
    tokenizer = toy_tokenizer("TOY{% if add_generation_prompt %}<think>\n{% endif %}" if prefilled else "TOY", special)
    assert (tokenizer("<think>").input_ids[0] >= 276) == bool(special)
    task = ask(tokenizer, Problem("2+3?", "5", ""), 0)
    opening = "<think>\n" if prefilled else ""

    def samples(texts):
        texts = [text.removeprefix(opening) for text in texts]
        encoded = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
        return [[Sample(ids, [0.0] * len(ids), rollout.to_text(tokenizer, task.prompt, ids), True) for ids in encoded]]

    texts = [text for text in RESPONSES if text.startswith(opening)]
    thought = opening + "Hm.</think>\n" if prefilled else "<think>Hm.</think>\n"
    with reward.Grader() as grader:
        (group,) = rollout.grade_groups(grader, tokenizer, [task], samples(texts), None)
        assert group.verdicts == [RESPONSES[text] for text in texts]
        assert [s.text for s in group.samples] == texts
        (group,) = rollout.grade_groups(
            grader, tokenizer, [task], samples([thought + CORRECTION, opening + CORRECTION]), "sections"
        )
    assert group.verdicts == ["right", "wrong" if prefilled else "right"]
    start, end = group.spans[0]
    assert tokenizer.decode(group.samples[0].token_ids[start:end]).strip() == "It must be 5."
    assert (group.spans[1] is None) == prefilled  # thinking that never closed


def control_ids(tokenizer, text):
    of_control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or "think" in str(token)}
    return [i for i in render(tokenizer, text) if i in of_control]


@pytest.mark.parametrize("name", ["toy", "r1_distill_qwen", "smollm2_135m_instruct"])
def test_a_problem_writes_no_control_token(name):
    """Nor does a wrong response: `<|im_end|>` in it would end the user's turn."""
    folder = TOY if name == "toy" else SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent: real tokenizers are not part of the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    names += ["<think>", "</think>"] if name.startswith("r1") else []
    for evil in (*names, names[0][:2] + names[0] + names[0][2:]):
        assert control_ids(tokenizer, f"1 {evil} 2") == control_ids(tokenizer, "1  2"), evil
    tokenizer.chat_template = None
    assert control_ids(tokenizer, f"1 {names[0]} 2") == control_ids(tokenizer, "1  2")
    assert render(tokenizer, "Is 1 < 2 > 0?")[-9:] == tokenizer("Is 1 < 2 > 0?\n").input_ids[-9:]  # no tokens


def test_bos_comes_once_and_a_template_may_strip():
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy_tokenizer("<|user|>" + "{{ messages[0].content | trim }}", bos_token="<|user|>")
    processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    assert tokenizer.decode(render(tokenizer, " 1+1? \n")) == "<|user|>1+1?"
    tokenizer.chat_template = None
    assert tokenizer.decode(render(tokenizer, "1+1?")) == "<|user|>1+1?\n"


# -------------------------------------------------------------------------------------------------------- files

ANSWERS = {
    "120": "120", "$2$": "2", "\\$5": "\\$5", "so\n#### 1,005": "1,005", "<think>\\boxed{1}</think>\\boxed{7}": "7",
    120: "120", 10**20: "1" + "0" * 20, 142.0: "142", 0.1 + 0.2: "0.3", 1e-7: "0.0000001", 1e30: "1" + "0" * 30,
    -0.0: "0", 9007199254740991.0: "9007199254740991", Decimal("1.50"): "1.50",
}  # fmt: skip
NO_ANSWERS = (float("nan"), float("inf"), True, False, [], [""], [None], {"value": 3}, " ", "####", "\\boxed{", b"12")


def test_answers_are_read_rightly_or_refused_by_row_and_field(tmp_path):
    for fields in (("question", "final_answer"), ("problem", "answer")):  # a string is a sequence too
        for value, text in [*ANSWERS.items(), (["120"], "120"), ([1, [2, 3.0]], "1, 2, 3")]:
            row = dict(zip(fields, ("1+1?", value)))
            assert rollout.read_field(row, rollout.ANSWER_FIELDS, rollout.read_answer) == text, value
    for value in NO_ANSWERS:
        with pytest.raises(ValueError, match="^field 'answer'"):
            rollout.read_field({"problem": "1?", "answer": value}, rollout.ANSWER_FIELDS, rollout.read_answer)
    file = write(tmp_path / "p.jsonl", {"problem": "1?", "answer": 1}, {"problem": "2?", "answer": float("nan")})
    with pytest.raises(ValueError, match=r"p.jsonl, row 1: field 'answer' holds nan .*give text in `answer`$"):
        load_problems(str(file))


def turn(content, role="user"):
    return {"role": role, "content": content}


CHATS = {
    "a system turn": [turn("Be brief.", "system"), turn("1+1?")],
    "several turns": [turn("2+2?"), turn("4", "assistant"), turn("1+1?")],
    "the assistant begins": [turn("1+1?"), turn("<think>\n", "assistant")],
    "content in parts": [turn([{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}])],
}
NO_CHATS = ([], [turn("x", "system")], [{"content": "x"}], [turn(None)], [turn([{"type": "image"}])], 5, ["a"], [turn(" ")])


def test_the_last_user_turn_is_the_problem(tmp_path):
    for chat in CHATS.values():
        (found,) = load_problems(str(write(tmp_path / "p.jsonl", {"prompt": chat, "answer": 2})))
        assert found.problem == "1+1?"
    for chat in NO_CHATS:
        with pytest.raises(ValueError, match=r"p.jsonl, row 0: field 'prompt'.*") as error:
            load_problems(str(write(tmp_path / "p.jsonl", {"prompt": chat, "answer": 2})))
        assert "\n" not in str(error.value)


ROWS = [{"problem": "é?", "answer": "007"}, {"problem": "2?", "answer": "2"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def test_usual_files_are_read(tmp_path):
    parquet.write_table(table({"prompt": [[turn("be brief", "system"), turn("é?")], [turn("2?")]],
                               "reward_model": [{"ground_truth": "007"}, {"ground_truth": "2"}]}),
                        tmp_path / "a.parquet")  # fmt: skip
    parquet.write_table(table({"problem": ["é?", "2?"], "answer": ["007", "2"]}), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "bom.jsonl").write_text(LINES, encoding="utf-8-sig")
    (tmp_path / "windows.jsonl").write_text(LINES.replace("\n", "\r\n\r\n"), newline="")
    (tmp_path / "no_ending").write_text(LINES)
    for file in tmp_path.iterdir():
        assert [(p.problem, p.answer) for p in load_problems(str(file))] == [("é?", "007"), ("2?", "2")], file


BAD_FILES = {
    "u16.jsonl": LINES.encode("utf-16"), "latin.jsonl": LINES.encode("latin-1"), "a.jsonl.gz": b"\x1f\x8b\x08",
    "a.csv": b"problem,answer\n1?,1\n", "empty.jsonl": b"", "empty.parquet": b"", "bad.parquet": b"PAR1", "l.jsonl": b"[1]",
    "surrogate.jsonl": b'{"problem": "\\ud800", "answer": 1}', "s.jsonl": b'"abc"', "no.jsonl": b'{"problem": null}',
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD_FILES, "absent.jsonl", "absent", "folder"])
def test_other_files_get_one_line(name, tmp_path):
    file = tmp_path / name
    file.mkdir() if name == "folder" else file.write_bytes(BAD_FILES[name]) if name in BAD_FILES else None
    with pytest.raises(ValueError) as error:
        load_problems(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert re.search(r"; give |give rows|give it a field|not an object", str(error.value))
    assert not re.search("row", name) or "row 0" in str(error.value)


# --------------------------------------------------------------------------------------------- runs and machines


def test_a_resumed_run_has_the_same_problems_and_prompts(run, tmp_path):
    dated = toy_tokenizer("{{ strftime_now('%H:%M:%S.%f') }}TOY")
    data = shutil.copy(TOY / "train.jsonl", tmp_path / "p.jsonl")
    held_out = shutil.copy(TOY / "test.jsonl", tmp_path / "t.jsonl")
    flags = ("--model", tiny(tmp_path / "m"), "--train_data", data, "--eval_data", held_out)
    assert run(*flags).code == 0
    assert run(*flags, "--resume", "--steps", 2).code == 0
    for file in (data, held_out):
        rows = Path(file).read_text()
        Path(file).write_text(rows.replace('"answer": "', '"answer": "1'))
        done = run(*flags, "--resume", "--steps", 3)
        assert done.code == 2 and "began with problems" in done.lines[0] and len(done.metrics) == 3
        Path(file).write_text(rows)
    assert run("--model", tiny(tmp_path / "n", tokenizer=dated), out=tmp_path / "dated").code == 0
    done = run("--model", tmp_path / "n", "--resume", out=tmp_path / "dated")
    assert done.code == 2 and "began with first_prompt" in done.lines[0]


def test_main_can_be_called_again_and_by_a_parent(run, tmp_path):
    """A notebook calls it again, after a slip too; and nothing it leaves in the environment misleads a child."""
    before = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    assert refused(run("--learning_rat", 1), "unknown argument --learning_rat")
    folder = tiny(tmp_path / "m")
    assert run("--model", folder).code == 0 == run("--model", folder, out=tmp_path / "again").code
    added = os.environ.keys() - before.keys()
    assert not added & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    child = "import rollout; print(rollout.start_distributed()[:2])"
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(0, 1)\n", done.stderr


def test_srun_alone_gets_one_line(run, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert refused(run(), "srun", "torchrun")


def test_a_terminal_without_chinese_shows_escapes(tmp_path, monkeypatch):
    data = write(tmp_path / "p.jsonl", {"problem": "一加一?", "answer": "2"})
    model = tiny(tmp_path / "m")
    monkeypatch.setattr(train, "Grader", Coin)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        train.main([str(flag) for flag in (*SMALL.split(), "--model", model, "--max_new_tokens", 8, "--train_data", data,
                                           "--eval_data", data, "--output_dir", tmp_path / "out")])  # fmt: skip
    streams[0].flush()
    assert b"\\u4e00" in streams[0].buffer.getvalue() and (tmp_path / "out" / "final").exists()


def test_a_run_that_cannot_learn_says_so_once(run, tmp_path, monkeypatch):
    flags = ("--model", tiny(tmp_path / "m"), "--steps", 6, "--eval_questions", 0)
    cut = run(*flags, "--max_new_tokens", 2, out=tmp_path / "cut", grader=Wrong)
    assert len(cut.lines) == 1 and "every response was cut off: raise --max_new_tokens" in cut.lines[0]
    toy = ("--steps", 6, "--max_new_tokens", 60, "--eval_questions", 0)
    wrong = run(*toy, out=tmp_path / "wrong", grader=Wrong)
    assert len(wrong.lines) == 1 and "every response was wrong" in wrong.lines[0] and "boxed" in wrong.lines[0]
    monkeypatch.setattr(rollout, "find_correction", lambda *_: None)
    shapeless = run(*toy, "--steps", 3, out=tmp_path / "shapeless")
    assert len(shapeless.lines) == 1 and "visit 1 to stage 2 trained on nothing" in shapeless.lines[0]
    assert "`Corrected Solution:`" in shapeless.lines[0]


FLAGS = {
    "a prompt beyond the context": (("--max_context", 20), "no prompt fits the context of 20"),
    "a response beyond the context": (("--max_new_tokens", 5000), "no prompt fits the context of 1024"),
    "a model that is a file": (("--model", TOY / "config.json"), "config.json"),
    "a model that is not there": (("--model", "/nowhere/at/all"), "/nowhere/at/all"),
    "data that are not there": (("--train_data", "/nowhere/p.jsonl"), "/nowhere/p.jsonl"),
    "an output that is a file": (("--output_dir", TOY / "config.json"), "config.json"),
    "an output below a file": (("--output_dir", TOY / "config.json" / "x"), "config.json"),
}


@pytest.mark.parametrize("fault", FLAGS)
def test_flags_that_cannot_work_get_one_line(fault, run, tmp_path):
    flags, says = FLAGS[fault]
    assert refused(run("--model", tiny(tmp_path / "m"), *flags), says)


def test_settings_that_are_a_list_get_one_line(run, tmp_path):
    (tmp_path / "s.yaml").write_text("- steps: 3\n")
    assert refused(run(small=str(tmp_path / "s.yaml")), "s.yaml", "name: value")


def test_one_long_problem_is_left_out(run, tmp_path):
    rows = [{"problem": "x " * (2000 if i == 1 else 2), "answer": 1} for i in range(3)]
    done = run("--model", tiny(tmp_path / "m"), "--train_data", write(tmp_path / "p.jsonl", *rows))
    assert done.code == 0 and done.lines == ["warning: --train_data: 1 of 3 do not fit the context of 1024 tokens with "
                                             "--max_new_tokens 16; left out"]  # fmt: skip


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*gb.yaml")) + sorted((ROOT / "configs").glob("*gpu.yaml")))
def test_a_micro_batch_of_the_settings_holds_the_longest_sequence(file):
    """With the context that the run needs: a question of 1,024 tokens, Eq. 10's words, two whole responses."""
    settings = yaml.safe_load(file.read_text())
    assert "max_context" not in settings
    for limit in (32_768, 131_072):
        assert rollout.needed_context(1024, 80, settings["max_new_tokens"], limit) <= settings["micro_batch_tokens"]
