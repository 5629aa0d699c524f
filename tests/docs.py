"""docs/*.md and parts of README.md, made from the code: `python -m tests.docs` writes, tests/test_docs.py checks."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from pprint import pformat

from alignkit import conventions
from alignkit.testing import algebra, catalogue, certificates, optimum

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FLOOR = (
    "masking",
    "sampling",
    "logps",
    "heads",
    "kl",
    "weights",
    "advantages",
    "objectives",
    "multistep",
    "importance",
    "filters",
    "shaping",
    "text_rewards",
    "monitors",
    "controllers",
    "diffusion",
    "func",
    "losses.supervised",
    "losses.preference",
    "losses.margins",
    "losses.paired",
    "losses.unpaired",
    "losses.listwise",
    "losses.reference_free",
    "losses.reward",
    "losses.policy",
    "losses.sequence",
    "losses.regression",
    "losses.value",
    "losses.distillation",
    "losses.diffusion",
    "data",
    "train",
    "conventions",
)
WRITTEN = {
    "on_policy.md": "rollouts, rewards and the GRPO family: what a recipe composes, and how to write the next one",
    "environments.md": "rollouts of several turns, with tools, against a plain function",
    "server.md": "rollouts from vLLM, SGLang or transformers serve",
    "image_models.md": "diffusion models as policies: DDPO and its family on the functions of text",
    "rlhf.md": "SFT, reward model, PPO on the built-in world: true reward against KL",
    "speed.md": "what is not computed, what to turn, and measurements beside TRL and torchrl",
    "trl.md": "the class API of TRL 0.7: what is there, and where it differs from the release",
}
"""Pages by hand, and what they are about."""
TESTING = ("contracts", "strategies", "laws", "directions", "certificates", "worlds", "optimum", "algebra")


def public(module):
    """The functions and classes that a module defines, in the order of its source."""
    here = [
        (name, x)
        for name, x in vars(module).items()
        if not name.startswith("_") and callable(x) and getattr(x, "__module__", None) == module.__name__
    ]
    return sorted(here, key=lambda item: inspect.getsourcelines(inspect.unwrap(item[1]))[1])


def first_sentence(x):
    text = " ".join(inspect.getdoc(x).split("\n\n")[0].split())
    return re.split(r"(?<!e\.g)(?<!Dr)(?<! al)\. (?=[A-Z`(])", text)[0].rstrip(".")


def page(name):
    """The last part of a module's name, unless another module has that to itself."""
    last = name.rsplit(".", 1)[-1]
    return (name.replace(".", "_") if name != last and last in FLOOR else last) + ".md"


def anchor(name):
    return name.lower()


def annotation(kind):
    """A jaxtyping annotation as Float[*batch time], any other as it is written."""
    text = inspect.formatannotation(kind)
    for module in ("torch.", "collections.abc.", "jaxtyping.", "typing."):
        text = text.replace(module, "")
    text = re.sub(r"alignkit\.[a-z_.]+\.", "", text)
    return re.sub(r"\[Tensor, '([^']*)'\]", r"[\1]", text)


def signature(name, fn):
    parameters, star = [], False
    sig = inspect.signature(fn)
    for p in sig.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        starred = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "") + p.name
        text = starred if p.annotation is p.empty else f"{starred}: {annotation(p.annotation)}"
        default = getattr(p.default, "__name__", repr(p.default))
        parameters.append(text if p.default is p.empty else f"{text} = {default}")
    result = "" if sig.return_annotation is sig.empty else f" -> {annotation(sig.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){result}"


def constants(module):
    """The tables of a module that its docstrings refer to."""
    shown = {name: x for name, x in vars(module).items() if name in ("SHAPES", "MASKS", "SNAPSHOTS")}
    return [f"```python\n{name} = {pformat(x, width=110, sort_dicts=False)}\n```" for name, x in shown.items()]


