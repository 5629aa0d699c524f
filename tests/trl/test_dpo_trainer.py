import copy
import json
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from alignkit import hf
from alignkit.trl.models import modeling_base
from alignkit.trl.trainer import dpo_reference, dpo_setup
from alignkit.trl.trainer.dpo_reference import disable_dropout_in_model
from alignkit.trl.trainer.dpo_trainer import DPOTrainer
from tests.test_layers import ROOT
from tests.trl.conftest import GOLDEN, golden, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name

STEP = golden("dpo_step")
FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}
LOG_2 = 0.693147
LOSS_TYPES = ["sigmoid", "hinge", "ipo", "kto_pair"]
PAIRS = [
    {"prompt": "hello", "chosen": " hi nice to meet you", "rejected": " leave me alone"},
    {"prompt": "how are you", "chosen": " I am fine", "rejected": " I am not fine at all"},
    {"prompt": "What is your name?", "chosen": " My name is Mary", "rejected": " Whats it to you?"},
    {"prompt": "Which is the best language?", "chosen": " Python", "rejected": " C++"},
]
LIMITS = {"max_length": 64, "max_prompt_length": 32}
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["c_attn"], task_type="CAUSAL_LM")


def golden_model(name="tiny_gpt2"):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name)


def t5(**config):
    return tiny("t5", auto="AutoModelForSeq2SeqLM", **config)


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(defaults | options))


@pytest.fixture
def make(tmp_path, tokenizer):
    """A trainer on four pairs; `training` are fields of its TrainingArguments."""

    def make(model=None, ref_model=None, training=None, trainer=DPOTrainer, rows=PAIRS, **options):
        limits = LIMITS | ({"max_target_length": 32} if "max_target_length" not in options else {})
        defaults = {"tokenizer": tokenizer, "train_dataset": Dataset.from_list(rows), "beta": 0.5} | limits
        model = tiny() if model is None and "model_init" not in options else model
        return trainer(model, ref_model, args=arguments(tmp_path, **(training or {})), **(defaults | options))

    return make


@pytest.fixture
def golden_trainer(tmp_path, golden_tokenizer):
    def make(model=None, ref_model=None, training=None, **options):
        model = golden_model() if model is None else model
        rows = {"train_dataset": Dataset.from_list(STEP["rows"]), "eval_dataset": Dataset.from_list(STEP["eval_rows"])}
        defaults = {"tokenizer": golden_tokenizer, "max_length": 32, "max_prompt_length": 16} | rows
        return DPOTrainer(model, ref_model, args=arguments(tmp_path, **(training or {})), **(defaults | options))

    return make


def train_batch(trainer):
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))


def logged(trainer, name="loss"):
    return [x[name] for x in trainer.state.log_history if name in x]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(a, b, atol):
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def trained(trainer):
    trainer.train()
    return parameters(trainer)


# --- the golden values of the release


def loss_of(case, policy, reference):
    trainer = SimpleNamespace(**{name: case[name] for name in ("loss_type", "beta", "label_smoothing")})
    logps = (*policy.unbind(-1), *reference.unbind(-1))
    return DPOTrainer.dpo_loss(trainer, *logps, reference_free=case["reference_free"])


@pytest.mark.parametrize(
    "case", [c for c in golden("dpo_loss")["cases"] if "losses" in c], ids=lambda c: c["loss_type"]
)
def test_losses_and_rewards(case):
    inputs = {name: torch.tensor(x, dtype=torch.float64) for name, x in golden("dpo_loss")["inputs"].items()}
    policy, reference = (
        torch.stack([inputs[f"{whose}_{side}_logps"] for side in ("chosen", "rejected")], -1)
        for whose in ("policy", "reference")
    )
    policy.requires_grad_()
    losses, *rewards = loss_of(case, policy, reference)
    for made, name in zip((losses, *rewards), ("losses", "chosen_rewards", "rejected_rewards")):
        torch.testing.assert_close(made.tolist(), case[name], **FLOAT64)
    (grad,) = torch.autograd.grad(losses.mean(), policy)
    expected = torch.stack(
        [torch.tensor(case[f"grad_policy_{x}"], dtype=torch.float64) for x in ("chosen", "rejected")]
    )
    if case["loss_type"] == "kto_pair":  # the release's KL has a gradient, which the loss of the paper has not
        slopes = losses.detach() * (1 - losses.detach()) * case["beta"] / len(losses)
        expected = torch.stack([-slopes[:5], slopes[5:]])
    torch.testing.assert_close(grad.T, expected, **FLOAT64)


def test_kto_is_another_name_and_an_unknown_loss_is_refused(make):
    case = {"loss_type": "kto", "beta": 0.1, "label_smoothing": 0.0, "reference_free": False}
    policy, reference = torch.randn(2, 5, 2)
    torch.testing.assert_close(
        loss_of(case, policy, reference), loss_of(case | {"loss_type": "kto_pair"}, policy, reference)
    )
    (unknown,) = [c for c in golden("dpo_loss")["cases"] if "raises" in c]
    with pytest.raises(ValueError, match=re.escape(unknown["raises"][1])):
        loss_of(case | {"loss_type": unknown["loss_type"]}, policy, reference)
    with pytest.raises(ValueError, match="Unknown loss type: nope"):
        make(loss_type="nope")


