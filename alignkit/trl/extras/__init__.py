"""Sampling and formatting beside the trainers."""

from alignkit.trl.extras.best_of_n_sampler import BestOfNSampler

__all__ = ["BestOfNSampler"]
