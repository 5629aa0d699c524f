"""Noise scales of rows of data that are few enough to list every batch that can be drawn of them."""

import torch

from alignkit.func import noise_scale, per_sample_grads
from alignkit.losses import policy, value

BATCHES = {size: torch.cartesian_prod(*[torch.arange(12)] * size).view(-1, size) for size in (1, 2, 3, 4)}


def policy_loss(model, x, action, reward):
    """REINFORCE on one action for each x."""
    return policy.reinforce(model(x).log_softmax(-1).gather(-1, action[:, None])[:, 0], reward).mean(), {}


def value_loss(model, x, reward):
    """Least squares, which is quadratic in the parameters."""
    return value.squared(model(x)[:, 0], reward).mean(), {}


def estimates(seed):
    """Means over all batches of 4 of 12 rows of the estimates of |G|^2 and tr(Sigma), over their true values."""
    torch.set_default_dtype(torch.float64)
    model, x, reward = torch.nn.Linear(3, 4), torch.randn(12, 3), torch.randn(12)
    rows = {"x": x, "action": torch.arange(12) % 4, "reward": reward}
    losses = [policy_loss(model, **{name: x[i : i + 1] for name, x in rows.items()})[0] for i in range(12)]
    true = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(x, model.parameters())]) for x in losses])
    grads = torch.cat([g.flatten(1) for g in per_sample_grads(policy_loss, model, rows).values()], 1)
    signal, noise = true.mean(0).square().sum(), (true - true.mean(0)).square().sum(-1).mean()
    big, out = grads[BATCHES[4]].mean(1).square().sum(-1), {"grads": (grads - true).abs().max()}
    for size in (1, 2):
        small = grads[BATCHES[4]].unflatten(1, (-1, size)).mean(2).square().sum(-1)
        found = noise_scale(small, big, rows=size)
        out |= {f"signal_{size}": found.signal.mean() / signal, f"noise_{size}": found.noise.mean() / noise}
    return out | {"naive_signal": big.mean() / signal, "off": (found.scale.mean() / (noise / signal) - 1).abs()}


def steps(seed):
    """The best step with batches of 1 to 4 rows and its gain over those of the whole gradient; gaps to the formula."""
    torch.set_default_dtype(torch.float64)
    x, reward, out = torch.randn(12, 3) * torch.tensor([3.0, 1.0, 0.3]), torch.randn(12), {"sizes": list(BATCHES)}
    for name, inputs in (("plain", x), ("white", torch.linalg.qr(x)[0] * 12**0.5)):
        model, hessian = torch.nn.Linear(3, 1, bias=False), inputs.T @ inputs / 12
        grads = per_sample_grads(value_loss, model, {"x": inputs, "reward": reward})["weight"][:, 0]
        mean, noise = grads.mean(0), grads - grads.mean(0)
        batches = [mean[None], *(grads[batch].mean(1) for batch in BATCHES.values())]
        best = torch.stack([best_step(model.weight.detach(), g, inputs, reward) for g in batches])
        for what, h in (("exact", hessian), ("simple", torch.eye(3))):
            out[f"{name}_{what}"] = (noise @ h * noise).sum(-1).mean() / (mean @ h @ mean)
            gaps = best[1:] / best[0] - 1 / (1 + out[f"{name}_{what}"] / torch.tensor(list(BATCHES)))[:, None]
            out |= {f"{name}_{what}_step": gaps[:, 0].abs().max(), f"{name}_{what}_gain": gaps[:, 1].abs().max()}
        out[f"{name}_steps"] = best[1:, 0] / best[0, 0]
    return out


def best_step(weight, grads, x, reward):
    """(step, gain) at the minimum of the expected loss after a step, which is a parabola in its length."""
    zero, one, two = (value.squared((weight - e * grads) @ x.T, reward.expand(len(grads), -1)).mean() for e in range(3))
    a, b = (two - 2 * one + zero) / 2, (4 * one - two - 3 * zero) / 2
    return torch.stack([-b / (2 * a), b**2 / (4 * a)])