@pytest.mark.parametrize("case", golden("get_batch_logps")["cases"], ids=str)
def test_log_probs_of_a_batch(case):
    inputs = golden("get_batch_logps")["inputs"]
    logits, labels = torch.tensor(inputs["logits"], dtype=torch.float64), torch.tensor(inputs["labels"])
    if "raises" in case:
        with pytest.raises(ValueError, match=re.escape(case["raises"][1])):
            DPOTrainer.get_batch_logps(logits, labels[:, 1:])
        return
    names = ("average_log_prob", "is_encoder_decoder", "label_pad_token_id")
    labels = labels.masked_fill(labels == -100, case["label_pad_token_id"])
    before = labels.clone()
    made = DPOTrainer.get_batch_logps(logits, labels, **{name: case[name] for name in names})
    torch.testing.assert_close(made.tolist(), case["out"], **FLOAT64)
    assert torch.equal(labels, before)  # the release overwrites those of an encoder-decoder


def test_the_mean_log_prob_of_a_row_without_labels_is_0():
    labels = torch.full((1, 3), -100)
    assert DPOTrainer.get_batch_logps(torch.randn(1, 3, 5), labels, average_log_prob=True).tolist() == [0]


def test_forward_loss_and_metrics(golden_trainer):
    trainer, expected = golden_trainer(ref_model=golden_model("tiny_gpt2_ref")), STEP["forward"]
    for row, tokens in zip(trainer.train_dataset, expected["tokenized_rows"]):
        assert {name: row[name] for name in tokens} == tokens
    batch = train_batch(trainer)
    *logps, chosen_logits, rejected_logits = trainer.concatenated_forward(trainer.model, batch)
    reference = trainer.compute_reference_log_probs(batch)
    assert not any(x.requires_grad for x in reference)
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    for name, x in zip(names, (*logps, *reference)):
        torch.testing.assert_close(x.detach(), torch.tensor(expected[name]), rtol=2e-6, atol=2e-6)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-6)
    for name in expected["metrics"]:
        if not name.startswith("logits/"):
            assert metrics[name].item() == pytest.approx(expected["metrics"][name], rel=2e-6, abs=2e-6)
    for side, logits in (("chosen", chosen_logits), ("rejected", rejected_logits)):
        whole, labels = expected["metrics"][f"logits/{side}"], batch[f"{side}_labels"]
        assert logits.mean().item() == pytest.approx(whole, abs=2e-6)  # of the release: prompt and padding too
        answers = logits[:, : labels.shape[1] - 1][labels[:, 1:] != -100].mean()
        assert metrics[f"logits/{side}"].item() == pytest.approx(answers.item(), abs=1e-6)
    evaluated = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="eval")[1]
    assert {name.removeprefix("eval_") for name in evaluated} == set(metrics)
    assert all(name.startswith("eval_") for name in evaluated)


STEPS = {case["name"]: case for case in STEP["cases"]}


@pytest.mark.filterwarnings("ignore:.*does not support label smoothing")
@pytest.mark.parametrize("name", [name for name in STEPS if name != "ipo_release"])
def test_training_and_evaluation(golden_trainer, name):
    case, model = STEPS[name], golden_model()
    optimizers = (None, None)
    if case["optimizer"].startswith("SGD"):
        optimizer = torch.optim.SGD(model.parameters(), lr=float(case["optimizer"][7:-1]))
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    ref = golden_model(case["ref"]) if case["ref"] else None
    trainer = golden_trainer(model, ref, case["training_args"], optimizers=optimizers, **case["args"])
    before = trainer.evaluate() if case["eval_before"] else {}
    trainer.train()
    after = trainer.evaluate() if case["eval_after"] else {}
    history, recorded = (
        [x for x in logs if not any(key.startswith("eval_") for key in x)]
        for logs in (trainer.state.log_history, case["log_history"])
    )
    assert len(history) == len(recorded)
    for made, expected in [
        *zip(history, recorded),
        (before, case["eval_before"]),
        (after, case["eval_after"]),
    ]:
        for key, value in (expected or {}).items():
            if "logits/" not in key:  # the release's are means over prompt and padding too
                digits = 6e-5 if key == "loss" else 1e-4 if case["optimizer"] == "AdamW" else 1e-5
                assert made[key] == pytest.approx(value, rel=digits / 10, abs=digits), key
    if name != "kto_pair":
        tolerance = 1e-4 if case["optimizer"] == "AdamW" else 2e-6
        norm = torch.stack([p.double().square().sum() for p in trainer.model.parameters()]).sum().sqrt()
        assert norm.item() == pytest.approx(case["norms_after"]["total_l2"], rel=tolerance)
        for key, value in case["norms_after"].get("per_tensor", {}).items():
            x = trainer.model.get_parameter(key).double()
            loose = 5 if case["optimizer"] == "AdamW" and "c_attn.bias" in key else 1  # keys: rounding, made large
            assert x.norm().item() == pytest.approx(value["l2"], rel=tolerance, abs=loose * tolerance), key
            if case["optimizer"] != "AdamW":
                assert x.sum().item() == pytest.approx(value["sum"], rel=tolerance, abs=1e-5), key


