"""A diffusion model of eight modes on a ring, and four ways to make it prefer one of them."""

import math
from copy import deepcopy

import torch
from torch import nn

from alignkit.advantages import group_normalize
from alignkit.diffusion import add_noise, ddim_step, normal_logps
from alignkit.losses.diffusion import denoising_error
from alignkit.losses.policy import clipped_surrogate, reinforce

MODES = 2 * torch.tensor([(math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)) for i in range(8)])
STEPS = 10
ALPHAS = torch.cos(torch.linspace(0.03, 0.49, STEPS + 1) * math.pi) ** 2  # of the signal, at times 0 to STEPS
ROUNDS, QUERIES = 30, 512
GOALS = {"mode": MODES[0], "beyond": 2 * MODES[0]}  # one of the modes; as far from it as it is from the centre
METHODS = {  # learning rates and strengths: the best of a grid, on a seed that is not reported
    "sf": {"lr": 1e-2},
    "is": {"lr": 3e-3, "epochs": 1, "clip": 0.5},
    "rwr": {"lr": 3e-3, "beta": 4.0},
    "sparse": {"lr": 3e-3, "top": 0.1},
}


class Denoiser(nn.Module):
    """x_0 from x [..., 2] and the time [...]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + STEPS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, time):
        """x_0."""
        return self.layers(torch.cat([x, nn.functional.one_hot(time - 1, STEPS).to(x.dtype)], -1))

    def step(self, x, time):
        """The distribution of the next x."""
        alpha, alpha_prev = ALPHAS[time][..., None], ALPHAS[time - 1][..., None]
        return ddim_step(x, self(x, time), alpha, alpha_prev, eta=1.0, prediction="sample")

    def error(self, original):
        """Of denoising, at random times."""
        time = torch.randint(1, STEPS + 1, (len(original),))
        noisy = add_noise(original, torch.randn_like(original), ALPHAS[time][:, None])
        return denoising_error(self(noisy, time), original, dims=1)


@torch.no_grad()
def sample(net, n, goal):
    """Before and after each step [n, STEPS, 2]; times and log-probs [n, STEPS]; rewards, at most 1."""
    x, steps = torch.randn(n, 2), []
    for time in torch.arange(STEPS, 0, -1).expand(n, -1).unbind(-1):
        normal = net.step(x, time)
        new = normal.mean + normal.std * torch.randn_like(x)
        steps.append((x, new, time, normal_logps(new, normal, dims=1)))
        x = new
    return *(torch.stack(column, 1) for column in zip(*steps)), (-((x - goal) ** 2).sum(-1) / 2).exp()


def trained():
    """A denoiser of the ring."""
    net = Denoiser()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=1000)
    for _ in range(1000):
        update(optimizer, net.error(MODES[torch.randint(8, (256,))] + 0.1 * torch.randn(256, 2)).mean())
        schedule.step()
    return net


def policy_gradient(net, goal, *, lr, epochs=1, clip=None):
    """`net` after ROUNDS of QUERIES rewards, and its mean rewards: one update a round, or with `clip` several."""
    net, course, optimizer = start(net, lr)
    for _ in range(ROUNDS):
        x, new, time, old_logps, rewards = sample(net, QUERIES, goal)
        advantages = group_normalize(rewards)[:, None]
        for rows in batches(epochs, QUERIES if clip is None else 128):
            logps = normal_logps(new[rows], net.step(x[rows], time[rows]), dims=1)
            if clip is None:
                losses = reinforce(logps, advantages[rows])
            else:
                losses = clipped_surrogate(logps, old_logps[rows], advantages[rows], low=clip, high=clip)
            update(optimizer, losses.sum(-1).mean())
        course.append(rewards.mean())
    return net, course


def regression(net, goal, *, lr, beta=0.0, top=1.0, epochs=5):
    """The same by denoising what was sampled, weighed with softmax(beta A) of the `top` share of it."""
    net, course, optimizer = start(net, lr)
    for _ in range(ROUNDS):
        *_, new, _, _, rewards = sample(net, QUERIES, goal)
        kept = rewards >= rewards.quantile(1 - top)
        shares = torch.where(kept, beta * group_normalize(rewards), -torch.inf).softmax(-1)
        for rows in batches(epochs, 128):
            update(optimizer, (QUERIES * shares[rows] * net.error(new[rows, -1])).mean())
        course.append(rewards.mean())
    return net, course


def start(net, lr):
    """A copy to train, a list, and an optimizer."""
    net = deepcopy(net)
    return net, [], torch.optim.Adam(net.parameters(), lr)


def batches(epochs, size):
    """Rows of each minibatch."""
    return [rows for _ in range(epochs) for rows in torch.randperm(QUERIES).split(size)]


def update(optimizer, loss):
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def compare(seed):
    """Mean rewards before and after each of METHODS."""
    net, out = trained(), {}
    for where, goal in GOALS.items():
        out[f"{where}_before"] = sample(net, 4096, goal)[-1].mean()
        for name, options in METHODS.items():
            learn = policy_gradient if name in ("sf", "is") else regression
            tuned, course = learn(net, goal, **options)
            out[f"{where}_{name}_course"], out[f"{where}_{name}_mean"] = course, sum(course) / ROUNDS
            out[f"{where}_{name}"] = sample(tuned, 4096, goal)[-1].mean()
        out[f"{where}_sf_gain"] = out[f"{where}_sf_mean"] - out[f"{where}_rwr_mean"]
    return out