def prose(x):
    """A docstring as paragraphs of markdown; code and lists stay as they are."""
    paragraphs = inspect.getdoc(x).split("\n\n")
    flowing = [p if re.search(r"^( {2,}|- )", p, re.MULTILINE) else " ".join(p.split()) for p in paragraphs]
    fenced = [
        f"```python\n{textwrap.dedent(p)}\n```" if all(re.match(" {4}|$", n) for n in p.split("\n")) else p
        for p in flowing
    ]
    return "\n\n".join(re.sub(r"^Elsewhere:", "**Elsewhere:**", p) for p in fenced)


def family(name):
    """The page of one module: its functions with equation, source and other names, and what is proved about them."""
    module = importlib.import_module(f"alignkit.{name}")
    parts = [f"# `alignkit.{name}`", prose(module)]
    for function, x in public(module):
        shown = signature(function, x) if inspect.isfunction(x) else f"class {function}"
        parts += [f"## {function}", f"```python\n{shown}\n```", prose(x)]
    proved = [e for e in algebra.entries() if e.family == page(name).removesuffix(".md")]
    if proved:
        parts += ["## Identities", "Each is tested on drawn cases in float64 (`alignkit.testing.algebra`)."]
    for entry in proved:
        parts.append(f"- {entry.name[0].upper()}{entry.name[1:]}{f' ({entry.source})' if entry.source else ''}:")
        parts.append(textwrap.indent(f"```math\n{entry.latex}\n```", "  "))
    return "\n\n".join(parts) + "\n"


def testing():
    parts = ["# `alignkit.testing`", prose(importlib.import_module("alignkit.testing"))]
    for name in TESTING:
        module = importlib.import_module(f"alignkit.testing.{name}")
        parts += [f"## `alignkit.testing.{name}`", prose(module), *constants(module)]
        for function, x in public(module):
            shown = signature(function, x) if inspect.isfunction(x) else f"class {function}"
            parts += [f"### {function}", f"```python\n{shown}\n```", prose(x)]
    return "\n\n".join(parts) + "\n"


def contents():
    lines = ["# Documentation", ""]
    lines += [f"- [{name.removesuffix('.md')}]({name}): {about}" for name, about in WRITTEN.items()]
    lines += ["", "Made from the docstrings by `make docs`:", ""]
    lines += ["- [testing](testing.md): contracts, strategies, certificates and optima for maths of your own"]
    lines += ["- [certificates](certificates.md): what estimators really estimate, by exact enumeration"]
    lines += [
        f"- [{name}]({page(name)}): {first_sentence(importlib.import_module(f'alignkit.{name}'))}" for name in FLOOR
    ]
    return "\n".join(lines) + "\n"


def pages():
    made = {page(name): family(name) for name in FLOOR}
    made["conventions.md"] += f"\n## On one batch\n\n```text\n{conventions.report().strip()}\n```\n"
    made["certificates.md"] = certificates_page()
    return made | {"testing.md": testing(), "README.md": contents()}


def certificates_page():
    parts = ["# Certificates", prose(certificates)]
    for title, grades in catalogue.catalogue().items():
        parts += [f"## {title}", certificates.table(grades)]
    parts += ["## Where descent ends", prose(optimum), catalogue.optima_table(catalogue.optima())]
    return "\n\n".join(parts) + "\n"


def index():
    lines = []
    for name in FLOOR:
        module = importlib.import_module(f"alignkit.{name}")
        links = [f"[`{function}`](docs/{page(name)}#{anchor(function)})" for function, _ in public(module)]
        lines += [f"**[`alignkit.{name}`](docs/{page(name)})** {first_sentence(module)}:", ", ".join(links) + ".", ""]
    return "\n".join(lines).strip()


def recipe():
    return f"```python\n{(ROOT / 'recipes' / 'dpo.py').read_text().strip()}\n```"


PARTS = {"index": index, "recipe": recipe}


def filled(text):
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text)
