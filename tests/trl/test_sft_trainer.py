"""SFTTrainer: the golden run, losses that no batching changes, models, adapters, noise, and the recipe's parameters."""

import copy
import json
import os
import runpy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, MixtralConfig, TrainingArguments

from alignkit.trl.trainer import peft_setup
from alignkit.trl.trainer.completion_collator import DataCollatorForCompletionOnlyLM
from alignkit.trl.trainer.constant_length_dataset import ConstantLengthDataset
from alignkit.trl.trainer.neftune import neftune_post_forward_hook
from alignkit.trl.trainer.sft_trainer import SFTTrainer
from tests.test_layers import ROOT
from tests.trl import conftest
from tests.trl.conftest import GOLDEN, golden

STEP = golden("sft_step")
CASES = {case["name"]: case for case in STEP["cases"]}
TEXTS = STEP["texts"]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}


def tiny(shape="gpt2", **options):
    """Without dropout, so that two runs are comparable."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if shape == "gpt2" else {}
    return conftest.tiny(shape, **dropout | options)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make(tmp_path, golden_tokenizer):
    """A trainer on four texts, which are one batch; `options` are SFTTrainer's, `training` those of its arguments."""

    def trainer(model=None, texts=TEXTS, training=None, **options):
        defaults = {
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
        }
        rows = Dataset.from_dict({"text": texts})
        options = {
            "args": TrainingArguments(tmp_path / "out", **defaults | (training or {})),
            "train_dataset": rows,
            "eval_dataset": rows,
            "tokenizer": golden_tokenizer,
            "dataset_text_field": "text",
            "max_seq_length": 16,
        } | options
        return SFTTrainer(tiny() if model is None and "model_init" not in options else model, **options)

    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(a, b, **tolerance):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def own_loss(model, tokenizer, texts=TEXTS, **options):
    """The loss of a model's own forward pass."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=16)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    with torch.no_grad():
        return model.eval()(**batch, labels=labels, **options).loss.item()


# ---- the release's numbers


@pytest.mark.parametrize("name", CASES)
def test_golden_step(make, golden_tokenizer, name):
    case = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_gpt2", dtype="float32")
    options = dict(case["args"])
    if name == "completion_only":
        options["data_collator"] = DataCollatorForCompletionOnlyLM("?", tokenizer=golden_tokenizer)
    options["eval_dataset"] = Dataset.from_dict({"text": STEP["eval_texts"]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(model, training=case["training_args"], **options)
        before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    known = {"plain": (), "completion_only": ("Could not find response key",), "neftune": ("`neftune_noise_alpha`",)}
    assert all(str(w.message).startswith(("remove_unused_columns=False", *known[name])) for w in caught)
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in trainer.train_dataset]
    assert rows == case["train_rows"]
    assert before["eval_loss"] == pytest.approx(case["eval_before"]["eval_loss"], abs=1e-5)
    assert not model.get_input_embeddings()._forward_hooks
    if name == "neftune":  # whose noise is another
        return
    assert losses(trainer) == pytest.approx([x["loss"] for x in case["log_history"] if "loss" in x], abs=1e-4)
    assert after["eval_loss"] == pytest.approx(case["eval_after"]["eval_loss"], abs=1e-4)
    norms = case["norms_after"]
    squares = {name: x.double().pow(2).sum() for name, x in model.named_parameters()}
    assert sum(squares.values()).sqrt().item() == pytest.approx(norms["total_l2"], rel=1e-4)
    per_tensor = {key: norm for key, norm in norms.get("per_tensor", {}).items() if "c_attn.bias" not in key}
    for key, norm in per_tensor.items():  # the keys' biases have no gradient, of which Adam makes noise
        assert squares[key].sqrt().item() == pytest.approx(norm["l2"], rel=1e-4)


@pytest.mark.parametrize("case", golden("neftune")["cases"], ids=lambda case: str(case["seq_len"]))
def test_golden_neftune(case):
    embedding = torch.nn.Embedding(9, case["hidden"])
    embedding.neftune_noise_alpha = case["alpha"]
    embedding.register_forward_hook(neftune_post_forward_hook)
    ids = torch.zeros(case["batch"], case["seq_len"], dtype=torch.long)
    plain = embedding.eval()(ids)
    torch.testing.assert_close(plain, embedding.weight[ids], atol=0, rtol=0)
    torch.manual_seed(case["torch_seed"])
    noise = embedding.train()(ids) - plain
    expected = torch.tensor(case["noise"])
    torch.testing.assert_close(noise[:, : expected.shape[1]], expected, atol=1e-6, rtol=0)
    assert noise.abs().max() <= case["mag"] + 1e-6


# ---- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
def test_the_loss_is_the_cross_entropy_of_all_tokens(make, golden_tokenizer, shape, smoothing):
    model = tiny(shape)
    trainer = make(model, training={"label_smoothing_factor": smoothing})
    batch = golden_tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=16)
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    keep = batch["attention_mask"][:, 1:].bool()
    ids = batch["input_ids"][:, 1:][keep]
    expected = cross_entropy(logits[keep], ids, label_smoothing=smoothing).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    accuracy = (logits[keep].argmax(-1) == ids).float().mean().item()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(trainer)[1] < losses(trainer)[0]
    assert model.config.use_cache


def test_accuracy_counts_what_was_predicted(make):
    """A model of one text after many steps knows all of it."""
    trainer = make(
        tiny("llama"),
        texts=["yes no yes no yes no"],
        training={"max_steps": 40, "optim": "adamw_torch", "learning_rate": 0.03},
    )
    trainer.train()
    assert trainer.evaluate()["eval_mean_token_accuracy"] > 0.9


def test_micro_batches_change_nothing(make):
    """Rows have 4 to 16 tokens, so that a mean of means would differ."""
    ends = []
    for micro in (4, 2, 1):
        training = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro, "max_steps": 3}
        trainer = make(tiny("llama", attention_dropout=0.0), training=training)
        trainer.train()
        ends.append((trainer.model, losses(trainer)))
    for model, seen in ends[1:]:
        same(model, ends[0][0], atol=1e-6, rtol=1e-5)
        assert seen == pytest.approx(ends[0][1], rel=1e-5)


def test_rows_without_labels_count_for_nothing(make, golden_tokenizer):
    collator = DataCollatorForCompletionOnlyLM("?", tokenizer=golden_tokenizer)
    ends = []
    for texts in ([TEXTS[0]], [TEXTS[0], "the dog ran"]):
        trainer = make(tiny("llama"), texts=texts, data_collator=collator)
        if len(texts) == 2:
            with pytest.warns(UserWarning, match="Could not find response key"):
                trainer.train()
        else:
            trainer.train()
        ends.append(trainer.model)
    same(*ends, atol=1e-6, rtol=1e-5)
    model = tiny()
    trainer = make(model, texts=["the dog ran"], data_collator=collator)
    with pytest.warns(UserWarning, match="Could not find response key"):
        trainer.train()
    same(model, tiny(), atol=0, rtol=0)
    assert losses(trainer) == [0.0, 0.0]


def test_any_ignore_index_and_labels_of_ones_own(make, golden_tokenizer):
    collator = DataCollatorForCompletionOnlyLM("?", tokenizer=golden_tokenizer, ignore_index=-7)
    trainer = make(texts=[TEXTS[0]], data_collator=collator)
    expected = make(texts=[TEXTS[0]], data_collator=DataCollatorForCompletionOnlyLM("?", tokenizer=golden_tokenizer))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"])
    ids = golden_tokenizer(TEXTS[0])["input_ids"]
    start = ids.index(golden_tokenizer.convert_tokens_to_ids("?")) + 1
    rows = Dataset.from_list([{"input_ids": ids, "labels": [-100] * start + ids[start:]}])
    own = make(train_dataset=rows, eval_dataset=rows, dataset_text_field=None)
    assert own.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"])


def test_metrics_get_the_logits(make, golden_tokenizer):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"answer": 42.0}

    model = tiny()
    trainer = make(model, compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_answer"] == 42.0
    assert seen == [((4, 16, 512), (4, 16))]
    caches = []
    model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert caches == [None]  # which would cost memory
    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        expected = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.tensor(predictions), expected)
    trainer = make(
        model, compute_metrics=compute_metrics, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)
    )
    trainer.evaluate()
    assert seen[-1] == ((4, 16), (4, 16))


def test_a_collator_without_labels(make):
    trainer = make(data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"][:3] for row in rows])})
    with pytest.raises(ValueError, match=r"data_collator must make the column 'labels'.*\['input_ids'\]"):
        trainer.train()


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_padding_on_the_left_changes_nothing(make, golden_tokenizer, shape):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.padding_side = "left"
    with pytest.warns(UserWarning, match="padding_side is not 'right'"):
        left = make(tiny(shape), tokenizer=tokenizer)
    right = make(tiny(shape))
    assert left.evaluate()["eval_loss"] == pytest.approx(right.evaluate()["eval_loss"], rel=1e-5)
    for trainer in (left, right):
        trainer.train()
    same(left.model, right.model, atol=1e-6, rtol=1e-4)


def test_an_encoder_decoder(make):
    model = tiny("t5", auto="AutoModelForSeq2SeqLM")
    rows = Dataset.from_list(
        [{"input_ids": [11, 13, 16], "labels": [19, 11, 22, 3]}, {"input_ids": [11, 14], "labels": [17, 3]}]
    )
    trainer = make(model, train_dataset=rows, eval_dataset=rows, dataset_text_field=None)
    batch = trainer.data_collator(list(rows))
    with torch.no_grad():
        expected = model(**batch)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    keep = batch["labels"] >= 0
    hits = (expected.logits.argmax(-1) == batch["labels"])[keep].float().mean().item()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(hits)
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]


def test_a_mixture_of_experts_adds_its_balance(make, golden_tokenizer):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    without = own_loss(model, golden_tokenizer, output_router_logits=False)
    expected = own_loss(model, golden_tokenizer)
    assert expected > without + 0.1
    assert make(model).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_plain_module(make):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny()

        def forward(self, input_ids, attention_mask=None, labels=None):
            return (self.lm(input_ids, attention_mask=attention_mask).logits,)

    expected = make()
    trainer = make(Plain())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"])
    for each in (trainer, expected):
        each.train()
    same(trainer.model.lm, expected.model)


# ---- running


def test_a_resumed_run_ends_like_an_uninterrupted_one(make, tmp_path):
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    packed = {"packing": True, "max_seq_length": 8}  # four sequences, whose order is the seed's
    whole = make(training=options | {"max_steps": 5, "learning_rate": 0.01}, **packed)
    whole.train()
    first = make(training=options | {"max_steps": 5, "learning_rate": 0.01}, **packed)
    first.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    same(first.model, whole.model, atol=0, rtol=0)
    assert losses(first) == losses(whole)


@pytest.fixture(autouse=True)
def _repeats():
    """Packing with max_steps says so; tested below."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "packing=True with `max_steps`")
        yield


