"""The equations of ScRPO that work on tensors: Eqs. 2 to 6 and 12 to 15, as pure functions.

From rewards to a gradient, in the order in which a step needs them:

    rewards [B,G] --Eq. 2--> advantages            group_advantages      (Eq. 15 is added to the rewards before)
    sampled ids   ---------> log pi_theta, entropy  token_logprobs       (memory-lean)
    Eqs. 3, 4, 5, 14 ------> l[i,t] per token       policy_loss
    Eq. 12 ----------------> m[j,t], stage 2        analysis_mask
    Eqs. 6, 13 ------------> one number             policy_loss / step_denominator

Legend of the shape comments: B questions, G samples a group, S sequences, T loss columns, L sequence length,
N completion tokens of a micro-batch, D hidden size, V vocabulary. Objectives J are maximised, so a loss is -J.

Where an equation comes from stands at its line: GRPO (DeepSeekMath 2402.03300), DAPO (2503.14476), Dr. GRPO
(2503.20783), ScRPO (2511.06065); [ours] marks what none of them states.
"""

import torch
from torch.nn import functional as F

REDUCTIONS = ("grpo", "dapo", "dr_grpo")


# ------------------------------------------------------------------------------------- rewards -> advantages


def group_advantages(rewards: torch.Tensor, scale: str = "std") -> torch.Tensor:
    """Â[b,i] = (R[b,i] - mean_j R[b,j]) / (std_j R[b,j] + delta), [B,G] -> [B,G] (Eq. 2; GRPO).

    std has ddof=1, as in TRL, verl and OpenRLHF; delta = 1e-4. scale="none" leaves the division out (Dr. GRPO).
    A group of equal rewards gets exactly 0, also where rounding would make its mean differ from its members.
    Raises ValueError for a group of one, whose std is NaN.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]])).round(decimals=3)
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"an advantage relative to the group needs at least 2 samples, not {rewards.shape[1]}")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # Eq. 2
    if scale == "std":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)  # Eq. 2
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def overlong_punishment(lengths: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """DAPO's soft overlong punishment, added to R before Eq. 2, on our 0/1 scale (Eq. 15; DAPO eq. 13, halved).

    Zero up to max_length - cache tokens, then falling in a line to -1/2 at max_length and beyond.

    >>> overlong_punishment(torch.tensor([10, 80, 90, 100]), max_length=100, cache=20)
    tensor([ 0.0000,  0.0000, -0.2500, -0.5000])
    """
    return 0.5 * ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)  # Eq. 15


# ---------------------------------------------------------------------------------------- per-token objective


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """D = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 >= 0 at the sampled tokens (Eq. 4; GRPO).

    The gradient that flows is k3's own, 1 - pi_ref/pi_theta, which is not that of the KL divergence
    (DeepSeek-V3.2 multiplies by the ratio to mend this; GRPO, and so we, do not).

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5])).round(decimals=4)   # e^-0.5 + 0.5 - 1
    tensor([0.1065])
    """
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio  # Eq. 4; expm1 keeps the digits that exp(x) - 1 - x cancels


def clipped_surrogate(logp, old_logp, advantages, clip_low: float, clip_high: float) -> torch.Tensor:
    """min(r Â, clip(r, 1 - clip_low, 1 + clip_high) Â), [S,T] with advantages [S] (Eqs. 3 and 5; PPO, GRPO).

    >>> logp = torch.tensor([[0.0, 0.3]])          # r = 1 and e^0.3 = 1.35
    >>> clipped_surrogate(logp, torch.zeros(1, 2), torch.tensor([2.0]), 0.2, 0.2)
    tensor([[2.0000, 2.4000]])
    >>> clipped_surrogate(logp, torch.zeros(1, 2), torch.tensor([-2.0]), 0.2, 0.2).round(decimals=4)
    tensor([[-2.0000, -2.6997]])
    """
    ratio = torch.exp(logp - old_logp)  # Eq. 3
    advantages = advantages[:, None]  # every token of o_i carries Â_i
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)  # Eq. 5


def importance_weights(old_logp: torch.Tensor, engine_logp: torch.Tensor, cap: float) -> torch.Tensor:
    """w = min(C, pi_old / mu), without gradient: corrects an engine whose numerics differ (Eq. 14).

    >>> importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -3.0]), cap=2.0).round(decimals=4)
    tensor([1.1052, 2.0000])
    """
    return torch.exp(old_logp - engine_logp).detach().clamp(max=cap)  # Eq. 14


def analysis_mask(spans, width: int, success=None, device=None) -> torch.Tensor:
    """m[j,t] = 1[R'_j = 1] 1[t in Analysis(y_j)], bool [S,T] (Eq. 12; ScRPO's gradient attribution).

    spans    for each correction (start, end) of its analysis in completion tokens, or None if not well-formed
    success  for each correction whether R'_j = 1; None leaves the condition out (the ablation)

    >>> analysis_mask([(1, 3), (0, 2), None], 4, success=[True, False, False]).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 0, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """
    column = torch.arange(width, device=device)
    start, end = torch.tensor([span or (0, 0) for span in spans], device=device).reshape(-1, 2).T[:, :, None]
    mask = (start <= column) & (column < end)  # Eq. 12: 1[t in Analysis(y_j)]
    if success is not None:
        mask = mask & torch.tensor(success, dtype=torch.bool, device=device)[:, None]  # Eq. 12: 1[R'_j = 1]
    return mask


def step_denominator(lengths, reduction: str, max_length: int) -> float:
    """What the token sums of one optimizer step, over all ranks, are divided by (Eqs. 6 and 13).

    `lengths` has one entry for *every* sample of the step, those skipped for want of a gradient included: |o_i| in
    stage 1, |Analysis(y_j)| in stage 2 (also of failed corrections; 0 if not well-formed). Success thus changes the
    numerator only. Raises ValueError for an unknown reduction.

    >>> [step_denominator([2, 6, 0, 0], reduction, max_length=10) for reduction in REDUCTIONS]
    [4, 8, 40]
    """
    if reduction == "grpo":
        return len(lengths)  # Eqs. 6, 13: mean over samples; each sample's own 1/|o_i| is applied to its sum
    if reduction == "dapo":
        return max(1, sum(lengths))  # Eqs. 6, 13: all tokens of the step, where DAPO's Eq. 8 writes a group [ours]
    if reduction == "dr_grpo":
        return len(lengths) * max_length  # Eqs. 6, 13: the constant L_max, so length does not weigh
    raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")


def policy_loss(logp, old_logp, ref_logp, advantages, mask, *, clip_low, clip_high, beta, reduction,
                weights=None, denominator=None):  # fmt: skip
    """-J of Eq. 6 (stage 1) or Eq. 13 (stage 2): the same lines, only the mask differs.

    logp         log pi_theta of the sampled tokens [S,T], with gradient
    old_logp     log pi_old [S,T], no gradient flows into it
    ref_logp     log pi_ref [S,T]; None only when beta = 0
    advantages   Â [S]
    mask         which tokens carry loss [S,T]: all of o_i in stage 1, m of Eq. 12 in stage 2
    weights      w of Eq. 14 [S,T], or None for 1
    denominator  `step_denominator` of the whole optimizer step, when these samples are only a part of it; without,
                 they are the whole step and, for "dr_grpo", L_max = T. Always needed by "dapo" in stage 2, where
                 the analyses of failed corrections count and the mask no longer shows them

    Returns (loss, stats); stats holds sums over the masked tokens as tensors without gradient: tokens, clipped, kl.
    No tensor of the caller is changed, and what stands outside the mask, NaN included, has no influence.

    A group of four responses of two tokens each, the first right, on-policy; the last one's second token is padding:

    >>> advantages = group_advantages(torch.tensor([[1., 0., 0., 0.]]), scale="none")[0]       # 3/4, -1/4, -1/4, -1/4
    >>> logp = torch.full((4, 2), 0.5).log().requires_grad_()
    >>> mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]])
    >>> def gradient(reduction):
    ...     loss, stats = policy_loss(logp, logp.detach(), None, advantages, mask, reduction=reduction,
    ...                               clip_low=0.2, clip_high=0.2, beta=0.0)
    ...     return torch.autograd.grad(loss, logp)[0]
    >>> gradient("grpo") * 32         # -Â r / (4 samples x 2 tokens), and / (4 x 1) for the last: 32 makes it whole
    tensor([[-3., -3.],
            [ 1.,  1.],
            [ 1.,  1.],
            [ 2.,  0.]])
    >>> gradient("dapo").mul(28).round()   # -Â r / 7 tokens, whichever response they are in
    tensor([[-3., -3.],
            [ 1.,  1.],
            [ 1.,  1.],
            [ 1.,  0.]])
    """
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta is {beta}, so ref_logp is needed")
    mask = mask.bool()
    lengths = mask.sum(dim=1)
    if denominator is None:
        denominator = step_denominator(lengths.tolist(), reduction, max_length=mask.shape[1])
    # Outside the mask everything is set to a harmless value first: 0 * NaN is NaN, in the loss and in its gradient.
    logp = logp.masked_fill(~mask, 0.0)
    old_logp = old_logp.detach().masked_fill(~mask, 0.0)
    objective = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)  # Eqs. 3, 5
    if weights is not None:
        objective = weights.masked_fill(~mask, 0.0) * objective  # Eq. 14: multiplies min(.), not the KL
    kl = torch.zeros_like(logp) if ref_logp is None else kl_k3(logp, ref_logp.masked_fill(~mask, 0.0))  # Eq. 4
    if beta != 0:
        objective = objective - beta * kl  # Eq. 5
    sums = (objective * mask).sum(dim=1)  # Eqs. 6, 13: sum over t, per sample
    if reduction == "grpo":
        sums = sums / lengths.clamp(min=1)  # Eqs. 6, 13: 1/|o_i|, or 1/max(1, |Analysis(y_j)|)
    loss = -sums.sum() / denominator  # Eqs. 6, 13
    with torch.no_grad():
        ratio, sign = torch.exp(logp - old_logp), advantages[:, None]
        clipped = ((ratio > 1 + clip_high) & (sign > 0)) | ((ratio < 1 - clip_low) & (sign < 0))
        stats = {"tokens": lengths.sum(), "clipped": (clipped & mask).sum(), "kl": (kl * mask).sum()}
    return loss, stats


# ----------------------------------------------------------------------------------- log-probabilities, leanly


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T) at the target ids, with the logits of only `chunk` positions alive at any time.

    At a vocabulary of 152k the fp32 logits of one 8,192-token response are 4.6 GiB, and plain autograd keeps them
    and more. Here forward keeps log Z (one number a position); backward makes each chunk's logits again, so the
    head costs 4 matrix products instead of 3. Not `checkpoint` per chunk: it holds about twice the memory, since
    the softmax's own backward needs further copies of the logits that the closed form below does not.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk):
        logp = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        log_z, entropy = torch.empty_like(logp), torch.empty_like(logp)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = scaled_logits(hidden[part], weight, bias, temperature)  # [chunk,V]
            top = logits.amax(dim=1, keepdim=True)
            probs = torch.exp(logits.sub_(top))  # in place: no third [chunk,V] exists
            z = probs.sum(dim=1)
            logp[part] = logits.gather(1, targets[part, None]).squeeze(1) - z.log()
            entropy[part] = z.log() - probs.mul_(logits).sum(dim=1) / z  # -sum_v p log p
            log_z[part] = top.squeeze(1) + z.log()
            del logits, probs  # or they would still be there while the next chunk's are made
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in at least fp32: in bf16 the later chunks would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=log_z.dtype)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = grad_logp[part, None] / ctx.temperature
            probs = scaled_logits(hidden[part], weight, bias, ctx.temperature).sub_(log_z[part, None]).exp_()
            grad_logits = probs.mul_(-grad).scatter_add_(1, targets[part, None], grad)  # g (1[v = target] - p_v) / T
            if bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if weight.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            else:
                grad_weight += grad_logits.T @ hidden[part]
            del probs, grad_logits
        bias_out = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), bias_out, None, None, None


def scaled_logits(hidden, weight, bias, temperature: float) -> torch.Tensor:
    """(h W^T + b) / T in at least fp32, [N,D] -> [N,V]."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def token_logprobs(model, input_ids, attention_mask, first, temperature: float = 1.0, chunk: int = 1024):
    """log pi(token | what precedes it) at the sampling temperature, and the policy's entropy there.

    model           a Hugging Face causal language model (a head with soft-capped logits is not supported)
                    whose weights' dtype decides the precision (not autocast: backward, which runs outside of it,
                    would make other logits than forward did)
    input_ids       prompt + completion of each sequence, padded on the *right* [S,L]
    attention_mask  1 where a token stands, 0 where padding [S,L]
    first           position of the first token whose log-probability is wanted [S], at least 1; all after it are
    temperature     T: log softmax(logits / T), as the engine sampled
    chunk           positions whose logits exist at the same time

    Returns (logp, entropy), both [S,T] in at least fp32, T the longest completion: column t of row s belongs to token
    first[s] + t; columns past the end of a row are 0. Only logp carries gradient. The head is applied to exactly
    the positions that predict a wanted token: no logits of prompts, padding, or masked-out tokens before `first`.
    """
    # Padding on the right is in no real token's past, so a causal model needs no mask to ignore it, and without
    # one it takes its fast attention kernel. `attention_mask` only tells where each sequence ends.
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [S,L,D]
    end = attention_mask.sum(dim=1)  # [S]
    position = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)
    predicts = (position >= first[:, None] - 1) & (position < end[:, None] - 1)  # p predicts token p + 1 [S,L-1]
    head = model.get_output_embeddings()
    logp, entropy = ChunkedLogprobs.apply(
        hidden[:, :-1][predicts], head.weight, head.bias, input_ids[:, 1:][predicts], temperature, chunk
    )  # [N]
    width = torch.arange(int((end - first).max()), device=input_ids.device)
    wanted = width < (end - first)[:, None]  # [S,T], as many True as `predicts` has, in the same order
    blank = logp.new_zeros(wanted.shape)
    return blank.masked_scatter(wanted, logp), blank.masked_scatter(wanted, entropy)


