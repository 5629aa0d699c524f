"""TRL: its trainers on the same token ids, with the settings of its own that are fastest for the same maths."""

import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks.side import Clock, Job, nudge, reward
from benchmarks.workloads import BETA, CLIP, LR, ON_POLICY

NAMES = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
SAME_MATHS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "loss_type": "nll"},
    "dpo": {"max_length": None, "beta": BETA["dpo"], "loss_type": ["sigmoid"]},
    "reward": {"max_length": None},
    # the recipe's aggregation and its KL, which is not multiplied by the ratio
    "grpo": {"loss_type": "grpo", "beta": BETA["grpo"], "epsilon": CLIP, "use_bias_correction_kl": False},
    "rloo": {"beta": BETA["rloo"], "epsilon": CLIP, "normalize_advantages": False},
}


def load(job: Job) -> Callable[[Job, Clock], None]:
    """Import the trainer."""
    import trl

    name = NAMES[job.workload.kind]
    classes = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    return lambda job, clock: run(job, clock, *classes)


def run(job: Job, clock: Clock, trainer_class: Any, config: Any) -> None:
    """Train."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    kind, shape = job.workload.kind, job.workload.shape
    fields = job.training() | SAME_MATHS[kind] | {"model_init_kwargs": {"dtype": "float32"}}
    fields["use_liger_kernel"] = job.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if kind in ON_POLICY:
        fields |= {"num_generations": shape.group, "max_completion_length": shape.completion, "shuffle_dataset": False}
        fields |= {"num_iterations": 2} if job.check and kind == "grpo" else {}  # so that it keeps the old log-probs
    else:
        fields["train_sampling_strategy"] = "sequential"
    if kind == "dpo":
        fields["precompute_ref_log_probs"] = job.workload.precomputed
        trainer_class._prepare_dataset = lambda self, dataset, *_: dataset  # which has its token ids already
    args = config(
        str(job.folder / "trl"), max_steps=job.steps, learning_rate=LR, seed=job.seed,
        per_device_train_batch_size=shape.batch, gradient_accumulation_steps=1, **fields,
    )  # fmt: skip
    rewards = {"reward_funcs": [lambda completion_ids, **_: reward(completion_ids, shape.vocab)]}
    trainer = trainer_class(
        str(job.folder), args=args, train_dataset=Dataset.from_list([ROW[kind](tree) for tree in job.trees()]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(job.folder), callbacks=[clock.callback()],
        **(rewards if kind in ON_POLICY else {}),
    )  # fmt: skip
    if kind in ("dpo", *ON_POLICY):
        nudge(trainer.model, job.seed)
    if job.check and kind in ON_POLICY:
        given(job, trainer)
    trainer.train()


def given(job: Job, trainer: Any) -> None:
    """The trees' completions instead of samples, and weights that move after the rollout."""
    answers = [ids for tree in job.batches()[0] for ids in tree["completions"]]
    score = trainer._generate_and_score_completions
    trainer._generate_single_turn = lambda *_: (answers, None) if job.workload.kind == "grpo" else answers

    def then_nudged(inputs: Any) -> Any:
        out = score(inputs)
        nudge(trainer.model, job.seed + 1)
        return out

    trainer._generate_and_score_completions = then_nudged


def _sft(tree: dict[str, Any]) -> dict[str, Any]:
    prompt, answer = tree["prompt"], tree["completions"][0]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def _dpo(tree: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = tree["completions"]
    return {"prompt_ids": tree["prompt"], "chosen_ids": chosen, "rejected_ids": rejected}


def _reward(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_ids": tree["prompt"] + ids for name, ids in zip(("chosen", "rejected"), tree["completions"])}


def _prompt(tree: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": " ".join(map(str, tree["prompt"]))}


ROW = {"sft": _sft, "dpo": _dpo, "reward": _reward, "grpo": _prompt, "rloo": _prompt}
