"""DPO on single tokens; a geometry of No, Never and Yes; a network that learns from data which tokens are alike."""

from copy import deepcopy

import torch
from torch import nn

from alignkit.logps import sequence_logps, vocab_logps
from alignkit.losses.preference import dpo

BETA, LAST = 0.1, torch.tensor([[False, True]])  # the answer is the second token, predicted at the first
PROBS = (0.8, 0.07, 0.1, 0.01, 0.01, 0.01)  # of No, Never, Yes, and three others
MEANING = (1.0, 3.0, -3.0, 0.0, 0.0, 0.0)  # Never is a stronger No
OWN = 0.5  # what distinguishes a token from those of its meaning
CONTEXTS, MEANINGS, SYNONYMS = 64, 8, 4


def margin(logits, pair=(0, 1)):
    """log pi(y_+) - log pi(y_-)."""
    logps = sequence_logps(logits.expand(2, 2, -1), torch.tensor([[0, token] for token in pair]), LAST.expand(2, 2))
    return logps[0] - logps[1]


def log_probs(logits):
    """Of all tokens."""
    return vocab_logps(logits.expand(1, 2, -1), LAST)[0, 1]


def descent(weight, hidden, ref, rate):
    """The loss of token 0 over 1 where logits are W h, and minus its gradients, that in h times `rate`."""
    weight, hidden = weight.detach().requires_grad_(), hidden.detach().requires_grad_()
    loss = dpo(margin(weight @ hidden) - ref, beta=BETA)
    of_weight, of_hidden = torch.autograd.grad(loss, (weight, hidden))
    return loss.detach(), (-of_weight, -rate * of_hidden)


def geometry():
    """(W [6, 7], h [7]) with PROBS: an axis for what is meant and one for each token."""
    weight = torch.cat([torch.tensor(MEANING)[:, None], OWN * torch.eye(6)], 1)
    hidden = torch.linalg.lstsq(weight, (torch.tensor(PROBS) / PROBS[-1]).log(), driver="gelsd").solution
    return weight, hidden


def learned():
    """Falls of pi(y_+) in the 16 surest contexts, and the mean cosine of synonyms and of other tokens in W."""
    net = nn.Sequential(nn.Embedding(CONTEXTS, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())
    net.append(nn.Linear(32, MEANINGS * SYNONYMS, bias=False))
    usage = (2 * torch.randn(MEANINGS, SYNONYMS)).softmax(-1)  # of a meaning's words, the same in all contexts
    target = ((4 * torch.randn(CONTEXTS, MEANINGS)).softmax(-1)[..., None] * usage).flatten(1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(1500):
        update(optimizer, -(target * net(torch.arange(CONTEXTS)).log_softmax(-1)).sum(-1).mean())
    drops = torch.tensor([drop(net, context) for context in target.amax(-1).topk(16).indices])
    weight = nn.functional.normalize(net[-1].weight.detach(), dim=-1)
    alike = (weight @ weight.T).unflatten(0, (MEANINGS, -1)).unflatten(-1, (MEANINGS, -1)).mean((1, 3))
    same = alike.diagonal().mean()
    other = (alike.sum() - alike.trace()) / (MEANINGS * (MEANINGS - 1))
    at_first = target.amax(-1).topk(16).values.mean()
    found = {"drop": drops.mean(), "largest_drop": drops.max(), "drops": drops, "at_first": at_first}
    return found | {"alike": same, "not_alike": other}


def drop(net, context):
    """How far pi(y_+) falls while the margin grows by 10 nats; y_+ and y_- are the likeliest meaning's likeliest."""
    net = deepcopy(net)
    probs = net(context).detach().softmax(-1)
    first = int(probs.argmax()) // SYNONYMS * SYNONYMS
    pair = (first + probs[first : first + SYNONYMS].topk(2).indices).tolist()
    optimizer, ref = torch.optim.SGD(net.parameters(), 0.3), margin(net(context), pair).detach()
    for _ in range(1000):
        gained = margin(net(context), pair) - ref
        if gained > 10:
            break
        update(optimizer, dpo(gained, beta=BETA))
    return float((probs - net(context).detach().softmax(-1))[pair[0]])


def update(optimizer, loss):
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
