"""The equations of README's table once more: slow, obvious, float64, one token at a time.

Written from the statement of the method alone, so that an error would have to be made twice, in two
different ways, to pass. Nothing is vectorised, nothing is padded: a response is the list of its own
tokens' numbers. Gradients are derived by hand and stand next to the values.
"""

from fractions import Fraction
from math import exp, log, sqrt


def advantages(rewards, scale="std"):
    """Eq. 2, for one group: a list of G rewards -> a list of G advantages."""
    group = [float(reward) for reward in rewards]
    if all(reward == group[0] for reward in group):
        return [0.0] * len(group)  # Eq. 2: equal rewards give 0 exactly
    mean = sum(group) / len(group)
    if scale == "none":
        return [reward - mean for reward in group]  # Eq. 2 without the division
    std = sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))  # Eq. 2: ddof = 1
    return [(reward - mean) / (std + 1e-4) for reward in group]  # Eq. 2: delta = 1e-4


def overlong(length, longest, cache):
    """Eq. 15, for one response, halved for rewards of 0 and 1."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return 0.5 * (longest - cache - length) / cache
    return 0.5 * -1.0


def is_informative(rewards, tau):
    """Eq. 7, for one group of 0/1 rewards: its population variance, exactly, is at least tau."""
    group = [Fraction(int(reward)) for reward in rewards]
    mean = sum(group) / len(group)
    variance = sum((reward - mean) ** 2 for reward in group) / len(group)
    return variance >= Fraction(str(tau))


def token_ratio(logp, old):
    """Eq. 3."""
    return exp(logp) / exp(old)


def token_kl(logp, ref):
    """Eq. 4, and its derivative by logp."""
    ratio = exp(ref) / exp(logp)
    return ratio - log(ratio) - 1, 1 - ratio


def token_weight(old, engine, cap):
    """Eq. 14."""
    return min(cap, exp(old) / exp(engine))


def token_objective(logp, old, ref, advantage, weight, clip_low, clip_high, beta):
    """Eq. 5, its derivative by logp, and the sum of the absolute values of its two terms."""
    r = token_ratio(logp, old)  # Eq. 3
    clipped = min(max(r, 1 - clip_low), 1 + clip_high)
    free, held = r * advantage, clipped * advantage
    surrogate = weight * min(free, held)  # Eqs. 5, 14: the weight stands before the min(.)
    # Where the minimum is the held term, at its edge, nothing moves; else d(r A)/d logp = r A.
    derivative = 0.0 if held < free else weight * r * advantage
    size = abs(surrogate)
    if beta != 0:
        kl, kl_derivative = token_kl(logp, ref)  # Eq. 4
        surrogate -= beta * kl  # Eq. 5
        derivative -= beta * kl_derivative
        size += beta * kl
    return surrogate, derivative, size


def attribution(length, span, success, success_conditioned=True):
    """Eq. 12, for one correction of `length` tokens: a 0/1 for each.

    span: first and one past the last token of the analysis, None if it is not well-formed.
    """
    mask = []
    for t in range(length):
        in_analysis = span is not None and span[0] <= t < span[1]
        right = (span is not None and success) or not success_conditioned  # Eq. 11
        mask.append(1 if in_analysis and right else 0)  # Eq. 12
    return mask


def stage_one(logp, old, ref, group_advantages, weights, **knobs):
    """Eq. 6 over all samples of one optimizer step. Every argument is a list over samples of lists
    over their tokens (ref may be None), but `group_advantages`, which has one number a sample."""
    lengths = [len(o) for o in logp]
    everything = [[1] * n for n in lengths]
    return objective(logp, old, ref, group_advantages, weights, everything, lengths, **knobs)


def stage_two(logp, old, ref, group_advantages, weights, spans, success, *,
              success_conditioned=True, **knobs):  # fmt: skip
    """Eq. 13 over all corrections of one step; `spans` and `success` as in `attribution`."""
    masks = [attribution(len(logp[j]), spans[j], success[j], success_conditioned)
             for j in range(len(logp))]  # fmt: skip
    analysis = [0 if span is None else span[1] - span[0] for span in spans]  # failed ones count
    return objective(logp, old, ref, group_advantages, weights, masks, analysis, **knobs)


def objective(logp, old, ref, group_advantages, weights, masks, counted, *,
              clip_low, clip_high, beta, reduction, longest):  # fmt: skip
    """What Eqs. 6 and 13 share: J, dJ/dlogp as ragged as logp, and the mean absolute term.
    `counted` has |o_i| or |Analysis(y_j)|, `longest` is L_max."""
    value, size = 0.0, 0.0
    gradient = [[0.0] * len(tokens) for tokens in logp]
    for i, tokens in enumerate(logp):
        for t in range(len(tokens)):
            if masks[i][t] == 0:
                continue
            term, derivative, absolute = token_objective(
                logp[i][t], old[i][t], ref and ref[i][t], group_advantages[i], weights[i][t],
                clip_low, clip_high, beta,
            )  # Eq. 5  # fmt: skip
            if reduction == "grpo":
                share = 1 / (len(logp) * max(1, counted[i]))  # Eqs. 6, 13
            elif reduction == "dapo":
                share = 1 / sum(counted)  # Eqs. 6, 13
            elif reduction == "dr_grpo":
                share = 1 / (len(logp) * longest)  # Eqs. 6, 13
            value += share * term
            size += share * absolute
            gradient[i][t] = share * derivative
    return value, gradient, size
