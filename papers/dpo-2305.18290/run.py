"""The optimum of DPO, and reward against KL in a world of 256 answers whose optimal frontier is known exactly."""

import runpy
from functools import partial
from itertools import combinations
from pathlib import Path

import torch

from alignkit.kl import k1
from alignkit.losses.policy import reinforce
from alignkit.losses.preference import dpo
from alignkit.testing.optimum import per_answer, per_pair, problem, solve

SIZES = (200, 2_000, 20_000)


def optimum(seed):
    """Largest gaps between where descent of the expected losses ends and ref exp(r / beta) / Z."""
    gaps, optima = {"dpo_gap": [], "rl_gap": []}, []
    for beta in (0.3, 1.0, 5.0):
        p = problem(8, beta=beta, seed=seed)
        optima.append((p.ref_logps + p.rewards / beta).softmax(-1))
        pairs = per_pair(partial(dpo, beta=beta), p, sampler=p.ref_logps.exp())
        for name, objective in zip(gaps, (pairs, per_answer(partial(rl_loss, beta=beta), p))):
            gaps[name].append((solve(objective, p.ref_logps).probs - optima[-1]).abs().max())
    apart = min((a - b).abs().max() for a, b in combinations(optima, 2))
    return {name: max(x) for name, x in gaps.items()} | {"beta_effect": apart}


def rl_loss(logps, ref_logps, rewards, beta):
    """REINFORCE with the KL in the reward."""
    return reinforce(logps, rewards - beta * k1(logps, ref_logps).detach())


def linear(seed):
    """Where a label says something of all answers: rewards and policies are linear in 16 features."""
    return compared(torch.randn(256, 16, dtype=torch.float64))


def table(seed):
    """Where it says something of two: each answer has its own parameter."""
    return compared(torch.eye(256, dtype=torch.float64))


def compared(features):
    """Mean gap in reward to the best policy of the same KL, over all betas or alphas and every 100th step."""
    torch.set_default_dtype(torch.float64)
    world = runpy.run_path(str(Path(__file__).with_name("world.py")))["World"](features, SIZES[-1])
    policies = {"rl_true": world.rl(world.rewards)}
    for size in SIZES:
        policies |= {f"{name}_{size}": logps for name, logps in world.offline(size).items()}
    out = {"optimal_points": torch.stack(world.optimal())[:, ::20]}
    for name, logps in policies.items():
        kl, reward, gap = (x.flatten() for x in world.measured(logps))
        out |= {name: gap.mean(), f"{name}_best": reward.max()}
        out |= {f"{name}_points": [kl, reward]} if name.endswith(("_2000", "true")) else {}
    logs, gaps = torch.tensor(SIZES).double().log(), torch.stack([out[f"dpo_{size}"] for size in SIZES])
    slope = torch.cov(torch.stack([logs, gaps.log()]))[0, 1] / logs.var()
    return out | {"dpo_slope": slope, "rl_true_nearer": out["rl_true"] < out["dpo_2000"]}