def test_an_adapter_and_its_reference(golden_trainer):
    (case,) = golden("dpo_peft")["cases"]
    lora = case["lora"]
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=[lora["target"]], task_type="CAUSAL_LM")
    trainer = golden_trainer(peft_config=config)
    missing = trainer.model.load_state_dict({k: torch.tensor(v) for k, v in lora["weights"].items()}, strict=False)
    assert not missing.unexpected_keys
    batch = train_batch(trainer)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert loss.item() == pytest.approx(case["loss"], abs=2e-6)
    for name, value in case["metrics"].items():
        if not name.startswith("logits/"):
            assert metrics[name].item() == pytest.approx(value, rel=2e-6, abs=2e-6), name
    for made, name in zip(trainer.compute_reference_log_probs(batch), ("ref_chosen_logps", "ref_rejected_logps")):
        torch.testing.assert_close(made, torch.tensor(case[name]), rtol=2e-6, atol=2e-6)


# --- the scenarios of the release's tests


@pytest.mark.filterwarnings("ignore:.*does not support label smoothing")
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shape", ["gpt2", "t5"])
def test_every_loss_trains_every_parameter(make, shape, loss_type, precompute):
    models = (t5(), t5(seed=1)) if shape == "t5" else (tiny(), tiny(seed=1))
    trainer = make(
        *models,
        training={"eval_strategy": "steps", "eval_steps": 2},
        loss_type=loss_type,
        eval_dataset=Dataset.from_list(PAIRS[:3]),
        precompute_ref_log_probs=precompute,
    )
    before = parameters(trainer)
    trainer.train()
    assert "train_loss" in trainer.state.log_history[-1]
    assert len(logged(trainer, "eval_rewards/margins")) == len(logged(trainer, "eval_logps/chosen")) == 1
    for name, x in parameters(trainer).items():
        assert not torch.equal(x, before[name]) or not before[name].any(), name
    assert not any(p.grad is not None for p in trainer.ref_model.parameters())


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2", "t5"])
def test_the_first_loss_is_log_2_and_then_it_falls(make, shape):
    model = t5() if shape == "t5" else tiny(shape)
    trainer = make(model, training={"max_steps": 3})
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(LOG_2, abs=1e-5)
    assert logged(trainer) == sorted(logged(trainer), reverse=True)
    assert logged(trainer, "rewards/margins")[-1] > 0
    if shape != "t5":  # whose logits, computed in full, may round otherwise with gradients than without
        assert logged(trainer, "rewards/accuracies")[0] == 0  # a tie is no success


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("from_adapter", [False, True])
def test_lora(make, from_adapter, precompute):
    model = tiny()
    trainer = make(
        get_peft_model(model, copy.deepcopy(LORA)) if from_adapter else model,
        peft_config=copy.deepcopy(LORA),
        precompute_ref_log_probs=precompute,
        eval_dataset=Dataset.from_list(PAIRS),
    )
    assert trainer.ref_model is None
    assert trainer.is_peft_model
    before = parameters(trainer)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(LOG_2, abs=1e-5)
    assert logged(trainer)[-1] < LOG_2 - 1e-4
    for name, x in parameters(trainer).items():
        assert torch.equal(x, before[name]) == ("lora_" not in name), name
    trainer.save_model()
    assert trainer.evaluate()["eval_rewards/margins"] > 0


def test_virtual_tokens(make):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make(peft_config=config, training={"max_steps": 3, "learning_rate": 0.5})
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_a_saved_adapter_loads(make, tmp_path):
    folder = tmp_path / "base"
    tiny().save_pretrained(folder)
    trainer = make(AutoModelForCausalLM.from_pretrained(folder), peft_config=copy.deepcopy(LORA))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    batch = train_batch(trainer)
    made = trainer.concatenated_forward(loaded.eval(), batch)[0]
    torch.testing.assert_close(made, trainer.concatenated_forward(trainer.model.eval(), batch)[0])


def test_a_missing_pad_token_is_an_error(make, tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=re.escape("Explicitly set `tokenizer.pad_token` (e.g.")):
        make().train()


