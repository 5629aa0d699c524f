"""Answers that stop with some chance after each token, right ones with another than wrong ones; r = 1 if right.

Which of them an answer is does not depend on these chances, so the expected reward has no gradient in them.
"""

import torch
from torch.distributions import Geometric
from torch.nn.functional import logsigmoid

from alignkit.losses.policy import clipped_surrogate
from alignkit.weights import reweigh, weigh

START, LONGEST, GROUP = 20, 1024, 8  # mean length at first, tokens of an answer at most, answers to a prompt


def push(logits, right, lengths, advantages, aggregation, odds=1.0):
    """Minus the gradient of GRPO's loss in the two logits to stop (of wrong answers, of right ones).

    Row i is a right answer if `right`[i] is 1, and `odds`[i] times as likely as a uniform draw makes it.
    """
    time = torch.arange(min(int(lengths.max()), LONGEST))
    mask, last = time < lengths[:, None], time == lengths[:, None] - 1
    leaf = logits.detach().requires_grad_()
    logps = logsigmoid(torch.where(last, 1, -1) * leaf[right][:, None])
    loss = clipped_surrogate(logps, logps.detach(), advantages[:, None])
    weights = reweigh(aggregation(mask), torch.as_tensor(odds).reshape(-1, 1))
    return -torch.autograd.grad(weigh(loss, weights), leaf)[0]


def train(advantage, aggregation, updates=400, prompts=64):
    """(Moves of the logits to stop; mean lengths over those at the start, before each update and after the last).

    Plain gradient ascent at a rate of 1.
    """
    path = [torch.tensor([1 / START] * 2).logit()]
    for _ in range(updates):
        right = torch.randint(2, (prompts * GROUP,))
        lengths = Geometric(logits=path[-1][right]).sample() + 1
        advantages = advantage(right.view(prompts, GROUP)).flatten()
        path.append(path[-1] + push(path[-1], right, lengths, advantages, aggregation))
    path = torch.stack(path)
    stop = path.sigmoid()
    return path[-1] - path[0], (1 - (1 - stop) ** LONGEST) / stop / START
