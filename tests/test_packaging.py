"""The wheel holds the four packages and their data, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "firsttoken_compiler": "compiler",
    "firsttoken_simulator": "simulator",
    "firsttoken": "simulator",
    "firsttoken_models": "models",
}
DATA = (".py", ".toml", ".j2", ".txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the working tree, built by the backend itself: no network, no isolated environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def names(wheel: zipfile.ZipFile, package: str) -> set[str]:
    return {name for name in wheel.namelist() if name.startswith(f"{package}/")}


def test_exactly_the_four_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == len(PACKAGES) + 1


@pytest.mark.parametrize("package", PACKAGES)
def test_package_holds_its_sources_and_data_only(wheel: zipfile.ZipFile, package: str) -> None:
    folder = ROOT / PACKAGES[package]
    kept = {p for p in (folder / package).rglob("*") if p.suffix in DATA and "__pycache__" not in p.parts}
    expected = {p.relative_to(folder).as_posix() for p in kept} | {f"{package}/py.typed"}
    assert names(wheel, package) == expected


def test_data_is_there(wheel: zipfile.ZipFile) -> None:
    presets = {name for name in names(wheel, "firsttoken_compiler") if name.endswith(".toml")}
    assert {f"firsttoken_compiler/target/presets/{n}.toml" for n in ("snapdragon-x-elite", "systolic-128")} <= presets
    assert "firsttoken_simulator/report/templates/report.html.j2" in wheel.namelist()


def test_metadata_names_the_command_the_licence_and_the_students(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "firsttoken = firsttoken.cli:main" in entries
    assert "[firsttoken.students]\nbuiltin = firsttoken_models.registry:PROVIDER" in entries
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()
