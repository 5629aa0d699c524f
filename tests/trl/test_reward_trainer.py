"""Reward models through the class API."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    GPT2ForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from alignkit.trl.trainer.reward_collator import RewardDataCollatorWithPadding, compute_accuracy
from alignkit.trl.trainer.reward_config import RewardConfig
from alignkit.trl.trainer.reward_trainer import RewardTrainer
from tests.trl.conftest import GOLDEN, golden, tiny

SHAPES = ["gpt2", "llama", "qwen2"]
SIDES = ("chosen", "rejected")
COLUMNS = ["input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected"]


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def scorer(shape="gpt2", **options):
    """A tiny model without dropout."""
    model = tiny(shape, auto="AutoModelForSequenceClassification", num_labels=1, pad_token_id=1, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def pairs(*lengths, margin=False, **columns):
    """Tokenised pairs of the given lengths, and any other columns."""
    torch.manual_seed(1)
    rows = []
    for i, (chosen, rejected) in enumerate(lengths):
        row = {"margin": float(i)} if margin else {}
        for side, n in zip(SIDES, (chosen, rejected)):
            row[f"input_ids_{side}"] = torch.randint(5, 500, (n,)).tolist()
            row[f"attention_mask_{side}"] = [1] * n
        rows.append(row)
    return Dataset.from_list([row | {name: x[i] for name, x in columns.items()} for i, row in enumerate(rows)])


ROWS = ((3, 5), (6, 2), (4, 4), (2, 7))


def config(folder, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 32,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RewardConfig(str(folder), **(defaults | options))


def trainer(folder, tokenizer, model=None, rows=None, eval_rows=None, options=(), **kwargs):
    rows = pairs(*ROWS) if rows is None else rows
    model = model or scorer()
    return RewardTrainer(
        model,
        config(folder, **dict(options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        tokenizer=tokenizer,
        **kwargs,
    )


class Given(nn.Module):
    """Returns the logits of the chosen answers, then those of the rejected; its ids say which."""

    def __init__(self, chosen, rejected):
        super().__init__()
        self.logits = nn.ParameterList([torch.tensor(x, dtype=torch.float64) for x in (chosen, rejected)])
        self.calls = []

    def forward(self, input_ids, attention_mask, return_dict):
        self.calls.append(int(input_ids[0, 0]))
        return {"logits": self.logits[self.calls[-1]]}


def columns(n):
    ids = {
        "input_ids_chosen": torch.zeros(n, 2, dtype=torch.long),
        "input_ids_rejected": torch.ones(n, 3, dtype=torch.long),
    }
    return ids | {name.replace("input_ids", "attention_mask"): torch.ones_like(x) for name, x in ids.items()}


class TestGoldens:
    @pytest.mark.parametrize(
        "case", golden("reward_loss")["cases"], ids=lambda case: str(case.get("name", case["num_labels"]))
    )
    def test_loss(self, tmp_path, tokenizer, case):
        """Also of a module that gives an answer several numbers; a model of several labels is refused, see below."""
        model, n = Given(case["rewards_chosen"], case["rewards_rejected"]), len(case["rewards_chosen"])
        shell = trainer(tmp_path, tokenizer, model)
        inputs = columns(n)
        if case.get("margin") is not None:
            inputs["margin"] = torch.tensor(case["margin"], dtype=torch.float64)
        if "raises" in case:  # a margin [B] against [B, 3]: here that of its pair, as [B, 1]
            loss = shell.compute_loss(model, inputs)
            torch.testing.assert_close(loss, shell.compute_loss(model, inputs | {"margin": inputs["margin"][:, None]}))
            return
        if case.get("name") == "prediction_step":
            loss, logits, labels = shell.prediction_step(model, inputs, prediction_loss_only=False)
            assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
            torch.testing.assert_close(logits, torch.tensor(case["logits"], dtype=torch.float64), atol=1e-9, rtol=0)
            assert labels.tolist() == case["labels"]
            assert shell.prediction_step(model, inputs, prediction_loss_only=True) == (loss, None, None)
            return
        loss, outputs = shell.compute_loss(model, inputs, return_outputs=True)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss_release"], abs=1e-9)
        for side, logits in zip(SIDES, model.logits):
            expected = torch.tensor(case[f"grad_{side}"], dtype=torch.float64)
            torch.testing.assert_close(logits.grad, expected, atol=1e-9, rtol=0)
        assert model.calls == [0, 1]
        assert list(outputs) == ["rewards_chosen", "rewards_rejected"]
        assert outputs["rewards_chosen"].tolist() == case["rewards_chosen"]

    @pytest.mark.parametrize("margin", [[0.0, 1.0, 0.5, 2.0], [[0.0], [1.0], [0.5], [2.0]]])
    def test_a_margin_of_either_shape_is_that_of_its_pair(self, tmp_path, tokenizer, margin):
        """[B] against logits [B, 1] was every margin against every pair."""
        case = golden("reward_loss")["cases"][1]
        model = Given(case["rewards_chosen"], case["rewards_rejected"])
        shell = trainer(tmp_path, tokenizer, model)
        loss = shell.compute_loss(model, columns(4) | {"margin": torch.tensor(margin)})
        assert loss.item() == pytest.approx(case["loss_release"], abs=1e-9)

    def test_accuracy(self):
        """The second case has a tie, which the release counted as correct; it is left out, as the release was later."""
        first, tied = golden("reward_accuracy")["cases"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = compute_accuracy((torch.tensor(first["predictions"]), torch.tensor(first["labels"])))
        assert got == first["out"]
        with pytest.warns(
            UserWarning, match="There are 1 out of 3 instances where the predictions for both options are"
        ):
            got = compute_accuracy(EvalPrediction(torch.tensor(tied["predictions"]), torch.tensor(tied["labels"])))
        assert got == {"accuracy": 0.5}

    def test_collator(self, golden_tokenizer):
        plain, wide, bad = golden("reward_collator")["cases"]
        for case, options in ((plain, {"max_length": 2}), (wide, {"pad_to_multiple_of": 4})):
            batch = RewardDataCollatorWithPadding(golden_tokenizer, **options)(plain["features"])
            assert {name: x if name == "return_loss" else x.tolist() for name, x in batch.items()} == case["batch"]
            assert batch["margin"].dtype == torch.float
        assert bad["raises"][0] == "ValueError"
        with pytest.raises(
            ValueError, match=r"^The features should include `?input_ids_chosen`?, `?attention_mask_chosen"
        ):
            RewardDataCollatorWithPadding(golden_tokenizer)([{"input_ids": [1]}])

    @pytest.mark.parametrize("case", golden("reward_step")["cases"], ids=lambda case: case["name"])
    def test_step(self, tmp_path, golden_tokenizer, case):
        """With a margin the release compared all with all: that is shown to be the whole difference."""
        model = GPT2ForSequenceClassification.from_pretrained(GOLDEN / "tiny_gpt2", num_labels=1)
        with torch.no_grad():
            model.score.weight.copy_((torch.arange(16) / 16 - 0.5)[None])
        args = config(tmp_path, **{**case["training_args"], "report_to": "none"})
        rows = Dataset.from_list(case["encoded_train"])
        eval_rows = Dataset.from_list(
            [self.encode(golden_tokenizer, row) for row in golden("reward_step")["eval_rows"]]
        )
        shell = RewardTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, tokenizer=golden_tokenizer)
        batch = shell.data_collator(list(rows))
        before = shell.evaluate()
        if case["margin"]:
            difference = self.difference(model.eval(), batch)
            broadcast = -logsigmoid(difference[:, None] - batch["margin"]).mean().item()
            assert broadcast == pytest.approx(case["log_history"][0]["loss"], abs=1e-4)
            expected = [-logsigmoid(difference - batch["margin"]).mean().item()]
        else:
            expected = [log["loss"] for log in case["log_history"] if "loss" in log]
            assert before["eval_loss"] == pytest.approx(case["eval_before"]["eval_loss"], abs=1e-6)
            assert before["eval_accuracy"] == pytest.approx(case["eval_before"]["eval_accuracy"], abs=1e-6)
        result = shell.train()
        losses = [log["loss"] for log in shell.state.log_history if "loss" in log]
        assert losses[: len(expected)] == pytest.approx(expected, abs=1e-4)
        if not case["margin"]:
            assert result.training_loss == pytest.approx(0.361927613616, abs=1e-6)
            after = shell.evaluate()
            for name, value in case["eval_after"].items():
                assert after[name] == pytest.approx(value, abs=1e-5), name
            for name, parameter in model.named_parameters():
                if name.endswith("c_attn.bias"):
                    continue  # a key's bias has gradient 0, of whose rounding Adam makes whole steps
                norm = case["norms_after"]["per_tensor"][name]
                assert parameter.norm().item() == pytest.approx(norm["l2"], abs=1e-4), name

    @staticmethod
    def encode(tokenizer, row):
        both = {side: tokenizer(row["prompt"] + row[side]) for side in SIDES}
        return {f"{name}_{side}": both[side][name] for side in SIDES for name in ("input_ids", "attention_mask")}

    @staticmethod
    @torch.no_grad()
    def difference(model, batch):
        chosen, rejected = (
            model(input_ids=batch[f"input_ids_{side}"], attention_mask=batch[f"attention_mask_{side}"]).logits
            for side in SIDES
        )
        return (chosen - rejected)[:, 0]


class TestCollator:
    def test_max_length_is_a_width(self, tokenizer):
        rows = list(pairs((3, 5)))
        batch = RewardDataCollatorWithPadding(tokenizer, padding="max_length", max_length=9)(rows)
        assert batch["input_ids_chosen"].shape == batch["input_ids_rejected"].shape == (1, 9)
        assert batch["attention_mask_rejected"].sum() == 5
        assert "margin" not in batch

    @pytest.mark.parametrize("name", COLUMNS)
    def test_a_missing_column_is_named(self, tokenizer, name):
        rows = list(pairs((3, 5), (2, 2)).remove_columns(name))
        with pytest.raises(ValueError, match=f"{name!r} is not among"):
            RewardDataCollatorWithPadding(tokenizer)(rows)

    @pytest.mark.parametrize("second", [{}, {"margin": None}])
    def test_margins_of_some_rows(self, tokenizer, second):
        first, row = pairs((3, 5), (2, 2))
        with pytest.raises(ValueError, match=r"some rows have no margin, \[1.0, None\]: give all of them a number"):
            RewardDataCollatorWithPadding(tokenizer)([first | {"margin": 1.0}, row | second])


def test_accuracy_of_nothing_but_ties():
    with pytest.warns(UserWarning, match="There are 2 out of 2"):
        assert math.isnan(compute_accuracy((torch.full((2, 2), 0.5), torch.zeros(2)))["accuracy"])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_changes_every_parameter_and_predicts(tmp_path, tokenizer, shape, checkpointing):
    """The release's own test: right padding, accumulated gradients, evaluation while training."""
    model = scorer(shape)
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {
        "gradient_accumulation_steps": 4,
        "evaluation_strategy": "steps",
        "gradient_checkpointing": checkpointing,
    }
    shell = trainer(tmp_path, tokenizer, model, eval_rows=pairs(*ROWS), options=options)
    shell.train()
    assert shell.state.log_history[-1]["train_loss"] > 0
    for name, p in model.named_parameters():
        assert p.sum() == 0 or not torch.equal(p, before[name]), name
    predicted = shell.predict(pairs(*ROWS))
    assert predicted.predictions.shape == (4, 2)
    assert predicted.predictions.sum(1) == pytest.approx([1, 1, 1, 1], abs=1e-5)
    assert predicted.label_ids.tolist() == [0, 0, 0, 0]
    assert predicted.metrics["test_accuracy"] == (predicted.predictions[:, 0] > predicted.predictions[:, 1]).mean()
    assert 0 < shell.evaluate(pairs((3, 4)), metric_key_prefix="other")["other_loss"] < 5


