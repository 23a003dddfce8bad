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

import pytest
import yaml
from helpers import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

INDEX, FILES = "https://index.example/simple", "https://files.example"
VIRTUAL = {"__unix", "__linux", "__glibc", "__archspec"}  # what a Linux machine has, by pixi's reckoning
CUDA = ("nvidia-", "triton")
GLIBC = [f"manylinux{version}_x86_64" for version in ("2014", "2010", "1", *(f"_2_{n}" for n in range(29)))]
PLATFORM = {*cpython_tags((3, 12), ["cp312"], GLIBC), *compatible_tags((3, 12), "cp312", GLIBC)}


def render(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/lock.py", "--render", folder / "pixi.lock", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def lock(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lock")
    done = render(folder, "--index", INDEX, "--files", FILES)
    assert done.returncode == 0, done.stderr
    return (folder / "pixi.lock").read_text()


@pytest.fixture(scope="module")
def manifest() -> dict:
    return tomllib.loads((ROOT / "pixi.toml").read_text())


def asked_of(manifest: dict, env: str) -> list[tuple[str, str | dict]]:
    """An environment's PyPI requirements, as the manifest has them."""
    features = [manifest["feature"][name] for name in manifest["environments"][env]["features"]]
    return [pair for part in [manifest, *features] for pair in part["pypi-dependencies"].items()]


def faults(manifest: dict, text: str, folder: Path) -> list[str]:
    """Why pixi would not install this lock for this manifest."""
    from rattler import LockFile, MatchSpec

    path = folder / "checked.lock"
    path.write_text(text)
    environments = dict(LockFile.from_path(path).environments())
    raw = yaml.load(text, Loader=yaml.CSafeLoader)
    purls = {entry["conda"]: entry.get("purls") for entry in raw["packages"] if "conda" in entry}
    bad = [f"environment {name}" for name in environments.keys() ^ manifest["environments"].keys()]
    for env, environment in environments.items():
        if raw["environments"][env]["indexes"] != [INDEX]:
            bad.append(f"{env}: indexes")
        packages = environment.packages(environment.platforms()[0])
        conda = {p.name: p for p in packages if "/conda-forge/" in p.location}
        wanted = [f"{name} {version}" for name, version in manifest["dependencies"].items()]
        wanted += [spec for p in conda.values() for spec in p.package_record.depends]
        for spec in wanted:
            found = conda.get(name := spec.split()[0])
            if name not in VIRTUAL and not (found and found.satisfies(MatchSpec(spec))):
                bad.append(f"{env}: {spec} is not locked")
        # Without `purls` pixi takes conda's tzdata for PyPI's.
        bad += [f"{env}: {name} has no purls" for name, p in conda.items() if purls.get(p.location) is None]

        wheels = {p.name: p for p in packages if "/conda-forge/" not in p.location}
        for name, found in wheels.items():
            *fits, _, tags = parse_wheel_filename(found.location.rsplit("/", 1)[1].replace("%2B", "+"))
            if fits != [name, type(fits[1])(found.version)] or not tags & PLATFORM:
                bad.append(f"{env}: {found.location} is not {name} {found.version} for Python 3.12")
        python = str(conda["python"].version)
        marked = default_environment() | {"python_version": "3.12", "python_full_version": python}
        asked = {name: spec if isinstance(spec, dict) else {"version": spec} for name, spec in asked_of(manifest, env)}
        bad += [f"{env}: {name} is not from {spec['index']}" for name, spec in asked.items()
                if "index" in spec and not wheels[name].location.startswith(f"{spec['index']}/")]  # fmt: skip
        needed = [Requirement(name + spec["version"]) for name, spec in asked.items()]
        needed += [Requirement(text) for found in wheels.values() for text in found.requires_dist]
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate(marked | {"extra": ""}):
                found = wheels.get(name := canonicalize_name(requirement.name))
                if not (found and found.satisfies(f"{name}{requirement.specifier}")):
                    bad.append(f"{env}: {requirement} is not locked")
    return sorted(bad)


def test_the_lock_is_what_the_manifest_asks_for(manifest, lock, tmp_path):
    assert faults(manifest, lock, tmp_path) == []


