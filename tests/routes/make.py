"""Makes the models of the routes out of packages from PyPI alone, each exporter in an environment of its own.

    python tests/routes/make.py --list
    python tests/routes/make.py dynamo23-llama-plain-fp32-static-sdpa-tf5 -o DIR
    python tests/routes/make.py all -o DIR          # without the heavy ones
    python tests/routes/make.py 'minilm-*' -o DIR   # patterns count as asking for heavy ones
    python tests/routes/make.py --small fixtures -o tests/fixtures/routes

Needs Python 3.11 with pip. An environment takes about 1.5 GB of disk and a minute; it stays under --environments.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

from routes import ENVIRONMENTS, FIXTURES, ROUTES, WITHOUT_DEPENDENCIES

HERE: Final = Path(__file__).resolve().parent


def chosen(patterns: list[str]) -> list[str]:
    """Names of the routes that the patterns name; exits where a pattern names none."""
    names: dict[str, None] = {}
    for pattern in patterns:
        groups = {"all": [n for n, r in ROUTES.items() if not r.heavy], "fixtures": list(FIXTURES)}
        found = groups.get(pattern) or fnmatch.filter(ROUTES, pattern)
        if not found:
            sys.exit(f"{pattern!r} is no route; --list shows all {len(ROUTES)}")
        names |= dict.fromkeys(found)
    return list(names)


def environment(name: str, folder: Path) -> Path:
    """The Python of an exporter's environment, which is made where it is not there."""
    home = folder / name
    python = home / "bin" / "python"
    done = home / "installed"
    wanted = "\n".join((*ENVIRONMENTS[name], *WITHOUT_DEPENDENCIES.get(name, ())))
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the environment {name}: {', '.join(ENVIRONMENTS[name])}", flush=True)
    venv.create(home, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *ENVIRONMENTS[name]], check=True)
    if name in WITHOUT_DEPENDENCIES:
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES[name]], check=True)
    done.write_text(wanted, encoding="utf-8")
    return python


def main() -> int:
    """The command line; returns how many environments had a route that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routes", nargs="*", help="names, patterns, all, or fixtures")
    parser.add_argument("--list", action="store_true", help="print all routes")
    parser.add_argument("-o", "--out", type=Path, default=Path("routes-out"), help="a folder per route goes here")
    parser.add_argument("--environments", type=Path, default=Path("routes-env"), help="where the environments are")
    parser.add_argument("--small", action="store_true", help="models of one layer, as tests/fixtures/routes holds them")
    arguments = parser.parse_args()
    if arguments.list or not arguments.routes:
        for name, route in ROUTES.items():
            print(f"{name}  ({route.environment}{', heavy' if route.heavy else ''})")
        return 0
    failed = 0
    small = ["--small"] if arguments.small else []
    names = chosen(arguments.routes)
    for key in ENVIRONMENTS:
        own = [name for name in names if ROUTES[name].environment == key]
        if own:
            python = environment(key, arguments.environments)
            command = [str(python), str(HERE / "build.py"), *small, str(arguments.out), *own]
            failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
