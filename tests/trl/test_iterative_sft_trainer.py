"""`IterativeSFTTrainer`: the documented behaviour, and what it gets right where the release did not."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from alignkit.trl.trainer.iterative_sft_trainer import IterativeSFTTrainer
from tests.trl.conftest import GOLDEN, golden, tiny

CASES = {case["name"]: case for case in golden("iterative_sft_step")["cases"]}
NO_COLLATOR, NO_LABELS = "No data collator is provided", "No labels are provided. Setting labels to input_ids"
IDS = [[2, 11, 13, 16, 3], [2, 12, 15, 18, 20, 34], [2, 49], [2, 39, 40, 41]]
LABELS = [[-100, -100, -100, -100, 3], [-100, -100, -100, -100, -100, 34], [-100, 49], [-100, -100, -100, 41]]


def tensors(lists):
    return [torch.tensor(x) for x in lists]


def make(model, tokenizer, folder, *, collator=None, callbacks=None, options=None, **training):
    training = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **training,
    }
    options = {"data_collator": collator, "callbacks": callbacks, **(options or {})}
    arguments = (model, TrainingArguments(str(folder), **training), tokenizer)
    if collator is not None:
        return IterativeSFTTrainer(*arguments, **options)
    with pytest.warns(UserWarning, match=NO_COLLATOR):
        return IterativeSFTTrainer(*arguments, **options)


def step(trainer, warning=NO_LABELS, **given):
    if warning is None:
        return trainer.step(**given)
    with pytest.warns(UserWarning, match=warning):
        return trainer.step(**given)


def nll(model, ids, labels=None):
    """Mean over the labels that count, of all rows, each alone."""
    losses = []
    for row, label in zip(ids, ids if labels is None else labels):
        row, label = torch.tensor([row]), torch.tensor([label])
        logits = model(input_ids=row).logits.log_softmax(-1)[0, :-1]
        losses += [-logits[t, x].item() for t, x in enumerate(label[0, 1:]) if x != -100]
    return sum(losses) / len(losses)


def logged(trainer, name="loss"):
    return [x[name] for x in trainer.state.log_history if name in x]


@pytest.fixture
def gpt2():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_gpt2")


@pytest.fixture
def words(golden_tokenizer):
    return copy.deepcopy(golden_tokenizer)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "call" in case])
def test_golden(gpt2, words, tmp_path, name):
    """Where the release was wrong, the loss is that of the arguments, computed row by row."""
    case = CASES[name]
    training = {**case["training_args"], "report_to": "none"}
    trainer = make(gpt2, words, tmp_path, options=case["trainer_args"], **training)
    calls = case["call"] if isinstance(case["call"], list) else [case["call"]]
    calls = [{key: tensors(x) if key in ("input_ids", "labels") else x for key, x in call.items()} for call in calls]
    if name == "ids_not_list":
        calls[0]["input_ids"] = torch.tensor(case["call"]["input_ids"])
    bug = (case["note"] or "").startswith("RELEASE BUG")
    if bug:
        length = case["trainer_args"].get("max_length", 99)
        ids, labels = ([x[-length:] for x in case["call"].get(key, IDS)] for key in ("input_ids", "labels"))
        expected = nll(gpt2, ids, labels)
    warning = NO_LABELS if name == "labels_none" else (case["warnings"] or [None])[0]
    if case["raises"] and not bug:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (its whole text is compared)
            trainer.step(**calls[0])
        assert str(error.value) == case["raises"][1]
        assert trainer.state.global_step == 0
    else:
        returned = [step(trainer, warning, **call) for call in calls]
        assert trainer.tr_loss == 0
        assert returned[-1]["global_step"] == trainer.state.global_step
        if bug:
            assert logged(trainer) == [pytest.approx(expected, abs=1e-5)]
            return
        assert logged(trainer) == pytest.approx([x["loss"] for x in case["log_history"]], abs=1e-4)
        assert logged(trainer, "learning_rate") == [x["learning_rate"] for x in case["log_history"]]
        assert returned[-1]["loss"] == pytest.approx(sum(logged(trainer)) / len(logged(trainer)), abs=1e-5)
    assert trainer.state.global_step == case["global_step"]
    norm = math.sqrt(sum(p.double().pow(2).sum().item() for p in gpt2.parameters()))
    assert norm == pytest.approx(case["norms_after"]["total_l2"], rel=1e-6)


@pytest.mark.parametrize("name", ["no_tokenizer", "no_max_steps"])
def test_golden_construction(gpt2, words, tmp_path, name):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=-1 if "max" in name else 2)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        IterativeSFTTrainer(gpt2, args, None if "token" in name else words)
    assert str(error.value) == CASES[name]["raises"][1]


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("given", ["tensors", "texts"])
def test_a_step_teaches_what_it_is_given(shape, given, tokenizer, tmp_path):
    texts = ["A good film.", "The plot was dull, and the end as well."]
    rows = {"texts": texts, "texts_labels": texts}
    if given == "tensors":
        ids = tensors(tokenizer(texts)["input_ids"])
        rows = {"input_ids": ids, "attention_mask": [torch.ones_like(x) for x in ids], "labels": ids}
    trainer = make(tiny(shape), tokenizer, tmp_path, learning_rate=1e-2, max_steps=3)
    losses = [trainer.step(**rows)["loss"] for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses == pytest.approx(logged(trainer))


@pytest.mark.parametrize("given", ["tensors", "texts"])
def test_encoder_decoder(given, tokenizer, tmp_path):
    """The decoder's labels are as long as they like, and padding among them does not count."""
    texts, answers = ["A good film.", "The plot was dull, and the end as well."], ["Yes.", "No, never, ever again."]
    model = tiny("t5", auto="AutoModelForSeq2SeqLM", dropout_rate=0.0)
    trainer = make(model, tokenizer, tmp_path)
    ids, labels = (tensors(tokenizer(x)["input_ids"]) for x in (texts, answers))
    means = [model(input_ids=x[None], labels=y[None]).loss.item() for x, y in zip(ids, labels)]
    lengths = [len(y) for y in labels]
    rows = {"texts": texts, "texts_labels": answers}
    if given == "tensors":
        padded = torch.cat([labels[0], torch.full((3,), tokenizer.pad_token_id)])
        rows = {"input_ids": ids, "labels": [padded, labels[1]]}
    expected = sum(m * n for m, n in zip(means, lengths)) / sum(lengths)
    assert trainer.step(**rows)["loss"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"No 'labels' or 'text_labels' are provided. When using an encoder-decoder"):
        trainer.step(texts=texts)


