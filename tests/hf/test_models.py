import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
)

from alignkit import heads, hf
from alignkit.hf.loading import quiet_peft
from alignkit.hf.models import Policy
from alignkit.logps import token_logps
from alignkit.train import infer


def rows(vocab=50):
    ids = torch.randint(0, vocab, (3, 2, 9))
    mask = torch.rand(3, 2, 9) > 0.4
    mask[..., 0] = False
    mask[1, 0] = False
    return ids, mask


def plain(policy, ids, mask):
    logits = policy.lm(input_ids=ids.flatten(0, 1)).logits.unflatten(0, ids.shape[:2])
    return token_logps(logits, ids, mask)


def gradients(policy, out):
    policy.zero_grad()
    (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [0, 2])
def test_policy_equals_the_plain_path_in_value_and_gradient(folder, lora):
    policy, _ = hf.causal_lm(folder, dtype="float64", lora=lora)
    policy.eval()
    ids, mask = rows()
    assert policy._knows_head
    fast, slow = policy(ids, mask), plain(policy, ids, mask)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    a, b = gradients(policy, policy(ids, mask)), gradients(policy, plain(policy, ids, mask))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-11, rtol=0)
    assert all("lora" in name for name in a) == bool(lora)


def small(config, **options):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(vocab_size=64, num_key_value_heads=1, **shape, **options)).double()


def adapted(lm):
    with quiet_peft():
        return get_peft_model(lm, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))


HEADS = {
    "capped": lambda: small(Gemma2Config, head_dim=8, final_logit_softcapping=0.5, eos_token_id=1),
    "scaled": lambda: small(CohereConfig, logit_scale=0.3, eos_token_id=1),
    "divided": lambda: small(GraniteConfig, logits_scaling=3.0),
    "tied": lambda: small(LlamaConfig, tie_word_embeddings=True),
    "biased": lambda: AutoModelForCausalLM.from_config(
        PhiConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).double(),
    "adapted": lambda: adapted(small(LlamaConfig)),
}


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("kind", HEADS)
def test_heads_run_in_chunks(kind, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS", 64 * 5)
    monkeypatch.setattr(heads, "ROWS", {"cpu": 1})
    policy = Policy(HEADS[kind]()).eval()
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
        if kind == "biased":
            policy.lm.lm_head.bias.normal_()
    assert policy._knows_head
    ids, mask = rows()
    fast, slow = policy(ids, mask), plain(policy, ids, mask)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    a, b = gradients(policy, fast), gradients(policy, slow)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-11, rtol=0)
    if kind == "adapted":
        with policy.lm.disable_adapter():
            off = policy(ids, mask)
            torch.testing.assert_close(off, plain(policy, ids, mask), atol=1e-12, rtol=0)
        assert not torch.allclose(off, fast)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_a_head_that_is_more_is_computed_in_full(folder, options, caplog):
    adapter = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, **options)
    policy, _ = hf.causal_lm(folder, lora=adapter, dropout=True)
    policy.eval()
    assert not policy._knows_head
    ids, mask = rows()
    torch.testing.assert_close(policy(ids, mask), plain(policy, ids, mask), atol=1e-5, rtol=0)
    assert gradients(policy, policy(ids, mask))


def test_padding_is_invisible(folder):
    policy, _ = hf.causal_lm(folder, dtype="float64")
    policy.eval()
    ids, mask = rows()
    wide, none = torch.cat([ids, torch.full_like(ids, 7)], -1), torch.cat([mask, torch.zeros_like(mask)], -1)
    torch.testing.assert_close(policy(wide, none)[..., :9], policy(ids, mask), atol=1e-12, rtol=0)


def test_functional_call_and_per_sample_gradients(folder):
    policy, _ = hf.causal_lm(folder, dtype="float64")
    policy.eval()
    ids, mask = rows()
    params = {name: p.detach() for name, p in policy.named_parameters()}

    def loss(params, ids, mask):
        return torch.func.functional_call(policy, params, (ids, mask)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, ids, mask)
    total = torch.func.grad(loss)(params, ids, mask)
    for name in params:
        torch.testing.assert_close(per_sample[name].sum(0), total[name], atol=1e-10, rtol=0)