# -------------------------------------------------------------------------------------- how a step is split up


def carries_gradient(loss_tokens: int, advantage: float, beta: float) -> bool:
    """Must this sample be run at all? Not without a loss token, nor with a zero advantage when there is no KL term.

    >>> carries_gradient(0, 1.5, 0.04), carries_gradient(9, 0.0, 0.0), carries_gradient(9, 0.0, 0.04)
    (False, False, True)
    """
    return loss_tokens > 0 and (advantage != 0 or beta != 0)


def deal(lengths, ranks: int, budget: int) -> list[list[list[int]]]:
    """Splits sequences of these `lengths` into micro-batches: [ranks][rounds][indices].

    A micro-batch padded to its longest sequence has at most `budget` tokens (one longer sequence stands alone), and at
    most an eighth of that is padding [ours]: beside one long straggler short sequences are not padded to its length.
    Sorted by length, so padding is small; dealt to the ranks back and forth, so each gets about as many tokens. All
    ranks get the same number of rounds, if need be empty ones: DDP waits for every rank at each backward.

    >>> deal([5, 3, 9, 2, 4], ranks=2, budget=10)
    [[[2], [1, 3]], [[0, 4], []]]
    >>> deal([40, 5, 5, 5, 5], ranks=1, budget=80)
    [[[0], [1, 2, 3, 4]]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    hands: list[list[list[int]]] = [[] for _ in range(ranks)]
    for place, i in enumerate(order):
        lap, seat = divmod(place, ranks)
        hand = hands[seat if lap % 2 == 0 else ranks - 1 - seat]
        batch = [*hand[-1], i] if hand else [i]
        padded = lengths[batch[0]] * len(batch)
        if hand and padded <= budget and padded - sum(lengths[j] for j in batch) <= budget / 8:
            hand[-1] = batch
        else:
            hand.append([i])
    rounds = max(map(len, hands))
    return [hand + [[] for _ in range(rounds - len(hand))] for hand in hands]
