"""`python -m benchmarks [run|scaling|decoding|cli] [options]`: see --help."""

import argparse
import sys
from dataclasses import fields

from benchmarks import report
from benchmarks.cli import cli
from benchmarks.decoding import decoding
from benchmarks.run import GAE_SIDES, SIDES, Options, measure
from benchmarks.scaling import scaling
from benchmarks.workloads import ARCHITECTURES, WORKLOADS, Shape, changed

HELP = {"batch": "rows (pairs, answers) of a step", "group": "answers to a prompt", "mlp": "0: in Llama's proportion"}


def words(text: str) -> tuple[str, ...]:
    """A list with commas."""
    return tuple(filter(None, text.split(",")))


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    out = argparse.ArgumentParser(prog="python -m benchmarks", description="alignkit beside its peers")
    out.add_argument("command", nargs="?", choices=("run", "scaling", "decoding", "cli"), default="run")
    out.add_argument("--only", type=words, default=(), help=f"of {','.join(WORKLOADS)}; of scaling, words of a sweep")
    known = sorted({*SIDES, *GAE_SIDES})
    out.add_argument("--sides", type=words, default=(), help=f"beside alignkit, of {','.join(known)}")
    out.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    out.add_argument("--bf16", action="store_true", help="mixed precision on every side; tolerances are wider")
    for name, default in {"repeats": None, "steps": None, "threads": 2, "seed": 0}.items():
        out.add_argument(f"--{name}", type=int, default=default)
    shape = out.add_argument_group("the shape, instead of each workload's own")
    for field in fields(Shape):
        if field.name == "arch":
            shape.add_argument("--arch", choices=ARCHITECTURES)
        elif field.name == "ragged":
            shape.add_argument("--ragged", action=argparse.BooleanOptionalAction)
        else:
            shape.add_argument(f"--{field.name}", type=int, help=HELP.get(field.name))
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the command; ValueError if sides do not agree."""
    given = parser().parse_args(argv)
    few = given.command == "scaling"
    options = Options(
        repeats=given.repeats or (1 if few else 3), steps=given.steps or (2 if few else 5), threads=given.threads,
        device=given.device, bf16=given.bf16, seed=given.seed, sides=given.sides or (("trl",) if few else ()),
    )  # fmt: skip
    shape = {field.name: getattr(given, field.name) for field in fields(Shape)}
    unknown = [x for x in given.sides if x not in (*SIDES, *GAE_SIDES)]
    unknown += [x for x in given.only if x not in WORKLOADS] if given.command == "run" else []
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; workloads are {', '.join(WORKLOADS)}; see --help for sides")
    if given.command == "scaling":
        scaling(options, {name: x for name, x in shape.items() if x is not None}, given.only)
    elif given.command == "decoding":
        decoding(options, shape)
    elif given.command == "cli":
        cli(options)
    else:
        records = []
        try:
            for name in given.only or WORKLOADS:
                records += measure(name, options, changed(WORKLOADS[name], **shape))
                print(f"\n{report.table([x for x in records if x['workload'] == name])}", flush=True)
        finally:  # what was measured before sides disagree, or Ctrl-C, is not lost
            if records:
                report.write("results", records, note=report.conditions(records))
                report.bars("results", records)


if __name__ == "__main__":
    main(sys.argv[1:])
