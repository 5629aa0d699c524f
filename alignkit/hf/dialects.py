"""What servers take and tell: how each is asked for an answer, what its reply says, how it reads new weights."""

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.utils import logging

from alignkit.hf.sampling import Answer
from alignkit.sampling import Sampling

logger = logging.get_logger(__name__)

Request = tuple[str, dict[str, Any]]

ADAPTER = "alignkit-"
"""How adapters are named on a server, with a number behind: each version is another model to it, and to its caches."""


class Fault(Exception):
    """What the next try may not meet again."""


@dataclass(frozen=True)
class Dialect:
    """That of any OpenAI-compatible server: tokens in, text out, no log-probs, and no top_k, min_p or stop strings."""

    tokenizer: Any
    sampling: Sampling
    greedy: bool
    told: bool
    """Whether log-probs are asked for, being those of what is sampled."""
    model: str | None
    base: str | None
    """The model that it serves without an adapter."""

    sequential: ClassVar[bool] = False
    """Whether it takes one request at a time."""
    config: ClassVar[str] = ""
    """Where it tells how it was started."""
    offers_no_reload: ClassVar[tuple[int, ...]] = (404, 405)
    """What it replies to a request of `reload` that it was not started for."""

    @property
    def spec(self) -> dict[str, Any]:
        """All that decides the distribution: what is left out would be the served model's own default."""
        return {
            "temperature": 0.0 if self.greedy else self.sampling.temperature,
            "top_k": self.sampling.top_k or -1,
            "top_p": self.sampling.top_p,
            "min_p": self.sampling.min_p,
            "repetition_penalty": 1.0,
            "stop": list(self.sampling.stop),
        }

    def request(self, prompt: list[int], seed: int) -> Request:
        """Path and body of the request for one answer."""
        for name in ("top_k", "min_p", "stop"):
            if value := getattr(self.sampling, name):
                raise ValueError(
                    f"{name}={value!r} needs vLLM, SGLang or `transformers serve`; the server does not say it is one"
                )
        body = {name: self.spec[name] for name in ("temperature", "top_p")}
        body |= {"model": self.model, "prompt": prompt, "max_tokens": self.sampling.max_new, "seed": seed}
        return "/v1/completions", body

    def answer(self, reply: Any) -> Answer:
        """The answer that a reply tells. Raises Fault for one that is not whole."""
        logger.warning_once(
            "The server tells text and no tokens: the text is encoded again, perhaps into other tokens than those that "
            "were sampled, and there are no log-probs of the sampler"
        )
        choice = _choice(reply)
        text, reason = choice["text"], choice["finish_reason"]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ended = reason == "stop" and not any(stop in text for stop in self.sampling.stop)
        return _answer([*ids, self.tokenizer.eos_token_id] if ended else ids, None, reason)

    @classmethod
    def tells(cls, sampling: Sampling) -> bool:
        """Whether the log-probs that it tells are those of what it samples, however it was started."""
        return False

    @classmethod
    def tells_all(cls, config: Any) -> bool:
        """Whether they are, as it was started."""
        return False

    @classmethod
    def reload(cls, folder: str, adapter: bool, adapters: list[str]) -> list[Request]:
        """What makes it read the weights in `folder`, an `adapter` or not; `adapters` are those of earlier times."""
        return []


