"""The training loop: `transformers.Trainer`, told what a batch, a loss and a weight are.

A micro-batch has `per_device_train_batch_size` rows, a step `gradient_accumulation_steps` of them on each process.
Weights are computed on the masks of the whole step, so losses and metrics of the parts add up to those of the step.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint, has_length

from alignkit.hf.arguments import check, to_resume
from alignkit.hf.callbacks import Interrupt, Log, Print, Progress
from alignkit.hf.images import Images
from alignkit.hf.loading import without_bars
from alignkit.hf.models import load_value_head, save_value_head
from alignkit.hf.processes import process
from alignkit.hf.samples import Samples
from alignkit.hf.trainer import LossTrainer
from alignkit.train import add_metrics, check_columns, check_loss, split, split_tokens
from alignkit.types import Aggregates, Batch, Metrics

Batches = Callable[[int], Iterator[Batch]] | Iterable[Batch]


def fit(
    loss_fn: Callable[..., tuple[Tensor, Metrics]],
    model: nn.Module,
    batches: Batches,
    *,
    aggregate: Aggregates,
    args: TrainingArguments,
    tokenizer: Any = None,
    eval_batches: Batches | dict[str, Batches] | None = None,
    state: dict[str, Any] | None = None,
    samples: int | None = None,
    images: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train `model` on a stream of step batches; returns the Trainer's closing metrics.

    `loss_fn(model, **columns) -> (scalar, metrics)` gets each batch's columns and those made by `aggregate`; see
    `train.update`, whose step this is. `batches(step)` returns an iterator that begins with the batch of that step,
    with this process's rows; or it is an iterable, which a resumed run skips forward. Batches are pulled one step at a
    time, after the step before and under the same mixed precision, so a stream may sample from the model; it draws
    random numbers from generators of its own. What such a stream must remember (a controller's state, the rollout in
    progress) it keeps in the dict `state`, which is saved with every checkpoint of each process and filled again before
    a resumed run calls `batches`. With a `tokenizer` too, answers of the newest rollout are shown every `samples` steps
    (0 for never, by default five times in a run) and kept in `samples.parquet`. Images that the stream or the loss puts
    into `state["images"]`, alone or in a tuple with prompts and rewards, are drawn every `images` steps (0 for never,
    by default twenty times in a run); they are no part of checkpoints. `eval_batches` is finite, and evaluated as one
    batch.

    Every log goes to `metrics.jsonl` in `args.output_dir` and to the trackers in `args.report_to`. Ctrl-C saves a
    checkpoint after the step in progress and exits with status 130; `args.resume_from_checkpoint`, a folder or "last",
    continues to the same parameters as if never stopped. A folder that holds another run is refused.
    """
    check(args)
    if args.eval_strategy != "no" and eval_batches is None:
        raise ValueError(f"eval_strategy={args.eval_strategy.value!r} needs eval_batches, and fit was given none")
    checkpoint = to_resume(args)
    watched = tokenizer is not None and state is not None
    if samples and not watched:
        raise ValueError(f"samples={samples} needs a tokenizer and state, the dict that holds the rollout")
    if images and state is None:
        raise ValueError(f"images={images} needs state, the dict into which they are put")
    watch = [Samples(tokenizer, state, every=samples)] if watched else []
    interrupt = Interrupt()
    trainer = _Trainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        eval_dataset=eval_batches,
        callbacks=[Log(resumed=checkpoint is not None), interrupt, *watch, *callbacks],
    )
    trainer.batches, trainer.aggregate, trainer.loss_fn, trainer.stream_state = batches, aggregate, loss_fn, state
    if state is not None:
        trainer.add_callback(Images(state, every=images, trackers=trainer.callback_handler.callbacks))
    if checkpoint and state is not None:
        state.update(_stream_state(checkpoint, state))
    for shown, ours in ((ProgressCallback, Progress), (PrinterCallback, Print)):
        if trainer.pop_callback(shown):
            trainer.add_callback(ours)
    with interrupt:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.asked and trainer.state.global_step < trainer.state.max_steps:
        saved = get_last_checkpoint(args.output_dir)
        if process().is_main_process:
            print(
                f"\nStopped at step {result.global_step} and saved {saved}.\n"
                "Resume with the same command and --resume-from-checkpoint last",
                file=sys.stderr,
            )
        raise SystemExit(130)
    return result.metrics


