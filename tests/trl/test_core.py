"""Helpers of `alignkit.trl.core` and `import_utils`."""

import builtins
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignkit.trl import core, import_utils
from tests.trl.conftest import golden, tiny

MASK = torch.tensor([[0, 1, 1], [1, 0, 0]])


def tensors(x):
    """Lists of numbers as float64 tensors, also inside dicts and lists of dicts."""
    if isinstance(x, dict):
        return {key: tensors(value) for key, value in x.items()}
    if isinstance(x, list) and x and isinstance(x[0], dict):
        return [tensors(value) for value in x]
    return torch.tensor(x, dtype=torch.float64)


def run(case):
    """What the function of a golden case returns."""
    fn, of = (
        getattr(core, case["fn"]),
        {key: tensors(x) for key, x in case.items() if isinstance(x, list) and key != "raises"},
    )
    match case["fn"]:
        case "masked_mean":
            return fn(of["values"], of["mask"].long(), axis=case["axis"])
        case "masked_var":
            return fn(of["values"], of["mask"].long(), unbiased=case["unbiased"])
        case "masked_whiten":
            return fn(of["values"], of["mask"].long(), shift_mean=case["shift_mean"])
        case "whiten":
            return fn(of["values"], shift_mean=case["shift_mean"])
        case "entropy_from_logits":
            return fn(of["logits"])
        case "logprobs_from_logits":
            return fn(of["logits"], of["labels"].long(), gather=case["gather"])
        case "clip_by_value":
            return fn(of["x"], of["min"], of["max"])
        case "stack_dicts":
            return fn(of["in"])
        case "pad_to_size":
            return fn(of["in"], case["size"], dim=case["dim"], padding=case["padding"])


@pytest.mark.parametrize("case", golden("core_math")["cases"], ids=lambda case: case["fn"])
def test_golden(case):
    if case["fn"] == "flatten_dict":
        assert core.flatten_dict(case["in"]) == case["out"]
    elif case["fn"] == "LengthSampler":
        np.random.seed(case["np_seed"])  # noqa: NPY002
        sampler = core.LengthSampler(case["min"], case["max"])
        assert [sampler() for _ in case["out"]] == case["out"]
    elif "raises" in case:
        kind, message = case["raises"]
        with pytest.raises(getattr(builtins, kind), match=re.escape(message)):
            run(case)
    else:
        tolerance = 1e-6 if "var" in case["fn"] or "whiten" in case["fn"] else 1e-9
        torch.testing.assert_close(run(case), tensors(case["out"]), rtol=0, atol=tolerance)


def test_masks_may_be_of_any_dtype_and_one_row_for_all():
    values = torch.tensor([[5.0, 1.0, 3.0], [8.0, 9.0, 10.0]])
    for mask in (MASK, MASK.float(), MASK.bool()):
        assert core.masked_mean(values, mask) == 4
        assert core.masked_var(values, mask) == torch.tensor([1.0, 3.0, 8.0]).var()
        assert core.masked_var(values, mask, unbiased=False) == torch.tensor([1.0, 3.0, 8.0]).var(correction=0)
    assert core.masked_mean(values, torch.tensor([0, 1, 1])) == 23 / 4


def test_what_a_mask_leaves_out_is_never_read():
    values = torch.tensor([[torch.nan, 1.0, 3.0], [2.0, torch.inf, torch.nan]], requires_grad=True)
    (core.masked_mean(values, MASK) + core.masked_var(values, MASK)).backward()
    assert values.grad.isfinite().all()
    white = core.masked_whiten(values, MASK)
    torch.testing.assert_close(white[MASK.bool()], core.whiten(torch.tensor([1.0, 3.0, 2.0])))


def test_mean_of_no_value_along_an_axis_is_zero():
    assert core.masked_mean(torch.ones(2, 3), MASK * torch.tensor([[1], [0]]), axis=1).tolist() == [1, 0]


def test_variance_of_one_value_is_zero_and_not_nan():
    values, one = torch.randn(2, 3), torch.tensor([[0, 0, 1], [0, 0, 0]])
    assert core.masked_var(values, one) == 0
    assert core.masked_whiten(values, one)[0, 2] == 0
    assert core.masked_whiten(values, one, shift_mean=False)[0, 2] == values[0, 2]
    assert core.whiten(torch.tensor([3.0])) == 0


