"""Reward models on pairs of answers."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from alignkit.hf.trainer import LossTrainer
from alignkit.losses.reward import bradley_terry
from alignkit.masking import promote
from alignkit.trl.import_utils import is_peft_available
from alignkit.trl.trainer.checks import check_arguments, check_datasets, check_tokens, one_tokenizer
from alignkit.trl.trainer.reward_collator import RewardDataCollatorWithPadding, compute_accuracy
from alignkit.trl.trainer.reward_config import RewardConfig
from alignkit.types import Batch, Metrics
from alignkit.weights import weigh

__all__ = ["RewardTrainer"]

UNUSED = {"label_smoothing_factor": "pairs have no labels", "label_names": "the loss's columns have fixed names"}
"""Training arguments that could not act here, and why."""


class RewardTrainer(LossTrainer):
    """Trains a sequence classification model with one label to give the better answer the higher number.

    The loss is -log sigmoid(r_chosen - r_rejected - margin). Rows have the columns of `RewardDataCollatorWithPadding`.
    `processing_class` is another name of `tokenizer`. Metrics are `compute_accuracy` unless `compute_metrics` is given;
    predictions are the two answers' probabilities [B, 2], labels 0. Training logs the mean rewards, their difference
    and its share above 0. Raises ValueError for a model whose number of labels is not 1, and for training arguments
    that could not act here.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        max_length: int | None = None,
        peft_config: Any = None,
        processing_class: Any = None,
    ):
        check_arguments(model, args, tokenizer or processing_class, data_collator)
        check_datasets(train_dataset, eval_dataset)
        args = RewardConfig("tmp_trainer") if args is None else args
        tokenizer = one_tokenizer(tokenizer, processing_class)
        max_length = _max_length(args, max_length)
        for name, why in UNUSED.items():
            if getattr(args, name) not in (0, None):
                raise ValueError(f"the training argument {name}={getattr(args, name)!r} has no effect here: {why}")
        self.use_reward_data_collator = data_collator is None
        if data_collator is None:
            data_collator = _collator(args, tokenizer, max_length)
        super().__init__(
            model=_with_adapter(model, peft_config, args),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics or compute_accuracy,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        labels = getattr(getattr(self.model, "config", None), "num_labels", 1)
        if labels != 1:
            raise ValueError(
                f"the model has num_labels={labels}, but a reward is one number: load it with num_labels=1"
            )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, by the name of the release."""
        return self.processing_class

    def masks(self, inputs: Mapping[str, Any]) -> Batch:
        """Every row is a pair that counts."""
        return {"mask": inputs["attention_mask_chosen"].bool()}

    def loss(
        self, model: nn.Module, *, weights: Tensor, margin: Tensor | float = 0.0, **inputs: Any
    ) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
        """Bradley-Terry, weighed; `outputs` are the logits of both answers, [B, 1].

        A module of yours may give several numbers to an answer, such as an ensemble: their losses are averaged.
        """
        if not self.use_reward_data_collator:
            warnings.warn(
                "The loss is that of the columns of RewardDataCollatorWithPadding: make sure that your data_collator "
                "makes them, or override `loss`.",
                stacklevel=2,
            )
        outputs = {f"rewards_{side}": _logits(model, inputs, side) for side in ("chosen", "rejected")}
        chosen, rejected = outputs.values()
        if isinstance(margin, Tensor):
            margin = margin.reshape(-1, 1).expand_as(chosen)
        loss = weigh(bradley_terry(chosen, rejected, margin=margin).mean(-1), weights)
        chosen, rejected = chosen.mean(-1), rejected.mean(-1)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected,
        }
        return loss, {name: weigh(x, weights) for name, x in metrics.items()}, outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the probabilities of the two answers [B, 2], and zeros [B]: the first should win."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        kept = [x for name, x in outputs.items() if name not in (ignore_keys or ())]
        probabilities = promote(torch.stack([x.mean(-1) for x in kept], -1)).softmax(-1)
        return loss.detach(), probabilities, probabilities.new_zeros(len(probabilities))


def _logits(model: nn.Module, inputs: Mapping[str, Any], side: str) -> Tensor:
    ids, mask = inputs[f"input_ids_{side}"], inputs[f"attention_mask_{side}"]
    logits = model(input_ids=ids, attention_mask=mask, return_dict=True)["logits"]
    if logits.dim() != 2:
        raise ValueError(
            f"the model's logits have shape {tuple(logits.shape)}, but must be [{len(ids)}, 1], num_labels=1"
        )
    return logits


def _max_length(args: TrainingArguments, max_length: int | None) -> int | None:
    own = getattr(args, "max_length", None)
    if max_length is not None and own is not None:
        raise ValueError(f"max_length={max_length} and args.max_length={own}: give it once, in the RewardConfig")
    if type(args) is TrainingArguments:
        warnings.warn(
            "`args` of class TrainingArguments are deprecated: use a RewardConfig.", FutureWarning, stacklevel=3
        )
    if max_length is not None:
        warnings.warn(
            "The argument `max_length` is deprecated: set it in the RewardConfig.", FutureWarning, stacklevel=3
        )
    max_length = own if max_length is None else max_length
    check_tokens("max_length", max_length)
    return max_length


def _collator(args: TrainingArguments, tokenizer: Any, max_length: int | None) -> RewardDataCollatorWithPadding:
    """The default one, which needs all columns of the dataset."""
    if tokenizer is None:
        raise ValueError(
            "tokenizer=None: the default RewardDataCollatorWithPadding needs one; give it, or a data_collator"
        )
    if max_length is None:
        warnings.warn("No max_length in the RewardConfig: RewardDataCollatorWithPadding takes 512.", stacklevel=3)
    if args.remove_unused_columns:
        warnings.warn("remove_unused_columns is set to False, as RewardDataCollatorWithPadding needs.", stacklevel=3)
        args.remove_unused_columns = False
    return RewardDataCollatorWithPadding(tokenizer, max_length=512 if max_length is None else max_length)


def _with_adapter(model: Any, peft_config: Any, args: TrainingArguments) -> Any:
    if peft_config is None:
        return model
    if not is_peft_available():
        raise ValueError("peft_config needs the library peft, which is not installed: pip install peft")
    if model is None:
        raise ValueError("peft_config needs a model: a model_init returns the PeftModel itself")
    from alignkit.trl.trainer import peft_setup

    task = getattr(peft_config, "task_type", "SEQ_CLS")
    if task != "SEQ_CLS" and not getattr(peft_config, "modules_to_save", None):
        warnings.warn(f"peft_config: task_type={task} leaves the head as it is, use SEQ_CLS to train it", stacklevel=3)
    return peft_setup.wrap(model, peft_config, args)
