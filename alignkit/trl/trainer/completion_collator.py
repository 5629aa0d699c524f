"""Batches of texts for language modelling: the labels of all tokens, or of the answers alone."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling

from alignkit.trl.trainer.checks import check_padding


class TextCollator(DataCollatorForLanguageModeling):
    """Padded batches of the columns that a model reads; rows that have `labels` keep them."""

    def torch_call(self, examples: list[Any]) -> Any:
        """The language-modelling batch of `examples`, `labels` padded with -100."""
        if not isinstance(examples[0], Mapping):
            return super().torch_call(examples)
        check_padding(self.tokenizer)
        names = {*self.tokenizer.model_input_names, "special_tokens_mask"}
        batch = super().torch_call([{name: row[name] for name in row if name in names} for row in examples])
        if "labels" in examples[0]:
            labels = [torch.as_tensor(row["labels"]) for row in examples]
            side = self.tokenizer.padding_side
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100, padding_side=side)
        return batch


class DataCollatorForCompletionOnlyLM(TextCollator):
    """Padded batches whose `labels` are `ignore_index` at every token that is not part of an answer.

    Without `instruction_template` the answer is what follows the last `response_template` of a row; with it, whatever
    lies between the end of a `response_template` and the next template, any number of times. Templates are texts or
    token ids. A row without one of them is ignored, with a warning. Raises ValueError for an empty template and for
    `mlm=True`.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = -100,
        **kwargs: Any,
    ):
        if mlm:
            raise ValueError("mlm is True, but must be False: answers are trained on as continuations")
        super().__init__(*args, mlm=False, **kwargs)
        self.response_template, self.instruction_template = response_template, instruction_template
        self.response_token_ids = self._encode("response_template", response_template)
        self.instruction_token_ids = None
        self.ignore_index = ignore_index
        if instruction_template is not None:
            self.instruction_token_ids = self._encode("instruction_template", instruction_template)
            if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
                warnings.warn(
                    "The tokenizer's pad_token_id and eos_token_id are identical: as padding is ignored, the model is "
                    "never trained to end an answer. Set the pad_token_id to another token.",
                    stacklevel=2,
                )

    def torch_call(self, examples: list[Any]) -> Any:
        """The language-modelling batch of `examples` with the `labels` of answers."""
        bare = [{k: row[k] for k in row if k != "labels"} if isinstance(row, Mapping) else row for row in examples]
        batch = super().torch_call(bare)
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            labels[~self._answers(ids)] = self.ignore_index
        return batch

    def numpy_call(self, examples: list[Any]) -> Any:
        """`torch_call` as arrays."""
        return {name: column.numpy() for name, column in self.torch_call(examples).items()}

    def _encode(self, name: str, template: str | Sequence[int]) -> list[int]:
        encode = self.tokenizer.encode
        ids = encode(template, add_special_tokens=False) if isinstance(template, str) else list(template)
        if not ids:
            raise ValueError(f"{name}={template!r} has no tokens")
        return ids

    def _answers(self, ids: Tensor) -> Tensor:
        """Which tokens of a row belong to answers."""
        answers = torch.zeros(len(ids), dtype=torch.bool)
        starts = {"response": _find(self.response_token_ids, ids)}
        if self.instruction_token_ids is None:
            starts["response"] = starts["response"][-1:]
        else:  # where there is no answer, the release reports questions as missing, too
            starts["instruction"] = _find(self.instruction_token_ids, ids) if starts["response"] else []
        for key in starts:
            if not starts[key]:
                self._warn(key, ids)
        if all(starts.values()):
            turns = sorted(chain(*starts.values()))
            for start in starts["response"]:
                end = start + len(self.response_token_ids)
                answers[end : next((turn for turn in turns if turn >= end), len(ids))] = True
        return answers

    def _warn(self, key: str, ids: Tensor) -> None:
        warnings.warn(
            f"Could not find {key} key `{getattr(self, f'{key}_template')}` in the following instance: "
            f"{self.tokenizer.decode(ids)} This instance will be ignored in loss calculation. Note, if this happens "
            "often, consider increasing the `max_seq_length`.",
            stacklevel=2,
        )


def _find(template: list[int], ids: Tensor) -> list[int]:
    """Where in a row the template starts."""
    row, size = ids.tolist(), len(template)
    return [i for i in range(len(row) - size + 1) if row[i : i + size] == template]
