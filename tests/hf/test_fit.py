import json
import os
import signal
from itertools import pairwise

import pytest
import torch
from transformers import TrainerCallback

from alignkit import hf
from alignkit.losses.preference import dpo
from alignkit.losses.supervised import nll
from alignkit.train import update
from alignkit.weights import row_mean, sequence_mean, token_mean, weigh


def loss_fn(policy, ids, mask, weights):
    logps = policy(ids, mask)
    return weigh(nll(logps), weights), {"p": weigh(logps.exp(), weights)}


def make(steps=4, batch=6, tail=True, seed=0):
    """Step batches of ragged rows, some of them empty."""
    out, g = [], torch.Generator().manual_seed(seed)
    for i in range(steps):
        time = 6 + i
        ids = torch.randint(0, 50, (batch, time), generator=g)
        mask = torch.arange(time) < torch.randint(2, time + 1, (batch, 1), generator=g)
        mask[:, 0] = False
        mask[0] &= not tail
        out.append({"ids": ids, "mask": mask})
    return out


def args(out, micro=6, batch=6, **fields):
    fields = {"logging_steps": 1, "save_strategy": "no", "warmup_steps": 0} | fields
    return hf.arguments(str(out), batch=batch, micro=micro, lr=fields.pop("lr", 0.1), seed=0, steps=4, **fields)


def policy64(folder):
    policy, _ = hf.causal_lm(folder, dtype="float64")
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return policy


def logs(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b, atol=0.0):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.5}


@pytest.mark.parametrize("aggregate", [token_mean, sequence_mean])
@pytest.mark.parametrize("micro", [1, 2, 6])
def test_fit_is_update(folder, tmp_path, aggregate, micro):
    ours, theirs = policy64(folder), policy64(folder)
    hf.fit(loss_fn, theirs, make(), aggregate=aggregate, args=args(tmp_path, micro, **SGD))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    expected = [update(loss_fn, ours, optimizer, b, aggregate=aggregate, max_grad_norm=0.5) for b in make()]
    same(ours, theirs, atol=1e-12)
    assert [x["step"] for x in logs(tmp_path)[:-1]] == [1, 2, 3, 4]
    for log, metrics in zip(logs(tmp_path), expected):
        for name in ("loss", "p", "grad_norm"):
            assert log[name] == pytest.approx(metrics[name].item(), abs=1e-9), name


@pytest.mark.parametrize(("micro", "tokens"), [(6, 8), (2, 1), (6, 1000)])
def test_micro_batches_of_so_many_tokens_change_nothing(folder, tmp_path, micro, tokens):
    ours, theirs, seen = policy64(folder), policy64(folder), []

    def counted(policy, ids, mask, **rest):
        seen.append(len(ids))
        return loss_fn(policy, ids, mask, **rest)

    given = args(tmp_path, micro, micro_tokens=tokens, **SGD)
    hf.fit(counted, theirs, make(), aggregate=token_mean, args=given)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for b in make():
        update(loss_fn, ours, optimizer, b, aggregate=token_mean, max_grad_norm=0.5, micro_tokens=tokens)
    same(ours, theirs, atol=1e-12)
    plain = policy64(folder)
    hf.fit(loss_fn, plain, make(), aggregate=token_mean, args=args(tmp_path / "plain", 6, **SGD))
    same(plain, theirs, atol=1e-12)
    assert len(seen) > 4 * 6 // micro or tokens == 1000
    assert sum(seen) == 4 * 6


