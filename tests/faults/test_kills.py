"""A few random kills of a training; ``make soak`` does some hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_random_kills() -> None:
    soak = Path(__file__).parent / "soak.py"
    said = subprocess.run(
        [sys.executable, str(soak), "--kills", "8", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.startswith("8 kills in ")
    assert "0 other ends, 0 lost checkpoints" in said.stdout
