"""Images with gradient, against plain autograd and finite differences; rewards that have one; and the recipe."""

import json
import runpy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from alignkit.hf import diffusion, processes
from tests.hf.diffusion.test_denoiser import disturbed, opened, spec
from tests.test_layers import ROOT

PROMPTS = ["a red circle", "a blue square", "a green circle"]
SHORT = {"batch": 4, "micro": 2, "steps": 4, "lr": 1e-2, "logging_steps": 1, "save_steps": 2}
STEPS = 4


def drawer(folders, kind="sd", **options):
    policy = opened(folders, kind, **options)
    return diffusion.Unrolled(policy.net, policy.family)


def drawn(policy, *, steps=STEPS, truncation=STEPS, seed=3):
    """The columns of three images, without their mask."""
    b = policy.draw(len(PROMPTS), steps=steps, truncation=truncation, seed=seed, step=2) | policy.encode(PROMPTS)
    assert b.pop("mask").all()
    return b


def slopes(policy, reward):
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.cat([x.flatten() for x in torch.autograd.grad(reward, trained)])


def weighed(images):
    """A reward that is no symmetric function of pixels and rows."""
    return (images * torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images)).sum()


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixels"])
def test_the_images_are_those_of_the_sampler(folders, kind):
    policy = drawer(folders, kind)
    sampler = diffusion.Denoiser(policy.net, policy.family)
    expected = diffusion.denoise(sampler, PROMPTS, seed=3, step=2)["images"]
    assert expected.std() > 0.01
    for truncation in (1, STEPS):
        images = policy(**drawn(policy, truncation=truncation))
        assert images.requires_grad
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


def looped(policy, b, truncation):
    """The images of a loop without checkpoints; earlier steps are detached."""
    b = dict(b)
    x, *noises = torch.cat([b.pop("before"), b.pop("noise")], 1).unbind(1)
    for i, noise in enumerate(noises):
        x = x.detach() if i == STEPS - truncation else x
        moments = policy.moments(x[:, None], policy.family.times[i].expand(len(x), 1), **b)
        x = (moments.mean + moments.std * noise[:, None])[:, 0]
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("truncation", [1, 2, STEPS])
def test_the_gradient_is_autograds_and_that_of_finite_differences(folders, truncation):
    """In float64 on pixels, under guidance."""
    policy = drawer(folders, "pixels", guidance=2.0, resolution=0)
    policy.net.double()
    policy.family.negative = {name: x.double() for name, x in policy.family.negative.items()}
    b = {name: x.double() for name, x in drawn(policy, truncation=truncation).items()}
    images = policy(**b)
    assert images.dtype == torch.float64
    assert 0.1 < ((images > 0) & (images < 1)).double().mean() < 1
    found = slopes(policy, weighed(images))
    expected = slopes(policy, weighed(looped(policy, b, truncation)))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step, ends = 1e-7, []
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * step * direction, policy.parameters())
        with torch.no_grad():
            ends.append(weighed(policy(**b)).item())
    difference = (ends[0] - ends[1]) / (2 * step)
    agrees = (found @ direction).item() == pytest.approx(difference, rel=1e-4)
    assert agrees == (truncation == STEPS)


def test_gradients_pass_through_the_vae_but_not_into_it(folders):
    policy = drawer(folders, lora=2)
    disturbed(policy)
    policy(**drawn(policy)).sum().backward()
    for name, x in policy.named_parameters():
        assert (x.grad is not None and x.grad.any()) if "lora_" in name else x.grad is None, name
    frozen = [
        x for part in policy.pipe.components.values() if isinstance(part, torch.nn.Module) for x in part.parameters()
    ]
    assert all(x.grad is None for x in frozen if not any(x is own for own in policy.parameters()))


