"""The tiny world of the fault tests, and its undisturbed run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import world


@dataclass(frozen=True)
class World:
    folder: Path
    settings: dict[str, Any]
    reference: dict[str, Any]

    @property
    def undisturbed(self) -> Path:
        return self.folder / "undisturbed"


def make_world(folder: Path, model: Path, **more: Any) -> World:
    world.write_data(folder)
    chosen = world.settings(model, folder, **more)
    world.train(folder / "undisturbed", chosen)
    return World(folder, chosen, world.outcome(folder / "undisturbed"))


@pytest.fixture(scope="session")
def lora_world(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> World:
    return make_world(tmp_path_factory.mktemp("lora"), tiny_model_dir)


@pytest.fixture(scope="session")
def full_world(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> World:
    return make_world(tmp_path_factory.mktemp("full"), tiny_model_dir, tune="full", learning_rate=1e-3)


@pytest.fixture(scope="session")
def bare_world(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> World:
    """Nothing is scored, so a run takes a fraction of a second."""
    return make_world(tmp_path_factory.mktemp("bare"), tiny_model_dir, eval_data=None, eval_every=None)


@pytest.fixture(params=["lora", "full"])
def any_world(request: pytest.FixtureRequest) -> World:
    chosen: World = request.getfixturevalue(f"{request.param}_world")
    return chosen
