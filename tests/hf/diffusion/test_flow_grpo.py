"""Flow-GRPO: gradients of its loss against closed forms, and the recipe on tiny pipelines."""

import itertools
import json
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from alignkit import hf
from alignkit.advantages import group_normalize
from alignkit.data import by_step
from alignkit.hf import diffusion
from alignkit.hf.diffusion.models import Denoiser
from alignkit.weights import row_mean, token_mean
from tests.hf.diffusion.conftest import SD_SCHEDULER
from tests.hf.diffusion.test_denoiser import spec
from tests.hf.diffusion.test_flows import Net, pixels
from tests.test_layers import ROOT

TEXTS = ["a red circle", "a blue square", "a green circle"]
SHORT = {"n": 2, "rollout": 4, "batch": 8, "micro": 4, "steps": 4, "lr": 1e-3, "logging_steps": 1, "save_steps": 2}
FLOW = {"flow": True, "guidance": 2.0}


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


def call(recipe, folder, dataset, out, **options):
    options = {"reward": ("builtin:brightness",), "denoising": spec(**FLOW), **SHORT, **options}
    main = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"]
    main(model=str(folder), dataset=str(dataset), out=str(out), **options)


def run(recipe, folder, dataset, out, **options):
    """The recipe's logs."""
    call(recipe, folder, dataset, out, **options)
    return [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


def taken(recipe, monkeypatch, folder, dataset, out, **options):
    """What the recipe gives to `hf.fit`: loss_fn, policy, batches."""
    found = SimpleNamespace()

    def fit(loss_fn, policy, batches, **_):
        found.loss_fn, found.policy, found.batches = loss_fn, policy, batches

    monkeypatch.setattr(hf, "fit", fit)
    monkeypatch.setattr(diffusion, "save", lambda *_: None)
    call(recipe, folder, dataset, out, **options)
    return found


def weights(checkpoint):
    (file,) = checkpoint.glob("*model.safetensors")
    return load_file(file)


def resumed(recipe, folder, dataset, out, **options):
    """Weights of a run, and of one that was stopped in the midst of a rollout."""
    run(recipe, folder, dataset, out, save_steps=1, **options)
    whole, before = weights(out / "checkpoint-4"), weights(out / "checkpoint-3")
    assert any(not torch.equal(before[name], x) for name, x in whole.items())
    shutil.rmtree(out / "checkpoint-4")
    run(recipe, folder, dataset, out, save_steps=1, resume_from_checkpoint="last", **options)
    return whole, weights(out / "checkpoint-4")


def toy(folders, *, steps=2, shift=None, **options):
    """A policy on points of the plane whose network is w x + shift, one number each at each time."""
    draw = torch.Generator().manual_seed(0)
    scheduler = DDIMScheduler(**SD_SCHEDULER | {"prediction_type": "sample", **options.pop("scheduler", {})})
    net = Net(torch.rand(1000, generator=draw), torch.zeros(1000) if shift is None else shift)
    return pixels(folders, net, scheduler, steps=steps, **options)


def trajectories(policy, reward):
    """All [rows] that signs as noise lead to: what is at most of second degree has its expectation exactly.

    `reward` [2] is the gradient of a linear one. The reference is the policy with a shift of 0.
    """
    times, dims = policy.family.times, 2 * (1 + len(policy.family.times))
    noise = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dims)), dtype=torch.float64)
    noise = noise.view(-1, 1 + len(times), 2, 1, 1)
    ref = Denoiser(Net(policy.net.scale.detach(), torch.zeros(1000)), policy.family)
    x, columns = noise[:, :1], []
    cond = {"cond_prompt": policy.encode(TEXTS[:1])["cond_prompt"].expand(len(noise), -1, -1)}
    with torch.no_grad():
        for i, time in enumerate(times):
            t = time.expand(len(x), 1)
            normal = policy.moments(x, t, **cond)
            new = normal.mean + normal.std * noise[:, i + 1 : i + 2]
            mask = (normal.std > 0).flatten(1).any(-1, keepdim=True)
            columns.append((x, new, t, mask, policy.denoising.logps(new, normal), ref.moments(x, t, **cond).mean))
            x = new
    names = ("latents", "next_latents", "timesteps", "mask", "old_logps", "ref_mean")
    b = {name: torch.cat(column, 1) for name, column in zip(names, zip(*columns))} | cond
    b["rewards"] = b["advantages"] = (x.flatten(1) * reward).sum(-1)
    b |= {"zero_variance": torch.zeros(len(x), dtype=torch.bool)}
    b = by_step(b, 1, generator=torch.Generator().manual_seed(0))
    return b | {"weights": token_mean(b["mask"]), "rows": row_mean(b["mask"])}


