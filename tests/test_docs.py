"""The documentation: it builds as a site without a broken link, its blocks run, and it quotes what the code says."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from likely.cli import app, main
from likely.config import SETTINGS_OF_TRAINING

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DEMO = ROOT / "src" / "likely" / "demo"
BLOCK = re.compile(r"^<!-- run -->\n```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(path for path in DOCS.rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "likely", f"{line}: only commands of ours are run"
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None), line


def test_there_are_pages_with_blocks_that_run() -> None:
    assert {"first-ten-minutes.md", "concepts.md", "formats.md", "reliability.md"} <= {page.name for page in PAGES}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy, which is not how a person runs a file
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order and in one folder, with a tiny model in the place of the real one."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("train.jsonl", "train.jsonl"), ("heldout.jsonl", "eval.jsonl")):
        rows = (DEMO / source).read_text(encoding="utf-8").splitlines()[:6]
        Path(name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    for number, (language, block) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
        text = block.replace("smollm2-135m", str(tiny_model_dir))
        if language == "sh":
            for line in text.splitlines():
                run_command(line, monkeypatch)
        else:
            Path(f"block{number}.py").write_text(text, encoding="utf-8")
            runpy.run_path(f"block{number}.py")


def test_questions_quote_messages_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages that stand on two lines
    headings = re.findall(r"^## (`.*)$", (DOCS / "questions.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [part.removesuffix("...").strip() for line in headings for part in re.findall(r"`([^`]+)`", line)]
    assert len(quoted) > 10
    for message in quoted:
        assert message.partition(" {")[0] in source, message


def build_site(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = build_site(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    """``--quiet`` would hide the warning from ``--strict`` too."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n", encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("nav:\n  - index")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: s\n{validation}", encoding="utf-8")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "gone.md" in done.stderr
    assert "mkdocs build --strict\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_site_has_every_setting_verb_and_page(site: Path) -> None:
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    assert [key for key in SETTINGS_OF_TRAINING if f'<h3 id="{key}">' not in settings] == []
    verbs = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    named = [str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]
    assert [name for name in named if f">likely {name}<" not in verbs] == []
    assert "--batch-size" in verbs
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page


def test_the_site_asks_no_other_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?(https?:)?//", text)
        assert not fetched, page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style
