"""Conversations and instructions as text, by the chat template of a tokenizer."""

from collections.abc import Callable, Mapping
from typing import Any


def conversations_formatting_function(tokenizer: Any, messages_field: str) -> Callable[[Any], Any]:
    """A function from an example to its text, or from a batch of examples to their texts.

    The column `messages_field` holds conversations: lists of messages with a `role` and a `content`.
    """

    def format_dataset(examples: Any) -> Any:
        return _apply(tokenizer, examples[messages_field])

    return format_dataset


def instructions_formatting_function(tokenizer: Any) -> Callable[[Any], Any]:
    """The same for the columns `prompt`, what the user says, and `completion`, what the assistant answers."""

    def format_dataset(examples: Any) -> Any:
        prompts, completions = examples["prompt"], examples["completion"]
        if isinstance(prompts, str):
            return _apply(tokenizer, _turns(prompts, completions))
        return _apply(tokenizer, [_turns(*pair) for pair in zip(prompts, completions, strict=True)])

    return format_dataset


def get_formatting_func_from_dataset(dataset: Any, tokenizer: Any) -> Callable[[Any], Any] | None:
    """The function for what the columns of a dataset hold, None if it is neither of these.

    Conversations are a column `messages` or `conversations` of lists of {role, content}, both strings; instructions are
    the columns `prompt` and `completion`, strings, and no other.
    """
    features = getattr(dataset, "features", None) or {}
    for field in ("messages", "conversations"):
        if _strings(getattr(features.get(field), "feature", None), {"role", "content"}):
            return conversations_formatting_function(tokenizer, field)
    return instructions_formatting_function(tokenizer) if _strings(features, {"prompt", "completion"}) else None


def _turns(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _apply(tokenizer: Any, conversations: Any) -> Any:
    """Text of one conversation, or the list of those of several."""
    if conversations and isinstance(conversations[0], Mapping):
        return tokenizer.apply_chat_template(conversations, tokenize=False)
    return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]


def _strings(features: Any, names: set[str]) -> bool:
    """Whether these are features of these names, all of them strings."""
    return (
        isinstance(features, Mapping)
        and set(features) == names
        and all(getattr(feature, "dtype", None) in ("string", "large_string") for feature in features.values())
    )
