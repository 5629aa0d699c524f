"""A rollout: answers to the next prompts with their rewards and log-probs, the same columns on all processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit import data
from alignkit.hf.data import shuffled
from alignkit.hf.models import Policy
from alignkit.hf.processes import gather, process
from alignkit.hf.sampling import sample
from alignkit.monitors import zero_variance
from alignkit.train import infer
from alignkit.types import Batch

DRAWS = 16


def rollout(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Any],
    score: Any,
    *,
    n: int,
    size: int,
    rows: int,
    seed: int,
    step: int,
    ref: nn.Module | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
    greedy: bool = False,
) -> Batch:
    """`size` answers, `n` to each of the prompts of this `step`, in the order of their prompts.

    Columns: those of `hf.sample`; `rewards` [size], from `score` (`hf.reward_fn`), which may be an environment that
    also has the turns played; `zero_variance` [size], whether all answers to the prompt have one reward; `old_logps`
    and `entropy` [size, T] under the policy as it is now, computed `rows` rows at a time; `values` [size, T] of a
    policy with a value head; `ref_logps` [size, T] of a `ref`. If the sampler tells no log-probs, `sampler_logps` are
    the policy's own. If they are the policy's own anyhow, up to rounding, `old_logps` and `entropy` are the sampler's:
    where this process samples from a policy without a value head in float32, without filters (at whose edge rounding
    decides). A server that samples gets the policy's weights first.

    `keep(rewards [prompts, n]) -> [prompts]`, such as `filters.dynamic_sampling`, says which prompts to keep; more are
    drawn until there are enough. Raises ValueError if 16 times as many were not enough.
    """
    world = process().num_processes
    if n < 1 or size < 1 or size % (n * world):
        raise ValueError(f"rollout={size} must be a positive multiple of n={n} times {world} processes")
    if policy.sampling.server:
        from alignkit.hf.server import sync

        sync(policy.sampling.server, policy, tokenizer)
    kept: list[Batch] = []
    for draw in range(DRAWS) if keep else [0]:
        at = step * DRAWS + draw if keep else step
        x = next(shuffled(prompts, batch=size // n, seed=seed, start=at))
        options = {"n": n, "greedy": greedy, "seed": seed, "step": at}
        if hasattr(score, "play"):
            b = score.play(policy, tokenizer, x, **options)
        else:
            b = sample(policy, tokenizer, x, **options, entropy=_is_exact(policy))
            b["rewards"] = score(tokenizer, x, b["ids"], b["mask"])
        b = gather(**b | _measured(policy, ref, b, rows))
        rewards = b["rewards"].view(-1, n)
        b["zero_variance"] = zero_variance(rewards).flatten()
        b = {"sampler_logps": b["old_logps"], **b}
        if not keep:
            return b
        chosen = keep(rewards).repeat_interleave(n)
        kept.append({name: column[chosen] for name, column in b.items()})
        if sum(len(part["rewards"]) for part in kept) >= size:
            return {name: column[:size] for name, column in data.concat(kept).items()}
    raise ValueError(
        f"{keep.__name__} kept {sum(len(part['rewards']) for part in kept)} of {DRAWS * size} answers, but a rollout "
        f"needs {size}: choose prompts that are neither too easy nor too hard for this model, or a larger n"
    )


def _measured(policy: Policy, ref: nn.Module | None, b: Batch, rows: int) -> Batch:
    if "entropy" in b:  # the sampler's
        measured = {"old_logps": b["sampler_logps"].to(policy.device, copy=True)}
    else:
        names = ("old_logps", "entropy", "values")
        measured = dict(zip(names, infer(policy.measure, b["ids"], b["mask"], rows=rows)))
    return measured | ({"ref_logps": infer(ref, b["ids"], b["mask"], rows=rows)} if ref else {})


def _is_exact(policy: Policy) -> bool:
    """Whether the log-probs of what is sampled in this process are those of `policy.measure`, up to float32 rounding.

    Not where rounding is coarser, or decides what may be drawn, or where positions depend on the length of the row.
    """
    spec, kind = policy.sampling, policy.device.type
    precisions = {x.fp32_precision for x in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)}
    narrow = torch.is_autocast_enabled(kind) or not precisions <= {"none", "ieee"}
    moving = any(x in repr(getattr(policy.config, "rope_parameters", None)) for x in ("dynamic", "longrope"))
    cut = spec.top_k or spec.top_p < 1 or spec.min_p
    plain = type(policy) is Policy and not (spec.server or cut or narrow or moving)
    return plain and all(x.dtype == torch.float32 for x in policy.parameters())