def test_it_learns_and_logs_the_rewards(tmp_path, tokenizer):
    options = {"max_steps": 12, "per_device_train_batch_size": 4}
    shell = trainer(tmp_path, tokenizer, eval_rows=pairs(*ROWS), options=options)
    shell.train()
    first, *_, last = [log for log in shell.state.log_history if "loss" in log]
    assert last["loss"] < 0.2 < first["loss"]
    assert last["rewards/accuracies"] == 1
    for log in (first, last):
        assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"], abs=1e-5)
    metrics = shell.evaluate()
    assert metrics["eval_accuracy"] == metrics["eval_rewards/accuracies"] == 1
    assert metrics["eval_loss"] < 0.2
    assert metrics["eval_rewards/margins"] > 1
    predicted = shell.predict(pairs(*ROWS)).predictions
    assert (predicted[:, 0] > 0.6).all()


@pytest.mark.parametrize("margin", [False, True])
def test_the_size_of_a_micro_batch_changes_nothing(tmp_path, tokenizer, margin):
    rows, models = pairs((3, 5), (6, 2), (4, 4), (2, 7), margin=margin), []
    for micro in (4, 1):
        model = scorer().double()
        options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro, "optim": "sgd"}
        shell = trainer(tmp_path / str(micro), tokenizer, model, rows=rows, options=options)
        shell.train()
        models.append((model.state_dict(), [log["loss"] for log in shell.state.log_history if "loss" in log]))
    assert models[0][1] == pytest.approx(models[1][1], abs=1e-6)
    for name, x in models[0][0].items():
        torch.testing.assert_close(x, models[1][0][name], atol=1e-12, rtol=0)
    assert any(not torch.equal(x, y) for x, y in zip(scorer().double().state_dict().values(), models[0][0].values()))


