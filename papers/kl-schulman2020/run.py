"""Means and standard deviations of the estimators under q, by a fine sum over x instead of samples."""

import torch
from torch.distributions import Normal, kl_divergence

from alignkit.kl import k1, k2, k3

GAUSSIANS = {"near": (0.1, 1.0), "far": (1.0, 1.0), "wide": (0.0, 2.0)}
CATEGORICAL = [0.9, 0.05, 0.05], [0.3, 0.3, 0.4]


def table(seed):
    """`<case>_<estimator>_bias` and `_sd`, as shares of the true KL; the largest bias of k1 and k3."""
    out, biases, asymmetry = {}, [], 0.0
    for name, (log_q, log_p, weight, true, reverse) in cases():
        for estimator in (k1, k2, k3):
            value = estimator(log_q, log_p)
            mean = (weight * value).sum()
            label = f"{name}_{estimator.__name__}"
            out[f"{label}_bias"] = (mean - true) / true
            out[f"{label}_sd"] = (weight * (value - mean) ** 2).sum().sqrt() / true
            biases += [abs(out[f"{label}_bias"])] if estimator is not k2 else []
        asymmetry = max(asymmetry, abs(true - reverse))
    return out | {"bias_of_k1_and_k3": max(biases), "asymmetry": asymmetry}


def cases():
    """name, (log q, log p, probability of each x under q, KL(q || p), KL(p || q))."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    q = Normal(x.new_tensor(0.0), x.new_tensor(1.0))
    for name, (mean, sd) in GAUSSIANS.items():
        p = Normal(x.new_tensor(mean), x.new_tensor(sd))
        weight = q.log_prob(x).softmax(0)
        yield name, (q.log_prob(x), p.log_prob(x), weight, kl_divergence(q, p), kl_divergence(p, q))
    a, b = torch.tensor(CATEGORICAL, dtype=torch.float64)
    yield "categorical", (a.log(), b.log(), a, (a * (a / b).log()).sum(), (b * (b / a).log()).sum())
