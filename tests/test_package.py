"""What is published: a wheel and a source archive with all that is needed and nothing else, and shell completion."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import likely

ROOT = Path(__file__).parent.parent
MAX_BYTES = 5_000_000
# What a program reads, a person reads, or a type checker looks for. Anything else is there by mistake.
SUFFIXES = {".py", ".typed", ".md", ".jsonl", ".j2", ".html", ".css", ".js", ".svg", ".txt", "LICENSE"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the source archive, and that archive. No network: the tools are here."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [archive] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    assert wheel.name == f"likely-{likely.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < MAX_BYTES
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "likely").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == source
    assert {Path(name).suffix or Path(name).name for name in names} <= SUFFIXES
    assert {"likely/py.typed", "likely/demo/train.jsonl", "likely/insight/templates/report.html.j2"} <= names


def test_the_wheel_says_what_it_needs(built: tuple[Path, Path]) -> None:
    files = zipfile.ZipFile(built[0])
    info = f"likely-{likely.__version__}.dist-info"
    about = email.message_from_bytes(files.read(f"{info}/METADATA"))
    assert (about["Name"], about["Version"], about["License-Expression"]) == (
        "likely",
        likely.__version__,
        "Apache-2.0",
    )
    assert about["Requires-Python"] == ">=3.11"
    assert "log P(y | x)" in str(about.get_payload())  # the README is the page of the package
    assert {"demo", "tensorboard", "wandb", "mlflow", "trackio"} <= set(about.get_all("Provides-Extra", []))
    needed = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in needed if "==" in line or "<" in line]  # ranges: a pin would fight with others' pins
    assert files.read(f"{info}/entry_points.txt").decode().split("\n")[1] == "likely = likely.__main__:main"
    assert b"Apache License" in files.read(f"{info}/licenses/LICENSE")


def test_the_source_archive_can_be_tested(built: tuple[Path, Path]) -> None:
    _, archive = built
    assert archive.stat().st_size < MAX_BYTES
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "PKG-INFO",
        "tests/naive.py",
        "Makefile",
        "constraints.txt",
        "recipes/make.py",
        "recipes/translation/train.jsonl",
        "recipes/maths-tutor/LICENSE-gsm8k.txt",
    } <= names
    hidden = {name for name in names if any(part.startswith(".") for part in Path(name).parts)}
    assert hidden <= {".gitignore", ".ci/run"}
    assert not [name for name in names if name.startswith("runs/") or name.endswith((".safetensors", ".pyc", ".gguf"))]


def typed(folder: Path, *arguments: str, **environment: str) -> str:
    """What the wheel's own files say, apart from this clone."""
    code = "from likely.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_from_the_wheel_and_completes_what_is_typed(built: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built[0]).extractall(tmp_path)  # noqa: S202  (our own)
    as_named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # where the tests were not typed into a shell
    assert typed(tmp_path, "--version") == f"likely {likely.__version__}\n"
    for shell in ("bash", "zsh", "fish"):
        assert "_LIKELY_COMPLETE" in typed(tmp_path, "--show-completion", shell, **as_named)
    asked = {"_LIKELY_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert typed(tmp_path, COMP_WORDS="likely tr", **asked).split() == ["train"]
    asked["COMP_CWORD"] = "2"
    assert typed(tmp_path, COMP_WORDS="likely train --lora-r", **asked).split() == ["--lora-rank"]
    home = tmp_path / "home"
    home.mkdir()
    assert "completion installed" in typed(tmp_path, "--install-completion", "bash", HOME=str(home), **as_named)
    assert list(home.rglob("likely.sh"))
