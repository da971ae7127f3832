"""loss.py against tests/oracle.py, against plain log_softmax, and train.py's update under every split of a step."""

import copy
import itertools
import math
import os
import sys
import weakref
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PhiConfig, PhiForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

import loss

torch.set_num_threads(1)
settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.load_profile("repository")

GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -7.0, 0.0]


# ------------------------------------------------------------------------------- a random optimizer step


@st.composite
def steps(draw):
    """One optimizer step in ragged form, of either stage, with every knob of the objective drawn."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stage = draw(st.sampled_from([1, 2]))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    knobs = {
        "clip_low": draw(st.floats(0.05, 0.5)),
        "clip_high": draw(st.floats(0.05, 0.6)),
        "beta": draw(st.sampled_from([0.0, 0.001, 0.04, 1.0])),
        "reduction": draw(st.sampled_from(loss.REDUCTIONS)),
    }
    step = {"stage": stage, "lengths": lengths, "knobs": knobs, "rng": rng}
    step["longest"] = max(lengths) + draw(st.integers(0, 3))  # the width of the padded tensors, and L_max
    step["advantages"] = [0.0 if rng.random() < 0.2 else rng.normal() for _ in lengths]
    step["logp"], step["old"], step["ref"], step["weights"] = [], [], [], []
    weighted = draw(st.booleans())
    for length in lengths:
        logp = -rng.uniform(0.01, 6.0, length)
        step["logp"].append(logp)
        step["old"].append(logp - away_from_edges(rng.normal(0, 0.4, length), **knobs))
        apart = rng.normal(0, 0.5, length)
        step["ref"].append(logp + np.sign(apart) * (0.05 + abs(apart)))
        step["weights"].append(rng.uniform(0.1, 2.0, length) if weighted else np.ones(length))
    step["weighted"] = weighted
    step["spans"], step["success"] = [], []
    for length in lengths:  # a span may be empty, and a correction without one has failed
        span = None if rng.random() < 0.25 else tuple(int(x) for x in sorted(rng.integers(0, length + 1, 2)))
        step["spans"].append(span)
        step["success"].append(bool(span is not None and rng.random() < 0.6))
    step["success_conditioned"] = draw(st.booleans())
    step["mask_type"] = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    return step


def away_from_edges(log_ratios, clip_low, clip_high, **_):
    """Moves ratios to at least 1e-4 from the edges of the clip range, where the objective has a kink."""
    ratios = np.exp(log_ratios)
    for edge in (1 - clip_low, 1 + clip_high):
        ratios = np.where(abs(ratios - edge) < 3e-4, edge + 4e-4, ratios)
    return np.log(ratios)


def padded(rows, width, rng, dtype=torch.float64):
    """Ragged rows -> [S,width]; what pads them is garbage."""
    out = torch.from_numpy(rng.choice(GARBAGE, (len(rows), width))).to(dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


def mask_of(step):
    if step["stage"] == 2:
        success = step["success"] if step["success_conditioned"] else None
        return loss.analysis_mask(step["spans"], step["longest"], success).to(step["mask_type"])
    lengths = torch.tensor(step["lengths"])
    return (torch.arange(step["longest"]) < lengths[:, None]).to(step["mask_type"])


def counted(step):
    """|o_i| in stage 1, |Analysis(y_j)| in stage 2."""
    if step["stage"] == 1:
        return step["lengths"]
    return [0 if span is None else span[1] - span[0] for span in step["spans"]]


def ours(step, dtype):
    """loss.py's value and gradient over one step, and the rounded inputs that it saw."""
    rng, width = step["rng"], step["longest"]
    mask = mask_of(step)
    logp = padded(step["logp"], width, rng, dtype)
    old, ref = padded(step["old"], width, rng, dtype), padded(step["ref"], width, rng, dtype)
    weights = padded(step["weights"], width, rng, dtype) if step["weighted"] else None
    for tensor in (logp, old, ref, weights):  # garbage also where a token stands, but carries no loss
        if tensor is not None:
            tensor[~mask.bool()] = torch.from_numpy(rng.choice(GARBAGE, int((~mask.bool()).sum()))).to(dtype)
    logp.requires_grad_()
    advantages = torch.tensor(step["advantages"], dtype=dtype)
    before = [x if x is None else x.detach().clone() for x in (logp, old, ref, weights, advantages, mask)]
    value, stats = loss.policy_loss(
        logp, old, ref if step["knobs"]["beta"] else None, advantages, mask, **step["knobs"], weights=weights,
        denominator=loss.step_denominator(counted(step), step["knobs"]["reduction"], width),
    )  # fmt: skip
    gradient = torch.autograd.grad(value, logp)[0]
    for tensor, copy_ in zip((logp, old, ref, weights, advantages, mask), before):
        assert tensor is copy_ or torch.equal(tensor.nan_to_num(7.5), copy_.nan_to_num(7.5))  # nothing was changed
    rounded = [x if x is None else x.detach().double() for x in (logp, old, ref, weights, advantages)]
    return value.item(), gradient.double(), stats, rounded


