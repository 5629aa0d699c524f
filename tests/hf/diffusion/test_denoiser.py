"""The denoiser against diffusers' own pipelines, and the log-probs of its steps against the sampler's."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from torch import nn

from alignkit import data
from alignkit.hf import diffusion, processes
from alignkit.hf.diffusion.families import family
from alignkit.hf.diffusion.models import Denoiser
from alignkit.hf.diffusion.unet import StableDiffusion
from alignkit.losses.policy import clipped_surrogate
from alignkit.train import split
from tests.hf.diffusion.conftest import MAKERS, SD_SCHEDULER

PROMPTS = ["a red circle", {"prompt": "a blue square on white", "other": 1}]
STEPS = ("latents", "next_latents", "timesteps")
GOLDEN = Path(__file__).parents[2] / "golden"


def spec(**options):
    return diffusion.Denoising(**{"steps": 4, "resolution": 16, **options})


def opened(folders, kind="sd", *, lora=0, dtype="float32", seed=0, **options):
    return diffusion.pipeline(folders[kind], denoising=spec(**options), lora=lora, dtype=dtype, seed=seed)


def scored(policy, b, rows=None, steps=None):
    """Log-probs of the steps of a batch, `rows` images and `steps` steps at a time."""
    parts = []
    for part in split({name: x for name, x in b.items() if name in STEPS or name.startswith("cond_")}, rows):
        columns = zip(*(part.pop(name).split(steps or 100, dim=1) for name in STEPS))
        parts.append(torch.cat([policy(*column, **part) for column in columns], 1))
    return torch.cat(parts)


def generators(seed, n, step=0):
    return [torch.Generator().manual_seed(data.mix(data.mix(seed, step), i)) for i in range(n)]


def with_scheduler(policy, scheduler, **options):
    """The same networks with another scheduler."""
    pipe = copy.copy(policy.pipe)
    pipe.scheduler = scheduler
    return Denoiser(policy.net, family(pipe, spec(**options)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("eta", 0.0),
        ("eta", 1.1),
        ("guidance", math.inf),
        ("guidance", -1.0),
        ("rescale", 1.5),
        ("noise", 0.0),
        ("noise", math.nan),
        ("reduce", "max"),
        ("resolution", -8),
    ],
)
def test_a_wrong_value_of_the_spec_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        diffusion.Denoising(**{name: value})


@pytest.mark.parametrize(
    ("options", "scheduler"),
    [
        ({}, {}),
        ({"guidance": 1.0, "eta": 0.3}, {"prediction_type": "v_prediction"}),
        ({"rescale": 0.4, "negative": "a green circle"}, {"prediction_type": "sample", "clip_sample": True}),
        ({"steps": 7}, {"clip_sample": True, "clip_sample_range": 0.5, "timestep_spacing": "trailing"}),
        ({}, {"thresholding": True, "sample_max_value": 1.2, "dynamic_thresholding_ratio": 0.8}),
        (
            {"guidance": 2.0},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
    ],
)
def test_stable_diffusion_denoises_as_its_pipeline(folders, options, scheduler):
    policy = opened(folders)
    policy = with_scheduler(policy, DDIMScheduler(**{**SD_SCHEDULER, **scheduler}), **options)
    b = diffusion.denoise(policy, PROMPTS, n=2, seed=3, step=1)
    d = policy.denoising
    policy.pipe.set_progress_bar_config(disable=True)
    expected = policy.pipe(
        [PROMPTS[0]] * 2 + [PROMPTS[1]["prompt"]] * 2,
        num_inference_steps=d.steps,
        guidance_scale=d.guidance,
        guidance_rescale=d.rescale,
        negative_prompt=[d.negative] * 4,
        eta=d.eta,
        generator=generators(3, 4, step=1),
        height=16,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close(b["images"], expected, atol=5e-5, rtol=0)
    assert b["mask"].all()
    assert b["images"].std() > 0.01


@pytest.mark.parametrize("kind", ["sd3", "flux", "schnell"])
def test_a_flow_with_hardly_any_noise_denoises_as_its_pipeline(folders, kind):
    negative = {} if kind == "flux" else {"negative": "a green circle"}
    policy = opened(folders, kind, noise=1e-5, guidance=3.0, steps=5, **negative)
    pipe = policy.pipe
    pipe.set_progress_bar_config(disable=True)
    guidance = {
        "sd3": {"guidance_scale": 3.0, "negative_prompt": ["a green circle"] * 2},
        "flux": {"guidance_scale": 3.0},
        "schnell": {"true_cfg_scale": 3.0, "negative_prompt": ["a green circle"] * 2},
    }
    size = {"height": 16, "width": 16, "num_inference_steps": 5, "output_type": "pt"}
    prompts = [PROMPTS[0], PROMPTS[1]["prompt"]]
    expected = pipe(prompts, generator=generators(0, 2), **guidance[kind], **size).images
    b = diffusion.denoise(policy, PROMPTS)
    torch.testing.assert_close(b["images"], expected, atol=1e-4, rtol=0)
    plain = diffusion.denoise(opened(folders, kind, noise=1e-5, guidance=1.0, steps=5), PROMPTS)["images"]
    assert not torch.allclose(plain, expected, atol=1e-4)


def test_the_latents_have_the_shape_that_the_pipeline_makes(folders):
    b = diffusion.denoise(opened(folders, resolution=0), PROMPTS)
    assert b["latents"].shape == b["next_latents"].shape == (2, 4, 4, 8, 8)
    assert b["images"].shape == (2, 3, 16, 16)
    assert torch.equal(b["latents"][:, 1:], b["next_latents"][:, :-1])
    assert b["timesteps"].tolist() == [[751, 501, 251, 1]] * 2
    assert opened(folders, resolution=32).family.shape == (4, 16, 16)
    assert opened(folders, "flux", resolution=0).family.shape == (4, 128, 128)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_log_probs_at_any_split_are_the_samplers(folders, kind, dtype, tolerance):
    policy = opened(folders, kind, dtype=dtype)
    b = diffusion.denoise(policy, PROMPTS, n=2, rows=3)
    with torch.no_grad():
        for rows, steps in ((None, None), (1, 1), (3, 2), (4, 3)):
            logps = scored(policy, b, rows, steps)
            torch.testing.assert_close(logps, b["sampler_logps"], atol=tolerance, rtol=tolerance)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: b[name][:, order] for name in STEPS}
    logps = policy(*shuffled.values(), **{name: x for name, x in b.items() if name.startswith("cond_")})
    torch.testing.assert_close(logps, b["sampler_logps"][:, order], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_log_probs_are_those_of_the_normal_distribution(folders, kind):
    policy = opened(folders, kind)
    b = diffusion.denoise(policy, PROMPTS)
    cond = policy.encode(PROMPTS)
    mean, std = policy.moments(b["latents"], b["timesteps"], **cond)
    elements = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(b["next_latents"]).flatten(2)
    torch.testing.assert_close(b["sampler_logps"], elements.mean(-1).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored(opened(folders, kind, reduce="sum"), b), elements.sum(-1), atol=1e-2, rtol=1e-5)
    moments = policy(b["latents"], None, b["timesteps"], **cond)
    assert torch.equal(moments.mean, mean)


def test_an_image_depends_on_its_seed_alone(folders, monkeypatch):
    policy = opened(folders)
    whole = diffusion.denoise(policy, PROMPTS, n=2, seed=1)
    state = torch.get_rng_state()
    alone = diffusion.denoise(policy, PROMPTS, n=2, seed=1, rows=1)
    assert torch.equal(state, torch.get_rng_state())
    for name, x in whole.items():
        torch.testing.assert_close(alone[name], x, atol=1e-5, rtol=1e-5)
    place = SimpleNamespace(process_index=1)
    monkeypatch.setattr(processes, "process", lambda: place)
    second = diffusion.denoise(policy, PROMPTS[1:], n=2, seed=1)
    torch.testing.assert_close(second["images"], whole["images"][2:], atol=1e-5, rtol=1e-5)
    place.process_index = 0
    for other in ({"seed": 2}, {"seed": 1, "step": 1}):
        assert not torch.allclose(diffusion.denoise(policy, PROMPTS, n=2, **other)["images"], whole["images"])
    assert not torch.allclose(whole["images"][0], whole["images"][1])


def test_sampling_leaves_the_mode_and_no_gradient(folders):
    policy = opened(folders).train()
    b = diffusion.denoise(policy, PROMPTS)
    assert policy.training
    assert not any(x.requires_grad for x in b.values())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_other_schedulers_become_ddim(folders, scheduler):
    """With the same betas and spacing: none of them clips."""
    options = {name: SD_SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    options |= {"timestep_spacing": "leading"} | ({"clip_sample": False} if "DD" in scheduler.__name__ else {})
    options |= {"set_alpha_to_one": False} if scheduler is DDIMScheduler else {}
    policy = opened(folders)
    other = with_scheduler(policy, scheduler(**options))
    b = diffusion.denoise(policy, PROMPTS)
    torch.testing.assert_close(scored(other, b), scored(policy, b))


def test_a_last_step_onto_the_data_is_deterministic(folders):
    """As diffusers takes it, from a schedule that ends with alpha 1."""
    options = SD_SCHEDULER | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    policy = with_scheduler(opened(folders), DDIMScheduler(**options))
    b = diffusion.denoise(policy, PROMPTS)
    assert b["mask"][:, :-1].all()
    assert not b["mask"][:, -1].any()
    assert (b["sampler_logps"][:, -1] == 0).all()
    x, times = b["latents"][:, -1], b["timesteps"][:, -1]
    output = policy._guided(x, times, {"cond_prompt": b["cond_prompt"]})
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(policy.denoising.steps)
    expected = scheduler.step(output, int(times[0]), x, eta=1.0).prev_sample
    torch.testing.assert_close(b["next_latents"][:, -1], expected)


def test_a_deterministic_step_has_no_log_prob(folders):
    policy = with_scheduler(opened(folders), DDIMScheduler(**SD_SCHEDULER | {"steps_offset": 0}))
    b = diffusion.denoise(policy, PROMPTS)
    assert b["timesteps"][0].tolist() == [750, 500, 250, 0]
    assert b["mask"].tolist() == [[True, True, True, False]] * 2
    assert b["sampler_logps"][:, 3].tolist() == [0, 0]
    logps = scored(policy, b)
    logps.sum().backward()
    assert logps.isfinite().all()
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    policy.zero_grad()
    scored(policy, {name: x[:, 3:] if name in STEPS else x for name, x in b.items()}).sum().backward()
    assert all(not p.grad.any() for p in policy.parameters())


class Fake(nn.Module):
    """The network of the golden files: W x + a t / 1000 + b mean(c)."""

    dtype = torch.float32
    config = SimpleNamespace(sample_size=(2, 3), in_channels=2, time_cond_proj_dim=None, addition_embed_type=None)

    def __init__(self, W, a, b):
        super().__init__()
        self.W, self.a, self.b = (nn.Parameter(torch.tensor(x)) for x in (W, a, b))

    def forward(self, x, times, encoder_hidden_states, return_dict):
        shift = self.a * times / 1000 + self.b * encoder_hidden_states.mean((1, 2))
        return (torch.einsum("oc,bchw->bohw", self.W, x) + shift[:, None, None, None],)


def golden_losses():
    found = json.loads((GOLDEN / "ddpo_loss.json").read_text())
    return [(found["unet"], case) for case in found["cases"] if case["fn"] == "calculate_loss"]


@pytest.mark.parametrize(("unet", "case"), golden_losses())
def test_the_losses_of_the_release(unet, case):
    """Log-probs, loss and gradient of TRL 0.7.10's DDPO."""
    column = {name: torch.tensor(x) for name, x in case.items() if isinstance(x, list)}
    net = Fake(**unet)
    pipe = SimpleNamespace(unet=net, vae=SimpleNamespace(), vae_scale_factor=8, scheduler=DDIMScheduler(**SD_SCHEDULER))
    pipe.encode_prompt = lambda *_: (column["negative_prompt_embeds"],)  # there one for each row
    guidance = case["sample_guidance_scale"] if case["train_cfg"] else 1.0
    denoising = diffusion.Denoising(steps=20, eta=case["sample_eta"], guidance=guidance)
    policy = Denoiser(net, StableDiffusion(pipe, denoising))
    x, new, times, old = (column[name][:, None] for name in ("latents", "next_latents", "timesteps", "log_probs_old"))
    logps = policy(x, new, times, cond_prompt=column["prompt_embeds"])
    torch.testing.assert_close(logps[:, 0], column["new_log_probs"], rtol=5e-3, atol=0)
    torch.testing.assert_close(logps[:2, 0], column["new_log_probs"][:2], rtol=1e-4, atol=0)
    limit, clip = case["train_adv_clip_max"], case["train_clip_range"]
    advantages = column["advantages"][:, None].clamp(-limit, limit)
    loss = clipped_surrogate(logps, old, advantages, low=clip, high=clip).mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=5e-3)
    for name, expected in case["grads"].items():
        torch.testing.assert_close(getattr(net, name).grad, torch.tensor(expected), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_only_the_network_is_trained(folders, kind, lora):
    policy = opened(folders, kind, lora=lora)
    assert {name.split(".")[0] for name, _ in policy.named_modules()} == {"", "net"}
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    if lora:
        assert trained
        assert all("lora_" in name for name in trained)
        places = {re.search(r"attn\d?\.(.+)\.lora_", name)[1] for name in trained}
        assert places == {"to_q", "to_k", "to_v", "to_out.0"}
    else:
        assert trained == set(dict(policy.named_parameters()))
    own = {id(p) for p in policy.parameters()}
    parts = [part for part in policy.pipe.components.values() if isinstance(part, nn.Module)]
    frozen = [p for part in parts for p in part.parameters() if id(p) not in own]
    assert frozen
    assert not any(p.requires_grad for p in frozen)
    assert not any(part.training for part in parts if part is not policy.net)
    b = diffusion.denoise(policy, PROMPTS)
    scored(policy, b).sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    assert all(p.grad is None for p in frozen)


def disturbed(policy):
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("lora", [0, 2])
def test_a_frozen_reference_stays_as_it_was(folders, lora):
    policy = opened(folders, lora=lora)
    b = diffusion.denoise(policy, PROMPTS)
    before = scored(policy, b).detach()
    ref = diffusion.frozen(policy)
    disturbed(policy)
    after = scored(policy, b).detach()
    assert not torch.allclose(after, before, atol=1e-4)
    cond = {name: x for name, x in b.items() if name.startswith("cond_")}
    torch.testing.assert_close(scored(ref, b).detach(), before)
    torch.testing.assert_close(
        ref(b["latents"], None, b["timesteps"], **cond).mean, ref.moments(b["latents"], b["timesteps"], **cond).mean
    )
    x, times = b["latents"], b["timesteps"]
    assert not torch.allclose(ref.predict(x, times, **cond), policy.predict(x, times, **cond), atol=1e-4)
    torch.testing.assert_close(scored(policy, b).detach(), after)  # its adapter is on again


def test_the_prediction_is_the_networks_own(folders):
    policy = opened(folders)
    x, times, cond = torch.randn(2, 3, 4, 8, 8), torch.tensor([[0, 9, 999], [5, 6, 7]]), policy.encode(PROMPTS)
    output = policy.predict(x, times, **cond)
    expected = policy.net(x[1, 2:], times[1, 2], cond["cond_prompt"][1:], return_dict=False)[0]
    torch.testing.assert_close(output[1, 2:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_saved_pipeline_is_read_back(folders, tmp_path, kind):
    policy = opened(folders, kind)
    disturbed(policy)
    diffusion.save(policy, tmp_path)
    again = opened({kind: tmp_path}, kind)
    b = diffusion.denoise(policy, PROMPTS)
    for name, x in diffusion.denoise(again, PROMPTS).items():
        assert torch.equal(x, b[name])
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    for name, x in getattr(plain, policy.family.trained).state_dict().items():
        assert torch.equal(x, policy.net.state_dict()[name])


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_saved_adapter_is_merged_into_its_base(folders, tmp_path, kind):
    policy = opened(folders, kind, lora=2)
    disturbed(policy)
    diffusion.save(policy, tmp_path / "first")
    assert not list(tmp_path.rglob("vae"))
    b = diffusion.denoise(policy, PROMPTS)
    again = opened({kind: tmp_path / "first"}, kind, lora=2)
    torch.testing.assert_close(scored(again, b), scored(policy, b), atol=1e-5, rtol=1e-5)
    disturbed(again)
    diffusion.save(again, tmp_path / "second")
    third = opened({kind: tmp_path / "second"}, kind)
    torch.testing.assert_close(scored(third, b), scored(again, b), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scored(third, b), scored(policy, b), atol=1e-4)


def test_a_seed_draws_the_adapter(folders):
    weights = [
        [p for name, p in opened(folders, lora=2, seed=seed).named_parameters() if "lora_A" in name]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][0], weights[2][0])


def test_any_peft_config_and_checkpointing(folders):
    from peft import LoraConfig

    config = LoraConfig(r=1, target_modules=["conv1"])
    policy = opened(folders, lora=config).train()
    assert config.base_model_name_or_path is None
    b = diffusion.denoise(policy, PROMPTS)
    scored(policy, b).sum().backward()
    plain = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    policy.zero_grad()
    policy.gradient_checkpointing_enable()
    assert policy.net.is_gradient_checkpointing
    scored(policy, b).sum().backward()
    for p, expected in zip((p for p in policy.parameters() if p.requires_grad), plain):
        torch.testing.assert_close(p.grad, expected)
    with pytest.raises(ValueError, match="every_n_layers"):
        policy.activation_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_half_precision_keeps_latents_and_log_probs_in_full(folders, kind):
    policy = opened(folders, kind, dtype="bfloat16", lora=2)
    assert policy.net.dtype == torch.bfloat16
    b = diffusion.denoise(policy, PROMPTS)
    for name in ("latents", "next_latents", "sampler_logps", "images"):
        assert b[name].dtype == torch.float32
    torch.testing.assert_close(scored(policy, b, steps=1), b["sampler_logps"], atol=1e-4, rtol=1e-4)


def test_guidance_needs_the_negative_prompt_only(folders):
    policy = opened(folders, guidance=1.0)
    assert not policy.family.negative
    x, times, cond = torch.randn(1, 1, 4, 8, 8), torch.tensor([[501]]), policy.encode(PROMPTS[:1])
    other = opened(folders, guidance=3.0, negative="a red circle")
    torch.testing.assert_close(policy.moments(x, times, **cond).mean, other.moments(x, times, **cond).mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"lora": -1}, "lora=-1"),
        ({"resolution": 15}, "resolution=15 must be a multiple of 2"),
    ],
)
def test_wrong_options_are_named(folders, options, message):
    with pytest.raises(ValueError, match=message):
        opened(folders, **options)


