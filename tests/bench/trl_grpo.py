"""Optimizer steps of the GRPO family: TRL 1.16's trainers and the recipes, on one model and its answers, in float64.

A recipe runs up to its `hf.fit`, and samples a rollout. TRL's trainer loads the same model, gets the same answers, and
makes of them what it makes of its own: tokens, masks, rewards, advantages, log-probs of the policy and the reference.
The policy then moves, so that ratios are not 1, and both compute the loss of one step in micro-batches.

Not part of the suite, as alignkit never depends on TRL: `make test-bench` installs it and runs this file.
"""

import contextlib
import json
import runpy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from alignkit import conventions, hf, train
from alignkit.losses import policy as losses
from alignkit.masking import masked_sum
from alignkit.sampling import Sampling
from alignkit.weights import row_mean, sequence_mean, token_mean, weigh

RECIPES = Path(__file__).parents[2] / "recipes"
N, ROWS, BETA = 4, 16, 0.3
SAMPLING = Sampling(max_new=10, temperature=0.8, stop=("e", "a"))
PROMPTS = ["Film: The Last Letter\nReview:", "Hm", "The plot was", "I saw it twice, and"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def score(texts: list[str]) -> list[float]:
    return [sum(map(ord, text)) % 9 / 8 for text in texts]


class Float64Head:
    """TRL's kernel of the head computes in float32 whatever it gets: the same in torch."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, temperature: float, *_: Any) -> list[Any]:
        everywhere = (hidden @ weight.T / temperature).log_softmax(-1)
        entropies = -(everywhere.exp() * everywhere).sum(-1)
        return [everywhere.gather(-1, targets[:, None])[:, 0], entropies, None, None, None]


def float64_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def float64_rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None] * self.inv_freq.double()
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes in float32 in models of float64: TRL's head, the rewards, norms, and positions.

    The last matter as TRL pads prompts on the left, and so shifts the positions.
    """
    reward_fn = hf.reward_fn
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head)
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", float64_rotary)
    monkeypatch.setattr(hf, "reward_fn", lambda *names: lambda *columns: reward_fn(*names)(*columns).double())


class Fitted(Exception):
    """The recipe has got to `hf.fit`."""


def recipe(name: str, folder: Path, **options: Any) -> SimpleNamespace:
    """What the recipe gives to `hf.fit`, its policy a little away from the reference, and its first rollout."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    got: dict[str, Any] = {}

    def fit(loss_fn: Any, policy: Any, batches: Any, *, aggregate: Any, state: Any, tokenizer: Any, **_: Any) -> None:
        got.update(loss_fn=loss_fn, policy=policy, aggregate=aggregate, batches=batches, state=state, tok=tokenizer)
        raise Fitted

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Fitted):
        patch.setattr(hf, "fit", fit)
        patch.setattr(hf, "causal_lm", partial(hf.causal_lm, dtype="float64"))
        runpy.run_path(str(RECIPES / f"{name}.py"))["main"](
            dataset=str(folder / "prompts.jsonl"), reward=(score,), out=str(folder / "out"), n=N,
            sampling=SAMPLING, rollout=ROWS, batch=ROWS, micro=ROWS, steps=1, **options,
        )  # fmt: skip
    hf.save(got["policy"], got["tok"], folder / "reference")
    move(got["policy"], seed=1)
    next(got["batches"](0))
    batch = got["state"]["rollout"]
    batch["sampler_logps"] = batch["old_logps"]  # TRL corrects for a sampler only if it is vLLM
    return SimpleNamespace(**got, batch=batch)


@torch.no_grad()
def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def off_policy(ours: SimpleNamespace, trainer: Any) -> None:
    """The same change of both policies, after their rollout."""
    for model in (ours.policy.lm, trainer.model):
        move(model, seed=2)


def trl_rollout(
    ours: SimpleNamespace, folder: Path, cls: Any, micro: int, *rewards: Any, **options: Any
) -> tuple[Any, Any]:
    """TRL's trainer with the recipe's policy, and the columns that it makes of the recipe's answers."""
    config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[cls]
    args = config(
        str(folder / "trl"), num_generations=N, per_device_train_batch_size=micro, use_cpu=True, bf16=False,
        gradient_accumulation_steps=ROWS // micro, num_iterations=2, max_completion_length=SAMPLING.max_new,
        report_to="none", temperature=SAMPLING.temperature, model_init_kwargs={"dtype": torch.float64}, **options,
    )  # fmt: skip
    trainer = cls(
        str(folder / "reference"), [lambda completions, **_: score(completions), *rewards], args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )  # fmt: skip
    trainer.model.load_state_dict(ours.policy.lm.state_dict())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = ROWS // micro
    ids, mask = ours.batch["ids"], ours.batch["mask"]
    answers = [row[kept].tolist() for row, kept in zip(ids, mask)]
    prompts = [{"prompt": ours.tok.decode(row[: kept.int().argmax()])} for row, kept in zip(ids, mask)]
    trainer._generate_single_turn = lambda *_: (answers, None) if cls is GRPOTrainer else answers
    torch.set_default_dtype(torch.float64)
    try:
        return trainer, trainer._generate_and_score_completions(prompts)
    finally:
        torch.set_default_dtype(torch.float32)