def test_labels_of_a_causal_model_count_where_they_are_not_ignored(gpt2, words, tmp_path):
    """Also when they differ from the ids, or have no attention."""
    labels = [[-100, 7, -100, 5, 3], *LABELS[1:]]
    expected = nll(gpt2, IDS, labels)
    trainer = make(copy.deepcopy(gpt2), words, tmp_path)
    assert trainer.step(tensors(IDS), labels=tensors(labels))["loss"] == pytest.approx(expected, abs=1e-5)
    trainer = make(copy.deepcopy(gpt2), words, tmp_path)
    padded = [x + [9] * 3 for x in IDS]
    attention = [[1] * len(x) + [0] * 3 for x in IDS]
    out = step(trainer, input_ids=tensors(padded), attention_mask=tensors(attention))
    assert out["loss"] == pytest.approx(nll(gpt2, IDS), abs=1e-5)


def test_texts_labels_are_labels(gpt2, words, tmp_path):
    texts, others = ["the cat is good", "the dog ran"], ["the dog is good", "the bird ran"]
    trainer = make(copy.deepcopy(gpt2), words, tmp_path)
    ids, labels = (words(x)["input_ids"] for x in (texts, others))
    expected = nll(gpt2, ids, labels)
    assert expected != pytest.approx(nll(gpt2, ids), abs=1e-2)
    assert trainer.step(texts=texts, texts_labels=others)["loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.step(tensors(ids), texts_labels=others)["loss"] < expected
    with pytest.raises(ValueError, match=r"one number of tokens.*'input_ids': \d+.*'labels': \d+"):
        trainer.step(texts=texts, texts_labels=["the dog", "the cat"])


def test_texts_win_over_ids(gpt2, words, tmp_path):
    texts = ["the cat is good", "the dog ran"]
    trainer = make(copy.deepcopy(gpt2), words, tmp_path)
    expected = nll(gpt2, words(texts)["input_ids"])
    with pytest.warns(UserWarning, match="'input_ids' will be overwritten"), pytest.warns(UserWarning, match=NO_LABELS):
        loss = trainer.step(input_ids=tensors(IDS), texts=texts)["loss"]
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("given", ["tensors", "texts"])
def test_truncation_is_along_the_sequence(gpt2, words, tmp_path, mode, given):
    texts = ["question : what is the cat ? the cat is good .", "the dog ran"]
    trainer = make(copy.deepcopy(gpt2), words, tmp_path, options={"max_length": 4, "truncation_mode": mode})
    assert words.truncation_side == {"keep_end": "left", "keep_start": "right"}[mode]
    rows = {"texts": texts}
    ids = words(texts, max_length=4, truncation=True)["input_ids"]
    if given == "tensors":
        full = words(texts)["input_ids"]
        assert len(full[0]) > 4
        ids = [x[-4:] if mode == "keep_end" else x[:4] for x in full]
        rows = {"input_ids": tensors(full), "attention_mask": [torch.ones(len(x)) for x in full]}
    assert step(trainer, **rows)["loss"] == pytest.approx(nll(gpt2, ids), abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["none", "lm", "seq2seq"])
def test_padding_and_collators_change_nothing(words, tmp_path, kind, side):
    """Labels of one's own count with any collator; without one, positions are right on either side."""
    words.padding_side = side
    collators = {
        "lm": lambda: DataCollatorForLanguageModeling(words, mlm=False, pad_to_multiple_of=8),
        "seq2seq": lambda: DataCollatorForSeq2Seq(words, pad_to_multiple_of=8),
        "none": lambda: None,
    }
    model = tiny("llama", vocab_size=64)  # relative positions, as collators give none
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_gpt2") if kind == "none" else model
    expected = nll(model, IDS, LABELS)
    trainer = make(model, words, tmp_path, collator=collators[kind]())
    assert trainer.step(tensors(IDS), labels=tensors(LABELS))["loss"] == pytest.approx(expected, abs=1e-5)


def test_labels_made_by_a_collator_count_if_none_are_given(gpt2, words, tmp_path):
    def last_only(rows):
        batch = DataCollatorForSeq2Seq(words)(rows)
        last = batch["attention_mask"].sum(-1, keepdim=True) - 1
        batch["labels"] = torch.full_like(batch["input_ids"], -100).scatter(1, last, batch["input_ids"].gather(1, last))
        return batch

    expected = nll(gpt2, IDS, LABELS)
    trainer = make(gpt2, words, tmp_path, collator=last_only)
    assert trainer.step(tensors(IDS))["loss"] == pytest.approx(expected, abs=1e-5)


def test_an_eos_that_pads_is_learnt_and_padding_is_not(tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    ids = [[5, 6, tokenizer.eos_token_id], [7, 8, 9, 10, tokenizer.eos_token_id]]
    model = tiny("llama")
    expected = nll(model, ids)
    trainer = make(model, tokenizer, tmp_path)
    assert step(trainer, input_ids=tensors(ids))["loss"] == pytest.approx(expected, abs=1e-5)


def test_micro_batches_change_nothing(tokenizer, tmp_path):
    """A step over rows of any length is the mean over its tokens."""
    ids = [[5, 6], [7, 8, 9, 10, 11, 12], [3, 4, 5], [9, 9, 9, 9]]
    models = []
    for micro in (1, 2, 4):
        training = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro, "optim": "sgd"}
        trainer = make(tiny("llama"), tokenizer, tmp_path, learning_rate=0.1, **training)
        assert step(trainer, input_ids=tensors(ids))["global_step"] == 1
        models.append(trainer.model.state_dict())
    for other in models[1:]:
        for name, x in models[0].items():
            torch.testing.assert_close(x, other[name], atol=1e-6, rtol=0)


def test_what_is_left_over_is_a_step_of_its_own(tokenizer, tmp_path):
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 9}
    trainer = make(tiny(), tokenizer, tmp_path, **training)
    assert step(trainer, input_ids=tensors([[5, 6, 7]] * 7))["global_step"] == 2
    assert trainer.state.epoch == 1
    assert step(trainer, input_ids=tensors([[5, 6, 7]] * 3))["global_step"] == 3
    assert trainer.state.epoch == 2


