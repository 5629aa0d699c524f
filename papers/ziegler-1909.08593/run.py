"""Whitening against printed digits, the KL controller against arithmetic by hand, Adam against TensorFlow's rule."""

import torch

from alignkit.controllers import adaptive_kl
from alignkit.masking import whiten

POPULATION = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]]
UNBIASED = [[0.1394, 0.5046, 0.8697], [1.2349, 1.6000, 1.9651], [2.3303, 2.6954, 3.0606]]
KLS, CLIPPED = [0, 3, 5.4, 6, 6.6, 7.2, 12, 30], [-0.2, -0.2, -0.1, 0, 0.1, 0.2, 0.2, 0.2]
COEF, TARGET, HORIZON, EPISODES = 0.15, 6.0, 10_000, 512
B1, B2, EPS, STEPS = 0.9, 0.999, 1e-5, 1000


def whitening(seed):
    """Largest gaps to the two printed matrices, and between the two variances."""
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
    white = [whiten(x, torch.ones_like(x, dtype=torch.bool), correction=c, shift_mean=False) for c in (0, 1)]
    population, unbiased = (y - x.new_tensor(printed) for y, printed in zip(white, (POPULATION, UNBIASED)))
    gaps = {"population": population, "unbiased": unbiased, "apart": white[0] - white[1]}
    return {name: gap.abs().max() for name, gap in gaps.items()}


def controller(seed):
    """A trace against one worked out by hand; then beta against a policy that answers it with KL = 1 / (2 beta^2)."""
    machine = adaptive_kl(coef=COEF, target=TARGET, horizon=HORIZON)
    state, by_hand, gaps, kls = machine.init(), COEF, [], []
    for kl, error in zip(KLS, CLIPPED):
        state, by_hand = machine.update(state, kl, EPISODES), by_hand * (1 + error * EPISODES / HORIZON)
        gaps.append(abs(state.coef - by_hand))
    state = machine.init()
    for _ in range(500):
        kls.append(float(0.5 / state.coef**2))
        state = machine.update(state, kls[-1], EPISODES)
    return {"trace": max(gaps), "start": abs(kls[0] - TARGET), "end": abs(kls[-1] - TARGET), "kls": kls}


def adam(seed):
    """Updates of torch.optim.Adam and of TensorFlow's rule, for noise and for constant gradients 1e-1 ... 1e-7."""
    sizes, t = 10.0 ** -torch.arange(1, 8).double(), torch.arange(1, STEPS + 1).double()[:, None]
    gradients = torch.cat([torch.randn(STEPS, 7).double() * sizes, sizes.expand(STEPS, 7)], 1)  # [steps, parameters]
    x, moves, root = torch.zeros(14, dtype=torch.float64, requires_grad=True), [], (1 - B2**t).sqrt()
    optimizer = torch.optim.Adam([x], lr=1.0, betas=(B1, B2), eps=EPS)
    for x.grad in gradients:
        before = x.detach().clone()
        optimizer.step()
        moves.append(before - x.detach())

    def average(x, beta):
        return ((1 - beta) * beta ** (t - t.T)).tril() @ x

    def tensorflow(eps_hat):
        return root / (1 - B1**t) * average(gradients, B1) / (average(gradients**2, B2).sqrt() + eps_hat)

    moves, same, apart = torch.stack(moves), tensorflow(EPS * root), tensorflow(EPS)
    ratio, closed = (moves / apart)[:, 7:], (root * sizes + EPS) / (root * sizes + root * EPS)
    gaps = {"same": moves - same, "apart": moves - apart, "closed": ratio - closed}
    out = {name: gap.abs().max() for name, gap in gaps.items()}
    return out | {"first": ratio[0, -1], "growth": ratio.diff(dim=0).max(), "ratio": ratio[:, ::2].T}
