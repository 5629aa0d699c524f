"""Causal language models as policies: `policy(ids, mask) -> logps`."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from alignkit.heads import head_logps, row_logps, row_measures
from alignkit.hf.last_layer import last_layer
from alignkit.hf.loading import open_model, without_adapter, without_bars
from alignkit.hf.packing import Body
from alignkit.hf.processes import process
from alignkit.logps import entropy, token_logps
from alignkit.sampling import Sampling

VALUE_HEAD = "value_head.safetensors"


class Wrapper(nn.Module):
    """A Hugging Face model inside a module whose call is the whole computation: `policy(ids, mask)`.

    `policy.lm` is the Hugging Face model (a `PeftModel` if it has an adapter); attributes that a policy lacks are
    looked up there, so `policy.generate`, `policy.config` and the Trainer's calls reach it. `inside` is the attribute
    that checkpoints hold.
    """

    inside = "lm"
    main_input_name = "ids"

    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm
        self._body = Body(lm)

    def floating_point_ops(self, inputs: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """6 operations per token and parameter: forward and backward, as the Trainer counts them."""
        return 6 * inputs["ids"].numel() * self.lm.num_parameters(exclude_embeddings=exclude_embeddings)

    def _check_length(self, ids: Tensor) -> None:
        time, limit = ids.shape[-1], getattr(self.lm.config, "max_position_embeddings", None)
        if limit is not None and time > limit:
            raise ValueError(f"ids have {time} tokens, but the model {limit} positions; lower max_length")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "lm":
                raise
            return getattr(self.lm, name)


class Policy(Wrapper):
    """A causal language model whose call is the whole computation, head included: `policy(ids, mask) -> logps`.

    `policy.sampling` is how `hf.sample` draws from it, and so the distribution whose log-probs these are.
    """

    def __init__(self, lm: Any, sampling: Sampling | None = None):
        super().__init__(lm)
        self.sampling = sampling or Sampling()
        self._knows_head = last_layer(lm) is not None

    def forward(
        self, ids: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
    ) -> Float[Tensor, "*batch time"]:
        """Log-probs of the tokens where `mask` is True, 0 elsewhere; rows are right-padded.

        Rows are read without their padding, a prefix that several share once, and none behind its last True position,
        if the model's attention can (`packing.Body`). The head runs on the True positions alone, in chunks; logits
        that are more than `last_layer` knows (prompt tuning, an adapter on the head that is no plain LoRA) are
        computed in full instead.
        """
        (logps,) = self._run(ids, mask)
        return logps

    def measure(self, ids: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]) -> tuple[Tensor, ...]:
        """(log-probs, entropies in nats) in one pass; a policy with a value head adds its values."""
        return self._run(ids, mask, entropies=True)

    def _run(
        self, ids: Tensor, mask: Tensor, *, entropies: bool = False, values: nn.Module | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probs; if asked for entropies, and `values` of the hidden state before each token up to the last."""
        self._check_length(ids)
        time = ids.shape[-1]
        rows, counts = ids.reshape(-1, time), mask.reshape(-1, time)
        if not self._knows_head:
            out = self.lm(input_ids=rows, use_cache=False, output_hidden_states=values is not None)
            logits, options = out.logits[:, -time:], {"sampling": self.sampling}
            found = [token_logps(logits, rows, counts, **options)]
            found += [entropy(logits, counts, **options)] if entropies else []
            states = out.hidden_states[-1][:, -time:].flatten(0, 1) if values is not None else None
            places = torch.arange(rows.numel(), device=rows.device).view(rows.shape)
        elif torch._C._are_functorch_transforms_active():  # shapes must not depend on the mask here
            (states, places), head = self._body.padded(self.lm, rows), last_layer(self.lm)
            found = [head_logps(states.unflatten(0, rows.shape), head, rows, counts, sampling=self.sampling)]
        else:
            found, states, places = self._packed(rows, counts, entropies)
        if values is not None:
            each = values(states.to(values.weight.dtype))[:, 0]
            read = counts[:, 1:].flip(-1).cummax(-1).values.flip(-1)
            found.append(pad(torch.where(read, each[places[:, :-1]], 0), (1, 0)))
        return tuple(x.reshape(ids.shape) for x in found)

    def _packed(self, ids: Tensor, mask: Tensor, entropies: bool) -> tuple[list[Tensor], Tensor, Tensor]:
        counted = mask[:, 1:].cpu()  # what is read of a batch is decided on the host: one synchronisation
        lengths = (counted * torch.arange(1, ids.shape[1])).amax(-1).tolist() if ids.shape[1] > 1 else [0] * len(ids)
        states, places = self._body(self.lm, ids, lengths)
        row, time = (x.to(ids.device) for x in counted.nonzero(as_tuple=True))
        measure = row_measures if entropies else row_logps
        found = measure(states[places[row, time]], last_layer(self.lm), ids[row, time + 1], sampling=self.sampling)
        found = found if entropies else (found,)
        return [x.new_zeros(ids.shape).index_put((row, time + 1), x) for x in found], states, places