def test_the_gradient_is_clipped(tokenizer, tmp_path):
    moved = []
    for limit in (1e-3, 0.0):
        model = tiny()
        before = copy.deepcopy(model.state_dict())
        trainer = make(model, tokenizer, tmp_path, max_grad_norm=limit, optim="sgd", learning_rate=1.0, max_steps=1)
        step(trainer, input_ids=tensors([[5, 6, 7, 8]]))
        moved.append(math.sqrt(sum((p - before[n]).pow(2).sum().item() for n, p in model.named_parameters())))
        assert logged(trainer, "grad_norm")[0] == pytest.approx(moved[1] if limit == 0 else 1, abs=10)
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1] > 0.1


def test_the_schedule_is_over_max_steps(tokenizer, tmp_path):
    """And steps beyond it are taken, with a warning where they change nothing."""
    training = {"lr_scheduler_type": "linear", "max_steps": 4, "learning_rate": 0.4, "optim": "sgd"}
    trainer = make(tiny(), tokenizer, tmp_path, per_device_train_batch_size=1, **training)
    rows = tensors([[5, 6, 7, 8]] * 3)
    assert step(trainer, input_ids=rows)["learning_rate"] == pytest.approx(0.4)
    assert step(trainer, input_ids=rows)["learning_rate"] == pytest.approx(0.1)
    assert logged(trainer, "learning_rate") == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])
    with pytest.warns(UserWarning, match=NO_LABELS):
        assert step(trainer, "max_steps=4 are done", input_ids=rows)["global_step"] == 9


