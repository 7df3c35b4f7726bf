"""Several processes on this machine, started and watched by torch's elastic launcher as torchrun does it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from likely import stops
from likely.errors import ResourceError

# For the first rank to save what is done after a signal.
SECONDS_TO_END = 60


def run_on_this_machine(nproc: int, arguments: Sequence[str]) -> int:
    """Run ``likely`` with some arguments in ``nproc`` processes that work together; what they say is theirs.

    Returns:
        The exit code of all: that of the first to fail.

    Raises:
        ResourceError: a process was killed; which one.
    """
    logging.disable(logging.CRITICAL)  # the launcher's own words, which repeat a failure on many lines
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a lost connection looks like from inside
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    if sys.platform.startswith("linux"):
        # All stay on this machine, whose own name may lead nowhere in a container.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=SECONDS_TO_END,
    )
    try:
        with stops.left_to_others():
            elastic_launch(config, sys.executable)("-m", "likely", *arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        raise ResourceError(
            f"rank {rank} (pid {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}",
            way_out="go on with --resume",
        ) from failed
    return 0
