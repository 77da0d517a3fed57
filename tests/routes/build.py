"""Makes routes inside one exporter's environment: `python build.py [--small] FOLDER ROUTE...`. `make.py` calls it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from routes import ROUTES


def main(folder: Path, names: list[str], *, small: bool) -> int:
    """Makes the routes one after the other; returns how many failed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if small:
        import students

        students.SHAPE.update(students.SMALL)
    failed = 0
    for name in names:
        route = ROUTES[name]
        module, _, function = route.function.partition(":")
        start = time.monotonic()
        try:
            getattr(importlib.import_module(module), function)(folder / name, **route.arguments)
        except Exception:  # one route that an exporter refuses must not stop the others
            failed += 1
            traceback.print_exc(limit=-4)
            print(f"{name}: FAILED", flush=True)
        else:
            print(f"{name}: made in {time.monotonic() - start:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--small"]
    sys.exit(min(main(Path(arguments[0]), arguments[1:], small="--small" in sys.argv), 1))