def theirs(step, rounded):
    """The oracle's J and dJ/dlogp (padded with zeros), and the mean absolute term."""
    lengths = step["lengths"]
    # Tokens without loss hold garbage here as well: the oracle skips them, as m = 0 says.
    logp, old, ref, weights = (
        [[1.0] * n if x is None else x[i, :n].tolist() for i, n in enumerate(lengths)] for x in rounded[:4]
    )
    extra = {"longest": step["longest"], **step["knobs"]}
    if step["stage"] == 1:
        value, ragged, size = oracle.stage_one(logp, old, ref, rounded[4].tolist(), weights, **extra)
    else:
        value, ragged, size = oracle.stage_two(
            logp, old, ref, rounded[4].tolist(), weights, step["spans"], step["success"],
            success_conditioned=step["success_conditioned"], **extra,
        )  # fmt: skip
    gradient = torch.zeros(len(lengths), step["longest"], dtype=torch.float64)
    for i, row in enumerate(ragged):
        gradient[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return value, gradient, size


# ----------------------------------------------------------------------- Eqs. 3 to 6, 12 to 14: the objective


@settings(max_examples=400)
@given(steps())
def test_both_objectives_equal_the_oracle_in_float64(step):
    value, gradient, stats, rounded = ours(step, torch.float64)
    expected, expected_gradient, _ = theirs(step, rounded)
    assert abs(value + expected) < 1e-9  # a loss is -J
    assert (gradient + expected_gradient).abs().max() < 1e-9
    assert (gradient[~mask_of(step).bool()] == 0).all()  # exactly


@settings(max_examples=300)
@given(steps())
def test_both_objectives_equal_the_oracle_in_float32(step):
    value, gradient, _, rounded = ours(step, torch.float32)
    expected, expected_gradient, size = theirs(step, rounded)
    assert abs(value + expected) <= 1e-5 * size
    assert (gradient + expected_gradient).abs().max() <= 1e-5 * expected_gradient.abs().max()


@settings(max_examples=150)
@given(steps())
def test_stats_are_sums_over_the_loss_tokens(step):
    _, _, stats, (logp, old, ref, _, advantages) = ours(step, torch.float64)
    tokens = clipped = kl = 0
    for i, t in mask_of(step).nonzero().tolist():
        tokens += 1
        r, advantage = oracle.token_ratio(logp[i, t].item(), old[i, t].item()), advantages[i].item()
        clipped += (r > 1 + step["knobs"]["clip_high"]) if advantage > 0 else False
        clipped += (r < 1 - step["knobs"]["clip_low"]) if advantage < 0 else False
        kl += oracle.token_kl(logp[i, t].item(), ref[i, t].item())[0] if step["knobs"]["beta"] else 0
    assert (stats["tokens"].item(), stats["clipped"].item()) == (tokens, clipped)
    assert abs(stats["kl"].item() - kl) < 1e-9
    assert not any(stat.requires_grad for stat in stats.values())


@settings(max_examples=150)
@given(steps(), st.randoms(use_true_random=False))
def test_any_cut_into_micro_batches_sums_to_the_same(step, random):
    """Also with the samples in another order, in tensors of another width."""
    rng, knobs, mask = np.random.default_rng(0), step["knobs"], mask_of(step).bool()
    value, gradient, _, _ = ours(step, torch.float64)
    order = list(range(len(step["lengths"])))
    random.shuffle(order)
    total, gathered = 0.0, torch.zeros_like(gradient)
    while order:
        cut = random.randint(1, len(order))
        part, order = order[:cut], order[cut:]
        width = max(step["lengths"][i] for i in part)
        logp, old, ref, weights = (
            padded([step[name][i] for i in part], width, rng) for name in ("logp", "old", "ref", "weights")
        )
        advantages = torch.tensor([step["advantages"][i] for i in part], dtype=torch.float64)
        part_loss, _ = loss.policy_loss(
            logp.requires_grad_(), old, ref, advantages, mask[part, :width], **knobs, weights=weights,
            denominator=loss.step_denominator(counted(step), knobs["reduction"], step["longest"]),
        )  # fmt: skip
        gathered[part, :width] += torch.autograd.grad(part_loss, logp)[0]
        total += part_loss.item()
    assert abs(total - value) < 1e-12
    assert (gathered - gradient).abs().max() < 1e-12


@settings(max_examples=60)
@given(steps())
def test_without_a_denominator_the_samples_are_the_whole_step(step):
    step["stage"] = 1
    rng, mask = step["rng"], mask_of(step)
    logp, old, ref = (padded(step[name], step["longest"], rng) for name in ("logp", "old", "ref"))
    advantages = torch.tensor(step["advantages"], dtype=torch.float64)
    value, _ = loss.policy_loss(logp, old, ref, advantages, mask, **step["knobs"])
    step["weighted"] = False
    expected, _, _ = oracle.stage_one(
        step["logp"], step["old"], step["ref"], advantages.tolist(), [np.ones(n) for n in step["lengths"]],
        longest=step["longest"], **step["knobs"],
    )  # fmt: skip
    assert abs(value.item() + expected) < 1e-9


def test_no_gradient_reaches_old_ref_or_weights():
    live = [torch.full((2, 3), -x, dtype=torch.float64, requires_grad=True) for x in (1.0, 1.1, 1.3, 1.4)]
    logp, old, ref, engine = live
    weights = loss.importance_weights(old, engine, cap=10.0)
    mask, advantages = torch.ones(2, 3), torch.tensor([1.0, -1.0], dtype=torch.float64)
    knobs = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.1, "reduction": "dapo"}
    value, _ = loss.policy_loss(logp, old, ref.detach(), advantages, mask, weights=weights, **knobs)
    value.backward()
    assert logp.grad.abs().sum() > 0
    assert old.grad is None and engine.grad is None and not weights.requires_grad