def test_a_scheduler_of_ones_own_needs_no_max_steps(tokenizer, tmp_path):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    options = {"optimizers": (optimizer, scheduler)}
    trainer = make(model, tokenizer, tmp_path, max_steps=-1, save_strategy="steps", options=options)
    for _ in range(3):
        step(trainer, input_ids=tensors([[5, 6, 7]]))
    assert logged(trainer, "learning_rate") == pytest.approx([0.5, 0.05, 0.005])
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_logs_evaluations_and_checkpoints_come_when_their_strategies_say(tokenizer, tmp_path, strategy):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]], "text": ["a", "b"]})
    model = tiny()
    training = {f"{x}_strategy": strategy for x in ("logging", "eval", "save")}
    training |= {"logging_steps": 2, "save_steps": 2, "eval_steps": 2 if strategy == "steps" else None}
    options = {"eval_dataset": rows, "compute_metrics": lambda p: {"same": float((p.label_ids != -100).sum())}}
    training |= {"per_device_train_batch_size": 1, "max_steps": 9, "per_device_eval_batch_size": 2}
    trainer = make(model, tokenizer, tmp_path, options=options, **training)
    for _ in range(3):
        step(trainer, input_ids=tensors([[5, 6, 7]] * 3))
    at = {"no": [], "steps": [2, 4, 6, 8, 9], "epoch": [3, 6, 9]}[strategy]
    assert sorted(int(x.name.split("-")[1]) for x in tmp_path.glob("checkpoint-*")) == at
    assert [x["step"] for x in trainer.state.log_history if "eval_loss" in x] == at
    at = [x for x in at if strategy != "steps" or x < 9]
    assert [x["step"] for x in trainer.state.log_history if "loss" in x] == at
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll(model.eval(), rows["input_ids"]), abs=1e-5)
    assert trainer.evaluate()["eval_same"] == 7


def test_eval_steps_alone_evaluate(tokenizer, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, 7, 8]]})
    model = tiny()
    expected = nll(model, rows["input_ids"], rows["labels"])
    training = {"eval_steps": 2, "learning_rate": 0.0, "eval_on_start": True, "max_steps": 4}
    trainer = make(model, tokenizer, tmp_path, options={"eval_dataset": {"a": rows}}, **training)
    for _ in range(4):
        step(trainer, input_ids=tensors([[5, 6, 7]]))
    assert logged(trainer, "eval_a_loss") == pytest.approx([expected] * 3, abs=1e-5)


