"""A plain PyTorch loop: padded rows, full logits, `generate`. `best` replaces what it computes log-probs with."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.side import Clock, Job, nudge, reward
from benchmarks.workloads import BETA, CLIP, LR, ON_POLICY

Trees = list[dict[str, Any]]


class Scores(NamedTuple):
    """Log-probs of all completions' tokens, one completion after the other, and which completion each is of."""

    logps: Tensor
    row: Tensor

    def sums(self) -> Tensor:
        """Of each completion."""
        return self.logps.new_zeros(int(self.row[-1]) + 1).index_add(0, self.row, self.logps)


class Naive:
    """Rows of prompt and completion, padded."""

    def logps(self, model: Any, trees: Trees) -> Scores:
        """log_softmax of the logits of every position."""
        ids, attention, scored = self._padded(model, trees)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return Scores(logps[scored[:, 1:]], scored[:, 1:].nonzero()[:, 0])

    def rewards(self, model: Any, trees: Trees) -> Tensor:
        """The classifier's own logit of each row."""
        ids, attention, _ = self._padded(model, trees)
        return model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, 0]

    def sample(self, model: Any, prompts: list[list[int]], n: int, new: int) -> Trees:
        """`generate`, with prompts of one length."""
        ids = torch.tensor(prompts, device=model.device).repeat_interleave(n, 0)
        options = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()
        return [{"prompt": prompt, "completions": out[i * n : (i + 1) * n]} for i, prompt in enumerate(prompts)]

    def _padded(self, model: Any, trees: Trees) -> tuple[Tensor, Tensor, Tensor]:
        pairs = [(tree["prompt"], answer) for tree in trees for answer in tree["completions"]]
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        scored = [torch.tensor([False] * len(prompt) + [True] * len(answer)) for prompt, answer in pairs]
        columns = (ids, [torch.ones_like(x) for x in ids], scored)
        return tuple(pad_sequence(x, batch_first=True).to(model.device) for x in columns)


def load(job: Job) -> Callable[[Job, Clock], None]:
    """The loop."""
    return lambda job, clock: run(job, clock, Naive())


def run(job: Job, clock: Clock, maths: Any) -> None:
    """AdamW, a constant rate, gradients clipped to norm 1."""
    torch.manual_seed(job.seed)
    auto = AutoModelForSequenceClassification if job.workload.kind == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(job.folder, dtype=torch.float32).to(job.device)
    kind, precomputed, batches = job.workload.kind, job.workload.precomputed, job.batches()
    ref = copy.deepcopy(model).requires_grad_(False).eval() if kind in ("dpo", *ON_POLICY) and not precomputed else None
    before = [_reference(maths, model, trees) for trees in batches] if precomputed else None
    if kind in ("dpo", *ON_POLICY):
        nudge(model, job.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    clock.tick()
    for i, trees in enumerate(batches):
        with torch.autocast(job.device, dtype=torch.bfloat16) if job.bf16 else nullcontext():
            if kind in ON_POLICY:
                loss = _on_policy_loss(job, maths, model, ref, trees)
            elif kind == "dpo":
                ratios = maths.logps(model, trees).sums() - (before[i] if before else _reference(maths, ref, trees))
                loss = -logsigmoid(BETA["dpo"] * (ratios[0::2] - ratios[1::2])).mean()
            elif kind == "reward":
                scores = maths.rewards(model, trees)
                loss = -logsigmoid(scores[0::2] - scores[1::2]).mean()
            else:
                loss = -maths.logps(model, trees).logps.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.see(loss, norm)
        clock.tick()


@torch.no_grad()
def _reference(maths: Any, model: Any, trees: Trees) -> Tensor:
    return maths.logps(model, trees).sums()


def _on_policy_loss(job: Job, maths: Any, model: Any, ref: Any, trees: Trees) -> Tensor:
    shape, kind = job.workload.shape, job.workload.kind
    old = None
    with torch.no_grad():
        if not job.check:
            trees = maths.sample(model, [tree["prompt"] for tree in trees], shape.group, shape.completion)
        elif kind in ON_POLICY:
            old = maths.logps(model, trees).logps
            nudge(model, job.seed + 1)
        ref_logps = maths.logps(ref, trees).logps
    answers = [ids for tree in trees for ids in tree["completions"]]
    rewards = torch.tensor(reward(answers, shape.vocab), device=job.device)
    scores = maths.logps(model, trees)
    old = scores.logps.detach() if old is None else old  # one step on each rollout: they are the same
    if kind == "rloo":
        grouped = (rewards - BETA[kind] * Scores(old - ref_logps, scores.row).sums()).view(-1, shape.group)
        advantages = (grouped - (grouped.sum(-1, keepdim=True) - grouped) / (shape.group - 1)).flatten()
        return -_clipped((scores.sums() - Scores(old, scores.row).sums()).exp(), advantages).mean()
    grouped = rewards.view(-1, shape.group)
    spread = grouped.std(-1, keepdim=True) + 1e-4
    advantages = ((grouped - grouped.mean(-1, keepdim=True)) / spread).flatten()
    gap = ref_logps - scores.logps
    per_token = BETA[kind] * (gap.exp() - gap - 1) - _clipped((scores.logps - old).exp(), advantages[scores.row])
    lengths = scores.row.bincount()
    return (per_token / lengths[scores.row]).sum() / len(lengths)


def _clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