def on_answers(column: Tensor, mask: Tensor) -> Tensor:
    """The True positions one after the other: of any padding."""
    return column[mask.bool()]


def same_rollout(ours: SimpleNamespace, theirs: Any) -> None:
    """The same tokens, log-probs and advantages."""
    b, mask = ours.batch, theirs["completion_mask"]
    torch.testing.assert_close(on_answers(b["ids"], b["mask"]), on_answers(theirs["completion_ids"], mask))
    for name in ("old", "ref"):
        if f"{name}_logps" in b and theirs.get(f"{name}_per_token_logps") is not None:
            per_token = theirs[f"{name}_per_token_logps"]
            torch.testing.assert_close(on_answers(b[f"{name}_logps"], b["mask"]), on_answers(per_token, mask), **CLOSE)
    torch.testing.assert_close(b["advantages"].flatten(), theirs["advantages"], **CLOSE)
    assert b["advantages"].abs().max() > 0.1
    assert (theirs["prompt_mask"] == 0).any()
    assert (mask == 0).any()


def step(model: nn.Module, parts: Iterable[Any], loss: Callable[[Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the micro-batches and the gradients of all parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        value = loss(part)
        value.backward()
        total = total + value.detach()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_step(
    ours: SimpleNamespace, trainer: Any, theirs: Any, loss_fn: Any, aggregate: Any, *, micro: int, value: bool = True
) -> None:
    """The same loss (if `value`) and gradients of one step."""
    (batch,) = train.weighted([ours.batch], aggregate)
    train.check_columns(loss_fn, batch)
    loss, grads = step(ours.policy.lm, train.split(batch, micro), lambda part: loss_fn(ours.policy, **part)[0])
    columns = {name: x for name, x in theirs.items() if isinstance(x, Tensor) and name != "num_items_in_batch"}
    whole = {name: theirs[name] for name in theirs.keys() - columns.keys()}
    # RLOOTrainer leaves it to the Trainer to divide by the number of micro-batches
    share = micro / ROWS if isinstance(trainer, RLOOTrainer) else 1.0
    their_loss, their_grads = step(
        trainer.model,
        train.split(columns, micro),
        lambda part: trainer.compute_loss(trainer.model, part | whole) * share,
    )
    if value:
        torch.testing.assert_close(loss, their_loss, **CLOSE)
    assert max(grad.abs().max() for grad in grads.values()) > 1e-3
    torch.testing.assert_close(grads, their_grads, **CLOSE)


CLIP = {"low": 0.1, "high": 0.15}
EPSILON = {"epsilon": 0.1, "epsilon_high": 0.15}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # recipe: its options, TRL's options
    "grpo": ({"beta": BETA}, {"loss_type": "grpo", "beta": BETA, "use_bias_correction_kl": False, **EPSILON}),
    "dr_grpo": ({}, {"loss_type": "dr_grpo", "scale_rewards": "none", **EPSILON}),
    "gspo": ({}, {"loss_type": "grpo", "importance_sampling_level": "sequence", **EPSILON}),
    "dapo": ({}, {"loss_type": "dapo", **EPSILON}),
    "cispo": ({}, {"loss_type": "cispo", "epsilon_high": 1.15}),
}


@pytest.mark.parametrize("micro", [ROWS, N])
@pytest.mark.parametrize("name", CASES)
def test_recipe(name: str, micro: int, tmp_path: Path) -> None:
    """The recipe's own loss, aggregation and advantages; the clip range is one at which some tokens are clipped."""
    options, settings = CASES[name]
    ours = recipe(name, tmp_path, **options)
    rewards = [get_soft_overlong_punishment(SAMPLING.max_new, SAMPLING.max_new // 5)] * (name == "dapo")
    ours.loss_fn.__globals__["CLIP"] = {"low": 0.0, "high": 1.15} if name == "cispo" else CLIP
    trainer, theirs = trl_rollout(ours, tmp_path, GRPOTrainer, micro, *rewards, **settings)
    same_rollout(ours, theirs)
    off_policy(ours, trainer)
    same_step(ours, trainer, theirs, ours.loss_fn, ours.aggregate, micro=micro)


# TRL's other conventions, from alignkit's primitives


def other_loss(per_token: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """A recipe's `loss_fn` of another formula of (logps, batch), already summed or weighed."""

    def loss_fn(policy: Any, ids: Tensor, mask: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return per_token(policy(ids, mask), SimpleNamespace(mask=mask, **batch)), {}

    return loss_fn


def corrected_kl(logps: Tensor, b: Any) -> Tensor:
    """The KL times the ratio: TRL's default, and the convention of the recipe without."""
    penalty = conventions.KL_IN_LOSS["trl-1.16"](logps, b.old_logps, b.ref_logps)
    return weigh(losses.clipped_surrogate(logps, b.old_logps, b.advantages, **CLIP) + BETA * penalty, b.weights)


def clipped(logps: Tensor, b: Any) -> Tensor:
    return weigh(losses.clipped_surrogate(logps, b.old_logps, b.advantages, **CLIP), b.weights)


OTHERS: dict[str, tuple[Callable[..., Tensor], Any, str, dict[str, Any], int]] = {
    # name: formula, aggregation, advantages in alignkit.conventions, TRL's options, rows of a micro-batch
    "corrected KL": (corrected_kl, sequence_mean, "trl-1.16", {"loss_type": "grpo", "beta": BETA}, N),
    "scaled by the batch": (
        clipped, sequence_mean, "trl-1.16 scale_rewards=batch", {"loss_type": "grpo", "scale_rewards": "batch"}, N
    ),
    # the mean over the tokens of each micro-batch, so that a step is one
    "bnpo": (clipped, token_mean, "trl-1.16", {"loss_type": "bnpo"}, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_conventions_of_grpo(name: str, tmp_path: Path) -> None:
    formula, aggregate, advantages, settings, micro = OTHERS[name]
    ours = recipe("grpo", tmp_path, beta=BETA)
    ours.batch["advantages"] = conventions.ADVANTAGE[advantages](ours.batch["rewards"].view(-1, N)).view(-1, 1)
    trainer, theirs = trl_rollout(ours, tmp_path, GRPOTrainer, micro, **EPSILON, **settings)
    same_rollout(ours, theirs)
    off_policy(ours, trainer)
    same_step(ours, trainer, theirs, other_loss(formula), aggregate, micro=micro)


@pytest.mark.parametrize("micro", [ROWS, N])
def test_rloo_on_policy(micro: int, tmp_path: Path) -> None:
    """The recipe is REINFORCE, TRL's loss the ratio of the answer: the same gradient where the ratio is 1."""
    ours = recipe("rloo", tmp_path, beta=BETA)
    trainer, theirs = trl_rollout(ours, tmp_path, RLOOTrainer, micro, beta=BETA)
    same_rollout(ours, theirs)
    same_step(ours, trainer, theirs, ours.loss_fn, ours.aggregate, micro=micro, value=False)


def test_rloo_off_policy(tmp_path: Path) -> None:
    """TRL's convention, the clipped ratio of the whole answer."""

    def formula(logps: Tensor, b: Any) -> Tensor:
        answers, old = masked_sum(logps, b.mask, -1), masked_sum(b.old_logps, b.mask, -1)
        return weigh(losses.clipped_surrogate(answers, old, b.advantages[:, 0], **CLIP), b.weights)

    ours = recipe("rloo", tmp_path, beta=BETA)
    trainer, theirs = trl_rollout(ours, tmp_path, RLOOTrainer, N, beta=BETA, **EPSILON)
    same_rollout(ours, theirs)
    off_policy(ours, trainer)
    same_step(ours, trainer, theirs, other_loss(formula), row_mean, micro=N)
