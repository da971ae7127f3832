"""loss.py against tests/oracle.py and against plain log_softmax, on padded and split-up steps; in
float64, where an error in an equation is a million times larger than rounding."""

import itertools
import math
import weakref
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PhiConfig, PhiForCausalLM

import loss
import train

settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.load_profile("repository")


@st.composite
def steps(draw):
    """One optimizer step of either stage, ragged, with every knob of the objective drawn."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    s = SimpleNamespace(rng=rng, stage=draw(st.sampled_from([1, 2])), rows=[], spans=[])
    s.lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    s.longest = max(s.lengths) + draw(st.integers(0, 3))  # width of the padded tensors, and L_max
    s.knobs = {
        "clip_low": draw(st.floats(0.05, 0.5)),
        "clip_high": draw(st.floats(0.05, 0.6)),
        "beta": draw(st.sampled_from([0.0, 0.001, 0.04, 1.0])),
        "reduction": draw(st.sampled_from(loss.REDUCTIONS)),
    }
    s.referenced, s.weighted, s.conditioned, s.whole = (draw(st.booleans()) for _ in range(4))
    s.mask_type = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    s.advantages = np.float32([rng.normal() * (rng.random() < 0.8) for _ in s.lengths]).tolist()
    for n in s.lengths:
        logp, apart = -rng.uniform(0.01, 6, n), rng.normal(0, 0.5, n)
        ratio = np.exp(rng.normal(0, 0.4, n))
        for edge in (1 - s.knobs["clip_low"], 1 + s.knobs["clip_high"]):  # the objective has a kink
            ratio = np.where(abs(ratio - edge) < 3e-4, edge + 4e-4, ratio)
        old, ref = logp - np.log(ratio), logp + apart + 0.05 * np.sign(apart)
        weights = rng.uniform(0.1, 2, n) if s.weighted else np.ones(n)
        s.rows.append(np.float32([logp, old, ref, weights]).astype(float))
        span = tuple(sorted(rng.integers(0, n + 1, 2).tolist()))  # may be empty
        s.spans.append(None if rng.random() < 0.25 else span)
    s.success = [span is not None and bool(rng.random() < 0.6) for span in s.spans]
    if s.stage == 1:
        s.counted, s.mask = s.lengths, torch.arange(s.longest) < torch.tensor(s.lengths)[:, None]
    else:
        s.counted = [0 if span is None else span[1] - span[0] for span in s.spans]
        s.mask = loss.analysis_mask(s.spans, s.longest, s.success if s.conditioned else None)
    return s


def ours(s, dtype=torch.float64, part=None):
    """Value, dlogp and stats of the whole step, or of some samples, as wide as their longest."""
    samples = part or list(range(len(s.lengths)))
    mask = s.mask[samples, : max(s.lengths[j] for j in part) if part else s.longest]
    garbage = [math.nan, math.inf, -math.inf, 1e30, -7.0, 0.0]
    given = torch.from_numpy(s.rng.choice(garbage, (4, *mask.shape))).to(dtype)
    for i, j in enumerate(samples):
        given[:, i, mask[i]] = torch.from_numpy(s.rows[j]).to(dtype)[:, mask[i, : s.lengths[j]]]
    logp, old, ref, weights = given.detach()
    logp.requires_grad_(), old.requires_grad_()
    advantages = torch.tensor([s.advantages[j] for j in samples], dtype=dtype)
    denominator = None  # the whole step's, but where the mask does not show it
    if part or not s.whole or (s.stage, s.knobs["reduction"]) == (2, "dapo"):
        denominator = loss.step_denominator(s.counted, s.knobs["reduction"], s.longest)
    passed = (given, advantages, mask.to(s.mask_type))
    before = [tensor.clone() for tensor in passed]
    value, stats = loss.policy_loss(
        logp, old, ref if s.knobs["beta"] or s.referenced else None, *passed[1:], **s.knobs,
        weights=weights if s.weighted else None, denominator=denominator,
    )  # fmt: skip
    gradient, of_old = torch.autograd.grad(value, [logp, old], allow_unused=True)
    assert of_old is None and not any(stat.requires_grad for stat in stats.values())
    for now, then in zip(passed, before):  # the caller's tensors are what they were
        assert torch.equal(now.nan_to_num(7.5), then.nan_to_num(7.5))
    return value.item(), gradient.double(), {name: stat.item() for name, stat in stats.items()}


def theirs(s):
    """The oracle's J, dJ/dlogp padded with zeros, and the mean absolute term."""
    logp, old, ref, weights = ([row[k].tolist() for row in s.rows] for k in range(4))
    columns, knobs = (logp, old, ref, s.advantages, weights), s.knobs | {"longest": s.longest}
    if s.stage == 1:
        value, rows, size = oracle.stage_one(*columns, **knobs)
    else:
        value, rows, size = oracle.stage_two(*columns, s.spans, s.success, **knobs,
                                             success_conditioned=s.conditioned)  # fmt: skip
    rows = [row + [0.0] * (s.longest - len(row)) for row in rows]
    return value, torch.tensor(rows, dtype=torch.float64), size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=400)