@pytest.mark.parametrize("reduction", loss.REDUCTIONS)
def test_on_policy_the_live_log_probabilities_may_stand_for_the_old_ones(reduction):
    """One update per rollout: pi_old = stop-grad(pi_theta), so the gradient is -A / denominator, not 0."""
    logp = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64)
    value, _ = loss.policy_loss(logp, logp, None, advantages, torch.ones(2, 4), clip_low=0.2, clip_high=0.2,
                                beta=0.0, reduction=reduction)  # fmt: skip
    assert torch.autograd.grad(value, logp)[0].tolist() == [[-1.5 / 8] * 4, [0.5 / 8] * 4]


def test_nothing_to_learn_from_gives_exactly_zero():
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    for reduction in loss.REDUCTIONS:
        value, stats = loss.policy_loss(
            logp, logp, logp.detach() - 1, torch.ones(2), torch.zeros(2, 3), clip_low=0.2, clip_high=0.2, beta=0.1,
            reduction=reduction,
        )  # fmt: skip
        assert value.item() == 0 and stats["tokens"].item() == 0
        assert (torch.autograd.grad(value, logp)[0] == 0).all()


def test_a_kl_weight_without_a_reference_is_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="ref_logp"):
        loss.policy_loss(x, x, None, torch.ones(1), torch.ones(1, 1), clip_low=0.2, clip_high=0.2, beta=0.1,
                         reduction="grpo")  # fmt: skip


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="grpo, dapo, dr_grpo"):
        loss.step_denominator([1], "mean", 1)


# ------------------------------------------------------------------------------------- the small functions


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=5), st.floats(-3, 3), st.floats(0.5, 5))
def test_kl_and_importance_weights_equal_the_oracle(logps, shift, cap):
    logp = torch.tensor(logps, dtype=torch.float64)
    other = logp + shift
    kl, weights = loss.kl_k3(logp, other), loss.importance_weights(logp, other, cap)
    for i, x in enumerate(logps):
        assert abs(kl[i].item() - oracle.token_kl(x, x + shift)[0]) < 1e-9
        assert abs(weights[i].item() - oracle.token_weight(x, x + shift, cap)) < 1e-9
    assert (kl >= 0).all()


@settings(max_examples=200)
@given(st.integers(2, 9), st.data(), st.sampled_from(["std", "none"]))
def test_advantages_equal_the_oracle(group_size, data, scale):
    reward = st.sampled_from([0.0, 1.0]) | st.floats(-0.5, 1.0)
    groups = data.draw(st.lists(st.lists(reward, min_size=group_size, max_size=group_size), min_size=1, max_size=4))
    got = loss.group_advantages(torch.tensor(groups, dtype=torch.float64), scale)
    for row, group in zip(got.tolist(), groups):
        assert np.allclose(row, oracle.advantages(group, scale), rtol=1e-9, atol=1e-9)


