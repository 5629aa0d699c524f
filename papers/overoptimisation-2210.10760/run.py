"""Best-of-n by a proxy of a gold score: normal and heavy-tailed errors, and proxies trained on comparisons."""

import runpy
from math import log, sqrt
from pathlib import Path

import torch
from torch.distributions import Normal, StudentT

from alignkit.losses.regression import best_of_n_weights

WORLD = runpy.run_path(str(Path(__file__).with_name("world.py")))
NS, SIZES, LIGHT = [4**i for i in range(8)], (0, 6, 12, 24), Normal(0.0, 1.0)


def best_of(n, proxy, gold):
    """Gold scores of the answers that the proxy likes best in each group of n; its own if `gold` is `proxy`."""
    return (best_of_n_weights(proxy.unflatten(-1, (-1, n))) * gold.unflatten(-1, (-1, n))).sum(-1)


def regressional(seed):
    """Gold score of the best of 256 less what equation 1 makes of the expected proxy, by variance of the error."""
    x, out = torch.linspace(-10, 10, 100_001).double(), {}
    top = (LIGHT.cdf(x) ** 256).diff() @ (x[1:] + x[:-1]) / 2  # E max of 256 normal numbers
    for var in (1, 3):
        gold = torch.randn(4000, 256).double()
        kept = best_of(256, gold + sqrt(var) * torch.randn_like(gold), gold)
        out |= {f"gap_{var}": kept.mean() - top * sqrt(1 + var) / (1 + var), f"gap_{var}_se": kept.std() / sqrt(4000)}
        out[f"lost_{var}"] = top * sqrt(1 + var) - kept.mean()
    return out


def tails(seed):
    """Gold score of the best of n if the proxy's error is normal, or Student's t with 5 or 2 degrees of freedom."""
    gold, out = torch.randn(256, NS[-1]), {}
    for name, error in {"normal": LIGHT, "t5": StudentT(5.0), "t2": StudentT(2.0)}.items():
        proxy = gold + error.sample(gold.shape)
        out |= {f"{name}_{n}": best_of(n, proxy, gold).mean() for n in NS}
        out[f"{name}_proxy"] = best_of(NS[-1], proxy, proxy).mean()
    return out


def catastrophic(seed):
    """Expected proxy reward and KL of policies that make the tail of a heavy-tailed error likelier."""
    (near, near_kl), (far, far_kl) = WORLD["heavy"](1e2), WORLD["heavy"](1e4)
    return {"proxy": far, "growth": far / near, "kl": far_kl, "shrinkage": far_kl / near_kl}


def loop(seed):
    """Proxies with none to all of the gold's quadratic terms: gold scores against d = sqrt(KL), and fits of them."""
    gold, proxies = WORLD["scores"](SIZES, groups=128, n=NS[-1])
    curves = torch.tensor([[best_of(n, proxy, gold).mean() for n in NS] for proxy in proxies]).double()
    d = torch.tensor([log(n) - (n - 1) / n for n in NS[1:]], dtype=torch.float64).sqrt()
    out = {"d": d, "curves": curves}
    for size, curve in zip(SIZES, curves):
        out |= {f"gold_{size}_{n}": y for n, y in zip(NS, curve)}
        out |= {f"{name}_{size}": x for name, x in WORLD["fitted"](d, d, curve[1:]).items()}
        out[f"rl_{size}"] = WORLD["fitted"](d, d.log(), curve[1:])["fit"]
    return out | {f"least_{form}": min(out[f"{form}_{size}"] for size in SIZES) for form in ("fit", "rl")}