class _Trainer(LossTrainer):
    """Feeds micro-batches of a stream to a loss function."""

    batches: Batches
    loss_fn: Callable[..., tuple[Tensor, Metrics]]
    stream_state: dict[str, Any] | None = None

    def loss(self, model: nn.Module, **inputs: Any) -> tuple[Tensor, Metrics, None]:
        return *check_loss(self.loss_fn(model, **inputs)), None

    def training_step(self, model: nn.Module, inputs: Batch, *rest: Any) -> Tensor:
        """The micro-batch in parts of `micro_tokens` tokens, as many on all processes; the last one synchronises."""
        tokens = getattr(self.args, "micro_tokens", None)
        if tokens is None:
            return super().training_step(model, inputs, *rest)
        parts = list(split_tokens(inputs, tokens))
        if self.accelerator.num_processes > 1:
            most = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device)).max().item()
            parts = list(split_tokens(inputs, tokens, least=int(most)))
        losses = []
        for i, part in enumerate(parts, 1):
            with self.accelerator.no_sync(model) if i < len(parts) else nullcontext():
                losses.append(super().training_step(model, part, *rest))
        return torch.stack(losses).sum()

    def get_train_dataloader(self) -> DataLoader:
        # not prepared by accelerate, which would pull the next batch before this step has changed the weights
        return DataLoader(_Steps(self), batch_size=None)

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], Any]:
        batches, items = super().get_batch_samples(*args)
        for batch in batches[:1]:
            check_columns(self.loss_fn, batch)
        return batches, items

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        batches = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        batches = self.eval_dataset if batches is None else batches
        return list(_from(batches, 0))

    def evaluation_loop(
        self, dataloader: list[Batch], description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        if not dataloader:
            raise ValueError("eval_batches is empty: give at least one batch")
        model = self.model
        if not self.accelerator._models:  # evaluated without being trained
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        if callable(getattr(self.optimizer, "eval", None)):  # schedule-free optimizers
            self.optimizer.eval()
        totals: Metrics = {}
        with torch.no_grad():
            for batch in self._weighted(dataloader, self._gather):
                for part in split(batch, self.args.per_device_eval_batch_size):
                    loss, metrics, _ = self.loss(model, **self._prepare_inputs(part))
                    add_metrics(totals, {**metrics, "loss": loss})
        totals = self.accelerator.reduce(totals, "sum")
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value.item() for name, value in totals.items()},
            num_samples=sum(len(next(iter(batch.values()))) for batch in dataloader),
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        prefix = f"{getattr(self.model, 'inside', '')}."
        inner = state_dict and {
            n.removeprefix(prefix): x for n, x in state_dict.items() if not n.startswith("value_head.")
        }
        self._inside(super()._save, output_dir, inner)
        save_value_head(self.model, folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._inside(super()._load_from_checkpoint, resume_from_checkpoint, model)
        load_value_head(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._inside(super()._load_best_model)
        load_value_head(self.model, self.state.best_model_checkpoint)

    def _inside(self, method: Callable[..., None], *args: Any) -> None:
        """Let the Trainer save and load a policy as the plain model inside it, whose name is the policy's `inside`."""
        outer = self.model
        self.model = getattr(outer, outer.inside) if hasattr(outer, "inside") else outer
        try:
            with without_bars():
                method(*args)
        finally:
            self.model = outer

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.stream_state is not None:
            torch.save(self.stream_state, _stream_file(output_dir))


class _Steps(IterableDataset):
    """The stream's step batches, with their weights, as micro-batches."""

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer
        args = trainer.args
        self.micro, self.parts = args.train_batch_size, args.gradient_accumulation_steps

    def __len__(self) -> int:
        return len(self.trainer.batches) * self.parts  # TypeError: a function has none, and max_steps must be set

    def __iter__(self) -> Iterator[Batch]:
        start = self.trainer.state.global_step
        if start >= self.trainer.state.max_steps:
            return  # a finished run, resumed
        if has_length(self):
            start %= len(self.trainer.batches)
        for _ in range(0 if self.trainer.args.ignore_data_skip else start * self.parts):
            yield {}  # the Trainer drops these to get to where it resumes
        stream = _from(self.trainer.batches, start)
        while True:
            with self.trainer.accelerator.autocast():  # a reference in the stream computes as the policy does
                batch = next(stream, None)
            if batch is None:
                return
            rows = len(next(iter(batch.values())))
            if rows != self.micro * self.parts:
                raise ValueError(
                    f"batches yielded {rows} rows, but a step has {self.micro * self.parts}: "
                    f"per_device_train_batch_size={self.micro} x gradient_accumulation_steps={self.parts}"
                )
            if "ids" in batch and batch["mask"][..., 0].any():
                raise ValueError("mask is True at position 0, which no token before it predicts; set it False there")
            yield from split(batch, self.micro)


def _from(batches: Batches, start: int) -> Iterator[Batch]:
    return iter(batches(start)) if callable(batches) else islice(iter(batches), start, None)


def _stream_file(folder: str) -> Path:
    return Path(folder) / f"stream_{process().process_index}.pt"


def _stream_state(checkpoint: str, state: dict[str, Any]) -> dict[str, Any]:
    """The state of the stream at a checkpoint; of classes it holds only those that the fresh `state` has."""
    file = _stream_file(checkpoint)
    if not file.is_file():
        raise ValueError(f"resume_from_checkpoint: {file} is missing, without which the stream cannot continue")
    leaves = tree_flatten(state, is_leaf=lambda x: type(x) is not dict)[0]
    with torch.serialization.safe_globals([type(x) for x in leaves]):
        return torch.load(file, map_location=process().device, weights_only=True)