def test_callbacks_hear_of_everything(tokenizer, tmp_path):
    class Heard(TrainerCallback):
        def __init__(self):
            self.events = []

        def on_train_begin(self, *args, **kwargs):
            self.events.append("train")

        def on_step_end(self, args, state, control, **kwargs):
            self.events.append(state.global_step)

        def on_log(self, args, state, control, logs, **kwargs):
            self.events.append("log")

    heard, late = Heard(), Heard()
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]]})
    training = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    options = {"eval_dataset": rows}
    trainer = make(tiny(), tokenizer, tmp_path, callbacks=[heard], options=options, **training)
    trainer.add_callback(late)
    trainer.add_callback(EarlyStoppingCallback(1))
    for _ in range(2):
        step(trainer, input_ids=tensors([[5, 6, 7]]))
    assert heard.events == late.events == ["train", 1, "log", "log", 2, "log", "log"]


def test_a_resumed_run_ends_with_the_same_parameters(tokenizer, tmp_path):
    rows = [tensors([[i, i + 1, i + 2], [9, i, i]]) for i in range(5, 9)]
    training = {"max_steps": 8, "lr_scheduler_type": "linear", "per_device_train_batch_size": 1}
    whole = make(tiny(), tokenizer, tmp_path / "whole", **training)
    for x in rows:
        step(whole, input_ids=x)
    part = make(tiny(), tokenizer, tmp_path / "part", save_strategy="epoch", **training)
    for x in rows[:2]:
        step(part, input_ids=x)
    torch.rand(5)
    resumed = make(tiny(seed=1), tokenizer, tmp_path / "part", resume_from_checkpoint="True", **training)
    assert (resumed.state.global_step, resumed.state.epoch) == (4, 2)
    for x in rows[2:]:
        step(resumed, input_ids=x)
    assert resumed.state.global_step == whole.state.global_step == 8
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    assert logged(resumed)[-4:] == pytest.approx(logged(whole)[-4:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name
@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_lora(tokenizer, tmp_path, precision):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    before = copy.deepcopy(model.state_dict())
    trainer = make(model, tokenizer, tmp_path, learning_rate=1e-2, save_strategy="steps", **precision)
    assert trainer.is_peft_model
    losses = [step(trainer, input_ids=tensors([[5, 6, 7, 8]]))["loss"] for _ in range(2)]
    assert losses[1] < losses[0]
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").exists()


def test_bf16_weights_and_gradient_checkpointing(tokenizer, tmp_path):
    trainer = make(tiny("qwen2").to(torch.bfloat16), tokenizer, tmp_path, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert step(trainer, input_ids=tensors([[5, 6, 7, 8]]))["loss"] == pytest.approx(math.log(512), rel=0.02)


def test_label_smoothing(gpt2, words, tmp_path):
    ids = torch.tensor([IDS[0]])
    plain = nll(gpt2, ids.tolist())
    uniform = -gpt2(input_ids=ids).logits.log_softmax(-1)[0, :-1].mean().item()
    trainer = make(gpt2, words, tmp_path, label_smoothing_factor=0.25)
    assert step(trainer, input_ids=[ids[0]])["loss"] == pytest.approx(0.75 * plain + 0.25 * uniform, abs=1e-5)


def test_a_saved_model_is_the_plain_one(tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    step(trainer, input_ids=tensors([[5, 6, 7]]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[name])
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["use_cache"]


def test_the_cache_of_the_device_is_emptied_if_asked(tokenizer, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "alignkit.trl.trainer.iterative_sft_trainer.clear_device_cache", lambda **options: seen.append(options)
    )
    for asked in (False, True):
        trainer = make(tiny(), tokenizer, tmp_path, options={"optimize_device_cache": asked})
        step(trainer, input_ids=tensors([[5, 6, 7]]))
        gradients = [p.grad for p in trainer.model.parameters()]
        assert all(g is None if asked else g is not None and not g.any() for g in gradients)
        assert "zero_grad" not in vars(trainer.model)
    assert seen == [{"garbage_collection": True}]


def test_a_step_that_fails_leaves_the_model_as_it_was(tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path)
    with pytest.raises(IndexError):
        step(trainer, input_ids=tensors([[5, 6, 9999]]))
    assert "zero_grad" not in vars(trainer.model)


def test_what_gets_no_gradient_is_not_decayed(tokenizer, tmp_path):
    """Gradients are kept as zeros, but none are made."""
    model = tiny()
    model.extra = torch.nn.Linear(2, 2)
    before = model.extra.weight.clone()
    trainer = make(model, tokenizer, tmp_path, weight_decay=0.5, learning_rate=0.1, max_steps=4)
    for _ in range(2):
        step(trainer, input_ids=tensors([[5, 6, 7]]))
    assert model.extra.weight.grad is None
    assert torch.equal(model.extra.weight, before)


def test_lists_that_only_look_like_lists_are_taken(tokenizer, tmp_path):
    """A column of a dataset is one."""
    rows = Dataset.from_dict({"input_ids": [[5, 6], [7, 8, 9]], "texts": ["a b", "c d"]}).with_format("torch")
    trainer = make(tiny(), tokenizer, tmp_path)
    step(trainer, input_ids=rows["input_ids"])
    step(trainer, texts=rows["texts"])


BAD = {
    "labels_type": ({"input_ids": tensors(IDS), "labels": 5}, "labels must be a list of tensors - got <class 'int'>"),
    "element": ({"input_ids": [[1, 2]]}, "Elements in input_ids must be tensors - got <class 'list'>"),
    "second_element": ({"input_ids": [torch.tensor([1]), 2]}, "Elements in input_ids must be tensors - got <class 'in"),
    "attention": (
        {"input_ids": tensors(IDS), "attention_mask": torch.ones(4, 5)},
        "attention_mask must be a list of tensors - got <class 'torch.Tensor'>",
    ),
    "text_element": ({"texts": ["a", 1]}, "Elements in 'text' must be strings - got <class 'int'>"),
    "text_label": ({"texts": ["a"], "texts_labels": [1]}, "Elements in 'text_labels' must be strings - got <class"),
    "empty": ({"input_ids": []}, "input_ids must have at least one element"),
    "dimensions": ({"input_ids": [torch.ones(1, 2).long()]}, r"must have the shape \[time\] - got \(1, 2\)"),
    "numbers": ({"input_ids": tensors(IDS), "labels": tensors(IDS[:2])}, "'input_ids': 4, 'labels': 2"),
    "lengths": ({"input_ids": tensors(IDS[:1]), "labels": tensors([[1]])}, "'input_ids': 5, 'labels': 1"),
    "mask_length": (
        {"input_ids": tensors(IDS[:1]), "attention_mask": tensors([[1]]), "labels": tensors(IDS[:1])},
        "'attention_mask': 1",
    ),
    "both": ({"texts": ["a"], "texts_labels": ["a"], "labels": tensors([[1]])}, "give one of them"),
    "ignored": ({"input_ids": tensors(IDS[:1]), "labels": tensors([[5, *[-100] * 4]])}, "no token counts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(gpt2, words, tmp_path, name):
    given, message = BAD[name]
    before = copy.deepcopy(gpt2.state_dict())
    trainer = make(gpt2, words, tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.step(**given)
    assert trainer.state.global_step == 0
    assert all(torch.equal(x, before[name]) for name, x in gpt2.state_dict().items())


def test_bad_arguments(tokenizer, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(ValueError, match=r"model must be a PreTrainedModel, got <class 'torch.nn.modules.linear"):
        IterativeSFTTrainer(torch.nn.Linear(1, 1), args, tokenizer)
    with pytest.raises(ValueError, match="tokenizer and processing_class are two names"):
        IterativeSFTTrainer(tiny(), args, tokenizer, processing_class=copy.deepcopy(tokenizer))
    with pytest.raises(ValueError, match="need to set the total number of training steps to perform `max_steps`"):
        IterativeSFTTrainer(tiny(), None, tokenizer)
    for name in ("load_best_model_at_end", "auto_find_batch_size", "dataloader_drop_last"):
        bad = copy.copy(args)
        setattr(bad, name, True)
        with pytest.raises(ValueError, match=f"{name} has no effect here"):
            IterativeSFTTrainer(tiny(), bad, tokenizer)
    with pytest.warns(UserWarning, match=NO_COLLATOR):
        trainer = IterativeSFTTrainer(tiny(), args, processing_class=tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tokenizer
    with pytest.raises(TypeError, match="step"):
        trainer.train()


def test_a_model_that_cannot_generate_is_taken_with_a_warning(tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(tiny().config)
    with pytest.warns(UserWarning, match=r"cannot `.generate\(\)`"):
        make(model, tokenizer, tmp_path)
