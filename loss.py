"""The equations of ScRPO that work on tensors, as pure functions. A step uses them in this order:

    rewards [B,G] --Eqs. 15, 2--> advantages               group_advantages, overlong_punishment
    Eq. 12 ---------------------> m[j,t], stage 2          analysis_mask
    samples --------------------> micro-batches            step_denominator, deal
    sampled ids ----------------> log pi_theta, entropy    token_logprobs
    Eqs. 3 to 6, 13, 14 --------> l[i,t], then -J          policy_loss

Shapes: B questions, G samples a group, S sequences, T loss columns, L sequence length, M wanted
tokens, D hidden size, V vocabulary. Sources: GRPO (DeepSeekMath 2402.03300), DAPO (2503.14476),
Dr. GRPO (2503.20783), ScRPO (2511.06065); [ours] marks what none of them states.
"""

import torch

REDUCTIONS = ("grpo", "dapo", "dr_grpo")


def group_advantages(rewards: torch.Tensor, scale: str = "std") -> torch.Tensor:
    """Â[b,i] = (R[b,i] - mean_j R[b,j]) / (std_j R[b,j] + delta), [B,G] -> [B,G] (Eq. 2; GRPO).

    std has ddof=1, as in TRL, verl and OpenRLHF; delta = 1e-4; scale="none" does not divide (Dr.
    GRPO). Equal rewards give exactly 0, also where rounding would make their mean another number.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.]])).round(decimals=3)
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    if rewards.shape[1] < 2:  # std would be NaN
        raise ValueError(f"an advantage needs a group of at least 2, not of {rewards.shape[1]}")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # Eq. 2
    if scale == "std":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)  # Eq. 2
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def overlong_punishment(lengths: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """Added to R before Eq. 2: DAPO's eq. 13, halved, as its R is 1 or -1, ours 1 or 0 (Eq. 15).

    >>> overlong_punishment(torch.tensor([10, 80, 90, 100]), max_length=100, cache=20)
    tensor([ 0.0000,  0.0000, -0.2500, -0.5000])
    """
    return 0.5 * ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)  # Eq. 15


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """D = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 >= 0 at the sampled tokens (Eq. 4; GRPO).

    Schulman's estimator "k3" of the KL: unbiased, but its gradient, which GRPO follows, is not.

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5])).round(decimals=4)   # e^-0.5 + 0.5 - 1
    tensor([0.1065])
    """
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio  # Eq. 4; exp(x) - 1 - x would cancel digits


def clipped_surrogate(logp, old_logp, advantages, clip_low: float, clip_high: float):
    """min(r Â, clip(r, 1 - clip_low, 1 + clip_high) Â), [S,T] with Â [S] (Eqs. 3, 5; PPO, GRPO).

    >>> logp = torch.tensor([[0.3, -0.3]])   # r = 1.35 and 0.74
    >>> clipped_surrogate(logp, torch.zeros(1, 2), torch.tensor([2.0]), 0.2, 0.2)
    tensor([[2.4000, 1.4816]])
    """
    ratio = torch.exp(logp - old_logp)  # Eq. 3
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantages = advantages[:, None]  # every token of o_i carries Â_i
    return torch.min(ratio * advantages, clipped * advantages)  # Eq. 5


def importance_weights(old_logp: torch.Tensor, engine_logp: torch.Tensor, cap: float):
    """w = min(C, pi_old / mu), no gradient: corrects an engine of other numerics (Eq. 14; ours).

    >>> importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -3.0]), cap=2.0)
    tensor([1.1052, 2.0000])
    """
    return torch.exp(old_logp - engine_logp).detach().clamp(max=cap)  # Eq. 14


def analysis_mask(spans, width: int, success=None, device=None) -> torch.Tensor:
    """m[j,t] = 1[R'_j = 1] 1[t in Analysis(y_j)], bool [S,T] (Eq. 12; ScRPO).

    spans    (start, end) of each correction's analysis in its tokens, None: not well-formed
    success  is R'_j = 1, for each correction; None leaves the condition out (an ablation)

    >>> analysis_mask([(1, 3), (0, 2), None], 4, success=[True, False, False]).int().tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    spans = torch.tensor([span or (0, 0) for span in spans], device=device).reshape(-1, 2)
    column = torch.arange(width, device=device)  # [T]
    mask = (spans[:, :1] <= column) & (column < spans[:, 1:])  # Eq. 12: 1[t in Analysis(y_j)]
    if success is not None:
        mask = mask & torch.tensor(success, dtype=torch.bool, device=device)[:, None]  # Eq. 12
    return mask


def step_denominator(lengths, reduction: str, max_length: int) -> float:
    """What the token sums of one optimizer step, over all ranks, are divided by (Eqs. 6, 13).

    `lengths` has |o_i|, or in stage 2 |Analysis(y_j)| (0 if not well-formed), of *every* sample,
    of those without a gradient too: success changes the numerator only [ours].

    >>> [step_denominator([2, 6, 0, 0], reduction, max_length=10) for reduction in REDUCTIONS]
    [4, 8, 40]
    """
    if reduction == "grpo":
        return len(lengths)  # Eqs. 6, 13: mean over samples, each of which has its own 1/|o_i|
    if reduction == "dapo":
        return max(1, sum(lengths))  # Eqs. 6, 13: of the step [ours]; DAPO's Eq. 8: of a group
    if reduction == "dr_grpo":
        return len(lengths) * max_length  # Eqs. 6, 13: the constant L_max: length does not weigh
    raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")


def policy_loss(logp, old_logp, ref_logp, advantages, mask, *, clip_low, clip_high, beta, reduction,
                weights=None, denominator=None):  # fmt: skip
    """-J of Eq. 6 (stage 1) or Eq. 13 (stage 2): the same lines, only the mask differs.

    logp                log pi_theta of the sampled tokens [S,T], with gradient
    old_logp, ref_logp  log pi_old, into which none flows, log pi_ref or None, if beta = 0 [S,T]
    advantages, mask    Â [S]; what carries loss [S,T]: all of o_i, or in stage 2 m of Eq. 12
    weights             w of Eq. 14 [S,T], None for 1
    denominator         `step_denominator` of the whole step; None: these samples are all of it,
                        L_max = T. In stage 2 "dapo" needs it: the mask shows no failed analysis

    Returns (loss, stats), stats summed over the mask, without gradient: tokens, clipped, kl. No
    tensor of the caller is changed; what stands outside the mask, even NaN, has no influence.

    >>> logp, mask = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1, 1], [1, 0]])
    >>> for reduction in REDUCTIONS:   # -Â r / (2 samples, |o_i|), / 3 tokens, / (2 samples, T)
    ...     loss, stats = policy_loss(logp, logp, None, torch.tensor([3., -3.]), mask,
    ...         clip_low=0.2, clip_high=0.2, beta=0.0, reduction=reduction)
    ...     torch.autograd.grad(loss, logp)[0].round(decimals=2).tolist()
    [[-0.75, -0.75], [1.5, 0.0]]
    [[-1.0, -1.0], [1.0, 0.0]]
    [[-0.75, -0.75], [0.75, 0.0]]
    """
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta is {beta}, so ref_logp is needed")
    mask = mask.bool()
    lengths = mask.sum(dim=1)
    if denominator is None:
        denominator = step_denominator(lengths.tolist(), reduction, max_length=mask.shape[1])
    # Outside the mask all becomes harmless first: 0 * NaN is NaN, in the loss and its gradient.
    logp = logp.masked_fill(~mask, 0.0)
    old_logp = old_logp.detach().masked_fill(~mask, 0.0)
    objective = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)  # Eqs. 3, 5
    if weights is not None:
        objective = weights.masked_fill(~mask, 0.0) * objective  # Eq. 14: min(.), not the KL
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp.masked_fill(~mask, 0.0))  # Eq. 4
    if beta != 0:
        objective = objective - beta * kl  # Eq. 5
    sums = (objective * mask).sum(dim=1)  # Eqs. 6, 13: sum over t, per sample
    if reduction == "grpo":
        sums = sums / lengths.clamp(min=1)  # Eqs. 6, 13: 1/|o_i|, or 1/max(1, |Analysis(y_j)|)
    loss = -sums.sum() / denominator  # Eqs. 6, 13
    with torch.no_grad():
        ratio, sign = torch.exp(logp - old_logp), advantages[:, None]
        clipped = ((ratio > 1 + clip_high) & (sign > 0)) | ((ratio < 1 - clip_low) & (sign < 0))
        clipped, kl = (clipped & mask).sum(), (kl * mask).sum()
    return loss, {"tokens": lengths.sum(), "clipped": clipped, "kl": kl}


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax of `scaled_logits` at the targets, from `chunk` positions' logits at a time.

    One 8,192-token response at a vocabulary of 152k has 4.6 GiB of fp32 logits. Here forward keeps
    log Z, one number a position, and backward makes each chunk's logits again (bench/RESULTS.md).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk, vocabulary, fuse):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, log_z, entropy = (hidden.new_empty(len(targets), dtype=dtype) for _ in range(3))
        compute = torch.compile(chunk_logprobs) if fuse else chunk_logprobs
        head = (weight, bias, temperature, vocabulary)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logp[part], log_z[part], entropy[part] = compute(targets[part], hidden[part], *head)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.chunk, ctx.fuse, ctx.how = chunk, fuse, (temperature, vocabulary)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        compute = torch.compile(chunk_gradient) if ctx.fuse else chunk_gradient
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in at least fp32: in bf16 the later chunks would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        grad_bias = 0
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            of_chunk = (grad_logp[part], log_z[part], targets[part], hidden[part])
            grad_logits, of_bias = compute(*of_chunk, weight, bias, *ctx.how)
            grad_bias = grad_bias + of_bias
            grad_hidden[part] = grad_logits @ weight
            if weight.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            else:
                grad_weight += grad_logits.T @ hidden[part]
            del grad_logits  # or it would be there while the next chunk's is made
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, *[None] * 5


