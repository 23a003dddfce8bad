"""pixi.lock is what pixi.toml asks for and what requirements.txt pins; the images install the same.

pixi itself is not on PyPI; the rules here are those of `pixi install --locked`, with pixi's own parser and matching of
conda packages (py-rattler), and packaging for the wheels.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path, PurePath

from ouro.files import UserError
from tools import lock as lock_py

import pytest
import yaml
from helpers import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from rattler import LockFile, MatchSpec

INDEX, FILES = "https://index.example/simple", "https://files.example"
VIRTUAL = {"__unix", "__linux", "__glibc", "__archspec"}  # what a Linux machine has, by pixi's reckoning
CUDA = ("nvidia-", "triton")
GLIBC = [f"manylinux{version}_x86_64" for version in ("2014", "2010", "1", *(f"_2_{n}" for n in range(29)))]
PLATFORM = {*cpython_tags((3, 12), ["cp312"], GLIBC), *compatible_tags((3, 12), "cp312", GLIBC)}


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs make in a folder that has nothing but what renders the lock."""
    for name in ("Makefile", "pixi.lock.in"):
        shutil.copy(ROOT / name, folder / name)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIXI", "MAKE", "MFLAGS"))} | environment
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def lock(tmp_path_factory) -> Path:
    """The lock, rendered for a mirror."""
    folder = tmp_path_factory.mktemp("lock")
    done = make(folder, "pixi.lock", f"PYPI_INDEX={INDEX}", f"PYPI_FILES={FILES}", "PYTHON=no-python")
    assert done.returncode == 0, done.stderr
    return folder / "pixi.lock"


@pytest.fixture(scope="module")
def content(lock) -> dict:
    return yaml.load(lock.read_text(), yaml.CSafeLoader)


@pytest.fixture(scope="module")
def manifest() -> dict:
    return tomllib.loads((ROOT / "pixi.toml").read_text())


@pytest.mark.parametrize("env", ["default", "cu128", "cpu"])
def test_the_lock_is_what_the_manifest_asks_for(manifest, lock, content, env):
    """Nothing that pixi would refuse to install."""
    assert content["environments"].keys() == manifest["environments"].keys()
    assert content["environments"][env]["indexes"] == [INDEX]
    environment = dict(LockFile.from_path(lock).environments())[env]
    packages = environment.packages(environment.platforms()[0])
    conda = {p.name: p for p in packages if "/conda-forge/" in p.location}
    wanted = [f"{name} {version}" for name, version in manifest["dependencies"].items()]
    wanted += [spec for p in conda.values() for spec in p.package_record.depends]
    missing = [spec for spec in wanted if (name := spec.split()[0]) not in VIRTUAL
               and not (name in conda and conda[name].satisfies(MatchSpec(spec)))]  # fmt: skip
    assert missing == []
    # Without `purls` pixi takes conda's tzdata for PyPI's.
    assert all("purls" in entry for entry in content["packages"] if "conda" in entry)

    wheels = {p.name: p for p in packages if "/conda-forge/" not in p.location}
    for name, found in wheels.items():
        *fits, _, tags = parse_wheel_filename(found.location.rsplit("/", 1)[1].replace("%2B", "+"))
        assert fits == [name, type(fits[1])(found.version)] and tags & PLATFORM, found.location
    asked = manifest["pypi-dependencies"].copy()
    for feature in manifest["environments"][env]["features"]:
        asked |= manifest["feature"][feature]["pypi-dependencies"]
    if isinstance(torch := asked["torch"], dict):
        assert wheels["torch"].location.startswith(f"{torch['index']}/")
        asked["torch"] = torch["version"]
    marked = default_environment() | {"python_version": "3.12", "python_full_version": str(conda["python"].version)}
    needed = [Requirement(name + version) for name, version in asked.items()]
    needed += [Requirement(text) for found in wheels.values() for text in found.requires_dist]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate(marked | {"extra": ""}):
            name = canonicalize_name(requirement.name)
            assert wheels[name].satisfies(f"{name}{requirement.specifier}"), requirement


