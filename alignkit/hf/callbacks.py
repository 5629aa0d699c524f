"""What happens around the steps of a run: logs on disk and in the terminal, and Ctrl-C."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

METRICS = "metrics.jsonl"


class Log(TrainerCallback):
    """Appends every log to `metrics.jsonl`; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, *, resumed: bool):
        self.resumed = resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = Path(args.output_dir) / METRICS
        if state.is_world_process_zero and self.resumed and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(x for x in lines if json.loads(x)["step"] <= state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if state.is_world_process_zero:
            with (Path(args.output_dir) / METRICS).open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Progress(ProgressCallback):
    """The Trainer's progress bar with the newest numbers on it, instead of printed between."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and _line(logs):
            self.training_bar.set_postfix_str(_line(logs))


class Print(TrainerCallback):
    """One line for each log, where there is no terminal for a progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if state.is_world_process_zero and _line(logs):
            print(f"step {state.global_step}/{state.max_steps}: {_line(logs)}", flush=True)


def _line(logs: dict[str, float]) -> str:
    hidden = ("epoch", "learning_rate", "grad_norm", "total_flos", "runtime", "_per_second", "train_loss")
    return " ".join(f"{name}={x:.4g}" for name, x in logs.items() if not name.endswith(hidden))


class Interrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the step in progress, with a checkpoint; the second at once."""

    asked = False

    def __enter__(self) -> None:
        try:
            self.previous = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not in the main thread, where signals arrive
            self.previous = None

    def __exit__(self, *_: Any) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step; Ctrl-C again to stop at once.", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