def chunk_logprobs(targets, *head):
    """log p of the targets, log Z, and the entropy of p, [chunk] each."""
    logits = scaled_logits(*head)  # [chunk,V]
    top = logits.amax(dim=1, keepdim=True)
    probs = torch.exp(logits.sub_(top))  # in place: no third [chunk,V] exists
    z = probs.sum(dim=1)
    logp = logits.gather(1, targets[:, None]).squeeze(1) - z.log()
    entropy = z.log() - probs.mul_(logits).sum(dim=1) / z  # -sum_v p log p
    return logp, top.squeeze(1) + z.log(), entropy


def chunk_gradient(grad_logp, log_z, targets, hidden, weight, bias, temperature, vocabulary):
    """g (1[v = target] - p_v) / temperature [chunk,V], and its sum for a bias [V]."""
    grad = grad_logp[:, None] / temperature
    logits = scaled_logits(hidden, weight, bias, temperature, vocabulary)
    probs = logits.sub_(log_z[:, None]).exp_()
    grad_logits = probs.mul_(-grad).scatter_add_(1, targets[:, None], grad)
    return grad_logits.to(weight.dtype), 0 if bias is None else grad_logits.sum(dim=0)


def scaled_logits(hidden, weight, bias, temperature: float, vocabulary=None) -> torch.Tensor:
    """(h W^T + b) / temperature [M,V], in at least fp32; -1e30 for ids from `vocabulary` on."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[:, vocabulary or len(weight) :] = -1e30  # not -inf: the entropy has p log p
    return logits if temperature == 1 else logits.div_(temperature)  # Eq. 3: that of sampling


def token_logprobs(model, input_ids, attention_mask, first, temperature=1.0, chunk=1024,
                   vocabulary=None, fuse=False):  # fmt: skip
    """log pi(token | what precedes it) at the sampling temperature, and the policy's entropy there.

    model      a Hugging Face causal language model; no autocast, which backward would not see
    input_ids  prompt + completion [S,L], padded on the *right*, where attention_mask is 0
    first      position of the first wanted token [S], at least 1; all after it are wanted
    vocabulary ids of the tokenizer: what more an embedding has gets no mass; fuse: compile the head

    Returns (logp, entropy), [S,T], at least fp32: column t of row s is token first[s] + t, 0 past
    the row's end. Only logp has a gradient. The head sees only what predicts a wanted token.
    """
    # No attention mask: no token looks to its right, and without a mask attention is fast.
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [S,L,D]
    head = model.get_output_embeddings()
    end = attention_mask.sum(dim=1)  # [S]
    position = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)  # p predicts p + 1
    predicts = (position >= first[:, None] - 1) & (position < end[:, None] - 1)  # [S,L-1]
    targets, how = input_ids[:, 1:][predicts], (temperature, chunk, vocabulary, fuse)
    hidden = hidden[:, :-1][predicts]  # [M,D]
    logp, entropy = ChunkedLogprobs.apply(hidden, head.weight, head.bias, targets, *how)  # [M]
    column = torch.arange(int((end - first).max()), device=input_ids.device)
    wanted = column < (end - first)[:, None]  # [S,T], as many True as in `predicts`, in their order
    blank = logp.new_zeros(wanted.shape)
    return blank.masked_scatter(wanted, logp), blank.masked_scatter(wanted, entropy)


def carries_gradient(loss_tokens: int, advantage: float, beta: float) -> bool:
    """Must this sample be run? Not without a loss token, nor with a zero advantage and no KL term.

    >>> carries_gradient(0, 1.5, 0.1), carries_gradient(9, 0.0, 0.0), carries_gradient(9, 0.0, 0.1)
    (False, False, True)
    """
    return loss_tokens > 0 and (advantage != 0 or beta != 0)


def deal(lengths, ranks: int, budget: int) -> list[list[list[int]]]:
    """Splits sequences of these `lengths` into micro-batches: [ranks][rounds][indices].

    A micro-batch, padded to its longest sequence, has at most `budget` tokens, an eighth of them
    padding [ours]; a longer sequence stands alone. Sorted by length and dealt back and forth, ranks
    get about as many tokens, and all as many rounds, as DDP waits for every rank.

    >>> deal([40, 5, 5, 5, 4], ranks=2, budget=20)
    [[[0], [3, 4]], [[1, 2], []]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[list[int]]] = [[] for _ in range(ranks)]
    for place, i in enumerate(order):
        lap, rank = divmod(place, ranks)
        mine = batches[rank if lap % 2 == 0 else ranks - 1 - rank]
        batch = [*mine[-1], i] if mine else [i]
        padded = lengths[batch[0]] * len(batch)
        if mine and padded <= budget and padded - sum(lengths[j] for j in batch) <= budget / 8:
            mine[-1] = batch
        else:
            mine.append([i])
    rounds = max(map(len, batches))
    return [mine + [[] for _ in range(rounds - len(mine))] for mine in batches]
