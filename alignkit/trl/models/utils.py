"""Chat formats."""

from dataclasses import dataclass
from typing import Any


@dataclass
class ChatMlSpecialTokens:
    """The special tokens of ChatML, and what follows from them."""

    bos_token: str = "<|im_start|>"
    eos_token: str = "<|im_end|>"
    pad_token: str = "<|im_end|>"

    @property
    def system(self) -> str:
        """How the system's turn begins."""
        return f"{self.bos_token}system"

    @property
    def user(self) -> str:
        """How the user's turn begins."""
        return f"{self.bos_token}user"

    @property
    def assistant(self) -> str:
        """How the assistant's turn begins."""
        return f"{self.bos_token}assistant"

    @property
    def chat_template(self) -> str:
        """The Jinja template that writes messages with a `role` and a `content`."""
        turn = f"'{self.bos_token}' + message['role'] + '\n' + message['content'] + '{self.eos_token}' + '\n'"
        prompt = f"'{self.assistant}\n'"
        return (
            f"{{% for message in messages %}}{{{{{turn}}}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
        )


FORMAT_MAPPING = {"chatml": ChatMlSpecialTokens}


def setup_chat_format(
    model: Any, tokenizer: Any, format: str | None = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Give a tokenizer the special tokens and the template of a chat format, and a model room for the tokens.

    The embedding gets one row per token (rounded up to `resize_to_multiple_of`), and the configs for the model and for
    generation the tokenizer's ids. Both are changed in place and returned. Raises ValueError for an unknown format.
    """
    if format not in FORMAT_MAPPING:
        raise ValueError(f"format={format!r} is not available; use one of {list(FORMAT_MAPPING)}")
    chat = FORMAT_MAPPING[format]()
    tokenizer.add_special_tokens({"additional_special_tokens": [chat.bos_token, chat.eos_token]})
    tokenizer.add_special_tokens({name: getattr(chat, name) for name in ("bos_token", "eos_token", "pad_token")})
    tokenizer.chat_template = chat.chat_template
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return model, tokenizer
