import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from alignkit.hf.models import ActorCritic, Policy
from alignkit.hf.packing import LEAST, lay_out
from alignkit.hf.scorers import Scorer
from alignkit.logps import token_logps
from tests.test_layers import ROOT

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SHAPE | {"num_key_value_heads": 2}
NO_DROPOUT = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
PACKED = {
    "llama": (LlamaConfig, GROUPED),
    "qwen3": (Qwen3Config, GROUPED | {"head_dim": 4}),
    "gpt2": (
        GPT2Config,
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None, **NO_DROPOUT},
    ),
    "neox": (GPTNeoXConfig, SHAPE),
    "phi": (PhiConfig, SHAPE),
    "opt": (
        OPTConfig,
        {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    ),
}
PADDED = {
    "alibi": (BloomConfig, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "no attention interface": (FalconConfig, {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "convolutions": (Lfm2Config, GROUPED | {"layer_types": ["conv", "full_attention"]}),
}


def model(name):
    config, shape = (PACKED | PADDED)[name]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config(vocab_size=64, **shape)).double().eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(2)  # so that attention is not uniform
    return lm


def batch():
    """Three pairs with a prompt each, of which two begin alike; a row that counts nothing, and holes."""
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (3, 2, 40))
    mask = torch.rand(3, 2, 40) > 0.3
    system, ends = torch.randint(0, 64, (9,)), [[31, 40], [25, 33], [12, 20]]
    for i, prompt in enumerate((20, 24, 9)):
        ids[i, 1, :prompt] = ids[i, 0, :prompt]
        if i < 2:
            ids[i, :, :9] = system
        for j in range(2):
            mask[i, j, :prompt] = False
            mask[i, j, ends[i][j] :] = False
    mask[2, 0] = False
    return ids, mask


def plain(lm, ids, mask):
    logits = lm(input_ids=ids.flatten(0, 1), use_cache=False).logits.unflatten(0, ids.shape[:2])
    return token_logps(logits, ids, mask)


def tokens_read(lm, call):
    read = []
    handle = lm.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    call()
    handle.remove()
    return sum(read)


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in PACKED), ("llama", True), ("gpt2", True)]
)
def test_packed_rows_have_the_values_and_gradients_of_padded_ones(name, checkpointing):
    lm, (ids, mask) = model(name), batch()
    policy, cotangent = Policy(lm), torch.randn(ids.shape, dtype=torch.float64)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    assert policy._body.packs
    grads = []
    for out in (policy(ids, mask), plain(lm, ids, mask)):
        lm.zero_grad()
        (out * cotangent).sum().backward()
        grads.append((out.detach(), [p.grad.clone() for p in lm.parameters()]))
    (fast, dfast), (slow, dslow) = grads
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    for a, b in zip(dfast, dslow):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", PADDED)
def test_where_attention_cannot_rows_are_padded(name, caplog):
    lm, (ids, mask) = model(name), batch()
    policy = Policy(lm)
    assert not policy._body.packs
    assert lm.config._attn_implementation in ("eager", "sdpa")
    torch.testing.assert_close(policy(ids, mask), plain(lm, ids, mask), atol=1e-12, rtol=0)


def test_each_token_is_read_once():
    lm, (ids, mask) = model("llama"), batch()
    policy = Policy(lm)
    # the system prompt, then what follows of two prompts, their answers without the last token that counts, one row
    last = [[int(row.nonzero().max()) if row.any() else 0 for row in pair] for pair in mask]
    expected = 9 + (20 - 9) + (24 - 9) + sum(last[0]) - 2 * 20 + sum(last[1]) - 2 * 24 + last[2][1]
    assert tokens_read(lm, lambda: policy(ids, mask)) == expected < 0.6 * ids.numel()


def test_a_padded_batch_is_cut_to_its_longest_row():
    lm, (ids, mask) = model("no attention interface"), batch()
    longest = int(mask.flatten(0, 1).any(0).nonzero().max())
    assert tokens_read(lm, lambda: Policy(lm)(ids, mask & (torch.arange(40) < 30))) < 6 * 30 + 50
    assert longest > 30


@pytest.mark.usefixtures("norms_in_float64")
def test_values_and_rewards_of_packed_rows():
    (ids, mask), lm = batch(), model("llama")
    actor = ActorCritic(lm)
    torch.nn.init.normal_(actor.value_head.weight)
    logps, values = actor(ids, mask)
    hidden = lm.base_model(input_ids=ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2])
    read = mask.flip(-1).cummax(-1).values.flip(-1)[..., 1:]
    expected = torch.where(read, actor.value_head(hidden[..., :-1, :])[..., 0], 0)
    torch.testing.assert_close(values[..., 1:], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(logps, plain(lm, ids, mask), atol=1e-12, rtol=0)
    for measured, called in zip(actor.measure(ids, mask)[::2], (logps, values)):
        torch.testing.assert_close(measured, called)

    from transformers import AutoModelForSequenceClassification

    config = LlamaConfig(vocab_size=64, num_labels=1, pad_token_id=0, **GROUPED)
    scorer = Scorer(AutoModelForSequenceClassification.from_config(config).double())
    hidden = scorer.lm.base_model(input_ids=ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2])
    last = torch.where(mask, torch.arange(40), -1).amax(-1)
    at_last = hidden.gather(2, last.clamp(min=0)[..., None, None].expand(3, 2, 1, 16))
    torch.testing.assert_close(
        scorer(ids, mask), torch.where(last < 0, 0, scorer.lm.score(at_last)[..., 0, 0]), atol=1e-12, rtol=0
    )
    assert scorer._body.packs


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("window", [16, 64])
def test_a_window_that_is_shorter_than_a_row(window):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=64, sliding_window=window, **GROUPED)).double()
    policy, (ids, mask) = Policy(lm), batch()
    assert policy._body.limit == window
    torch.testing.assert_close(policy(ids, mask), plain(lm, ids, mask), atol=1e-12, rtol=0)
    assert (tokens_read(lm, lambda: policy(ids, mask)) < 200) == (window == 64)


