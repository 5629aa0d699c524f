"""Best-of-n: sample several answers, keep those that score highest."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from alignkit.train import evaluating
from alignkit.trl.core import set_seed
from alignkit.trl.models import SUPPORTED_ARCHITECTURES


class BestOfNSampler:
    """Samples `sample_size` answers to each query and returns the `n_candidates` that score highest.

    `queries_to_scores` maps texts, queries included, to their scores; `length_sampler()` is called once per query for
    the number of new tokens. `generation_config` says how to sample (the model's own by default), and `seed`, if given,
    seeds all random streams at once.

    Raises ValueError for a model without a value head, for anything but a tokenizer as tokenizer, and unless
    1 <= n_candidates <= sample_size.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        queries_to_scores: Callable[[list[str]], Any],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | None = None,
    ):
        if seed is not None:
            set_seed(seed)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer must be a PreTrainedTokenizerBase, but is a {type(tokenizer).__name__}")
        if not isinstance(model, SUPPORTED_ARCHITECTURES):
            names = " or ".join(kind.__name__ for kind in SUPPORTED_ARCHITECTURES)
            raise ValueError(f"model must be an {names}, but is a {type(model).__name__}")
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(f"n_candidates={n_candidates} must be at least 1 and at most sample_size={sample_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.gen_config = generation_config
        self.sample_size = sample_size
        self.n_candidates = n_candidates

    def generate(
        self,
        tokenized_query: Any,
        skip_special_tokens: bool = True,
        device: str | torch.device | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The texts of the best candidates of each query, best first.

        `tokenized_query` is one query (a list of ids or a 1-D tensor) or a list of queries. `device` is where the
        queries go, by default the model's. `generation_kwargs` override the generation config.
        """
        return [
            self._best(query.to(device or self.model.device), skip_special_tokens, generation_kwargs)
            for query in _queries(tokenized_query)
        ]

    def _best(self, query: Tensor, skip_special_tokens: bool, generation_kwargs: dict[str, Any]) -> list[str]:
        ids = query.repeat(self.sample_size, 1)
        config = copy.deepcopy(self.gen_config or self.model.generation_config)
        config.max_new_tokens = self.length_sampler()
        unknown = config.update(**generation_kwargs)  # what is no option of the config goes to the model
        options = {"attention_mask": torch.ones_like(ids)} | unknown
        with evaluating(self.model):
            out = self.model.generate(ids, generation_config=config, **options)
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=skip_special_tokens)
        scores = torch.tensor([float(score) for score in self.queries_to_scores(texts)])
        if len(scores) != len(texts):
            raise ValueError(f"queries_to_scores returned {len(scores)} scores for {len(texts)} texts")
        return [texts[i] for i in scores.topk(self.n_candidates).indices.tolist()]


def _queries(tokenized: Any) -> list[Tensor]:
    """One 1-D tensor of ids per query."""
    single = tokenized.dim() == 1 if isinstance(tokenized, Tensor) else tokenized and isinstance(tokenized[0], int)
    if isinstance(tokenized, str) or any(isinstance(query, str) for query in tokenized):
        raise TypeError(f"tokenized_query must be token ids, but is text: {tokenized!r:.200}")
    queries = [torch.as_tensor(query) for query in ([tokenized] if single else tokenized)]
    queries = [query.squeeze(0) if query.dim() == 2 else query for query in queries]
    if not queries or any(query.dim() != 1 or not len(query) for query in queries):
        shapes = [tuple(query.shape) for query in queries]
        raise ValueError(
            f"tokenized_query must be a query of at least one id or a list of such, but has shapes {shapes}"
        )
    return queries