class TestReference:
    def test_a_copy_stays_where_it_was(self, folder):
        policy, _ = hf.causal_lm(folder)
        ref = hf.frozen(policy)
        self.check(policy, ref)
        assert not any(p.requires_grad for p in ref.parameters())

    def test_an_adapter_is_disabled_without_a_copy(self, folder):
        policy, _ = hf.causal_lm(folder, lora=2)
        ref = hf.frozen(policy)
        self.check(policy, ref)
        assert {id(p) for p in ref.parameters()} == {id(p) for p in policy.parameters()}

    @staticmethod
    def check(policy, ref):
        ids, mask = rows()
        before = infer(policy, ids, mask)
        policy.train()
        torch.testing.assert_close(infer(ref, ids, mask), before)
        with torch.no_grad():
            for p in policy.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        assert (infer(policy, ids, mask) - before).abs().max() > 1e-4
        torch.testing.assert_close(infer(ref, ids, mask), before)
        assert policy.training


@pytest.mark.parametrize("lora", [0, 2])
def test_save_and_load(folder, tmp_path, lora):
    policy, tok = hf.causal_lm(folder, lora=lora)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    hf.save(policy, tok, tmp_path)
    again, tok2 = hf.causal_lm(tmp_path)
    ids, mask = rows()
    torch.testing.assert_close(infer(again, ids, mask), infer(policy, ids, mask), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in again.parameters())
    assert tok2.get_vocab() == tok.get_vocab()
    if not lora:
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_builtin_is_seeded(tmp_path):
    a, b, c = (hf.causal_lm("builtin:tiny", seed=s)[0].state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_an_adapter_of_the_builtin_model_finds_its_base(tmp_path):
    policy, tok = hf.causal_lm("builtin:tiny", lora=2, seed=3)
    hf.save(policy, tok, tmp_path)
    again, _ = hf.causal_lm(tmp_path)
    ids, mask = rows()
    torch.testing.assert_close(infer(again, ids, mask), infer(policy, ids, mask))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "runs/none"}, "model='runs/none' is neither a folder"),
        ({"model": "builtin:huge"}, "'builtin:tiny'"),
        ({"model": "builtin:tiny", "dtype": "half precision"}, "dtype='half precision' is not a floating-point dtype"),
        ({"model": "builtin:tiny", "dtype": "int32"}, "dtype='int32' is not a floating-point dtype"),
        ({"model": "builtin:tiny", "lora": -1}, "lora=-1 must be a rank"),
        ({"model": "no-such-model"}, "nor a hub id within reach"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hf.causal_lm(**kwargs)


def test_positions_stay_exact_in_half_precision(folder):
    for name in (folder, "builtin:tiny"):
        policy, _ = hf.causal_lm(name, dtype="bfloat16")
        assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
        assert all(b.dtype != torch.bfloat16 for b in policy.buffers())


def test_dropout_is_off_unless_asked_for(folder):
    ids, mask = rows()
    policy, _ = hf.causal_lm(folder)
    ref = hf.frozen(policy)
    torch.testing.assert_close(policy.train()(ids, mask), infer(ref, ids, mask), atol=0, rtol=0)
    noisy, _ = hf.causal_lm(folder, dropout=True)
    assert any(isinstance(m, torch.nn.Dropout) and m.p for m in noisy.modules()) == (noisy.config.model_type == "gpt2")


def test_too_many_tokens(folder):
    policy, _ = hf.causal_lm(folder)
    limit = policy.config.max_position_embeddings
    ids = torch.zeros(1, limit + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"ids have {limit + 1} tokens, but the model {limit} positions"):
        policy(ids, ids == 0)


def test_a_policy_copies_and_pickles(folder):
    policy, _ = hf.causal_lm(folder)
    again = copy.deepcopy(policy)
    assert again.lm is not policy.lm
    with pytest.raises(AttributeError):
        policy.no_such_attribute  # noqa: B018


def test_dropout_that_is_no_module_is_off_too(tmp_path, tokenizer):
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, dropout=0.5,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids, mask = rows()
    policy, _ = hf.causal_lm(tmp_path)
    torch.testing.assert_close(policy.train()(ids, mask), infer(policy, ids, mask), atol=0, rtol=0)


def test_an_adapter_of_another_precision_on_the_head(folder):
    """peft keeps it in float32: logits in full."""
    policy, _ = hf.causal_lm(folder, dtype="bfloat16", lora=LoraConfig(r=2, target_modules=["lm_head"]))
    assert not policy._knows_head
    ids, mask = rows()
    assert policy(ids, mask).isfinite().all()


def test_what_is_known_of_a_model_is_not_known_of_its_adapter(folder):
    policy, _ = hf.causal_lm(folder)
    assert policy._knows_head
    with quiet_peft():
        virtual = get_peft_model(policy.lm, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not Policy(virtual)._knows_head
