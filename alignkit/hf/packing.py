"""A model's body on the tokens of a batch alone: rows without their padding, and a prefix that rows share only once.

Tokens of all rows lie in one row of the model, as a forest: each segment attends to the segments before it on the way
from its root, and to itself causally, with the positions that its tokens have in their rows. The attention runs segment
by segment, so nothing is computed for pairs of tokens that do not see each other. Hidden states are those of the
padded rows, so long as there is no dropout (rows that share a prefix share its noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from alignkit.hf.loading import without_adapter
from alignkit.train import evaluating

logger = logging.get_logger(__name__)

NAME = "unpadded"
LEAST = 8
"""Tokens that a shared prefix must have: for fewer the attention in parts costs more than it saves."""


class Segment(NamedTuple):
    """A part of one or several rows: `length` tokens, and the places in the list of the segments before it."""

    length: int
    before: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokens [N] of the segments one after another, their positions [N], and where a row's token lies: [rows, T].

    `where` is 0 behind the end of a row.
    """

    ids: Tensor
    positions: Tensor
    where: Tensor
    segments: Sequence[Segment]
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, length: int, past: int) -> Tensor:
        """Of `length` tokens behind `past` others, made once for all layers."""
        if (length, past) not in self.masks:
            ones = torch.ones(length, past + length, dtype=torch.bool, device=self.ids.device)
            self.masks[length, past] = ones.tril(past)[None, None]
        return self.masks[length, past]

    def block_mask(self) -> Any:
        """The same for FlexAttention: who sees whom among the N tokens."""
        lengths = torch.tensor([s.length for s in self.segments])
        sees = torch.eye(len(lengths), dtype=torch.bool)
        for i, segment in enumerate(self.segments):
            sees[i, list(segment.before)] = True
        device, n = self.ids.device, len(self.ids)
        own = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        sees, positions = sees.to(device), self.positions

        return create_block_mask(
            lambda b, h, q, k: sees[own[q], own[k]] & (positions[k] <= positions[q]), 1, 1, n, n, device=str(device)
        )


