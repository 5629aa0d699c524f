"""Metrics of an evaluation are those of its rows, though processes repeat some to have equally many."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from alignkit.hf.trainer import LossTrainer
from alignkit.trl import RewardConfig, RewardTrainer


@pytest.mark.parametrize(
    ("processes", "end", "remainder", "rows"),
    [
        (1, True, 3, [4]),
        (2, False, 3, [4, 4]),
        (2, True, 0, [4, 4]),
        (2, True, -1, [4, 4]),
        (2, True, 3, [3, 0]),
        (2, True, 6, [4, 2]),
        (3, True, 5, [4, 1, 0]),
    ],
)
def test_which_rows_of_the_last_batch_are_repetitions(processes, end, remainder, rows):
    """They come last in the order of processes, as `Accelerator.gather_for_metrics` has it."""
    state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    for index, real in enumerate(rows):
        accelerator = SimpleNamespace(num_processes=processes, process_index=index, gradient_state=state)
        assert LossTrainer._real_rows(SimpleNamespace(accelerator=accelerator), 4) == real


@pytest.mark.parametrize("real", [3, 1, 0])
def test_repeated_rows_do_not_count(real, tmp_path, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained("tests/golden/tiny_gpt2", num_labels=1).eval()
    model.config.pad_token_id = 0
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=False)
    row = {"input_ids_chosen": [1, 2], "attention_mask_chosen": [1, 1]}
    row |= {"input_ids_rejected": [3, 4], "attention_mask_rejected": [1, 1]}
    trainer = RewardTrainer(model, args, data_collator=list, train_dataset=Dataset.from_list([row]))
    ids = torch.tensor([[5, 6], [7, 8], [9, 10]])
    batch = {name: torch.ones_like(ids) for name in ("attention_mask_chosen", "attention_mask_rejected")}
    batch |= {"input_ids_chosen": ids, "input_ids_rejected": ids.flip(0)[:, [1, 0]]}

    def evaluated(batch):
        trainer._eval_totals = {}
        with torch.no_grad(), pytest.warns(UserWarning, match="data_collator"):
            loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        return loss, outputs, trainer._eval_totals

    loss, _, totals = evaluated({name: x[:real] for name, x in batch.items()}) if real else (0.0, None, {"": 0.0})
    monkeypatch.setattr(trainer, "_real_rows", lambda rows: real)
    padded_loss, outputs, padded_totals = evaluated(batch)
    assert len(outputs["rewards_chosen"]) == 3  # predictions are gathered, and then cut
    assert float(padded_loss) == pytest.approx(float(loss), abs=1e-6)
    for name, total in padded_totals.items():
        assert float(total) == pytest.approx(float(totals.get(name, 0.0)), abs=1e-5), name