@given(s=steps())
def test_loss_gradient_and_stats_equal_the_oracle(s, dtype):
    exact, (value, gradient, stats) = dtype == torch.float64, ours(s, dtype)
    expected, of_logp, size = theirs(s)
    assert abs(value + expected) <= (1e-9 if exact else 1e-5 * size)  # a loss is -J
    assert (gradient + of_logp).abs().max() <= (1e-9 if exact else 1e-5 * of_logp.abs().max())
    assert (gradient[~s.mask] == 0).all() and (s.mask.any() or value == 0)  # exactly
    if s.stage == 2:
        masks = [oracle.attribution(s.longest, span, right, s.conditioned)
                 for span, right in zip(s.spans, s.success)]  # fmt: skip
        assert s.mask.tolist() == masks and s.mask.dtype == torch.bool
    clipped = kl = 0
    for i, t in s.mask.nonzero().tolist():
        logp, old, ref, _ = s.rows[i][:, t]
        ratio = oracle.token_ratio(logp, old)
        clipped += s.advantages[i] > 0 and ratio > 1 + s.knobs["clip_high"]
        clipped += s.advantages[i] < 0 and ratio < 1 - s.knobs["clip_low"]
        kl += oracle.token_kl(logp, ref)[0] if s.knobs["beta"] or s.referenced else 0
    assert (stats["tokens"], stats["clipped"]) == (s.mask.sum(), clipped)
    assert stats["kl"] == pytest.approx(kl, rel=1e-9 if exact else 1e-4, abs=1e-12)


@settings(max_examples=200)
@given(steps(), st.randoms(use_true_random=False))
def test_any_micro_batches_on_any_ranks_sum_to_the_same(s, random):
    """What need not run is left out. `update` multiplies by the number of ranks, DDP divides."""
    value, gradient, _ = ours(s)
    run = []
    for j, advantage in enumerate(s.advantages):
        example = SimpleNamespace(mask=s.mask[j], advantage=advantage)
        if train.carries_gradient(example, s.knobs["beta"]):
            run.append(j)
    random.shuffle(run)
    while run:
        part = [run.pop() for _ in range(random.randint(1, len(run)))]
        part_value, part_gradient, _ = ours(s, part=part)
        value -= part_value
        gradient[part, : part_gradient.shape[1]] -= part_gradient
    assert abs(value) < 1e-12 and gradient.abs().max() < 1e-12


def test_on_policy_nothing_is_clipped_and_at_beta_0_no_reference_counts():
    x, advantages = torch.zeros(2, 1), torch.tensor([1.0, -1.0])
    value, stats = loss.policy_loss(x, x, x + 1000, advantages, x + 1, clip_low=0.0, clip_high=0.0,
                                    beta=0.0, reduction="grpo")  # fmt: skip
    assert value == 0 and stats["clipped"] == 0 and stats["kl"] == math.inf


def test_what_cannot_be_computed_is_refused():
    x, knobs = torch.zeros(1, 1), {"clip_low": 0.2, "clip_high": 0.2, "reduction": "grpo"}
    with pytest.raises(ValueError, match="beta is 0.1, so ref_logp"):
        loss.policy_loss(x, x, None, x[0], x, beta=0.1, **knobs)
    with pytest.raises(ValueError, match="grpo, dapo, dr_grpo, not 'mean'"):
        loss.step_denominator([1], "mean", 1)
    with pytest.raises(ValueError, match="at least 2, not of 1"):
        loss.group_advantages(torch.ones(3, 1))