# --- exactness


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reference", ["model", "precomputed"])
def test_micro_batches_change_nothing(make, loss_type, reference):
    runs = []
    for micro in (4, 1):
        trainer = make(
            tiny().double(),
            tiny(seed=1).double() if reference == "model" else None,
            training={"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro},
            loss_type=loss_type,
            precompute_ref_log_probs=reference == "precomputed",
        )
        runs.append((trained(trainer), trainer))
    assert_same(runs[0][0], runs[1][0], 1e-9)
    for name in ("loss", "rewards/margins", "logps/chosen", "logits/rejected"):
        assert logged(runs[0][1], name) == pytest.approx(logged(runs[1][1], name), abs=1e-8)


def test_the_reference_of_every_kind_is_the_same(make):
    runs = [make(ref_model=tiny()), make(), make(precompute_ref_log_probs=True)]
    models = [trained(trainer) for trainer in runs]
    for trainer, model in zip(runs[1:], models[1:]):
        assert_same(models[0], model, 2e-6)
        assert logged(trainer) == pytest.approx(logged(runs[0]), abs=1e-6)


def test_log_probs_do_not_depend_on_the_padding(make, tokenizer):
    trainer = make(ref_model=tiny(seed=1))
    assert trainer.padding_value == trainer.data_collator.pad_token_id == tokenizer.pad_token_id == 1
    whole = trainer.concatenated_forward(trainer.model, train_batch(trainer))[:2]
    for i, row in enumerate(trainer.train_dataset):
        alone = trainer.concatenated_forward(trainer.model, trainer.data_collator([row]))[:2]
        for x, y in zip(whole, alone):
            torch.testing.assert_close(x[i : i + 1], y, atol=2e-5, rtol=0)


def test_a_padding_value_that_is_not_0_wins(make):
    trainer = make(padding_value=7)
    assert trainer.padding_value == trainer.data_collator.pad_token_id == 7
    assert (train_batch(trainer)["chosen_input_ids"] == 7).any()


def test_resuming_ends_with_the_parameters_of_the_uninterrupted_run(make, tmp_path):
    options = {"precompute_ref_log_probs": True, "eval_dataset": Dataset.from_list(PAIRS[:3])}
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = make(training=training, **options)
    expected = trained(whole)
    resumed = make(training=training, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(parameters(resumed), expected, 0)
    assert logged(resumed) == logged(whole)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"] != pytest.approx(LOG_2, abs=1e-3)


@pytest.mark.usefixtures("norms_in_float64")
def test_the_shell_ends_where_the_recipe_ends(tmp_path, jsonl):
    policy, tokenizer = hf.causal_lm("builtin:tiny", dtype="float64")
    folder = tmp_path / "model"
    hf.save(policy, tokenizer, folder)
    training = {"lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
    runpy.run_path(str(ROOT / "recipes" / "dpo.py"))["main"](
        model=str(folder),
        dataset=str(jsonl(PAIRS)),
        dtype="float64",
        batch=4,
        micro=2,
        steps=3,
        lr=1e-2,
        beta=0.3,
        max_length=64,
        out=str(tmp_path / "recipe"),
        **training,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        beta=0.3,
        args=arguments(tmp_path / "shell", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=Dataset.from_list(PAIRS),
        tokenizer=tokenizer,
        **LIMITS,
    )
    rows = hf.pairs(PAIRS, tokenizer, max_length=64)
    for ours, row in zip(rows, trainer.train_dataset):
        assert ours["ids"] == [row["chosen_input_ids"], row["rejected_input_ids"]]
        assert [sum(mask) for mask in ours["mask"]] == [
            sum(x != -100 for x in row[f"{s}_labels"]) for s in ("chosen", "rejected")
        ]
    shell = trained(trainer)
    recipe = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe", dtype=torch.float64)
    assert_same(shell, dict(recipe.named_parameters()), 1e-9)
    start = dict(policy.lm.named_parameters())
    assert max((x - start[name]).abs().max() for name, x in shell.items()) > 1e-3


@pytest.fixture
def jsonl(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["weights", "mixed"])
def test_bf16(make, lora, precision):
    trainer = make(
        tiny().bfloat16() if precision == "weights" else tiny(),
        training={"bf16": precision == "mixed", "max_steps": 3},
        peft_config=copy.deepcopy(LORA) if lora else None,
        precompute_ref_log_probs=precision == "mixed",
        eval_dataset=Dataset.from_list(PAIRS),
    )
    if lora:
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(LOG_2, abs=1e-5)  # the reference computes in the same precision
    assert logged(trainer)[-1] < LOG_2
    assert trainer.evaluate()["eval_loss"] < LOG_2


def test_gradient_checkpointing_changes_nothing(make):
    options = {"peft_config": LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")}
    models = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make(training={"gradient_checkpointing": checkpointing}, **copy.deepcopy(options))
        models.append(trained(trainer))
    assert_same(*models, 1e-6)


@pytest.mark.slow
def test_two_processes_change_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from datasets import Dataset\n"
        "from alignkit.hf import builtin\n"
        "from alignkit.trl.trainer.dpo_trainer import DPOTrainer\n"
        "from tests.trl.test_dpo_trainer import LIMITS, PAIRS, arguments, tiny\n"
        "out, micro, loss_type = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
        "rows = Dataset.from_list(PAIRS)\n"
        "trainer = DPOTrainer(tiny(), beta=0.5, loss_type=loss_type, tokenizer=builtin.tiny()[1], train_dataset=rows,\n"
        "    args=arguments(out, per_device_train_batch_size=micro, per_device_eval_batch_size=2,\n"
        "        optim='sgd', learning_rate=0.1), eval_dataset=rows, precompute_ref_log_probs=True, **LIMITS)\n"
        "trainer.train()\n"
        "trainer.evaluate()\n"
        "trainer.save_model()\n"
        "trainer.save_state()\n"
    )
    for loss_type in ("sigmoid", "kto"):
        made = []
        for launcher, micro in (
            ([sys.executable], 4),
            ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"], 2),
        ):
            out = tmp_path / f"{loss_type}-{micro}"
            env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
            subprocess.run([*launcher, str(script), str(out), str(micro), loss_type], check=True, env=env)
            history = json.loads((out / "trainer_state.json").read_text())["log_history"]
            made.append((AutoModelForCausalLM.from_pretrained(out).state_dict(), history))
        assert_same(made[0][0], made[1][0], 1e-6)
        for one, two in zip(made[0][1], made[1][1]):
            for name, x in one.items():
                if "runtime" not in name and "per_second" not in name:
                    assert two[name] == pytest.approx(x, abs=2e-5), name


# --- the reference


def test_one_model_twice_and_a_reference_beside_an_adapter_are_refused(make):
    model = tiny()
    with pytest.raises(ValueError, match="model and ref_model are one object"):
        make(model, model)
    with pytest.raises(ValueError, match="ref_model and peft_config were given"):
        make(model, tiny(seed=1), peft_config=LORA)


def test_a_copy_is_frozen_and_a_reference_given_is_left_trainable(make):
    trainer = make()
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert trainer.ref_model is not trainer.model
    given = tiny(seed=1).train()
    trainer = make(ref_model=given)
    assert trainer.ref_model is given
    assert not given.training


def test_a_reference_does_not_keep_the_policy_from_being_prepared(make, monkeypatch):
    trainer, prepared = make(ref_model=tiny(seed=1), eval_dataset=Dataset.from_list(PAIRS)), []
    prepare = trainer.accelerator.prepare_model
    monkeypatch.setattr(trainer.accelerator, "prepare_model", lambda x, **kw: prepared.append(x) or prepare(x, **kw))
    trainer.evaluate()
    assert prepared == [trainer.model]


@pytest.mark.parametrize("known", ["one", "dict"])
def test_precomputed_evaluation_compares_with_the_initial_policy(make, known):
    rows = Dataset.from_list(PAIRS[:3])
    kept = make(eval_dataset=rows)
    kept.train()
    expected = kept.evaluate()
    assert expected["eval_rewards/margins"] > 0.1
    trainer = make(precompute_ref_log_probs=True, eval_dataset=rows if known == "one" else {"a": rows, "b": rows})
    assert trainer.ref_model is None
    trainer.train()
    made = trainer.evaluate()
    for prefix in ("eval",) if known == "one" else ("eval_a", "eval_b"):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert made[f"{prefix}_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-5)


@pytest.mark.parametrize("tokenized", [False, True])
def test_a_dataset_given_later_needs_the_initial_policy(make, tokenized):
    rows = Dataset.from_list(PAIRS[:2])
    trainer = make(precompute_ref_log_probs=True)
    new = rows.map(trainer.tokenize_row) if tokenized else rows
    assert trainer.evaluate(new)["eval_loss"] == pytest.approx(LOG_2, abs=1e-5)  # the policy is the initial one still
    trainer.train()
    for method in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="were not precomputed, and the policy is no longer what it was"):
            method(new)


@pytest.mark.parametrize("how", ["ref_model", "adapter", "no precomputation"])
def test_a_dataset_given_later_is_compared_with_a_reference_that_stays(make, how):
    rows = Dataset.from_list(PAIRS[:2])
    options = {"ref_model": tiny()} if how == "ref_model" else {"peft_config": LORA} if how == "adapter" else {}
    trainer = make(precompute_ref_log_probs=how != "no precomputation", **options)
    trainer.train()
    assert trainer.evaluate(rows)["eval_rewards/margins"] > 0
    assert trainer.predict(rows).metrics["test_rewards/margins"] > 0


def test_log_probs_that_a_dataset_has_are_used(make):
    columns = {"reference_chosen_logps": [1.0] * 4, "reference_rejected_logps": [2.0] * 4}
    rows = Dataset.from_list([row | {n: x[0] for n, x in columns.items()} for row in PAIRS])
    trainer = make(train_dataset=rows, precompute_ref_log_probs=True)
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, train_batch(trainer))
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (metrics["logps/chosen"].item() - 1), rel=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx(0.5 * (metrics["logps/rejected"].item() - 2), rel=1e-6)


def test_precomputation_needs_a_length(make):
    with pytest.raises(ValueError, match="train_dataset is a stream"):
        make(train_dataset=Dataset.from_list(PAIRS).to_iterable_dataset(), precompute_ref_log_probs=True)


def test_a_stream_trains(make):
    trainer = make(train_dataset=Dataset.from_list(PAIRS * 4).to_iterable_dataset())
    trainer.train()
    assert logged(trainer)[1] < logged(trainer)[0] == pytest.approx(LOG_2, abs=1e-5)


def test_adapters_by_name(make):
    config = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny(), LoraConfig(**config, init_lora_weights=False), "reference")
    model.add_adapter("policy", LoraConfig(**config))
    trainer = make(model, model_adapter_name="policy", ref_adapter_name="reference")
    assert model.active_adapter == "policy"
    batch = train_batch(trainer)
    model.set_adapter("reference")
    expected = [x.detach() for x in trainer.concatenated_forward(model, batch)[:2]]
    model.set_adapter("policy")
    own = trainer.concatenated_forward(model, batch)[0]
    assert (own - expected[0]).abs().min() > 1e-3
    for x, y in zip(trainer.compute_reference_log_probs(batch), expected):
        torch.testing.assert_close(x, y)
    assert model.active_adapter == "policy"
    before = parameters(trainer)
    trainer.train()
    changed = {name for name, x in parameters(trainer).items() if not torch.equal(x, before[name])}
    assert changed
    assert all("policy" in name for name in changed)


def test_an_error_within_the_reference_leaves_the_policys_adapter_active(make):
    model = get_peft_model(tiny(), copy.deepcopy(LORA))
    model.add_adapter("reference", copy.deepcopy(LORA))
    trainer = make(model, ref_adapter_name="reference")
    active = []

    def fail():
        with trainer.null_ref_context():
            active.append(model.active_adapter)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert active == ["reference"]
    assert model.active_adapter == "default"
    assert all(p.requires_grad for name, p in model.named_parameters() if "default" in name)


def test_adapter_names_that_make_no_sense(make):
    with pytest.raises(ValueError, match="the model has no adapters"):
        make(ref_adapter_name="reference")
    model = get_peft_model(tiny(), copy.deepcopy(LORA))
    with pytest.raises(ValueError, match="ref_adapter_name='default' is the adapter that is trained"):
        make(model, ref_adapter_name="default")
    with pytest.raises(ValueError, match="there is one reference"):
        make(model, tiny(seed=1), ref_adapter_name="reference")


def test_deepspeed_zero_3(make, monkeypatch):
    for module in (dpo_setup, modeling_base):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True with DeepSpeed ZeRO-3"):
        make(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        make()
    make(ref_model=tiny(seed=1))


def test_a_split_reference_runs_in_an_engine_of_its_own(monkeypatch):
    seen = {}

    def initialize(model, config):
        seen.update(config)
        return [model]

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize))
    config = {"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config=config)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    model = tiny().train()
    assert dpo_reference.prepared(model, accelerator, fsdp=False) is model
    assert not model.training
    assert seen == {"zero_optimization": {"stage": 3}}


# --- models


def test_models_by_name(make, tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    tiny(seed=1).save_pretrained(tmp_path / "b")
    names = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.warns(UserWarning, match="an AutoModelForCausalLM is loaded") as caught:
        trainer = make(
            *names, model_init_kwargs={"torch_dtype": "bfloat16"}, ref_model_init_kwargs={"dtype": "float64"}
        )
    assert len(caught) == 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.ref_model.parameters()} == {torch.float64}
    t5().save_pretrained(tmp_path / "c")
    with pytest.warns(UserWarning, match="an AutoModelForSeq2SeqLM is loaded"):
        assert make(str(tmp_path / "c"), is_encoder_decoder=True).is_encoder_decoder
    for options in ({"model_init_kwargs": {}}, {"ref_model_init_kwargs": {}}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} need the name of a model"):
            make(ref_model=tiny(seed=1), **options)


def test_model_init(make):
    models = []

    def model_init():
        models.append(tiny(seed=3, resid_pdrop=0.5))
        return models[-1]

    with pytest.raises(ValueError, match="pass the parameter is_encoder_decoder"):
        make(model_init=model_init)
    trainer = make(model_init=model_init, is_encoder_decoder=False, peft_config=copy.deepcopy(LORA))
    trainer.train()
    assert len(models) == 2
    assert trainer.is_peft_model
    assert logged(trainer)[0] == pytest.approx(LOG_2, abs=1e-5)
    assert logged(trainer)[1] < LOG_2
    trainer = make(model_init=model_init, is_encoder_decoder=False)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(LOG_2, abs=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
def test_dropout_is_off_unless_it_is_wanted(make, shape):
    options = {
        "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5},
        "llama": {"attention_dropout": 0.5, "attn_implementation": "eager"},
        "t5": {"dropout_rate": 0.5},
    }[shape]
    for disable in (True, False):
        model = t5(**options) if shape == "t5" else tiny(shape, **options)
        trainer = make(model, disable_dropout=disable)
        batch = train_batch(trainer)
        model.train()
        made = [trainer.get_batch_loss_metrics(model, batch)[0].item() for _ in range(2)]
        assert (made[0] == made[1] == pytest.approx(LOG_2, abs=1e-5)) == disable
        expected = trainer.concatenated_forward(model.eval(), batch)[0]
        torch.testing.assert_close(trainer.compute_reference_log_probs(batch)[0], expected)


def test_an_adapters_reference_has_no_dropout(make):
    trainer = make(tiny(resid_pdrop=0.5), peft_config=copy.deepcopy(LORA), disable_dropout=False)
    batch, model = train_batch(trainer), trainer.model.train()
    made = [trainer.compute_reference_log_probs(batch)[0] for _ in range(2)]
    torch.testing.assert_close(*made)
    assert model.training


def test_disable_dropout_in_model():
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    )
    disable_dropout_in_model(model)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0, 0]


def test_the_cache_is_off_in_training_and_the_config_keeps_its_own(make):
    model, seen = tiny(), []
    hook = model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["use_cache"]), with_kwargs=True)
    trainer = make(model)
    trainer.train()
    hook.remove()
    assert set(seen) == {False}
    assert trainer.model.config.use_cache


