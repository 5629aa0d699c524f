"""The embedded default: `builtin:tiny`, a model of 0.8 M parameters, and `builtin:reviews`, a world of known reward.

A seeded grammar writes short film reviews; the true reward of a text is its `sentiment`, and preferences between two
reviews of one film are drawn from the Bradley-Terry model of that reward. Nothing is downloaded, nothing is stored.
"""

import math
import random
import re
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIVE = ["superb", "moving", "brilliant", "charming", "gripping", "elegant", "warm", "clever", "joyful", "stunning"]
NEGATIVE = ["dull", "clumsy", "tedious", "hollow", "messy", "bland", "lazy", "forgettable", "dreary", "painful"]
SUBJECTS = [
    "The acting",
    "The plot",
    "The pacing",
    "The music",
    "The dialogue",
    "The ending",
    "The script",
    "The sets",
]
VERBS = ["was", "felt", "seemed", "stayed", "looked"]
DEGREES = ["", "truly ", "rather ", "often ", "deeply ", "oddly "]
NEUTRAL = ["It runs for two hours.", "We saw it on a rainy day.", "It is set in a town.", "I read the book first."]
TITLES = ["Silent", "Golden", "Broken", "Distant", "Hidden", "Crimson", "Frozen", "Last", "Secret", "Endless"]
PLACES = ["Harbour", "Garden", "Empire", "River", "Mirror", "Winter", "Letter", "Station", "Promise", "Orchard"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentiment(text: str) -> float:
    """(positive - negative) / (positive + negative) words of the text, in [-1, 1]; 0 if it has neither."""
    words = re.findall(r"[a-z]+", text.lower())
    good, bad = sum(word in POSITIVE for word in words), sum(word in NEGATIVE for word in words)
    return (good - bad) / max(good + bad, 1)


def reviews(n: int = 4096, *, seed: int = 0, sharpness: float = 4.0) -> list[dict[str, str]]:
    """`n` rows of prompt, completion (a review), chosen and rejected (two more reviews of that film).

    p(a preferred to b) = sigmoid(sharpness (sentiment(a) - sentiment(b))).
    """
    rng, rows = random.Random(seed), []
    for _ in range(n):
        film = f"Film: The {rng.choice(TITLES)} {rng.choice(PLACES)}\nReview:"
        a, b = _review(rng), _review(rng)
        a_wins = rng.random() < 1 / (1 + math.exp(-sharpness * (sentiment(a) - sentiment(b))))
        chosen, rejected = (a, b) if a_wins else (b, a)
        rows.append({"prompt": film, "completion": _review(rng), "chosen": chosen, "rejected": rejected})
    return rows


def _review(rng: random.Random) -> str:
    quality = rng.random()
    sentences = []
    for subject in rng.sample(SUBJECTS, rng.randint(2, 4)):
        word = rng.choice(POSITIVE if rng.random() < quality else NEGATIVE)
        sentences.append(f"{subject} {rng.choice(VERBS)} {rng.choice(DEGREES)}{word}.")
    if rng.random() < 0.5:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(NEUTRAL))
    return " " + " ".join(sentences)


def load_reviews(split: str) -> Dataset:
    """`builtin:reviews`: 4,096 rows to train on, 512 others to test on."""
    sizes = {"train": (4096, 0), "test": (512, 1)}
    if split not in sizes:
        raise ValueError(f"split={split!r} of builtin:reviews must be one of {sorted(sizes)}")
    n, seed = sizes[split]
    return Dataset.from_list(reviews(n, seed=seed))


def tiny(name: str = "builtin:tiny", dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[LlamaForCausalLM, Any]:
    """`builtin:tiny`: a randomly initialised Llama of 0.8 M parameters, and a byte-level BPE of 512 tokens.

    `builtin:tiny#3` is the one of seed 3 whatever `seed` says, so that an adapter finds its base again.
    """
    name, _, own_seed = name.partition("#")
    if name != "builtin:tiny":
        raise ValueError(f"model={name!r} is unknown; the built-in model is 'builtin:tiny'")
    seed = int(own_seed or seed)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        name_or_path=f"builtin:tiny#{seed}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_end]
    for parameter in model.parameters():  # not the buffers: positions stay exact
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer


@cache
def _tokenizer() -> Any:
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = (row["prompt"] + row["completion"] for row in reviews(1024))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        pad_token=special[1],
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )
