"""Profiles of hypothesis, one thread, a fixed seed, and no network."""

import gc
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import tests.typecheck  # noqa: F401  (named in pyproject.toml)

torch.set_num_threads(1)

COMMON: Any = {
    "deadline": None,
    "derandomize": True,
    "print_blob": True,
    # the autouse fixture below resets a seed; it need not run again for every example
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("mutate", max_examples=10, phases=[Phase.explicit, Phase.generate], **COMMON)
settings.register_profile("dev", max_examples=20, **COMMON)
settings.register_profile("thorough", max_examples=300, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_finish() -> None:
    """Each run of a Trainer begins with a full garbage collection, which need not walk through what imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def norms_in_float64(monkeypatch):
    """Of transformers' models in float64 RMSNorm alone computes in float32; which would hide what is to be seen."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.granite.modeling_granite import GraniteRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def rms(self, x):
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def layer(self, x):
        return rms(self, x - x.mean(-1, keepdim=True))

    for norm in (
        LlamaRMSNorm,
        Qwen2RMSNorm,
        Qwen3RMSNorm,
        MistralRMSNorm,
        GraniteRMSNorm,
        Gemma2RMSNorm,
    ):
        monkeypatch.setattr(norm, "forward", rms)
    monkeypatch.setattr(CohereLayerNorm, "forward", layer)
