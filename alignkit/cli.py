"""The command line: `alignkit run | list | new | diff | explain | demo | check | ratio | conventions | papers`.

`run(main)` gives a recipe its own.
"""

import argparse
import ast
import difflib
import importlib
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from alignkit.sampling import Sampling

DEMOS = {
    "dpo": ("alignkit.demo", "runs/demo"),
    "rlhf": ("alignkit.rlhf", "runs/rlhf"),
    "rl": ("alignkit.rl", "runs/rl"),
    "diffusion": ("alignkit.pictures", "runs/diffusion"),
}


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
    columns = []
    for p in own:
        kind = Annotated[p.annotation, tyro.conf.arg(help=comments.get(p.name, ""))]
        columns.append((p.name, kind) if p.default is p.empty else (p.name, kind, field(default=p.default)))
    parsed, rest = tyro.cli(
        make_dataclass("Options", columns),
        args=argv,
        prog=Path(sys.argv[0]).name,
        description=description,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    options = vars(parsed)
    if rest:
        names = _option_names(own)
        options |= _training_options(rest, names) if takes_training else _unknown(rest[0], names)
    try:
        return main(**options)
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith((str(Path(__file__).parent), str(_folder()))):
            raise
        _fail(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `alignkit` command."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("check", "explain", "ratio"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        left = args.act(args, rest)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if callable(left):
        left()  # a recipe, whose errors are its own
    elif left:
        raise SystemExit(left)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignkit", description="Recipes for aligning models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(act: Callable[[Any, list[str]], Any], about: str, **options: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(act.__name__.strip("_"), help=about, **options)
        made.set_defaults(act=act)
        return made

    command(_list, "the recipes, one line each")
    made = command(_run, "run a recipe: alignkit run dpo --beta 0.2", add_help=False)
    made.add_argument("recipe", help="a name from `alignkit list`, or a path")
    made.add_argument("options", nargs=argparse.REMAINDER)
    made = command(_new, "copy a recipe to start from: alignkit new my_dpo --from dpo")
    made.add_argument("name")
    made.add_argument("--from", dest="source", required=True, metavar="RECIPE")
    made = command(_diff, "in which lines two recipes differ: alignkit diff grpo dapo")
    made.add_argument("recipes", nargs=2, metavar="RECIPE")
    made = command(
        _explain, "the flow of columns from source to loss, from a dry run: alignkit explain ppo --svg ppo.svg"
    )
    made.add_argument("recipe", help="a name from `alignkit list`, or a path; its options may follow")
    made.add_argument("--svg", type=Path, metavar="FILE", help="draw it too")
    made = command(_demo, "a tiny model learns: minutes on a laptop")
    made.add_argument(
        "name",
        nargs="?",
        choices=list(DEMOS),
        default="dpo",
        help="SFT and DPO (the default); SFT, a reward model and PPO; or SFT and GRPO",
    )
    made.add_argument("--out", type=Path, help="default: runs/demo, or runs/NAME")
    made.add_argument("--seed", type=int, default=0)
    made = command(_check, "hold a function to its laws: alignkit check my.py:my_loss --beta 0.1")
    made.add_argument("target", metavar="FILE.py:FUNCTION", help="its hyperparameters follow as options, --beta 0.1")
    made.add_argument("--kind", choices=["loss", "advantage", "kl", "aggregation", "shaping"], help="default: by name")
    made.add_argument("--without", action="append", default=[], metavar="LAW", help="leave a law out (repeatable)")
    made.add_argument("--examples", type=int, default=50, metavar="N", help="drawn cases per law (50)")
    command(_ratio, "whether a model scores what is sampled from it: alignkit ratio --top-p 0.9", add_help=False)
    command(_conventions, "what peers compute under one name, side by side on one batch")
    made = command(_papers, "claims of papers, run and judged: alignkit papers list | run NAME | check")
    made.add_argument("action", choices=["list", "run", "check"])
    made.add_argument("names", nargs="*", metavar="NAME", help="folders in papers/, or beginnings of their names")
    made.add_argument("--tier", action="append", default=[], choices=["ci", "cpu", "slow", "gpu"])
    made.add_argument("--first-seed", type=int, default=0, metavar="N", help="other seeds than those of the results")
    made.add_argument("--only", metavar="RUN", help="run: one run of the paper")
    made.add_argument("--seeds", type=int, default=0, metavar="N", help="run: not as many as claims.toml says")
    made.add_argument("--accept", action="store_true", help="check: publish verdicts even where a claim was lost")
    return parser


def _list(args: Any, rest: list[str]) -> None:
    for path in _recipes():
        print(f"{path.stem:24}{_headline(path)}")


def _run(args: Any, rest: list[str]) -> Callable[[], Any]:
    recipe = _find(args.recipe)
    sys.argv = [str(recipe), *args.options]
    return partial(runpy.run_path, str(recipe), run_name="__main__")


def _new(args: Any, rest: list[str]) -> None:
    """Copy a recipe to NAME.py in the current folder."""
    source, target = _find(args.source), Path(args.name if args.name.endswith(".py") else f"{args.name}.py")
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to put {target.name} into")
    own = f'"runs/{target.stem}"'  # not the folder of the recipe that it was copied from
    target.write_text(source.read_text().replace(f'"runs/{source.stem}"', own))
    print(f"{target}: a copy of {source.stem}; run it with `python {target} --help`")


def _diff(args: Any, rest: list[str]) -> None:
    from alignkit.difference import report

    print(report(*map(_find, args.recipes), color=sys.stdout.isatty()))


def _explain(args: Any, rest: list[str]) -> None:
    from alignkit.explain import command

    print(run(command(_find(args.recipe), svg=args.svg), rest))


def _demo(args: Any, rest: list[str]) -> None:
    module, out = DEMOS[args.name]
    make = getattr(importlib.import_module(module), module.rpartition(".")[2])
    make(args.out or Path(out), run=_call, seed=args.seed)


def _check(args: Any, rest: list[str]) -> int:
    from alignkit.testing.shell import check

    return check(args.target, rest, kind=args.kind, without=args.without, examples=args.examples)


def _ratio(args: Any, rest: list[str]) -> None:
    run(ratio, rest)


def _conventions(args: Any, rest: list[str]) -> None:
    from alignkit.conventions import report

    print(report())


def _papers(args: Any, rest: list[str]) -> int | None:
    from alignkit.papers import shell

    if args.action == "list":
        return shell.show()
    if args.action == "check":
        return shell.check(args.names, tiers=args.tier, first_seed=args.first_seed, accept=args.accept)
    if not args.names:
        raise ValueError("run needs a NAME; `alignkit papers list` shows them")
    return shell.run(args.names, tiers=args.tier, only=args.only, first_seed=args.first_seed, seeds=args.seeds)


def ratio(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # of prompts
    sampling: Sampling = Sampling(max_new=64),
    prompts: int = 8,  # from the first on
    n: int = 4,  # answers to each
    dtype: str = "float32",  # of the weights
    tolerance: float = 1e-3,  # nats
    seed: int = 0,
) -> None:
    """Sample, score again, and compare: the importance ratio of what was just sampled is 1."""
    from alignkit import hf

    policy, tokenizer = hf.causal_lm(model, sampling=sampling, dtype=dtype, seed=seed)
    rows = hf.prompts(dataset)[:prompts]
    gap = hf.check_ratio_is_one(policy, tokenizer, rows, n=n, seed=seed, tolerance=tolerance)
    print(f"{n * len(rows)} answers: log-probs of sampler and policy differ by at most {gap:.2g} nats per token")


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
    from transformers import HfArgumentParser

    from alignkit.hf.arguments import Arguments

    parser = HfArgumentParser(Arguments, prog="training arguments", allow_abbrev=False, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is given
    return parser


def _option_names(own: Sequence[inspect.Parameter]) -> list[str]:
    """The options of these parameters; those of a dataclass are its fields."""
    nested = ([f.name for f in fields(p.annotation)] if is_dataclass(p.annotation) else [p.name] for p in own)
    return [f"--{name.replace('_', '-')}" for names in nested for name in names]


def _training_options(rest: list[str], own: list[str]) -> dict[str, Any]:
    """`--warmup-steps 50 ...` as fields of TrainingArguments; exits with a suggestion for an unknown option."""
    parser = _training_parser()
    known = {s for action in parser._actions for s in action.option_strings} | set(own)
    for word, before in zip(rest, ["", *rest]):
        option = word.split("=")[0]
        if option not in known and (option.startswith("--") or not before.startswith("--")):
            _unknown(option, sorted(known))
    parser.error = _fail
    return vars(parser.parse_args(rest))


def _unknown(option: str, known: Sequence[str]) -> NoReturn:
    close = difflib.get_close_matches(option.replace("_", "-"), [k.replace("_", "-") for k in known], n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    _fail(f"unknown option {option}{hint}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