@pytest.mark.parametrize("env", ["default", "cu128", "cpu"])
def test_every_environment_has_the_versions_and_hashes_of_requirements_txt(content, env):
    pins = re.findall(r"^([a-z0-9-]+)==(\S+)(.*(?:\n    .*)*)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    entries = {entry["pypi"]: entry for entry in content["packages"] if "pypi" in entry}
    rows = content["environments"][env]["packages"]["linux-64"]
    wheels = {entry["name"]: entry for entry in (entries[row["pypi"]] for row in rows if "pypi" in row)}
    assert wheels["torch"]["version"] == {"default": "2.7.1"}.get(env, f"2.7.1+{env}")
    assert wheels["transformers"]["version"] == "4.54.1"
    assert wheels.keys() == {name for name, *_ in pins if env != "cpu" or not name.startswith(CUDA)}
    # torch is another build of the same version, and has CUDA packages of its own
    built = {"default": (), "cu128": ("torch", "nvidia-"), "cpu": ("torch", *CUDA)}[env]
    for name, version, hashes in pins:
        if not name.startswith(built):
            assert wheels[name]["version"] == version and wheels[name]["sha256"] in hashes, name


def test_make_lock_writes_the_committed_files_again(monkeypatch):
    """With pip's answers replayed from the lock: it cannot be asked offline."""
    packages = yaml.load(lock_py.LOCK.read_text(), yaml.CSafeLoader)["packages"]
    entries = {(entry["name"], entry["version"]): entry for entry in packages if "pypi" in entry}

    def replay(pins: dict[str, str]) -> dict[str, dict]:
        found = {}
        for name, version in pins.items():
            entry = entries[name, version]
            download = {"url": entry["pypi"], "archive_info": {"hashes": {"sha256": entry["sha256"]}}}
            found[name] = {"metadata": entry, "download_info": download}
        return found

    monkeypatch.setattr(lock_py, "report", replay)
    assert lock_py.renew() == (lock_py.LOCK.read_text(), lock_py.MANIFEST.read_text())


def test_a_lock_of_another_torch_or_of_two_versions_is_refused(monkeypatch, tmp_path):
    pins = lock_py.PINS.read_text()
    for other in (pins.replace("torch==2.7.1", "torch==2.8.0"), f"{pins}\nnumpy==1.0 ; python_version < '3.12'"):
        monkeypatch.setattr(lock_py, "PINS", tmp_path / "requirements.txt")
        lock_py.PINS.write_text(other)
        with pytest.raises(UserError, match=r"builds of torch 2\.7\.1 alone, and one version"):
            lock_py.renew()


def test_the_committed_lock_names_no_host_of_the_index_and_the_rendered_one_pip_s(tmp_path):
    assert make(tmp_path, "pixi.lock").returncode == 0
    committed, text = (path.read_text() for path in (ROOT / "pixi.lock.in", tmp_path / "pixi.lock"))
    hosts, rendered = (set(re.findall(r"https?://([^/\s]+)", part)) for part in (committed, text))
    assert hosts == {"conda.anaconda.org", "download.pytorch.org"}
    assert len(rendered) == 4 and "@PYPI" not in text, "the index and its files beside them"
    told = make(tmp_path, "-B", "pixi.lock", "PYTHON=no-python").stderr.splitlines()
    assert told[0].startswith("error: no-python has no pip") and told[1].startswith("make: ") and len(told) == 2


def test_pixi_has_a_task_for_every_verb(manifest):
    verbs = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert manifest["tasks"] == {verb: f"make {verb}" for verb in verbs - {"help", "env"}}


def test_make_takes_pixi_where_it_is_found(tmp_path):
    """With a stand-in for pixi that prints its arguments; inside `pixi run` the environment's own Python is taken."""
    (tmp_path / "pixi").write_text('#!/bin/sh\necho pixi "$@"\n')
    (tmp_path / "pixi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = make(tmp_path, "lint", "PIXI_ENV=cu128", PATH=path)
    assert done.stdout.splitlines()[-2:] == [
        "pixi install --quiet --locked --environment cu128",
        "pixi run --frozen --environment cu128 python -m ruff check .",
    ], done.stderr
    assert (tmp_path / "pixi.lock").is_file()
    inside = make(tmp_path, "-n", "lint", PATH=path, PIXI_ENVIRONMENT_NAME="cu128")
    assert inside.stdout.splitlines() == [":", "python -m ruff check ."]


def test_both_images_have_the_same_base_packages_and_settings():
    docker, singularity = (ROOT / "Dockerfile").read_text(), (ROOT / "singularity.def").read_text()
    base, packages = r"nvidia/cuda@sha256:[0-9a-f]{64}\b", r"apt-get install [^&\n]*"
    for pattern in (base, packages, r"HF_HOME=/\S+", "NVIDIA_DISABLE_REQUIRE=1"):
        one, other = (re.search(pattern, text)[0].strip() for text in (docker, singularity))
        assert one == other


def test_both_images_have_every_file_that_a_program_needs_and_no_secret():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    tracked = [name for name in listed.splitlines() if (ROOT / name).exists()]  # moved, and not committed yet
    rooms = ("configs/", "ouro/", "tools/", "sample/")
    needed = [name for name in tracked if name.startswith(rooms) or "/" not in name and name.endswith(".py")]
    needed += ["Makefile", "pyproject.toml", "requirements.txt"]
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def ignored(name: str) -> bool:
        """As Docker has it: the last rule that is about the file or a folder above it."""
        path = PurePath(name)
        above = [f"/{part}" for part in (path, *path.parents)]
        last = [rule for rule in rules if any(matches(part, rule.lstrip("!")) for part in above)][-1]
        return not last.startswith("!")

    def matches(path: str, rule: str) -> bool:
        return re.fullmatch("/" + re.escape(rule).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*"), path) is not None

    assert [name for name in needed if ignored(name)] == []
    secrets = [".env", "slurm/site.env", "slurm/logs/1.out", "wandb-key"]
    secrets += [f"{folder}/x" for folder in ("output", "results", ".git", ".venv")]
    assert [name for name in secrets if not ignored(name)] == []
    files = (ROOT / "singularity.def").read_text().partition("%files\n")[2].partition("\n\n")[0]
    sources = [line.split()[0] for line in files.splitlines()]
    assert [n for n in needed if not any(PurePath(n.split("/")[0]).match(source) for source in sources)] == []


def test_the_installer_too_is_known_by_its_hash():
    script = (ROOT / "tools/env.sh").read_text()
    assert re.search(r'^uv="uv==[\d.]+ --hash=sha256:[0-9a-f]{64}"$', script, re.M)
    installs = re.findall(r"pip install .*", script)
    assert len(installs) == 4 and all("--require-hashes" in line for line in installs)
    others = [(ROOT / file).read_text() for file in ("Dockerfile", "singularity.def", "Makefile", ".ci/run")]
    assert not re.search(r"pip3? (install|download)|uvx|uv tool", "".join(others))
