"""What `PPOTrainer` gives to its models, and what it reads from them.

Positions are shifted by one: t of [B, T - 1] is about token t + 1, of which the model's output at t is the prediction.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit.logps import token_logps
from alignkit.trl.trainer.checks import check_padding


def check_batch(
    trainer: Any, batch_size: int | None, queries: Any, responses: Any, scores: Any, masks: Any = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
    """The columns of a batch on the trainer's device, the scores without axes of one entry.

    Raises ValueError unless each is a list of `batch_size` tensors, and these are of the right shapes.
    """
    columns = {"queries": queries, "responses": responses, "scores": scores}
    columns |= {} if masks is None else {"response_masks": masks}
    for name, column in columns.items():
        _check_column(name, column, batch_size)
    for score in columns["scores"]:
        if score.dim() > 1:
            raise ValueError(f"Scores must be 1-dimensional - got {score.dim()} for {score}")
    for name in ("queries", "responses"):
        for i, ids in enumerate(columns[name]):
            if ids.dim() != 1:
                raise ValueError(f"{name}[{i}] must be token ids of one dimension, not of shape {tuple(ids.shape)}")
    for i, mask in enumerate(columns.get("response_masks", [])):
        got, wanted = tuple(mask.shape), tuple(columns["responses"][i].shape)
        if got != wanted:
            raise ValueError(f"response_masks[{i}] must have the shape {wanted} of its response, not {got}")
    queries, responses, scores, *rest = ([x.to(trainer.current_device) for x in column] for column in columns.values())
    return queries, responses, [score.squeeze() for score in scores], rest[0] if rest else None


def _check_column(name: str, column: Any, batch_size: int | None) -> None:
    if not isinstance(column, list):
        raise ValueError(f"{name} must be a list of tensors - got {type(column)}")
    for x in column:
        if not isinstance(x, Tensor):
            raise ValueError(f"Elements in {name} must be tensors - got {type(x)}")
    if batch_size is not None and len(column) != batch_size:
        raise ValueError(
            f"Batch size ({batch_size}) does not match number of examples - but got {len(column)} for: {name}"
        )


def stack_scores(scores: Sequence[Tensor]) -> Tensor:
    """The scores as one tensor [B]. Raises ValueError if a response has several, or one that is not finite."""
    for i, score in enumerate(scores):
        if score.dim():
            raise ValueError(f"scores[{i}] must be one number, not of shape {tuple(score.shape)}")
    stacked = torch.stack([score.float() for score in scores])
    for i in (~stacked.isfinite()).nonzero()[:1].flatten().tolist():
        raise ValueError(f"scores[{i}] is {stacked[i]:g}: a step on it would make every parameter nan")
    return stacked


def prepare_model_inputs(trainer: Any, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> dict[str, Tensor]:
    """Padded ids and attention masks, as the model takes them: of both together, or of encoder and decoder."""

    check_padding(trainer.tokenizer)

    def pad(rows: Sequence[Tensor], prefix: str = "") -> dict[str, Tensor]:
        columns = trainer.data_collator([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
        return {prefix + name: columns[name].to(trainer.current_device) for name in ("input_ids", "attention_mask")}

    if trainer.is_encoder_decoder:
        return pad(queries) | pad(responses, "decoder_")
    return pad([torch.cat(pair) for pair in zip(queries, responses)])


def pad_across_processes(trainer: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, as wide as those of the widest process, so that statistics per token can be gathered."""
    fill = {name: trainer.tokenizer.pad_token_id if name.endswith("input_ids") else 0 for name in inputs}
    options = {"dim": 1, "pad_first": trainer.tokenizer.padding_side == "left"}
    pad = trainer.accelerator.pad_across_processes
    return {name: pad(x, pad_index=fill[name], **options) for name, x in inputs.items()}


def without_dropout(model: Any) -> None:
    """Eval mode, for training too, so that the first ratio is exactly 1; but layers checkpoint in train mode alone.

    So these are in train mode if they do so, and the model has no dropout; if it has, there is a warning.
    """
    model.eval()
    layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer) and x.gradient_checkpointing]
    if not layers:
        return
    rates = _language_model(model).config.get_text_config().to_dict().items()
    unused = ("summary", "classifier")  # those of other heads
    dropout = {name: rate for name, rate in rates if "drop" in name and rate and not name.startswith(unused)}
    if dropout:
        warnings.warn(
            f"gradient checkpointing is not used: it needs train mode, in which {dropout} would change the policy that "
            "is trained; load the model with all of these 0",
            stacklevel=4,
        )
        return
    for layer in layers:
        layer.training = True


def forward(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [B, T - 1] of the tokens after the first, and the logits and values that come before each of them.

    With padding on the left positions count from the first token, so that the side makes no difference.
    """
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    arguments: dict[str, Any] = dict(inputs)
    takes_positions = "position_ids" in inspect.signature(_language_model(model).forward).parameters
    if takes_positions and "decoder_input_ids" not in inputs:
        arguments["position_ids"] = (_time(ids) - _first(inputs["attention_mask"])).clamp(min=0)
    logits, _, values = model(**arguments)
    logprobs = token_logps(logits, ids, torch.ones_like(ids, dtype=torch.bool))
    return logprobs[:, 1:], logits[:, :-1], values[:, :-1]


def response_mask(
    inputs: Mapping[str, Tensor],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """1 [B, T - 1] where the predicted token belongs to the response, and counts by `response_masks`, else 0.

    Of an encoder-decoder's response the first two tokens, that which starts the decoder and the next, do not count.
    """
    is_encoder_decoder = "decoder_attention_mask" in inputs
    attention = inputs["decoder_attention_mask" if is_encoder_decoder else "attention_mask"]
    before = torch.tensor([[0 if is_encoder_decoder else len(query)] for query in queries], device=attention.device)
    size = torch.tensor([[len(response)] for response in responses], device=attention.device)
    place = _time(attention[:, 1:]) + 1 - _first(attention) - before  # of the predicted token in the response
    mask = (place >= 2 * is_encoder_decoder) & (place < size) & attention[:, 1:].bool()
    if response_masks is not None:
        counted = pad_sequence(list(response_masks), batch_first=True).to(attention.device).bool()
        mask &= counted.gather(1, place.clamp(0, counted.shape[1] - 1))
    return mask.to(attention.dtype)


def _language_model(model: Any) -> Any:
    lm = extract_model_from_parallel(model).pretrained_model
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def _first(attention_mask: Tensor) -> Tensor:
    """Index [B, 1] of each row's first token."""
    return attention_mask.int().argmax(1, keepdim=True)


def _time(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)
