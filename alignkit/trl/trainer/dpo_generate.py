"""Answers of policy and reference to a few prompts of an evaluation."""

import json
import random
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from alignkit.train import evaluating

HEADER = ("Prompt", "Policy", "Ref Model")
FILE = "game_log.jsonl"


def samples(trainer: Any, model: Any, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Texts sampled from `model` and from the reference for the prompts of a batch, prompt included."""

    def generate(source: Any) -> Any:
        source = trainer.accelerator.unwrap_model(source)
        with evaluating(source), trainer.accelerator.autocast():
            return source.generate(
                input_ids=batch["prompt_input_ids"],
                attention_mask=batch["prompt_attention_mask"],
                max_length=trainer.max_length,
                do_sample=True,
                pad_token_id=trainer.tokenizer.pad_token_id,
            )

    policy = generate(model)
    if "reference_output" in batch:
        reference = batch["reference_output"]
    elif trainer.ref_model is not None:
        reference = generate(trainer.ref_model)
    else:
        with trainer.null_ref_context():
            reference = generate(trainer.model)
    return _texts(trainer, policy), _texts(trainer, reference)


def log_samples(trainer: Any, dataset: Any) -> None:
    """Sample answers to the prompts of one random batch of a dataset, and show them to the trackers.

    Weights & Biases gets a table and TensorBoard text; where there is neither, a line of `game_log.jsonl` in
    `output_dir` per prompt.
    """
    size = trainer.args.eval_batch_size
    if hasattr(dataset, "__len__"):
        rows = [dataset[i] for i in random.sample(range(len(dataset)), min(size, len(dataset)))]
    else:
        rows = list(islice(dataset, size))
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    answers = trainer.get_batch_samples(trainer.model, batch)
    if not trainer.is_world_process_zero():
        return
    prompts = [""] * len(rows) if trainer.is_encoder_decoder else _texts(trainer, batch["prompt_input_ids"])
    policy, reference = ([x.removeprefix(p) for p, x in zip(prompts, texts)] for texts in answers)
    _show(trainer, [list(row) for row in zip((row["prompt"] for row in rows), policy, reference)])


def _show(trainer: Any, table: list[list[str]]) -> None:
    shown = False
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback):
            value = callback._wandb.Table(columns=list(HEADER), data=table)
        elif isinstance(callback, TensorBoardCallback):
            value = "\n\n---\n\n".join("\n\n".join(f"**{h}** {x}" for h, x in zip(HEADER, row)) for row in table)
        else:
            continue
        callback.on_log(trainer.args, trainer.state, trainer.control, logs={"game_log": value}, model=trainer.model)
        shown = True
    if not shown:
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as lines:
            for row in table:
                record = {"step": trainer.state.global_step, **dict(zip(HEADER, row))}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def _texts(trainer: Any, ids: Any) -> list[str]:
    return trainer.tokenizer.batch_decode(ids, skip_special_tokens=True)
