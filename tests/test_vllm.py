"""vLLM's engine beside a trainer: on vLLM's CPU build or, unchanged, on a GPU, where it has CUDA
graphs, bfloat16 and real sleep (two ranks need two GPUs):

    pip install -r requirements-vllm.txt && python -m pytest tests/test_vllm.py

The tests with a fake vLLM need neither. Every rank of the others runs `worker`, at the end.
"""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout

ROOT = str(Path(__file__).resolve().parent.parent)
TOY = f"{ROOT}/toy"
PADDING = 37  # rows of the embedding that no token has
GPU = torch.cuda.is_available()
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

# (mean, max) of |log pi - log mu|. In bfloat16 means of 0.01 to 0.02 are reported of healthy runs,
# 0.2 of stale weights, and single tokens differ by more. One step of SGD here makes a mean of 0.5.
AGREE = (0.05, 1.0) if GPU else (1e-4, 1e-3)
STALE = (0.1, 1.0)

RUNS = {  # name: what starts its workers, how many they are, is the head tied to the embedding
    "python": ("", 1, True),
    "torchrun": ("-m torch.distributed.run --standalone --nproc_per_node=1", 1, False),
    "two ranks": ("-m torch.distributed.run --standalone --nproc_per_node=2", 2, True),
}


@functools.cache
def reports(run: str) -> list[dict]:
    """What the run's workers found, by rank; what they assert themselves fails here."""
    launcher, ranks, tied = RUNS[run]
    if not importlib.util.find_spec("vllm"):
        pytest.skip("no vLLM: pip install -r requirements-vllm.txt, without a GPU -vllm-cpu.txt")
    if GPU and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need {ranks} GPUs")
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH} | {"PYTHONPATH": ROOT}
    if not GPU:
        environment |= dict(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, tied)
        command = [sys.executable, *launcher.split(), __file__, folder]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        for noise in ("Failed to load weights", "global random seed", "process group"):
            assert noise not in done.stderr
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def save_model(folder: str, tied: bool) -> None:
    """The toy with rows past its tokenizer, of likely ids if they were not forbidden."""
    tokenizer, model = AutoTokenizer.from_pretrained(TOY), AutoModelForCausalLM.from_pretrained(TOY)
    model.resize_token_embeddings(len(tokenizer) + PADDING)
    embedding = model.get_input_embeddings().weight.data
    embedding[len(tokenizer) :] = 1.5 * embedding[tokenizer("Step 1").input_ids[-1]]
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(1.1 * embedding)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("run", RUNS)
def test_engine_and_trainer_agree_unless_a_push_was_skipped(run):
    for report in reports(run):
        print(run, report["gaps"])
        mean, most = report["gaps"].pop("push skipped")
        assert mean > STALE[0] and most > STALE[1]
        for mean, most in report["gaps"].values():
            assert mean <= AGREE[0] and most <= AGREE[1]


