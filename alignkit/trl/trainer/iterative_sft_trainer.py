"""`IterativeSFTTrainer`: supervised steps on rows that the caller makes between them."""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from alignkit.hf.trainer import LossTrainer
from alignkit.train import add_metrics
from alignkit.trl.trainer.checks import check_arguments, check_datasets, check_tokens
from alignkit.trl.trainer.iterative_sft_data import IGNORED, Labelled, Padding, checked, step_rows
from alignkit.trl.trainer.label_loss import label_nll
from alignkit.types import Batch, Metrics
from alignkit.weights import token_mean, weigh


class IterativeSFTTrainer(LossTrainer):
    """A `transformers.Trainer` that is handed the rows of each `step`: sample, choose, step, repeat.

    The training arguments keep their meaning: a learning-rate schedule of `max_steps` optimizer steps, each on
    `gradient_accumulation_steps` batches of `per_device_train_batch_size` rows, with logs, evaluations and checkpoints
    as their strategies say (`eval_steps` alone is enough). An epoch is one call of `step`; `state.epoch` counts them.
    `resume_from_checkpoint`, a folder or True for the last one, makes the trainer what it was there.

    `model` is causal or an encoder-decoder, with or without an adapter. `processing_class` is another name for
    `tokenizer`, whose `truncation_side` is set to what `truncation_mode` says. `data_collator` pads ids and attention.
    """

    aggregate = staticmethod(token_mean)

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        tokenizer: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Callable[..., Any] | None = None,
        eval_dataset: Any = None,
        max_length: int | None = None,
        truncation_mode: str = "keep_end",
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        optimize_device_cache: bool = False,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_arguments(None, args, None, data_collator)
        check_datasets(None, eval_dataset)
        check_tokens("max_length", max_length)
        args = TrainingArguments("tmp_trainer") if args is None else args
        tokenizer = checked(model, args, tokenizer, processing_class, optimizers)
        self.tokenizer, self.max_length, self.truncation_mode = tokenizer, max_length, truncation_mode
        self.optimize_device_cache = optimize_device_cache
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.is_peft_model = isinstance(model, PeftModel)
        tokenizer.truncation_side = "left" if truncation_mode == "keep_end" else "right"
        if data_collator is None:
            warnings.warn("No data collator is provided. Padding on the right, and labels with -100", stacklevel=2)
            data_collator = Padding(tokenizer)
        if args.eval_steps is not None and args.eval_strategy == "no" and eval_dataset is not None:
            args.eval_strategy = type(args.eval_strategy)("steps")
        super().__init__(
            model=model,
            args=args,
            data_collator=Labelled(data_collator, tokenizer, causal=not self.is_encoder_decoder),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        resume = args.resume_from_checkpoint
        super().train(resume_from_checkpoint=True if resume in ("True", "true", "last") else resume)

    def step(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        texts: Any = None,
        texts_labels: Any = None,
    ) -> dict[str, Any]:
        """One pass over the given rows in random order: an optimizer step for each batch of them.

        `input_ids`, `attention_mask` (all ones by default) and `labels` are lists of tensors [time], `texts` and
        `texts_labels` lists of strings. Labels default to the ids, and -100 marks a token that does not count. A causal
        model wants a label for each id, an encoder-decoder model wants labels. What is longer than `max_length` is
        cut. On several processes each gives rows of its own, as many as the others.

        Returns "loss" (mean over the optimizer steps), "learning_rate" (of the first) and "global_step" (after the
        last). Raises ValueError for rows of another form, and if none of their tokens counts.
        """
        given = (input_ids, attention_mask, labels, texts, texts_labels)
        limits = {"max_length": self.max_length, "truncation_mode": self.truncation_mode}
        rows = step_rows(*given, tokenizer=self.tokenizer, causal=not self.is_encoder_decoder, **limits)
        if "labels" not in rows[0] and isinstance(self.data_collator.collator, Padding):
            warnings.warn("No labels are provided. Setting labels to input_ids", stacklevel=2)
        size = self.args.per_device_train_batch_size
        batches = list(DataLoader(rows, size, shuffle=True, collate_fn=self.data_collator))
        counts = any(bool(self.masks(batch)["mask"].any()) for batch in batches)
        sizes, counts = zip(*gather_object([(len(batches), counts)]))
        if len(set(sizes)) > 1:
            raise ValueError(f"each process must give as many rows as the others; their batches are {sizes}")
        if not any(counts):
            raise ValueError("no token counts: every label is -100, has no attention, or has no token before it")
        before, rate = self.state.global_step, self._get_learning_rate()
        if 0 < self.args.max_steps <= before and rate == 0:
            warnings.warn(f"the learning rate is 0, as max_steps={self.args.max_steps} are done", stacklevel=2)
        self._losses: Metrics = {}
        self._pass(batches)
        if self.optimize_device_cache:
            clear_device_cache(garbage_collection=True)
        loss = self.accelerator.reduce(self._losses, "sum")["loss"] / (self.state.global_step - before)
        return {"loss": loss.item(), "learning_rate": rate, "global_step": self.state.global_step}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: `step` trains."""
        raise TypeError("IterativeSFTTrainer is trained by calling step(input_ids, ...), not train()")

    def loss(self, model: nn.Module, *, labels: Tensor, weights: Tensor, **inputs: Any) -> tuple[Tensor, Metrics, Any]:
        """Mean negative log-likelihood of the labels, smoothed by `args.label_smoothing_factor`."""
        targets, mask = self._targets(labels)
        if self.is_encoder_decoder:
            inputs["labels"] = labels  # of which the model makes the decoder's inputs
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, -labels.shape[-1] :]  # prompt tuning puts virtual tokens before them
        logits = pad(logits, (0, 0, 0, 1)) if self.is_encoder_decoder else logits
        loss = weigh(label_nll(logits, targets, mask, self.args.label_smoothing_factor), weights)
        if model.training:
            add_metrics(self._losses, {"loss": loss})
        return loss, {}, outputs

    def masks(self, inputs: Mapping[str, Any]) -> Batch:
        """Where a label counts."""
        return {"mask": self._targets(inputs["labels"])[1]}

    @property
    def tr_loss(self) -> Tensor:
        """Sum of the losses since the last log."""
        return self._tr_loss

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labels and where they count, aligned with ids: those of a decoder come after its start token."""
        labels = pad(labels, (1, 0)) if self.is_encoder_decoder else labels
        return labels, pad(labels[..., 1:] != IGNORED, (1, 0))

    def _inner_training_loop(self, *_: Any, resume_from_checkpoint: str | None = None, **__: Any) -> None:
        """Instead of the Trainer's loop, all that comes before its first epoch."""
        steps = self.args.max_steps
        self._init_training_state(steps, max(steps, 1), 1, resume_from_checkpoint, None)
        self._prepare_for_training(steps, None, resume_from_checkpoint)
        self._load_rng_state(resume_from_checkpoint)
        self._tr_loss, self._total_loss_scalar = torch.tensor(0.0, device=self.args.device), 0.0
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen

    def _pass(self, batches: list[Batch]) -> None:
        """An epoch of the Trainer on these batches."""
        if self.state.global_step == self._initial_global_step:
            self._begin()
        updates = math.ceil(len(batches) / self.args.gradient_accumulation_steps)
        done, end = self.state.global_step, self.state.max_steps  # where the Trainer would stop, whatever is left
        self.state.max_steps = sys.maxsize if done >= end else max(end, done + updates)
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        self.control.should_training_stop = False
        model = self.model_wrapped
        with nullcontext() if self.optimize_device_cache else gradients_kept(model):
            self._run_epoch(
                model=model,
                epoch=math.ceil(self.state.epoch or 0),
                train_dataloader=batches,
                steps_in_epoch=len(batches),
                num_update_steps_per_epoch=updates,
                trial=None,
                ignore_keys_for_eval=None,
                start_time=time.time(),
                resume_from_checkpoint=None,
                epochs_trained=0,
                steps_trained_in_current_epoch=0,
            )

    def _begin(self) -> None:
        """What the first step does, when all callbacks have been added."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self._evaluate(None, None, skip_scheduler=True)


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """The run inside sets gradients to 0, as the release did, where it would drop them; but not DeepSpeed's."""
    if type(model).zero_grad is not nn.Module.zero_grad:
        yield
        return
    model.zero_grad = partial(model.zero_grad, set_to_none=False)
    try:
        yield
    finally:
        del model.zero_grad
