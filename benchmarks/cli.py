"""Wall time of the command lines, from start to the first step logged: `alignkit run dpo` and `trl dpo`."""

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.run import Options, environment, group, installed
from benchmarks.workloads import Shape, Workload, save_model, save_tokenizer, trees

SHAPE = Shape(hidden=32, layers=2, heads=2, vocab=512, prompt=32, completion=32)
ROWS, LOGGED = 64, re.compile(r"""['" ]loss['"]?[=:]""")
COLUMNS = {"side": "command", "first_log_s": "first step logged s", "range": "min to max", "time_ratio": "time x"}


def cli(options: Options) -> None:
    """Both on one model folder and one JSONL, in turn, `repeats` times."""
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as name:
        folder = Path(name)
        workload = Workload("dpo", SHAPE)
        save_model(Workload("dpo", Shape(**vars(SHAPE) | {"vocab": SHAPE.vocab + 1})), folder / "model", options.seed)
        save_tokenizer(SHAPE.vocab, folder / "model")
        (folder / "data").mkdir()
        with (folder / "data" / "train.jsonl").open("w") as file:
            for tree in trees(workload, ROWS // workload.prompts, options.seed):
                texts = [" ".join(map(str, ids)) for ids in (tree["prompt"], *tree["completions"])]
                row = {"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"}
                file.write(json.dumps(row) + "\n")
        sides = [side for side in installed("dpo", options) if side in ("alignkit", "trl")]
        times: dict[str, list[float]] = {side: [] for side in sides}
        for i in range(options.repeats):
            for side in sides:
                times[side].append(first_log(command(side, folder, f"{side}{i}", options), options))
    records = [
        {"side": side, "first_log_s": median(x), "step_min_s": min(x), "step_max_s": max(x), "runs": x}
        for side, x in times.items()
    ]
    for record in records:
        record["time_ratio"] = record["first_log_s"] / records[0]["first_log_s"]
    note = f"DPO from the command line, {options.threads} threads, {options.device}, medians of {options.repeats} runs"
    report.write("cli", records, columns=COLUMNS, note=note)


def command(side: str, folder: Path, out: str, options: Options) -> list[str]:
    """The command of a user, with the same model, rows, batch and precision."""
    script = Path(sys.executable).with_name(side)
    module = {"alignkit": "from alignkit.cli import main; main()", "trl": "from trl.cli import main; main()"}[side]
    start = [str(script)] if script.exists() else [sys.executable, "-c", module]
    if side == "alignkit":
        data, size = str(folder / "data" / "train.jsonl"), ["--batch", "8", "--micro", "8", "--steps", "8"]
        rest = ["--logging-steps", "1", "--out", str(folder / out), "--save-strategy", "no"]
        return [*start, "run", "dpo", "--model", str(folder / "model"), "--dataset", data, *size, *rest]
    where = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data")]
    size = ["--per_device_train_batch_size", "8", "--max_steps", "8", "--logging_steps", "1", "--dtype", "float32"]
    rest = ["--output_dir", str(folder / out), "--save_strategy", "no", "--report_to", "none"]
    plain = ["--bf16", "False", "--gradient_checkpointing", "False", "--learning_rate", "1e-4"]
    return [*start, "dpo", *where, *size, *rest, *plain, *(["--use_cpu"] if options.device == "cpu" else [])]


def first_log(words: list[str], options: Options) -> float:
    """Seconds until a line with a loss; RuntimeError if none comes."""
    start, seen = time.perf_counter(), []
    lines = group(words, environment(options))
    for line in lines:
        seen.append(line)
        if LOGGED.search(line):
            elapsed = time.perf_counter() - start
            lines.close()
            return elapsed
    raise RuntimeError(f"{' '.join(words)} logged no loss:\n{''.join(seen[-30:])}")
