"""Off-policy REINFORCE on 100 arms, by gradient ascent on the exact objective, with baselines V = V^mu + shift."""

import torch

from alignkit.losses.policy import asymre
from alignkit.weights import weigh

ARMS, INSTANCES, STEPS = 100, 10, 10_000
SHIFTS = (-1.0, -0.2, -0.05, -0.02, 0.0, 0.05, 0.2)
LOGGED = (0, *(round(10 ** (k / 6)) for k in range(4, 24)), STEPS)


def arms(seed):
    """Over instances and shifts: the worst of each; supports and mean rewards at each shift."""
    torch.set_default_dtype(torch.float64)
    mu, r = torch.randn(INSTANCES, 1, ARMS).softmax(-1), torch.rand(INSTANCES, 1, ARMS)
    advantages, shift = r - (mu * r).sum(-1, keepdim=True), torch.tensor(SHIFTS)[:, None]
    logits, gains, rate = mu.log().expand(-1, len(SHIFTS), -1), [], 1 / shift.abs().clamp(min=0.02)
    for step in range(STEPS + 1):
        if step in LOGGED:
            gains.append((logits.softmax(-1) * advantages).sum(-1))
        logits = logits - rate * gradient(logits, mu, advantages, shift)
    pi, low = logits.softmax(-1), [i for i, x in enumerate(SHIFTS) if x < 0]
    limit, high = projected(mu * (advantages - shift[low]) / -shift[low]), len(low)
    right = pi[:, high:].argmax(-1) == r.argmax(-1)
    return compared(mu, advantages) | {
        "distance_to_limit": (pi[:, low] - limit).abs().sum(-1).max(),
        "least_gain": gains[-1][:, low].min(),
        "least_gain_on_the_way": min(gain[:, low].min() for gain in gains[1:]),
        "least_support": (pi[:, 0] > 1e-6).sum(-1).min(),
        "least_top": pi[:, high:].amax(-1).min(),
        "wrong_arm": 1 - right.double().mean(),
        "support": (pi > 1e-6).double().sum(-1).mean(0),
        "course": torch.stack(gains).mean(1).T,
        "steps": LOGGED,
    }


def gradient(logits, weights, advantages, shift):
    """Of the mean of the loss under `weights`, in the logits."""
    logits = logits.detach().requires_grad_()
    loss = weigh(asymre(logits.log_softmax(-1), advantages, shift=shift), weights.expand(logits.shape))
    return torch.autograd.grad(loss, logits)[0]


def projected(x):
    """(x - tau)+ with tau so that it sums to 1."""
    ordered = x.sort(-1, descending=True).values
    tau = (ordered.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1)
    return (x - tau.gather(-1, (ordered > tau).sum(-1, keepdim=True) - 1)).clamp(min=0)


def compared(mu, advantages):
    """How the gradient at another policy changes with the baseline, with samples of that policy and of mu."""
    logits, change = torch.randn(mu.shape), 0.3
    pi = logits.softmax(-1)
    on, off = (gradient(logits, w, advantages, change) - gradient(logits, w, advantages, 0.0) for w in (pi, mu))
    gap = (off - change * (mu - pi)).abs().max()
    return {"on_policy_gap": on.abs().max(), "off_policy_gap": gap, "off_policy_change": off.abs().max()}