def test_model_init(make):
    drawn = []

    def init():
        drawn.append(1)
        return tiny()

    trainer = make(model_init=init)
    trainer.train()
    expected = make()
    expected.train()
    same(trainer.model, expected.model)
    assert len(drawn) == 2
    adapted = make(model_init=init, peft_config=LoraConfig(**LORA))
    adapted.train()
    assert isinstance(adapted.model, PeftModel)
    with pytest.raises(ValueError, match="tokenizer is None"):
        make(model_init=init, tokenizer=None)


def test_optimizers_of_ones_own(make):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make(model, optimizers=(optimizer, scheduler), training={"learning_rate": 7.0})
    trainer.train()
    expected = make()
    expected.train()
    same(model, expected.model)


def test_several_sets_to_evaluate_on(make):
    rows = {"long": Dataset.from_dict({"text": TEXTS[:2]}), "short": Dataset.from_dict({"text": TEXTS[3:]})}
    trainer = make(eval_dataset=rows, training={"eval_strategy": "steps", "eval_steps": 1})
    trainer.train()
    seen = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_long_loss", "eval_short_loss", "eval_long_mean_token_accuracy"} <= seen
    assert set(rows["long"].column_names) == {"text"}  # the caller's dict is as it was


def test_packing(make, golden_tokenizer):
    ids = [golden_tokenizer(text)["input_ids"] + [3] for text in TEXTS]
    with pytest.warns(UserWarning, match="packing=True with `max_steps`"):
        trainer = make(packing=True, max_seq_length=8)
    assert len(trainer.train_dataset) == sum(map(len, ids)) // 8
    assert trainer.eval_dataset[0]["input_ids"] == ids[0][:8]
    trainer.train()
    assert losses(trainer)[1] != losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(_packed_loss(trainer), rel=1e-5)
    alone = make(packing=True, eval_packing=False, max_seq_length=8)
    assert [len(row) for row in alone.eval_dataset["input_ids"]] == [8, 8, 8, 4]
    alone = make(packing=False, eval_packing=True, max_seq_length=8)
    assert [len(row) for row in alone.train_dataset["input_ids"]] == [8, 8, 8, 4]
    assert {len(row) for row in alone.eval_dataset["input_ids"]} == {8}