def test_tags_for_the_hub(make):
    assert set(make().model.model_tags) >= {"trl", "dpo"}


# --- encoder-decoders


@pytest.mark.parametrize("label_pad_token_id", [-100, -7])
def test_log_probs_of_an_encoder_decoder(make, label_pad_token_id):
    trainer = make(t5(), t5(seed=1), label_pad_token_id=label_pad_token_id)
    batch = train_batch(trainer)
    before = batch["chosen_labels"].clone()
    made = trainer.concatenated_forward(trainer.model, batch)[0]
    for i, row in enumerate(trainer.train_dataset):
        labels = torch.tensor([row["chosen_labels"]])
        out = trainer.model(input_ids=torch.tensor([row["prompt_input_ids"]]), labels=labels)
        assert made[i].item() == pytest.approx(-out.loss.item() * labels.numel(), rel=1e-5)
    assert torch.equal(batch["chosen_labels"], before)
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    logits = trainer.concatenated_forward(trainer.model, batch)[2][:, : before.shape[1]]
    assert metrics["logits/chosen"].item() == pytest.approx(
        logits[before != label_pad_token_id].mean().item(), abs=1e-6
    )


def test_decoder_ids_in_the_dataset_change_nothing(make):
    plain = make(t5(), t5(seed=1))
    rows = Dataset.from_list(PAIRS).map(lambda row: plain.tokenize_row(row, plain.model))
    assert "chosen_decoder_input_ids" in rows.column_names
    trainer = make(plain.model, plain.ref_model, train_dataset=rows)
    for x, y in zip(
        trainer.concatenated_forward(plain.model, train_batch(trainer))[:2],
        plain.concatenated_forward(plain.model, train_batch(plain))[:2],
    ):
        torch.testing.assert_close(x, y)


