"""The equations of ScRPO that work on tensors, as pure functions. A step uses them in this order:

    rewards [B,G] --Eqs. 15, 2--> advantages               overlong_punishment, group_advantages
    Eq. 12 ---------------------> m[j,t], stage 2          analysis_mask
    sampled ids ----------------> log pi_theta, entropy    token_logprobs
    Eqs. 3 to 6, 13, 14 --------> l[i,t], then -J          step_denominator, policy_loss

Equation numbers are those of README's table, not of the papers.
Shapes: B questions, G samples a group, S sequences, T loss columns, L sequence length, M scored
tokens, D hidden size, V vocabulary. Sources: GRPO (DeepSeekMath 2402.03300), DAPO (2503.14476),
Dr. GRPO (2503.20783), ScRPO (2511.06065); [ours] marks what none of them states.
"""

import torch

REDUCTIONS = ("grpo", "dapo", "dr_grpo")


def group_advantages(rewards: torch.Tensor, scale: str = "std") -> torch.Tensor:
    """Â[b,i] = (R[b,i] - mean_j R[b,j]) / (std_j R[b,j] + delta), [B,G] -> [B,G] (Eq. 2; GRPO).

    std has ddof=1, as in TRL, verl and OpenRLHF; delta = 1e-4; scale="none" does not divide (Dr.
    GRPO). Equal rewards give exactly 0, even where the mean of equal floats is rounded.

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
    """DAPO's soft overlong punishment, added to R before Eq. 2 (Eq. 15).

    It is halved, because DAPO's R is 1 or -1 and ours 1 or 0. `cache` is the length of the ramp.

    >>> overlong_punishment(torch.tensor([10, 80, 90, 100]), max_length=100, cache=20)
    tensor([ 0.0000,  0.0000, -0.2500, -0.5000])
    """
    return 0.5 * ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)  # Eq. 15


def analysis_mask(spans, width: int, success=None) -> torch.Tensor:
    """m[j,t] = 1[R'_j = 1] 1[t in Analysis(y_j)], bool [S,T] with T = `width` (Eq. 12; ScRPO).

    spans    (start, end) of each correction's analysis in its tokens, None: not well-formed
    success  is R'_j = 1, for each correction; None leaves the condition out (an ablation)

    A correction with R' = 1 has Â' >= 0. So with `success` every token that carries gradient in
    stage 2 is pushed up, and none down: with beta = 0 the lower clip of Eq. 5 never acts.

    >>> analysis_mask([(1, 3), (0, 2), None], 4, success=[True, False, False]).int().tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for j, span in enumerate(spans):
        if span is not None and (success is None or success[j]):  # Eq. 12: 1[R'_j = 1]
            start, end = span
            mask[j, start:end] = True  # Eq. 12: 1[t in Analysis(y_j)]
    return mask


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """D = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 >= 0 at the sampled tokens (Eq. 4; GRPO).

    This is Schulman's estimator "k3" of the KL divergence. It is unbiased; its gradient, which GRPO
    follows, is not an unbiased gradient of the KL divergence.

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
    """w = min(C, pi_old / mu), without gradient; C is `cap` (Eq. 14; its use is [ours]).

    mu is the probability with which the engine sampled the token. It differs from pi_old because
    the engine rounds differently.

    >>> importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -3.0]), cap=2.0)
    tensor([1.1052, 2.0000])
    """
    return torch.exp(old_logp - engine_logp).detach().clamp(max=cap)  # Eq. 14


def step_denominator(lengths, reduction: str, max_length: int) -> float:
    """What the sums of one optimizer step, over all ranks, are divided by (Eqs. 6, 13).

    With "grpo", policy_loss has divided each sample's sum by the sample's own length before.

    lengths  |o_i|, or in stage 2 |Analysis(y_j)| (0 if not well-formed), of *every* sample of the
             step. Failed corrections count too: success changes the numerator only [ours]

    >>> [step_denominator([2, 6, 0, 0], reduction, max_length=10) for reduction in REDUCTIONS]
    [4, 8, 40]
    """
    if reduction == "grpo":  # mean over samples; policy_loss divides each by its own length
        return len(lengths)
    if reduction == "dapo":  # mean over the tokens of the step [ours]; DAPO: of a group
        return max(1, sum(lengths))
    if reduction == "dr_grpo":  # mean over samples, each divided by the constant L_max
        return len(lengths) * max_length
    raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")


def policy_loss(
    logp, old_logp, ref_logp, advantages, mask, *, clip_low: float, clip_high: float, beta: float,
    reduction: str, weights=None, denominator=None,
):
    """-J of Eq. 6 (stage 1) or Eq. 13 (stage 2): the same lines, only the mask differs.

    logp         log pi_theta of the sampled tokens [S,T], the only tensor with a gradient
    old_logp     log pi_old [S,T]
    ref_logp     log pi_ref [S,T], or None if beta = 0
    advantages   Â [S]
    mask         which tokens carry loss [S,T]: all of o_i, or in stage 2 m of Eq. 12
    weights      w of Eq. 14 [S,T], None for 1
    denominator  `step_denominator` of the whole optimizer step. None, for tests: these samples are
                 the whole step, their masks show all lengths, and L_max = T

    Returns (loss, stats); stats are sums over the mask, without gradient: tokens, clipped, kl.
    Values outside the mask, even NaN, have no influence.

    >>> logp, mask = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1, 1], [1, 0]])
    >>> for reduction in REDUCTIONS:   # divided by 2 samples and |o_i|; 3 tokens; 2 samples and T
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
    lengths = mask.sum(dim=1)  # [S]
    if denominator is None:
        denominator = step_denominator(lengths.tolist(), reduction, max_length=mask.shape[1])

    def inside(values):
        return values.masked_fill(~mask, 0.0)  # not values * mask: NaN * 0 is NaN

    logp = inside(logp)
    old_logp = inside(old_logp.detach())
    objective = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)  # Eqs. 3, 5
    if weights is not None:
        objective = inside(weights) * objective  # Eq. 14
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        kl = kl_k3(logp, inside(ref_logp))  # Eq. 4
    if beta != 0:
        objective = objective - beta * kl  # Eq. 5
    sample_sums = (objective * mask).sum(dim=1)  # Eqs. 6, 13: the sum over t
    if reduction == "grpo":
        sample_sums = sample_sums / lengths.clamp(min=1)  # 1/|o_i|, or 1/max(1, |Analysis(y_j)|)
    loss = -sample_sums.sum() / denominator  # Eqs. 6, 13

    with torch.no_grad():
        ratio = torch.exp(logp - old_logp)
        above = (ratio > 1 + clip_high) & (advantages[:, None] > 0)
        below = (ratio < 1 - clip_low) & (advantages[:, None] < 0)
        stats = {"tokens": lengths.sum(), "clipped": inside(above | below).sum(), "kl": kl.sum()}
    return loss, stats