@pytest.mark.skipif(GPU, reason="on a GPU the batch decides the last bit of a logit")
def test_a_sample_follows_from_its_seed_on_any_rank():  # where it is in another batch
    (alone,), both = reports("python"), reports("two ranks")
    assert alone["ids"] == [both[b % 2]["ids"][b // 2] for b in range(11)]
    assert len({str(ids) for ids in alone["ids"][0]}) > 1


# ------------------------------------------------------------------------------------- a fake vLLM


@pytest.fixture
def fake():
    """A stand-in for vllm.LLM that changes in the process what the real one does."""

    def build(*_, **__):
        torch.set_num_threads = lambda count: None
        torch.backends.cuda.enable_cudnn_sdp(False)
        return mock.DEFAULT  # the return value

    llm = mock.Mock(side_effect=build)
    ours = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment = mock.patch.dict(os.environ, ours, clear=True)
    with environment, mock.patch.dict(sys.modules, vllm=mock.Mock(LLM=llm)):
        yield llm


def on_cuda(beyond=0) -> rollout.VLLMEngine:
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    model = mock.Mock(device=torch.device("cuda"), dtype=torch.bfloat16)
    model.config.vocab_size, model.generation_config.eos_token_id = len(tokenizer) + beyond, 272
    return rollout.VLLMEngine(model, tokenizer, model_path="padded", max_context=32_768)


def test_more_ids_than_a_gpu_can_forbid_are_refused_in_one_line(fake):
    assert len(on_cuda(1024).forbidden) == 1024
    with pytest.raises(ValueError, match="^--model padded: 1,025 .* --rollout transformers$"):
        on_cuda(1025)


def test_on_cuda_weights_wake_before_a_push_and_the_cache_after_it(fake):
    engine, model, said = on_cuda(), mock.Mock(state_dict=dict), mock.call
    engine.sleep()
    with pytest.raises(RuntimeError, match="needs update_weights"):
        engine.generate([], 1, temperature=1.0, max_new_tokens=1, seeds=[])
    engine.update_weights(model)
    assert engine.llm.mock_calls == [
        said.sleep(level=2),
        said.wake_up(tags=["weights"]),
        said.collective_rpc("reload_weights", kwargs=mock.ANY),
        said.wake_up(tags=["kv_cache"]),
        said.reset_prefix_cache(),
    ]
    engine.llm.reset_prefix_cache.return_value = False
    with pytest.raises(RuntimeError, match="keys and values of the old weights"):
        engine.update_weights(model)
    with pytest.raises(RuntimeError, match="needs update_weights"):  # nothing is sampled with them
        engine.generate([], 1, temperature=1.0, max_new_tokens=1, seeds=[])


def test_the_process_stays_the_trainer_s_and_the_environment_the_user_s(fake, caplog):
    before = process()
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "1"
    on_cuda()
    assert process() == before
    settings = fake.call_args.kwargs
    assert settings["max_num_batched_tokens"] == 8192
    assert settings["enable_flashinfer_autotune"] is False
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == os.environ["VLLM_NO_USAGE_STATS"] == "1"
    log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    for layer in ("Llama3RotaryEmbedding", "RowParallelLinear"):
        log.warning("%s: Failed to load weights", layer)  # what vLLM says
    log = logging.getLogger("vllm.engine.arg_utils")
    log.warning("The global random seed is set to %d. Since ...", 0)
    log.warning("another")
    assert caplog.messages == ["RowParallelLinear: Failed to load weights", "another"]


def test_the_start_is_announced_before_it_begins(fake, capsys):
    """Two minutes of compiling; machines of other kinds would take the same compiled kernels."""
    said = []
    fake.side_effect = lambda *_, **__: said.append(capsys.readouterr().err)
    on_cuda()
    assert said[0].startswith("note: vLLM starts") and "VLLM_CACHE_ROOT" in said[0]


def start(**options):
    tokenizer, model = AutoTokenizer.from_pretrained(TOY), AutoModelForCausalLM.from_pretrained(TOY)
    options = {"model_path": TOY, "max_context": 99, **options}
    return rollout.make_engine("vllm", model, tokenizer, **options)


def test_what_is_not_installed_is_one_line_and_any_other_failure_keeps_its_traceback(fake):
    """`train.py` shows the message alone of a ValueError and of an OSError."""
    fake.side_effect = ImportError("libcudart.so.13: cannot open shared object file")
    with pytest.raises(ValueError, match="libcudart.*install requirements-vllm.txt"):
        start()
    for fault in (ValueError("No available memory"), OSError("disk"), RuntimeError("CUDA error")):
        fake.side_effect = fault
        with pytest.raises(RuntimeError) as raised:
            start()
        assert fault in (raised.value, raised.value.__cause__)
    with mock.patch.dict(sys.modules, vllm=None), pytest.raises(ValueError, match="install"):
        start()


def test_close_wakes_what_sleeps(fake):
    """vLLM would free memory that is not mapped: hundreds of CUDA errors under a good run."""
    for asleep in (True, False):
        engine, said = on_cuda(), mock.call
        engine.llm.reset_mock()
        if asleep:
            engine.sleep()
        engine.close()
        wakes = [said.sleep(level=2), said.wake_up()] * asleep
        assert engine.llm.mock_calls == [*wakes, said.llm_engine.engine_core.shutdown()]


# ------------------------------------------------------------------------------------ in every rank


def process() -> dict:
    """What building an engine must leave as it is. Global random states are not among it: no
    sample, order or weight of a run follows from one."""
    return {
        "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "threads": (torch.set_num_threads, torch.get_num_threads()),
        "launch": [os.environ.get(name) for name in LAUNCH],
    }


@torch.no_grad()
def gap(model, prompts, groups, temperature, vocabulary) -> tuple[float, float]:
    """(mean, max) of |log pi - log mu| over the sampled ids; log pi by a plain forward a sample."""
    gaps = []
    for prompt, sample in [(p, s) for p, samples in zip(prompts, groups) for s in samples]:
        ids = torch.tensor(prompt + sample.token_ids, device=model.device)
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1, :vocabulary] / temperature
        logp = logits.float().log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]
        gaps.append((logp.cpu() - torch.tensor(sample.logprobs)).abs())
    return torch.cat(gaps).mean().item(), torch.cat(gaps).max().item()


