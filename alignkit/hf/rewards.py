"""Where scores of answers come from: a reward model in a folder, a Python function, or the built-in true reward."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignkit.hf.builtin import sentiment
from alignkit.hf.sampling import decode
from alignkit.hf.scorers import reward_model
from alignkit.train import infer

Score = Callable[[Any, Sequence[Any], Int[Tensor, "batch time"], Bool[Tensor, "batch time"]], Float[Tensor, "batch"]]


def reward_fn(reward: str | Path, *, dtype: str = "float32", rows: int = 32) -> Score:
    """`score(tokenizer, prompts, ids, mask) -> [batch]` for answers as `hf.sample` returns them.

    `reward` is "builtin:sentiment"; or `file.py:function`, called with the decoded answers as `function(texts)` or, if
    it has an argument of that name, `function(texts, prompts=...)`, and returning one number for each; or the folder or
    hub id of a reward model, which reads prompt and answer, `rows` at a time. A number that is not finite is refused
    with the answer that got it.
    """
    name = str(reward)
    if name.startswith("builtin:"):
        if name != "builtin:sentiment":
            raise ValueError(f"reward={name!r} is unknown; the built-in reward is 'builtin:sentiment'")
        return _of_texts(lambda texts: [sentiment(text) for text in texts], name)
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return _of_texts(_load(file, function), name)
    return _of_model(name, dtype, rows)


def _of_texts(fn: Callable[..., Sequence[float]], name: str) -> Score:
    takes_prompts = "prompts" in inspect.signature(fn).parameters

    def score(tokenizer: Any, prompts: Sequence[Any], ids: Tensor, mask: Tensor) -> Tensor:
        texts = decode(tokenizer, ids, mask)
        scores = fn(texts, prompts=prompts) if takes_prompts else fn(texts)
        if len(scores) != len(texts):
            raise ValueError(f"reward={name!r} returned {len(scores)} numbers for {len(texts)} answers")
        scores = torch.as_tensor(scores, dtype=torch.float32, device=ids.device)
        for bad in (~scores.isfinite()).nonzero()[:1]:
            raise ValueError(f"reward={name!r} gave {scores[bad].item()} to the answer {texts[bad]!r:.200}")
        return scores

    return score


def _of_model(name: str, dtype: str, rows: int) -> Score:
    try:
        scorer, own = reward_model(name, dtype=dtype)
    except ValueError as error:
        raise ValueError(str(error).replace(f"model={name!r}", f"reward={name!r}", 1)) from error

    def score(tokenizer: Any, prompts: Sequence[Any], ids: Tensor, mask: Tensor) -> Tensor:
        if not tokenizer.get_vocab().items() <= own.get_vocab().items():
            raise ValueError(
                f"reward={name!r} has another tokenizer than the policy: give a reward model of its family"
            )
        return infer(scorer, ids, mask, rows=rows)

    return score


def _load(file: str, function: str) -> Callable[..., Sequence[float]]:
    if not Path(file).is_file():
        raise ValueError(f"reward: there is no file {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward: {file} has no function {function!r}")
    return getattr(module, function)