def lay_out(ids: Int[Tensor, "rows time"], lengths: Sequence[int], *, least: int = LEAST) -> Layout:
    """The first `lengths[i]` tokens of each row i; prefixes of at least `least` tokens that rows share lie there once.

    Rows that share may lie anywhere in the batch. The tokens are read on the host.
    """
    host = ids.cpu().numpy()
    rows = [host[i, :n].tolist() for i, n in enumerate(lengths)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared = [_common(host[a], host[b], min(lengths[a], lengths[b])) for a, b in pairwise(order)]
    where = np.zeros(host.shape, dtype=np.int64)
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    offset, todo = 0, [(0, len(rows), 0, ())] if rows else []
    while todo:  # rows order[low:high], whose first `depth` tokens have a place already
        low, high, depth, before = todo.pop()
        first = order[low]
        end = min(shared[low : high - 1], default=lengths[first])
        if end > depth and (high - low == 1 or end - depth >= least):
            before, length = (*before, len(segments)), end - depth
            segments.append(Segment(length, before[:-1]))
            tokens.append(host[first, depth:end])
            positions.append(np.arange(depth, end))
            where[order[low:high], depth:end] = np.arange(offset, offset + length)
            offset, depth = offset + length, end
        if high - low > 1:
            cuts = [i + 1 for i in range(low, high - 1) if shared[i] == end]
            todo += [(a, b, depth, before) for a, b in pairwise([low, *cuts, high])]
    flat = (torch.from_numpy(np.concatenate(x)).to(ids.device) if x else ids[:0, 0] for x in (tokens, positions))
    return Layout(*flat, torch.from_numpy(where).to(ids.device), segments)


def _common(a: np.ndarray, b: np.ndarray, limit: int) -> int:
    different = np.flatnonzero(a[:limit] != b[:limit])
    return int(different[0]) if len(different) else limit


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it; with a `layout`, of each segment with those before it."""
    sparse = [name for name, x in options.items() if "indices" in name and x is not None]
    if sparse or (layout is not None and attention_mask.numel() > 1):
        raise NotImplementedError(f"{type(module).__name__} has a mask of its own")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sizes = [segment.length for segment in layout.segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    parts = []
    for i, (length, before) in enumerate(layout.segments):
        k, v = (torch.cat([x[j] for j in (*before, i)], 2) if before else x[i] for x in (keys, values))
        mask = layout.mask(length, k.shape[2] - length) if before else None
        parts.append(sdpa_attention_forward(module, queries[i], k, v, mask, **options)[0])
    return torch.cat(parts, 1), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Body:
    """The last hidden states of a causal model's body: `body(ids, lengths) -> (hidden [N, d], where [rows, T])`.

    `where[i, t]` is the place of token t of row i among the N; what it says behind the end of a row has no meaning.
    Rows are packed if the model's attention can be: SDPA, FlexAttention, or flash attention, which shares no prefixes;
    tried on a few tokens. Other models read padded rows.
    """

    def __init__(self, lm: Any):
        base = without_adapter(lm)
        config = base.config.get_text_config(decoder=True)
        self.attention = base.config._attn_implementation
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self.limit = min((x for x in windows if x), default=None)
        self.packs = False
        if getattr(config, "attn_temperature_tuning", None):
            pass  # by the place in the packed row
        elif self.attention in ("sdpa", NAME) and base._can_set_attn_implementation():
            base.set_attn_implementation(NAME)
            self.packs = self._is_exact(lm, base)
            if not self.packs:
                base.set_attn_implementation("sdpa")
        elif self.attention == "flex_attention" or "flash" in str(self.attention):
            self.packs = self._is_exact(lm, base)
        if not self.packs:
            logger.warning_once(
                f"{type(base).__name__} with attention {self.attention!r} reads padded rows, and repeated prompts again"
            )

    def __call__(
        self, lm: Any, ids: Int[Tensor, "rows time"], lengths: Sequence[int]
    ) -> tuple[Float[Tensor, "tokens dim"], Int[Tensor, "rows time"]]:
        """The first `lengths[i]` tokens of each row i are read, and maybe others."""
        longest = max(lengths, default=0)
        if self.packs and 0 < longest <= (self.limit or longest):
            layout = lay_out(ids, lengths, least=LEAST if self._shares else longest + 1)
            if len(layout.ids) < 0.9 * len(lengths) * longest:
                return self._packed(lm, layout), layout.where
        hidden, places = self.padded(lm, ids[:, : max(longest, 1)])
        return hidden, pad(places, (0, ids.shape[1] - places.shape[1]))

    @staticmethod
    def padded(lm: Any, ids: Int[Tensor, "rows time"]) -> tuple[Tensor, Tensor]:
        """The same of all tokens of the rows."""
        hidden = _inside(lm)(input_ids=ids, use_cache=False)[0]
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return hidden.flatten(0, 1), places

    @property
    def _shares(self) -> bool:
        return "flash" not in str(self.attention)

    def _packed(self, lm: Any, layout: Layout) -> Tensor:
        options: dict[str, Any] = {}
        if self.attention == "flex_attention":
            options["attention_mask"] = layout.block_mask()
        elif self._shares:  # a mask of four axes is handed on as it is; the layout is in its place
            options = {"attention_mask": layout.ids.new_ones(1, 1, 1, 1, dtype=torch.bool), "layout": layout}
        ids, positions = layout.ids[None], layout.positions[None]
        return _inside(lm)(input_ids=ids, position_ids=positions, use_cache=False, **options)[0][0]

    @torch.no_grad()
    def _is_exact(self, lm: Any, base: Any) -> bool:
        """Whether hidden states of a few packed rows are those of the rows."""
        size = base.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 6, 7, 0], [8, 9, 0, 0, 0]], device=base.device) % size
        lengths = [5, 4, 2]
        layout = lay_out(ids, lengths, least=2 if self._shares else 6)
        with evaluating(lm):
            try:
                packed = self._packed(lm, layout)[layout.where]
            except Exception as error:  # whatever the reason, there is another way
                logger.warning_once(f"{type(base).__name__} cannot read packed rows: {type(error).__name__}: {error}")
                return False
            padded = _inside(lm)(input_ids=ids, use_cache=False)[0]
        gaps = [(packed[i, :n] - padded[i, :n]).abs().max() for i, n in enumerate(lengths)]
        return bool(torch.stack(gaps).max() <= max(8 * torch.finfo(padded.dtype).eps, 1e-4) * padded.abs().max())


def _inside(lm: Any) -> Any:
    return without_adapter(lm).base_model