@pytest.mark.parametrize(("kind", "options"), [("sd", {}), ("sd", {"flow": True}), ("sd3", {}), ("flux", {})])
def test_a_last_step_that_comes_early_predicts_the_image(folders, kind, options):
    """What is left of the noise, and of the signal, is taken out by the mean of a step to the end."""
    policy = drawer(folders, kind, **options)
    b = drawn(policy, steps=2, truncation=1)
    images = policy(**b)
    assert images.requires_grad
    before, _ = b.pop("before").unbind(1), b.pop("noise")
    times, cond = policy.family.times, b
    normal = policy.moments(before[0][:, None], times[0].expand(3, 1), **cond)
    x = (normal.mean + normal.std * before[1][:, None])[:, 0]
    at = times[1].expand(3)
    output = policy._guided(x, at, cond)
    if kind == "sd":
        alpha = policy.pipe.scheduler.alphas_cumprod[at[0]]
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        x = x * (signal + noise) if options else x  # of a flow, where both shares add up to 1
        latents = (x - noise * output) / signal
    else:
        latents = x - times[1] / 1000 * output
    torch.testing.assert_close(images, policy.decode(latents), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(images, policy(**drawn(policy)), atol=1e-3)


@pytest.mark.parametrize("shapes", [(2, STEPS), (0, 2), (2, 0)])
def test_wrong_numbers_of_steps_are_refused(folders, shapes):
    policy = drawer(folders)
    before, noise = (torch.zeros(3, n, *policy.family.shape) for n in shapes)
    with pytest.raises(ValueError, match=f"before has {shapes[0]} samples of noise and noise {shapes[1]}.*are 4 steps"):
        policy(before, noise, **policy.encode(PROMPTS))


def test_each_process_draws_its_rows(folders, monkeypatch):
    policy = drawer(folders)
    whole = policy.draw(4, steps=3, truncation=1, seed=1, step=5)
    assert [tuple(whole[name].shape[:2]) for name in ("before", "noise", "mask")] == [(4, 3), (4, 1), (4, 1)]
    assert len({x.item() for x in whole["before"].flatten(2)[..., 0].flatten()}) == 12
    monkeypatch.setattr(processes, "process", lambda: SimpleNamespace(process_index=1))
    for name, x in policy.draw(2, steps=3, truncation=1, seed=1, step=5).items():
        assert torch.equal(x, whole[name][2:])


# rewards


def mixed(images, prompts):
    return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])


def constant(images):
    return images.detach().mean((1, 2, 3))


async def later(images):
    return images.square().mean((1, 2, 3))


def test_rewards_with_gradient():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = diffusion.image_reward(["builtin:brightness", (2.0, mixed), (0.5, later), "builtin:colour"])
    rewards = score.differentiable(images, PROMPTS)
    torch.testing.assert_close(score(images, PROMPTS), rewards.detach())
    assert not score(images, PROMPTS).requires_grad
    (alone,) = torch.autograd.grad(
        diffusion.image_reward("builtin:colour").differentiable(images, PROMPTS).sum(), images
    )
    (slope,) = torch.autograd.grad(rewards.sum(), images)
    lengths = torch.tensor([float(len(prompt)) for prompt in PROMPTS])[:, None, None, None]
    torch.testing.assert_close(slope, alone + (1 + 2 * lengths + images.detach()) / 192)
    assert (alone.flatten(1) != 0).any(1).all()


@pytest.mark.parametrize("reward", ["builtin:compressible", constant])
def test_rewards_without_gradient_are_refused(reward):
    images, name = torch.rand(3, 3, 8, 8), getattr(reward, "__name__", reward).removeprefix("builtin:")
    score = diffusion.image_reward(["builtin:brightness", reward])
    with pytest.raises(ValueError, match=f"reward='{name}' gave numbers without gradient.*the recipe ddpo"):
        score.differentiable(images.requires_grad_(), PROMPTS)
    with torch.no_grad():  # as in evaluation
        score.differentiable(images, PROMPTS)
    assert score(images, PROMPTS).shape == (3,)


# the recipe


def run(folder, dataset, out, **options):
    options = {"reward": ("builtin:brightness",), "denoising": spec(), **SHORT, **options}
    main = runpy.run_path(str(ROOT / "recipes" / "draft.py"))["main"]
    main(model=str(folder), dataset=str(dataset), out=str(out), **options)
    return [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def weights(checkpoint):
    (file,) = checkpoint.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("kind", "lora"), [("sd", 0), ("sd3", 2)])