def worker(folder: str) -> None:
    rank, world, device = rollout.start_distributed()
    model, tokenizer = rollout.load_policy(folder, torch.bfloat16 if GPU else torch.float32, device)
    torch.set_num_threads(2)
    before = process()
    engine = rollout.make_engine("vllm", model, tokenizer, model_path=folder, max_context=256)
    assert process() == before, [name for name, value in process().items() if value != before[name]]
    torch.set_num_threads(1)
    policy, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.04)
    problems = rollout.load_problems(f"{TOY}/train.jsonl")
    mine = range(rank, 11, world)  # 6 questions on rank 0 of 2, 5 on rank 1
    prompts = [rollout.render(tokenizer, problems[b].problem) for b in mine]
    seeds = [[rollout.sample_seed(0, 1, b, i) for i in range(4)] for b in mine]
    gaps = {}

    def sample(length=80):
        return engine.generate(prompts, 4, temperature=0.7, max_new_tokens=length, seeds=seeds)

    def compare(when):
        gaps[when] = gap(model, prompts, sample(), 0.7, len(tokenizer))

    def update():
        optimizer.zero_grad()
        tokens = torch.tensor([prompts[0]], device=device)
        policy(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    def push():
        free = torch.cuda.mem_get_info()[0] if GPU else 0
        engine.sleep()
        assert not GPU or torch.cuda.mem_get_info()[0] > free, "sleep gave no memory"
        engine.update_weights(model)

    compare("as loaded")
    ids = [[sample.token_ids for sample in group] for group in sample()]
    first = torch.tensor([prompts[0] + ids[0][0]], device=device)
    assert model(first).logits.argmax(-1).max() >= len(tokenizer), "the padding is not likely"
    assert max(max(tokens) for group in ids for tokens in group) < len(tokenizer)

    # Of several stop ids one is the last id of what finished, and stands nowhere else.
    end, engine.stop = engine.stop, [*engine.stop, *tokenizer("9").input_ids]
    short = [s for group in sample(length=42) for s in group]
    for s in short:
        stops = [token in engine.stop for token in s.token_ids]
        assert stops == [False] * (len(stops) - 1) + [s.finished] and len(s.logprobs) == len(stops)
        assert s.finished or len(stops) == 42
    assert len({(s.finished, s.token_ids[-1] in end) for s in short}) == 3, "not all three occurred"
    engine.stop = end

    update()
    compare("push skipped")
    push()
    compare("pushed")
    for _ in range(9):
        update()
        push()
    compare("pushed ten times")
    Path(folder, f"{rank}.json").write_text(json.dumps({"ids": ids, "gaps": gaps}))

    weights = [weight.double().sum().item() for weight in model.parameters()]
    assert rollout.gather([weights]) == [weights] * world, "the process group is not what it was"

    engine.llm.enqueue([{"prompt_token_ids": prompts[0]}], engine.parameters(), use_tqdm=False)
    engine.llm.llm_engine.step()
    with pytest.raises(RuntimeError, match="keys and values of the old weights"):
        engine.update_weights(model)  # the request has some, and keeps them
    engine.close()
    if world == 1 and not GPU:  # another run in the same process
        rollout.start_distributed()
        engine = rollout.make_engine("vllm", model, tokenizer, model_path=folder, max_context=256)
        assert [[s.token_ids for s in group] for group in sample()] == ids
        engine.close()


if __name__ == "__main__":
    worker(*sys.argv[1:])
