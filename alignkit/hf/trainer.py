"""The one subclass of `transformers.Trainer`: its loss is a function of a batch's columns and of weights.

The weights are computed on the masks of the whole optimizer step, all micro-batches on all processes, so losses and
metrics of the parts add up to those of the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from alignkit.train import add_metrics, weighted
from alignkit.types import Aggregates, Batch, Metrics
from alignkit.weights import row_mean


class LossTrainer(Trainer):
    """A `Trainer` whose subclasses say what the loss is, which positions count and how these are weighed.

    `loss(model, **inputs)` gets the collator's columns and those that `aggregate` makes of `masks(inputs)`, and returns
    the loss, a dict of metrics and the model's outputs. Sums over micro-batches and processes are the loss and the
    metrics of the step; in evaluation each batch has weights of its own, and metrics are means over rows.
    """

    aggregate: Aggregates = staticmethod(row_mean)
    loss_is_scaled_for_ga = True

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, **options: Any):
        args = TrainingArguments("tmp_trainer") if args is None else args
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; more are for `accelerate launch`
        options.setdefault("compute_loss_func", self.loss)  # without one, older Trainers would divide the loss
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model=model, args=args, **options)
        if use_cache is not None:
            self.model.config.use_cache = use_cache  # the Trainer turns it off, and would save it so
        self._train_totals: Metrics = {}
        self._eval_totals: Metrics = {}
        self._steps_to_log = 0

    def loss(self, model: nn.Module, **inputs: Any) -> tuple[Tensor, Metrics, Any]:
        """The loss of a micro-batch, its metrics, and the model's outputs."""
        raise NotImplementedError

    def masks(self, inputs: Mapping[str, Any]) -> Batch:
        """The mask columns that `aggregate` reads; by default those of the batch itself."""
        return inputs

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of a step, with their weights."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps_to_log += bool(batches)
        return self._weighted(batches, self._gather) if batches else batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch, and the model's outputs if asked for; its metrics join those of the step."""
        if not set(self._names) <= set(inputs):
            (inputs,) = self._weighted([inputs])
        rows = len(inputs[self._names[0]])
        real = rows if model.training else self._real_rows(rows)
        if real < rows:
            inputs = {**inputs, **{name: _without_rest(inputs[name], real) for name in self._names}}
        loss, metrics, outputs = self.loss(model, **inputs)
        if model.training:
            add_metrics(self._train_totals, {**metrics, "loss": loss})
            loss = loss * self.accelerator.num_processes  # undoes the average of gradients over processes
        else:
            add_metrics(self._eval_totals, {name: x.detach() * real for name, x in metrics.items()})
            add_metrics(self._eval_totals, {"": loss.new_tensor(float(real))})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log."""
        if "loss" in logs:
            steps, self._steps_to_log = max(self._steps_to_log, 1), 0
            totals, self._train_totals = self.accelerator.reduce(self._train_totals, "sum"), {}
            logs |= {name: value.item() / steps for name, value in totals.items()}
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's, with the loss's metrics among those it returns."""
        self._eval_totals = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        totals, self._eval_totals = self.accelerator.reduce(self._eval_totals, "sum"), {}
        rows = totals.pop("", torch.ones(()))
        means = {f"{metric_key_prefix}_{name}": (x / rows).item() for name, x in totals.items()}
        return output._replace(metrics=means | output.metrics)

    @property
    def _names(self) -> list[str]:
        return list(self.aggregate) if isinstance(self.aggregate, dict) else ["weights"]

    def _weighted(self, batches: Sequence[Mapping[str, Any]], *gather: Any) -> list[dict[str, Any]]:
        made = weighted([self.masks(batch) for batch in batches], self.aggregate, *gather)
        return [dict(batch) | {name: new[name] for name in self._names} for batch, new in zip(batches, made)]

    def _real_rows(self, rows: int) -> int:
        """How many rows of a batch are not the repetitions that give each process as many rows as the others."""
        state, index = self.accelerator.gradient_state, self.accelerator.process_index
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(int(state.remainder) - int(index) * rows, 0), rows)

    def _gather(self, masks: list[Tensor]) -> tuple[list[list[Tensor]], int]:
        if self.accelerator.num_processes == 1:
            return [masks], 0
        return gather_object([[mask.cpu() for mask in masks]]), self.accelerator.process_index

    def _prepare_input(self, data: Any) -> Any:
        if not isinstance(data, Tensor):
            return super()._prepare_input(data)
        # DeepSpeed's casts, which the Trainer's own does, would round weights and log-probs to half precision
        no_float64 = data.dtype == torch.float64 and self.args.device.type == "mps"
        return data.to(self.args.device, torch.float32 if no_float64 else data.dtype)


def _without_rest(weights: Tensor, rows: int) -> Tensor:
    """The weights of the first rows, with the sum of all."""
    kept = weights.clone()
    kept[rows:] = 0
    return kept * (weights.sum() / kept.sum().clamp(min=torch.finfo(kept.dtype).tiny))
