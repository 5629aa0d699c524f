"""A world of 256 answers: rewards, a reference, labels, and policies trained on them by five methods."""

import torch

from alignkit.advantages import leave_one_out
from alignkit.kl import categorical, k1
from alignkit.losses.policy import reinforce
from alignkit.losses.preference import dpo
from alignkit.losses.reward import bradley_terry
from alignkit.losses.supervised import nll

ANSWERS, BATCH, STEPS, EVERY, LR = 256, 64, 1_000, 100, 0.05
BETAS = torch.tensor([[0.05], [0.1], [1.0], [5.0]])  # these and alphas as in the paper
ALPHAS = torch.tensor([[0.05], [0.1], [0.5], [1.0]])


class World:
    """Rewards, policies and learned rewards are linear in `features` [answer, feature]; the identity is a table."""

    def __init__(self, features, labels):
        self.features, size = features, features.shape[1]
        self.ref = torch.randn(ANSWERS).log_softmax(-1)
        self.rewards = features @ torch.randn(size) / features.square().sum(-1).mean().sqrt()
        pairs = self.ref.exp().multinomial(2 * labels, replacement=True).view(-1, 2)
        first_won = torch.rand(labels) < (self.rewards[pairs[:, 0]] - self.rewards[pairs[:, 1]]).sigmoid()
        self.labels = torch.where(first_won[:, None], pairs, pairs.flip(-1))  # preferred, other

    def trained(self, loss, runs):
        """Outputs [step, run, answer] after every 100th step of Adam; `loss` [run, batch] is a function of outputs."""
        theta = torch.zeros(runs, self.features.shape[1], requires_grad=True)
        adam, kept = torch.optim.Adam([theta], lr=LR), []
        for step in range(1, STEPS + 1):
            adam.zero_grad()
            loss(theta @ self.features.T).mean(-1).sum().backward()
            adam.step()
            kept += [(theta @ self.features.T).detach()] if step % EVERY == 0 else []
        return torch.stack(kept)

    def policies(self, loss, runs):
        """The same of log-probs; training starts at the reference."""
        return (self.ref + self.trained(lambda x: loss((self.ref + x).log_softmax(-1)), runs)).log_softmax(-1)

    def rl(self, rewards):
        """RLOO with the KL in the reward."""

        def loss(logps):
            answers = logps.detach().exp().multinomial(BATCH, replacement=True)
            drawn = logps.gather(-1, answers)
            return reinforce(drawn, leave_one_out(rewards[answers] - BETAS * k1(drawn, self.ref[answers]).detach()))

        return self.policies(loss, len(BETAS))

    def offline(self, size):
        """Name -> policies of the methods that have `size` labels."""

        def of_pairs(loss):
            return lambda x: loss(x, *self.labels[torch.randint(size, (BATCH,))].T)

        def dpo_loss(logps, chosen, rejected):
            log_ratios = logps - self.ref
            return dpo(log_ratios[:, chosen] - log_ratios[:, rejected], beta=BETAS)

        def unlikelihood(logps, chosen, rejected):
            return nll(logps[:, chosen]) - ALPHAS * nll(logps[:, rejected])

        learned = self.trained(of_pairs(lambda r, chosen, rejected: bradley_terry(r[:, chosen], r[:, rejected])), 1)
        return {
            "dpo": self.policies(of_pairs(dpo_loss), len(BETAS)),
            "unlikelihood": self.policies(of_pairs(unlikelihood), len(ALPHAS)),
            "preferred": self.policies(of_pairs(lambda logps, chosen, _: nll(logps[:, chosen])), 1),
            "rl_learned": self.rl(learned[-1, 0]),
        }

    def optimal(self):
        """(KL(pi || ref), expected reward) of ref exp(r / beta) / Z, beta falling: no policy of this KL has more."""
        logps = (self.ref + self.rewards / torch.logspace(3, -1.5, 1_000)[:, None]).log_softmax(-1)
        return categorical(logps, self.ref), logps.exp() @ self.rewards

    def measured(self, logps):
        """(KL(pi || ref), expected reward, how much more the best policy of this KL has) of policies [..., answer]."""
        kls, rewards = self.optimal()
        kl, reward = categorical(logps, self.ref), logps.exp() @ self.rewards
        right = torch.searchsorted(kls, kl).clamp(1, len(kls) - 1)
        share = ((kl - kls[right - 1]) / (kls[right] - kls[right - 1])).clamp(0, 1)
        return kl, reward, torch.lerp(rewards[right - 1], rewards[right], share) - reward