def test_no_token_counts():
    lm, (ids, mask) = model("llama"), batch()
    out = Policy(lm)(ids, mask & False)
    assert not out.any()
    out.sum().backward()
    assert Policy(lm)(ids[..., :1], mask[..., :1]).shape == (3, 2, 1)


def test_saved_models_do_not_know_of_it(tmp_path):
    lm = model("llama")
    Policy(lm)
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


ROWS = st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=7)


@given(rows=ROWS, least=st.integers(1, 4))
def test_a_layout_has_every_token_of_every_row_and_what_it_sees(rows, least):
    lengths = [len(row) for row in rows]
    ids = torch.tensor([row + [7] * (10 - len(row)) for row in rows])
    layout = lay_out(ids, lengths, least=least)
    starts = torch.tensor([0, *(s.length for s in layout.segments)]).cumsum(0).tolist()
    segment_of = [i for i, s in enumerate(layout.segments) for _ in range(s.length)]
    assert len(layout.ids) == len(layout.positions) == starts[-1] <= sum(lengths)
    for i, row in enumerate(rows):
        places = layout.where[i, : len(row)].tolist()
        assert layout.ids[places].tolist() == row
        assert layout.positions[places].tolist() == list(range(len(row)))
        path = list(dict.fromkeys(segment_of[place] for place in places))
        for k, segment in enumerate(path):  # its tokens see those of the row before them, and no others
            assert layout.segments[segment].before == tuple(path[:k])
    for i, segment in enumerate(layout.segments):
        assert segment.length > 0
        assert sum(layout.segments[j].length for j in segment.before) == layout.positions[starts[i]]
        assert all(segment.length >= least for s in layout.segments for i_ in s.before if i_ == i)


@given(rows=ROWS)
def test_nothing_lies_there_twice_if_every_prefix_may_be_shared(rows):
    ids = torch.tensor([row + [7] * (10 - len(row)) for row in rows])
    layout = lay_out(ids, [len(row) for row in rows], least=1)
    assert len(layout.ids) == len({tuple(row[: t + 1]) for row in rows for t in range(len(row))})


@given(rows=ROWS, least=st.integers(1, 4))
def test_the_mask_of_flex_attention_is_that_of_the_segments(rows, least):
    rows = [*rows, [0]]
    ids = torch.tensor([row + [7] * (10 - len(row)) for row in rows])
    layout = lay_out(ids, [len(row) for row in rows], least=least)
    n = len(layout.ids)
    expected = torch.zeros(n, n, dtype=torch.bool)
    for i, row in enumerate(rows):
        for t in range(len(row)):
            expected[layout.where[i, t], layout.where[i, : t + 1]] = True
    q, k = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    zero = torch.tensor(0)
    assert torch.equal(layout.block_mask().mask_mod(zero, zero, q, k), expected)


def test_short_prefixes_are_not_worth_it():
    ids = torch.arange(40).repeat(2, 1)
    ids[1, LEAST - 1 :] += 1
    assert len(lay_out(ids, [40, 40]).segments) == 2
    ids[1, LEAST - 1] -= 1
    assert len(lay_out(ids, [40, 40]).segments) == 3


@pytest.mark.slow
def test_weights_sharded_over_two_processes():
    script = ROOT / "tests" / "hf" / "sharded.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, str(script)], check=True, env=environment, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_on_a_gpu(attention, dtype, close):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, **GROUPED | {"hidden_size": 64, "head_dim": 16})
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to("cuda", dtype)
    ids, mask = (x.cuda() for x in batch())
    policy = Policy(lm)
    assert policy._body.packs
    torch.testing.assert_close(policy(ids, mask), plain(lm, ids, mask), atol=close, rtol=0)
    policy(ids, mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters())


def test_flex_attention(monkeypatch):
    """Not compiled, and let through on a CPU, where torch has the maths but refuses the backward pass."""
    import torch.nn.attention.flex_attention as flex
    from transformers.integrations import flex_attention as called

    def plainly(q, k, v, training=False, **options):
        return flex.flex_attention(q, k, v, **options)

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(called, "compile_friendly_flex_attention", plainly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not compiled
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, **GROUPED | {"hidden_size": 64, "head_dim": 16})
        lm, (ids, mask) = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention"), batch()
        policy, grads = Policy(lm), []
        assert policy._body.packs
        for out in (policy(ids, mask), plain(lm, ids, mask)):
            lm.zero_grad()
            (out * torch.linspace(0, 1, 40)).sum().backward()
            grads.append((out.detach(), [p.grad.clone() for p in lm.parameters()]))
    torch.testing.assert_close(*grads, atol=2e-5, rtol=1e-4)
    assert tokens_read(lm, lambda: policy(ids, mask)) < 150
