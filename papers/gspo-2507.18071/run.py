"""What GSPO is, by autograd on random rows; and how often it clips, beside GRPO, on simulated log-ratios of tokens."""

import torch
from torch.func import grad_and_value

from alignkit.importance import geometric_log_ratio
from alignkit.losses.policy import cispo, clip_fraction, clipped_surrogate
from alignkit.losses.sequence import gspo, gspo_token
from alignkit.masking import masked_mean
from alignkit.weights import sequence_mean, weigh

GRPO, GSPO = {"low": 0.2, "high": 0.27}, {"low": 3e-4, "high": 4e-4}
TIGHT, OPEN = {"low": 0.1, "high": 0.1}, {"low": 1.0, "high": 99.0}
SPREAD, LENGTHS = 0.0763, (100, 1000, 8000, 32_000)  # SPREAD: of log-ratios, for GRPO to clip 0.0013 of the tokens


def identities(seed):
    """Gaps between values and gradients of losses on rows of 1 to 8 tokens, of which TIGHT clips many."""
    torch.set_default_dtype(torch.float64)
    mask, old = torch.arange(8) < torch.arange(1, 9)[:, None], -3 * torch.rand(8, 8)
    new, rows = old + 0.3 * torch.randn(8, 8), torch.randn(8).sign() * (0.5 + torch.rand(8))
    tokens = rows[:, None].expand(8, 8)
    single = [x.reshape(64, 1) for x in (old, tokens, mask)]
    losses = {
        "row": lambda x: gspo(x, old, rows, mask, **TIGHT),
        "token": lambda x: gspo_token(x, old, tokens, mask, **TIGHT),
        "single": lambda x: gspo(x.reshape(64, 1), single[0], single[1][:, 0], single[2], **TIGHT).view(8, 8),
        "grpo": lambda x: clipped_surrogate(x, old, tokens, **TIGHT),
        "gspo_open": lambda x: gspo(x, old, rows, mask, **OPEN),
        "grpo_open": lambda x: clipped_surrogate(x, old, tokens, **OPEN),
        "grpo_far": lambda x: clipped_surrogate(x, x.detach() - 1, tokens.abs(), **GRPO),  # a ratio of e, and A > 0
        "cispo_far": lambda x: cispo(x, x.detach() - 1, tokens.abs(), low=0.8, high=1.27),
    }
    found = {k: grad_and_value(lambda x, f=f: weigh(f(x), sequence_mean(mask)))(new) for k, f in losses.items()}
    s = -gspo(new, old, torch.ones(8), mask, **OPEN)[:, 0]
    product = torch.where(mask, new - old, 0).sum(-1).exp()
    out = {"power": (s ** mask.sum(-1) / product - 1).abs().max()}
    for name, a, b in (("token", "row", "token"), ("single", "single", "grpo"), ("several", "row", "grpo")):
        out[name] = max((x - y).abs().max() for x, y in zip(found[a], found[b]))
    for name in ("gspo_open", "grpo_open"):
        grad = found[name][0]
        out[f"{name}_uneven"] = (grad - masked_mean(grad, mask, -1)[:, None])[mask].abs().max()
    far = {name: found[name][0][mask].abs() for name in ("grpo_far", "cispo_far")}
    return out | {"grpo_far": far["grpo_far"].max(), "cispo_far": far["cispo_far"].min()}


def clipped(seed):
    """Shares of tokens that are clipped; with `drift` the mean ratio is 1, so the mean log-ratio is below 0."""
    out = {}
    for length in LENGTHS:
        draws = SPREAD * torch.randn(1_600_000 // length, length)
        sign = torch.randint(2, (len(draws), 1)) * 2 - 1
        for name, x in (("", draws), ("drift_", draws - SPREAD**2 / 2)):
            s = geometric_log_ratio(x, torch.ones_like(x, dtype=bool))
            kinds = {"grpo": (x, GRPO), "gspo": (s, GSPO), "same_range": (s, GRPO)}
            shares = {k: clip_fraction(y, 0 * y, sign, **c).double().mean() for k, (y, c) in kinds.items()}
            shares["orders"] = (shares["gspo"] / shares["grpo"]).log10()
            out |= {f"{name}{k}_{length}": share for k, share in shares.items()}
    return out