class VLLM(Dialect):
    """vLLM since 0.10.2, with VLLM_SERVER_DEV_MODE=1 or VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 for new weights."""

    config = "/server_info?config_format=json"

    def request(self, prompt: list[int], seed: int) -> Request:
        """Tokens in and out; `logprobs` 0 are those of the sampled tokens alone."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.sampling.max_new, "seed": seed}
        return "/v1/completions", self.spec | body | {"return_token_ids": True, "logprobs": 0 if self.told else None}

    def answer(self, reply: Any) -> Answer:
        """The end of the sequence is among the tokens."""
        choice = _choice(reply)
        logps = choice["logprobs"]["token_logprobs"] if self.told else None
        return _answer(choice["token_ids"], logps, choice["finish_reason"])

    @classmethod
    def tells(cls, sampling: Sampling) -> bool:
        """Before temperature and filters, unless it was started with `--logprobs-mode processed_logprobs`."""
        return sampling.filters == Sampling().filters

    @classmethod
    def tells_all(cls, config: Any) -> bool:
        """In development mode it says."""
        return "processed_logprobs" in str(config)

    @classmethod
    def reload(cls, folder: str, adapter: bool, adapters: list[str]) -> list[Request]:
        """The whole weights by a call of its workers, and then no cache of the old."""
        if adapter:
            return _load_adapter("/v1", folder, adapters)
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        return [*_unload_adapters("/v1", adapters), ("/collective_rpc", body), ("/reset_prefix_cache", {})]


class SGLang(Dialect):
    """SGLang by its own endpoint, whose log-probs come with the tokens."""

    def request(self, prompt: list[int], seed: int) -> Request:
        """Tokens in and out; the seed counts in deterministic mode alone."""
        spec = self.spec | {"max_new_tokens": self.sampling.max_new, "sampling_seed": seed}
        body = {"input_ids": prompt, "sampling_params": spec, "return_logprob": True}
        return "/generate", body if self.model == self.base else body | {"lora_path": self.model}

    def answer(self, reply: Any) -> Answer:
        """The end of the sequence is among the tokens."""
        tokens = reply["meta_info"]["output_token_logprobs"]
        logps = [x[0] for x in tokens] if self.told else None
        return _answer([x[1] for x in tokens], logps, reply["meta_info"]["finish_reason"]["type"])

    @classmethod
    def tells(cls, sampling: Sampling) -> bool:
        """Before the filters, and before or after the temperature, which it does not say."""
        return sampling.filters == Sampling().filters

    @classmethod
    def reload(cls, folder: str, adapter: bool, adapters: list[str]) -> list[Request]:
        """The whole weights from the folder, and no cache of the old."""
        if adapter:
            return _load_adapter("", folder, adapters)
        body = {"model_path": folder, "flush_cache": True}
        return [*_unload_adapters("", adapters), ("/update_weights_from_disk", body)]


class Transformers(Dialect):
    """`transformers serve` of one model: text in and out."""

    sequential = True  # the seed is that of its process
    offers_no_reload = (400, 404, 405)  # 400: it serves another folder

    def request(self, prompt: list[int], seed: int) -> Request:
        """Everything in a generation config, for what it lacks is the model's own."""
        config = self.spec | {
            "do_sample": not self.greedy,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "num_beams": 1,
            "no_repeat_ngram_size": 0,
            "typical_p": 1.0,
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0,
            "max_new_tokens": self.sampling.max_new,
            "stop_strings": self.sampling.stop or None,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.eos_token_id,
        }
        del config["stop"]
        body = {"prompt": self._text(prompt), "seed": seed, "generation_config": json.dumps(config)}
        return "/v1/completions", body | {"model": self.model} if self.model else body

    def _text(self, ids: list[int]) -> str:
        """Text of which the server, which adds a BOS of its own, makes these tokens."""
        text = self.tokenizer.decode(ids)
        for candidate in (text, text.removeprefix(self.tokenizer.bos_token or "")):
            if self.tokenizer(candidate, verbose=False)["input_ids"] == ids:
                return candidate
        raise ValueError(f"the server takes text alone, and that of a prompt has other tokens than it: {text[:200]!r}")

    @classmethod
    def reload(cls, folder: str, adapter: bool, adapters: list[str]) -> list[Request]:
        """If this folder is what it serves, it forgets the weights, and the next request has them read."""
        return [("/v1/completions", {"model": folder, "prompt": "a", "max_tokens": 1}), ("/reset", {})]


DIALECTS: dict[str, type[Dialect]] = {"vllm": VLLM, "sglang": SGLang}
"""By the owner that a server names of its models."""


def version(model: str) -> int:
    """The number of an adapter that `sync` loaded, 0 for other models."""
    number = model.removeprefix(ADAPTER)
    return int(number) if model.startswith(ADAPTER) and number.isdigit() else 0


def _unload_adapters(prefix: str, names: list[str]) -> list[Request]:
    return [(f"{prefix}/unload_lora_adapter", {"lora_name": name}) for name in names]


def _load_adapter(prefix: str, folder: str, before: list[str]) -> list[Request]:
    name = f"{ADAPTER}{max(map(version, before), default=0) + 1}"
    load = (f"{prefix}/load_lora_adapter", {"lora_name": name, "lora_path": folder})
    return [*_unload_adapters(prefix, before), load]


def _choice(reply: Any) -> Any:
    if not reply["choices"]:
        raise Fault("its reply has 0 choices, and must have 1")
    return reply["choices"][0]


def _answer(ids: list[int], logps: list[float] | None, reason: str) -> Answer:
    if reason not in ("stop", "length"):
        raise Fault(f"it broke an answer off, with finish_reason {reason!r}")
    if logps is not None:
        if len(logps) != len(ids) or not all(math.isfinite(x) for x in logps):
            raise Fault(f"it told {len(logps)} log-probs of {len(ids)} tokens, or some that are not finite")
        if max(logps, default=0.0) > 1e-3:
            raise ValueError(f"the server tells {max(logps):g} as the log-prob of a token: start it to tell log-probs")
    return Answer(ids, logps, reason == "length")
