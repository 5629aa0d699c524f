"""The arguments of `RewardTrainer`."""

from dataclasses import dataclass

from alignkit.trl.trainer.training_args import ReleaseArguments

__all__ = ["RewardConfig"]


@dataclass
class RewardConfig(ReleaseArguments):
    """The training arguments, with gradient checkpointing on, and one more.

    `max_length` is the width that the default collator pads to if it is told to (`padding="max_length"`); it cuts
    nothing, so leave out longer pairs when tokenising.
    """

    max_length: int | None = None
    gradient_checkpointing: bool | None = True
    gradient_checkpointing_kwargs: dict | str | None = None
