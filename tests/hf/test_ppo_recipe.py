"""The PPO recipe and what it stands on: value heads, rewards from anywhere, streams with a state."""

import json
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from alignkit import hf
from alignkit.hf.models import ActorCritic, Policy
from alignkit.sampling import Sampling
from alignkit.train import infer
from tests.hf.test_models import rows
from tests.test_layers import ROOT

SHORT = {
    "steps": 3,
    "batch": 2,
    "micro": 1,
    "rollout": 4,
    "epochs": 2,
    "sampling": Sampling(max_new=6),
    "lr": 1e-2,
    "logging_steps": 1,
    "warmup_steps": 0,
}


def run(**options):
    return runpy.run_path(str(ROOT / "recipes" / "ppo.py"))["main"](**{**SHORT, **options})


def logs(out):
    return [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


@pytest.fixture
def prompts(jsonl):
    return str(jsonl([{"prompt": row["prompt"]} for row in hf.reviews(8)]))


@pytest.mark.parametrize("lora", [0, 2])
def test_an_actor_critic_is_a_policy_with_values(folder, lora):
    actor, _ = hf.causal_lm(folder, dtype="float64", lora=lora, value_head=True)
    policy, _ = hf.causal_lm(folder, dtype="float64", lora=lora)
    ids, mask = rows()
    logps, values = actor(ids, mask)
    assert torch.equal(logps, policy(ids, mask))
    assert values.shape == ids.shape
    assert not values.any()  # the head begins at 0
    with torch.no_grad():
        actor.value_head.weight.normal_()
        actor.value_head.bias.fill_(0.5)
    values = actor(ids, mask)[1]
    hidden = actor.lm(input_ids=ids.flatten(0, 1), output_hidden_states=True).hidden_states[-1].unflatten(0, (3, 2))
    read = mask.flip(-1).cummax(-1).values.flip(-1)[..., 1:]  # up to the last True position
    expected = torch.where(read, actor.value_head(hidden[..., :-1, :])[..., 0], 0)
    torch.testing.assert_close(values[..., 1:], expected, atol=1e-12, rtol=0)
    assert not values[..., 0].any()
    later = torch.where(torch.arange(9) >= 5, 3, ids)
    torch.testing.assert_close(actor(later, mask)[1][..., :6], values[..., :6], atol=1e-12, rtol=0)
    assert not torch.allclose(actor(later, mask)[1][..., 6:], values[..., 6:])
    assert all(p.requires_grad for p in actor.value_head.parameters())


def test_values_of_a_model_whose_head_is_more_than_linear():
    from transformers import AutoModelForCausalLM, Gemma2Config

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, **shape)
    actor = ActorCritic(AutoModelForCausalLM.from_config(config).double())
    with torch.no_grad():
        actor.value_head.weight.normal_()
    ids, mask = rows()
    logps, values = actor(ids, mask)
    torch.testing.assert_close(logps, Policy(actor.lm)(ids, mask))
    read = mask.flip(-1).cummax(-1).values.flip(-1)[..., 1:]
    assert values[..., 1:][read].abs().min() > 0
    assert not values[..., 1:][~read].any()


@pytest.mark.parametrize("lora", [0, 2])
def test_the_reference_of_an_actor_is_the_policy_it_was(folder, lora):
    actor, _ = hf.causal_lm(folder, lora=lora, value_head=True)
    ref, (ids, mask) = hf.frozen(actor), rows()
    before = infer(ref, ids, mask)
    assert torch.equal(before, infer(actor, ids, mask)[0])
    with torch.no_grad():
        for parameter in actor.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(infer(ref, ids, mask), before)
    assert not torch.equal(infer(actor, ids, mask)[0], before)


def test_a_value_head_is_saved_beside_the_model_and_read_again(folder, tmp_path):
    actor, tokenizer = hf.causal_lm(folder, value_head=True)
    with torch.no_grad():
        actor.value_head.weight.normal_()
    hf.save(actor, tokenizer, tmp_path)
    again, _ = hf.causal_lm(tmp_path, value_head=True)
    for name, x in actor.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    assert type(hf.causal_lm(tmp_path)[0]) is Policy


@pytest.mark.parametrize("options", [{}, {"lora": 2}, {"bf16": True}], ids=str)
def test_ppo_trains(folder, tmp_path, prompts, options):
    (tmp_path / "even.py").write_text("def even(texts): return [sum(map(ord, t)) % 2 for t in texts]")
    out = tmp_path / "out"
    run(model=str(folder), dataset=prompts, reward=f"{tmp_path}/even.py:even", out=str(out), **options)
    steps = logs(out)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-2 if "bf16" in options else 1e-5)  # the policy is its reference
    assert all(torch.isfinite(torch.tensor(x["loss"])) for x in steps)
    assert load_file(out / "value_head.safetensors")["weight"].abs().max() > 0
    hf.causal_lm(out)


