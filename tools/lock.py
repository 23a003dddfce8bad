"""requirements.txt -> pixi.lock.in and the versions in pixi.toml. `make lock` resolves requirements.in, and calls this.

    python tools/lock.py

pixi.lock.in is a complete pixi.lock (format 6, which every pixi since 0.39 reads) in which the index's two addresses
are placeholders, which `make pixi.lock` fills in. `pixi lock` would resolve anew, and so part from requirements.txt.
The conda packages (Python 3.12 and what it needs) stay as they stand: one solve of conda-forge, of a public lock file.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.files import ROOT, UserError, call, write_atomic

import yaml
from packaging.utils import canonicalize_name

LOCK, MANIFEST, PINS = ROOT / "pixi.lock.in", ROOT / "pixi.toml", ROOT / "requirements.txt"
GENERATED = "# From here on written by `make lock`, from requirements.in.\n"
GLIBC = 28  # glibc 2.28 is what pixi assumes of a Linux machine
# The torch builds beside PyPI's own (CUDA 12.6): the hash of each, and the CUDA packages that it asks for; what else
# it asks for is what PyPI's does. URL and hash of cu128 are those of NVIDIA NeMo-RL's uv.lock (v0.4.0) and of nixpkgs,
# those of cpu of two public locks; a wrong hash would stop the installation.
TORCH = "2.7.1"
BUILDS = {
    "cpu": ("8f8b3cfc53010a4b4a3c7ecb88c212e9decc4f5eeb6af75c3c803937d2d60947", {}),
    "cu128": (
        "0b64f7d0a6f2a739ed052ba959f7b67c677028c9566ce51997f9f90fe573ddaa",
        {
            "nvidia-cublas-cu12": "12.8.3.14", "nvidia-cuda-cupti-cu12": "12.8.57", "nvidia-cuda-nvrtc-cu12": "12.8.61",
            "nvidia-cuda-runtime-cu12": "12.8.57", "nvidia-cudnn-cu12": "9.7.1.26", "nvidia-cufft-cu12": "11.3.3.41",
            "nvidia-cufile-cu12": "1.13.0.11", "nvidia-curand-cu12": "10.3.9.55", "nvidia-cusolver-cu12": "11.7.2.55",
            "nvidia-cusparse-cu12": "12.5.7.53", "nvidia-cusparselt-cu12": "0.6.3", "nvidia-nccl-cu12": "2.26.2",
            "nvidia-nvjitlink-cu12": "12.8.61", "nvidia-nvtx-cu12": "12.8.55", "triton": "3.3.1",
        },
    ),
}  # fmt: skip
CUDA = ("nvidia-", "triton")


def report(pins: dict[str, str]) -> dict[str, dict]:
    """What pip would install for exactly these pins, from PyPI alone, by name; little is downloaded.
    Raises UserError: pip failed, and has said why."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]
        command += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
        command += [word for platform in platforms for word in ("--platform", platform)]
        command += ["--target", work, "--report", str(file), *(f"{name}=={version}" for name, version in pins.items())]
        skip = ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
        env = {k: v for k, v in os.environ.items() if k not in skip} | {"PIP_CONFIG_FILE": os.devnull}
        if code := subprocess.run(command, env=env).returncode:
            raise UserError(f"pip failed, see above (it needs PyPI): exit code {code}")
        return {canonicalize_name(item["metadata"]["name"]): item for item in json.loads(file.read_text())["install"]}


def wheel(item: dict) -> dict:
    """A package of pip's report, as pixi.lock lists it."""
    meta, download = item["metadata"], item["download_info"]
    path = unquote(urlsplit(download["url"]).path.partition("/packages/")[2])
    entry = {"pypi": f"@PYPI_FILES@/packages/{path}", "name": canonicalize_name(meta["name"])}
    entry |= {"version": meta["version"], "sha256": download["archive_info"]["hashes"]["sha256"]}
    return entry | {key: meta[key] for key in ("requires_dist", "requires_python") if meta.get(key)}


def built(torch: dict, build: str) -> dict:
    """PyPI's torch, as pixi.lock lists it, as another build."""
    sha256, cuda = BUILDS[build]
    file = torch["pypi"].rpartition("/")[2].replace(TORCH, f"{TORCH}%2B{build}")
    asked = [text for text in torch["requires_dist"] if not text.startswith(CUDA)]
    asked += [f"{name}=={version}" for name, version in cuda.items()]
    url = f"https://download.pytorch.org/whl/{build}/{file}"
    return torch | {"pypi": url, "version": f"{TORCH}+{build}", "sha256": sha256, "requires_dist": asked}


def renew() -> tuple[str, str]:
    """pixi.lock.in and pixi.toml.
    Raises UserError: torch has another version than BUILDS, or a package has two."""
    pairs = re.findall(r"^([a-z0-9-]+)==(\S+)", PINS.read_text(), re.MULTILINE)
    pins = dict(pairs)
    if pins["torch"] != TORCH or len(pins) < len(pairs):
        raise UserError(f"lock.py knows builds of torch {TORCH} alone, and one version of a package for every Python")
    conda = [entry for entry in yaml.safe_load(LOCK.read_text())["packages"] if "conda" in entry]
    base = {name: wheel(item) for name, item in sorted(report(pins).items())}
    environments = {"default": base}
    for build, (_, cuda) in BUILDS.items():
        own = {name: wheel(item) for name, item in report(cuda).items()} if cuda else {}
        own["torch"] = built(base["torch"], build)
        environments[build] = {name: entry for name, entry in base.items() if not name.startswith(CUDA)} | own
    wheels, listed = {}, {}
    for env, entries in sorted(environments.items()):
        wheels |= {entry["pypi"]: entry for entry in entries.values()}
        rows = [{"conda": entry["conda"]} for entry in conda]
        rows += [{"pypi": entries[name]["pypi"]} for name in sorted(entries)]
        channels = [{"url": "https://conda.anaconda.org/conda-forge/"}]
        listed[env] = {"channels": channels, "indexes": ["@PYPI_INDEX@"], "packages": {"linux-64": rows}}
    packages = conda + sorted(wheels.values(), key=lambda entry: (entry["name"], entry["version"]))
    lock = {"version": 6, "environments": listed, "packages": packages}

    asked = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    manifest = MANIFEST.read_text().partition(GENERATED)[0] + GENERATED + "[pypi-dependencies]\n"
    manifest += "".join(f'{name} = "=={version}"\n' for name, version in asked if name != "torch")
    return yaml.safe_dump(lock, sort_keys=False, width=10**6, allow_unicode=True), manifest


def main() -> None:
    for path, text in zip((LOCK, MANIFEST), renew(), strict=True):
        write_atomic(path, text)
        print(f"{path}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    call(main)
