"""`PPOTrainer` and `recipes/ppo.py`, started from one model, end with equal parameters."""

import json
import runpy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignkit import hf
from alignkit.sampling import Sampling
from alignkit.trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead
from alignkit.trl.trainer.ppo_config import PPOConfig
from alignkit.trl.trainer.ppo_trainer import PPOTrainer
from tests.test_layers import ROOT

ROWS, EPOCHS, ROLLOUTS, LR, MAX_NEW = 8, 2, 2, 0.5, 8


def by_recipe(model, data, out):
    runpy.run_path(str(ROOT / "recipes" / "ppo.py"))["main"](
        model=str(model),
        dataset=str(data),
        sampling=Sampling(max_new=MAX_NEW),
        rollout=ROWS,
        epochs=EPOCHS,
        batch=ROWS,
        micro=2,
        steps=EPOCHS * ROLLOUTS,
        lr=LR,
        out=str(out),
        optim="sgd",
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0.5,
    )
    return load_file(out / "model.safetensors"), load_file(out / "value_head.safetensors")


def by_trainer(folder, prompts):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    with torch.no_grad():
        model.v_head.summary.weight.zero_()
        model.v_head.summary.bias.zero_()
    tokenizer = hf.causal_lm("builtin:tiny")[1]
    config = PPOConfig(batch_size=ROWS, mini_batch_size=ROWS, ppo_epochs=EPOCHS, max_grad_norm=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = PPOTrainer(config, model, None, tokenizer, optimizer=optimizer)
    policy = hf.Policy(trainer.model.pretrained_model, Sampling(max_new=MAX_NEW))
    score = hf.reward_fn("builtin:sentiment")
    for i in range(ROLLOUTS):
        x = next(hf.shuffled(prompts, batch=ROWS, seed=0, start=i))
        b = hf.sample(policy, tokenizer, x, seed=0, step=i)
        ids, mask = b["ids"], b["mask"]
        ends = mask.int().argmax(-1)
        queries = [row[:n] for row, n in zip(ids, ends)]
        responses = [row[keep] for row, keep in zip(ids, mask)]
        trainer.step(queries, responses, list(score(tokenizer, x, ids, mask)))
    return trainer.model.pretrained_model.state_dict(), trainer.model.v_head.summary.state_dict()


@pytest.mark.filterwarnings("ignore:No dataset is provided")
def test_equal_parameters(tmp_path):
    prompts = [row["prompt"] for row in hf.reviews(16)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in prompts))
    policy, tokenizer = hf.causal_lm("builtin:tiny")
    hf.save(policy, tokenizer, tmp_path / "model")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    model, head = by_recipe(tmp_path / "model", data, tmp_path / "out")
    theirs, their_head = by_trainer(tmp_path / "model", prompts)
    moved = 0.0
    for name, x in model.items():
        torch.testing.assert_close(x, theirs[name], atol=2e-6, rtol=0)
        moved = max(moved, (x - start[name]).abs().max().item())
    for name, x in head.items():
        torch.testing.assert_close(x, their_head[name], atol=2e-6, rtol=0)
    assert moved > 1e-3