def test_variance_of_no_value_is_refused_only_with_bessels_correction():
    assert core.masked_var(torch.ones(2), torch.zeros(2), unbiased=False) == 0
    with pytest.raises(ValueError, match="sum of the mask is zero"):
        core.masked_whiten(torch.ones(2), torch.zeros(2))


def test_whitening_of_the_masked_is_whitening_of_what_is_left():
    values, mask = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(core.masked_whiten(values, mask)[1:3], core.whiten(values[1:3]))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_entropy_has_any_number_of_leading_axes(shape):
    logits = torch.randn(shape, dtype=torch.float64)
    want = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(core.entropy_from_logits(logits), want)


def test_entropy_of_filtered_logits_is_finite():
    assert core.entropy_from_logits(torch.tensor([[0.0, -torch.inf, 0.0]])) == torch.tensor(2.0).log()


def test_logprobs_are_differentiable_and_at_least_float32():
    logits, labels = torch.randn(2, 3, 7, requires_grad=True), torch.randint(7, (2, 3))
    core.logprobs_from_logits(logits, labels).sum().backward()
    torch.testing.assert_close(logits.grad, torch.nn.functional.one_hot(labels, 7) - logits.detach().softmax(-1))
    assert core.logprobs_from_logits(logits.bfloat16(), labels).dtype == torch.float32


def test_the_lower_bound_wins_and_bounds_may_be_floats():
    assert core.clip_by_value(torch.tensor([-3.0, 0.0, 3.0]), -1.0, 1.0).tolist() == [-1, 0, 1]
    assert core.clip_by_value(torch.tensor([0.0]), 2.0, torch.tensor([1.0])).tolist() == [2]


def test_flatten_dict_refuses_a_key_with_the_separator():
    with pytest.raises(ValueError, match="separator '/' not allowed to be in key 'b/c'"):
        core.flatten_dict({"a": {"b/c": 1}})
    assert core.flatten_dict({"a": {"b/c": 1}, "d": {}}, sep=".") == {"a.b/c": 1}


def test_stats_to_np():
    stats = {"t": torch.ones(2, requires_grad=True), "b": torch.tensor([1.5], dtype=torch.bfloat16), "i": 3}
    out = core.stats_to_np(
        stats | {"n": np.float32(0.5), "a": np.arange(2), "s": "text", "l": [1], "z": torch.tensor(2.0)}
    )
    assert isinstance(out["t"], np.ndarray)
    assert out["t"].tolist() == [1, 1]
    assert out["b"].dtype == np.float32
    assert out["b"].tolist() == [1.5]
    assert type(out["i"]) is float
    assert type(out["n"]) is float
    assert out["a"].tolist() == [0, 1]
    assert out["s"] == "text"
    assert out["l"] == [1]
    assert out["z"].shape == ()


def test_convert_to_scalar_takes_arrays_of_one_entry():
    stats = {"zero": torch.tensor(1.5), "one": np.array([2]), "two": torch.ones(2), "deep": torch.ones(1, 1), "n": 3}
    out = core.convert_to_scalar(stats)
    assert (out["zero"], out["one"], out["n"]) == (1.5, 2, 3)
    assert type(out["zero"]) is float
    assert type(out["one"]) is int
    assert out["two"] is stats["two"]
    assert out["deep"] is stats["deep"]


def test_add_suffix():
    assert core.add_suffix({"a": 1, "b": 2}, "_x") == {"a_x": 1, "b_x": 2}


def test_pad_to_size_along_any_axis():
    x = torch.tensor([[1, 2], [3, 4]])
    assert core.pad_to_size(x, 3).tolist() == [[1, 2, 50256], [3, 4, 50256]]
    assert core.pad_to_size(x, 3, dim=0, padding=0).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert core.pad_to_size(x, 2).equal(x)
    with pytest.raises(ValueError, match="size=1 is less than the 2 entries along dim=1"):
        core.pad_to_size(x, 1)


def test_length_sampler_excludes_the_maximum():
    sampler = core.LengthSampler(2, 5)
    counts = Counter(sampler() for _ in range(600))
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 140
    assert type(sampler()) is int


@pytest.mark.parametrize("bounds", [(3, 3), (4, 3), (-1, 3)])
def test_length_sampler_refuses_bad_bounds(bounds):
    with pytest.raises(ValueError, match=f"min_value={bounds[0]} must be at least 0 and less than max_value=3"):
        core.LengthSampler(*bounds)