def steps_of(policy):
    """Of each step: dmean / dx, dmean / dx_0 and the variance, written out; dx_0 / dx is the network's."""
    found, d = policy.family, policy.denoising
    alphas = found._alphas.double()
    if not d.flow:  # as a posterior of DDPM
        for i, time in enumerate(found.times):
            last = i + 1 == len(found.times)
            a, before = alphas[time], found._last.double() if last else alphas[found.times[i + 1]]
            drop = 1 - a / before
            yield (
                (a / before).sqrt() * (1 - before) / (1 - a),
                before.sqrt() * drop / (1 - a),
                (1 - before) / (1 - a) * drop,
            )
        return
    shares = [*found._shares[found.times].double(), torch.tensor(0.0).double()]
    for i, (t, before) in enumerate(itertools.pairwise(shares)):
        rate = d.noise**2 / (1 - (before if i == 0 else t))
        slope = (1 + rate * (1 - t) / 2) / t  # of the drift, in x - x_0
        yield 1 - (t - before) * (slope + rate / 2), (t - before) * slope, rate * t * (t - before)


def expected_gradient(policy, reward, *, alpha, beta):
    """Of -alpha E r + beta sum KL in the shift, [steps, 2 elements], and what of the KL it is in the shift itself."""
    factors = []
    for time, (a, b, var) in zip(policy.family.times, steps_of(policy)):
        length = policy.family._length(time) if policy.denoising.flow else torch.ones(())
        factors.append((a + b * policy.net.scale.detach()[time] / length.double().squeeze(), b, var))
    out = []
    for i, (time, (_, b, var)) in enumerate(zip(policy.family.times, factors)):
        later = torch.stack([torch.ones((), dtype=torch.float64), *(a for a, _, _ in factors[i + 1 :])]).prod()
        shift = policy.net.shift.detach()[time]
        kl = 2 * b**2 * shift / var if var > 0 else 0 * b
        out.append(-alpha * reward.sum() * later * b * (var > 0) + beta * kl)
    return torch.stack(out)


def gradient(loss_fn, policy, b):
    """Of the loss in the shift at the times of the steps, and its metrics."""
    policy.zero_grad()
    loss, metrics = loss_fn(policy, **b)
    loss.backward()
    return policy.net.shift.grad[policy.family.times], metrics


REWARD = torch.tensor([0.7, -1.9], dtype=torch.float64)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("flow", [True, False])
def test_the_gradient_is_that_of_reward_and_kl(folders, dataset, tmp_path, monkeypatch, flow, reduce):
    options = {"flow": flow, "reduce": reduce, "guidance": 1.0}
    found = taken("flow_grpo", monkeypatch, folders["pixels"], dataset, tmp_path, denoising=spec(**options), beta=0.3)
    for shift in (torch.zeros(1000), torch.linspace(-1, 2, 1000)):
        scheduler = {"set_alpha_to_one": True, "timestep_spacing": "trailing"}  # the last step of DDIM has no density
        policy = toy(folders, shift=shift, scheduler=scheduler, **options)
        got, metrics = gradient(found.loss_fn, policy, trajectories(policy, REWARD))
        expected = expected_gradient(policy, REWARD, alpha=1.0, beta=0.3) / (2 if flow else 1)
        torch.testing.assert_close(got, expected / (2 if reduce == "mean" else 1), atol=1e-6, rtol=1e-5)
        assert metrics["clipped"] == 0
        assert (metrics["kl"] > 0) == shift.any()


def test_the_gradient_of_ddpo(folders, dataset, tmp_path, monkeypatch):
    """Of the expected reward alone; a deterministic last step has none."""
    options = {"denoising": spec(guidance=1.0)}
    found = taken("ddpo", monkeypatch, folders["pixels"], dataset, tmp_path, **options)
    for last in (False, True):
        scheduler = {"set_alpha_to_one": last, "timestep_spacing": "trailing"}
        policy = toy(folders, flow=False, reduce="sum", scheduler=scheduler)
        b = trajectories(policy, REWARD)
        got, _ = gradient(found.loss_fn, policy, {name: x for name, x in b.items() if name != "ref_mean"})
        steps = len(policy.family.times) - last
        torch.testing.assert_close(
            got, expected_gradient(policy, REWARD, alpha=1.0, beta=0.0) / steps, atol=1e-6, rtol=1e-5
        )
        assert (got[-1] == 0) == last


