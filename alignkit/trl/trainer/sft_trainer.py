"""Supervised fine-tuning on texts."""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import TrainingArguments

from alignkit.hf.loading import without_adapter
from alignkit.hf.trainer import LossTrainer
from alignkit.trl.trainer import neftune
from alignkit.trl.trainer.checks import MAPPED, check_arguments, check_datasets
from alignkit.trl.trainer.completion_collator import DataCollatorForCompletionOnlyLM, TextCollator
from alignkit.trl.trainer.label_loss import label_nll
from alignkit.trl.trainer.peft_setup import load, wrap
from alignkit.trl.trainer.sft_data import TextOptions, checked_kwargs, length_of, prepare_all, tokenizer_of
from alignkit.types import Batch, Metrics
from alignkit.weights import token_mean, weigh


class SFTTrainer(LossTrainer):
    """A Trainer of the mean negative log-likelihood over all label tokens of an optimizer step.

    `model` is a model or its name (`model_init_kwargs` go to `from_pretrained`), with an adapter if `peft_config` is
    given; `tokenizer` (or `processing_class`) is that of the model by default. Texts are the column
    `dataset_text_field`, or what `formatting_func` makes of rows (a list of texts of a batch of rows; one text of one
    row when packing), or conversations in the columns `messages`, `conversations` or `prompt` and `completion`; they
    are truncated to `max_seq_length` tokens or, with `packing`, joined to sequences of that length (see
    `ConstantLengthDataset` for `num_of_sequences` and `chars_per_token`). `eval_packing` is `packing` by default.
    Datasets of token ids and of torch are used as they are. `dataset_kwargs` may hold `append_concat_token` and
    `add_special_tokens`. Raises ValueError where arguments contradict each other or there is no text.
    """

    _tag_names = ("trl", "sft")
    aggregate = staticmethod(token_mean)

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: Any = None,
        dataset_text_field: str | None = None,
        packing: bool | None = False,
        formatting_func: Callable[..., Any] | None = None,
        max_seq_length: int | None = None,
        infinite: bool | None = None,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        dataset_num_proc: int | None = None,
        dataset_batch_size: int | None = 1000,
        neftune_noise_alpha: float | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        *,
        processing_class: Any = None,
        eval_packing: bool | None = None,
    ):
        check_arguments(model, args, tokenizer or processing_class, data_collator, names=True)
        check_datasets(train_dataset, eval_dataset, MAPPED)
        args = TrainingArguments("tmp_trainer") if args is None else args
        packing = bool(packing)
        packings = {"train": packing, "eval": packing if eval_packing is None else eval_packing}
        if infinite is not None:
            warnings.warn("`infinite` is deprecated and has no effect: set `max_steps`.", stacklevel=3)
        if any(packings.values()) and isinstance(data_collator, DataCollatorForCompletionOnlyLM):
            raise ValueError("data_collator is a DataCollatorForCompletionOnlyLM, which does not go with packing=True")
        if neftune_noise_alpha is not None:
            warnings.warn("`neftune_noise_alpha` overrides that of the `TrainingArguments`.", stacklevel=3)
            args = copy.copy(args)
            args.neftune_noise_alpha = neftune_noise_alpha
        self._peft_config = peft_config
        model = _model(model, model_init_kwargs)
        tokenizer = tokenizer_of(model, tokenizer, processing_class)
        options = TextOptions(
            dataset_text_field=dataset_text_field,
            formatting_func=formatting_func,
            max_seq_length=length_of(max_seq_length, tokenizer),
            num_of_sequences=num_of_sequences,
            chars_per_token=chars_per_token,
            dataset_num_proc=dataset_num_proc,
            dataset_batch_size=dataset_batch_size,
            remove_unused_columns=bool(args.remove_unused_columns),
            **checked_kwargs(dataset_kwargs),
        )
        with args.main_process_first(desc="dataset preparation"):
            train_dataset, eval_dataset = prepare_all(train_dataset, eval_dataset, tokenizer, options, packings, args)
        super().__init__(
            model=model if model is None else wrap(model, peft_config, args),
            args=args,
            data_collator=TextCollator(tokenizer, mlm=False) if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which leaves no noise of NEFTune behind, whatever happens."""
        with neftune.removed_after(self):
            return super().train(*args, **kwargs)

    _trl_activate_neftune = neftune.activate

    def call_model_init(self, trial: Any = None) -> Any:
        """The model of `model_init`, with its adapter."""
        return wrap(super().call_model_init(trial), self._peft_config, self.args)

    def masks(self, inputs: Mapping[str, Any]) -> Batch:
        """The labels that count: not negative, and predicted by a token before them (or by an encoder)."""
        if "labels" not in inputs:
            raise ValueError(f"data_collator must make the column 'labels'; the batch has {sorted(inputs)}")
        mask, attention = inputs["labels"] >= 0, inputs.get("attention_mask")
        if self._encoder_decoder:
            return {"mask": mask}
        if attention is not None and attention.dim() == 2:  # after padding on the left, none predicts the first
            mask = mask & attention.roll(1, -1).bool()
        return {"mask": pad(mask[:, 1:], (1, 0))}

    def loss(self, model: nn.Module, *, labels: Tensor, weights: Tensor, **inputs: Any) -> tuple[Tensor, Metrics, Any]:
        """The weighted negative log-likelihood of `labels`, smoothed by `label_smoothing_factor`."""
        outputs = model(**self._model_inputs(inputs, labels))
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        logits = logits[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens before them
        if self._encoder_decoder:  # whose logits predict the token in their own place
            logits, labels, weights = pad(logits, (0, 0, 0, 1)), pad(labels, (1, 0)), pad(weights, (1, 0))
        loss = weigh(label_nll(logits, labels, weights != 0, self.args.label_smoothing_factor), weights)
        if isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:  # a mixture of experts asked for it
            loss = loss + self.model.config.get_text_config().router_aux_loss_coef * outputs["aux_loss"] * weights.sum()
        accurate = logits.detach().argmax(-1).roll(1, -1) == labels
        return loss, {"mean_token_accuracy": weigh(accurate, weights)}, outputs

    def _model_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        if hasattr(config, "use_cache"):
            inputs = {"use_cache": False} | inputs
        if self._encoder_decoder and "decoder_input_ids" not in inputs:
            return inputs | {"decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels)}
        left = self.processing_class.padding_side == "left" and "attention_mask" in inputs
        if left and "position_ids" in inspect.signature(without_adapter(self.model).forward).parameters:
            return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)} | inputs
        return inputs

    @property
    def _encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))


def _model(model: Any, init_kwargs: dict[str, Any] | None) -> Any:
    if isinstance(model, str):
        warnings.warn("`model` is a name: an AutoModelForCausalLM is loaded for you.", stacklevel=4)
        return load(model, init_kwargs)
    if init_kwargs is not None:
        raise ValueError(f"model_init_kwargs={init_kwargs!r} need the name of a model, not a {type(model).__name__}")
    return model
