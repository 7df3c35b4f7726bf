"""Kill a training at random, many times, and see that what it reaches is what an undisturbed one reaches.

    python tests/faults/soak.py --kills 200

Torch is imported once; each trial is a fork. Every kill is followed by a resume, until a run is finished; then its
weights, moments, metrics and verdict are compared with the reference, and the next run begins.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import world

from conftest import CHATML, _build_tokenizer, _make_model_dir
from likely import stops
from likely.training.checkpoint import saved_steps

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def run_in_child(run: Path, chosen: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, stops.listening():  # noqa: PTH123
            sys.stderr = nowhere
            world.train(run, chosen, resume="newest")
        code = 0
    except (SystemExit, KeyboardInterrupt) as ended:
        code = 143 if isinstance(ended, SystemExit) else 130
    except stops.Stopped as stopped:
        code = stopped.exit_code
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def kill_at_random(child: int, seconds: float, rng: random.Random) -> int | None:
    """Exit code of a child that is sent a signal after some time; None if it was faster."""
    time.sleep(rng.uniform(0, seconds))
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        return os.waitstatus_to_exitcode(status) or None
    number = rng.choice(SIGNALS)
    os.kill(child, number)
    began = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    allowed = {signal.SIGKILL: {-9}, signal.SIGTERM: {143}, signal.SIGINT: {130}}[number] | {0}
    assert code in allowed, f"signal {number} ended in {code}"
    assert time.monotonic() - began < 10, "a stop took too long"
    return code or None


def soak(folder: Path, num_kills: int, seed: int) -> None:
    world.write_data(folder)
    model = _make_model_dir(_build_tokenizer(CHATML), folder / "model")
    rng, kills, runs, lost = random.Random(seed), 0, 0, 0  # noqa: S311
    for tune in ("lora", "full") * num_kills:
        chosen = world.settings(model, folder, tune=tune, save_every=1, keep_checkpoints=2)
        reference = folder / f"undisturbed-{tune}"
        if not reference.exists():
            began = time.monotonic()
            world.train(reference, chosen)
            seconds = time.monotonic() - began
        run, acknowledged, code = world.fresh(folder / "run"), 0, 1
        while code is not None and kills < num_kills:
            code = kill_at_random(run_in_child(run, chosen), 0.9 * seconds, rng)
            kills += code is not None
            newest = max(saved_steps(run / "checkpoints"), default=0)
            lost += newest < acknowledged
            acknowledged = newest
        os.waitpid(run_in_child(run, chosen), 0)
        assert world.outcome(run) == world.outcome(reference), f"another end after {kills} kills"
        runs += 1
        if kills >= num_kills:
            break
    assert not lost, f"{lost} checkpoints were lost"
    sys.stdout.write(f"{kills} kills in {runs} runs: 0 other ends, 0 lost checkpoints, 0 steps by hand\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), asked.kills, asked.seed)


if __name__ == "__main__":
    main()
