"""Where several processes find each other: their devices, the launcher's store, and how long one waits."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from likely import launched
from likely.errors import ConfigError
from likely.training.signs import Store

TIMEOUT, SILENCE = "LIKELY_TIMEOUT", "LIKELY_SILENCE"  # names in the environment, of seconds
SECONDS = {TIMEOUT: 1800.0, SILENCE: 60.0}


def seconds_of(name: str) -> float:
    """A time from the environment.

    Raises:
        ConfigError: it is none.
    """
    text = os.environ.get(name) or SECONDS[name]
    try:
        if 0 < float(text) < 1e7:
            return float(text)
    except ValueError:
        pass
    raise ConfigError(f"{name} is {text!r}", way_out="give it a number of seconds")


def choose_device(place: launched.Place) -> str:
    """This rank's GPU, if there are any, and the backends."""
    if not torch.cuda.is_available():
        return "gloo"
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{place.local_world_size} processes on this host and {torch.cuda.device_count()} GPUs",
            way_out="start one process for each GPU",
        )
    torch.cuda.set_device(place.local_rank)
    return "cpu:gloo,cuda:nccl"


_joins = 0
_served: dict[tuple[str, int], Store] = {}  # for as long as the process lives: others may come back to it first


def open_store(place: launched.Place, timeout: timedelta, name: str) -> Store:
    """The launcher's key-value store, or where there is none that of the first rank; each use has its own connection,
    and each run and restart its own keys."""
    global _joins  # noqa: PLW0603
    torch_stores: Any = dist  # whose type hints leave these out
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connect = partial(torch_stores.TCPStore, *address, place.world_size, timeout=timeout, wait_for_workers=False)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank == 0 and not hosted and address not in _served:
        _served[address] = connect(is_master=True)
    _joins += name == "ranks"
    prefixed: Store = torch_stores.PrefixStore(f"likely/{place.restarts}/{_joins}/{name}", connect(is_master=False))
    return prefixed