def token_logprobs(
    model, input_ids, attention_mask, first, temperature: float = 1.0, chunk: int = 1024,
    vocabulary=None, compile_head: bool = False,
):
    """log pi(token | all tokens before it) at the sampling temperature, and the policy's entropy.

    model           a Hugging Face causal language model; not under autocast, because the custom
                    backward pass below would not see it
    input_ids       prompt + completion [S,L], padded on the *right*
    attention_mask  1 where there is a token [S,L]; it only tells the rows' lengths
    first           position of the first scored token [S], at least 1; all later ones are scored
                    too, and policy_loss applies the mask
    chunk           positions whose logits exist at the same time
    vocabulary      ids that the tokenizer has; further rows of the embedding get probability 0
    compile_head    compile what is done with the logits

    Returns (logp, entropy), [S,T], at least fp32: column t of row s is token first[s] + t, and 0
    past the end of the row. Only logp has a gradient. Only the M positions that predict a scored
    token go through the head. For two rows of L = 5 with first = [2, 3] and lengths 5 and 4:

        hidden [S,L]  . x x x .     targets [M]  2 3 4 | 3      logp [S,T]  2 3 4
                      . . x . .                                             3 0 0
    """
    # Without a mask attention is causal and fast; no token attends to the padding after it.
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [S,L,D]
    end = attention_mask.sum(dim=1)  # [S]
    position = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)  # p predicts p + 1
    predicts = (position >= first[:, None] - 1) & (position < end[:, None] - 1)  # [S,L-1]
    head = model.get_output_embeddings()
    logp, entropy = ChunkedLogprobs.apply(
        hidden[:, :-1][predicts], input_ids[:, 1:][predicts], head.weight, head.bias,
        temperature, vocabulary or len(head.weight), chunk, compile_head,
    )
    lengths = end - first
    column = torch.arange(int(lengths.max()), device=input_ids.device)
    filled = column < lengths[:, None]  # [S,T]; row by row as many tokens as `predicts` has
    blank = logp.new_zeros(filled.shape)
    return blank.masked_scatter(filled, logp), blank.masked_scatter(filled, entropy)