@given(st.integers(2, 16), st.floats(-0.5, 1.0, width=32), st.sampled_from(["std", "none"]))
def test_equal_rewards_give_exactly_no_advantage_in_float32(group_size, reward, scale):
    assert (loss.group_advantages(torch.full((1, group_size), reward), scale) == 0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        loss.group_advantages(torch.ones(3, 1))


@given(st.integers(1, 60), st.data())
def test_overlong_punishment_equals_the_oracle(longest, data):
    cache = data.draw(st.integers(1, longest))
    lengths = list(range(longest + 5))
    got = loss.overlong_punishment(torch.tensor(lengths), longest, cache).tolist()
    assert np.allclose(got, [oracle.overlong(n, longest, cache) for n in lengths], atol=1e-6)


@given(st.lists(st.integers(1, 9), max_size=5), st.data())
def test_the_mask_of_stage_two_equals_the_oracle(lengths, data):
    spans = [data.draw(st.none() | st.tuples(st.integers(0, n), st.integers(0, n))) for n in lengths]
    success = [span is not None and data.draw(st.booleans()) for span in spans]
    for conditioned in (True, False):
        mask = loss.analysis_mask(spans, 9, success if conditioned else None)
        assert mask.shape == (len(lengths), 9) and mask.dtype == torch.bool
        for row, n, span, right in zip(mask.tolist(), lengths, spans, success):
            assert row == [bool(m) for m in oracle.attribution(n, span, right, conditioned)] + [False] * (9 - n)


# ----------------------------------------------------------------------------------- token log-probabilities


def exact_norm(self, x):
    """Qwen3's RMSNorm without its detour through float32, for models in float64."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture(autouse=True)
def float64_is_float64(monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)


def tiny_model(kind="tied", dtype=torch.float64, vocab=61, seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    if kind == "biased":  # Phi has a bias on its head
        model = PhiForCausalLM(PhiConfig(**sizes, pad_token_id=0))
        torch.nn.init.normal_(model.lm_head.bias)
    else:
        sizes |= {"head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": kind == "tied"}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    for parameter in model.parameters():  # the default initialisation is nearly uniform over the vocabulary
        parameter.data.mul_(6 if parameter.dim() == 2 else 1)
    return model.to(dtype).eval()


def batch(prompts, completions, vocab=61, seed=0):
    """Right-padded input_ids, attention_mask and first; the padding id also occurs as a token."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(p + c for p, c in zip(prompts, completions))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        ids[i, : p + c] = torch.randint(vocab, (p + c,), generator=generator)
        ids[i, p + c - 1] = 0  # ends with EOS, which is also the padding id
        attention[i, : p + c] = 1
    return ids, attention, torch.tensor(prompts)


def plain_logprobs(model, ids, attention, first, temperature):
    """Row by row, without padding, all logits at once, plain autograd."""
    rows, entropies = [], []
    for row, keep, start in zip(ids, attention, first):
        row = row[: int(keep.sum())]
        scaled = model(row[None]).logits[0].to(torch.promote_types(model.dtype, torch.float32)) / temperature
        log_probs = torch.log_softmax(scaled, dim=-1)[start - 1 : -1]  # position p predicts token p + 1
        rows.append(log_probs.gather(1, row[start:, None]).squeeze(1))
        entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(entropies, batch_first=True)


RAGGED = ([3, 1, 8, 2], [4, 9, 1, 6])


@pytest.mark.parametrize("kind", ["tied", "untied", "biased"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("chunk", [1, 3, 20, 1024])
def test_token_logprobs_equal_plain_ones(kind, temperature, chunk):
    model = tiny_model(kind)
    inputs = batch(*RAGGED)
    logp, entropy = loss.token_logprobs(model, *inputs, temperature=temperature, chunk=chunk)
    expected, expected_entropy = plain_logprobs(model, *inputs, temperature)
    assert (logp - expected).abs().max() < 1e-10 and (entropy - expected_entropy).abs().max() < 1e-10
    assert not entropy.requires_grad
    gains = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((gains * logp).sum(), list(parameters.values()))
    expected_gradients = torch.autograd.grad((gains * expected).sum(), list(parameters.values()))
    for name, got, want in zip(parameters, gradients, expected_gradients):
        assert (got - want).abs().max() < 1e-10, name
        assert want.abs().max() > 1e-6, f"{name}: nothing was compared"


def test_token_logprobs_equal_the_oracle():
    model, (ids, attention, first) = tiny_model(), batch(*RAGGED)
    logp, entropy = loss.token_logprobs(model, ids, attention, first, temperature=0.7)
    logits = model(ids[1:2, :10]).logits[0].detach()
    for t in range(9):
        log_probs, expected = oracle.log_softmax(logits[t].numpy(), 0.7)
        assert abs(logp[1, t].item() - log_probs[ids[1, t + 1]]) < 1e-10
        assert abs(entropy[1, t].item() - expected) < 1e-10


def test_columns_past_the_end_are_zero_and_without_gradient():
    model, (ids, attention, first) = tiny_model(), batch(*RAGGED)
    logp, entropy = loss.token_logprobs(model, ids, attention, first)
    assert logp.shape == entropy.shape == (4, 9)
    for i, length in enumerate(RAGGED[1]):
        assert (logp[i, length:] == 0).all() and (entropy[i, length:] == 0).all()
        assert (logp[i, :length] < 0).all()  # the last token, EOS, included
    past = torch.arange(9) >= torch.tensor(RAGGED[1])[:, None]
    assert all((g == 0).all() for g in torch.autograd.grad(logp[past].sum(), list(model.parameters())))


def test_bf16_weights_stay_close_to_float32_ones():
    exact, inputs = tiny_model(dtype=torch.float32), batch(*RAGGED)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    logp, entropy = loss.token_logprobs(model, *inputs, chunk=4)
    expected, expected_entropy = plain_logprobs(exact, *inputs, 1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - expected).abs().max() < 0.5 and (entropy - expected_entropy).abs().max() < 0.3
    logp.sum().backward()
    expected.sum().backward()
    for got, want in zip(model.parameters(), exact.parameters()):
        assert got.grad.dtype == torch.bfloat16
        assert torch.cosine_similarity(got.grad.float().flatten(), want.grad.flatten(), dim=0) > 0.98


def test_bf16_head_gradients_do_not_lose_the_later_chunks():
    """Added up in bf16, 400 chunks would each be rounded away against the sum so far."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 8).bfloat16(), torch.randn(50, 8).bfloat16().requires_grad_()
    bias = torch.randn(50).bfloat16().requires_grad_()
    targets = torch.randint(50, (400,))
    logp, _ = loss.ChunkedLogprobs.apply(hidden, weight, bias, targets, 1.0, 1)
    exact = [x.detach().double().requires_grad_() for x in (weight, bias)]
    expected = torch.log_softmax(hidden.double() @ exact[0].T + exact[1], dim=-1).gather(1, targets[:, None])
    got_all, want_all = torch.autograd.grad(logp.sum(), [weight, bias]), torch.autograd.grad(expected.sum(), exact)
    for got, want in zip(got_all, want_all):
        assert torch.linalg.norm(got - want) < 0.01 * torch.linalg.norm(want)  # bf16 has 8 bits


class Sizes(TorchDispatchMode):
    """Records the largest output of any operation, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["tied", "untied", "biased"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind):
    vocab, chunk = 3000, 16  # hidden size 16, so that weights are no larger than a chunk of logits
    model, inputs = tiny_model(kind, vocab=vocab), batch([40, 3, 17], [13, 45, 24], vocab)
    with Sizes() as sizes:
        logp, _ = loss.token_logprobs(model, *inputs, temperature=0.7, chunk=chunk)
        logp.sum().backward()
    assert sizes.largest == chunk * vocab
    with Sizes() as sizes:  # the instrument works
        model(inputs[0]).logits
    assert sizes.largest == 3 * 53 * vocab


class Alive(TorchDispatchMode):
    """Records how many different tensors of at least `size` entries exist at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made, self.most = size, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
        self.made = [ref for ref in self.made if ref() is not None and ref().numel() >= self.size]
        self.most = max(self.most, len({ref().data_ptr() for ref in self.made}))
        return out


def test_no_more_than_two_chunks_of_logits_exist_at_once():
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with Alive(16 * 300) as forward:
        logp, _ = loss.ChunkedLogprobs.apply(hidden, weight, None, torch.randint(300, (64,)), 0.7, 16)
    with Alive(16 * 300) as backward:
        logp.sum().backward()
    assert (forward.most, backward.most) == (2, 1)


def test_the_head_sees_only_positions_that_predict_a_wanted_token(monkeypatch):
    rows = []
    scaled_logits = loss.scaled_logits
    monkeypatch.setattr(loss, "scaled_logits", lambda h, *rest: rows.append(len(h)) or scaled_logits(h, *rest))
    loss.token_logprobs(tiny_model(), *batch(*RAGGED), chunk=6)
    assert rows == [6, 6, 6, 2]  # 20 completion tokens of 34, in chunks


# ---------------------------------------------------------------------------------------- how a step is split


@settings(max_examples=300)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 4), st.integers(1, 200))
@example([], 2, 10)
@example([5], 3, 1)
def test_deal(lengths, ranks, budget):
    hands = loss.deal(lengths, ranks, budget)
    assert len(hands) == ranks
    assert len({len(hand) for hand in hands}) == 1  # every rank has the same number of rounds
    assert sorted(i for hand in hands for part in hand for i in part) == list(range(len(lengths)))
    for part in (part for hand in hands for part in hand if part):
        cells, tokens = len(part) * max(lengths[i] for i in part), sum(lengths[i] for i in part)
        assert len(part) == 1 or (cells <= budget and cells - tokens <= budget / 8)
    loads = [sum(lengths[i] for part in hand for i in part) for hand in hands]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_deal_goes_back_and_forth():
    """Always in the same direction, the first rank would get the longest of every lap."""
    for hand in loss.deal(list(range(1, 17)), ranks=4, budget=1):
        assert sum(i + 1 for part in hand for i in part) == 34


@pytest.mark.parametrize("seed", range(5))
def test_deal_pads_little(seed):
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(math.log(1000), 0.8, 512)), 1, 8192).astype(int).tolist()
    (hand,) = loss.deal(lengths, ranks=1, budget=16384)
    cells = sum(len(part) * max(lengths[i] for i in part) for part in hand)
    assert (cells - sum(lengths)) / cells <= 0.05
    assert len(hand) <= 1.2 * sum(lengths) / 16384
    assert len(hand) <= len(loss.deal(lengths, ranks=3, budget=16384)[0]) * 3


@settings(max_examples=30)
@given(steps())
def test_what_carries_no_gradient_may_be_left_out(step):
    """The gradient of the others is the same, and what is left out had none, at the step's own denominator."""
    _, gradient, _, _ = ours(step, torch.float64)
    for i, row in enumerate(mask_of(step).bool()):
        if not loss.carries_gradient(int(row.sum()), step["advantages"][i], step["knobs"]["beta"]):
            assert gradient[i].abs().max() <= 1e-12


def test_exactly_the_samples_with_a_gradient_are_run():
    run = [x for x in itertools.product([0, 3], [-0.5, 0.0, 1.5], [0.0, 0.04]) if loss.carries_gradient(*x)]
    assert run == [(3, -0.5, 0.0), (3, -0.5, 0.04), (3, 0.0, 0.04), (3, 1.5, 0.0), (3, 1.5, 0.04)]


# --------------------------------------------------- one optimizer step, split over ranks and micro-batches
#
# The expected gradients come from the oracle's dJ/dlogp and from plain log_softmax of single, unpadded rows. They
# are compared with what train.py's `update` leaves in the parameters, through DDP over gloo, on 1, 2 and 3 ranks.

TEMPERATURE, LONGEST, CAP, RATE = 0.7, 9, 1.3, 1.0
CASES = {  # name: stage, reduction, beta, updates a rollout, corrections that succeed (stage 2)
    "stage 1, grpo": (1, "grpo", 0.0, 1, None),
    "stage 1, dapo": (1, "dapo", 0.1, 1, None),
    "stage 1, dr_grpo, two updates": (1, "dr_grpo", 0.1, 2, None),
    "stage 1, grpo, four updates": (1, "grpo", 0.0, 4, None),
    "stage 2, grpo": (2, "grpo", 0.1, 1, {1, 2, 6, 9}),
    "stage 2, dapo, two updates": (2, "dapo", 0.0, 2, {1, 2, 6, 9}),
    "stage 2, dr_grpo": (2, "dr_grpo", 0.0, 1, {0, 6, 7, 8, 10}),
    "stage 2, a rank without a sample": (2, "grpo", 0.1, 1, {6}),
    "stage 2, nothing left": (2, "dapo", 0.1, 1, set()),
}
BUDGETS = (1, 40, 10_000)  # one sequence a micro-batch; a few; all of a rank


def rollout_of(case):
    """Four groups of three samples with uneven lengths, as train.py's groups, advantages, masks and counts."""
    import train

    stage, _, _, _, succeeded = CASES[case]
    rng = np.random.default_rng(7)
    groups, spans = [], []
    for _ in range(4):
        prompt = rng.integers(1, 61, rng.integers(1, 8)).tolist()
        samples = []
        for _ in range(3):
            n = int(rng.integers(1, LONGEST + 1))
            logprobs = np.float32(-rng.uniform(2, 6, n)).tolist()
            samples.append(train.Sample(rng.integers(0, 61, n).tolist(), logprobs, "", True))
            span = tuple(int(x) for x in sorted(rng.integers(0, n + 1, 2)))
            spans.append(span if span[0] < span[1] else None)
        groups.append(train.Group("", "", prompt, samples, [], []))
    if stage == 1:
        rewards = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]])
        masks = [[torch.ones(len(s.token_ids), dtype=torch.bool) for s in g.samples] for g in groups]
        counts = [[len(s.token_ids) for s in g.samples] for g in groups]
    else:
        success = [j in succeeded for j in range(12)]
        spans = [span or ((0, 1) if right else None) for span, right in zip(spans, success)]  # success: well-formed
        rewards = torch.tensor(success).float().reshape(4, 3)
        of_group = [slice(3 * b, 3 * b + 3) for b in range(4)]
        masks = [loss.analysis_mask(spans[three], LONGEST, success[three]) for three in of_group]
        counts = [[0 if span is None else span[1] - span[0] for span in spans[three]] for three in of_group]
    return groups, loss.group_advantages(rewards), masks, counts, spans, rewards.flatten().bool().tolist()


