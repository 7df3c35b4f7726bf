"""What a launcher such as torchrun tells a process about those that work with it, in its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from likely.errors import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Of a process among ``world_size``, and among the ``local_world_size`` of its host. ``restarts`` counts how often
    the launcher has started all of them again; ``elastic`` says that a torchrun watches over them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restarts: int = 0
    elastic: bool = False


def place() -> Place:
    """Of this process.

    Raises:
        ConfigError: the environment tells numbers that can't be.
    """
    if not all(os.environ.get(name) for name in NEEDED):
        return Place()
    try:
        found = Place(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "TORCHELASTIC_RUN_ID" in os.environ,
        )
    except ValueError as error:
        raise ConfigError(
            f"the launcher's environment holds no numbers: {error}", way_out=f"unset {' and '.join(NEEDED[:2])}"
        ) from error
    if not (0 <= found.rank < found.world_size and 0 <= found.local_rank < found.local_world_size <= found.world_size):
        raise ConfigError(
            f"the launcher's environment says rank {found.rank} of {found.world_size}, {found.local_rank} of"
            f" {found.local_world_size} on this host",
            way_out="start it with torchrun, or unset RANK and WORLD_SIZE",
        )
    return found


def speaks() -> bool:
    """Whether this process prints results and errors: of several that work together, the first does."""
    return os.environ.get("RANK", "0") == "0" or not all(os.environ.get(name) for name in NEEDED)


def require(nproc: int | None) -> None:
    """Refuse a wish for ``nproc`` processes on this machine where others were started.

    Raises:
        ConfigError: with both numbers.
    """
    started = place().local_world_size
    if nproc not in {None, started}:
        raise ConfigError(
            f"nproc is {nproc}, and {started} processes were started on this machine",
            way_out="start them by --nproc on the command line, or by torchrun without it",
        )
