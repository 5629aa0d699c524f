"""One run of one side, in this process: `python -m benchmarks.side job.json` writes what it measured to a file.

Nothing heavy is imported here before the side's own imports are timed.
"""

import importlib
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workloads import ON_POLICY, Shape, Workload

MODULES = {
    "alignkit": "ours", "trl": "trl_side", "bare": "bare", "best": "best",
    "torchrl": "gae", "torchrl-loop": "gae", "loop": "gae",
}  # fmt: skip
NEEDS = {"trl": "trl", "torchrl": "torchrl", "torchrl-loop": "torchrl"}


@dataclass
class Job:
    """What a side is told; with `check` an on-policy method trains one step on the given answers, off-policy."""

    side: str
    workload: Workload
    folder: Path
    result: Path
    steps: int
    seed: int
    threads: int
    device: str
    bf16: bool
    check: bool
    started: float

    def trees(self) -> list[dict[str, Any]]:
        """All prompts with their completions, in the order of training."""
        return json.loads((self.folder / "trees.json").read_text())

    def batches(self) -> list[list[dict[str, Any]]]:
        """The trees of each step."""
        rows, n = self.trees(), self.workload.prompts
        return [rows[i * n : (i + 1) * n] for i in range(self.steps)]

    def training(self) -> dict[str, Any]:
        """The `TrainingArguments` of every side that has a Trainer."""
        return {
            "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "logging_first_step": True, "logging_steps": 10**6, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "gradient_checkpointing": False, "bf16": self.bf16, "dataloader_pin_memory": False,
            "use_cpu": self.device == "cpu",
        }  # fmt: skip


class Clock:
    """Times of the beginning of training and the end of each step; the first step's loss and gradient norm."""

    def __init__(self, job: Job):
        self.cuda, self.times, self.first = job.device == "cuda", [], {}
        self.base_mb = 0.0

    def tick(self) -> None:
        """Training begins, or a step has ended."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        if not self.times:
            self.base_mb = memory("VmRSS")
        self.times.append(time.time())

    def see(self, loss: float, norm: float) -> None:
        """The loss of a step and the norm of its gradient before clipping."""
        if not self.first:
            self.first = {"loss": float(loss), "norm": float(norm)}

    def callback(self) -> Any:
        """For a Trainer."""
        from transformers import TrainerCallback

        class Ticks(TrainerCallback):
            def on_train_begin(_, *args: Any, **more: Any) -> None:
                self.tick()

            def on_step_end(_, *args: Any, **more: Any) -> None:
                self.tick()

            def on_log(_, *args: Any, logs: dict[str, float], **more: Any) -> None:
                if "loss" in logs:
                    self.see(logs["loss"], logs["grad_norm"])

        return Ticks()


def nudge(model: Any, seed: int, size: float = 0.02) -> None:
    """Move the weights, the same on every side: away from the reference, where DPO's loss is log 2 for any model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (size * torch.randn(parameter.shape, generator=generator)).to(parameter)


def reward(ids: list[list[int]], vocab: int) -> list[float]:
    """Share of the lower half of the vocabulary in each answer."""
    return [sum(token < vocab // 2 for token in row) / len(row) for row in ids]


def memory(field: str = "VmHWM") -> float:
    """MB of this process: its highest resident size (VmHWM) or the present one (VmRSS)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent before exec
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def read(path: str) -> Job:
    """The job of a file that `run` wrote."""
    given = json.loads(Path(path).read_text())
    work = given["workload"]
    work["shape"], work["size"] = Shape(**work["shape"]), tuple(work["size"])
    paths = {name: Path(given[name]) for name in ("folder", "result")}
    return Job(**given | paths | {"workload": Workload(**work)})


def main(path: str) -> None:
    """Run the job and write its measurements."""
    job = read(path)
    begin = time.time()
    module = importlib.import_module(f"benchmarks.{'gae' if job.workload.kind == 'gae' else MODULES[job.side]}")
    run = module.load(job)
    imported = time.time() - begin
    import torch

    torch.set_num_threads(job.threads)
    clock = Clock(job)
    run(job, clock)
    peak = torch.cuda.max_memory_allocated() / 2**20 if job.device == "cuda" else memory()
    steps = [b - a for a, b in zip(clock.times, clock.times[1:])]
    if len(steps) != job.steps:
        raise RuntimeError(f"{job.side} made {len(steps)} steps of {job.steps}")
    warm = 1 if len(steps) > 1 else 0
    on_policy = job.workload.kind in ON_POLICY
    measured = {
        "first": clock.first if job.check or not on_policy else {}, "step_s": steps[warm:], "import_s": imported,
        "first_step_s": clock.times[1] - job.started, "peak_mb": peak, "base_mb": clock.base_mb,
    }  # fmt: skip
    job.result.write_text(json.dumps(measured))
    sys.stdout.flush()
    os._exit(0)  # threads of peers must not keep the process


if __name__ == "__main__":
    main(sys.argv[1])
