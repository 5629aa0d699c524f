"""The command line: `alignkit run | list | new | demo | check | conventions`; `run(main)` gives a recipe its own."""

import argparse
import ast
import difflib
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro


def run(main: Callable[..., Any], argv: Sequence[str] | None = None) -> Any:
    """Call `main` with the command line: its signature is the list of options, its module's docstring the help.

    If `main` takes `**training`, every field of `transformers.TrainingArguments` is an option too. What alignkit's own
    checks raise is printed as one line, with exit status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    signature = inspect.signature(main)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    takes_training = len(own) < len(signature.parameters)
    module = inspect.getmodule(main)
    description = inspect.getdoc(module) or inspect.getdoc(main) or ""
    if takes_training:
        description += "\n\nEvery field of transformers.TrainingArguments is an option as well: --warmup-steps 50,"
        description += " --report-to tensorboard,\n--resume-from-checkpoint last, ... (--help-training lists them)."
        if "--help-training" in argv:
            _training_parser().print_help()
            return None

    comments = _comments(main)
    fields = []
    for p in own:
        kind = Annotated[p.annotation, tyro.conf.arg(help=comments.get(p.name, ""))]
        fields.append((p.name, kind) if p.default is p.empty else (p.name, kind, field(default=p.default)))
    parsed, rest = tyro.cli(
        make_dataclass("Options", fields),
        args=argv,
        prog=Path(sys.argv[0]).name,
        description=description,
        return_unknown_args=True,
    )
    options = vars(parsed)
    if rest:
        options |= _training_options(rest, [p.name for p in own]) if takes_training else _unknown(rest[0], own)
    try:
        return main(**options)
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith((str(Path(__file__).parent), str(_folder()))):
            raise
        _fail(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `alignkit` command."""
    parser = argparse.ArgumentParser(prog="alignkit", description="Recipes for aligning models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the recipes, one line each")
    command = commands.add_parser("run", help="run a recipe: alignkit run dpo --beta 0.2", add_help=False)
    command.add_argument("recipe", help="a name from `alignkit list`, or a path")
    command.add_argument("options", nargs=argparse.REMAINDER)
    command = commands.add_parser("new", help="copy a recipe to start from: alignkit new my_dpo --from dpo")
    command.add_argument("name")
    command.add_argument("--from", dest="source", required=True, metavar="RECIPE")
    command = commands.add_parser("demo", help="a tiny model learns to write, then to please: minutes on a laptop")
    command.add_argument(
        "name", nargs="?", choices=["dpo", "rlhf"], default="dpo", help="SFT and DPO; or SFT, a reward model and PPO"
    )
    command.add_argument("--out", help="default: runs/demo, or runs/rlhf")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("check", help="hold a function to its laws: alignkit check my.py:my_loss --beta 0.1")
    command.add_argument("target", metavar="FILE.py:FUNCTION", help="its hyperparameters follow as options, --beta 0.1")
    command.add_argument(
        "--kind", choices=["loss", "advantage", "kl", "aggregation", "shaping"], help="default: by name"
    )
    command.add_argument("--without", action="append", default=[], metavar="LAW", help="leave a law out (repeatable)")
    command.add_argument("--examples", type=int, default=50, metavar="N", help="drawn cases per law (50)")
    commands.add_parser("conventions", help="what peers compute under one name, side by side on one batch")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "check":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status = 0
    try:
        if args.command == "list":
            for path in _recipes():
                print(f"{path.stem:16}{_headline(path)}")
        elif args.command == "run":
            recipe = _find(args.recipe)
        elif args.command == "new":
            _new(args.name, _find(args.source))
        elif args.command == "check":
            from alignkit.testing.shell import check

            status = check(args.target, rest, kind=args.kind, without=args.without, examples=args.examples)
        elif args.command == "conventions":
            from alignkit.conventions import report

            print(report())
        else:
            from alignkit.demo import demo
            from alignkit.rlhf import rlhf

            make, out = {"dpo": (demo, "runs/demo"), "rlhf": (rlhf, "runs/rlhf")}[args.name]
            make(Path(args.out or out), run=_call, seed=args.seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if args.command == "run":
        sys.argv = [str(recipe), *args.options]
        runpy.run_path(str(recipe), run_name="__main__")
    if status:
        raise SystemExit(status)


def _folder() -> Path:
    """The installed recipes, or those of the checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def _recipes() -> list[Path]:
    return sorted(path for path in _folder().glob("*.py") if not path.stem.startswith("_"))


def _find(name: str) -> Path:
    """A recipe by name or path."""
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in _recipes()}
    if name not in known:
        raise ValueError(f"recipe {name!r} is neither a .py file nor one of {', '.join(known)}")
    return known[name]


def _call(recipe: str, **options: Any) -> None:
    """Run a recipe's `main` in this process."""
    runpy.run_path(str(_find(recipe)))["main"](**options)


def _new(name: str, source: Path) -> None:
    """Copy `source` to NAME.py in the current folder."""
    target = Path(name if name.endswith(".py") else f"{name}.py")
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to put {target.name} into")
    target.write_text(source.read_text())
    print(f"{target}: a copy of {source.stem}; run it with `python {target} --help`")


def _headline(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def _comments(main: Callable[..., Any]) -> dict[str, str]:
    """The comment behind each argument of `main`, which is its help."""
    try:
        signature = inspect.getsource(main).split("\n):")[0]
    except OSError:
        return {}
    return dict(re.findall(r"^ +(\w+): .*  # (.+)$", signature, re.MULTILINE))


def _training_parser() -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, prog="training arguments", allow_abbrev=False, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is given
    return parser


def _training_options(rest: list[str], own: list[str]) -> dict[str, Any]:
    """`--warmup-steps 50 ...` as fields of TrainingArguments; exits with a suggestion for an unknown option."""
    parser = _training_parser()
    known = {s for action in parser._actions for s in action.option_strings} | {f"--{n}" for n in own}
    for word, before in zip(rest, ["", *rest]):
        option = word.split("=")[0]
        if option not in known and (option.startswith("--") or not before.startswith("--")):
            _unknown(option, [], sorted(known))
    parser.error = _fail
    return vars(parser.parse_args(rest))


def _unknown(option: str, own: Sequence[inspect.Parameter], known: Sequence[str] = ()) -> NoReturn:
    known = known or [f"--{p.name}" for p in own]
    close = difflib.get_close_matches(option.replace("_", "-"), [k.replace("_", "-") for k in known], n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    _fail(f"unknown option {option}{hint}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
