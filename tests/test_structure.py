"""The walls of the house, as tests: who may import whom, and how big a file or a function may grow."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "likely"

# A file imports only from a lower floor. First match wins.
FLOORS = [
    ("likely.__main__", 10),
    ("likely.cli", 9),
    ("likely.view_work", 9),
    ("likely", 9),  # the Python API, the package's own file
    ("likely.run", 8),
    ("likely.look", 8),
    ("likely.deliver", 8),
    ("likely.converse", 8),
    ("likely.examine", 8),
    ("likely.learning_curve", 8),
    ("likely.view", 8),
    ("likely.inputs", 7),
    ("likely.web", 6),
    ("likely.journal", 6),
    ("likely.examiners", 6),
    ("likely.outcome", 6),
    ("likely.run_folder", 5),
    ("likely.provenance", 5),
    ("likely.training.engine", 5),
    ("likely.exports", 5),
    ("likely.insight", 5),
    ("likely.training", 4),
    ("likely.model", 3),
    ("likely.data.cache", 3),
    ("likely.data", 2),
    ("likely.migration", 2),
    ("likely.verb_settings", 2),
    ("likely.flags", 1),
    ("likely.config", 1),
    ("likely.manifest", 2),
    ("likely.storage", 1),
    ("likely.launched", 1),
    ("likely.stops", 0),
    ("likely.strict_yaml", 0),
    ("likely.complaints", 0),
    ("likely.credentials", 0),
    ("likely.streams", 0),
    ("likely.types", 0),
    ("likely.errors", 0),
]
# Inside one floor, these may lean on those that stand before them.
WITHIN = {
    "data": [
        "strict_json",
        "parquet",
        "kinds",
        "reading",
        "hub",
        "shapes",
        "formats",
        "trie",
        "order",
        "packing",
        "dealing",
        "jinja_child",
        "template",
        "bounds",
        "encoding",
        "dialect",
        "roles",
        "writing",
        "kept",
        "ending",
        "render",
        "proof",
        "mixture",
        "lengths",
        "audit",
        "language",
        "duplicates",
        "parallel",
        "families",
        "table",
        "rows",
        "rendering",
        "dataset",
        "split",
        "taught",
        "survey",
    ],
    "model": [
        "transfer",
        "fuse",
        "elementwise",
        "attention",
        "flash",
        "flex",
        "kernels",
        "quantized",
        "linear",
        "layer",
        "decoder",
        "adapters",
        "embedded",
        "headers",
        "untrusted",
        "weight_shapes",
        "place",
        "forward",
        "generate",
        "load",
        "skeleton",
        "merge",
    ],
    "exports": [
        "sample",
        "vocabulary",
        "stored",
        "gguf_file",
        "readers",
        "fidelity",
        "go_template",
        "modelfile",
        "hub",
    ],
    "insight": [
        "pictures",
        "chart",
        "lengths",
        "distribution",
        "evaluate",
        "measures",
        "movement",
        "guard",
        "generation",
        "conversation",
        "elsewhere",
        "score_log",
        "score_file",
        "score_reading",
        "ranking",
        "lens",
        "again",
        "explain",
        "report",
        "panels",
        "charts",
        "report_page",
        "card",
        "report_files",
        "prose",
        "check",
        "estimate",
        "plan",
        "check_page",
        "power_law",
        "room",
        "curve_point",
        "curve_answer",
        "curve_page",
    ],
    "web": ["access", "jobs", "tail", "index", "table", "runs", "scores", "asks", "app", "serve"],
    "migration": ["foreign", "huggingface", "trl", "llamafactory", "axolotl_data", "axolotl", "openai", "carry"],
    "training": [
        "ahead",
        "failures",
        "signs",
        "meeting",
        "parallel",
        "sharding",
        "launch",
        "objective",
        "optim",
        "step",
        "memory",
        "checkpoint",
        "sharded_files",
        "log",
        "tracking",
    ],
}
ALLOWED = {
    "torch": {
        "model",
        "training",
        "exports/readers.py",
        "insight/lens.py",
        "insight/explain.py",
        "provenance.py",
    },
    "transformers": {"model", "data/render.py", "exports/readers.py"},
    "peft": {"model", "exports/readers.py"},
    "gguf": {"exports/gguf_file.py", "exports/readers.py"},
    "llama_cpp": {"exports/readers.py"},
    "tokenizers": {"data/encoding.py"},
    "jinja2": {"data/jinja_child.py", "insight/report_page.py", "insight/check_page.py", "insight/curve_page.py"},
    "pyarrow": {"data/reading.py", "data/parquet.py", "insight/score_file.py", "insight/score_reading.py"},
    "datasets": {"data/hub.py"},
    "starlette": {"web"},
    "uvicorn": {"web/serve.py"},
    "matplotlib": {"insight/pictures.py"},
    "huggingface_hub": {"model/place.py", "insight/card.py", "exports/hub.py"},
    "torch.distributed": {
        "training/meeting.py",
        "training/parallel.py",
        "training/launch.py",
        "training/sharding.py",
        "training/sharded_files.py",
    },
    "tensorboard": {"training/tracking.py"},
    "wandb": {"training/tracking.py"},
    "mlflow": {"training/tracking.py"},
    "trackio": {"training/tracking.py"},
    "rensa": {"data/duplicates.py"},
    "ftfy": {"data/audit.py"},
    "multiprocessing": {"data/parallel.py"},
    "pickle": set(),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    for prefix, floor in FLOORS:
        if module == prefix or (prefix != "likely" and module.startswith(prefix + ".")):
            return floor
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Full names of what a file imports, with their lines; ``from likely.model import load`` counts as the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                file = PACKAGE.parent / Path(*f"{node.module}.{alias.name}".split("."))
                is_module = file.with_suffix(".py").exists()
                found.append((f"{node.module}.{alias.name}" if is_module else str(node.module), node.lineno))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_a_lower_floor(path: Path) -> None:
    own = name_of(path)
    for imported, line in imports_of(path):
        if imported.split(".")[0] != "likely" or own in {"likely.cli", "likely.__main__"}:
            continue
        mine, theirs = floor_of(own), floor_of(imported)
        folder = own.split(".")[1] if own.count(".") == 2 else ""
        if mine == theirs and folder and imported.startswith(f"likely.{folder}."):
            order = WITHIN[folder]
            mine, theirs = order.index(own.split(".")[2]), order.index(imported.split(".")[2])
        assert theirs < mine, f"{path.relative_to(ROOT)}:{line}: {own} (floor {mine}) imports {imported} ({theirs})"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    for imported, line in imports_of(path):
        for library, places in ALLOWED.items():
            if imported == library or imported.startswith(library + "."):
                at_home = any(where == place or where.startswith(place + "/") for place in places)
                assert at_home, f"{where}:{line}: {library} belongs in {', '.join(sorted(places)) or 'no file'}"


def depth_of(node: ast.AST) -> int:
    """Levels of nested blocks below a node."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        opens = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match))
        # An elif is an If alone in the orelse of an If; it reads at the level of the first.
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth_of(child) + (opens and not chained))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_budgets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT)
    assert text.count("\n") <= 400, f"{where} has {text.count(chr(10))} lines of 400"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            num_arguments = len([a for a in arguments if a not in {"self", "cls", "ctx"}])
            assert length <= 60, f"{where}:{node.lineno}: {node.name} has {length} lines of 60"
            assert depth_of(node) <= 4, f"{where}:{node.lineno}: {node.name} nests {depth_of(node)} levels of 4"
            assert num_arguments <= 7, f"{where}:{node.lineno}: {node.name} takes {num_arguments} arguments of 7"


