"""What users install: the wheels of kvfactory and of the example plugin, in an environment that has neither's sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from kvfactory.models import EMBEDDED_PACKAGE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = {"kvfactory", "plugins", "runners", "pyproject.toml", "README.md", "LICENSE", "kvf_a2sf.py"}
NEEDLE = "run_needle_in_haystack.py"


@dataclass(frozen=True)
class Wheels:
    """The two wheels, each built from a copy of its sources: a build folder left in them may hold what is long gone."""

    kvfactory: Path
    example: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment with both wheels in it."""

    packages: Path
    scripts: Path
    folder: Path

    def run(self, command: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of its commands outside the sources; `path` is a folder of more packages."""
        variables = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or "")}
        if command == "kvfactory":  # its lists are kept in the cache, and the user's is none of ours
            variables["KVFACTORY_CACHE"] = str(self.folder / "cache")
        line = [str(self.scripts / command), *arguments]
        return subprocess.run(line, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=300)


def check(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def all_but_sources(top: Path) -> Callable[[str, list[str]], set[str]]:
    """For copytree: what else lies beside the sources, maybe models and results, is left where it is."""
    return lambda folder, names: set(names) - SOURCES if Path(folder) == top else {"__pycache__"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    folder = tmp_path_factory.mktemp("wheels")
    built = []
    for name, source in (("kvfactory", ROOT), ("kvf_a2sf", ROOT / "docs" / "example_plugin")):
        copy = shutil.copytree(source, folder / "sources" / name, ignore=all_but_sources(source))
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
        check(subprocess.run(build, capture_output=True, text=True))
        built.append(next(folder.glob(f"{name}-*.whl")))
    return Wheels(*built)


@pytest.fixture(scope="module")
def environment(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Its own packages come first; torch and the like are found in this process's environment, .pth files aside."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=os.name != "nt")
    paths = sysconfig.get_paths("venv", {"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    made = Environment(Path(paths["purelib"]), Path(paths["scripts"]), folder)
    install = [sys.executable, "-m", "pip", "--python", str(made.scripts / "python"), "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", str(wheels.kvfactory), str(wheels.example)]
    check(subprocess.run(install + offline, capture_output=True, text=True))
    outside = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (made.packages / "outside.pth").write_text("\n".join(outside))
    return made


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_the_wheel_holds_every_source_file_and_nothing_else(wheels: Wheels) -> None:
    rooms = {"kvfactory": "kvfactory", "kvfactory_plugins": "plugins", "kvfactory_runners": "runners"}
    expected = {
        f"{package}/{path.relative_to(ROOT / room).as_posix()}"
        for package, room in rooms.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"kvfactory/py.typed", "kvfactory/benchmarks/longbench.json", "kvfactory_plugins/snapkv.py"} <= expected
    assert {name for name in files_of(wheels.kvfactory) if ".dist-info/" not in name} == expected


def test_the_wheel_holds_the_licence_and_every_entry_point(wheels: Wheels) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files_of(wheels.kvfactory))
    with zipfile.ZipFile(wheels.kvfactory) as opened:
        name = next(each for each in opened.namelist() if each.endswith(".dist-info/entry_points.txt"))
        groups = opened.read(name).decode()
    plugins = {path.stem for path in (ROOT / "plugins").glob("*.py") if not path.stem.startswith("_")}
    runners = {path.stem for path in (ROOT / "runners").glob("*.py") if "\ndef main(" in path.read_text("utf-8")}
    assert set(re.findall(r"= kvfactory_plugins\.(\w+)$", groups, re.MULTILINE)) == plugins
    assert set(re.findall(r"= kvfactory_runners\.(\w+):main$", groups, re.MULTILINE)) == runners


def test_everything_is_found_in_the_wheels(environment: Environment) -> None:
    packages = ["kvfactory", "kvfactory_plugins", "kvfactory_runners", "kvf_a2sf"]
    code = f"from importlib.util import find_spec\nfor each in {packages}: print(find_spec(each).origin)"
    files = check(environment.run("python", "-c", code)).splitlines()
    assert len(files) == len(packages)
    assert all(Path(file).resolve().is_relative_to(environment.packages.resolve()) for file in files)


def test_every_command_is_there(environment: Environment) -> None:
    scripts = metadata.distribution("kvfactory").entry_points.select(group="console_scripts").names
    assert {"kvfactory", NEEDLE, "run_longbench.py"} <= scripts
    assert all((environment.scripts / script).is_file() for script in scripts)
    assert "--max_num_examples" in check(environment.run("run_longbench.py", "--help"))


def test_a_third_party_is_listed_with_its_package_and_version(environment: Environment) -> None:
    listed = check(environment.run("kvfactory", "methods"))
    assert re.search(r"^a2sf +kvf-a2sf 1\.0\.0, allocator uniform$", listed, re.MULTILINE)
    assert re.search(rf"^snapkv +kvfactory {re.escape(metadata.version('kvfactory'))}, ", listed, re.MULTILINE)


NEWEST = """
from dataclasses import dataclass
import torch
from kvfactory import EvictionMethod, hookimpl

@dataclass(frozen=True, kw_only=True)
class Newest(EvictionMethod):
    gap: int = 0
    def score(self, layer):
        return torch.arange(layer.num_tokens).float().expand(layer.kv_heads, -1)

@hookimpl
def kvfactory_register_methods(register):
    register("newest", attention=Newest)
"""


@pytest.mark.skipif(
    not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])), reason="the embedded model is not installed"
)
def test_methods_of_a_package_and_of_a_file_run_by_name(environment: Environment) -> None:
    (environment.folder / "newest.py").write_text(NEWEST)
    size = ["--max_capacity_prompts", "64", "--context_lengths", "256", "--depths", "50", "--samples", "1"]
    chosen = ["--plugin", "newest.py", "--method", "a2sf,newest", "--gap", "3"]
    check(environment.run(NEEDLE, *chosen, *size, "--save_dir", "run"))
    rows = [json.loads(line) for line in (environment.folder / "run" / "rows.jsonl").read_text().splitlines()]
    assert {(row["method"], row["budget"], row["kept_tokens_max"]) for row in rows} == {
        ("a2sf", 64, 64.0),
        ("newest", 64, 64.0),
    }
    assert {row["settings"].get("gap") for row in rows} == {None, 3}
    meta = json.loads((environment.folder / "run" / "run_meta.json").read_text())
    plugins = meta["sessions"][0]["environment"]["plugins"]
    found = {(each["name"], each["distribution"], each["version"]) for each in plugins}
    assert {("a2sf", "kvf-a2sf", "1.0.0"), ("newest", "newest.py", "")} <= found


@pytest.fixture
def package(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a package by hand, as installed: one module with this code behind one entry point of its own name."""

    def write(code: str) -> Path:
        (tmp_path / "other_plugin.py").write_text(code)
        info = tmp_path / "other_plugin-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 9.9\n")
        (info / "entry_points.txt").write_text("[kvfactory]\nother = other_plugin\n")
        return tmp_path

    return write


def test_a_name_that_is_taken_is_refused_with_both_packages(
    environment: Environment, package: Callable[[str], Path]
) -> None:
    run = environment.run("kvfactory", "methods", path=package(NEWEST.replace('"newest"', '"a2sf"')))
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1 and "method 'a2sf' is registered by both" in run.stderr
    assert "kvf-a2sf 1.0.0" in run.stderr and "other-plugin 9.9" in run.stderr


def test_a_package_that_fails_to_import_is_told_and_others_are_listed(
    environment: Environment, package: Callable[[str], Path]
) -> None:
    listed = check(environment.run("kvfactory", "methods", path=package("import a_module_that_is_not_there")))
    assert re.search(r"^a2sf +kvf-a2sf ", listed, re.MULTILINE)
    assert "other of other-plugin 9.9 fails to import: ModuleNotFoundError" in listed


def test_the_tests_of_the_example_pass_against_the_wheels(environment: Environment) -> None:
    tests = shutil.copytree(ROOT / "docs" / "example_plugin" / "tests", environment.folder / "tests")
    check(environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)))