# --- losses and metrics


def test_ipo_averages_log_probs(make):
    trainer = make(ref_model=tiny(seed=1), loss_type="ipo")
    batch = train_batch(trainer)
    averaged = trainer.concatenated_forward(trainer.model, batch)[0]
    trainer.loss_type = "sigmoid"
    tokens = (batch["chosen_labels"] != -100).sum(-1)
    torch.testing.assert_close(averaged, trainer.concatenated_forward(trainer.model, batch)[0] / tokens)


def test_label_smoothing(make):
    make(label_smoothing=0.3)
    for loss_type in ("hinge", "ipo", "kto_pair", "kto"):
        with pytest.warns(UserWarning, match="does not support label smoothing"):
            make(label_smoothing=0.1, loss_type=loss_type)
    for bad in (-0.1, 0.6):
        with pytest.raises(ValueError, match=f"label_smoothing={bad} must be between 0 and 0.5"):
            make(label_smoothing=bad)


def test_evaluation_averages_over_rows(make):
    trainer = make(
        ref_model=tiny(seed=1), training={"per_device_eval_batch_size": 2}, eval_dataset=Dataset.from_list(PAIRS[:3])
    )
    made = trainer.evaluate()
    batch = trainer.data_collator(list(trainer.eval_dataset))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, "eval")
    assert made["eval_loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, value in metrics.items():
        if "logits/" not in name:  # means over the tokens of a batch
            assert made[name] == pytest.approx(value.item(), abs=1e-5), name


def test_compute_metrics_gets_the_mean_logits_of_each_batch(make):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mine": 3.0}

    trainer = make(compute_metrics=compute_metrics, eval_dataset=Dataset.from_list(PAIRS))
    made = trainer.evaluate()
    assert made["eval_mine"] == 3
    assert seen[0].predictions.tolist() == pytest.approx([made["eval_logits/chosen"], made["eval_logits/rejected"]])
    assert seen[0].label_ids.tolist() == [0, 0]


def test_prediction_step(make):
    trainer = make(ref_model=tiny(seed=1))
    batch, model = train_batch(trainer), trainer.model.train()
    loss, logits, labels = trainer.prediction_step(model, batch, prediction_loss_only=False)
    _, metrics = trainer.get_batch_loss_metrics(model, batch)
    assert logits.tolist() == [metrics["logits/chosen"].item(), metrics["logits/rejected"].item()]
    assert labels.tolist() == [0, 0]
    assert not loss.requires_grad
    assert model.training
    assert trainer.prediction_step(model, batch, prediction_loss_only=True) == (loss, None, None)
    ignored = trainer.prediction_step(model, batch, False, ignore_keys=["eval_logits/chosen"])
    assert ignored[1].tolist() == [metrics["logits/rejected"].item()]
    both = ["eval_logits/chosen", "eval_logits/rejected"]
    assert trainer.prediction_step(model, batch, False, ignore_keys=both) == (loss, None, None)


def test_compute_loss_returns_the_metrics_too(make):
    trainer = make()
    loss, metrics = trainer.compute_loss(trainer.model.train(), train_batch(trainer), return_outputs=True)
    assert loss.item() == pytest.approx(LOG_2, abs=1e-5)
    assert {"rewards/chosen", "logps/rejected", "logits/chosen", "rewards/accuracies"} <= set(metrics)


def test_stored_metrics_join_the_next_log_of_their_kind(make):
    trainer = make()
    trainer.store_metrics({"mine": 1.0, "theirs": torch.tensor(5.0)})
    trainer.store_metrics({"mine": 2.0})
    trainer.store_metrics({"eval_mine": 7.0}, train_eval="eval")
    trainer.log({"eval_loss": 0.0})
    trainer.log({"eval_loss": 0.0})
    assert [x.get("eval_mine") for x in trainer.state.log_history] == [7.0, None]
    trainer.train()
    assert logged(trainer, "mine") == [1.5]
    assert logged(trainer, "theirs") == [5.0]


def test_metrics_of_a_log_are_means_over_its_steps(make):
    each, both = (make(ref_model=tiny(seed=1), training={"logging_steps": n}) for n in (1, 2))
    each.train()
    both.train()
    for name in ("loss", "rewards/margins", "logps/rejected"):
        assert logged(both, name) == pytest.approx([sum(logged(each, name)) / 2], rel=1e-5)


def test_overridden_methods_are_called(make):
    class Constant(DPOTrainer):
        def tokenize_row(self, feature, model=None):
            return super().tokenize_row(feature | {"chosen": " same"}, model)

        def dpo_loss(self, *logps, **options):
            losses, *rewards = super().dpo_loss(*logps, **options)
            return losses * 0 + 3, *rewards

    trainer = make(trainer=Constant)
    assert len(set(map(str, trainer.train_dataset["chosen_labels"]))) > 1  # behind prompts of different lengths
    assert len({str([x for x in row if x != -100]) for row in trainer.train_dataset["chosen_labels"]}) == 1
    trainer.train()
    assert logged(trainer) == [3, 3]


# --- arguments


def test_defaults_come_with_warnings(tmp_path, tokenizer):
    rows, args = Dataset.from_list(PAIRS), arguments(tmp_path, remove_unused_columns=True)
    with pytest.warns(UserWarning, match="is set for you|should set it yourself") as caught:
        trainer = DPOTrainer(t5(), args=args, train_dataset=rows, processing_class=tokenizer)
    for name in ("max_length", "max_prompt_length", "max_target_length", "remove_unused_columns=False"):
        assert any(f"`{name}`" in str(warning.message) for warning in caught), name
    assert len(caught) == 4
    assert (trainer.max_length, trainer.max_prompt_length, trainer.max_target_length) == (512, 128, 128)
    assert not trainer.args.remove_unused_columns
    with pytest.warns(UserWarning, match="should set it yourself") as caught:
        trainer = DPOTrainer(tiny(), args=arguments(tmp_path), train_dataset=rows, tokenizer=tokenizer)
    assert trainer.max_target_length is None
    assert len(caught) == 2


def test_arguments_that_are_wrong(make, tokenizer):
    with pytest.raises(ValueError, match="tokenizer must be specified"):
        make(tokenizer=None)
    with pytest.raises(ValueError, match="two names of one argument"):
        make(processing_class=copy.deepcopy(tokenizer))
    assert make(processing_class=tokenizer).tokenizer is tokenizer
    for name in LIMITS:
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1 token"):
            make(**{name: 0})
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=r"train_dataset, row 2: .* max_length=16"):
        make(rows=[short, short, PAIRS[2]], max_length=16, max_prompt_length=16)
    with pytest.raises(ValueError, match="Unknown truncation mode: middle"):
        make(truncation_mode="middle", max_length=16, max_prompt_length=8)
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\], row 1: rejected should be an str"):
        make(eval_dataset={"a": Dataset.from_list([PAIRS[0], PAIRS[1] | {"rejected": None}])})


