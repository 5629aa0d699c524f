"""Language models with one more head, and references."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import PushToHubMixin

from alignkit.hf.processes import process
from alignkit.train import evaluating
from alignkit.trl.models import checkpoints

LAYERS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
LAYER_PATTERNS = [f"{layers}.{{layer}}" for layers in LAYERS]
KBIT_ARGS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")


class PreTrainedModelWrapper(nn.Module, PushToHubMixin):
    """A language model with one more head; see the subclasses.

    `pretrained_model` is the Hugging Face model (a `PeftModel` if it has an adapter); public attributes that the
    wrapper lacks, such as `generate`, are looked up there. `push_to_hub` uploads what `save_pretrained` writes.
    """

    transformers_parent_class: Any = None
    supported_args: tuple[str, ...] = ()
    supported_modules = ("v_head",)
    supported_rm_modules = ("score",)
    supported_pretrained_model_architectures = (PreTrainedModel, PeftModel)

    def __init__(
        self,
        pretrained_model: Any,
        score_module: nn.Module | None = None,
        supports_rm_adapter: bool = False,
        rm_adapter_name: str | None = None,
    ):
        super().__init__()
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        if self.is_peft_model and isinstance(pretrained_model.active_peft_config, PromptLearningConfig):
            raise ValueError("PromptLearningConfig is not supported for PPO training.")
        devices = {str(device) for device in getattr(pretrained_model, "hf_device_map", {}).values()}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                "The model is offloaded on CPU or disk - CPU & disk offloading is not supported for ValueHead models."
            )
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.training = pretrained_model.training
        self.current_device = process().device
        self.is_loaded_in_8bit = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(pretrained_model, "is_loaded_in_4bit", False)
        self.is_sequential_parallel = len(devices) > 1
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = pretrained_model.active_adapter if self.is_peft_model else "default"
        if score_module is not None:
            self.score = score_module

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        peft_config: Any = None,
        reward_adapter: Any = None,
        reward_adapter_name: str = "reward_adapter",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> "PreTrainedModelWrapper":
        """Wrap a model object, or what a folder or hub id holds: a model, or an adapter (to train: `is_trainable`).

        The value head is the checkpoint's if it has one, else new; its arguments are named in `supported_args`.
        `peft_config` adds an adapter to train, and `reward_adapter` (a folder or hub id) one for
        `compute_reward_score`. All other arguments load the model, in float32 unless `dtype` says otherwise.
        """
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise ValueError(f"peft_config must be a peft.PeftConfig, but is a {type(peft_config).__name__}")
        head_kwargs = {key: kwargs.pop(key) for key in cls.supported_args if key in kwargs}
        kbit_kwargs = {key: kwargs.pop(key) for key in KBIT_ARGS if key in kwargs}
        lm, token = pretrained_model_name_or_path, kwargs.get("token")
        if isinstance(lm, str | Path):
            auto, name = cls.transformers_parent_class, str(lm)
            with checkpoints.reading("pretrained_model_name_or_path", name):
                lm, state = checkpoints.load(auto, name, is_trainable, *model_args, **kwargs)
        elif isinstance(lm, cls.supported_pretrained_model_architectures):
            state = lm.state_dict()
            if kwargs:
                warnings.warn(f"{sorted(kwargs)} have no effect on a model that is loaded already", stacklevel=2)
        else:
            raise ValueError(f"pretrained_model_name_or_path must be a string or a PreTrainedModel, but is {type(lm)}")
        lm = checkpoints.with_adapter(lm, peft_config, kbit_kwargs)
        if reward_adapter is not None:
            score = cls.add_and_load_reward_modeling_adapter(lm, reward_adapter, reward_adapter_name, token=token)
            head_kwargs |= {"score_module": score, "supports_rm_adapter": True, "rm_adapter_name": reward_adapter_name}
        model = cls(lm, **head_kwargs)
        model.post_init(state)
        return model

    def post_init(self, state_dict: dict[str, Tensor]) -> None:
        """Load the `v_head.*` of a state dict, if there are any, and put the head on the model's device."""
        head = {key.partition("v_head.")[2]: x for key, x in state_dict.items() if "v_head." in key}
        if head:
            self.v_head.load_state_dict(head)
        self.v_head.to(self.pretrained_model.device)

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls,
        pretrained_model: Any,
        adapter_model_id: Any,
        adapter_name: str = "reward_model_adapter",
        token: str | bool | None = None,
    ) -> nn.Linear:
        """Add the adapter of a reward model, frozen and not active, to a `PeftModel`; returns its score head."""
        if not isinstance(adapter_model_id, str):
            raise ValueError(f"reward_adapter must be the name of a folder or a hub id, but is {adapter_model_id!r}")
        if not isinstance(pretrained_model, PeftModel):
            raise ValueError("reward_adapter can only be used with a PeftModel.")
        with checkpoints.reading("reward_adapter", adapter_model_id):
            score = checkpoints.score_head(adapter_model_id, cls.supported_rm_modules, token=token)
        with evaluating(pretrained_model):
            pretrained_model.load_adapter(adapter_model_id, adapter_name, is_trainable=False, token=token)
        return score.to(pretrained_model.device, pretrained_model.dtype)

    @torch.no_grad()
    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Scores [B, T, labels] by the reward adapter and its head, in eval mode; then the policy's is active again.

        Raises ValueError without a `reward_adapter`.
        """
        if not self.supports_rm_adapter:
            raise ValueError("This model does not support reward modeling adapter.")
        lm, own = self.pretrained_model, self.policy_adapter_name
        frozen = lm.peft_config[own].inference_mode
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        try:
            lm.set_adapter(self.rm_adapter_name, inference_mode=True)
            with evaluating(lm):
                out = lm(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            return self.score(out[self.hidden_states][-1])
        finally:
            lm.set_adapter(own, inference_mode=frozen)

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The wrapped model's, under its own names (nothing of it if it has an adapter), and `v_head.*`."""
        state = {} if destination is None else destination
        if not self.is_peft_model:
            self.pretrained_model.state_dict(destination=state, prefix=prefix, keep_vars=keep_vars)
        self.v_head.state_dict(destination=state, prefix=f"{prefix}v_head.", keep_vars=keep_vars)
        return state

    def save_pretrained(self, save_directory: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Write a folder for `from_pretrained`, which transformers reads too: the model, `v_head.*` among its weights.

        Of a model with an adapter: the adapter, and `v_head.*` in pytorch_model.bin.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        own = {} if self.is_peft_model else {"state_dict": state_dict}
        self.pretrained_model.save_pretrained(save_directory, **own, **kwargs)
        if self.is_peft_model and kwargs.get("is_main_process", True):
            torch.save(state_dict, Path(save_directory) / "pytorch_model.bin")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model" or name.startswith("_"):  # marks such as hooks belong to one module
                raise
            return getattr(self.pretrained_model, name)


def create_reference_model(model: Any, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """A frozen copy of a model, in eval mode.

    With `num_shared_layers` = k, all parameters that come before those of layer k are the very same tensors in both
    models, hence frozen in `model` too. `pattern` names a layer's parameters, such as "transformer.h.{layer}"; without
    it those in `LAYER_PATTERNS` are tried. Raises ValueError if no parameter matches, and under DeepSpeed ZeRO-3.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("create_reference_model cannot copy a model split by DeepSpeed ZeRO-3: load a second one")
    shared = [] if num_shared_layers is None else _before_layer(model, num_shared_layers, pattern)
    reference = copy.deepcopy(model, {id(parameter): parameter.requires_grad_(False) for parameter in shared})
    return reference.requires_grad_(False).eval()


def _before_layer(model: Any, layer: int, pattern: str | None) -> list[nn.Parameter]:
    names, parameters = zip(*model.named_parameters())
    for candidate in LAYER_PATTERNS if pattern is None else [pattern]:
        for first, name in enumerate(names):
            if candidate.format(layer=layer) in name:
                return list(parameters[:first])
    raise ValueError(f"Layer pattern could not be matched. num_shared_layers={layer}, pattern={pattern!r}")
