"""The parts of `PPOTrainer.step`: experience, and `ppo_epochs` passes over it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor

from alignkit.train import split
from alignkit.trl.core import WANDB_PADDING, stack_dicts
from alignkit.trl.trainer import ppo_forward
from alignkit.trl.trainer.ppo_loss import warn_if_skipped


@contextmanager
def timed(timing: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds under "time/ppo/{name}"."""
    start = time.time()
    yield
    timing[f"time/ppo/{name}"] = time.time() - start


def push_if_best(trainer: Any, scores: Tensor) -> None:
    """Every `compare_steps` steps, push the model if the mean score of all processes is the best so far."""
    if not trainer.push_to_hub_kwargs:
        return
    if trainer.compare_step % trainer.config.compare_steps == 0:
        mean = trainer.accelerator.reduce(scores.mean(), reduction="mean")
        if mean > trainer.highest_reward:
            trainer.highest_reward = mean
            trainer.push_to_hub(**trainer.push_to_hub_kwargs)
    trainer.compare_step += 1


@torch.no_grad()
def experience(
    trainer: Any,
    timing: dict[str, float],
    queries: list[Tensor],
    responses: list[Tensor],
    scores: Tensor,
    response_masks: list[Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `optimize` trains on, rows of tensors; and what `record_step_stats` records."""
    full = trainer.config.kl_penalty == "full"
    with timed(timing, "forward_pass"):
        inputs = trainer.prepare_model_inputs(queries, responses)
        if trainer.is_distributed:
            inputs = ppo_forward.pad_across_processes(trainer, inputs)
        batch = queries, responses, inputs, full
        logprobs, logits, values, masks = trainer.batched_forward_pass(trainer.model, *batch, response_masks)
        with trainer.optional_peft_ctx():
            reference = trainer.model if trainer.is_peft_model else trainer.ref_model
            ref_logprobs, ref_logits, _, _ = trainer.batched_forward_pass(reference, *batch)
    with timed(timing, "compute_rewards"):
        compared = [x.log_softmax(-1) for x in (logits, ref_logits)] if full else [logprobs, ref_logprobs]
        rewards, non_score_reward, kls = trainer.compute_rewards(scores, *compared, masks)
    with timed(timing, "compute_advantages"):
        values, advantages, returns = trainer.compute_advantages(values, rewards, masks)
    both = {"logprobs": logprobs, "masks": masks}
    record = {"queries": queries, "responses": responses, "scores": scores, "ref_logprobs": ref_logprobs}
    return (
        inputs | both | {"values": values, "advantages": advantages, "returns": returns},
        record | both | {"non_score_reward": non_score_reward, "kls": kls},
    )


def optimize(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`ppo_epochs` passes over the rows in random orders; returns the statistics, a row for each mini batch."""
    config, rows, trainer._ratios = trainer.config, [], []
    names = [name for name in batch if name.endswith(("input_ids", "attention_mask"))]
    ppo_forward.without_dropout(trainer.model)
    for _ in range(config.ppo_epochs):
        order = torch.from_numpy(np.random.permutation(config.batch_size))  # noqa: NPY002  (seeded by config.seed)
        shuffled = {name: x[order.to(x.device)] for name, x in batch.items()}
        for part in split(shuffled, config.mini_batch_size):
            with trainer.accelerator.accumulate(trainer.model):
                logprobs, logits, vpreds = ppo_forward.forward(trainer.model, {name: part[name] for name in names})
                old, rest = (part["logprobs"], part["values"]), (part["masks"], part["advantages"], part["returns"])
                rows.append(trainer.train_minibatch(*old, logprobs, logits, vpreds, *rest))
        if trainer._early_stop(rows[-1]["policy/policykl"]):
            break
    ratios, trainer._ratios = trainer._ratios, None
    if ratios:
        warn_if_skipped(trainer, torch.stack(ratios).max())
    stats = stack_dicts(rows)
    stats |= {name: stats[name].flatten()[None] for name in ("policy/advantages", "policy/ratio")}  # no means of these
    return stats | {"policy/advantages": stats["policy/advantages"].nan_to_num(WANDB_PADDING)}


def step_optimizer(trainer: Any) -> None:
    """Clip the gradient, and step; but not if it is 0, as when all mini batches were skipped.

    Neither momentum nor weight decay shall then move a parameter. A fused optimizer is told so on the device, another
    one has to wait for it.
    """
    accelerator, limit = trainer.accelerator, trainer.config.max_grad_norm
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # clips, and has stepped already
        trainer.optimizer.step()
        return
    norm = accelerator.clip_grad_norm_(trainer.model.parameters(), float("inf") if limit is None else limit)
    optimizer, scaler = getattr(trainer.optimizer, "optimizer", trainer.optimizer), accelerator.scaler
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused and scaler is None and accelerator.distributed_type != DistributedType.FSDP:
        optimizer.found_inf = (norm == 0).float()
        trainer.optimizer.step()
        del optimizer.found_inf
    elif norm != 0:
        trainer.optimizer.step()
    elif scaler is not None:
        scaler.update()


def early_stop(trainer: Any, policykl: Tensor) -> bool:
    """Whether the mean over processes of the KL of the last mini batch is above 1.5 `target_kl`; clears gradients."""
    if not trainer.config.early_stopping:
        return False
    stop = bool(trainer.accelerator.reduce(policykl, reduction="mean") > 1.5 * trainer.config.target_kl)
    if stop:
        trainer.optimizer.zero_grad(set_to_none=False)
    return stop