class ActorCritic(Policy):
    """A policy with a value head on its last hidden state: `actor(ids, mask) -> (logps, values)`.

    `values[..., t]` is V of the tokens before t; the head begins at 0.
    """

    def __init__(self, lm: Any, sampling: Sampling | None = None):
        super().__init__(lm, sampling)
        width = without_adapter(lm).get_output_embeddings().weight.shape[-1]
        self.value_head = nn.Linear(width, 1, device=lm.device, dtype=torch.promote_types(lm.dtype, torch.float32))
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, ids: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
    ) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
        """Log-probs as a policy's, and values up to the last True position, 0 at position 0 and behind."""
        return self._run(ids, mask, values=self.value_head)

    def measure(self, ids: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]) -> tuple[Tensor, ...]:
        """(log-probs, entropies in nats, values) in one pass."""
        return self._run(ids, mask, entropies=True, values=self.value_head)


class AdapterOff(nn.Module):
    """The policy with its adapter disabled: a reference without a copy of the weights."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    def forward(
        self, ids: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
    ) -> Float[Tensor, "*batch time"]:
        """Log-probs of the base model."""
        with self.policy.lm.disable_adapter():
            return Policy.forward(self.policy, ids, mask)


def causal_lm(
    model: str | Path,
    *,
    dtype: str = "float32",
    lora: int | PeftConfig | None = None,
    dropout: bool = False,
    value_head: bool = False,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> tuple[Policy, Any]:
    """A policy and its tokenizer from a folder, a hub id or `builtin:tiny`.

    A folder that holds only an adapter is merged into its base model. `dtype` is a torch dtype by name ("bfloat16"
    halves the memory; for mixed precision leave it and set `bf16` in the training arguments). `lora` adds an adapter
    to train: a rank (on all linear layers, alpha twice the rank) or any peft config. Dropout is off, so that a policy
    equals its reference before the first step, unless `dropout`. With `value_head` it is an `ActorCritic`, whose head
    is read from the folder if there is one. `sampling` is how answers are drawn from it, by default from the model's
    own distribution. `seed` draws what is new.
    """
    lm, tokenizer = open_model(model, dtype=dtype, lora=lora, dropout=dropout, seed=seed)
    if not value_head:
        return Policy(lm, sampling), tokenizer
    actor = ActorCritic(lm, sampling)
    load_value_head(actor, model)
    return actor, tokenizer


def frozen(policy: Policy) -> nn.Module:
    """What the policy is compared with: `ref(ids, mask) -> logps`.

    Of a policy with an adapter it is the base model, the same weights with the adapter disabled; of any other a copy as
    it is now, without a value head. For log-probs computed once, see `data.add_columns`.
    """
    if isinstance(policy.lm, PeftModel):
        return AdapterOff(policy)
    return Policy(copy.deepcopy(policy.lm), policy.sampling).requires_grad_(False).eval()


def save(policy: Wrapper, tokenizer: Any, folder: str | Path) -> None:
    """Write the model inside (or its adapter) and the tokenizer as a plain Hugging Face folder.

    A value head goes into a file of its own beside them. The main process writes, the others wait for it.
    """
    if process().is_main_process:
        with without_bars():
            policy.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_value_head(policy, folder)
    process().wait_for_everyone()


def save_value_head(policy: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the value head, if there is one, from the policy or from its whole `state`; main process only."""
    if isinstance(policy, ActorCritic) and process().is_main_process:
        state = policy.state_dict() if state is None else state
        head = {name: state[f"value_head.{name}"].contiguous() for name in ("weight", "bias")}
        save_file(head, Path(folder) / VALUE_HEAD)


def load_value_head(policy: nn.Module, folder: str | Path) -> None:
    """Read the value head of a folder that has one into a policy that has one."""
    file = Path(folder) / VALUE_HEAD
    if isinstance(policy, ActorCritic) and file.is_file():
        policy.value_head.load_state_dict(load_file(file, device=str(policy.device)))
