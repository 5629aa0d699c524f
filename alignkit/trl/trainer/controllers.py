"""The state of `PPOTrainer` between steps: the KL coefficient and the moments of the scores."""

import json
import os
from typing import Any

import torch
from torch import Tensor

from alignkit.controllers import KLState, Moments, adaptive_kl, merge_moments, running_moments


class AdaptiveKLController:
    """A KL coefficient, `value`, that every `update` steers towards a KL of `target`; see `controllers.adaptive_kl`."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: Any, n_steps: int) -> None:
        """Adapt `value` to the mean KL `current` of `n_steps` samples."""
        machine = adaptive_kl(coef=self.value, target=self.target, horizon=self.horizon)
        self.value = float(machine.update(KLState(self.value), float(current), n_steps).coef)


class FixedKLController:
    """A KL coefficient, `value`, that stays."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current: Any, n_steps: int) -> None:
        """Nothing to adapt."""


class RunningMoments:
    """Mean, variance and standard deviation of all scores seen, on all processes; see `controllers.running_moments`.

    `var` is the population's and `std` unbiased; both are 1 as long as there are too few numbers to have one.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self._machine = running_moments()
        self._seen: Moments = self._machine.init()

    @property
    def mean(self) -> float:
        """Mean of the numbers seen, at first 0."""
        return self._seen.mean.item()

    @property
    def var(self) -> float:
        """Their variance, at first 1."""
        return self._seen.std(correction=0).item() ** 2

    @property
    def std(self) -> float:
        """The unbiased estimate of their standard deviation, 1 for less than two numbers."""
        return self._seen.std().item()

    @property
    def count(self) -> float:
        """How many they are, at first 1e-24."""
        return max(self._seen.n.item(), 1e-24)

    def update(self, xs: Tensor) -> tuple[float, float]:
        """Add the numbers of all processes; returns the mean and the unbiased standard deviation of these alone."""
        batch = self._machine.update(self._machine.init(), self.accelerator.gather(xs.detach()))
        self._seen = merge_moments(self._seen, batch)
        return batch.mean.item(), batch.std().item()

    def save_to_json(self, json_path: str | os.PathLike) -> None:
        """Write the moments to a file."""
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump({name: x.item() for name, x in self._seen._asdict().items()}, file)

    @classmethod
    def load_from_json(cls, accelerator: Any, json_path: str | os.PathLike) -> "RunningMoments":
        """What `save_to_json` wrote."""
        running = cls(accelerator)
        with open(json_path, encoding="utf-8") as file:
            running._seen = Moments(**{k: torch.tensor(x, dtype=torch.float64) for k, x in json.load(file).items()})
        return running
