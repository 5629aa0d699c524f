"""The training arguments of transformers 4.37, which the release documents, on those of today."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

Fields = Mapping[str, Any]


class Gone(NamedTuple):
    """An argument that nothing can act on any more; the `harmless` values ask for what happens anyway."""

    why: str
    harmless: tuple[Any, ...] = ()


def _key(name: str, key: str) -> Callable[[Any, Fields], dict[str, Any]]:
    def becomes(value: Any, given: Fields) -> dict[str, Any]:
        others = given.get(name) or {}
        others = asdict(others) if is_dataclass(others) else others
        if not isinstance(others, dict):
            raise ValueError(f"{name}={others!r} is not a dict: set {key!r} there, not by an argument of its own")
        return {name: {**others, key: value}}

    return becomes


def _set(name: str, value: Any) -> Callable[[Any, Fields], dict[str, Any]]:
    return lambda _, given: {name: value}


def _warmup(ratio: Any, given: Fields) -> dict[str, Any]:
    if not 0 <= ratio < 1:
        raise ValueError(f"warmup_ratio={ratio} must be at least 0 and below 1")
    return {"warmup_steps": ratio}


def _hub_id(_: Any, given: Fields) -> dict[str, Any]:
    name = given.get("push_to_hub_model_id") or Path(given["output_dir"]).name
    organization = given.get("push_to_hub_organization")
    return {"hub_model_id": f"{organization}/{name}" if organization else name}


def _debug(_: Any, given: Fields) -> dict[str, Any]:
    debug = given.get("debug") or []
    debug = debug.split() if isinstance(debug, str) else debug
    return {"debug": [*{*map(DebugOption, debug), DebugOption.TPU_METRICS_DEBUG}]}


def _inputs(_: Any, given: Fields) -> dict[str, Any]:
    return {"include_for_metrics": [*{*given.get("include_for_metrics", []), "inputs"}]}


_AUTOCAST = Gone("mixed precision is PyTorch's autocast", ("cuda_amp", "cpu_amp"))
BECAME: dict[str, str | Gone | Callable[[Any, Fields], dict[str, Any]]] = {
    "overwrite_output_dir": lambda _, given: {},  # for scripts to read: no Trainer ever did
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": _warmup,
    "logging_dir": lambda _, given: {},  # see `__post_init__`
    "save_safetensors": Gone("weights are always saved as safetensors"),
    "no_cuda": "use_cpu",
    "use_mps_device": Gone("MPS is used wherever there is one"),
    "jit_mode_eval": Gone("the Trainer does not trace models; see torch_compile"),
    "use_ipex": Gone("PyTorch itself does what Intel's extension did"),
    "fp16_opt_level": Gone("Apex is not supported"),
    "half_precision_backend": _AUTOCAST,
    "fp16_backend": _AUTOCAST,
    "tpu_num_cores": Gone("the launcher sets it"),
    "tpu_metrics_debug": _debug,
    "past_index": Gone("the Trainer does not carry a model's past from batch to batch"),
    "fsdp_min_num_params": _key("fsdp_config", "min_num_params"),
    "fsdp_transformer_layer_cls_to_wrap": _key("fsdp_config", "transformer_layer_cls_to_wrap"),
    "adafactor": _set("optim", "adafactor"),
    "group_by_length": _set("train_sampling_strategy", "group_by_length"),
    "use_legacy_prediction_loop": Gone("there is one evaluation loop"),
    "include_inputs_for_metrics": _inputs,
    "push_to_hub_model_id": _hub_id,
    "push_to_hub_organization": _hub_id,
    "push_to_hub_token": "hub_token",
    "mp_parameters": Gone("the Trainer does not know SageMaker's model parallelism"),
    "torchdynamo": "torch_compile_backend",
    "ray_scope": Gone("it is an argument of trainer.hyperparameter_search"),
    "dispatch_batches": _key("accelerator_config", "dispatch_batches"),
    "split_batches": _key("accelerator_config", "split_batches"),
    "include_tokens_per_second": _set("include_num_input_tokens_seen", "all"),
}
"""What became of an argument: its name today, or a function of its value and all arguments to those it sets."""

_TWINS = {"evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
    _CHECKPOINTING = {f"gradient_checkpointing{x}": f"activation_checkpointing{x}" for x in ("", "_kwargs")}
else:  # transformers before 5.19
    _CHECKPOINTING = {}
_TWINS |= _CHECKPOINTING
_BOTH_WAYS = _TWINS | {new: old for old, new in _TWINS.items()}


def modernise(given: Fields) -> dict[str, Any]:
    """Arguments by the names of 4.37, as `TrainingArguments(**modernise(given))` takes them today.

    Raises ValueError for a value that nothing can act on any more, and if today's argument is there with another one.
    """
    defaults = {f.name: f.default for f in fields(ReleaseArguments)}
    today = {name: value for name, value in given.items() if name not in BECAME}
    for name, became in BECAME.items():
        value = given.get(name, defaults[name])
        if value == defaults[name]:
            continue
        if isinstance(became, Gone):
            if value not in became.harmless:
                raise ValueError(f"{name}={value!r} can have no effect any more, leave it out: {became.why}")
            continue
        new = {became: value} if isinstance(became, str) else became(value, {**given, **today})
        for key, x in new.items():
            if key in today and today[key] not in (x, defaults[key], None) and not isinstance(x, dict | list):
                raise ValueError(f"{name}={value!r} means {key}={x!r}, but {key} is {today[key]!r}: give one of them")
        today |= new
    return today


@dataclass
class ReleaseArguments(TrainingArguments):
    """`TrainingArguments` with every name and default of transformers 4.37, besides those of today.

    An old name does what today's does, also if it is set later; see `modernise`. `report_to=None` means all trackers
    that are installed, and `logging_dir` sets TENSORBOARD_LOGGING_DIR, where TensorBoard's callback looks today.
    """

    accelerator_config: dict | str | AcceleratorConfig | None = None  # the last is what it becomes
    fsdp: str | None = field(default="", metadata=TrainingArguments.__dataclass_fields__["fsdp"].metadata)
    hub_private_repo: bool | None = False
    include_num_input_tokens_seen: str | bool = False
    lr_scheduler_kwargs: dict | str | None = field(default_factory=dict)
    optim: str = "adamw_torch"
    debug: None | str | list[DebugOption] = ""  # noqa: RUF036
    report_to: None | str | list[str] = None  # noqa: RUF036  (HfArgumentParser takes the second)

    overwrite_output_dir: bool = False
    evaluation_strategy: str = "no"
    per_gpu_train_batch_size: int | None = None
    per_gpu_eval_batch_size: int | None = None
    warmup_ratio: float = 0.0
    logging_dir: str | None = None
    save_safetensors: bool | None = True
    no_cuda: bool = False
    use_mps_device: bool = False
    jit_mode_eval: bool = False
    use_ipex: bool = False
    fp16_opt_level: str = "O1"
    half_precision_backend: str = "auto"
    fp16_backend: str = "auto"
    tpu_num_cores: int | None = None
    tpu_metrics_debug: bool = False
    past_index: int = -1
    fsdp_min_num_params: int = 0
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    adafactor: bool = False
    group_by_length: bool = False
    use_legacy_prediction_loop: bool = False
    include_inputs_for_metrics: bool = False
    push_to_hub_model_id: str | None = None
    push_to_hub_organization: str | None = None
    push_to_hub_token: str | None = None
    mp_parameters: str = ""
    torchdynamo: str | None = None
    ray_scope: str | None = "last"
    dispatch_batches: bool | None = None
    split_batches: bool | None = False
    include_tokens_per_second: bool | None = False

    def __post_init__(self) -> None:
        for name, value in modernise({f.name: getattr(self, f.name) for f in fields(self)}).items():
            setattr(self, name, value)
        for old, new in _CHECKPOINTING.items():
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        self.report_to = "all" if self.report_to is None else self.report_to
        super().__post_init__()
        for old, new in _TWINS.items():
            setattr(self, old, getattr(self, new))
        self._built = True

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _BOTH_WAYS and "_built" in self.__dict__:
            super().__setattr__(_BOTH_WAYS[name], value)
