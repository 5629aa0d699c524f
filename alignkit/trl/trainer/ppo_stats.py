"""What `PPOTrainer` records and logs."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.masking import masked_mean, masked_sum, masked_var, promote
from alignkit.trl.core import convert_to_scalar, stats_to_np

DATA = {"queries", "responses", "scores", "logprobs", "ref_logprobs", "kls", "non_score_reward", "masks", "train_stats"}


def init_trackers(accelerator: Any, config: Any) -> None:
    """Start the trackers of `config.log_with` with the configuration as the run's hyperparameters."""
    flat = config.to_dict()
    if _tracker(config) == "tensorboard":  # which takes no nested dict, and no other values than these
        settings = {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in flat.items()}
    else:
        settings = {"trl_ppo_trainer_config": flat}
    accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs)


def record_step_stats(kl_coef: float, **data: Any) -> dict[str, Any]:
    """Statistics of a step: of the samples under "objective/", "ppo/" and "tokens/", of the training under "ppo/".

    `data`: `queries` and `responses`, B of anything with a length; `scores` [B]; `logprobs`, `ref_logprobs`, `kls` and
    `non_score_reward` [B, T], of which those under a 0 of `masks` do not count; `train_stats`, each with one row per
    mini batch, over which the mean is taken. "objective/kl" and "objective/entropy" are means over samples of sums over
    tokens. The standard deviation of a single number is 0.

    Raises TypeError if other data is given, or less. Warns if the KL divergence is below -1.
    """
    if set(data) != DATA:
        raise TypeError(f"data must be {sorted(DATA)}, not {sorted(data)}: what differs is {sorted(DATA ^ set(data))}")
    logprobs, mask = data["logprobs"], data["masks"].bool()
    kl = masked_sum(data["kls"], mask, -1)
    if kl.mean() < -1:
        warnings.warn(
            f"KL divergence is starting to become negative: {kl.mean():.2f}. This often precedes a failed training; it "
            "happens where tokens are not drawn from the policy itself, so check the arguments of generate (no top-k, "
            "top-p, minimal length or temperature), and the hyperparameters",
            stacklevel=3,
        )
    stats = {
        "objective/kl": kl.mean(),
        "objective/kl_dist": kl,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": data["ref_logprobs"],
        "objective/kl_coef": kl_coef,
        "objective/entropy": masked_sum(-logprobs, mask, -1).mean(),
        "ppo/mean_non_score_reward": masked_mean(data["non_score_reward"], mask),
        "ppo/mean_scores": promote(data["scores"]).mean(),
        "ppo/std_scores": _std(data["scores"]),
        **_lengths("queries", data["queries"]),
        **_lengths("responses", data["responses"]),
        **{f"ppo/{name}": promote(value).mean(0) for name, value in data["train_stats"].items()},
    }
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    return stats


def gather_stats(trainer: Any, stats: Mapping[str, Any]) -> dict[str, Any]:
    """The means over processes of the tensors among `stats`; the rest is kept, as is everything in a single process.

    Tensors whose shape differs between processes, such as log-probs of answers of other lengths, are this process's.
    """
    if trainer.accelerator.num_processes == 1:
        return dict(stats)
    shapes = {name: value.shape for name, value in stats.items() if isinstance(value, Tensor)}
    everywhere = gather_object([shapes])
    common = [name for name, shape in shapes.items() if all(other.get(name) == shape for other in everywhere)]
    here = {name: promote(stats[name]).to(trainer.accelerator.device) for name in common}
    return {**stats, **trainer.accelerator.reduce(here, reduction="mean")}


def log_stats(
    trainer: Any,
    stats: Mapping[str, Any],
    batch: Mapping[str, Any],
    rewards: Any,
    columns_to_log: Sequence[str] = ["query", "response"],
) -> None:
    """Log `stats` and mean, standard deviation and values of the `rewards` of all processes; call it on each of them.

    With wandb also a table "game_log" of the batch's `columns_to_log` and the rewards; ValueError if one is missing.
    Other trackers get the number of the call as the step. Warns if `batch` has neither "query" nor "response".
    """
    accelerator, wandb = trainer.accelerator, _tracker(trainer.config) == "wandb"
    rewards = accelerator.gather(_rewards(rewards, trainer.current_device))
    if wandb:
        missing = [name for name in columns_to_log if name not in batch]
        if missing:
            raise ValueError(f"columns_to_log names {missing}, but the batch has the columns {list(batch)}")
        columns = [gather_object(_plain(batch[name])) for name in columns_to_log]
    if not accelerator.is_main_process:
        return
    if wandb:  # without `commit` the table belongs to the step of the statistics
        rows = [list(row) for row in zip(*columns, rewards.tolist(), strict=True)]
        table = {"columns": [*columns_to_log, "reward"], "data": rows, "commit": False}
        accelerator.get_tracker("wandb").log_table("game_log", **table)
    elif "query" not in batch and "response" not in batch:
        warnings.warn("batch has neither 'query' nor 'response': there is no game to log", stacklevel=2)
    env = {"env/reward_mean": rewards.mean().item(), "env/reward_std": _std(rewards).item()}
    trainer.current_step += 1
    accelerator.log(
        convert_to_scalar(stats_to_np(stats)) | env | {"env/reward_dist": rewards.cpu().numpy()},
        step=None if wandb else trainer.current_step,  # wandb counts itself
    )


def _tracker(config: Any) -> str:
    """The name of the tracker."""
    return config.log_with.name if isinstance(config.log_with, GeneralTracker) else str(config.log_with)


def _rewards(rewards: Any, device: Any) -> Tensor:
    if not isinstance(rewards, Tensor):
        rewards = torch.stack([torch.as_tensor(x, device=device).squeeze() for x in rewards])
    return promote(rewards.detach().to(device)).flatten()


def _plain(column: Any) -> list[Any]:
    return [x.tolist() if isinstance(x, Tensor) else x for x in column]


def _std(x: Tensor) -> Tensor:
    return masked_var(x, torch.ones_like(x, dtype=torch.bool)).sqrt()


def _lengths(name: str, rows: Sequence[Any]) -> dict[str, Any]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.float32)
    return {
        f"tokens/{name}_len_mean": lengths.mean().item(),
        f"tokens/{name}_len_std": _std(lengths).item(),
        f"tokens/{name}_dist": lengths.numpy(),
    }
