"""Denoising errors: by hand and against diffusers' schedulers, at any time, for every kind of pipeline."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignkit.hf import diffusion, processes
from alignkit.hf.diffusion.models import Regressor
from alignkit.losses.diffusion import diffusion_dpo_margin
from alignkit.losses.preference import dpo
from alignkit.train import infer
from tests.hf.diffusion.conftest import MAKERS, SD_SCHEDULER
from tests.hf.diffusion.test_denoiser import PROMPTS, disturbed, opened, with_scheduler

KINDS = [*MAKERS, "pixels"]


def regressor(folders, kind="sd", **options):
    policy = opened(folders, kind, **options)
    return Regressor(policy.net, policy.family)


def drawn(policy, rows=2, k=3, seed=0):
    """Latents, noise and times, [rows, k, ...]."""
    generator = torch.Generator().manual_seed(seed)
    original, noise = torch.randn(2, rows, k, *policy.family.shape, generator=generator)
    return original, noise, policy.family.random_times((rows, k), generator)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_by_hand(folders, kind):
    """In double precision, one sample at a time."""
    policy = regressor(folders, kind, dtype="float64")
    original, noise, times = drawn(policy)
    original, noise, cond = original.double(), noise.double(), policy.encode(PROMPTS)
    errors = policy(original, noise, times, **cond)
    assert errors.shape == (2, 3)
    assert errors.dtype == torch.float64
    for i, j in ((0, 0), (0, 2), (1, 1)):
        t, x0, eps = times[i, j], original[i, j], noise[i, j]
        if kind in ("sd", "pixels"):
            alpha = DDIMScheduler(**SD_SCHEDULER).alphas_cumprod[t]
            x, target = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps, eps
        else:
            x, target = x0 + t / 1000 * (eps - x0), eps - x0
        own = {name: column[i : i + 1] for name, column in cond.items()}
        output = policy.family.output(policy.net, x[None], times[i : i + 1, j], **own)[0]
        expected = (output - target).square().sum() / target.numel()
        torch.testing.assert_close(errors[i, j], expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_what_is_predicted_from_what(folders, prediction):
    """At times of which most are not those of the schedule."""
    scheduler = DDIMScheduler(**SD_SCHEDULER, prediction_type=prediction)
    family = with_scheduler(opened(folders), scheduler).family
    times = torch.tensor([[0, 1, 999], [500, 501, 77]])
    original, noise = torch.randn(2, 2, 3, 4, 8, 8)
    flat = original.flatten(0, 1), noise.flatten(0, 1), times.flatten()
    torch.testing.assert_close(family.noised(original, noise, times).flatten(0, 1), scheduler.add_noise(*flat))
    velocity = scheduler.get_velocity(*flat).unflatten(0, (2, 3))
    expected = {"epsilon": noise, "sample": original, "v_prediction": velocity}[prediction]
    torch.testing.assert_close(family.target(original, noise, times), expected)


def test_times_of_ddim_are_those_of_training(folders):
    family = opened(folders).family
    times = family.random_times((100, 200), torch.Generator().manual_seed(0))
    assert times.dtype == torch.long
    counts = times.flatten().bincount(minlength=1000)
    assert len(counts) == 1000
    assert counts.min() > 0
    assert counts.max() < 60
    assert torch.equal(times, family.random_times((100, 200), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_times_of_a_flow_are_shifted_as_the_schedule(folders, kind):
    policy = opened(folders, kind)
    times = policy.family.random_times((64,), torch.Generator().manual_seed(0))
    uniform = 1 - torch.rand(64, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(policy.pipe.scheduler.config)
    shift = {"mu": policy.family._shift(scheduler.config)} if kind == "flux" else {}
    scheduler.set_timesteps(sigmas=uniform.tolist(), **shift)
    torch.testing.assert_close(times, scheduler.timesteps)
    assert ((times > 0) & (times <= 1000)).all()
    assert times.median() > 550


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_pair_shares_noise_and_time(folders, kind):
    policy = regressor(folders, kind)
    original, noise, times = drawn(policy, k=2)
    cond = policy.encode(PROMPTS)
    shared = policy(original, noise[:, :1], times[:, :1], **cond)
    both = policy(original, noise[:, :1].repeat(1, 2, 1, 1, 1), times[:, :1].repeat(1, 2), **cond)
    torch.testing.assert_close(shared, both)
    alone = policy(original[1:, 1:], noise[1:, :1], times[1:, :1], **{name: x[1:] for name, x in cond.items()})
    torch.testing.assert_close(shared[1:, 1:], alone, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(shared[:, 0], shared[:, 1])


def test_guidance_does_not_matter(folders):
    plain, guided = (regressor(folders, guidance=guidance) for guidance in (1.0, 5.0))
    columns, cond = drawn(plain), plain.encode(PROMPTS)
    assert torch.equal(plain(*columns, **cond), guided(*columns, **cond))


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_half_precision_keeps_errors_in_full(folders, kind):
    policy = regressor(folders, kind, dtype="bfloat16", lora=2)
    errors = policy(*drawn(policy), **policy.encode(PROMPTS))
    assert errors.dtype == torch.float32
    errors.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)
    full = regressor(folders, kind)
    torch.testing.assert_close(errors.detach(), full(*drawn(full), **full.encode(PROMPTS)).detach(), atol=0, rtol=0.1)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_reference_is_of_the_policys_class(folders, lora):
    """So margins are 0 before the first step, and losses log 2."""
    policy = regressor(folders, lora=lora)
    ref, columns, cond = diffusion.frozen(policy), drawn(policy, k=2), policy.encode(PROMPTS)
    assert type(ref) is Regressor
    assert not lora or set(ref.parameters()) <= set(policy.parameters())  # no copy
    before = ref(*columns, **cond).detach()
    margin = diffusion_dpo_margin(policy(*columns, **cond), before)
    assert torch.equal(margin, torch.zeros(2))
    torch.testing.assert_close(dpo(margin, beta=2000.0), torch.full((2,), 2.0).log())
    disturbed(policy)
    errors = policy(*columns, **cond).detach()
    assert torch.equal(ref(*columns, **cond).detach(), before)
    assert not torch.allclose(errors, before, atol=1e-4)
    assert torch.equal(policy(*columns, **cond).detach(), errors)  # its adapter is on again
    policy.train()
    parts = dict(zip(("original", "noise", "timesteps"), columns)) | cond
    inferred = infer(ref, rows=1, **parts)
    assert policy.training
    assert not inferred.requires_grad
    torch.testing.assert_close(inferred, before)
    assert all(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name or not lora)


def test_draws_belong_to_their_rows(folders, monkeypatch):
    policy = regressor(folders, "sd3")
    state = torch.get_rng_state()
    whole = policy.draw(4, seed=1, step=2)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in whole.items()} == {
        "noise": (4, 1, 4, 8, 8),
        "timesteps": (4, 1),
        "mask": (4, 1),
    }
    assert whole["mask"].all()
    assert len(whole["timesteps"].unique()) == 4
    place = SimpleNamespace(process_index=1)
    monkeypatch.setattr(processes, "process", lambda: place)
    second = policy.draw(2, seed=1, step=2)
    for name, x in second.items():
        assert torch.equal(x, whole[name][2:])
    place.process_index = 0
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        again = policy.draw(4, **other)
        assert not (again["timesteps"] == whole["timesteps"]).any()
        assert not (again["noise"] == whole["noise"]).flatten(1).all(1).any()
