"""Losses on preference pairs, one number per pair.

`margin` is how much further the policy moved towards the chosen than towards the rejected answer, in nats:
[log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]. Without a reference, leave its terms out.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.masking import promote


def dpo(
    margin: Float[Tensor, "*batch"], *, beta: float | Tensor, smoothing: float | Tensor = 0.0
) -> Float[Tensor, "*batch"]:
    """-(1 - s) log sigmoid(beta margin) - s log sigmoid(-beta margin).

    Rafailov et al. 2023, arXiv:2305.18290 eq. 7; with the probability `smoothing` that a label is flipped it is
    cDPO, Mitchell 2023 (https://ericmitchell.ai/cdpo.pdf) eq. 3.
    """
    reward = beta * promote(margin)
    return -(1 - smoothing) * logsigmoid(reward) - smoothing * logsigmoid(-reward)


def hinge(margin: Float[Tensor, "*batch"], *, beta: float | Tensor) -> Float[Tensor, "*batch"]:
    """max(0, 1 - beta margin).

    "hinge-norm" of RSO, Liu et al. 2024, arXiv:2309.06657 eq. 10: the loss of SLiC-HF (Zhao et al. 2023,
    arXiv:2305.10425) on likelihoods normalised by the reference.
    """
    return (1 - beta * promote(margin)).clamp(min=0)


def ipo(margin: Float[Tensor, "*batch"], *, beta: float | Tensor) -> Float[Tensor, "*batch"]:
    """(margin - 1 / (2 beta))^2, `beta` being the paper's tau.

    Azar et al. 2023, arXiv:2310.12036 eq. 17. The paper's margin sums over tokens; TRL averages each answer's
    log-ratio over its tokens (`masking.masked_mean`), which changes the meaning of `beta` by about their number.
    """
    return (promote(margin) - 1 / (2 * beta)) ** 2


def kto_pair(
    log_ratios: Float[Tensor, "*batch 2"], kl: Float[Tensor, "*batch 2"], *, beta: float | Tensor
) -> Float[Tensor, "*batch 2"]:
    """1 - sigmoid(beta (r_w - kl_l)) for the chosen, 1 - sigmoid(beta (kl_w - r_l)) for the rejected answers.

    `log_ratios` r = log pi - log ref of (chosen, rejected); `kl` the reference points, estimates of KL(pi || ref)
    on chosen and rejected answers, at least 0 and without gradient: max(0, mean r) over the whole batch.
    Ethayarajh et al. 2024, arXiv:2402.01306 eq. 8 with lambda_D = lambda_U = 1, in the paired form of TRL 0.7.
    """
    log_ratios, kl = promote(log_ratios), promote(kl)
    gain = torch.stack([log_ratios[..., 0] - kl[..., 1], kl[..., 0] - log_ratios[..., 1]], -1)
    return 1 - (beta * gain).sigmoid()
