"""Stateless, composable functions for alignment research.

Import functions from the module that holds them, e.g. `from alignkit.advantages import gae`:

    masking  logps  kl  weights  advantages  shaping  controllers  losses     tensors in, tensors out
    data  train                                                              rows, one exact optimizer step
    hf                                                                       models, datasets, the training loop
    cli                                                                      `alignkit run | list | new | demo`
"""

__version__ = "0.1.0"
