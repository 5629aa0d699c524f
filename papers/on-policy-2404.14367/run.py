"""Best-of-n, IPO and DPO on a bandit of 100 arms, on samples of the policy as it is or of the reference."""

import runpy
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from alignkit.losses.preference import dpo, ipo
from alignkit.losses.supervised import nll
from alignkit.weights import token_mean, weigh

ARMS, DIM, CONTEXTS, N, EPOCHS, UPDATES = 100, 100, 10, 10, 50, 15
PEAKS, CLEAR = {"far": 70, "near": 20}, 0.2  # the least difference of rewards in pairs of `dpo_clear`
WORLD, PAIRS = runpy.run_path(str(Path(__file__).with_name("world.py"))), torch.triu_indices(N, N, 1)


def network(seed):
    """The policy is a network of contexts."""
    return compare(WORLD["network"](DIM, ARMS), lambda n: torch.rand(n, DIM), {"bon": 1e-3, "ipo": 3e-3, "dpo": 1e-3})


def table(seed):
    """The policy is a table of logits, without contexts."""
    rates = dict.fromkeys(("bon", "ipo", "dpo", "dpo_clear"), 0.03)
    return compare(nn.Linear(1, ARMS, bias=False), lambda n: torch.ones(n, 1), rates)


def compare(net, contexts, rates):
    """Mean reward in 100 other contexts, exactly: `<peak>_<off or on>_<method>`, and what on-policy samples gain."""
    x, fresh, reference, out = contexts(CONTEXTS), contexts(100), WORLD["reference"](ARMS), {}
    WORLD["imitate"](net, x, reference)
    for where, peak in PEAKS.items():
        rewards = (-(((torch.arange(ARMS) - peak) / 10) ** 2)).exp()
        out[f"{where}_before"] = (net(fresh).detach().softmax(-1) @ rewards).mean()
        for method, lr in rates.items():
            for who in ("off", "on"):
                tuned = learn(deepcopy(net), x, rewards, reference, method, who, lr)
                probs = tuned(fresh).detach().softmax(-1).mean(0)
                out[f"{where}_{who}_{method}_probs"], out[f"{where}_{who}_{method}"] = probs, probs @ rewards
            out[f"{where}_gain_{method}"] = out[f"{where}_on_{method}"] - out[f"{where}_off_{method}"]
    return out


def learn(net, x, rewards, reference, method, who, lr):
    """`net` after EPOCHS of CONTEXTS * N rewards, each used for UPDATES."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(EPOCHS):
        sampler = reference.expand(CONTEXTS, -1) if who == "off" else net(x).detach().softmax(-1)
        arms = torch.multinomial(sampler, N, replacement=True)
        arms = arms.gather(-1, rewards[arms].argsort(-1, descending=True))  # the best first
        better, worse = rewards[arms][:, PAIRS].unbind(1)
        pairs = token_mean(better - worse > (CLEAR if method == "dpo_clear" else 0))
        for _ in range(UPDATES):
            logps = net(x).log_softmax(-1).gather(-1, arms)
            better, worse = (logps - reference.log()[arms])[:, PAIRS].unbind(1)
            losses = (ipo if method == "ipo" else dpo)(better - worse, beta=0.05)
            WORLD["update"](optimizer, nll(logps[:, 0]).mean() if method == "bon" else weigh(losses, pairs))
    return net
