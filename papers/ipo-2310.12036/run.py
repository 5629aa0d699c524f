"""The bandits of sections 5.3.1 and 5.4: exact optima of the losses, then the paper's mini-batch experiment."""

from functools import partial

import torch

from alignkit.losses.preference import dpo, ipo
from alignkit.testing.optimum import Problem, per_pair, solve

TAUS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
A, B, C = range(3)
DATASETS = {"d1": [(A, B), (B, C), (A, C)], "d3": [(A, B), (B, A)], "read": [(A, B), (B, A), (B, C)]}
OPTIMA = {"d1": torch.tensor([1, 0, -1]).double() / 3, "read": torch.tensor([1, 1, 0]).double() / 2}
REFS = torch.tensor([[10, 10, 10], [3, 18, 9]]).double() / 30


def optima(seed):
    """Largest gaps over tau between the optima of the expected losses and ref exp(OPTIMA / tau)."""
    gaps, effects = {"two_actions_gap": [], "d1_gap": [], "read_gap": []}, []
    for tau in TAUS:
        two = ipo_optimum([(A, B)], torch.ones(2).double() / 2, tau)
        gaps["two_actions_gap"].append((two[A] - torch.tensor(0.5 / tau, dtype=torch.float64).sigmoid()).abs())
        found = {data: torch.stack([ipo_optimum(DATASETS[data], ref, tau) for ref in REFS]) for data in OPTIMA}
        for data, probs in found.items():
            gaps[f"{data}_gap"].append((probs - (REFS.log() + OPTIMA[data] / tau).softmax(-1)).abs().max())
        effects.append((found["d1"][0] - found["d1"][1]).abs().max())
    odds = torch.linspace(0, 30, 301).double().requires_grad_()  # log pi(y1) / pi(y2), the reference being uniform
    slopes = {f: [torch.autograd.grad(f(odds, beta=tau).sum(), odds)[0] for tau in TAUS] for f in (dpo, ipo)}
    falls = {f"{f.__name__}_falls": (torch.stack(x) < 0).double().mean() for f, x in slopes.items()}
    return {name: max(x) for name, x in gaps.items()} | falls | {"reference_effect": min(effects)}


def ipo_optimum(dataset, ref, tau):
    """Where descent of IPO's loss over the pairs (preferred, other) of a dataset ends."""
    wins = torch.tensor([[(i, j) in dataset for j in range(len(ref))] for i in range(len(ref))]).double()
    problem = Problem(ref.log(), torch.zeros_like(ref), tau)
    return solve(per_pair(partial(ipo, beta=tau), problem, preferences=wins), ref.log()).probs


def bandits(seed):
    """Probabilities after 18000 steps of Adam on mini-batches of 9; all taus, losses and datasets side by side."""
    drawn = [torch.tensor(pairs)[torch.randint(len(pairs), (18_000, 9))] for pairs in DATASETS.values()]
    taus = torch.tensor(TAUS)[:, None, None]
    theta = torch.zeros(2, len(TAUS), len(DATASETS), 3, requires_grad=True)  # of DPO and IPO
    adam, rows = torch.optim.Adam([theta], lr=0.01), torch.arange(len(DATASETS))[:, None, None]
    for batch in torch.stack(drawn, 1):  # [dataset, pair, 2]
        log_ratios = (theta.log_softmax(-1) - REFS[0].log().float())[..., rows, batch]
        margin = log_ratios[..., 0] - log_ratios[..., 1]
        loss = dpo(margin[0], beta=taus).mean(-1).sum() + ipo(margin[1], beta=taus).mean(-1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    d1, d3, read = theta.detach().double().softmax(-1).unbind(2)  # [loss, tau, action]
    out = {"dpo_d3_c_most": d3[0, :, C].max(), "d3_from_third": (d3[..., C] - 1 / 3).abs().max()}
    out |= {"dpo_d1_least": d1[0, :, A].min(), "dpo_d1_least_to_1": d1[0, :4, A].min()}
    for i, tau in enumerate(TAUS):
        for loss, best, last in zip(("dpo", "ipo"), d1[:, i, A], read[:, i, C]):
            out |= {f"{loss}_d1_{tau:g}": best, f"{loss}_read_c_{tau:g}": last}
        out[f"ipo_d1_{tau:g}_gap"] = d1[1, i, A] - (OPTIMA["d1"] / tau).softmax(-1)[A]
    return out