def scaled_logits(hidden, weight, bias, temperature: float, vocabulary: int) -> torch.Tensor:
    """(h W^T + b) / temperature [M,V], in at least fp32; -1e30 for ids from `vocabulary` on."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[:, vocabulary:] = -1e30  # not -inf: p log p of the entropy would be NaN
    if temperature != 1:
        logits.div_(temperature)  # Eq. 3: of the distribution that was sampled from
    return logits


class ChunkedLogprobs(torch.autograd.Function):
    """log p of the targets and the entropy of p, with the logits of `chunk` positions at a time.

    One 8,192-token response at a vocabulary of 152k has 4.6 GiB of fp32 logits. Forward keeps only
    log Z, one number a position; backward computes each chunk's logits again (bench/RESULTS.md).
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, temperature, vocabulary, chunk, compile_head):
        compute = torch.compile(chunk_logprobs) if compile_head else chunk_logprobs
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = hidden.new_empty(len(targets), dtype=dtype)
        log_z = torch.empty_like(logp)
        entropy = torch.empty_like(logp)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logp[part], log_z[part], entropy[part] = compute(
                hidden[part], targets[part], weight, bias, temperature, vocabulary
            )
        ctx.save_for_backward(hidden, targets, weight, bias, log_z)
        ctx.temperature = temperature
        ctx.vocabulary = vocabulary
        ctx.chunk = chunk
        ctx.compile_head = compile_head
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, targets, weight, bias, log_z = ctx.saved_tensors
        compute = torch.compile(chunk_gradient) if ctx.compile_head else chunk_gradient
        grad_hidden = torch.empty_like(hidden)
        # At least fp32: a bf16 sum would round away most of what the later chunks add.
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=log_z.dtype)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_logits, bias_part = compute(
                grad_logp[part], log_z[part], hidden[part], targets[part], weight, bias,
                ctx.temperature, ctx.vocabulary,
            )
            grad_hidden[part] = grad_logits @ weight
            if weight.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            else:
                grad_weight += grad_logits.T @ hidden[part]
            if bias is not None:
                grad_bias += bias_part
            del grad_logits  # its memory is needed for the next chunk's
        if bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, None, grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def chunk_logprobs(hidden, targets, weight, bias, temperature: float, vocabulary: int):
    """log p of the targets, log Z, and the entropy of p, [chunk] each."""
    logits = scaled_logits(hidden, weight, bias, temperature, vocabulary)  # [chunk,V]
    top = logits.amax(dim=1, keepdim=True)
    shifted = logits.sub_(top)  # in place, so that there are two [chunk,V], not three
    exp = torch.exp(shifted)
    z = exp.sum(dim=1)
    logp = shifted.gather(1, targets[:, None]).squeeze(1) - z.log()
    entropy = z.log() - exp.mul_(shifted).sum(dim=1) / z  # -sum_v p log p
    return logp, top.squeeze(1) + z.log(), entropy


def chunk_gradient(
    grad_logp, log_z, hidden, targets, weight, bias, temperature: float, vocabulary: int
):
    """grad_logp (1[v = target] - p_v) / temperature [chunk,V]; for a bias its sum [V]."""
    grad = grad_logp[:, None] / temperature
    logits = scaled_logits(hidden, weight, bias, temperature, vocabulary)
    probs = logits.sub_(log_z[:, None]).exp_()
    grad_logits = probs.mul_(-grad).scatter_add_(1, targets[:, None], grad)
    bias_part = None if bias is None else grad_logits.sum(dim=0)
    return grad_logits.to(weight.dtype), bias_part
