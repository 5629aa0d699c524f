"""Reward models as `scorer(ids, mask)`, from folders and as folders."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers.utils import logging

from alignkit import hf
from alignkit.hf.scorers import Scorer, reward_model
from alignkit.train import infer


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def rows(pad=1):
    """Two pairs of ragged answers that end with EOS, 0; the mask is True on the last tokens."""
    ids = torch.full((2, 2, 9), pad)
    mask = torch.zeros(2, 2, 9, dtype=torch.bool)
    for i, n in enumerate((9, 5, 7, 3)):
        ids[i // 2, i % 2, :n] = torch.randint(5, 100, (n,))
        ids[i // 2, i % 2, n - 1] = 0
        mask[i // 2, i % 2, n - 2 : n] = True
    return ids, mask


def perturb(scorer):
    with torch.no_grad():
        for p in scorer.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def test_the_head_reads_the_last_position_that_counts(folder):
    scorer, _ = reward_model(folder, dtype="float64")
    scorer.eval()
    ids, mask = rows()
    rewards = scorer(ids, mask)
    assert rewards.shape == (2, 2)
    hidden = scorer.lm.base_model(input_ids=ids[1, 1, :3][None])[0]
    torch.testing.assert_close(rewards[1, 1], scorer.lm.score(hidden[0, 2])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("pad", [0, 1, 7])
def test_padding_is_invisible(folder, pad):
    """Also where it is the end of the sequence, or a word."""
    scorer, _ = reward_model(folder, dtype="float64")
    scorer.eval()
    ids, mask = rows(pad=pad)
    wide = torch.cat([ids, torch.full_like(ids, 7)], -1), torch.cat([mask, torch.zeros_like(mask)], -1)
    torch.testing.assert_close(scorer(*wide), scorer(ids, mask), atol=1e-12, rtol=0)
    single = [
        scorer(ids[i, j, : n + 1], mask[i, j, : n + 1]) for i, j, n in [(0, 0, 8), (0, 1, 4), (1, 0, 6), (1, 1, 2)]
    ]
    torch.testing.assert_close(scorer(ids, mask).flatten(), torch.stack(single), atol=1e-12, rtol=0)


def test_a_row_without_a_token_has_reward_0(folder):
    scorer, _ = reward_model(folder)
    ids, mask = rows()
    mask[0, 1] = False
    rewards = infer(scorer, ids, mask)
    assert rewards[0, 1] == 0
    assert (rewards != 0).sum() == 3


def test_functional_call_and_per_sample_gradients():
    scorer, _ = reward_model("builtin:tiny", dtype="float64")
    scorer.eval()
    ids, mask = rows()
    params = {name: p.detach() for name, p in scorer.named_parameters()}

    def loss(params, ids, mask):
        return torch.func.functional_call(scorer, params, (ids, mask)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, ids, mask)
    total = torch.func.grad(loss)(params, ids, mask)
    for name in params:
        torch.testing.assert_close(per_sample[name].sum(0), total[name], atol=1e-10, rtol=0)


def test_the_head_is_new_and_the_body_the_policys(folder):
    policy, _ = hf.causal_lm(folder)
    (a, _), (b, _), (c, _) = (reward_model(folder, seed=seed) for seed in (0, 0, 1))
    body = policy.lm.base_model.state_dict()
    for scorer in (a, c):
        ours = scorer.lm.base_model.state_dict()
        assert ours.keys() == body.keys()
        assert all(torch.equal(ours[name], body[name]) for name in ours)
    assert torch.equal(a.lm.score.weight, b.lm.score.weight)
    assert not torch.equal(a.lm.score.weight, c.lm.score.weight)
    assert a.lm.score.weight.shape == (1, 16)
    assert a.lm.config.pad_token_id == 1


def test_the_size_of_a_new_head():
    """The rewards of states of unit variance have unit variance."""
    scorer, _ = reward_model("builtin:tiny")
    assert scorer.lm.score.weight.std().item() == pytest.approx(129**-0.5, rel=0.2)


def test_nothing_is_drawn_from_the_global_stream(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    reward_model(folder, seed=1)
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


@pytest.mark.parametrize("lora", [0, 2])
def test_save_and_load(folder, tmp_path, lora):
    scorer, tok = reward_model(folder, lora=lora)
    perturb(scorer)
    hf.save(scorer, tok, tmp_path)
    again, _ = reward_model(tmp_path, seed=5)
    ids, mask = rows()
    torch.testing.assert_close(infer(again, ids, mask), infer(scorer, ids, mask), atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match="is a reward model, but must be a causal language model"):
        hf.causal_lm(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name
@pytest.mark.parametrize("lora", [0, 2])
def test_transformers_scores_the_same(folder, tmp_path, lora):
    """Of the texts, padded by the tokenizer that was saved, on either side."""
    scorer, tok = reward_model(folder, lora=lora)
    perturb(scorer)
    hf.save(scorer, tok, tmp_path)
    if lora:
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, pad_token_id=1)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.eval()
    assert "value_head.safetensors" not in [x.name for x in tmp_path.iterdir()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer(["good" + tok.eos_token, "bad, and long" + tok.eos_token], padding=True, return_tensors="pt")
    last = encoded["attention_mask"].sum(-1) - 1
    mask = torch.arange(encoded["input_ids"].shape[1]) == last[:, None]
    with torch.no_grad():
        logits = model(**encoded).logits
    assert logits.shape == (2, 1)
    torch.testing.assert_close(logits[:, 0], infer(scorer, encoded["input_ids"], mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pad", [None, "<|endoftext|>"])
@pytest.mark.parametrize("lora", [0, 2])
def test_a_tokenizer_whose_padding_would_hide_the_end_gets_another(folder, tmp_path, lora, pad):
    tok = AutoTokenizer.from_pretrained(folder)
    tok.pad_token = pad
    policy, _ = hf.causal_lm(folder)
    hf.save(policy, tok, tmp_path / "policy")
    scorer, tok = reward_model(tmp_path / "policy", lora=lora)
    assert tok.pad_token == "<|pad|>"
    assert tok.pad_token_id not in (None, tok.eos_token_id)
    assert scorer.lm.config.pad_token_id == tok.pad_token_id
    perturb(scorer)
    hf.save(scorer, tok, tmp_path / "reward")
    again, _ = reward_model(tmp_path / "reward")
    ids, mask = rows(pad=0)
    torch.testing.assert_close(infer(again, ids, mask), infer(scorer, ids, mask), atol=1e-5, rtol=1e-4)


def test_a_vocabulary_that_is_full_grows_by_the_padding(folder, tmp_path):
    policy, tok = hf.causal_lm(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    fast = json.loads(tok.backend_tokenizer.to_str())
    assert len(tok) == policy.lm.config.vocab_size
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    for token in fast["added_tokens"]:  # the name is taken by another token
        if token["content"] == "<|pad|>":
            token["content"] = "<|other|>"
    fast["model"]["vocab"]["<|other|>"] = fast["model"]["vocab"].pop("<|pad|>")
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(fast)), eos_token="<|endoftext|>")
    hf.save(policy, own, tmp_path)
    scorer, grown = reward_model(tmp_path)
    assert len(grown) == len(tok) + 1 == scorer.lm.get_input_embeddings().num_embeddings
    assert scorer.lm.config.pad_token_id == len(tok)


def test_an_adapter_trains_the_head_too(folder):
    scorer, _ = reward_model(folder, lora=2)
    ids, mask = rows()
    scorer(ids, mask).sum().backward()
    trained = {name for name, p in scorer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("score.modules_to_save" in name for name in trained)
    assert any("lora_B" in name for name in trained)
    assert not any("lora" in name and "score" in name for name, _ in scorer.named_parameters())


def test_an_adapter_of_a_policy_is_merged_before_the_head(folder, tmp_path):
    policy, tok = hf.causal_lm(folder, lora=2)
    perturb(policy)
    hf.save(policy, tok, tmp_path)
    scorer, _ = reward_model(tmp_path, dtype="float32")
    merged, _ = hf.causal_lm(tmp_path)
    for name, x in merged.lm.base_model.state_dict().items():
        torch.testing.assert_close(scorer.lm.base_model.state_dict()[name], x, rtol=0, atol=0)


def test_bfloat16(folder):
    scorer, _ = reward_model(folder, dtype="bfloat16")
    assert {p.dtype for p in scorer.parameters()} == {torch.bfloat16}
    assert infer(scorer, *rows()).isfinite().all()


def test_dropout_is_off_unless_asked_for(folder):
    if "gpt2" not in str(folder):
        return
    ids, mask = rows()
    for dropout in (False, True):
        scorer, _ = reward_model(folder, dropout=dropout)
        scorer.train()
        assert torch.equal(scorer(ids, mask), scorer(ids, mask)) is not dropout


class TestRefused:
    def test_more_labels(self, folder, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=1)
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="num_labels=2, but a reward is one number"):
            reward_model(tmp_path)

    def test_other_heads(self):
        config = BertConfig(
            vocab_size=99,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
        with pytest.raises(ValueError, match="BertForSequenceClassification does more than a linear layer `score`"):
            Scorer(AutoModelForSequenceClassification.from_config(config))

    def test_prompt_tuning(self, folder):
        from peft import PromptTuningConfig

        with pytest.raises(ValueError, match="does more than a linear layer `score`"):
            reward_model(folder, lora=PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))

    def test_too_long(self):
        scorer, _ = reward_model("builtin:tiny")
        ids = torch.zeros(1, 1025, dtype=torch.long)
        with pytest.raises(ValueError, match="ids have 1025 tokens, but the model 1024 positions"):
            scorer(ids, ids == 0)
