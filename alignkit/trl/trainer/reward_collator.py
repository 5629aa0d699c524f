"""Pairs of tokenised answers as a batch, and how often the chosen one wins."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkit.trl.trainer.checks import check_padding

__all__ = ["RewardDataCollatorWithPadding", "compute_accuracy"]

COLUMNS = ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected")


@dataclass
class RewardDataCollatorWithPadding:
    """Pads chosen and rejected answers, each to their own longest, as `tokenizer.pad` does.

    `padding=True` cuts nothing: `max_length` is the width for `padding="max_length"`. Rows may have a `margin`, a
    number; other columns are dropped. Raises ValueError for rows that are not tokenised or of which only some have a
    margin.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`features` as a batch of `input_ids` and `attention_mask` [B, T] of each side, and `margin` [B]."""
        for missing in [name for name in COLUMNS if any(name not in row for row in features)][:1]:
            raise ValueError(
                f"The features should include {', '.join(COLUMNS)}: {missing!r} is not among {sorted(features[0])}. "
                "Texts are tokenised first, e.g. dataset.map(lambda row: {f'{name}_{side}': value "
                "for side in ('chosen', 'rejected') for name, value in tokenizer(row[side]).items()})"
            )
        if self.padding is not False:
            check_padding(self.tokenizer)
        batch: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            padded = self.tokenizer.pad(
                [{name: row[f"{name}_{side}"] for name in ("input_ids", "attention_mask")} for row in features],
                padding=self.padding,
                max_length=self.max_length if self.padding == "max_length" else None,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
            )
            batch |= {f"{name}_{side}": padded[name] for name in ("input_ids", "attention_mask")}
        if any("margin" in row for row in features):
            margins = [row.get("margin") for row in features]
            if None in margins:
                raise ValueError(f"some rows have no margin, {margins}: give all of them a number, or none")
            batch["margin"] = torch.tensor(margins, dtype=torch.float)
        return batch | {"return_loss": True}


def compute_accuracy(eval_pred: Any) -> dict[str, float]:
    """How often the answer with the larger prediction [B, 2] is that of the label [B].

    Pairs with equal predictions are left out, with a warning, as neither answer won; nan if none is left.
    """
    predictions, labels = (np.asarray(x) for x in eval_pred)
    tied = predictions[:, 0] == predictions[:, 1]
    if tied.any():
        warnings.warn(
            f"There are {tied.sum()} out of {len(tied)} instances where the predictions for both options are equal. "
            "They do not count in the accuracy.",
            stacklevel=2,
        )
    right = (predictions.argmax(1) == labels)[~tied]
    return {"accuracy": float(right.mean()) if len(right) else float("nan")}
