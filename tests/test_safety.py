"""No line of ours runs what a file from outside says: a look at the syntax tree of every file, in `make check`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])

# SECURITY.md promises these away. Name of what is called, read or imported -> why it is not in the code.
FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports a name from data",
    "importlib.import_module": "imports a name from data",
    "os.system": "is a shell",
    "os.popen": "is a shell",
    "subprocess.getoutput": "is a shell",
    "subprocess.getstatusoutput": "is a shell",
    "yaml.load": "builds any object: use likely.strict_yaml",
    "yaml.load_all": "builds any object",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds many objects",
    "numpy.load": "can unpickle",
    "tempfile.mktemp": "is a race",
}
MUST_BE_FALSE = {
    "shell": "is a shell",
    "trust_remote_code": "runs code from a model folder",
    "allow_pickle": "runs code when it reads",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def full_name(node: ast.AST, aliases: dict[str, str]) -> str:
    """``np.load`` -> ``numpy.load``, by the file's own imports; empty for what is no plain dotted name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def aliases_of(tree: ast.AST) -> dict[str, str]:
    """Name in the file -> full name of what was imported under it."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            aliases |= {(top := alias.name.split(".")[0]): top for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def unsafe_calls(tree: ast.AST) -> list[tuple[int, str]]:
    """``(line, what is wrong)`` of all that could run what a file from outside says."""
    aliases = aliases_of(tree)
    modules = {name.split(".")[0] for name in aliases.values()}
    found = [(1, f"{module} runs code when it reads") for module in sorted(modules & FORBIDDEN_MODULES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, "a bare except hides interrupts and bugs"))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = full_name(node, aliases)
            if name in FORBIDDEN:
                found.append((node.lineno, f"{name} {FORBIDDEN[name]}"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in unsafe_arguments(node, aliases)]
    return found


def unsafe_arguments(call: ast.Call, aliases: dict[str, str]) -> list[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    found = [
        f"{name}, if not False, {why}"
        for name, why in MUST_BE_FALSE.items()
        if name in given and not is_constant(given[name], False)
    ]
    if full_name(call.func, aliases) == "torch.load" and not is_constant(given.get("weights_only"), True):
        found.append("torch.load without weights_only=True unpickles")
    return found


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    found = unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in found)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import pickle as p",
        "import dill",
        "eval('1')",
        "exec(text)",
        "f = eval",
        "import os; os.system('ls')",
        "from os import system as s; s('ls')",
        "import yaml; yaml.load(t, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load; unsafe_load(t)",
        "import torch; torch.load(f)",
        "import torch as t; t.load(f, weights_only=False)",
        "from torch import load; load(f, weights_only=x)",
        "import subprocess; subprocess.run(c, shell=True)",
        "subprocess.Popen(c, shell=x)",
        "import numpy as np; np.load(f)",
        "import importlib; importlib.import_module(name)",
        "M.from_pretrained(n, trust_remote_code=True)",
        "try: pass\nexcept: pass",
    ],
)
def test_the_lint_sees(code: str) -> None:
    assert unsafe_calls(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.load(f, weights_only=True)",
        "import subprocess; subprocess.run(c, shell=False)",
        "import yaml; yaml.safe_load(t)",
        "network.eval()",
        "import re; re.compile(p)",
        "import json; json.load(f)",
        "import importlib.util; importlib.util.find_spec(n)",
        "try: pass\nexcept Exception: pass",
    ],
)
def test_the_lint_lets_pass(code: str) -> None:
    assert not unsafe_calls(ast.parse(code))