def test_ppo_raises_a_reward_that_is_easy_to_raise(tmp_path, prompts):
    (tmp_path / "vowels.py").write_text("def vowels(texts): return [sum(c in 'aeiou' for c in t) for t in texts]")
    out = tmp_path / "out"
    easy = {"steps": 12, "rollout": 32, "batch": 32, "micro": 32, "epochs": 2, "lr": 1e-2, "kl_coef": 0.0}
    easy["sampling"] = Sampling(max_new=8)
    run(dataset=prompts, reward=f"{tmp_path}/vowels.py:vowels", out=str(out), **easy)
    scores = [x["score"] for x in logs(out)]
    assert scores[-1] > scores[0] + 2


@pytest.mark.parametrize("at", [3, 4, 7])
def test_a_resumed_run_ends_with_the_same_parameters(tmp_path, prompts, at):
    """A rollout is four steps: it stops in the midst of the first, at its end, and before the end of the second."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"dataset": prompts, "steps": 10, "save_strategy": "steps", "save_steps": 1}
    run(out=str(whole), **options)
    shutil.copytree(whole, cut)
    for step in range(at + 1, 11):
        shutil.rmtree(cut / f"checkpoint-{step}")
    run(out=str(cut), resume_from_checkpoint="last", **options)
    for file in ("model.safetensors", "value_head.safetensors"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()
    scores = [(x["step"], x["score"], x["kl"]) for x in logs(whole)]
    assert scores == [(x["step"], x["score"], x["kl"]) for x in logs(cut)]
    (cut / "checkpoint-10" / "stream_0.pt").unlink()
    with pytest.raises(ValueError, match=r"stream_0\.pt is missing"):
        run(out=str(cut), resume_from_checkpoint="last", **{**options, "steps": 12})


def test_rewards_of_functions_and_the_built_in_one(tmp_path, tokenizer):
    policy, _ = hf.causal_lm("builtin:tiny", sampling=Sampling(max_new=5))
    asked = ["Film: A\nReview:", "B"]
    b = hf.sample(policy, tokenizer, asked)
    ids, mask = b["ids"], b["mask"]
    texts = hf.decode(tokenizer, ids, mask)
    file = tmp_path / "my.py"
    file.write_text(
        "def length(texts): return [len(t) for t in texts]\n"
        "def both(texts, prompts): return [len(p) for p in prompts]\n"
        "def short(texts): return [1.0]\n"
        "def bad(texts): return [1.0, float('nan')]\n"
    )
    score = {name: hf.reward_fn(f"{file}:{name}") for name in ("length", "both", "short", "bad")}
    assert score["length"](tokenizer, asked, ids, mask).tolist() == [len(t) for t in texts]
    assert score["both"](tokenizer, asked, ids, mask).tolist() == [15, 1]
    own = hf.reward_fn("builtin:sentiment")(tokenizer, asked, ids, mask)
    torch.testing.assert_close(own, torch.tensor([hf.sentiment(t) for t in texts]))
    with pytest.raises(ValueError, match="returned 1 numbers for 2 answers"):
        score["short"](tokenizer, asked, ids, mask)
    with pytest.raises(ValueError, match="gave nan to the answer"):
        score["bad"](tokenizer, asked, ids, mask)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("builtin:x", "built-in rewards are builtin:sentiment"),
        ("no/such.py:f", "there is no file no/such.py"),
        (f"{__file__}:nothing", "has no function 'nothing'"),
        ("./no/folder", "reward='./no/folder' is neither a folder that exists"),
    ],
)
def test_a_reward_that_is_not_there(reward, message):
    with pytest.raises(ValueError, match=message):
        hf.reward_fn(reward)


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Rollouts are gathered, so controllers, whitening and the order of minibatches are those of all rows."""
    out = tmp_path / "out"
    options = {**SHORT, "batch": 4, "rollout": 8, "steps": 5, "out": out}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "recipes" / "ppo.py")]
    options["max_new"] = options.pop("sampling").max_new
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    subprocess.run(command, check=True)
    states = [torch.load(out / "checkpoint-5" / f"stream_{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert torch.equal(states[0]["kl"].coef, states[1]["kl"].coef)
    for name, x in states[0]["rollout"].items():
        assert torch.equal(x, states[1]["rollout"][name]), name
    assert len(states[0]["rollout"]["ids"]) == 8
