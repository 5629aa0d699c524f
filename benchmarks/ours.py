"""alignkit as a user has it: the recipes themselves, given rows of token ids in order."""

import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.side import Clock, Job, nudge, reward
from benchmarks.workloads import BETA, CLIP, LR, ON_POLICY

RECIPES = Path(__file__).parents[1] / "recipes"


def load(job: Job) -> Callable[[Job, Clock], None]:
    """Import alignkit and the recipe."""
    return partial(run, runpy.run_path(str(RECIPES / f"{job.workload.kind}.py"))["main"])


def run(main: Callable[..., None], job: Job, clock: Clock) -> None:
    """Run the recipe with its dataset replaced, the clock among its callbacks, and a policy nudged before `hf.fit`."""
    from alignkit import data, hf
    from alignkit.sampling import Sampling

    kind, shape, fit = job.workload.kind, job.workload.shape, hf.fit
    options: dict[str, Any] = {"batch": shape.batch, "micro": shape.batch, "steps": job.steps, "lr": LR}
    if kind == "dpo":
        options |= {"beta": BETA[kind], "precompute": job.workload.precomputed}
    if kind in ON_POLICY:
        sampling = Sampling(max_new=shape.completion)
        options |= {"beta": BETA[kind], "n": shape.group, "rollout": shape.batch, "sampling": sampling}
        options["reward"] = (lambda texts, ids: reward(ids, shape.vocab),)

    def in_order(rows: Any, *, batch: int, seed: int, start: int = 0) -> Iterator[dict[str, Any]]:
        return (data.collate([rows[j] for j in range(i, i + batch)]) for i in range(start * batch, len(rows), batch))

    def timed_fit(loss_fn: Any, model: Any, *rest: Any, **more: Any) -> None:
        if kind not in ("sft", "reward"):
            nudge(model, job.seed)
        if job.check:
            given(job, model)
        loss_fn = ratio_of_answers if kind == "rloo" else loss_fn
        # a short run would show its answers at every step
        fit(loss_fn, model, *rest, **more, samples=0 if kind in ON_POLICY else None, callbacks=[clock.callback()])

    prompts = [{"prompt": tree["prompt"]} for tree in (job.batches()[0] if job.check else job.trees())]
    hf.stream, hf.fit, hf.save, hf.prompts = in_order, timed_fit, lambda *_: None, lambda *_: prompts
    hf.text = hf.pairs = lambda *_, **__: rows(job)
    main(model=str(job.folder), seed=job.seed, out=str(job.folder / "ours"), **options, **job.training())


def rows(job: Job) -> list[dict[str, Any]]:
    """`ids` and `mask`; of pairs [2, T]."""
    out = []
    for tree in job.trees():
        prompt, answers = tree["prompt"], tree["completions"]
        ids = [prompt + answer for answer in answers]
        mask = [[False] * len(prompt) + [True] * len(answer) for answer in answers]
        out.append({"ids": ids, "mask": mask} if len(ids) > 1 else {"ids": ids[0], "mask": mask[0]})
    return out


def ratio_of_answers(policy, ids, mask, old_logps, advantages, weights, tokens, rows, **seen):
    """TRL's loss of RLOO, the clipped ratio of whole answers; the recipe's has the same gradient where that is 1."""
    from alignkit.losses.policy import clipped_surrogate
    from alignkit.masking import masked_sum
    from alignkit.monitors import policy_metrics
    from alignkit.weights import weigh

    logps = policy(ids, mask)
    sums = masked_sum(logps, mask, -1), masked_sum(old_logps, mask, -1)
    loss = clipped_surrogate(*sums, advantages[:, 0], low=CLIP, high=CLIP)
    return weigh(loss, rows), policy_metrics(logps, old_logps, advantages, mask, tokens, rows, **seen)


def given(job: Job, model: Any) -> None:
    """Let `hf.rollout` get the trees' completions for its samples; the weights move after the rollout."""
    from alignkit import hf
    from alignkit.hf import rollouts
    from alignkit.hf.sampling import Answer, columns

    answers = {tuple(tree["prompt"]): tree["completions"] for tree in job.batches()[0]}
    collect = hf.rollout

    def sample(policy: Any, tokenizer: Any, prompts: Any, **_: Any) -> Any:
        pairs = [(row["prompt"], ids) for row in prompts for ids in answers[tuple(row["prompt"])]]
        return columns([prompt for prompt, _ in pairs], [Answer(ids, None, True) for _, ids in pairs])

    def then_nudged(*args: Any, **options: Any) -> Any:
        out = collect(*args, **options)
        nudge(model, job.seed + 1)
        return out

    rollouts.sample, hf.rollout = sample, then_nudged
