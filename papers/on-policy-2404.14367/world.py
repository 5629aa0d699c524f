"""The reference of the bandit, and a network that begins as it."""

import torch
from torch import nn


def reference(arms):
    """tanh of Cauchy(-0.7, 0.4) in bins."""
    edges = torch.linspace(-1, 1, arms + 1).atanh()
    return torch.distributions.Cauchy(-0.7, 0.4).cdf(edges).diff()


def network(dim, arms):
    """Logits of arms from contexts."""
    layers = [nn.Linear(dim, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 256), nn.ReLU(), nn.Linear(256, 256)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, arms))


def imitate(net, x, target):
    """Least KL(policy || target) in the contexts `x`."""
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(200):
        logps = net(x).log_softmax(-1)
        update(optimizer, (logps.exp() * (logps - target.log())).sum(-1).mean())


def update(optimizer, loss):
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
