"""Gradients of denoising in closed form; policy gradient against reward-weighted regression on a ring and on JPEGs."""

import runpy
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector as flat

from alignkit.diffusion import ddim_step, normal_logps
from alignkit.losses.policy import clipped_surrogate, reinforce

ALPHAS, ETA, GOAL = (0.05, 0.3, 0.7, 0.95), 0.8, (1.0, -0.5)  # of the steps, noise first; r = -|x_0 - GOAL|^2


def gradients(seed):
    """Gaps between gradients in the parameters of a denoiser that is linear at each step."""
    linear = beside("linear")
    torch.set_default_dtype(torch.float64)
    net = [(0.5 * torch.randn(3, *shape)).requires_grad_() for shape in ((2, 2), (2,))]
    goal = torch.tensor(GOAL)
    exact = flat(torch.autograd.grad(linear["expected_reward"](*net, ALPHAS, ETA, goal), net))
    noise, weight = linear["quadrature"](8)  # [N, 8]: the start and three steps, of two elements each
    x, *noise = noise.unflatten(-1, (4, 2)).unbind(1)
    logps, means = [], []
    for w, c, alpha, alpha_prev, z in zip(*net, ALPHAS, ALPHAS[1:], noise):
        normal = ddim_step(x, x @ w.T + c, *torch.tensor([alpha, alpha_prev]), eta=ETA)
        x = (normal.mean + normal.std * z).detach()
        logps.append(normal_logps(x, normal, dims=1))
        means.append(normal_logps(x, normal, dims=1, reduce="mean"))
    logps, means = torch.stack(logps, -1), torch.stack(means, -1)
    rewards = -((x - goal) ** 2).sum(-1, keepdim=True)

    def off(loss):
        """How far minus the gradient of the mean loss is from `exact`."""
        return -flat(torch.autograd.grad((weight[:, None] * loss).sum(), net, retain_graph=True)) - exact

    surrogate = clipped_surrogate(logps, logps.detach(), rewards, low=1e-4, high=1e-4)
    return {
        "gap": off(reinforce(logps, rewards)).abs().max(),
        "gap_of_surrogate": off(surrogate).abs().max(),
        "relative_gap_of_means": off(reinforce(means, rewards)).norm() / exact.norm(),
        "relative_gap_of_last_step": off(reinforce(logps[:, -1:], rewards)).norm() / exact.norm(),
    }


def beside(name):
    """What another file of this folder defines."""
    return runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))


def ring(seed):
    """Mean reward before and after each method, of 4,096 samples, and on the way."""
    return beside("ring")["compare"](seed)


def jpeg(seed):
    """Mean JPEG size in kB before, and after each recipe with each reward."""
    return beside("jpeg")["compare"](seed)
