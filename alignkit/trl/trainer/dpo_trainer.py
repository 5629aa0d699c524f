"""Direct preference optimisation: DPO, and on the same pairs IPO, the hinge loss and KTO."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from alignkit.hf.trainer import LossTrainer
from alignkit.train import evaluating
from alignkit.trl.trainer import dpo_collator, dpo_data, dpo_generate, dpo_losses, dpo_reference, dpo_setup
from alignkit.trl.trainer.checks import check_arguments, check_datasets
from alignkit.types import Batch, Metrics
from alignkit.weights import row_mean, token_mean, weigh


class DPOTrainer(LossTrainer):
    """A Trainer of preferences: rows are `prompt`, `chosen` and `rejected` texts, or columns tokenised already.

    `loss_type` is "sigmoid" (DPO, with `label_smoothing` cDPO), "hinge", "ipo" (on log-probs averaged over an answer's
    tokens) or "kto" ("kto_pair"); `beta` ties the policy to its reference. That is `ref_model`, or the policy with its
    adapter off (with `ref_adapter_name`: that adapter instead of `model_adapter_name`), or a copy of the policy as it
    is now. With `precompute_ref_log_probs` the log-probs of all datasets are computed here, and no copy is kept.

    `model` and `ref_model` are models or their names (`*_init_kwargs` go to `from_pretrained`). `padding_value` wins
    over the tokenizer's pad token unless it is 0. See `dpo_data.tokenize_row` for `max_length`, `max_prompt_length` and
    `truncation_mode`; `max_target_length` is for the answers of an encoder-decoder. `generate_during_eval` shows
    sampled answers (see `dpo_generate.log_samples`). Raises ValueError where arguments contradict each other.
    """

    _tag_names = ("trl", "dpo")
    aggregate = {  # noqa: RUF012
        "weights": row_mean,
        "weights_chosen": ("mask_chosen", token_mean),
        "weights_rejected": ("mask_rejected", token_mean),
    }

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        beta: float = 0.1,
        label_smoothing: float = 0,
        loss_type: str = "sigmoid",
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        label_pad_token_id: int = -100,
        padding_value: int | None = 0,
        truncation_mode: str = "keep_end",
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        max_target_length: int | None = None,
        peft_config: Any = None,
        is_encoder_decoder: bool | None = None,
        disable_dropout: bool = True,
        generate_during_eval: bool = False,
        compute_metrics: Callable[..., Any] | None = None,
        precompute_ref_log_probs: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
        ref_model_init_kwargs: dict[str, Any] | None = None,
        model_adapter_name: str | None = None,
        ref_adapter_name: str | None = None,
        *,
        processing_class: Any = None,
        dataset_num_proc: int | None = None,
    ):
        check_arguments(model, args, tokenizer or processing_class, data_collator, names=True)
        check_datasets(train_dataset, eval_dataset)
        args = TrainingArguments("tmp_trainer") if args is None else args
        dpo_setup.check_options(beta, label_smoothing, loss_type, truncation_mode)
        init_kwargs = (model_init_kwargs, ref_model_init_kwargs)
        model, ref_model = dpo_setup.models(model, ref_model, init_kwargs, peft_config, is_encoder_decoder)
        self.is_encoder_decoder = dpo_setup.encoder_decoder(model, is_encoder_decoder)
        self.tokenizer = dpo_setup.tokenizer_of(tokenizer, processing_class)
        limits = dpo_setup.limits(max_length, max_prompt_length, max_target_length, self.is_encoder_decoder)
        self.max_length, self.max_prompt_length, self.max_target_length = limits
        self.beta, self.label_smoothing, self.loss_type = beta, label_smoothing, loss_type
        self.truncation_mode, self.label_pad_token_id = truncation_mode, label_pad_token_id
        self.padding_value = padding_value or self.tokenizer.pad_token_id
        self.generate_during_eval, self.precompute_ref_log_probs = generate_during_eval, precompute_ref_log_probs
        self.model_adapter_name, self.ref_adapter_name = model_adapter_name, ref_adapter_name
        self.dataset_num_proc = dataset_num_proc
        self.use_dpo_data_collator = data_collator is None
        self._stored_metrics: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self._policy = partial(
            dpo_setup.policy,
            args=args,
            peft_config=peft_config,
            disable_dropout=disable_dropout,
            adapter=model_adapter_name,
        )
        super().__init__(
            model=None if model is None else self._policy(model),
            args=args,
            data_collator=dpo_setup.collator(self, args) if self.use_dpo_data_collator else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        self.is_peft_model = isinstance(self.model, PeftModel)
        dpo_setup.check(self, ref_model)
        self.ref_model = dpo_reference.reference(self, ref_model, disable_dropout)
        if self.train_dataset is not None:
            self.train_dataset = self._ready(self.train_dataset, "train_dataset")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {n: self._ready(x, f"eval_dataset[{n!r}]") for n, x in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._ready(self.eval_dataset, "eval_dataset")

    get_batch_logps = staticmethod(dpo_losses.get_batch_logps)
    concatenated_inputs = staticmethod(dpo_collator.concatenated_inputs)

    def call_model_init(self, trial: Any = None) -> Any:
        """The model of `model_init`, with its adapter and without dropout."""
        return self._policy(super().call_model_init(trial))

    # Data

    def tokenize_row(self, feature: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
        """One row's texts as tokens; see `dpo_data`. `model` is for the decoder's ids of an encoder-decoder."""
        options = {} if model is None or not self.is_encoder_decoder else {"model": model}
        return dpo_data.row_tokenizer(self)(feature, **options)

    def build_tokenized_answer(self, prompt: str, answer: str) -> dict[str, Any]:
        """The tokens of prompt + answer, cut where the answer begins; see `dpo_data`."""
        return dpo_data.build_tokenized_answer(self.tokenizer, prompt, answer)

    def _ready(self, dataset: Any, name: str) -> Any:
        """The dataset tokenised, with the log-probs of the reference if they are precomputed."""
        overridden = type(self).tokenize_row is not DPOTrainer.tokenize_row
        tokenize = self.tokenize_row if overridden else dpo_data.row_tokenizer(self)
        with self.args.main_process_first(desc=f"tokenizing {name}"):
            dataset = dpo_data.tokenized(dataset, tokenize, name, self.dataset_num_proc)
        return dpo_reference.with_log_probs(self, dataset, name) if self.precompute_ref_log_probs else dataset

    def get_train_dataloader(self) -> Any:
        """The Trainer's, of a dataset that is tokenised, with log-probs of the reference if they are precomputed."""
        if self.train_dataset is not None:
            self.train_dataset = self._ready(self.train_dataset, "train_dataset")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The same for `eval_dataset`, a dataset, or by default or by name one that the trainer has.

        Raises ValueError if log-probs of the initial policy are needed after it was trained.
        """
        if isinstance(eval_dataset, str):
            self.eval_dataset[eval_dataset] = self._ready(self.eval_dataset[eval_dataset], eval_dataset)
        elif eval_dataset is not None:
            eval_dataset = self._ready(eval_dataset, "eval_dataset")
        elif self.eval_dataset is not None:
            self.eval_dataset = self._ready(self.eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The same for `predict`."""
        return super().get_test_dataloader(self._ready(test_dataset, "test_dataset"))

    # Log-probs

    def null_ref_context(self) -> AbstractContextManager[None]:
        """Within it `self.model` is the reference: its adapter is off, or is that of `ref_adapter_name`."""
        model = self.accelerator.unwrap_model(self.model)
        return dpo_reference.null_ref_context(model, self.model_adapter_name, self.ref_adapter_name)

    def concatenated_forward(self, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs [B] of chosen and rejected answers, and the logits [B, T, V] of both, in one pass of the model."""
        return dpo_losses.forward(self, model, batch)

    def compute_reference_log_probs(self, padded_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs [B] of chosen and rejected answers under the reference, without gradient."""
        return dpo_reference.log_probs(self, padded_batch)

    # The loss

    def masks(self, inputs: Mapping[str, Any]) -> Batch:
        """Where logits stand that predict an answer's tokens."""
        return dpo_losses.logit_masks(inputs, self.label_pad_token_id, self.is_encoder_decoder)

    def dpo_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_free: bool = False,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B] and rewards [B] of chosen and rejected answers; see `dpo_losses.preference_losses`."""
        policy = torch.stack([policy_chosen_logps, policy_rejected_logps], -1)
        losses, rewards = dpo_losses.preference_losses(
            policy,
            torch.stack([reference_chosen_logps, reference_rejected_logps], -1).to(policy),
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            reference_free=reference_free,
            kl=kl,
        )
        return losses, *rewards.unbind(-1)

    def get_batch_loss_metrics(
        self, model: Any, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, Metrics]:
        """The loss of a batch and its metrics, whose names begin with "eval_" if `train_eval` is "eval"."""
        if "weights" not in batch:
            (batch,) = self._weighted([self._prepare_inputs(batch)])
        reference = dpo_losses.reference_of(self, batch)
        chosen, rejected, *logits = self.concatenated_forward(model, batch)
        points = {"kl": batch["kl"]} if "kl" in batch else {}
        losses, *rewards = self.dpo_loss(chosen, rejected, *reference, **points)
        losses = losses.unflatten(0, (-1, len(chosen))).mean(0)  # KTO's come in two halves
        prefix = "eval_" if train_eval == "eval" else ""
        metrics = dpo_losses.metrics((chosen, rejected), tuple(rewards), tuple(logits), batch)
        return weigh(losses, batch["weights"]), {f"{prefix}{name}": x for name, x in metrics.items()}

    def loss(self, model: nn.Module, **inputs: Any) -> tuple[Tensor, Metrics, Metrics]:
        """`get_batch_loss_metrics` of a micro-batch; the Trainer puts its own prefix before the metrics."""
        loss, metrics = self.get_batch_loss_metrics(model, inputs, "train" if model.training else "eval")
        return loss, {name.removeprefix("eval_"): x for name, x in metrics.items()}, metrics

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, and its metrics if asked to `return_outputs`."""
        if not self.use_dpo_data_collator:
            warnings.warn(
                "The loss reads the columns of DPODataCollatorWithPadding; yours must make them.", stacklevel=2
            )
        return super().compute_loss(*args, **kwargs)

    def get_batch_samples(self, model: Any, batch: Any, device: Any = None) -> Any:
        """Texts sampled from `model` and from the reference for a batch of prompts.

        The Trainer's method of this name, which is given an iterator instead of a model, returns the micro-batches of a
        step. KTO's reference points are those of the whole step: with several micro-batches or processes they take
        another pass, without gradient, over it.
        """
        if isinstance(model, nn.Module):
            return dpo_generate.samples(self, model, batch)
        batches, items = super().get_batch_samples(model, batch, device)
        if self.loss_type in dpo_losses.KTO and batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            batches = dpo_losses.with_kl(self, batches)
        return batches, items

    # Evaluation and logs

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the mean logits [2] of chosen and rejected answers, and zeros in the place of labels."""
        with torch.no_grad(), evaluating(model), self.compute_loss_context_manager():
            loss, metrics = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        config = getattr(model, "config", None)
        ignored = getattr(config, "keys_to_ignore_at_inference", []) if ignore_keys is None else ignore_keys
        names = [x for x in ("eval_logits/chosen", "eval_logits/rejected") if x not in ignored]
        if prediction_loss_only or not names:
            return loss, None, None
        logits = torch.stack([metrics[name] for name in names])
        return loss, logits, torch.zeros_like(logits)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, after sampled answers were shown if `generate_during_eval`."""
        if self.generate_during_eval:
            dpo_generate.log_samples(self, dataloader.dataset)
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def store_metrics(self, metrics: Mapping[str, Any], train_eval: str = "train") -> None:
        """Keep metrics of your own, "train" or "eval", for the next log of that kind, which adds their means."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
            self._stored_metrics[train_eval][name].append(value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the metrics since the last log, over all processes."""
        stored = self._stored_metrics.pop("train" if "loss" in logs else "eval", {})
        means = {name: torch.stack(values).mean() for name, values in stored.items()}
        logs |= {name: x.item() for name, x in self.accelerator.reduce(means, "mean").items()}
        super().log(logs, start_time)