# ------------------------------------------------------------------------------ the small functions


def test_a_small_kl_keeps_its_digits_in_float32():
    kl = loss.kl_k3(torch.zeros(2), torch.tensor([1e-3, -1e-3]))
    assert kl.tolist() == pytest.approx([5.001667e-7, 4.998334e-7], rel=1e-3)


@given(st.floats(-20, 0), st.floats(-3, 3), st.floats(0.5, 5))
def test_importance_weights_equal_the_oracle(old, shift, cap):
    logp = torch.tensor([old], dtype=torch.float64, requires_grad=True)
    weights = loss.importance_weights(logp, logp + shift, cap)
    assert abs(weights.item() - oracle.token_weight(old, old + shift, cap)) < 1e-9
    assert not weights.requires_grad


@settings(max_examples=200)
@given(st.integers(2, 9), st.data(), st.sampled_from([[], ["std"], ["none"]]))
def test_advantages_equal_the_oracle(size, data, scale):
    reward = st.sampled_from([0.0, 1.0]) | st.floats(-0.5, 1.0)
    group = st.lists(reward, min_size=size, max_size=size)
    groups = data.draw(st.lists(group, min_size=1, max_size=4))
    got = loss.group_advantages(torch.tensor(groups, dtype=torch.float64), *scale)
    assert np.allclose(got, [oracle.advantages(group, *scale) for group in groups], 1e-9, 1e-9)


@given(st.integers(2, 16), st.floats(-0.5, 1.0, width=32), st.sampled_from(["std", "none"]))
def test_equal_rewards_give_exactly_no_advantage_in_float32(size, reward, scale):
    assert (loss.group_advantages(torch.full((1, size), reward), scale) == 0).all()


@given(st.integers(1, 60), st.data())
def test_overlong_punishment_equals_the_oracle(longest, data):
    cache, lengths = data.draw(st.integers(1, longest)), range(longest + 5)
    got = loss.overlong_punishment(torch.tensor(lengths), longest, cache)
    assert np.allclose(got, [oracle.overlong(n, longest, cache) for n in lengths], atol=1e-6)


# -------------------------------------------------------------------------- token log-probabilities


def tiny_model(tied, vocab=61):
    """Its head has the embedding's weight, or weight and bias of its own."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    ))  # fmt: skip
    for parameter in model.parameters():  # as they begin, the logits are nearly uniform
        parameter.data.mul_(6 if parameter.dim() == 2 else 1)
    model.lm_head.bias = None if tied else torch.nn.Parameter(torch.randn(vocab))
    return model.double().eval()


def batch(prompts, completions, vocab=61):
    """Right-padded input_ids, attention_mask and first; the last token has the padding's id."""
    first = torch.tensor(prompts)
    lengths = first + torch.tensor(completions)
    attention = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(vocab, attention.shape) * attention
    return ids.scatter(1, lengths[:, None] - 1, 0), attention, first


def plain_logprobs(model, ids, attention, first, temperature):
    """Row by row, without padding, all logits at once, plain autograd; of 61 ids 55 are real."""
    rows, entropies = [], []
    for row, keep, start in zip(ids, attention, first):
        row = row[: int(keep.sum())]
        logits = model(row[None]).logits[0, start - 1 : -1, :55]  # position p predicts token p + 1
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        rows.append(log_probs.gather(1, row[start:, None]).squeeze(1))
        entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(entropies, batch_first=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0, 0.006])  # 0.006: exp(logit) overflows
