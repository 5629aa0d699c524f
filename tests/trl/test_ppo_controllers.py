"""The state of `PPOTrainer` between steps."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignkit.trl.trainer.controllers import AdaptiveKLController, FixedKLController, RunningMoments
from alignkit.trl.trainer.ppo_config import PPOConfig
from alignkit.trl.trainer.ppo_loss import transform_scores
from tests.trl.conftest import golden

FLOAT32 = {"rtol": 1e-6, "abs": 1e-6}
MOMENTS = golden("running_moments")["cases"]


def alone():
    """The part of an accelerator that moments need, in a single process."""
    return SimpleNamespace(gather=lambda x: x)


def approx(x):
    return pytest.approx(x, rel=1e-6, abs=1e-6)


def attributes(running):
    return [running.mean, running.var, running.std, running.count]


@pytest.mark.parametrize("case", golden("kl_controllers")["cases"], ids=lambda c: c["type"])
def test_kl_controllers(case):
    if case["type"] == "fixed":
        controller = FixedKLController(case["init"])
    else:
        controller = AdaptiveKLController(case["init"], case["target"], case["horizon"])
    assert controller.value == case["init"]
    for current, after in zip(case["currents"], case["values_after"]):
        controller.update(np.float32(current), case.get("n_steps", 1))
        assert controller.value == pytest.approx(after, rel=1e-6)
        assert isinstance(controller.value, float)


def test_an_adaptive_controller_reads_its_attributes():
    controller = AdaptiveKLController(0.1, 6, 10_000)
    controller.value, controller.target, controller.horizon = 0.5, 2.0, 100
    controller.update(100.0, 50)
    assert controller.value == pytest.approx(0.5 * (1 + 0.2 * 50 / 100))


@pytest.mark.parametrize("target", [0, -1])
def test_an_adaptive_controller_needs_a_positive_target(target):
    with pytest.raises(ValueError, match=r"target=.*must be positive"):
        AdaptiveKLController(0.2, target, 10_000).update(1.0, 1)


@pytest.mark.parametrize("case", [c for c in MOMENTS if c["name"] == "trajectory"])
def test_running_moments(case):
    running = RunningMoments(alone())
    assert attributes(running) == [0, 1, 1, 1e-24]
    for batch, after in zip(case["batches"], case["after"]):
        mean, std = running.update(torch.tensor(batch))
        assert (mean, std) == approx((after["ret_mean"], after["ret_std"]))
        assert attributes(running) == approx([after[k] for k in ("mean", "var", "std", "count")])


def test_a_first_batch_of_one_scales_nothing():
    running = RunningMoments(alone())
    assert running.update(torch.tensor([3.0])) == (3.0, 1.0)
    assert attributes(running) == [3.0, 0.0, 1.0, 1.0]
    running.update(torch.tensor([5.0]))
    assert attributes(running) == approx([4.0, 1.0, 2**0.5, 2.0])


def test_running_moments_of_all_processes():
    here, there = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 8.0])
    running = RunningMoments(SimpleNamespace(gather=lambda x: torch.cat([x, there])))
    mean, std = running.update(here)
    assert (mean, std) == approx((4.0, torch.tensor([1.0, 2, 5, 8]).std().item()))
    assert running.count == 4


def test_running_moments_are_saved(tmp_path):
    running = RunningMoments(alone())
    running.update(torch.tensor([1.0, 4.0, 2.0]))
    json.dumps(attributes(running))
    running.save_to_json(tmp_path / "moments.json")
    loaded = RunningMoments.load_from_json(running.accelerator, tmp_path / "moments.json")
    pickled = pickle.loads(pickle.dumps(attributes(running)))
    assert attributes(loaded) == attributes(running) == pickled
    for moments in (running, loaded):
        moments.update(torch.tensor([9.0, -1.0]))
    assert attributes(loaded) == attributes(running)


@pytest.mark.parametrize("case", [c for c in MOMENTS if c["name"].startswith("score")], ids=lambda c: c["name"])
def test_scores(case):
    names = ("use_score_scaling", "use_score_norm", "score_clip")
    config = PPOConfig(**{name: case[name] for name in names if name in case})
    trainer = SimpleNamespace(config=config, running=RunningMoments(alone()))
    for batch, expected in zip(case["batches"], case["out"]):
        scores = transform_scores(trainer, torch.tensor(batch))
        assert scores.tolist() == approx(expected)


def test_normalising_without_scaling_does_nothing():
    trainer = SimpleNamespace(config=PPOConfig(use_score_norm=True), running=RunningMoments(alone()))
    scores = torch.tensor([1.0, 5.0])
    assert transform_scores(trainer, scores).equal(scores)