def test_no_drawer_for_everything() -> None:
    for path in PACKAGE.rglob("*"):
        assert path.stem not in {"utils", "util", "helpers", "common", "base", "manager", "misc"}, path


def test_only_the_command_line_and_the_log_speak() -> None:
    for path in FILES:
        if path.name in {"cli.py", "log.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"), (
                path
            )


def test_the_whole_config_is_named_only_where_verbs_are_wired() -> None:
    settings = {"likely.config", "likely.verb_settings"}
    named = {p.name for p in FILES for module, _ in imports_of(p) if module in settings}
    verbs = {"run.py", "look.py", "deliver.py", "converse.py", "examine.py", "learning_curve.py", "view_work.py"}
    assert named <= verbs | {"cli.py", "inputs.py", "__init__.py", "verb_settings.py"}


def test_the_version_is_written_once_and_in_the_changelog() -> None:
    import likely

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == likely.__version__
    assert f"## {likely.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_docs_speak_of_files_that_exist() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in FILES:
        if path.name != "__init__.py":
            assert f"`{path.relative_to(PACKAGE).as_posix()}`" in picture, f"{path.name} is not in docs/architecture.md"


def test_public_names() -> None:
    import likely

    assert sorted(likely.__all__) == [
        "ConfigError",
        "DataError",
        "GuardError",
        "LikelyError",
        "LockedError",
        "ModelError",
        "NonFiniteError",
        "ResourceError",
        "chat",
        "check",
        "curve",
        "evaluate",
        "export",
        "score",
        "train",
    ]


def test_no_test_imports_conftest() -> None:
    # There are several of that name, and which one is found depends on what else is run.
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    importing = re.compile(r"^(from|import) conftest\b", re.MULTILINE)
    assert [name for name, text in texts.items() if importing.search(text)] == []