@pytest.mark.parametrize(("fields", "message"), [({"micro_tokens": 0}, "micro_tokens=0 must be at least 1")])
def test_bad_micro_tokens(folder, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        hf.fit(loss_fn, policy64(folder), make(), aggregate=token_mean, args=args(tmp_path, 6, **fields))


def test_metrics_are_means_over_the_steps_logged(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for out, every in ((one, 1), (two, 2)):
        hf.fit(loss_fn, policy64(folder), make(), aggregate=token_mean, args=args(out, 2, logging_steps=every, **SGD))
    a, b = logs(one), logs(two)
    for name in ("loss", "p"):
        assert b[0][name] == pytest.approx((a[0][name] + a[1][name]) / 2)
        assert b[1][name] == pytest.approx((a[2][name] + a[3][name]) / 2)


def test_several_aggregations_on_several_masks(folder, tmp_path):
    def two_terms(policy, ids, mask, other, weights, other_weights):
        return weigh(nll(policy(ids, mask)), weights) + weigh(nll(policy(ids, other)), other_weights), {}

    def batches():
        return [b | {"other": b["mask"] & (torch.arange(b["mask"].shape[1]) % 2 == 0)} for b in make()]

    table = {"weights": token_mean, "other_weights": ("other", sequence_mean)}
    a, b = policy64(folder), policy64(folder)
    hf.fit(two_terms, a, batches(), aggregate=table, args=args(tmp_path / "a", 1, **SGD))
    hf.fit(two_terms, b, batches(), aggregate=table, args=args(tmp_path / "b", 6, **SGD))
    same(a, b, atol=1e-12)


class TestStreams:
    def test_batches_are_pulled_after_the_step_before(self, folder, tmp_path):
        policy, seen = policy64(folder), []

        def batches(start):
            for b in make()[start:]:
                seen.append(next(policy.parameters()).detach().clone())
                yield b

        hf.fit(loss_fn, policy, batches, aggregate=token_mean, args=args(tmp_path, 2, **SGD))
        assert len(seen) == 4
        assert all((x - y).abs().max() > 0 for x, y in pairwise(seen))

    def test_a_sized_iterable_is_an_epoch(self, folder, tmp_path):
        a = args(tmp_path, **SGD)
        a.max_steps, a.num_train_epochs = -1, 2
        hf.fit(loss_fn, policy64(folder), make(3), aggregate=token_mean, args=a)
        assert [x["step"] for x in logs(tmp_path)[:-1]] == [1, 2, 3, 4, 5, 6]

    def test_a_function_needs_max_steps(self, folder, tmp_path):
        a = args(tmp_path, **SGD)
        a.max_steps = -1
        with pytest.raises(ValueError, match="max_steps"):
            hf.fit(loss_fn, policy64(folder), lambda step: iter(make()), aggregate=token_mean, args=a)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class TestResume:
    @pytest.mark.parametrize("kind", ["function", "list"])
    @pytest.mark.parametrize("lora", [0, 2])
    def test_interrupted_and_resumed_is_bit_identical(self, folder, tmp_path, lora, kind, capsys):
        """With dropout, Adam and a schedule, so that every piece of state matters."""

        def run(out, **more):
            policy, tok = hf.causal_lm(folder, lora=lora)
            batches = (lambda step: iter(make()[step:])) if kind == "function" else make()
            fields = {"max_steps": 4} if kind == "function" else {}
            callbacks = more.pop("callbacks", ())
            a = args(out, 2, lr=1e-2, **more)
            assert a.max_steps == fields.get("max_steps", 4)
            hf.fit(loss_fn, policy, batches, aggregate=token_mean, args=a, tokenizer=tok, callbacks=callbacks)
            return policy

        whole = run(tmp_path / "whole")
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "cut", callbacks=[StopAt(1)])
        assert stop.value.code == 130
        assert "--resume-from-checkpoint last" in capsys.readouterr().err
        assert (tmp_path / "cut" / "checkpoint-2").is_dir()
        resumed = run(tmp_path / "cut", resume_from_checkpoint="last")
        same(whole, resumed)

        def steps(name):
            return [x for x in logs(tmp_path / name) if "loss" in x]

        assert steps("cut") == steps("whole")

    def test_lines_after_the_checkpoint_are_dropped(self, folder, tmp_path):
        def run(**more):
            policy = policy64(folder)
            a = args(tmp_path, 2, save_strategy="steps", save_steps=2, **SGD, **more)
            hf.fit(loss_fn, policy, make(), aggregate=token_mean, args=a)

        run()
        before = logs(tmp_path)
        run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert [x["step"] for x in logs(tmp_path)] == [x["step"] for x in before] == [1, 2, 3, 4, 4]

    def test_the_previous_handler_of_ctrl_c_is_back(self, folder, tmp_path):
        before = signal.getsignal(signal.SIGINT)
        hf.fit(loss_fn, policy64(folder), make(), aggregate=token_mean, args=args(tmp_path, **SGD))
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_folder_with_a_run_is_refused(self, folder, tmp_path):
        hf.fit(loss_fn, policy64(folder), make(), aggregate=token_mean, args=args(tmp_path, **SGD))
        with pytest.raises(ValueError, match="holds a run already: continue it with --resume-from-checkpoint last"):
            args(tmp_path)

    def test_no_checkpoint_to_resume(self, folder, tmp_path):
        with pytest.raises(ValueError, match="resume_from_checkpoint='last': there is no checkpoint"):
            args(tmp_path, resume_from_checkpoint="last")

    @pytest.mark.parametrize("kind", ["function", "list"])
    def test_a_finished_run_resumes_to_itself(self, folder, tmp_path, kind):
        def run(**more):
            policy = policy64(folder)
            batches = make() if kind == "list" else lambda step: iter(make()[step:])
            a = args(tmp_path, 2, save_strategy="steps", save_steps=4, **SGD, **more)
            hf.fit(loss_fn, policy, batches, aggregate=token_mean, args=a)
            return policy

        same(run(), run(resume_from_checkpoint="last"))


class TestEvaluation:
    @pytest.mark.parametrize("size", [1, 4, 64])
    def test_the_eval_set_is_one_batch(self, folder, tmp_path, size):
        policy, batches = policy64(folder), make(3, tail=False)
        a = args(tmp_path, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=size, **SGD)
        hf.fit(loss_fn, policy, make(), aggregate=token_mean, args=a, eval_batches=batches)
        got = next(x for x in logs(tmp_path) if "eval_loss" in x)
        with torch.no_grad():
            logps = torch.cat([policy.eval()(**b)[b["mask"]] for b in batches])
        assert got["eval_loss"] == pytest.approx(-logps.mean().item(), abs=1e-9)
        assert got["eval_p"] == pytest.approx(logps.exp().mean().item(), abs=1e-9)

    def test_several_eval_sets_and_the_best_model(self, folder, tmp_path):
        policy = policy64(folder)
        a = args(
            tmp_path,
            lr=50.0,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_a_loss",
            greater_is_better=False,
            **SGD | {"max_grad_norm": 1e9},
        )
        sets = {"a": make(2, seed=1), "b": lambda step: iter(make(1, seed=2))}
        hf.fit(loss_fn, policy, make(), aggregate=token_mean, args=a, eval_batches=sets)
        seen = {x["step"]: x["eval_a_loss"] for x in logs(tmp_path) if "eval_a_loss" in x}
        assert any("eval_b_loss" in x for x in logs(tmp_path))
        best = min(seen, key=seen.get)
        same(policy, hf.causal_lm(tmp_path / f"checkpoint-{best}", dtype="float64")[0])

    def test_empty(self, folder, tmp_path):
        a = args(tmp_path, eval_strategy="steps", eval_steps=1, **SGD)
        with pytest.raises(ValueError, match="eval_batches is empty"):
            hf.fit(loss_fn, policy64(folder), make(), aggregate=token_mean, args=a, eval_batches=[])


def test_trackers_get_the_metrics(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hf.fit(loss_fn, policy64(folder), make(), aggregate=token_mean, args=args(tmp_path, report_to="tensorboard", **SGD))
    (event,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(event.parent)).Reload()
    assert [e.step for e in events.Scalars("train/p")] == [1, 2, 3, 4]
    assert events.Scalars("train/p")[0].value == pytest.approx(logs(tmp_path)[0]["p"])


def test_gradient_checkpointing_and_accumulation_change_nothing(folder, tmp_path):
    a, b = policy64(folder), policy64(folder)
    hf.fit(loss_fn, a, make(), aggregate=token_mean, args=args(tmp_path / "a", 6, **SGD))
    more = args(tmp_path / "b", 3, gradient_checkpointing=True, **SGD)
    hf.fit(loss_fn, b, make(), aggregate=token_mean, args=more)
    same(a, b, atol=1e-12)


def test_pairs_are_never_split(folder, tmp_path):
    def pair_loss(policy, ids, mask, weights):
        logps = policy(ids, mask).sum(-1)
        return weigh(dpo(logps[:, 0] - logps[:, 1], beta=0.1), weights), {}

    def pairs():
        return [{k: torch.stack([v, v.flip(0)], 1) for k, v in b.items()} for b in make(tail=False)]

    a, b = policy64(folder), policy64(folder)
    for policy, micro in ((a, 1), (b, 6)):
        hf.fit(pair_loss, policy, pairs(), aggregate=row_mean, args=args(tmp_path / str(micro), micro, **SGD))
    same(a, b, atol=1e-12)


class TestErrors:
    def fit(self, folder, out, *, fn=loss_fn, batches=None, **fields):
        batches = make() if batches is None else batches
        hf.fit(fn, policy64(folder), batches, aggregate=token_mean, args=args(out, 2, **SGD | fields))

    def test_wrong_number_of_rows(self, folder, tmp_path):
        with pytest.raises(ValueError, match="batches yielded 5 rows, but a step has 6: per_device_train"):
            self.fit(folder, tmp_path, batches=make(batch=5))

    def test_position_0(self, folder, tmp_path):
        batches = make()
        batches[0]["mask"][1, 0] = True
        with pytest.raises(ValueError, match="mask is True at position 0"):
            self.fit(folder, tmp_path, batches=batches)

    def test_columns(self, folder, tmp_path):
        with pytest.raises(TypeError, match=r"unknown: \['extra'\]"):
            self.fit(folder, tmp_path, batches=[b | {"extra": b["ids"]} for b in make()])

    def test_a_loss_that_is_not_a_scalar(self, folder, tmp_path):
        def bad(policy, ids, mask, weights):
            return nll(policy(ids, mask)), {}

        with pytest.raises(TypeError, match=r"reduce it to a scalar tensor with weigh"):
            self.fit(folder, tmp_path, fn=bad)

    @pytest.mark.parametrize("field", [{"label_smoothing_factor": 0.1}, {"num_train_epochs": 2}, {"data_seed": 1}])
    def test_fields_that_could_not_act(self, folder, tmp_path, field):
        with pytest.raises(ValueError, match=f"{next(iter(field))} has no effect"):
            self.fit(folder, tmp_path, **field)

    def test_a_field_with_a_name_of_its_own_here(self, tmp_path):
        with pytest.raises(ValueError, match="learning_rate is set by lr here"):
            args(tmp_path, learning_rate=1e-3)

    def test_evaluation_without_batches(self, folder, tmp_path):
        with pytest.raises(ValueError, match="eval_strategy='steps' needs eval_batches"):
            self.fit(folder, tmp_path, eval_strategy="steps")

    def test_batch_and_micro(self, tmp_path):
        with pytest.raises(ValueError, match="batch=7 must be a positive multiple of micro=2"):
            args(tmp_path, micro=2, batch=7)


@pytest.mark.parametrize(
    "fields",
    [
        {"neftune_noise_alpha": 5.0},
        {"include_num_input_tokens_seen": "all"},
        {"optim": "adafactor"},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"bf16": True, "eval_strategy": "epoch"},
        {"disable_tqdm": False, "logging_strategy": "epoch"},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("lora", [0, 2])
def test_training_arguments_act(tmp_path, fields, lora):
    policy, tok = hf.causal_lm("builtin:tiny", lora=lora)
    fields = {"metric_for_best_model": "loss"} | fields
    a = args(tmp_path, 3, lr=1e-3, **fields)
    hf.fit(loss_fn, policy, make(), aggregate=token_mean, args=a, tokenizer=tok, eval_batches=make(2, seed=5))
    last = logs(tmp_path)[-1]
    assert last["total_flos"] > 0
    assert last.get("num_input_tokens_seen", 180) == 180  # 6 rows of 6, 7, 8 and 9
    assert ("eval_loss" in {name for x in logs(tmp_path) for name in x}) == ("eval_strategy" in fields)
    assert bool(list(tmp_path.glob("checkpoint-*"))) == (fields.get("save_strategy") == "best")