def expected_updates(case):
    """Each optimizer step's parameter gradient, {name: gradient}, by the oracle; plain descent in between."""
    stage, reduction, beta, updates, _ = CASES[case]
    groups, advantages, _, _, spans, success = rollout_of(case)
    model, reference = tiny_model(), tiny_model(seed=1)

    def logprobs(policy):
        rows = []
        for g in groups:
            for s in g.samples:
                ids = torch.tensor([g.prompt + s.token_ids])
                rows.append(plain_logprobs(policy, ids, torch.ones_like(ids), [len(g.prompt)], TEMPERATURE)[0][0])
        return rows

    old, ref = ([row.tolist() for row in logprobs(policy)] for policy in (model, reference))
    engine = [s.logprobs for g in groups for s in g.samples]
    weights = [[oracle.token_weight(o, m, CAP) for o, m in zip(*rows)] for rows in zip(old, engine)]
    steps = []
    for u in range(updates):
        mine = [j for j in range(12) if j // 3 * updates // 4 == u]
        rows = logprobs(model)
        now = [row.tolist() for row in rows]
        arguments = [[x[j] for j in mine] for x in (now, old, ref, advantages.flatten().tolist(), weights)]
        knobs = {"clip_low": 0.2, "clip_high": 0.2, "beta": beta, "reduction": reduction, "longest": LONGEST}
        if stage == 1:
            _, gradient, _ = oracle.stage_one(*arguments, **knobs)
        else:
            arguments += [[spans[j] for j in mine], [success[j] for j in mine]]
            _, gradient, _ = oracle.stage_two(*arguments, **knobs)
        if not any(any(row) for row in gradient):
            continue  # no optimizer step
        model.zero_grad()
        sum(-(rows[j] * torch.tensor(row, dtype=torch.float64)).sum() for j, row in zip(mine, gradient)).backward()
        steps.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return steps


class PlainDescent:
    """Stands in for train.py's optimizer: keeps what DDP left in the parameters, then takes a plain step."""

    bf16 = False

    def __init__(self, model):
        self.model, self.steps = model, []

    def accumulate(self):
        pass

    def step(self, _):
        self.steps.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
        return 1.0


def on_ranks(rank, folder):
    """One of three processes: takes part in runs of 1, 2 and 3 ranks; its gradients go to a file for each."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    modeling_qwen3.Qwen3RMSNorm.forward = exact_norm
    for world in range(rank + 1, 4):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store_{world}", rank=rank, world_size=world)
        torch.save((updates_by_train(rank, world), gradients_by_hand(rank, world)), f"{folder}/{world}_{rank}.pt")
        dist.destroy_process_group()


def updates_by_train(rank, world):
    """{(case, budget): (gradients of each optimizer step, metrics)}, through train.py's `update`."""
    from types import SimpleNamespace

    import train

    out = {}
    for case, (_, reduction, beta, updates, _) in CASES.items():
        for budget in BUDGETS:
            config = train.Config(
                beta=beta, reduction=reduction, updates_per_rollout=updates, temperature=TEMPERATURE,
                micro_batch_tokens=budget, max_new_tokens=LONGEST, importance_cap=CAP,
            )  # fmt: skip
            train.check(config)
            policy = train.Policy(tiny_model(), TEMPERATURE, chunk=5)
            run = SimpleNamespace(
                config=config, rank=rank, world=world, device=torch.device("cpu"),
                optimizer=PlainDescent(policy.model), policy=DistributedDataParallel(policy),
                state=SimpleNamespace(nonfinite_in_a_row=0),
                reference=train.Policy(tiny_model(seed=1), TEMPERATURE, chunk=5) if beta else None,
            )  # fmt: skip
            groups, advantages, masks, counts, _, _ = rollout_of(case)
            metrics = train.update(run, 1, len(groups), train.make_examples(groups, advantages, masks, counts))
            out[case, budget] = (run.optimizer.steps, metrics)
    return out


@pytest.fixture(scope="module")
def on_1_2_and_3_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_ranks, (str(folder),), nprocs=3)
    return {
        (world, rank): torch.load(folder / f"{world}_{rank}.pt", weights_only=False)
        for world in (1, 2, 3) for rank in range(world)
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_optimizer_step_is_the_same_however_it_is_split(case, on_1_2_and_3_ranks):
    expected = expected_updates(case)
    reported = []
    for (world, rank), (results, _) in on_1_2_and_3_ranks.items():
        for budget in BUDGETS:
            steps, metrics = results[case, budget]
            assert len(steps) == len(expected), f"{world} ranks"
            assert metrics["empty_updates"] == CASES[case][3] - len(expected)
            for step, want in zip(steps, expected):
                for name, gradient in want.items():
                    difference = (step[name] - gradient).abs().max()
                    assert difference < 1e-9, f"{world} ranks, budget {budget}, rank {rank}, {name}: {difference}"
            names = ("loss", "loss_tokens", "entropy", "clip_fraction", "kl")
            reported.append(np.array([metrics[name] for name in names], dtype=float))  # None becomes NaN
    assert all(np.allclose(reported[0], other, 1e-9, 1e-9, equal_nan=True) for other in reported)


def test_the_cases_reach_what_they_claim(on_1_2_and_3_ranks):
    """Clipped ratios, a capped weight, a nonzero KL; and a gradient that is not small against the tolerance."""
    metrics = {case: on_1_2_and_3_ranks[1, 0][0][case, 1][1] for case in CASES}
    assert metrics["stage 1, dr_grpo, two updates"]["clip_fraction"] > 0
    assert metrics["stage 1, grpo, four updates"]["clip_fraction"] > 0
    assert 0 < metrics["stage 1, grpo"]["capped_fraction"] < 1
    assert metrics["stage 1, dapo"]["kl"] > 0
    assert metrics["stage 2, nothing left"]["empty_updates"] == 1
    for case in CASES:
        for gradient in expected_updates(case):
            assert max(g.abs().max() for g in gradient.values()) > 1e-3


def gradients_by_hand(rank, world):
    """By loss.py's functions alone: hands of samples that `deal` would not give."""
    out = []
    for hands in HANDS[world]:
        model = LeanLogprobs(tiny_model())
        policy = DistributedDataParallel(model)
        for part in hands[rank]:
            value = hand_loss(policy, part or [0], anchor=not part)
            (value * world).backward()  # averaged at every backward: what came before is equal on all ranks
        out.append([p.grad.clone() for p in model.parameters()])
    return out


class LeanLogprobs(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return loss.token_logprobs(self.model, *inputs, temperature=TEMPERATURE, chunk=4)[0]


# Five corrections; 0 and 3 have failed, 4 is not well-formed. [ranks][rounds][samples]
HANDS = {
    1: [[[[0, 1, 2, 3, 4]]], [[[4], [1, 3], [0, 2]]], [[[0], [1], [2], [3], [4]]]],
    2: [[[[0, 1], [2]], [[3], [4]]], [[[1, 2]], [[0, 3, 4]]], [[[1, 2, 0, 3, 4]], [[]]]],
    3: [[[[0, 3]], [[1]], [[4, 2]]], [[[1], [2]], [[], []], [[0, 4], [3]]], [[[2, 1]], [[]], [[]]]],
}


def hand_loss(policy, samples, anchor=False, reduction="dapo"):
    ids, attention, first = batch([3, 1, 5, 2, 4], [4, 9, 5, 6, 2])
    spans, success = [(0, 3), (2, 8), (1, 5), (0, 6), None], [False, True, True, False, False]
    ids, attention, first = ids[samples], attention[samples], first[samples]
    width = int((attention.sum(1) - first).max())
    mask = loss.analysis_mask([spans[j] for j in samples], 9, [success[j] for j in samples])[:, :width]
    logp = policy(ids, attention, first)
    off = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)[:width]
    denominator = loss.step_denominator([3, 6, 4, 6, 0], reduction, 9)
    advantages = torch.tensor([-1.0, 1.5, 0.5, -0.7, -0.3])[samples]
    value, _ = loss.policy_loss(
        logp, logp.detach() - off, logp.detach() + 2 * off, advantages, mask,
        clip_low=0.2, clip_high=0.3, beta=0.1, reduction=reduction, denominator=denominator,
    )  # fmt: skip
    return value * 0.0 if anchor else value


def test_any_hands_of_samples_give_the_same_gradient(on_1_2_and_3_ranks):
    model = LeanLogprobs(tiny_model())
    expected = torch.autograd.grad(hand_loss(model, [0, 1, 2, 3, 4]), list(model.parameters()))
    assert max(g.abs().max() for g in expected) > 1e-3
    for (world, rank), (_, by_hand) in on_1_2_and_3_ranks.items():
        for hands, gradients in zip(HANDS[world], by_hand, strict=True):
            for got, want in zip(gradients, expected, strict=True):
                assert (got - want).abs().max() < 1e-9, f"{hands} on {world} ranks, rank {rank}"


@pytest.mark.parametrize("reduction", loss.REDUCTIONS)
def test_running_samples_without_a_gradient_changes_nothing(reduction):
    model = LeanLogprobs(tiny_model())
    all_run = torch.autograd.grad(hand_loss(model, [0, 1, 2, 3, 4], reduction=reduction), list(model.parameters()))
    left_out = torch.autograd.grad(hand_loss(model, [1, 2], reduction=reduction), list(model.parameters()))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(all_run, left_out))