@pytest.mark.parametrize(("shape", "side"), [("gpt2", "right"), ("llama", "right"), ("llama", "left")])
def test_padding_changes_nothing(tmp_path, tokenizer, shape, side):
    tokenizer.padding_side = side
    model = scorer(shape).double()
    shell = trainer(tmp_path, tokenizer, model)
    rows = list(pairs(*ROWS))
    together = shell.compute_loss(model, shell.data_collator(rows))
    alone = [shell.compute_loss(model, shell.data_collator([row])) for row in rows]
    assert together.item() == pytest.approx(sum(alone).item() / 4, abs=1e-9)


def test_bfloat16(tmp_path, tokenizer):
    shell = trainer(tmp_path, tokenizer, scorer().bfloat16(), eval_rows=pairs(*ROWS))
    shell.train()
    assert 0 < shell.evaluate()["eval_loss"] < 5
    assert shell.predict(pairs(*ROWS)).predictions.sum(1) == pytest.approx([1] * 4, abs=1e-6)  # not in half precision
    shell = trainer(tmp_path, tokenizer, options={"bf16": True})
    assert 0 < shell.train().training_loss < 5


LORA = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1}


class TestAdapters:
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name
    @pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_only_the_adapter_and_the_head_are_trained(self, tmp_path, tokenizer, shape, options):
        from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel

        scorer(shape).save_pretrained(tmp_path / "base")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        options = {"max_steps": 3, "learning_rate": 0.5, "evaluation_strategy": "steps", **options}
        shell = trainer(
            tmp_path, tokenizer, model, eval_rows=pairs(*ROWS), options=options, peft_config=LoraConfig(**LORA)
        )
        assert isinstance(shell.model, PeftModel)
        before = {name: p.clone() for name, p in shell.model.named_parameters()}
        shell.train()
        for name, p in shell.model.named_parameters():
            assert torch.equal(p, before[name]) is not ("lora" in name or "modules_to_save" in name), name
        assert shell.predict(pairs(*ROWS)).predictions.shape == (4, 2)
        shell.save_model(str(tmp_path / "adapter"))
        again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
        batch = shell.data_collator(list(pairs(*ROWS)))
        inputs = {"input_ids": batch["input_ids_chosen"], "attention_mask": batch["attention_mask_chosen"]}
        with torch.no_grad():
            expected = shell.model.eval()(**inputs).logits
            torch.testing.assert_close(again.eval()(**inputs).logits, expected, atol=1e-4, rtol=1e-4)

    def test_a_head_that_would_stay_random(self, tmp_path, tokenizer):
        from peft import LoraConfig

        with pytest.warns(UserWarning, match="task_type=None leaves the head as it is, use SEQ_CLS to train it"):
            trainer(tmp_path, tokenizer, peft_config=LoraConfig(r=2))
        trainer(tmp_path, tokenizer, peft_config=LoraConfig(r=2, modules_to_save=["score"]))

    def test_a_quantised_model_is_prepared(self, tmp_path, tokenizer):
        """Half precision parameters become float32, as peft's preparation does."""
        from peft import LoraConfig

        model = scorer("llama").bfloat16()
        model.is_loaded_in_8bit = True
        shell = trainer(tmp_path, tokenizer, model, peft_config=LoraConfig(**LORA))
        assert shell.model.get_base_model().model.norm.weight.dtype == torch.float32
        assert {p.dtype for p in shell.model.parameters() if p.requires_grad} == {torch.float32}

    def test_without_peft(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr("alignkit.trl.trainer.reward_trainer.is_peft_available", lambda: False)
        with pytest.raises(ValueError, match="peft_config needs the library peft, which is not installed"):
            trainer(tmp_path, tokenizer, peft_config=object())

    def test_a_model_init_makes_its_own(self, tmp_path, tokenizer):
        from peft import LoraConfig

        with pytest.raises(ValueError, match="peft_config needs a model: a model_init returns the PeftModel itself"):
            RewardTrainer(
                None, config(tmp_path), tokenizer=tokenizer, model_init=lambda: scorer(), peft_config=LoraConfig(**LORA)
            )


class TestArguments:
    def test_plain_training_arguments_are_deprecated(self, tmp_path, tokenizer):
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
        with (
            pytest.warns(FutureWarning, match="class TrainingArguments are deprecated: use a RewardConfig"),
            pytest.warns(FutureWarning, match="argument `max_length` is deprecated"),
        ):
            shell = RewardTrainer(scorer(), args, tokenizer=tokenizer, max_length=20)
        assert shell.data_collator.max_length == 20
        with pytest.warns(FutureWarning), pytest.warns(UserWarning, match="No max_length in the RewardConfig: .* 512"):
            assert RewardTrainer(scorer(), args, tokenizer=tokenizer).data_collator.max_length == 512

    def test_max_length(self, tmp_path, tokenizer):
        assert trainer(tmp_path, tokenizer).data_collator.max_length == 32
        with pytest.warns(FutureWarning, match="argument `max_length` is deprecated"):
            shell = trainer(tmp_path, tokenizer, options={"max_length": None}, max_length=20)
        assert shell.data_collator.max_length == 20
        with pytest.raises(ValueError, match=r"max_length=20 and args.max_length=32: give it once"):
            trainer(tmp_path, tokenizer, max_length=20)
        with pytest.warns(UserWarning, match="No max_length in the RewardConfig"):
            assert trainer(tmp_path, tokenizer, options={"max_length": None}).data_collator.max_length == 512

    def test_longer_rows_are_not_cut(self, tmp_path, tokenizer):
        shell = trainer(tmp_path, tokenizer, options={"max_length": 4})
        assert shell.data_collator(list(pairs(*ROWS)))["input_ids_chosen"].shape == (4, 6)

    def test_all_columns_are_kept_for_the_collator(self, tmp_path, tokenizer):
        """Others, such as the texts, are dropped there."""
        rows = pairs(*ROWS, chosen=list("abcd"), rejected=list("efgh"), number=[1, 2, 3, 4])
        with pytest.warns(UserWarning, match="remove_unused_columns is set to False"):
            shell = trainer(tmp_path, tokenizer, rows=rows, options={"remove_unused_columns": True})
        assert shell.args.remove_unused_columns is False
        assert 0 < shell.train().training_loss < 5

    def test_rows_that_are_not_tokenised(self, tmp_path, tokenizer):
        rows = Dataset.from_dict({"chosen": ["good"], "rejected": ["bad"]})
        shell = trainer(tmp_path, tokenizer, rows=rows)
        with pytest.raises(ValueError, match=r"The features should .* Texts are tokenised first, e.g. dataset.map"):
            shell.train()

    def test_the_names_of_the_tokenizer(self, tmp_path, tokenizer):
        shell = RewardTrainer(scorer(), config(tmp_path), processing_class=tokenizer)
        assert shell.tokenizer is shell.processing_class is tokenizer is shell.data_collator.tokenizer
        with pytest.raises(ValueError, match="tokenizer and processing_class are two names of one argument"):
            trainer(tmp_path, tokenizer, processing_class=object())
        with pytest.raises(ValueError, match="tokenizer=None: the default RewardDataCollatorWithPadding needs one"):
            RewardTrainer(scorer(), config(tmp_path))

    @pytest.mark.parametrize(("name", "value"), [("label_smoothing_factor", 0.1), ("label_names", ["x"])])
    def test_arguments_that_could_not_act(self, tmp_path, tokenizer, name, value):
        with pytest.raises(ValueError, match=f"the training argument {name}=.* has no effect here: "):
            trainer(tmp_path, tokenizer, options={name: value})

    @pytest.mark.parametrize("labels", [2, 3])
    def test_more_labels(self, tmp_path, tokenizer, labels):
        model = tiny("gpt2", auto="AutoModelForSequenceClassification", num_labels=labels)
        message = f"num_labels={labels}, but a reward is one number: load it with num_labels=1"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, tokenizer, model)
        with pytest.raises(ValueError, match=message):
            RewardTrainer(None, config(tmp_path), tokenizer=tokenizer, model_init=lambda: model)
        with pytest.raises(ValueError, match="num_labels=2"):
            trainer(tmp_path, tokenizer, tiny("gpt2"))  # a causal language model

    def test_defaults(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
        with (
            pytest.warns(UserWarning, match="No max_length in the RewardConfig"),
            pytest.warns(UserWarning, match="remove_unused_columns is set to False"),
        ):
            shell = RewardTrainer(scorer(), tokenizer=tokenizer)
        assert type(shell.args) is RewardConfig
        assert (shell.args.output_dir, shell.args.gradient_checkpointing) == ("tmp_trainer", True)
        assert shell.use_reward_data_collator


class TestTrainer:
    """What the `Trainer` does, it does here."""

    def test_a_collator_of_ones_own(self, tmp_path, tokenizer):
        inner = RewardDataCollatorWithPadding(tokenizer)
        shell = RewardTrainer(
            scorer(), config(tmp_path), train_dataset=pairs(*ROWS), data_collator=lambda rows: inner(rows)
        )
        assert not shell.use_reward_data_collator
        with pytest.warns(UserWarning, match="make sure that your data_collator makes them, or override `loss`"):
            assert 0 < shell.train().training_loss < 5

    def test_metrics_of_ones_own(self, tmp_path, tokenizer):
        def logits_for_metrics(logits, labels):
            assert labels.shape == (2,)
            return logits.log()

        shell = trainer(
            tmp_path,
            tokenizer,
            eval_rows=pairs(*ROWS),
            compute_metrics=lambda p: {"largest": p.predictions.max(), "rows": len(p.label_ids)},
            preprocess_logits_for_metrics=logits_for_metrics,
            options={"per_device_eval_batch_size": 2},
        )
        metrics = shell.evaluate()
        assert metrics["eval_largest"] < 0
        assert metrics["eval_rows"] == 4
        assert "eval_accuracy" not in metrics

    def test_only_the_loss(self, tmp_path, tokenizer):
        shell = trainer(tmp_path, tokenizer, eval_rows=pairs(*ROWS), options={"prediction_loss_only": True})
        metrics = shell.evaluate()
        assert "eval_accuracy" not in metrics
        assert metrics["eval_loss"] > 0

    def test_several_evaluation_sets_and_a_ragged_last_batch(self, tmp_path, tokenizer):
        sets = {"one": pairs((3, 4), (5, 2), (2, 2)), "two": pairs((2, 2))}
        shell = trainer(tmp_path, tokenizer, eval_rows=sets, options={"per_device_eval_batch_size": 2})
        metrics = shell.evaluate()
        model, batch = shell.model.eval(), shell.data_collator(list(sets["one"]))
        difference = TestGoldens.difference(model, batch)
        assert metrics["eval_one_loss"] == pytest.approx(-logsigmoid(difference).mean().item(), abs=1e-6)
        assert metrics["eval_one_rewards/margins"] == pytest.approx(difference.mean().item(), abs=1e-6)
        assert "eval_two_accuracy" in metrics

    def test_ignored_keys(self, tmp_path, tokenizer):
        shell = trainer(tmp_path, tokenizer)
        batch = shell.data_collator(list(pairs(*ROWS)))
        shell.model.eval()
        assert shell.prediction_step(shell.model, batch, False, ignore_keys=["rewards_rejected"])[1].shape == (4, 1)

    def test_model_init_callbacks_and_optimizers(self, tmp_path, tokenizer):
        seen = []

        class Spy(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(state.global_step)

        shell = RewardTrainer(
            args=config(tmp_path),
            train_dataset=pairs(*ROWS),
            tokenizer=tokenizer,
            model_init=lambda: scorer(),
            callbacks=[Spy()],
        )
        shell.train()
        assert seen == [1, 2]
        model = scorer()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        trainer(tmp_path, tokenizer, model, optimizers=(optimizer, schedule)).train()
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_saved_models_and_resuming(self, tmp_path, tokenizer):
        models = []
        for name, resume in (("once", None), ("twice", str(tmp_path / "once" / "checkpoint-1"))):
            model = scorer()
            options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
            shell = trainer(tmp_path / name, tokenizer, model, options=options)
            shell.train(resume_from_checkpoint=resume)
            models.append(model.state_dict())
        shell.save_model(str(tmp_path / "saved"))
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert loaded.config.num_labels == 1
        for name, x in models[0].items():
            torch.testing.assert_close(models[1][name], x, rtol=0, atol=0)
            torch.testing.assert_close(loaded.state_dict()[name], x, rtol=0, atol=0)
        state = json.loads(Path(tmp_path / "twice" / "checkpoint-3" / "trainer_state.json").read_text())
        assert "rewards/accuracies" in state["log_history"][-1]
