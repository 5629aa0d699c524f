"""Log-probs of answers, the losses on them by name, and the metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.logps import token_logps
from alignkit.losses.paired import kto_pair
from alignkit.losses.preference import dpo, hinge, ipo
from alignkit.masking import masked_mean
from alignkit.trl.trainer.dpo_reference import COLUMNS
from alignkit.types import Metrics
from alignkit.weights import weigh

KTO = ("kto", "kto_pair")
SIDES = ("chosen", "rejected")


def known(loss_type: str) -> str:
    """`loss_type`, if it is one."""
    if loss_type not in ("sigmoid", "hinge", "ipo", *KTO):
        raise ValueError(
            f"Unknown loss type: {loss_type}. Should be one of ['sigmoid', 'hinge', 'ipo', 'kto_pair'] (or 'kto')"
        )
    return loss_type


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Log-prob [B] of the labels [B, T] that are not `label_pad_token_id`, summed or averaged over a row.

    `logits` [B, T, V] predict the next label, those of an encoder-decoder the label in their own place. Raises
    ValueError if shapes differ.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batch and sequence length dim) and labels must have the same shape.")
    if is_encoder_decoder:
        logits, labels = pad(logits, (0, 0, 0, 1)), pad(labels, (1, 0), value=label_pad_token_id)
    mask = labels != label_pad_token_id
    mask = pad(mask[:, 1:], (1, 0))
    logps = token_logps(logits, labels, mask)
    return masked_mean(logps, mask, -1) if average_log_prob else logps.sum(-1)


def preference_losses(
    policy: Tensor,
    reference: Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    reference_free: bool = False,
    kl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses [B] (of KTO [2 B], chosen answers first) and rewards [B, 2] of the log-probs [B, 2] of pairs.

    Without a reference (`reference_free`) the margin is the policy's alone. `kl` [2] are KTO's reference points, by
    default those of this batch.
    """
    log_ratios = policy - reference
    gains = policy if reference_free else log_ratios
    margin = gains[:, 0] - gains[:, 1]
    rewards = beta * log_ratios.detach()
    if known(loss_type) in KTO:
        kl = log_ratios.mean(0) if kl is None else kl
        points = kl.detach().clamp(min=0).expand_as(log_ratios)
        return kto_pair(log_ratios, points, beta=beta).T.flatten(), rewards
    if loss_type == "sigmoid":
        return dpo(margin, beta=beta, smoothing=label_smoothing), rewards
    return (hinge if loss_type == "hinge" else ipo)(margin, beta=beta), rewards


def metrics(
    logps: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], batch: Any
) -> Metrics:
    """Means over pairs, and of the logits that predict an answer's tokens over these; (chosen, rejected) each."""
    weights = batch["weights"]
    chosen, rejected = rewards
    found = {
        "rewards/accuracies": weigh(chosen > rejected, weights),
        "rewards/margins": weigh(chosen - rejected, weights),
    }
    for i, side in enumerate(SIDES):
        tokens = batch[f"weights_{side}"]
        found[f"rewards/{side}"] = weigh(rewards[i], weights)
        found[f"logps/{side}"] = weigh(logps[i].detach(), weights)
        found[f"logits/{side}"] = weigh(logits[i].detach().mean(-1)[:, : tokens.shape[1]], tokens)
    return found


def logit_masks(batch: Mapping[str, Any], label_pad_token_id: int, is_encoder_decoder: bool) -> dict[str, Tensor]:
    """Where the logits stand that predict the answers' tokens."""
    masks = {}
    for side in SIDES:
        labels = batch.get(f"{side}_labels")
        if labels is None:
            raise ValueError(f"data_collator must make the column '{side}_labels'; there are {sorted(batch)}")
        masks[f"mask_{side}"] = (labels if is_encoder_decoder else labels[:, 1:]) != label_pad_token_id
    return masks | {"mask": masks["mask_chosen"]}


def forward(trainer: Any, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [B] of chosen and rejected answers, and the logits [B, T, V] of both, in one pass of the model."""
    labelled = trainer.label_pad_token_id
    inputs = trainer.concatenated_inputs(
        batch,
        is_encoder_decoder=trainer.is_encoder_decoder,
        label_pad_token_id=labelled,
        padding_value=trainer.padding_value,
        device=trainer.accelerator.device,
    )
    labels, decoder = inputs["concatenated_labels"], {}
    if trainer.is_encoder_decoder:  # which makes the decoder's ids of labels with -100, if there are none
        ids = inputs.get("concatenated_decoder_input_ids")
        decoder["labels"] = labels.masked_fill(labels == labelled, -100)
        decoder["decoder_input_ids"] = None if ids is None else ids.masked_fill(ids == labelled, trainer.padding_value)
    logits = model(
        input_ids=inputs["concatenated_input_ids"],
        attention_mask=inputs["concatenated_attention_mask"],
        use_cache=False,
        **decoder,
    ).logits[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens before them
    average = trainer.loss_type == "ipo"
    logps = trainer.get_batch_logps(logits, labels, average, labelled, trainer.is_encoder_decoder)
    pairs = len(batch["chosen_labels"])
    return logps[:pairs], logps[pairs:], logits[:pairs], logits[pairs:]


def with_kl(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of a step with KTO's reference points over all of them, on all processes."""
    batches = [trainer._prepare_inputs(batch) for batch in batches]
    total: Any = 0
    for batch in batches:
        batch |= zip(COLUMNS, reference_of(trainer, batch))
        with torch.no_grad():
            policy = trainer.concatenated_forward(trainer.model_wrapped, batch)[:2]
        ratios = [x - batch[name] for x, name in zip(policy, COLUMNS)]
        total = total + torch.stack([weigh(x, batch["weights"]) for x in ratios])
    kl = trainer.accelerator.reduce(total, "sum")
    return [{**batch, "kl": kl} for batch in batches]


def reference_of(trainer: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The log-probs under the reference that a batch has, or else computed."""
    if set(COLUMNS) <= set(batch):
        return batch[COLUMNS[0]], batch[COLUMNS[1]]
    return trainer.compute_reference_log_probs(batch)
