"""Saving what `PPOTrainer` trained, and pushing it to the Hugging Face Hub."""

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, whoami

CARD = """---
library_name: transformers
tags:
- trl
- ppo
- transformers
- reinforcement-learning
- alignkit
---

# {model_name}

A language model fine-tuned with reinforcement learning (proximal policy optimisation), to answer as a reward function,
a reward model or people prefer.

## Usage

```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = {auto}.from_pretrained("{model_id}")
answer = model.generate(**tokenizer("Hello, my llama is cute", return_tensors="pt"))
print(tokenizer.decode(answer[0]))
```

To train on, or to see its values, load it with the value head:

```python
from alignkit.trl import {auto}WithValueHead

model = {auto}WithValueHead.from_pretrained("{model_id}")
logits, loss, values = model(**tokenizer("Hello, my llama is cute", return_tensors="pt"))
```
"""


def create_model_card(trainer: Any, path: str | os.PathLike, model_name: str | None = "TRL Model") -> None:
    """Write `path`/README.md, which names the model "{user}/{path}"; without a user of the Hub, warn instead."""
    try:
        user = whoami()["name"]
    except Exception as error:  # offline, not logged in, or the Hub does not answer: a card is not worth a run
        warnings.warn(f"no model card, as the Hub does not tell the user's name: {error}", stacklevel=3)
        return
    _write_card(trainer, path, model_name, f"{user}/{path}")


def save_pretrained(trainer: Any, save_directory: str | os.PathLike) -> None:
    """Save model with value head, tokenizer and model card; only the main process writes.

    Call it on every process where their weights are split among them, as these are collected first.
    """
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        _save(trainer, save_directory, state)
        create_model_card(trainer, save_directory)


def push_to_hub(
    trainer: Any,
    repo_id: str,
    *,
    commit_message: str = "Push model using alignkit",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    **upload_kwargs: Any,
) -> Any:
    """Upload what `save_pretrained` saves to `repo_id`, made if it does not exist; returns the commit.

    `upload_kwargs` go to `HfApi.upload_folder` (such as `create_pr` and `allow_patterns`). Only the main process
    uploads; the others return None.
    """
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.accelerator.is_main_process:
        return None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        _save(trainer, folder, state)
        _write_card(trainer, folder, repo_id.split("/")[-1], repo_id)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch, **upload_kwargs
        )


def _save(trainer: Any, folder: str | os.PathLike, state: dict[str, Any]) -> None:
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
    trainer.tokenizer.save_pretrained(folder)


def _write_card(trainer: Any, folder: str | os.PathLike, model_name: str | None, model_id: str) -> None:
    auto = "AutoModelForSeq2SeqLM" if trainer.is_encoder_decoder else "AutoModelForCausalLM"
    Path(folder).mkdir(parents=True, exist_ok=True)
    card = CARD.format(model_name=model_name, model_id=model_id, auto=auto)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")
