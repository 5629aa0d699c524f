"""Random Markov decision processes of few states, in which every step may be the last of its episode."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class World(NamedTuple):
    """A policy, what it earns and where it leads; state S is the end, and state 0 the start."""

    logits: Tensor  # [S, actions]
    rewards: Tensor  # [S, actions]
    moves: Tensor  # [S, actions, S + 1]
    gamma: float
    time: int

    def values(self, logits: Tensor) -> Tensor:
        """The exact values of that policy at each time: [time, S]."""
        later, out = logits.new_zeros(len(logits) + 1), []
        for _ in range(self.time):
            out.append((logits.softmax(-1) * (self.rewards + self.gamma * self.moves @ later)).sum(-1))
            later = pad(out[-1], (0, 1))
        return torch.stack(out[::-1])

    def gradient(self) -> Tensor:
        """Of the expected discounted return, by autograd: [S, actions]."""
        logits = self.logits.clone().requires_grad_()
        return torch.autograd.grad(self.values(logits)[0, 0], logits)[0]

    def episodes(self, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(chance [N], states [N, time], actions [N, time]) of `number` samples, or of all that there are."""
        step = pad(self.logits.softmax(-1)[..., None] * self.moves, (0, 0, 0, 0, 0, 1))
        step[-1, 0, -1] = 1
        chance = torch.full((number,), 1 / number) if number else torch.ones(1)
        states, actions = torch.zeros(len(chance), 1, dtype=int), torch.zeros(len(chance), 0, dtype=int)
        for _ in range(self.time):
            p = step[states[:, -1]]
            if number:
                drawn = p.flatten(1).multinomial(1)[:, 0]
                n, a, s = torch.arange(number), drawn // p.shape[-1], drawn % p.shape[-1]
            else:
                n, a, s = p.nonzero(as_tuple=True)
                chance = chance[n] * p[n, a, s]
            states, actions = torch.cat([states[n], s[:, None]], 1), torch.cat([actions[n], a[:, None]], 1)
        return chance, states[:, :-1], actions


def draw(states: int, actions: int, time: int, gamma: float = 0.95) -> World:
    """A world of normal rewards and logits, where the chance that a step is the last depends on state and action."""
    last = 0.1 + 0.4 * torch.rand(states, actions, 1)
    moves = torch.cat([(1 - last) * torch.randn(states, actions, states).softmax(-1), last], -1)
    return World(torch.randn(states, actions), torch.randn(states, actions), moves, gamma, time)


def mixture(rewards, values, gamma, lam):
    """(1 - lam) sum_k lam^(k - 1) A^(k), A^(k) of k steps; the longest takes what is left of the weight."""
    time, out = rewards.shape[-1], torch.zeros_like(values)
    for t in range(time):
        for k in range(1, time - t + 1):
            steps = (gamma ** torch.arange(k) * rewards[:, t : t + k]).sum(-1)
            bootstrap = gamma**k * values[:, t + k] if t + k < time else 0.0
            weight = (1 - lam) * lam ** (k - 1) if t + k < time else lam ** (k - 1)
            out[:, t] += weight * (steps + bootstrap - values[:, t])
    return out