@pytest.mark.parametrize("chunk", [1, 3, 20, 1024])
def test_token_logprobs_equal_plain_ones(tied, temperature, chunk, monkeypatch):
    model, inputs, rows = tiny_model(tied), batch([3, 1, 8, 2], [4, 9, 1, 6], 55), []
    head = loss.scaled_logits
    monkeypatch.setattr(loss, "scaled_logits", lambda *x: rows.append(len(x[0])) or head(*x))
    logp, entropy = loss.token_logprobs(model, *inputs, temperature, chunk, vocabulary=55)
    assert sum(rows) == 20 and max(rows) <= chunk  # only what predicts the 20 wanted tokens
    expected, expected_entropy = plain_logprobs(model, *inputs, temperature)
    assert logp.shape == entropy.shape == (4, 9) and not entropy.requires_grad
    assert (logp - expected).abs().max() < 1e-10
    assert (entropy - expected_entropy).abs().max() < 1e-10
    past = torch.arange(9) >= torch.tensor([4, 9, 1, 6])[:, None]
    assert (logp[past] == 0).all() and (entropy[past] == 0).all()  # exactly
    gains, parameters = torch.randn(4, 9, dtype=torch.float64), list(model.parameters())
    gradients = torch.autograd.grad((gains * logp).sum(), parameters)
    for got, want in zip(gradients, torch.autograd.grad((gains * expected).sum(), parameters)):
        assert (got - want).abs().max() < 1e-10 and want.abs().max() > 1e-6


def test_bf16_heads_compute_in_float32_and_do_not_lose_the_later_chunks():
    """Added up in bf16, 400 chunks would each be rounded away against the sum so far."""
    torch.manual_seed(0)
    shapes = ((400, 8), (50, 8), (50,))
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    targets = torch.randint(50, (400,))
    logp, entropy = loss.ChunkedLogprobs.apply(
        inputs[0], targets, *inputs[1:], 1.0, 50, 1, False
    )
    hidden, weight, bias = exact = [x.detach().double().requires_grad_() for x in inputs]
    log_probs = torch.log_softmax(hidden @ weight.T + bias, dim=-1)
    expected = log_probs.gather(1, targets[:, None]).squeeze(1)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - expected).abs().max() < 0.1  # logits below 16 in bf16
    assert (entropy + (log_probs.exp() * log_probs).sum(1)).abs().max() < 0.1
    gradients = torch.autograd.grad(logp.sum(), inputs)
    for got, want in zip(gradients, torch.autograd.grad(expected.sum(), exact)):
        assert got.dtype == torch.bfloat16
        assert torch.linalg.norm(got - want) < 0.01 * torch.linalg.norm(want)  # bf16 has 8 bits


class Watch(TorchDispatchMode):
    """The largest output of any operation, and how many of at least `size` entries live at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.largest, self.made, self.most = size, 0, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(out)):
            self.largest = max(self.largest, tensor.numel())
            self.made += [weakref.ref(tensor)] if tensor.numel() >= self.size else []
        self.made = [ref for ref in self.made if ref() is not None]
        self.most = max(self.most, len({ref().data_ptr() for ref in self.made}))
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_no_more_than_two_chunks_of_logits_exist_at_once(tied):
    chunk, vocab = 32, 3000
    model, inputs = tiny_model(tied, vocab), batch([40, 3, 17], [13, 45, 24], vocab)
    with Watch(chunk * vocab) as forward:
        logp, _ = loss.token_logprobs(model, *inputs, 0.7, chunk)
    with Watch(chunk * vocab) as backward:
        logp.sum().backward()
    assert (forward.largest, forward.most) == (chunk * vocab, 2)
    assert (backward.largest, backward.most) == (chunk * vocab, 1)


# --------------------------------------------------------------------------- how a step is split up


@settings(max_examples=300)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 4), st.integers(1, 200))
@example([], 2, 10)
@example([5], 3, 1)
@example([12, 11, 10, 9], 1, 48)  # 6 of 48 are padding
def test_split_by_tokens(lengths, ranks, budget):
    def fits(part):
        cells = len(part) * lengths[part[0]]
        return cells <= budget and 8 * (cells - sum(lengths[i] for i in part)) <= budget

    hands = train.split_by_tokens(lengths, ranks, budget)
    assert len(hands) == ranks and len({len(hand) for hand in hands}) == 1  # as many rounds for all
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    laps = [*range(ranks), *reversed(range(ranks))] * 40  # or rank 0 had all the longest
    for rank, hand in enumerate(hands):
        assert sum(hand, []) == [i for i, seat in zip(order, laps) if seat == rank]
        assert all(len(part) <= 1 or fits(part) for part in hand)
        for part, then in itertools.pairwise(hand):  # a new one begins only where it must
            assert not then or (part and not fits([*part, then[0]]))