def _packed_loss(trainer):
    model = trainer.model.eval()
    chunks = [torch.tensor([row["input_ids"]]) for row in trainer.eval_dataset]
    with torch.no_grad():
        each = [model(input_ids=chunk, labels=chunk).loss.item() for chunk in chunks]
    return sum(each) / len(each)


def test_constant_length_datasets_are_repeated_for_max_steps(make, golden_tokenizer):
    def data():
        rows = Dataset.from_dict({"text": TEXTS})
        return ConstantLengthDataset(golden_tokenizer, rows, dataset_text_field="text", seq_length=8, shuffle=False)

    both = data()
    trainer = make(train_dataset=both, eval_dataset=both, packing=True, training={"max_steps": 4})
    assert trainer.train_dataset.infinite
    assert trainer.eval_dataset is both
    assert not both.infinite
    trainer.evaluate()
    with pytest.warns(UserWarning, match="The dataset reached end"):
        trainer.train()
    assert trainer.state.global_step == 4
    trainer = make(train_dataset=data(), packing=True, training={"max_steps": -1, "num_train_epochs": 1})
    assert not trainer.train_dataset.infinite
    trainer.train()
    assert trainer.state.global_step == 1


def test_contradictions(make, golden_tokenizer):
    collator = DataCollatorForCompletionOnlyLM("?", tokenizer=golden_tokenizer)
    for packing in ({"packing": True}, {"eval_packing": True}):
        with pytest.raises(ValueError, match=r"data_collator is a DataCollatorForCompletionOnlyLM.*packing=True"):
            make(data_collator=collator, **packing)
    with pytest.raises(ValueError, match=r"model_init_kwargs=\{'dtype': 'auto'\} need the name of a model"):
        make(model_init_kwargs={"dtype": "auto"})
    with pytest.warns(UserWarning, match="`infinite` is deprecated"):
        make(infinite=True)
    with pytest.raises(ValueError, match="didn't pass a `dataset_text_field` or `formatting_func`"):
        make(dataset_text_field=None)


