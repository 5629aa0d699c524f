"""Tensor and dict helpers under the names that training scripts import; the formulas are alignkit's primitives."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers import set_seed as set_seed

from alignkit import logps, masking

WANDB_PADDING = -1


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of `values` where `mask` (of any dtype) is not 0: over everything jointly, or along `axis`."""
    return masking.masked_mean(values, _bool(mask, values), axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of all `values` where `mask` is not 0: 0 of a single one, ValueError of none if `unbiased`."""
    mask = _bool(mask, values)
    if unbiased and not mask.any():
        raise ValueError(
            "The sum of the mask is zero, which can happen when `mini_batch_size=1`;"
            "try increase the `mini_batch_size` or `gradient_accumulation_steps`"
        )
    return masking.masked_var(values, mask, correction=int(unbiased))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values`, moved and scaled such that those where `mask` is not 0 have mean 0 and variance 1.

    The others are moved and scaled alike. `shift_mean=False` leaves the mean where it was.
    """
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    return (values - mean) * torch.rsqrt(var + 1e-8) + (0 if shift_mean else mean)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` with all values."""
    return masking.whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean=shift_mean)


def clip_by_value(x: Tensor, tensor_min: float | Tensor, tensor_max: float | Tensor) -> Tensor:
    """max(min(x, tensor_max), tensor_min)."""
    return masking.clip(x, tensor_min, tensor_max)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), [..., V] -> [...]."""
    return logps.entropy(*_followed(logits.reshape(-1, logits.shape[-1])))[1:].reshape(logits.shape[:-1])


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """log_softmax(logits)[labels], unshifted, [B, T, V] and [B, T] -> [B, T]; without `gather` the table [B, T, V]."""
    logits, mask = _followed(logits)
    if not gather:
        return logps.vocab_logps(logits, mask)[:, 1:]
    return logps.token_logps(logits, pad(labels, (1, 0)), mask)[:, 1:]


def _bool(mask: Tensor, values: Tensor) -> Tensor:
    return mask.bool().expand_as(values)


def _followed(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with one more position, as the primitives put what the logits at t say at t + 1, and a mask of Trues."""
    logits = pad(logits, (0, 0, 0, 1))
    return logits, torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


@torch.no_grad()
def respond_to_batch(model: Any, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """`txt_len` tokens sampled behind each row of `queries` [B, L], beyond any EOS; `model(ids)[0]` are logits."""
    if txt_len < 1:
        raise ValueError(f"txt_len={txt_len} must be at least 1")
    filters = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    ids = queries
    for _ in range(txt_len):
        probs = filters(ids, model(ids)[0][:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, num_samples=1)], -1)
    return ids[:, -txt_len:]


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}; empty dicts vanish. Raises ValueError if a key contains `sep`."""
    flat = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"separator '{sep}' not allowed to be in key '{key}'")
        if isinstance(value, Mapping):
            flat |= {key + sep + name: x for name, x in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One row per dict: each entry flattened, padded on the right with `WANDB_PADDING`."""
    return {
        key: pad_sequence([d[key].flatten() for d in stats_dicts], batch_first=True, padding_value=WANDB_PADDING)
        for key in stats_dicts[0]
    }


def add_suffix(input_dict: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """The dict with `suffix` behind each key."""
    return {key + suffix: value for key, value in input_dict.items()}


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as numpy arrays (bfloat16, which numpy lacks, as float32) and numbers as floats."""
    return {key: _to_np(value) for key, value in stats_dict.items()}


def _to_np(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return float(value) if isinstance(value, int | float | np.number | np.bool_) else value


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays and tensors of shape () or (1,) as Python numbers, which is what TensorBoard plots."""
    return {
        key: value.item() if isinstance(value, Tensor | np.ndarray) and value.shape in ((), (1,)) else value
        for key, value in stats.items()
    }


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: int = 50256) -> Tensor:
    """The tensor with `padding` behind it, such that `tensor.shape[dim] == size`."""
    missing = size - tensor.shape[dim]
    if missing < 0:
        raise ValueError(f"size={size} is less than the {tensor.shape[dim]} entries along dim={dim}")
    return pad(tensor.movedim(dim, -1), (0, missing), value=padding).movedim(-1, dim)


class LengthSampler:
    """Draws one of min_value, ..., max_value - 1 from numpy's global stream; ValueError unless 0 <= min < max."""

    def __init__(self, min_value: int, max_value: int):
        if not 0 <= min_value < max_value:
            raise ValueError(f"min_value={min_value} must be at least 0 and less than max_value={max_value}")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """One length."""
        return int(np.random.choice(self.values))  # noqa: NPY002  (the stream that `set_seed` seeds)


class PPODecorators:
    """`@PPODecorators.empty_device_cache()`: frees cached memory afterwards, while `optimize_device_cache` is set."""

    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        """A decorator and a context manager."""
        yield
        if cls.optimize_device_cache:
            clear_device_cache(garbage_collection=True)


def randn_tensor(
    shape: Sequence[int],
    generator: Sequence[torch.Generator] | torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal numbers on `device` (default: CPU); with a list of generators, row i from the i-th alone.

    What a CPU generator draws is moved to `device` with a UserWarning. Raises ValueError for a generator of any other
    kind of device, and for a list that has not one generator per row.
    """
    shape, device = tuple(shape), torch.device("cpu" if device is None else device)
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(generators) not in (1, shape[0]):
        raise ValueError(f"generator has {len(generators)} entries, but there are {shape[0]} rows")
    source = device if generators[0] is None else generators[0].device
    if source.type not in (device.type, "cpu"):
        raise ValueError(f"Cannot generate a {device} tensor from a generator of type {source.type}.")
    if source.type != device.type:
        warnings.warn(f"generator is on 'cpu': the numbers are drawn there and moved to '{device}'", stacklevel=2)
    rows, layout = shape if len(generators) == 1 else (1, *shape[1:]), layout or torch.strided
    drawn = [torch.randn(rows, generator=g, device=source, dtype=dtype, layout=layout) for g in generators]
    return torch.cat(drawn).to(device)
