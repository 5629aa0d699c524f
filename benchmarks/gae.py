"""Generalised advantage estimation of rows that end: alignkit, torchrl and a loop over time."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.side import Clock, Job

GAMMA, LAM, CALLS = 0.99, 0.95, 20


def load(job: Job) -> Callable[[Job, Clock], None]:
    """Import the side's function."""
    if job.side == "alignkit":
        from alignkit.advantages import gae

        return lambda job, clock: run(job, clock, lambda r, v, mask: gae(r, v, mask, gamma=GAMMA, lam=LAM)[0])
    if job.side == "loop":
        return lambda job, clock: run(job, clock, loop)
    from torchrl.objectives.value import functional

    name = {"torchrl": "vec_generalized_advantage_estimate", "torchrl-loop": "generalized_advantage_estimate"}
    estimate = getattr(functional, name[job.side])

    def theirs(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        done = (mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1)))[..., None]
        later = torch.nn.functional.pad(values[:, 1:], (0, 1))[..., None]
        return estimate(GAMMA, LAM, values[..., None], later, rewards[..., None], done)[0][..., 0]

    return lambda job, clock: run(job, clock, theirs)


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """From the last time to the first."""
    out, advantage, later = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        advantage = torch.where(mask[:, t], rewards[:, t] + GAMMA * later - values[:, t] + GAMMA * LAM * advantage, 0)
        later = torch.where(mask[:, t], values[:, t], 0)
        out.append(advantage)
    return torch.stack(out[::-1], 1)


def run(job: Job, clock: Clock, gae: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Lengths are uniform in [T / 8, T]; the "loss" that is compared is the mean advantage."""
    rows, time = job.workload.size
    generator = torch.Generator().manual_seed(job.seed)
    rewards, values = (torch.randn(rows, time, generator=generator).to(job.device) for _ in range(2))
    lengths = torch.randint(time // 8, time + 1, (rows, 1), generator=generator)
    mask = (torch.arange(time) < lengths).to(job.device)
    clock.tick()
    for _ in range(job.steps):
        out = gae(rewards, values, mask)
        clock.tick()
    clock.see(out[mask].mean(), out[mask].norm())
