"""Sides one after the other, each in a process of its own, and whether they compute the same."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gae
from benchmarks.side import NEEDS, Job
from benchmarks.workloads import ON_POLICY, WORKLOADS, Workload, count, save

SIDES = ("alignkit", "trl", "bare", "best")
ROUNDING = 1e-6  # of float32: advantages of a group cancel to a loss near 0
GAE_SIDES = ("alignkit", "torchrl", "torchrl-loop", "loop")


@dataclass(frozen=True)
class Options:
    """Of a whole run."""

    repeats: int = 3
    steps: int = 5
    threads: int = 2
    device: str = "cpu"
    bf16: bool = False
    seed: int = 0
    sides: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        """By how much losses and gradient norms may differ, relatively."""
        return 2e-2 if self.bf16 else 1e-4


def installed(kind: str, options: Options) -> list[str]:
    """The sides of a method, less those whose package is missing, which is said."""
    known = GAE_SIDES if kind == "gae" else SIDES
    wanted = [side for side in known if not options.sides or side in options.sides or side == "alignkit"]
    missing = [side for side in wanted if side in NEEDS and not importlib.util.find_spec(NEEDS[side])]
    for side in missing:
        print(f"MISSING {side}: {NEEDS[side]} is not installed, so it is left out (make bench installs it)", flush=True)
    return [side for side in wanted if side not in missing]


def measure(name: str, options: Options, workload: Workload | None = None) -> list[dict[str, Any]]:
    """One record for each side: medians over repeats, which alternate between the sides.

    Raises ValueError if a side's loss or gradient norm on the first batch is not alignkit's.
    """
    workload, records = workload or WORKLOADS[name], []
    sides = installed(workload.kind, options)
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as folder:
        calls = gae.CALLS if workload.kind == "gae" else options.steps
        rows = [] if workload.kind == "gae" else save(workload, Path(folder), calls + 1, options.seed)
        tokens = sum(count(workload, tree) for tree in rows[workload.prompts :]) / calls
        if workload.kind == "gae":
            tokens = workload.size[0] * workload.size[1]
        checks = {}
        if workload.kind in ON_POLICY:
            checks = {s: [_run(Path(folder), s, workload, options, 1, check=True)["first"]] for s in sides}
            agree(name, checks, options.tolerance + workload.rounding)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side in sides:
                runs[side].append(_run(Path(folder), side, workload, options, calls + 1))
            if workload.kind not in ON_POLICY:
                checks = {side: [x["first"] for x in runs[side]] for side in sides}
                agree(name, checks, options.tolerance)
        for side in sides:
            records.append(_record(name, side, workload, options, tokens, runs[side], checks[side][0]))
    for record in records:
        record["time_ratio"] = record["step_s"] / records[0]["step_s"]
        record["memory_ratio"] = records[0]["peak_mb"] / record["peak_mb"]
    return records


def agree(name: str, first: dict[str, list[dict[str, float]]], tolerance: float) -> None:
    """Raise ValueError unless all sides have alignkit's loss and gradient norm on the first batch."""
    ours = first["alignkit"][0]
    for side, values in first.items():
        for value in values:
            close = {k: abs(ours[k] - value[k]) <= tolerance * abs(ours[k]) + ROUNDING for k in ours}
            off = {k: (ours[k], value[k]) for k in ours if not close[k]}
            if off:
                shown = ", ".join(f"{k} {a:.8g} against {b:.8g}" for k, (a, b) in off.items())
                raise ValueError(f"{name}: alignkit and {side} do not compute the same on the first batch: {shown}")


def _record(
    name: str, side: str, workload: Workload, options: Options, tokens: float, runs: list[Any], first: Any
) -> dict[str, Any]:
    steps = [s for run in runs for s in run["step_s"]]
    step = median(median(run["step_s"]) for run in runs)
    package = NEEDS.get(side, "alignkit" if side == "alignkit" else "torch")
    middle = {key: median(run[key] for run in runs) for key in ("import_s", "first_step_s", "peak_mb", "base_mb")}
    return {
        "workload": name, "side": side, "version": version(package), "step_s": step, "step_min_s": min(steps),
        "step_max_s": max(steps), "tokens_per_s": tokens / step, **middle, "loss": first["loss"],
        "grad_norm": first["norm"], "repeats": options.repeats, "steps": len(runs[0]["step_s"]),
        "threads": options.threads, "device": options.device, "bf16": options.bf16, "seed": options.seed,
        "shape": asdict(workload.shape), "size": workload.size, "torch": version("torch"),
        "transformers": version("transformers"), "load": os.getloadavg()[0], "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip


def _run(
    folder: Path, side: str, workload: Workload, options: Options, steps: int, *, check: bool = False
) -> dict[str, Any]:
    """One process, which leaves nothing behind but its measurements."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        result, job = Path(own) / "result.json", Path(own) / "job.json"
        for item in folder.iterdir():
            if item.is_file():
                (Path(own) / item.name).symlink_to(item)
        common = {"steps": steps, "seed": options.seed, "threads": options.threads, "device": options.device}
        told = Job(
            side=side, workload=workload, folder=Path(own), result=result, bf16=options.bf16, check=check,
            started=time.time(), **common,
        )  # fmt: skip
        job.write_text(json.dumps(asdict(told), default=str))
        env = environment(options) | {"HF_DATASETS_CACHE": own}
        for line in group([sys.executable, "-m", "benchmarks.side", str(job)], env):
            if os.environ.get("BENCH_VERBOSE"):
                print(line, end="", flush=True)
        return json.loads(result.read_text())


def environment(options: Options) -> dict[str, str]:
    """Of every side: its threads, no network, no accelerator for the CPU."""
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    return {**os.environ, **threads, **quiet, **hidden, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def group(command: list[str], env: dict[str, str]) -> Iterator[str]:
    """The lines of a command in a process group of its own, which is killed with all it started when this ends.

    Raises RuntimeError, with the last lines, if the command fails.
    """
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    seen: list[str] = []
    try:
        for line in process.stdout or ():
            seen = [*seen[-30:], line]
            yield line
        if process.wait():
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{''.join(seen)}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
