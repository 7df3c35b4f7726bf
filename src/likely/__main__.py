"""The process: it hears signals from its first moment, before the slow imports."""

from __future__ import annotations

import sys

from likely import stops
from likely.errors import ResourceError


def main() -> None:
    """Run the command line; exit with its code."""
    try:
        with stops.listening(until_exit=True):
            from likely.cli import main as run  # noqa: PLC0415

            run()
    except stops.Stopped as stopped:
        sys.stderr.write(f"error: {stopped}\n")
        sys.exit(stopped.exit_code)
    except (ImportError, OSError, MemoryError) as error:  # before the command line could say so itself
        sys.stderr.write(f"error: the program can't be loaded: {' '.join(str(error).split())}\n")
        sys.exit(ResourceError.exit_code)


if __name__ == "__main__":
    main()
