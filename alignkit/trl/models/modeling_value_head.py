"""Language models with a value head: what an actor-critic trains."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from alignkit.masking import promote
from alignkit.trl.models.modeling_base import PreTrainedModelWrapper


class ValueHead(nn.Module):
    """Dropout and a linear layer: hidden states [..., D] -> values [..., 1], in the dtype of the layer (float32).

    D is the width of the decoder's last hidden state. The dropout's probability is `config.summary_dropout_prob` if
    the config has one, else the argument.
    """

    def __init__(self, config: Any, summary_dropout_prob: float = 0.1):
        super().__init__()
        self.dropout = nn.Dropout(getattr(config, "summary_dropout_prob", summary_dropout_prob))
        decoder = getattr(config, "decoder", None) or getattr(config, "text_config", None) or config
        self.summary = nn.Linear(getattr(config, "word_embed_proj_dim", decoder.hidden_size), 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Values of states that may be in another dtype and on another device."""
        return self.summary(self.dropout(hidden_states).to(self.summary.weight))


class _WithValueHead(PreTrainedModelWrapper):
    """The forward pass that both kinds share; `hidden_states` names the decoder's in the model's output."""

    hidden_states: str
    supported_args = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")

    def __init__(
        self,
        pretrained_model: Any,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(pretrained_model, **kwargs)
        if not any(head in name for name, _ in pretrained_model.named_modules() for head in self.lm_head_namings):
            raise ValueError("The model does not have a language model head, please use a model that has one.")
        self.v_head = ValueHead(self.config, summary_dropout_prob).train(self.training)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ValueError(f"v_head_init_strategy={v_head_init_strategy!r} must be None or 'normal'")

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(logits [B, T, V] in at least float32, loss or None, values [B, T]), and the cache if it is asked for.

        `labels` make the loss; they and all other arguments go to the wrapped model.
        """
        out = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **{"use_cache": return_past_key_values or past_key_values is not None}
            | kwargs
            | {"output_hidden_states": True, "return_dict": True},
        )
        values = self.v_head(out[self.hidden_states][-1]).squeeze(-1).to(out.logits.device)
        cache = (out.past_key_values,) if return_past_key_values else ()
        return promote(out.logits), out.loss, values, *cache


class AutoModelForCausalLMWithValueHead(_WithValueHead):
    """A decoder-only language model with a value head."""

    transformers_parent_class = AutoModelForCausalLM
    lm_head_namings = ("lm_head", "embed_out")
    hidden_states = "hidden_states"


class AutoModelForSeq2SeqLMWithValueHead(_WithValueHead):
    """An encoder-decoder with a value head on the decoder."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    lm_head_namings = ("lm_head", "embed_out", "output_projection")
    hidden_states = "decoder_hidden_states"
    is_encoder_decoder = True
