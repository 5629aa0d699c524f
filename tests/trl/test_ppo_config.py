import dataclasses
import importlib.util
import shlex
import sys
import warnings
from dataclasses import dataclass, field

import pytest
import tyro
from accelerate.tracking import GeneralTracker
from transformers import HfArgumentParser

from alignkit.trl.trainer import ppo_config
from alignkit.trl.trainer.ppo_config import PPOConfig
from tests.trl.conftest import golden

CASES = golden("ppo_config")["cases"]


class Notebook(GeneralTracker):
    """A tracker of the user's own."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.lines.append(values)

    def log(self, values, step=None, **kwargs):
        self.lines.append((values, step, kwargs))


def test_fields_and_defaults_are_the_documented_ones():
    expected = dict(CASES[0]["fields"])
    config = PPOConfig()
    assert [f.name for f in dataclasses.fields(PPOConfig)] == list(expected)
    assert len(expected) == 47
    del expected["exp_name"]  # of the script
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.total_ppo_epochs == CASES[0]["total_ppo_epochs"]


@pytest.mark.parametrize("case", CASES[1:], ids=[str(c["kwargs"]) for c in CASES[1:]])
def test_golden(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if "raises" in case:
            name, message = case["raises"]
            with pytest.raises({"ValueError": ValueError, "AssertionError": AssertionError}[name]) as error:
                PPOConfig(**case["kwargs"])
            assert message in str(error.value)
        else:
            config = PPOConfig(**case["kwargs"])
            for name in ("mini_batch_size", "backward_batch_size", "total_ppo_epochs", "optimize_device_cache"):
                assert getattr(config, name) == case[name]
    assert [w.category for w in caught] == [UserWarning] * len(case["warnings"])


@pytest.mark.parametrize(
    ("script", "name"), [("/somewhere/ppo_sentiment.py", "ppo_sentiment"), ("/bin/doc-builder", "doc-buil"), ("", "")]
)
def test_the_experiment_is_named_after_the_script(script, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--seed", "1"])
    spec = importlib.util.spec_from_file_location("anew", ppo_config.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert anew.PPOConfig().exp_name == name
    assert anew.PPOConfig(exp_name="mine").exp_name == "mine"


def test_forward_batch_size_is_the_old_name_of_mini_batch_size():
    with pytest.warns(UserWarning, match="`forward_batch_size` is deprecated, use `mini_batch_size`"):
        config = PPOConfig(batch_size=24, mini_batch_size=5, forward_batch_size=4, gradient_accumulation_steps=3)
    assert (config.mini_batch_size, config.backward_batch_size) == (4, 12)


@pytest.mark.parametrize("value", [True, False])
def test_optimize_cuda_cache_is_the_old_name_of_optimize_device_cache(value):
    """The release never read it."""
    with pytest.warns(UserWarning, match="`optimize_cuda_cache` is deprecated, use `optimize_device_cache`"):
        assert PPOConfig(optimize_cuda_cache=value).optimize_device_cache is value


def test_both_names_of_the_cache_must_agree():
    with (
        pytest.warns(UserWarning, match="deprecated"),
        pytest.raises(ValueError, match="optimize_cuda_cache=False contradicts optimize_device_cache=True"),
    ):
        PPOConfig(optimize_cuda_cache=False, optimize_device_cache=True)


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "compare_steps"]
)
@pytest.mark.parametrize("value", [0, -2])
def test_counts_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        PPOConfig(**{name: value})


@pytest.mark.parametrize(
    ("sizes", "division"), [((8, 3, 1), "8 / 3 = "), ((8, 16, 1), "8 / 16 = 0.5"), ((6, 2, 2), "6 / 4 = 1.5")]
)
def test_a_batch_is_whole_backward_batches(sizes, division):
    names = ("batch_size", "mini_batch_size", "gradient_accumulation_steps")
    with pytest.raises(ValueError, match=f"^`batch_size` must be a multiple of .* inexact division: {division}"):
        PPOConfig(**dict(zip(names, sizes)))


def test_kl_penalties():
    for name in ("kl", "abs", "mse", "full"):
        assert PPOConfig(kl_penalty=name).kl_penalty == name
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="kl_penalty='k3' must be one of kl, abs, mse, full"):
            PPOConfig(kl_penalty="k3")


def test_trackers():
    notebook = Notebook()
    for log_with in (None, "tensorboard", "all", notebook):
        assert PPOConfig(log_with=log_with).log_with is log_with
    with pytest.raises(ValueError, match=r"log_with='tensorbord' must be one of .*mlflow, .*tensorboard, .*wandb"):
        PPOConfig(log_with="tensorbord")


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(ppo_config, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ImportError, match=r"log_with='wandb' needs the package of that tracker: pip install wandb"):
        PPOConfig(log_with="wandb")
    monkeypatch.setattr(ppo_config, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert PPOConfig(log_with="wandb").log_with == "wandb"


def test_to_dict_is_flat():
    config = PPOConfig(accelerator_kwargs={"a": {"b": 1}, "c": [2]}, tracker_kwargs={"wandb": {}})
    flat = config.to_dict()
    assert (flat["accelerator_kwargs/a/b"], flat["accelerator_kwargs/c"]) == (1, [2])
    assert not {"accelerator_kwargs", "tracker_kwargs", "tracker_kwargs/wandb", "project_kwargs"} & set(flat)
    assert (flat["total_ppo_epochs"], flat["log_with"], flat["seed"]) == (79, None, 0)
    config.world_size = 2
    assert config.to_dict()["world_size"] == 2
    with pytest.raises(ValueError, match="a/b"):
        PPOConfig(project_kwargs={"a/b": 1}).to_dict()


def test_keyword_arguments_are_dicts():
    for value in ("[1]", "3"):
        with pytest.raises(ValueError, match=r"tracker_kwargs=.* must be a dict"):
            PPOConfig(tracker_kwargs=value)
    with pytest.raises(ValueError, match=r"project_kwargs='{' must be a dict or JSON: Expecting"):
        PPOConfig(project_kwargs="{")


def test_a_copy_is_equal():
    config = PPOConfig(batch_size=8, mini_batch_size=4)
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, mini_batch_size=2).backward_batch_size == 2


ARGS = shlex.split(
    "--batch_size 8 --mini_batch_size 4 --learning_rate 3e-4 --kl_penalty full --log_with tensorboard --target 3 "
    "--max_grad_norm 0.5 --early_stopping --model_name gpt2"
)
KWARGS = ["--tracker_kwargs", '{"wandb": {"name": "x y"}}']
EXPECTED = {
    "batch_size": 8,
    "mini_batch_size": 4,
    "backward_batch_size": 4,
    "learning_rate": 3e-4,
    "kl_penalty": "full",
    "log_with": "tensorboard",
    "target": 3,
    "max_grad_norm": 0.5,
    "early_stopping": True,
    "adap_kl_ctrl": False,
    "model_name": "gpt2",
    "tracker_kwargs": {"wandb": {"name": "x y"}},
    "project_kwargs": {},
    "optimize_device_cache": True,
}


def of_hf(args):
    return HfArgumentParser(PPOConfig).parse_args_into_dataclasses(args)[0]


def of_tyro(args):
    return tyro.cli(PPOConfig, args=args)


def test_hf_argument_parser():
    config = of_hf([*ARGS, *KWARGS, "--adap_kl_ctrl", "false", "--optimize_device_cache"])
    assert {name: getattr(config, name) for name in EXPECTED} == EXPECTED
    assert of_hf([]) == PPOConfig() == of_tyro([])


def test_tyro():
    config = of_tyro([*ARGS, *KWARGS, "--no-adap-kl-ctrl", "--optimize-device-cache", "True"])
    assert {name: getattr(config, name) for name in EXPECTED} == EXPECTED
    assert of_tyro(["--log-with", "None"]).log_with is None


@dataclass
class Script:
    """Arguments like those of a script of the release."""

    ppo_config: PPOConfig = field(
        default_factory=lambda: PPOConfig(batch_size=128, mini_batch_size=128, accelerator_kwargs={"a": 1})
    )
    use_peft: bool = False


def test_tyro_of_a_nested_config_with_values():
    args = tyro.cli(Script, args=["--ppo-config.mini-batch-size", "2", "--ppo-config.log-with", "tensorboard"])
    config = args.ppo_config
    assert (config.batch_size, config.mini_batch_size, config.backward_batch_size) == (128, 2, 2)
    assert (config.log_with, config.accelerator_kwargs) == ("tensorboard", {"a": 1})


def test_help_explains_fields_but_not_those_of_the_trainer(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Script, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "samples per forward pass (default: 128)" in text
    assert "world-size" not in text
    assert "is-peft-model" not in text


@pytest.mark.parametrize(("name", "value"), [("batch_size", 2.0), ("ppo_epochs", "4"), ("learning_rate", "fast")])
def test_numbers_of_another_kind(name, value):
    config = PPOConfig()
    setattr(config, name, value)
    with pytest.raises(TypeError, match=f"{name}={value!r} must be a"):
        config.__post_init__()