def test_defaults(golden_tokenizer, tmp_path, monkeypatch):
    """No arguments, no length, no tokenizer, and a model by its name."""
    monkeypatch.chdir(tmp_path)
    tiny(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    golden_tokenizer.save_pretrained(tmp_path / "model")
    rows = Dataset.from_dict({"text": ["yes " * 100]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = SFTTrainer(
            str(tmp_path / "model"),
            train_dataset=rows,
            dataset_text_field="text",
            peft_config=LoraConfig(**LORA),
        )
    messages = " ".join(str(w.message) for w in caught)
    assert "`model` is a name" in messages
    assert "`max_seq_length`: it is 64" in messages
    assert len(trainer.train_dataset[0]["input_ids"]) == 64
    assert isinstance(trainer.model, PeftModel)
    assert trainer.processing_class.pad_token == "[PAD]"
    assert trainer.model.model_tags == ["trl", "sft"]


@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        ({}, torch.float32),
        (
            {"torch_dtype": None, "use_flash_attention_2": False, "device_map": None, "quantization_config": None},
            torch.float32,
        ),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
    ],
)
def test_models_by_name(tmp_path, kwargs, dtype):
    tiny().bfloat16().save_pretrained(tmp_path)
    assert peft_setup.load(str(tmp_path), kwargs).dtype == dtype


def test_flash_attention_by_its_old_name():
    class Auto:
        @staticmethod
        def from_pretrained(name, **kwargs):
            return kwargs

    kwargs = peft_setup.load("name", {"use_flash_attention_2": True}, Auto)
    assert kwargs == {"dtype": "float32", "attn_implementation": "flash_attention_2"}


# ---- adapters


@pytest.mark.parametrize("training", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_lora(make, tmp_path, training):
    model = tiny().bfloat16() if "bf16" in training else tiny()
    before = copy.deepcopy(model)
    trainer = make(
        model, peft_config=LoraConfig(**LORA), training=training | {"save_strategy": "steps", "save_steps": 2}
    )
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora" in name and p.dtype == torch.float32 for name, p in trainable.items())
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]
    assert any(p.abs().sum() > 0 for name, p in trainable.items() if "lora_B" in name)
    for name, x in before.state_dict().items():
        inside = name.replace("c_attn.", "c_attn.base_layer.")
        torch.testing.assert_close(trainer.model.get_base_model().state_dict()[inside], x, atol=0, rtol=0)
    files = os.listdir(tmp_path / "out" / "checkpoint-2")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert "model.safetensors" not in files


def test_checkpointing_reaches_adapters_through_reentrant_segments():
    """Without inputs that require grad, a reentrant segment of frozen inputs returns no gradient."""
    args = TrainingArguments("out", gradient_checkpointing=True, use_cpu=True)
    model = peft_setup.wrap(tiny(), LoraConfig(**LORA), args)
    embedded = model.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert embedded.requires_grad

    class Plain(torch.nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.embed, self.linear = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, ids):
            return self.linear(self.embed(ids))

    plain = peft_setup.wrap(Plain(), LoraConfig(r=1, target_modules=["linear"]), args)
    assert plain.base_model.model.embed(torch.tensor([1])).requires_grad


def test_a_quantised_model_is_prepared(monkeypatch):
    model = tiny().bfloat16()
    model.is_loaded_in_4bit = True
    prepared = []
    monkeypatch.setattr(peft_setup, "get_peft_model", lambda model, config: prepared.append(model) or model)
    peft_setup.wrap(model, LoraConfig(**LORA))
    assert prepared == [model]
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_adapters_given_twice_or_wrongly(make):
    adapted = peft_setup.wrap(tiny(), LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="is a PeftModel already"):
        trainer = make(adapted, peft_config=LoraConfig(**LORA))
    assert trainer.model is adapted
    with pytest.raises(ValueError, match=r"peft_config is a dict, but must be a peft\.PeftConfig"):
        make(peft_config={"r": 2})
    assert peft_setup.wrap(adapted, None) is adapted


def test_prompt_tuning(make, golden_tokenizer):
    trainer = make(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = golden_tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits[0, 3:-1]
    rows = Dataset.from_dict({"text": TEXTS[:1]})
    alone = make(trainer.model, eval_dataset=rows).evaluate()["eval_loss"]
    assert alone == pytest.approx(cross_entropy(logits, batch["input_ids"][0, 1:]).item(), rel=1e-5)
    (prompt,) = (p for p in trainer.model.parameters() if p.requires_grad)
    before = prompt.clone()
    trainer.train()
    assert (prompt - before).abs().max() > 0


def test_bf16(make):
    for model, training in ((tiny().bfloat16(), {}), (tiny(), {"bf16": True})):
        trainer = make(model, training=training)
        trainer.train()
        assert losses(trainer)[1] < losses(trainer)[0]


# ---- noise


class Noticed(Exception):
    pass


@pytest.mark.parametrize("given", ["argument", "arguments"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_neftune(make, given, lora, fails):
    seen = []

    def optimizer_hook(*_):
        embedding = trainer.model.get_input_embeddings()
        seen.append((len(embedding._forward_hooks), getattr(embedding, "neftune_noise_alpha", None)))
        if fails:
            raise Noticed

    peft_config = {"peft_config": LoraConfig(**LORA)} if lora else {}
    arguments = make().args
    if given == "argument":
        with pytest.warns(UserWarning, match="`neftune_noise_alpha` overrides"):
            trainer = make(args=arguments, neftune_noise_alpha=5, **peft_config)
        assert arguments.neftune_noise_alpha is None  # another trainer may have the same arguments
    else:
        arguments.neftune_noise_alpha = 5.0
        trainer = make(args=arguments, **peft_config)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(optimizer_hook)
    if fails:
        with pytest.raises(Noticed):
            trainer.train()
    else:
        trainer.train()
    assert set(seen) == {(1, 5.0)}  # once
    embedding = trainer.model.get_input_embeddings()
    assert not embedding._forward_hooks
    assert not hasattr(embedding, "neftune_noise_alpha")
    trainer.evaluate()


@pytest.mark.parametrize("lora", [False, True])
def test_the_noise_can_be_looked_at_before_training(make, lora):
    trainer = make(training={"neftune_noise_alpha": 5.0}, **({"peft_config": LoraConfig(**LORA)} if lora else {}))
    assert trainer._trl_activate_neftune(trainer.model) is trainer.model
    embedding, ids = trainer.model.train().get_input_embeddings(), torch.tensor([[1, 0, 1]])
    assert not torch.equal(embedding(ids), embedding(ids))
    trainer.neftune_hook_handle.remove()
    assert torch.equal(embedding(ids), embedding(ids))
    trainer.train()
    assert not embedding._forward_hooks


def test_noise_changes_the_training_loss_alone(make):
    plain, noisy = make(), make(training={"neftune_noise_alpha": 50.0})
    assert plain.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]
    for trainer in (plain, noisy):
        trainer.train()
    assert losses(plain)[0] != losses(noisy)[0]


# ---- the recipe


def test_the_recipe_ends_with_the_same_parameters(make, tmp_path, golden_tokenizer):
    texts = [f"{text} [EOS]" for text in TEXTS]
    folder, out = tmp_path / "model", tmp_path / "recipe"
    tiny("llama").double().save_pretrained(folder)
    golden_tokenizer.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    runpy.run_path(str(ROOT / "recipes" / "sft.py"))["main"](
        model=str(folder),
        dataset=str(data),
        max_length=32,
        batch=4,
        micro=2,
        steps=3,
        lr=0.01,
        dtype="float64",
        out=str(out),
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
    )
    trainer = make(
        peft_setup.load(str(folder), {"dtype": "float64"}),
        texts,
        max_seq_length=32,
        training={"max_steps": 3, "learning_rate": 0.01, "optim": "adamw_torch"},
    )
    trainer.train()
    recipe = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    same(trainer.model, recipe, atol=1e-9, rtol=0)
    moved = max((x - y).abs().max().item() for x, y in zip(recipe.parameters(), start.parameters()))
    assert moved > 0.01