def test_the_recipe(folders, dataset, tmp_path, kind, lora):
    out = tmp_path / "out"
    logs = run(folders[kind], dataset, out, lora=lora, steps=2, save_steps=2)
    assert len(logs) == 2
    assert all(log["loss"] == pytest.approx(-log["reward"]) and log["grad_norm"] > 0 for log in logs)
    part = "unet" if kind == "sd" else "transformer"
    if lora:
        assert all("lora_" in name for name in weights(out / "checkpoint-2"))
    else:
        before = getattr(DiffusionPipeline.from_pretrained(folders[kind]), part).state_dict()
        after = getattr(DiffusionPipeline.from_pretrained(out), part).state_dict()
        assert any(not torch.equal(before[name], x) for name, x in after.items())
    changed = diffusion.denoise(opened({kind: out}, kind), PROMPTS)["images"]
    assert not torch.allclose(changed, diffusion.denoise(opened(folders, kind), PROMPTS)["images"], atol=1e-6)


PIXELS = spec(guidance=1.0, resolution=0)


@pytest.mark.parametrize(
    ("options", "kept", "taken"),
    [
        ({}, {1}, {3}),
        ({"truncation": 9}, {3}, {3}),
        ({"truncation": "random"}, {1, 2, 3}, {3}),
        ({"stop": 2, "truncation": "all"}, {2, 3}, {2, 3}),
    ],
)
def test_how_many_steps_are_differentiated(folders, dataset, tmp_path, monkeypatch, options, kept, taken):
    seen, starts, forward = [], set(), diffusion.Unrolled.forward

    def watched(self, before, noise, **cond):
        seen.append((noise.shape[1], before.shape[1] + noise.shape[1] - 1))
        starts.add(before[:, 0].sum().item())
        return forward(self, before, noise, **cond)

    monkeypatch.setattr(diffusion.Unrolled, "forward", watched)
    options = {"steps": 3 * len(kept), "batch": 1, "micro": 1, "save_strategy": "no"} | options
    run(folders["pixels"], dataset, tmp_path / "out", denoising=replace(PIXELS, steps=3), **options)
    assert {n for n, _ in seen} == kept
    assert {n for _, n in seen} == taken
    assert len(starts) == len(seen) == options["steps"]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_resumed_run_is_the_whole_run(folders, dataset, tmp_path, lora):
    out = tmp_path / "out"
    kind, denoising = ("sd", spec()) if lora else ("pixels", PIXELS)
    options = {
        "lora": lora,
        "denoising": denoising,
        "truncation": "random",
        "stop": 2,
        "steps": 3,
        "save_steps": 1,
        "batch": 2,
    }
    logs = run(folders[kind], dataset, out, **options)
    whole, before = weights(out / "checkpoint-3"), weights(out / "checkpoint-1")
    for step in (2, 3):
        shutil.rmtree(out / f"checkpoint-{step}")
    again = run(folders[kind], dataset, out, **options, resume_from_checkpoint="last")
    assert any(not torch.equal(before[name], x) for name, x in whole.items())
    for name, x in weights(out / "checkpoint-3").items():
        assert torch.equal(x, whole[name]), name
    assert [log["loss"] for log in again[-2:]] == [log["loss"] for log in logs[-2:]]


def test_micro_batches_change_nothing(folders, dataset, tmp_path):
    found = []
    for micro in (2, 4):
        options = {"truncation": 2, "micro": micro, "steps": 2, "optim": "sgd"}
        run(folders["sd"], dataset, tmp_path / str(micro), **options)
        found.append(weights(tmp_path / str(micro) / "checkpoint-2"))
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], atol=1e-6, rtol=0)


def test_arguments_of_the_trainer(folders, dataset, tmp_path):
    options = {"bf16": True, "gradient_checkpointing": True, "save_strategy": "no"}
    logs = run(folders["sd"], dataset, tmp_path / "out", lora=2, steps=2, truncation=2, **options)
    assert all(log["grad_norm"] > 0 for log in logs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": ("builtin:compressible",)}, "reward='compressible' gave numbers without gradient"),
        ({"truncation": 0}, "truncation=0 must be at least 1, and at most steps=4"),
        ({"stop": 5}, "stop=5 must be a number of denoising steps, at most 4, or 0"),
    ],
)
def test_the_recipe_refuses(folders, dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(folders["pixels"], dataset, tmp_path / "out", denoising=PIXELS, **options)


@pytest.mark.parametrize("options", [{}, pytest.param({"truncation": "random", "stop": 3}, marks=pytest.mark.slow)])
def test_the_reward_rises(folders, dataset, tmp_path, options):
    options = {"steps": 12, "micro": 4, "save_strategy": "no"} | options
    rewards = [x["reward"] for x in run(folders["pixels"], dataset, tmp_path / "out", denoising=PIXELS, **options)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
