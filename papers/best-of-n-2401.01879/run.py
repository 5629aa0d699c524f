"""Best-of-n policies: exactly, by listing all groups of answers; and of answers that are equally likely."""

from math import log

import torch

from alignkit.kl import categorical
from alignkit.losses.regression import best_of_n_weights
from alignkit.objectives import max_at_k

ANSWERS, GROUP, PROBLEMS, NS = 5, 5, 15, [2**i for i in range(13)]


def listed(seed):
    """The largest of each metric of `problem`, over random answers and rewards, half of them with ties."""
    rewards = torch.cat([torch.randn(PROBLEMS, ANSWERS), torch.randn(PROBLEMS, ANSWERS).round()]).double()
    probs = torch.randn_like(rewards).softmax(-1)
    rows = [problem(p, r, n) for p, r in zip(probs, rewards) for n in range(2, GROUP + 1)]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def problem(probs, rewards, n):
    """Gaps of policy and estimators to closed forms; by how much KL and win rate exceed their bounds."""
    below, same = ((probs * of(rewards, rewards[:, None])).sum(-1) for of in (torch.lt, torch.eq))
    closed, policy = ((below + same) ** n - below**n) * probs / same, best_of(n, probs, rewards)
    share = (torch.arange(GROUP + 1).double() / GROUP).pow(n).diff()  # of each rank in n draws, replaced
    unbiased = mean(lambda m: max_at_k(rewards[m], k=n).mean(-1) / n, GROUP, probs)
    replaced = mean(lambda m: (share * rewards[m].sort(-1).values).sum(-1), GROUP, probs)
    return {
        "policy": (policy - closed).abs().max(), "kl": categorical(policy.log(), probs.log()) - log(n) + (n - 1) / n,
        "win_rate": policy @ (below + same / 2) - n / (n + 1), "ties_won": policy @ (below + same) - n / (n + 1),
        "unbiased": abs(unbiased - closed @ rewards), "replaced": abs(replaced - closed @ rewards),
    }  # fmt: skip


def best_of(n, probs, rewards):
    """The best-of-n policy: what `best_of_n_weights` keeps of each group."""
    return mean(lambda m: (best_of_n_weights(rewards[m])[..., None] * torch.eye(len(probs))[m]).sum(1), n, probs)


def mean(f, size, probs):
    """Of f over all groups of answers [groups, size], by how likely they are."""
    members = torch.cartesian_prod(*[torch.arange(len(probs))] * size)
    return torch.einsum("g,g...->...", probs[members].prod(-1), f(members))


def uniform(seed):
    """Two equally likely answers, from the list of groups, n = 16; then many, in closed form."""
    half = torch.tensor([0.5, 0.5]).double()
    two = categorical(best_of(16, half, half.cumsum(0)).log(), half.log())
    out = {"two": two} | {f"kl_{n}": curve(2**22, n)[0] for n in (1000, 60_000)}
    return out | {f"curve_{answers}": [curve(answers, n) for n in NS] for answers in (2, 10, 1000)}


def curve(answers, n):
    """(KL, win rate) of best-of-n for that many equally likely answers with different rewards."""
    rank = torch.arange(1, answers + 1).double()
    logps = n * (rank / answers).log() + (-torch.expm1(n * torch.log1p(-1 / rank))).log()
    reference = torch.full_like(logps, -log(answers))
    return categorical(logps, reference), logps.exp() @ (rank - 0.5) / answers
