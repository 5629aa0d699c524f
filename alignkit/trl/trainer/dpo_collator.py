"""Rows of preference pairs to padded columns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

IDS, MASK, LABELS, LOGPS = "_input_ids", "_attention_mask", "_labels", "_logps"


@dataclass
class DPODataCollatorWithPadding:
    """Pads prompts on the left and answers on the right (of an encoder-decoder both on the right).

    Columns of ids are filled up with `pad_token_id`, labels (and the decoder's ids) with `label_pad_token_id`, masks
    with 0; columns of log-probs become float tensors and all others stay lists. Raises ValueError if there is no
    `pad_token_id`, and for a column of unknown kind.
    """

    pad_token_id: int | None = 0
    label_pad_token_id: int = -100
    is_encoder_decoder: bool | None = False

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The columns of some rows, tensors first: accelerate takes the size of a stream's batch from the first."""
        columns = {name: self._column(name, [row[name] for row in features]) for name in features[0]}
        return dict(sorted(columns.items(), key=lambda column: not torch.is_tensor(column[1])))

    def _column(self, name: str, values: list[Any]) -> Any:
        if name.endswith(LOGPS):
            return torch.tensor(values)
        if not name.endswith((IDS, MASK, LABELS)):
            return values
        left = name.startswith("prompt") and not self.is_encoder_decoder
        rows = [torch.as_tensor(x, dtype=torch.long) for x in values]
        filler = self._filler(name)
        return pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left" if left else "right")

    def _filler(self, name: str) -> int:
        if name.endswith(MASK):
            return 0
        if name.endswith(LABELS) or (self.is_encoder_decoder and name.startswith(("chosen", "rejected"))):
            return self.label_pad_token_id
        if self.is_encoder_decoder and not name.startswith("prompt"):
            raise ValueError(f"Unexpected key in batch '{name}'")
        if self.pad_token_id is None:
            raise ValueError(
                "Padding is enabled, but the tokenizer is not configured with a padding token. Explicitly set "
                "`tokenizer.pad_token` (e.g. `tokenizer.pad_token = tokenizer.eos_token`) before calling the trainer."
            )
        return self.pad_token_id


def pad_to_length(tensor: Tensor, length: int, pad_value: float, dim: int = -1) -> Tensor:
    """`tensor` with `pad_value` at the end of axis `dim`, up to `length`; as it is if that long already."""
    missing = max(length - tensor.shape[dim], 0)
    return pad(tensor.transpose(dim, -1), (0, missing), value=pad_value).transpose(dim, -1) if missing else tensor


def concatenated_inputs(
    batch: dict[str, Any],
    is_encoder_decoder: bool = False,
    label_pad_token_id: int = -100,
    padding_value: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The tensors `chosen_*` and `rejected_*` of a batch as `concatenated_*` [2 B, T], chosen first, on `device`.

    T is the longer of both. Ids are filled up with `padding_value`, labels with `label_pad_token_id`, masks with 0. Of
    an encoder-decoder, whose answers are labels (and decoder ids), the prompt's ids and mask are repeated.
    """
    kind = LABELS if is_encoder_decoder else IDS
    length = max(batch[f"chosen{kind}"].shape[1], batch[f"rejected{kind}"].shape[1])
    both: dict[str, Tensor] = {}
    for name in (n.removeprefix("chosen") for n, x in batch.items() if n.startswith("chosen") and torch.is_tensor(x)):
        if name.endswith(LOGPS) or f"rejected{name}" not in batch:
            continue
        filler = label_pad_token_id if is_encoder_decoder or name == LABELS else padding_value if name == IDS else 0
        parts = [pad_to_length(batch[f"{side}{name}"], length, filler) for side in ("chosen", "rejected")]
        both[f"concatenated{name}"] = torch.cat(parts).to(device)
    if is_encoder_decoder:
        for name in (IDS, MASK):
            both[f"concatenated{name}"] = batch[f"prompt{name}"].repeat(2, 1).to(device)
    return both