def test_set_seed_seeds_all_three():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    core.set_seed(3)
    first = draw()
    core.set_seed(3)
    assert draw() == first
    core.set_seed(4)
    assert all(a != b for a, b in zip(draw(), first))


def test_respond_to_batch_samples_from_the_model():
    model, ids = tiny("gpt2"), torch.tensor([[5, 6], [7, 8]])
    out = core.respond_to_batch(model, ids, txt_len=3)
    assert out.shape == (2, 3)
    assert not out.requires_grad
    want = ids
    for _ in range(3):
        want = torch.cat([want, model(want).logits[:, -1].argmax(-1, keepdim=True)], -1)
    assert core.respond_to_batch(model, ids, txt_len=3, top_k=1).equal(want[:, 2:])
    assert core.respond_to_batch(model, ids, txt_len=3, top_p=1e-6).equal(want[:, 2:])


def test_respond_to_batch_draws_each_token_as_often_as_the_model_says():
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.2])
    out = core.respond_to_batch(
        lambda ids: (probs.log().expand(*ids.shape, 3),), torch.zeros(4000, 1).long(), txt_len=1
    )
    torch.testing.assert_close(out.flatten().bincount() / 4000, probs, atol=0.03, rtol=0)
    nucleus = core.respond_to_batch(
        lambda ids: (probs.log().expand(*ids.shape, 3),), torch.zeros(300, 1).long(), 1, 0, 0.7
    )
    assert set(nucleus.flatten().tolist()) == {0, 1}
    with pytest.raises(ValueError, match="txt_len=0"):
        core.respond_to_batch(None, torch.zeros(1, 1), txt_len=0)


def test_device_cache_is_emptied_only_on_request(monkeypatch):
    calls = []
    monkeypatch.setattr(core, "clear_device_cache", lambda **kwargs: calls.append(kwargs))

    @core.PPODecorators.empty_device_cache()
    def step():
        return 7

    assert step() == 7
    assert not calls
    monkeypatch.setattr(core.PPODecorators, "optimize_device_cache", True)
    assert step() == 7
    assert calls == [{"garbage_collection": True}]


class TestRandnTensor:
    def generators(self, *seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def test_one_generator(self):
        (a,), (b,) = self.generators(1), self.generators(1)
        out = core.randn_tensor([2, 3], generator=a, dtype=torch.float64)
        assert out.equal(torch.randn(2, 3, generator=b, dtype=torch.float64))
        assert core.randn_tensor((2, 3), generator=self.generators(1), dtype=torch.float64).equal(out)

    def test_a_generator_per_row(self):
        out = core.randn_tensor((2, 3), generator=self.generators(1, 2))
        rows = [torch.randn(1, 3, generator=g) for g in self.generators(1, 2)]
        assert out.equal(torch.cat(rows))
        with pytest.raises(ValueError, match="generator has 2 entries, but there are 3 rows"):
            core.randn_tensor((3, 3), generator=self.generators(1, 2))

    def test_the_global_stream(self):
        torch.manual_seed(5)
        out = core.randn_tensor((2, 3), device="cpu")
        torch.manual_seed(5)
        assert out.equal(torch.randn(2, 3))

    def test_cpu_generator_for_another_device_warns(self):
        with pytest.warns(UserWarning, match="drawn there and moved to 'meta'"):
            out = core.randn_tensor((2, 3), generator=self.generators(1)[0], device=torch.device("meta"))
        assert out.device.type == "meta"

    def test_generator_of_another_device_is_refused(self):
        class OnCuda(torch.Generator):
            device = torch.device("cuda")

        with pytest.raises(ValueError, match="Cannot generate a cpu tensor from a generator of type cuda"):
            core.randn_tensor((2, 3), generator=OnCuda())


def test_availability(monkeypatch):
    assert import_utils.is_peft_available()
    present = {"bitsandbytes", "diffusers", "rich", "torchvision", "unsloth", "wandb"}
    for found in (None, SimpleNamespace()):
        monkeypatch.setattr(import_utils, "find_spec", lambda name, found=found: found if name in present else None)
        for name in present - {"bitsandbytes"}:
            assert getattr(import_utils, f"is_{name}_available")() == (found is not None)
    assert not import_utils.is_peft_available()
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert import_utils.is_bitsandbytes_available() == cuda
    assert not import_utils.is_npu_available()
    assert not import_utils.is_xpu_available()
