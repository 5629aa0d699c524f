"""Reward models: `scorer(ids, mask) -> rewards`, one number for each sequence."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from alignkit.hf.loading import open_model, without_adapter
from alignkit.hf.models import Wrapper
from alignkit.masking import last_index
from alignkit.train import evaluating


class Scorer(Wrapper):
    """A sequence classification model of one label whose call is the reward of each sequence.

    Raises ValueError for a model whose logit is not its layer `score` on the last hidden state.
    """

    def __init__(self, lm: Any):
        super().__init__(lm)
        if not self._is_linear():
            raise ValueError(f"{type(lm).__name__} does more than a linear layer `score` on its last hidden state")

    def forward(self, ids: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
        """The head on the last True position of `mask`, and 0 where there is none; rows are right-padded.

        What stands behind that position is invisible, whatever its ids.
        """
        self._check_length(ids)
        rows, last = ids.reshape(-1, ids.shape[-1]), last_index(mask)
        if torch._C._are_functorch_transforms_active():  # shapes must not depend on the mask here
            hidden, places = self._body.padded(self.lm, rows)
        else:
            hidden, places = self._body(self.lm, rows, (last.flatten() + 1).tolist())
        at_last = hidden[places.gather(1, last.clamp(min=0).reshape(-1, 1)).flatten()]
        return torch.where(last < 0, 0, without_adapter(self.lm).score(at_last).reshape(last.shape))

    @torch.no_grad()
    def _is_linear(self) -> bool:
        """Whether the model's own logit is the same on a few tokens."""
        model = without_adapter(self.lm)
        if not hasattr(model, "score"):
            return False
        ids = torch.full((1, 4), 2 if model.config.pad_token_id == 3 else 3, device=model.device)
        with evaluating(self):
            logits = self.lm(input_ids=ids, use_cache=False).logits
            own = self(ids, torch.ones_like(ids, dtype=torch.bool))
        return logits.shape == (1, 1) and torch.allclose(own, logits[:, 0], rtol=1e-2, atol=1e-2)


def reward_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    lora: int | PeftConfig | None = None,
    seed: int = 0,
    dropout: bool = False,
) -> tuple[Scorer, Any]:
    """A reward model and its tokenizer; the arguments are those of `causal_lm`.

    A causal language model gets a new head, drawn by `seed` from N(0, 1 / (d + 1)), d the width; a folder that holds a
    reward model is read with its own. `hf.save` writes a sequence classification model that scores the same in
    transformers, which finds the end of a sequence by its padding: a tokenizer without a padding token, or with that
    of the end of a sequence, gets the new token "<|pad|>".
    """
    finish = partial(_classifier, seed=seed)
    lm, tokenizer = open_model(
        model, dtype=dtype, lora=lora, dropout=dropout, seed=seed, task_type="SEQ_CLS", finish=finish
    )
    return Scorer(lm), tokenizer


def _classifier(lm: Any, tokenizer: Any, *, seed: int) -> Any:
    """A sequence classification model of one label: `lm` if it is one, or else its body with a new head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "ForSequenceClassification" not in type(lm).__name__:
            lm = _new_head(lm)
        if lm.config.num_labels != 1:
            raise ValueError(f"the model has num_labels={lm.config.num_labels}, but a reward is one number")
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
                lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lm.config.pad_token_id = tokenizer.pad_token_id
    return lm


def _new_head(lm: Any) -> Any:
    lm.config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(lm.config)
    setattr(model, model.base_model_prefix, lm.base_model)
    width = model.score.in_features
    model.score = nn.Linear(width, 1, bias=False, dtype=lm.dtype)
    nn.init.normal_(model.score.weight, std=(width + 1) ** -0.5)
    return model