@pytest.mark.parametrize("env", ["default", "cu128", "cpu"])
def test_every_environment_has_the_versions_and_hashes_of_requirements_txt(lock, env):
    pins = {
        name: (version, set(re.findall(r"sha256:(\w+)", hashes)))
        for name, version, hashes in re.findall(
            r"^([a-z0-9-]+)==(\S+)(.*(?:\n    .*)*)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
        )
    }
    raw = yaml.load(lock, Loader=yaml.CSafeLoader)
    entries = {entry["pypi"]: entry for entry in raw["packages"] if "pypi" in entry}
    rows = raw["environments"][env]["packages"]["linux-64"]
    wheels = {entry["name"]: entry for entry in (entries[row["pypi"]] for row in rows if "pypi" in row)}
    assert wheels["torch"]["version"] == {"default": "2.7.1"}.get(env, f"2.7.1+{env}")
    assert wheels["transformers"]["version"] == "4.54.1"
    assert wheels.keys() == {name for name in pins if env != "cpu" or not name.startswith(CUDA)}
    # torch is another build of the same version, and has CUDA packages of its own
    built = {"default": (), "cu128": ("torch", "nvidia-"), "cpu": ("torch",)}[env]
    for name, entry in wheels.items():
        if not name.startswith(built):
            assert (entry["version"], entry["sha256"] in pins[name][1]) == (pins[name][0], True), name
    assert wheels["torch"]["version"].split("+")[0] == pins["torch"][0]


def test_make_lock_writes_the_committed_files_again(lock, monkeypatch):
    """With pip's answers replayed from the lock, and uv's from requirements.txt: neither can be asked offline."""
    from tools import lock as tool

    packages = yaml.load(lock, Loader=yaml.CSafeLoader)["packages"]
    entries = {(entry["name"], entry["version"]): entry for entry in packages if "pypi" in entry}

    def replay(pins: dict[str, str]) -> dict[str, dict]:
        found = {}
        for name, version in pins.items():
            entry = entries[name, version]
            download = {"url": entry["pypi"], "archive_info": {"hashes": {"sha256": entry["sha256"]}}}
            found[name] = {"metadata": entry, "download_info": download}
        return found

    monkeypatch.setattr(tool, "pip_report", replay)
    monkeypatch.setattr(tool, "resolve_pins", tool.PINS.read_text)
    assert tool.renew() == (tool.PINS.read_text(), tool.LOCK.read_text(), tool.MANIFEST.read_text())

    monkeypatch.setattr(tool, "resolve_pins", lambda: tool.PINS.read_text().replace("torch==2.7.1", "torch==2.8.0"))
    with pytest.raises(ValueError, match=r"torch 2\.8\.0: .* of 2\.7\.1 alone"):
        tool.renew()


def test_the_addresses_are_pip_s_unless_given(tmp_path):
    assert render(tmp_path).returncode == 0
    committed, text = (ROOT / "pixi.lock.in").read_text(), (tmp_path / "pixi.lock").read_text()
    hosts, rendered = (set(re.findall(r"https?://([^/\s]+)", part)) for part in (committed, text))
    assert hosts == {"conda.anaconda.org", "download.pytorch.org"}, "no host of the index"
    assert len(rendered) == 4 and not re.search(r"@[A-Z_]+@", text), "the index and its files beside them"


def test_an_address_that_is_none_is_refused_and_nothing_written(tmp_path):
    done = render(tmp_path, "--files", "mirror.example/files")
    assert done.returncode == 2 and "not an address to fetch packages from: mirror.example/files" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pixi_has_a_task_for_every_verb(manifest):
    verbs = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert manifest["tasks"] == {verb: f"make {verb}" for verb in verbs - {"help", "env"}}


def test_make_takes_pixi_where_it_is_found(tmp_path):
    """With a stand-in for pixi that prints its arguments; inside `pixi run` the environment's own Python is taken."""
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "pixi.lock.in", "tools/lock.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pixi").write_text('#!/bin/sh\necho pixi "$@"\n')
    (tmp_path / "pixi").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIXI", "MAKE", "MFLAGS"))}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    command = ["make", "--no-print-directory", "lint", f"PYTHON={sys.executable}", "PIXI_ENV=cu128"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == [
        "pixi install --quiet --locked --environment cu128",
        "pixi run --frozen --environment cu128 python -m ruff check .",
    ], done.stderr
    assert (tmp_path / "pixi.lock").is_file()
    inside = subprocess.run(
        [*command, "-n"], cwd=tmp_path, env=env | {"PIXI_ENVIRONMENT_NAME": "cu128"}, capture_output=True
    )
    assert inside.stdout.decode().splitlines() == [":", "python -m ruff check ."]


def test_both_images_have_the_same_base_packages_and_settings():
    docker, singularity = (ROOT / "Dockerfile").read_text(), (ROOT / "singularity.def").read_text()
    for pattern in (
        r"nvidia/cuda@sha256:[0-9a-f]{64}\b",
        r"apt-get install [^&\n]*",
        r"HF_HOME=/\S+",
        "NVIDIA_DISABLE_REQUIRE=1",
    ):
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
    secrets = (
        ".env",
        "slurm/site.env",
        "slurm/logs/1.out",
        "output/x",
        "results/x",
        "wandb-key",
        ".git/config",
        ".venv/x",
    )
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
