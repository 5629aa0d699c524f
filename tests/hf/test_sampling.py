import pytest
import torch
from peft import PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
)
from transformers.cache_utils import DynamicLayer

from alignkit import hf
from alignkit.hf.models import Policy
from alignkit.hf.sampling import _Layer, answers, columns
from alignkit.sampling import Sampling, draw
from alignkit.train import infer
from tests.hf.conftest import tiny_config

PROMPTS = ["Film: The Last Letter\nReview:", "Hm", "The plot"]
SPECS = {
    "plain": Sampling(max_new=12),
    "temperature": Sampling(max_new=12, temperature=0.6),
    "top-k": Sampling(max_new=12, top_k=7),
    "top-p": Sampling(max_new=12, temperature=1.3, top_p=0.7),
    "all": Sampling(max_new=12, temperature=0.8, top_k=30, top_p=0.9, min_p=0.1),
}


def small(kind, vocab):
    size = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 2}
    attention = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5}
    return {
        "sliding window": lambda: MistralConfig(**size, **attention),
        "soft-capped": lambda: Gemma2Config(**size, **attention, head_dim=8),
        "alibi": lambda: BloomConfig(vocab_size=vocab, hidden_size=16, n_layer=2, n_head=2),
        "recurrent": lambda: MambaConfig(**size, state_size=4),
    }[kind]()


def peaked(config, scale=3.0):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for p in lm.parameters():
        p.data *= scale
    return lm


@pytest.mark.parametrize("spec", SPECS)
def test_log_probs_of_the_sampler_are_those_of_the_policy(folder, spec):
    policy, tok = hf.causal_lm(folder, dtype="float64", sampling=SPECS[spec])
    for p in policy.parameters():
        p.data *= 3
    b = hf.sample(policy, tok, PROMPTS, n=3, entropy=True)
    logps, entropy = infer(policy.measure, b["ids"], b["mask"])
    torch.testing.assert_close(entropy.float(), b["entropy"], atol=2e-6, rtol=0)
    assert (entropy[b["mask"]] > 0).any()
    torch.testing.assert_close(logps.float(), b["sampler_logps"].float(), atol=2e-6, rtol=0)
    assert (logps[b["mask"]] < 0).any()
    assert not logps[~b["mask"]].any()
    assert not entropy[~b["mask"]].any()
    torch.testing.assert_close(infer(policy, b["ids"], b["mask"]), logps, atol=0, rtol=0)  # noise is whitened to size 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sliding window", "soft-capped", "alibi", "recurrent"])
