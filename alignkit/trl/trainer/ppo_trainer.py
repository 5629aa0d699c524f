"""Proximal policy optimisation of a language model with a value head."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from alignkit.train import split
from alignkit.trl import core
from alignkit.trl.trainer import ppo_forward, ppo_generation, ppo_hub, ppo_loss, ppo_setup, ppo_stats, ppo_step
from alignkit.trl.trainer.checks import one_tokenizer
from alignkit.trl.trainer.controllers import AdaptiveKLController, FixedKLController, RunningMoments


class PPOTrainer:
    """PPO: Schulman et al. 2017, arXiv:1707.06347; of language models: Ziegler et al. 2019, arXiv:1909.08593.

    `generate` answers queries, you score the answers, and `step` trains on them. The reference of the KL penalty is
    `ref_model`; or a frozen copy of `model`, which shares the first `num_shared_layers` layers; or, of a model with
    adapters, the model without them. With a `dataset`, `dataloader` has batches of it, made by `data_collator`. The
    default `optimizer` is Adam. `lr_scheduler` advances once per `step`. `processing_class` is another name of
    `tokenizer`; `training_data_collator` pads the token ids of a step. Raises ValueError for other types of arguments.
    """

    def __init__(
        self,
        config: Any = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: Any = None,
        data_collator: Any = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        processing_class: Any = None,
        training_data_collator: Any = None,
    ):
        tokenizer = one_tokenizer(tokenizer, processing_class)
        ppo_setup.check_arguments(config, model, ref_model, tokenizer, dataset, optimizer, lr_scheduler)
        core.set_seed(config.seed)
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self.accelerator = accelerator = ppo_setup.make_accelerator(config)
        self.current_device, self.current_step = accelerator.device, 0
        self.is_distributed = accelerator.num_processes > 1
        self.is_encoder_decoder = config.is_encoder_decoder = getattr(model, "is_encoder_decoder", False)
        self.is_peft_model = config.is_peft_model = model.is_peft_model
        config.world_size = accelerator.num_processes
        config.global_backward_batch_size = config.backward_batch_size * config.world_size
        config.global_batch_size = config.batch_size * config.world_size
        ppo_stats.init_trackers(accelerator, config)

        self.ref_model = ppo_setup.make_reference(model, ref_model, num_shared_layers)
        self.optional_peft_ctx = model.pretrained_model.disable_adapter if self.is_peft_model else nullcontext
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        if dataset is None:
            ppo_setup.warn_without_dataset(config.world_size)
        dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        optimizer = optimizer or ppo_setup.make_optimizer(model, accelerator.device, config.learning_rate)
        prepared = accelerator.prepare(model, optimizer, dataloader, lr_scheduler)
        self.model, self.optimizer, self.dataloader, self.lr_scheduler = prepared
        if self.ref_model is not None:
            self.ref_model = accelerator.prepare_model(self.ref_model, evaluation_mode=True).eval()

        adaptive = config.init_kl_coef, config.target, config.horizon
        self.kl_ctl = AdaptiveKLController(*adaptive) if config.adap_kl_ctrl else FixedKLController(config.init_kl_coef)
        self.running = RunningMoments(accelerator)
        self.push_to_hub_kwargs = config.push_to_hub_if_best_kwargs
        self.compare_step, self.highest_reward = 0, torch.tensor(-torch.inf)
        self._ratios: list[Tensor] | None = None

    generate = ppo_generation.generate
    prepare_dataloader = ppo_generation.prepare_dataloader
    prepare_model_inputs = ppo_forward.prepare_model_inputs
    compute_rewards = ppo_loss.compute_rewards
    compute_advantages = ppo_loss.compute_advantages
    loss = ppo_loss.loss
    record_step_stats = staticmethod(ppo_stats.record_step_stats)
    gather_stats = ppo_stats.gather_stats
    log_stats = ppo_stats.log_stats
    create_model_card = ppo_hub.create_model_card
    save_pretrained = _save_pretrained = ppo_hub.save_pretrained
    push_to_hub = ppo_hub.push_to_hub
    _step_safety_checker = ppo_forward.check_batch
    _kl_penalty = ppo_loss.kl_penalty
    _early_stop = ppo_step.early_stop

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    def step(self, queries: Any, responses: Any, scores: Any, response_masks: Any = None) -> dict[str, Any]:
        """Train on `batch_size` queries and responses, each a tensor of token ids, and the scores of the responses.

        `response_masks` say which tokens of the responses count. Returns the statistics of the step as arrays and
        numbers. Raises ValueError unless all are lists of `batch_size` tensors, of one number if scores.
        """
        queries, responses, scores, response_masks = self._step_safety_checker(
            self.config.batch_size, queries, responses, scores, response_masks
        )
        scored = ppo_loss.transform_scores(self, ppo_forward.stack_scores(scores))
        ppo_step.push_if_best(self, scored)
        timing: dict[str, float] = {}
        with ppo_step.timed(timing, "total"):
            batch, record = ppo_step.experience(self, timing, queries, responses, scored, response_masks)
            with ppo_step.timed(timing, "optimize_step"):
                train_stats = ppo_step.optimize(self, batch)
            with ppo_step.timed(timing, "calc_stats"):
                stats = self.record_step_stats(self.kl_ctl.value, train_stats=train_stats, **record)
                stats = core.stats_to_np(self.gather_stats(stats) if self.is_distributed else stats)
            stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
            self.kl_ctl.update(stats["objective/kl"], self.config.batch_size * self.accelerator.num_processes)
        stats |= timing
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return stats if self.config.log_with == "wandb" else core.convert_to_scalar(stats)

    def batched_forward_pass(
        self,
        model: Any,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(log-probs, logits [B, T - 1, V] or None, values, masks of the responses), the others [B, T - 1].

        `[:, t]` is about token t + 1. Runs in eval mode, on `mini_batch_size` rows at a time.
        """
        model.eval()
        parts = []
        for part in split(dict(model_inputs), self.config.mini_batch_size):
            logprobs, logits, values = ppo_forward.forward(model, part)
            parts.append((logprobs, logits if return_logits else None, values))
            del logits
            self._free_cache()
        logprobs, logits, values = (None if column[0] is None else torch.cat(column) for column in zip(*parts))
        return logprobs, logits, values, ppo_forward.response_mask(model_inputs, queries, responses, response_masks)

    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logprobs: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> dict[str, Tensor]:
        """Backward pass of `loss`, and a step of the optimizer if the gradients of enough mini batches are there."""
        loss_p, loss_v, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        self.accelerator.backward(loss_p + loss_v)
        if self.accelerator.sync_gradients:
            ppo_step.step_optimizer(self)
        self.optimizer.zero_grad(set_to_none=False)
        self._free_cache()
        return stats

    def _free_cache(self) -> None:
        if self.config.optimize_device_cache:
            clear_device_cache(garbage_collection=True)