def test_a_collator_of_ones_own(make):
    trainer = make()
    own = make(data_collator=trainer.data_collator)
    assert (trainer.use_dpo_data_collator, own.use_dpo_data_collator) == (True, False)
    with pytest.warns(UserWarning, match="The loss reads the columns of DPODataCollatorWithPadding"):
        own.train()
    assert logged(own)[0] == pytest.approx(LOG_2, abs=1e-5)
    with (
        pytest.warns(UserWarning, match="The loss reads the columns"),
        pytest.raises(ValueError, match="data_collator must make the column 'rejected_labels'"),
    ):
        own.compute_loss(own.model, {"chosen_labels": torch.zeros(1, 2)})


# --- generation


def games(folder):
    return [json.loads(line) for line in (folder / "game_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shape", ["gpt2", "lora", "t5"])
def test_samples_of_policy_and_reference_go_to_a_file(make, tmp_path, shape):
    trainer = make(
        t5() if shape == "t5" else tiny(),
        training={"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8},
        generate_during_eval=True,
        eval_dataset=Dataset.from_list(PAIRS[:3]),
        peft_config=LORA if shape == "lora" else None,
        max_length=40,
    )
    trainer.train()
    lines = games(tmp_path)
    assert [line["step"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert {line["Prompt"] for line in lines} == {row["prompt"] for row in PAIRS[:3]}
    assert not any(line[who].startswith(line["Prompt"]) for line in lines for who in ("Policy", "Ref Model"))
    assert any(line["Policy"] != line["Ref Model"] for line in lines)
    assert len(logged(trainer, "eval_loss")) == 2


def test_samples_of_a_batch(make):
    trainer = make(ref_model=tiny(seed=1))
    batch = train_batch(trainer)
    trainer.model.train()
    modes = []
    trainer.model.register_forward_pre_hook(lambda model, args: modes.append(model.training))
    policy, reference = trainer.get_batch_samples(trainer.model, batch)
    assert trainer.model.training
    assert not any(modes)
    assert len(policy) == len(reference) == 4
    for row, *texts in zip(PAIRS, policy, reference):
        assert all(text.startswith(row["prompt"]) for text in texts)
    given = torch.tensor([[72, 73]])
    assert trainer.get_batch_samples(trainer.model, batch | {"reference_output": given})[1] == (
        trainer.tokenizer.batch_decode(given)
    )
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    assert batches[0]["weights"].tolist() == [0.25] * 4


def test_trackers_get_the_samples(make, tmp_path, monkeypatch):
    def table(columns, data):
        return {"columns": columns, "data": data}

    seen = []
    wandb = SimpleNamespace(Table=table, log=seen.append)
    monkeypatch.setattr(WandbCallback, "__init__", lambda self: vars(self).update(_wandb=wandb, _initialized=True))
    writer = SimpleNamespace(
        add_text=lambda *args: seen.append(args), add_scalar=lambda *args: None, flush=lambda: None
    )
    trainer = make(
        training={"per_device_eval_batch_size": 2},
        callbacks=[WandbCallback(), TensorBoardCallback(writer)],
        generate_during_eval=True,
        eval_dataset=Dataset.from_list(PAIRS).to_iterable_dataset(),
    )
    trainer.evaluate()
    shown = seen[0]["train/game_log"]
    assert shown["columns"] == ["Prompt", "Policy", "Ref Model"]
    assert [row[0] for row in shown["data"]] == [row["prompt"] for row in PAIRS[:2]]
    name, text, step = seen[1]
    assert (name, step) == ("train/game_log", 0)
    assert all(f"**{title}** {x}" in text for row in shown["data"] for title, x in zip(shown["columns"], row))
    assert not (tmp_path / "game_log.jsonl").exists()
    assert not any("game_log" in logs for logs in trainer.state.log_history)
