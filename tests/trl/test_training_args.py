"""The arguments of transformers 4.37, on those of today."""

import copy
import dataclasses
import inspect
import pickle
import warnings

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.debug_utils import DebugOption

from alignkit.trl.trainer.reward_config import RewardConfig
from alignkit.trl.trainer.training_args import BECAME, Gone, ReleaseArguments, modernise

NONE = {"report_to": "none", "use_cpu": True}
# the page's arguments and defaults; of those that are not here the default is today's too
DEFAULTS = {
    "overwrite_output_dir": False,
    "evaluation_strategy": "no",
    "per_gpu_train_batch_size": None,
    "per_gpu_eval_batch_size": None,
    "lr_scheduler_kwargs": {},
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "logging_dir": None,
    "save_safetensors": True,
    "no_cuda": False,
    "use_cpu": False,
    "use_mps_device": False,
    "jit_mode_eval": False,
    "use_ipex": False,
    "fp16_opt_level": "O1",
    "half_precision_backend": "auto",
    "tpu_num_cores": None,
    "tpu_metrics_debug": False,
    "past_index": -1,
    "fsdp": "",
    "fsdp_min_num_params": 0,
    "fsdp_transformer_layer_cls_to_wrap": None,
    "optim": "adamw_torch",
    "adafactor": False,
    "group_by_length": False,
    "report_to": None,
    "use_legacy_prediction_loop": False,
    "hub_private_repo": False,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": None,
    "include_inputs_for_metrics": False,
    "fp16_backend": "auto",
    "push_to_hub_model_id": None,
    "push_to_hub_organization": None,
    "push_to_hub_token": None,
    "mp_parameters": "",
    "torchdynamo": None,
    "ray_scope": "last",
    "dispatch_batches": None,
    "split_batches": False,
    "include_tokens_per_second": False,
    "include_num_input_tokens_seen": False,
    "max_length": None,
}
THE_SAME = """
    output_dir do_train do_eval do_predict prediction_loss_only per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps eval_delay learning_rate
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type
    log_level log_level_replica log_on_each_node logging_strategy logging_first_step logging_steps
    logging_nan_inf_filter save_strategy save_steps save_total_limit save_on_each_node save_only_model seed
    data_seed bf16 fp16 bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend debug dataloader_drop_last
    eval_steps dataloader_num_workers run_name disable_tqdm remove_unused_columns label_names
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip fsdp_config deepspeed
    label_smoothing_factor optim_args length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics push_to_hub
    resume_from_checkpoint hub_model_id hub_strategy hub_token hub_always_push auto_find_batch_size
    full_determinism ddp_timeout torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha
""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def default(name, cls=RewardConfig):
    field = cls.__dataclass_fields__[name]
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def test_every_argument_of_the_page_with_its_default():
    assert len({*DEFAULTS, *THE_SAME}) == 119
    for name, value in DEFAULTS.items():
        assert default(name) == value, name
    for name in THE_SAME:
        assert name == "output_dir" or default(name) == default(name, TrainingArguments), name
    assert next(iter(inspect.signature(RewardConfig).parameters)) == "output_dir"
    assert set(TrainingArguments.__dataclass_fields__) <= set(RewardConfig.__dataclass_fields__)


def test_nothing_warns_and_old_names_read_as_they_were_set():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = RewardConfig("out", **NONE)
    for name, value in DEFAULTS.items():
        if name not in ("use_cpu", "no_cuda", "report_to", "include_num_input_tokens_seen"):
            assert getattr(args, name) == value, name
    assert args.no_cuda is args.use_cpu is True
    assert args.gradient_checkpointing is True
    assert default("gradient_checkpointing", ReleaseArguments) in (None, False)


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"per_gpu_eval_batch_size": 3}, {"per_device_eval_batch_size": 3}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"tpu_metrics_debug": True}, {"debug": [DebugOption.TPU_METRICS_DEBUG]}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
        ({"include_inputs_for_metrics": True, "include_for_metrics": ["inputs"]}, {"include_for_metrics": ["inputs"]}),
        ({"push_to_hub_model_id": "m"}, {"hub_model_id": "m"}),
        ({"push_to_hub_model_id": "m", "push_to_hub_organization": "o"}, {"hub_model_id": "o/m"}),
        ({"push_to_hub_organization": "o"}, {"hub_model_id": "o/out"}),
        ({"push_to_hub_token": "t"}, {"hub_token": "t"}),
        ({"torchdynamo": "eager"}, {"torch_compile_backend": "eager", "torch_compile": True}),
        ({"include_tokens_per_second": True}, {"include_num_input_tokens_seen": "all"}),
        ({"overwrite_output_dir": True}, {}),
        ({"half_precision_backend": "cuda_amp"}, {}),
        ({"fp16_backend": "cpu_amp"}, {}),
    ],
)
def test_old_names_do_what_todays_do(old, today):
    args = RewardConfig("some/out", **NONE, **old)
    for name, value in today.items():
        assert getattr(args, name) == value
    for name, value in old.items():
        assert getattr(args, name) == value
    again = dataclasses.replace(args, max_length=7)
    for name, value in today.items():
        assert getattr(again, name) == value
    assert again.max_length == 7
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict() == copy.deepcopy(args).to_dict()


def test_keys_of_todays_dicts():
    args = RewardConfig("out", **NONE, dispatch_batches=False, split_batches=True)
    assert args.accelerator_config.dispatch_batches is False
    assert args.accelerator_config.split_batches is True
    assert dataclasses.replace(args, seed=1).accelerator_config == args.accelerator_config
    given = {"fsdp_min_num_params": 7, "fsdp_config": {"version": 2}, "fsdp_transformer_layer_cls_to_wrap": "Layer"}
    expected = {"version": 2, "min_num_params": 7, "transformer_layer_cls_to_wrap": "Layer"}
    assert modernise(given) == {"fsdp_config": expected}
    assert given["fsdp_config"] == {"version": 2}
    with pytest.raises(ValueError, match=r"fsdp_config='file.json' is not a dict: set 'min_num_params' there"):
        modernise({"fsdp_min_num_params": 7, "fsdp_config": "file.json"})


def test_where_tensorboard_looks(monkeypatch):
    import os

    RewardConfig("out", **NONE)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # undone after the test
    assert RewardConfig("out", **NONE, logging_dir="there").logging_dir == "there"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "there"


GONE = {
    "save_safetensors": False,
    "use_mps_device": True,
    "jit_mode_eval": True,
    "use_ipex": True,
    "fp16_opt_level": "O2",
    "half_precision_backend": "apex",
    "fp16_backend": "apex",
    "tpu_num_cores": 8,
    "past_index": 2,
    "use_legacy_prediction_loop": True,
    "mp_parameters": "x",
    "ray_scope": "all",
}


@pytest.mark.parametrize("name", GONE)
def test_what_nothing_can_act_on_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}={GONE[name]!r} can have no effect any more, leave it out: \\w+"):
        RewardConfig("out", **NONE, **{name: GONE[name]})


def test_the_table_is_complete():
    assert set(GONE) == {name for name, became in BECAME.items() if isinstance(became, Gone)}
    missing = set(DEFAULTS) - set(TrainingArguments.__dataclass_fields__) - {"max_length"}
    assert missing == set(BECAME)


def test_bad_values():
    with pytest.raises(ValueError, match=r"warmup_ratio=1.5 must be at least 0 and below 1"):
        RewardConfig("out", **NONE, warmup_ratio=1.5)
    with pytest.raises(ValueError, match=r"evaluation_strategy='epoch' means eval_strategy='epoch', but .* is 'steps'"):
        RewardConfig("out", **NONE, evaluation_strategy="epoch", eval_strategy="steps")
    with pytest.raises(ValueError, match=r"warmup_ratio=0.1 means warmup_steps=0.1, but warmup_steps is 5: give one"):
        RewardConfig("out", **NONE, warmup_ratio=0.1, warmup_steps=5)
    with pytest.raises(TypeError, match="no_such"):
        RewardConfig("out", no_such=1)
    RewardConfig("out", **NONE, evaluation_strategy="epoch", eval_strategy="epoch")


def test_trackers(monkeypatch):
    """None is what it was: all that are installed."""
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    assert RewardConfig("out", use_cpu=True).report_to == ["tensorboard"]
    assert RewardConfig("out", use_cpu=True, report_to="none").report_to == []


def test_set_after_construction():
    """As scripts do; the old name and today's are one."""
    args = RewardConfig("out", **NONE)
    args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    args.evaluation_strategy = "steps"
    assert args.eval_strategy == "steps"
    args.eval_strategy = "no"
    assert args.evaluation_strategy == "no"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
        args.gradient_checkpointing = False
        assert args.activation_checkpointing is False
        off = RewardConfig("out", **NONE, activation_checkpointing=False)
        assert off.gradient_checkpointing is off.activation_checkpointing is False
    assert RewardConfig("out", **NONE, gradient_checkpointing=False).gradient_checkpointing is False


