"""Bradley-Terry labels of which some are flipped, and the log-linear policy that a loss fits to them."""

import torch

BETA, FEATURES = 0.5, 5


def truth():
    """Weights w of the reward beta w @ phi, whose optimal policy is proportional to ref exp(w @ phi)."""
    weights = torch.randn(FEATURES, dtype=torch.float64)
    return 3 * weights / weights.norm()


def labelled(weights, size, rate):
    """phi(y_w) - phi(y_l) of `size` pairs, the label flipped with probability `rate`."""
    features = torch.randn(size, FEATURES, dtype=torch.float64)
    won = torch.rand(size) < (BETA * features @ weights).sigmoid()
    return torch.where(won ^ (torch.rand(size) < rate), 1, -1)[:, None] * features


def fitted(pairs, loss):
    """Weights that minimise the mean loss of the margins, or that are far out if none do."""
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([weights], 1, 200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        value = loss(pairs @ weights).mean()
        value.backward()
        return value

    lbfgs.step(closure)
    return weights.detach()
