"""Two answers, a preferred to b by a share p > 1/2 of the labels: what DPO and KTO make of the contradiction."""

from functools import partial
from itertools import product

import torch

from alignkit.kl import categorical
from alignkit.losses.preference import dpo
from alignkit.losses.unpaired import kto
from alignkit.testing.optimum import Problem, per_pair, solve

SHARES, REFS, BETAS = (0.55, 0.6, 0.72, 0.85), (0.1, 0.3, 0.5, 0.8), (0.1, 0.2, 0.5, 1.0, 3.0)


def contradictions(seed):
    """DPO's optima against the closed form, and the sign of the slope of KTO's loss, for all p, ref(a) and beta."""
    torch.set_default_dtype(torch.float64)
    gaps, minority, predicted, falls, averse, even = [], [], [], [], [], []
    for p, ref_a, beta in product(SHARES, REFS, BETAS):
        ref, share = torch.tensor([ref_a, 1 - ref_a]), torch.tensor([p, 1 - p])
        weights = share ** (1 / beta) * ref
        found = dpo_optimum(ref, p, beta)
        gaps.append((found - weights / weights.sum()).abs().max())
        minority.append(found[0] < found[1])
        predicted.append(weights[0] < weights[1])
        falls.append(kto_slopes(ref, p, beta) < 0)
        averse.append(kto_slopes(ref, p, beta, lambda_u=2.0) < 0)
        even.append(kto_slopes(ref, 0.5, beta).abs().max())
    minority, predicted = torch.stack(minority), torch.stack(predicted)
    curve = {ref_a: [dpo_optimum(torch.tensor([ref_a, 1 - ref_a]), 0.6, beta)[0] for beta in BETAS] for ref_a in REFS}
    return {
        "dpo_gap": max(gaps), "dpo_minority": minority.double().mean(), "kto_even_slope": max(even),
        "dpo_condition": (minority == predicted).double().mean(), "kto_falls": torch.stack(falls).double().mean(),
        "kto_averse_falls": torch.stack(averse).double().mean(), "betas": BETAS,
    } | {f"dpo_ref_{ref_a:g}": probs for ref_a, probs in curve.items()}  # fmt: skip


def dpo_optimum(ref, p, beta):
    """Where descent of DPO's expected loss ends."""
    problem = Problem(ref.log(), torch.zeros(2), beta)
    wins = torch.tensor([[0.5, p], [1 - p, 0.5]])
    return solve(per_pair(partial(dpo, beta=beta), problem, preferences=wins), ref.log()).probs


def kto_slopes(ref, p, beta, lambda_u=1.0):
    """In log pi(a) / pi(b), of KTO's expected loss: each label makes one answer desirable and the other undesirable."""
    odds = torch.linspace(-8, 8, 161).requires_grad_()
    logps = torch.stack([odds / 2, -odds / 2], -1).log_softmax(-1)
    log_ratios = logps - ref.log()
    point = categorical(logps, ref.log().expand_as(logps)).detach()[:, None].expand_as(log_ratios)  # KL(pi || ref)
    desirable, chance = torch.ones_like(log_ratios).bool(), torch.tensor([p, 1 - p])
    liked, disliked = (kto(log_ratios, point, x, beta=beta, lambda_u=lambda_u) for x in (desirable, ~desirable))
    (slopes,) = torch.autograd.grad((chance * liked + (1 - chance) * disliked).sum(), odds)
    return slopes