def test_beyond_the_clip_range_only_the_kl_has_a_gradient(folders, dataset, tmp_path, monkeypatch):
    options = {"flow": True, "guidance": 1.0}
    policy = toy(folders, shift=torch.full((1000,), 0.5), **options)
    b = trajectories(policy, REWARD)
    grads = []
    for beta, sign in ((0.0, 1), (0.3, 1), (0.3, -1)):
        found = taken(
            "flow_grpo", monkeypatch, folders["pixels"], dataset, tmp_path, denoising=spec(**options), beta=beta
        )
        beyond = b | {"old_logps": b["old_logps"] - sign * 2e-4, "advantages": torch.ones_like(b["rewards"])}
        grad, metrics = gradient(found.loss_fn, policy, beyond)
        assert metrics["clipped"] == pytest.approx(1 if sign > 0 else 0)
        grads.append(grad)
    assert (grads[0] == 0).all()
    assert (grads[1] != 0).all()
    torch.testing.assert_close(
        grads[1], expected_gradient(policy, 0 * REWARD, alpha=0.0, beta=0.3) / 4, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(("kind", "lora"), [("sd", 0), ("sd", 2), ("sd3", 2)])
def test_what_the_recipe_trains_on(folders, dataset, tmp_path, monkeypatch, kind, lora):
    """Normalised rewards, the reference's moments and log-probs of its own, of which the ratio is 1."""
    found = taken("flow_grpo", monkeypatch, folders[kind], dataset, tmp_path, rollout=6, batch=24, lora=lora)
    b = next(found.batches(0))
    rows = token_mean(b["mask"]), row_mean(b["mask"])
    _, metrics = found.loss_fn(found.policy.train(), **b, weights=rows[0], rows=rows[1])
    assert b["mask"].all()
    assert metrics["clipped"] == 0
    assert metrics["kl"] < 1e-9
    for prompt in b["prompt"].unique():
        rewards, advantages = (b[name][b["prompt"] == prompt] for name in ("rewards", "advantages"))
        both = rewards.unique()
        assert len(both) == 2
        for reward, advantage in zip(both, group_normalize(both)):
            torch.testing.assert_close(advantages[rewards == reward], advantage.expand(4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "lora"), [("pixels", 0), ("sd3", 2)])
def test_the_recipe_resumes_as_if_never_stopped(folders, dataset, tmp_path, kind, lora):
    denoising = spec(**FLOW, resolution=0 if kind == "pixels" else 16)
    whole, again = resumed("flow_grpo", folders[kind], dataset, tmp_path / "out", lora=lora, denoising=denoising)
    for name, x in whole.items():
        assert torch.equal(x, again[name]), name


def test_micro_batches_change_nothing(folders, dataset, tmp_path):
    found = []
    for micro in (2, 8):
        options = {"steps": 2, "optim": "sgd", "lr": 1e-2, "beta": 1.0}
        run("flow_grpo", folders["sd"], dataset, tmp_path / str(micro), micro=micro, **options)
        found.append(weights(tmp_path / str(micro) / "checkpoint-2"))
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], atol=1e-6, rtol=0)


def test_few_steps_of_each_image(folders, dataset, tmp_path):
    logs = run("flow_grpo", folders["sd"], dataset, tmp_path / "out", fraction=0.5, batch=8, steps=2)
    assert [log["clipped"] for log in logs] == [0, 0]


@pytest.mark.slow
def test_the_reward_rises(folders, dataset, tmp_path):
    denoising = spec(flow=True, guidance=1.0, resolution=0)
    options = {"n": 8, "rollout": 16, "batch": 64, "micro": 64, "steps": 10, "lr": 3e-3, "save_steps": 100}
    logs = run("flow_grpo", folders["pixels"], dataset, tmp_path / "out", denoising=denoising, **options)
    rewards = [log["reward"] for log in logs]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    assert logs[-1]["kl"] > 0