def test_other_kinds_of_attention_and_caches(tokenizer, kind):
    policy = Policy(peaked(small(kind, len(tokenizer))), SPECS["top-p"])
    policy.lm.generation_config.eos_token_id = None
    b = hf.sample(policy, tokenizer, PROMPTS, n=3)
    torch.testing.assert_close(infer(policy, b["ids"], b["mask"]), b["sampler_logps"], atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens(folder):
    """All is read again for every token; the log-probs are still those of the policy."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    policy, tok = hf.causal_lm(folder, lora=config, sampling=Sampling(max_new=6))
    policy.lm.generation_config.eos_token_id = None
    b = hf.sample(policy, tok, PROMPTS, n=2)
    assert b["mask"].sum(-1).tolist() == [6] * 6
    torch.testing.assert_close(infer(policy, b["ids"], b["mask"]), b["sampler_logps"], atol=2e-5, rtol=0)


def test_an_answer_does_not_depend_on_the_other_rows(folder):
    """Prompts encoded once, rows taken out when they have ended, or each prompt alone: the same answers."""
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=24))
    policy.lm.generation_config.eos_token_id = list(range(0, len(tok), 12))  # answers of all lengths
    encoded = [hf.data.encode(tok, x) for x in PROMPTS]
    together = answers(policy, tok, encoded, n=8, seeds=range(24))
    assert len({len(x.ids) for x in together}) > 4
    repeated = answers(policy, tok, [x for x in encoded for _ in range(8)], seeds=range(24))
    alone = [answers(policy, tok, [encoded[i // 8]], seeds=[i])[0] for i in range(24)]
    assert [x.ids for x in together] == [x.ids for x in repeated] == [x.ids for x in alone]
    for a, b in zip(together, alone):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


def test_entropies_of_answers_that_end_one_after_another(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=24))
    policy.lm.generation_config.eos_token_id = list(range(0, len(tok), 12))
    b = hf.sample(policy, tok, PROMPTS, n=8, entropy=True)
    assert len(b["mask"].sum(-1).unique()) > 4
    torch.testing.assert_close(infer(policy.measure, b["ids"], b["mask"])[1], b["entropy"], atol=2e-5, rtol=0)
    plain = hf.sample(policy, tok, PROMPTS, n=8)
    assert all(torch.equal(x, b[name]) for name, x in plain.items())


def test_a_cache_with_room_holds_what_one_without_holds(monkeypatch):
    monkeypatch.setattr(_Layer, "room", 3)
    torch.manual_seed(0)
    ours, plain = _Layer(), DynamicLayer()
    steps = [5, 1, 1, 1, 1, "repeat", 1, 1, "select", 1, 1, 1, 1, 4, "select", "crop", 1]
    rows = 2
    for step in steps:
        if step == "repeat":
            rows *= 3
            both = [x.reorder_cache(torch.arange(rows) // 3) for x in (ours, plain)]
        elif step == "select":
            rows -= 2
            both = [x.reorder_cache(torch.arange(1, rows + 1)) for x in (ours, plain)]
        elif step == "crop":
            both = [x.crop(-2) for x in (ours, plain)]
        else:
            new = torch.randn(2, rows, 2, step, 4)
            both = [x.update(*new) for x in (ours, plain)]
            assert all(torch.equal(a, b) for a, b in zip(*both))
        assert torch.equal(ours.keys, plain.keys)
        assert torch.equal(ours.values, plain.values)
        assert ours.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("vocab", [3, 256, 257, 1000, 5000])
def test_a_large_vocabulary_is_drawn_by_its_cumulative_distribution(vocab):
    """In blocks or not, whole blocks left out or not: between the sums before and after the token lies the number."""
    torch.manual_seed(0)
    logits = torch.randn(400, vocab, dtype=torch.float64) * 4
    logits[100:200, vocab // 2 :] = -torch.inf
    logits[200:300, : vocab // 2] = -torch.inf
    logits[300:350] += 1e4
    uniform = torch.rand(400, dtype=torch.float64)
    uniform[::10], uniform[1::10] = 0, 1 - 2**-53
    token = draw(logits, uniform)
    cumulative = logits.softmax(-1).cumsum(-1)
    after = cumulative.gather(-1, token[:, None])[:, 0]
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, token[:, None])[:, 0]
    assert ((before <= uniform + 1e-12) & (uniform <= after + 1e-12)).all()
    assert (logits.gather(-1, token[:, None]) > -torch.inf).all()
    assert torch.equal(draw(logits[7], uniform[7]), token[7])
    assert (draw(logits.float(), uniform.float()) == token).float().mean() > 0.99


def test_samples_have_the_distribution_of_the_log_probs(tokenizer):
    """First tokens of many answers against exp(log-probs), 4 standard errors apart at most."""
    policy = Policy(peaked(tiny_config("qwen2", len(tokenizer))), Sampling(max_new=1, temperature=0.5, top_k=6))
    n = 4000
    (encoded,) = [hf.data.encode(tokenizer, "The plot")]
    first = torch.tensor([x.ids[0] for x in answers(policy, tokenizer, [encoded], n=n, seeds=range(n))])
    seen = first.unique()
    ids = torch.tensor([[*encoded, token] for token in seen.tolist()])
    probs = infer(policy, ids, torch.arange(ids.shape[1]).expand(ids.shape) == len(encoded))[:, -1].exp()
    assert len(seen) == 6
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    counts = (first == seen[:, None]).sum(-1)
    assert ((counts - n * probs).abs() <= 4 * (n * probs * (1 - probs)).sqrt()).all()


def test_columns(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=6))
    b = hf.sample(policy, tok, PROMPTS, n=2, seed=1)
    assert set(b) == {"ids", "mask", "sampler_logps", "truncated"}
    for i, (row, keep) in enumerate(zip(b["ids"], b["mask"])):
        start = int(keep.nonzero()[0])
        assert tok.decode(row[:start]) == PROMPTS[i // 2]
        assert keep[start : start + int(keep.sum())].all()
        assert keep.sum() <= 6
        assert b["truncated"][i] == (row[keep][-1] != tok.eos_token_id)


def test_prompts_of_all_kinds(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=3))
    messages = [{"role": "user", "content": "Hm"}]
    kinds = ["Hm", {"prompt": "Hm", "answer": 3}, tok("Hm")["input_ids"], messages, {"prompt": messages}]
    ids = [hf.sample(policy, tok, [x])["ids"].tolist() for x in kinds]
    assert ids[0] == ids[1] == ids[2]
    assert ids[3] == ids[4]


def test_seed_step_and_random_state(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=8))
    state = torch.random.get_rng_state()
    keys = [(1, 0), (1, 0), (2, 0), (1, 1)]
    a, b, *others = (hf.sample(policy, tok, ["The plot"], n=3, seed=x, step=y)["ids"].tolist() for x, y in keys)
    assert a == b
    assert len({str(rows) for rows in (a, *others)}) == 3
    assert len({str(row) for row in a}) == 3
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_models_own_generation_config_does_not_act_but_its_ends_do(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=8))
    plain = hf.sample(policy, tok, ["The plot"])
    own = policy.lm.generation_config
    own.repetition_penalty, own.min_p, own.top_p = 5.0, 0.5, 0.1
    assert torch.equal(hf.sample(policy, tok, ["The plot"])["ids"], plain["ids"])
    assert policy.lm.generation_config is own
    third = plain["ids"][plain["mask"]][2].item()
    own.eos_token_id = [third, tok.eos_token_id]
    shorter = hf.sample(policy, tok, ["The plot"])
    assert shorter["mask"].sum() == 3
    assert not shorter["truncated"].any()


def test_eos_ends_the_answer_and_counts(tokenizer):
    policy = Policy(AutoModelForCausalLM.from_config(tiny_config("qwen2", len(tokenizer))))
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        policy.lm.model.norm.weight.fill_(1)
        policy.lm.model.embed_tokens.weight.fill_(1)
        policy.lm.lm_head.weight[tokenizer.eos_token_id] = 1
    b = hf.sample(policy, tokenizer, ["The plot"], greedy=True)
    assert b["ids"][b["mask"]].tolist() == [tokenizer.eos_token_id]
    assert hf.decode(tokenizer, b["ids"], b["mask"]) == [""]
    assert b["truncated"].tolist() == [False]


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=30))
    free = hf.sample(policy, tok, PROMPTS, n=4)
    texts = hf.decode(tok, free["ids"], free["mask"])
    stop = next(text[i : i + 3] for text in texts for i in range(4, len(text) - 3) if text[i : i + 3].isalpha())
    policy.sampling = Sampling(max_new=30, stop=("never here", stop))
    b = hf.sample(policy, tok, PROMPTS, n=4)
    stopped = 0
    for i, (text, whole) in enumerate(zip(hf.decode(tok, b["ids"], b["mask"]), texts)):
        assert whole.startswith(text)
        answer = b["ids"][i][b["mask"][i]]
        if stop in whole:
            stopped += 1
            assert stop in text
            assert stop not in tok.decode(answer[:-1])
            assert not b["truncated"][i]
        else:
            assert text == whole
    assert stopped


def test_greedy_is_the_likeliest_token_and_needs_no_seed(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=5, temperature=2.0))
    a, b = (hf.sample(policy, tok, PROMPTS, greedy=True, seed=s) for s in (1, 2))
    assert torch.equal(a["ids"], b["ids"])
    for row, keep in zip(a["ids"], a["mask"]):
        start = int(keep.nonzero()[0])
        assert policy.lm(input_ids=row[None, :start]).logits[0, -1].argmax() == row[start]


def test_the_ratio_is_one_at_the_edge_of_a_nucleus_that_moved():
    """A token that a filter would now leave out by a hair was drawn, and keeps its log-prob finite."""
    from alignkit.logps import token_logps

    logits = torch.tensor([[[2.0, 1.0, 1.0 - 1e-6], [0.0, 0.0, 0.0]]])
    mask = torch.tensor([[False, True]])
    for token in range(3):
        logp = token_logps(logits, torch.tensor([[0, token]]), mask, sampling=Sampling(top_k=2))
        assert logp[0, 1] > -2.0


def test_bad_arguments(folder):
    policy, tok = hf.causal_lm(folder, sampling=Sampling(max_new=250))
    with pytest.raises(ValueError, match="prompts has 0 rows"):
        hf.sample(policy, tok, [])
    with pytest.raises(ValueError, match="n=0"):
        hf.sample(policy, tok, ["a"], n=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        hf.sample(policy, tok, ["a", ""])
    served = Policy(policy.lm, Sampling(server="http://localhost:1"))
    with pytest.raises(ValueError, match="entropy=True, but server='http://localhost:1' tells none"):
        hf.sample(served, tok, ["a"], entropy=True)
    with pytest.raises(ValueError, match="seeds has 1 entries"):
        answers(policy, tok, [[1]], n=2, seeds=[0])
    if policy.config.max_position_embeddings < 300:
        with pytest.raises(ValueError, match="exceed the model's 256 positions: lower max_new"):
            hf.sample(policy, tok, PROMPTS)


def test_columns_without_log_probs():
    drawn = [hf.sampling.Answer([4, 5], None, False), hf.sampling.Answer([6], None, True)]
    b = columns([[1], [2, 3]], drawn)
    assert set(b) == {"ids", "mask", "truncated"}
    assert b["ids"].tolist() == [[1, 4, 5], [2, 3, 6]]
    assert b["mask"].tolist() == [[False, True, True], [False, False, True]]