def test_arguments_for_transformers_itself():
    args = TrainingArguments(**modernise({"output_dir": "out", "evaluation_strategy": "epoch", "no_cuda": True}))
    assert args.eval_strategy == "epoch"
    assert args.use_cpu


def test_from_a_command_line():
    line = "--output_dir x --report_to none --use_cpu --evaluation_strategy steps --max_length 7 --warmup_ratio 0.2"
    (args,) = HfArgumentParser(RewardConfig).parse_args_into_dataclasses(line.split())
    assert (args.eval_strategy, args.max_length, args.warmup_steps) == ("steps", 7, 0.2)
    assert args.gradient_checkpointing is True
    line = "--output_dir x --report_to none --use_cpu --gradient_checkpointing False"
    (args,) = HfArgumentParser(RewardConfig).parse_args_into_dataclasses(line.split())
    assert args.gradient_checkpointing is False


@pytest.mark.filterwarnings("ignore::UserWarning")  # tyro on TrainingArguments' own accelerator_config
def test_with_tyro_as_the_scripts_do():
    tyro = pytest.importorskip("tyro")

    @dataclasses.dataclass
    class Script:
        reward_config: RewardConfig = dataclasses.field(
            default_factory=lambda: RewardConfig("out", **NONE, evaluation_strategy="no", max_length=512)
        )

    line = ["--reward_config.max_length", "9", "--reward_config.evaluation_strategy", "steps"]
    args = tyro.cli(Script, args=line).reward_config
    assert (args.max_length, args.eval_strategy, args.gradient_checkpointing) == (9, "steps", True)