def test_wrong_models_are_named(folders, tmp_path):
    for name in (tmp_path / "none", "./none", "none/there", "builtin:none"):
        with pytest.raises(ValueError, match=f"model='{name}'"):
            diffusion.pipeline(name)
    with pytest.raises(ValueError, match="model="):
        diffusion.pipeline(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its base"):
        diffusion.pipeline(tmp_path)
    pipe = opened(folders).pipe
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="a StableDiffusionImg2ImgPipeline cannot be trained"):
        family(other, spec())
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model='.*other': a StableDiffusionImg2ImgPipeline cannot"):
        diffusion.pipeline(tmp_path / "other")


def test_wrong_schedulers_are_named(folders):
    sd, flow = opened(folders), opened(folders, "sd3")
    for policy, scheduler, message in (
        (sd, FlowMatchEulerDiscreteScheduler(), "alphas_cumprod, and FlowMatchEulerDiscreteScheduler has none"),
        (sd, DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "rescale_betas_zero_snr"),
        (sd, DDIMScheduler(prediction_type="flow"), "prediction_type 'flow'"),
        (flow, DDIMScheduler(), "FlowMatchEulerDiscreteScheduler without invert_sigmas, not DDIMScheduler"),
        (flow, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ):
        with pytest.raises(ValueError, match=message):
            with_scheduler(policy, scheduler)


def test_wrong_conditions_and_prompts_are_named(folders):
    policy = opened(folders)
    b = diffusion.denoise(policy, PROMPTS)
    columns = [b[name] for name in STEPS]
    for cond in ({}, {"cond_prompt": b["cond_prompt"], "rewards": torch.zeros(2)}):
        with pytest.raises(TypeError, match=r"reads .*cond_prompt"):
            policy(*columns, **cond)
    for prompts in ([1], [{"text": "a"}], [{"prompt": [{"role": "user"}]}]):
        with pytest.raises(ValueError, match="a prompt must be a string"):
            diffusion.denoise(policy, prompts)
    for prompts, n in ((PROMPTS, 0), ([], 1)):
        with pytest.raises(ValueError, match=f"n={n}"):
            diffusion.denoise(policy, prompts, n=n)


def test_options_that_cannot_act_are_refused(folders):
    for options in ({"negative": "red"}, {"rescale": 0.5}):
        with pytest.raises(ValueError, match="belong to classifier-free guidance"):
            diffusion.pipeline(folders["sd"], denoising=diffusion.Denoising(guidance=1.0, **options))
    with pytest.raises(ValueError, match="steps=61 of denoising do not divide its schedule"):
        diffusion.pipeline("builtin:untrained", denoising=diffusion.Denoising(steps=61))


@pytest.mark.parametrize(("fraction", "steps"), [(1.0, 10), (0.5, 5), (0.39, 3), (0.1, 1)])
def test_a_share_of_the_steps(fraction, steps):
    assert diffusion.Denoising(steps=10).share(fraction) == steps


@pytest.mark.parametrize("fraction", [0, 0.09, 1.1, -1])
def test_a_share_that_is_none(fraction):
    with pytest.raises(ValueError, match="of 10 denoising steps must be at least one and at most all"):
        diffusion.Denoising(steps=10).share(fraction)
