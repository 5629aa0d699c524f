"""`alignkit diff A B`: the lines in which two recipes differ, which are the papers' differences."""

import ast
import difflib
from pathlib import Path
from textwrap import dedent

GREY, RED, GREEN = "2", "31", "32"


def report(a: Path, b: Path, *, color: bool) -> str:
    """The lines of `a` that `b` has not (-) and those of `b` that `a` has not (+), below the function they are in.

    First the docstrings, with the papers' equations, then the code, then imported names, whose order is none. Blank
    lines and the name of the folder of the run, `runs/` and the recipe's own, make no difference. `color` is for a
    terminal. Raises ValueError for a recipe that is no file, or not Python.
    """

    def paint(code: str, line: str) -> str:
        return f"\x1b[{code}m{line}\x1b[0m" if color else line

    old, new, lines = _sections(a), _sections(b), []
    names = [name for name in dict.fromkeys([*old, *new]) if name != "imports"]
    for name in [*names, "imports"]:
        changed = _changed(old.get(name, []), new.get(name, []))
        text = dedent("\n".join(line[1:] for line in changed)).splitlines()
        signs = [(line[0], line[0] + " " + rest) for line, rest in zip(changed, text)]
        lines += ["", paint(GREY, name)] if changed else []
        lines += [paint(RED if sign == "-" else GREEN, line) for sign, line in signs]
    if not lines:
        return f"{a} and {b} do not differ\n"
    return "\n".join([paint(RED, f"- {a.stem}"), paint(GREEN, f"+ {b.stem}"), *lines, ""])


def _changed(old: list[str], new: list[str]) -> list[str]:
    """The lines that differ, with their signs, and no others."""
    return [line[0] + line[2:] for line in difflib.ndiff(old, new) if line[0] in "-+"]


def _sections(path: Path) -> dict[str, list[str]]:
    """The lines of a recipe that are not blank, by what they are in: "docstring", "module", a function, "imports"."""
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file that exists")
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"recipe {str(path)!r} is not Python: {error.msg}, line {error.lineno}") from error
    names = dict.fromkeys(range(1, len(source.splitlines()) + 1), "module")
    imports: list[str] = []
    for node in ast.walk(tree):  # outer functions before those inside
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            names |= dict.fromkeys(range(first, (node.end_lineno or first) + 1), node.name)
    for node in tree.body:
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= dict.fromkeys(lines, "")
            imports += [ast.unparse(_only(node, alias)) for alias in node.names]
        elif node is tree.body[0] and ast.get_docstring(tree) is not None:
            names |= dict.fromkeys(lines, "docstring")
    sections: dict[str, list[str]] = {"docstring": []}
    for number, line in enumerate(source.replace(f"runs/{path.stem}", "runs/...").splitlines(), 1):
        if line.strip() and names[number]:
            sections.setdefault(names[number], []).append(line.rstrip())
    return sections | {"imports": sorted(imports)}


def _only(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.Import | ast.ImportFrom:
    """The import of one of its names."""
    if isinstance(node, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(node.module, [alias], node.level)
