"""requirements.in -> requirements.txt, pixi.lock.in and the versions in pixi.toml; pixi.lock.in -> pixi.lock.

    make lock                                             # all three, or none of them
    make pixi.lock                                        # pixi.lock.in -> pixi.lock, for PyPI
    make pixi.lock PYPI_FILES=https://mirror.example/f    # the wheels from a mirror; their hashes stay what they are
    make pixi.lock PYPI_FILES=… PYPI_INDEX=…              # a mirror's index needs the same index-url in pixi.toml

pixi.lock.in is a complete pixi.lock (format 6, which every pixi since 0.39 reads) in which the index's two addresses
are placeholders. Its wheels are those of requirements.txt; its conda packages (Python 3.12 and what it needs) are kept
as they stand there: one solve of conda-forge, taken from a public lock file. Rendering needs Python and pip alone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parents[1]
LOCK, MANIFEST, PINS = HERE / "pixi.lock.in", HERE / "pixi.toml", HERE / "requirements.txt"
GENERATED = "# From here on written by `make lock`, from requirements.in.\n"
PYTHON, GLIBC = "3.12", 28  # glibc 2.28 is what pixi assumes of a Linux machine
# The torch builds beside PyPI's own (CUDA 12.6). URL and hash of cu128 are those of NVIDIA NeMo-RL's uv.lock (v0.4.0)
# and of nixpkgs, those of cpu of two public locks; a wrong hash would stop the installation. What they ask for is what
# PyPI's build asks for, with the CUDA packages below or none.
TORCH = "2.7.1"
BUILDS = {
    "cu128": (
        "0b64f7d0a6f2a739ed052ba959f7b67c677028c9566ce51997f9f90fe573ddaa",
        "cublas 12.8.3.14, cuda-cupti 12.8.57, cuda-nvrtc 12.8.61, cuda-runtime 12.8.57, cudnn 9.7.1.26, "
        "cufft 11.3.3.41, cufile 1.13.0.11, curand 10.3.9.55, cusolver 11.7.2.55, cusparse 12.5.7.53, "
        "cusparselt 0.6.3, nccl 2.26.2, nvjitlink 12.8.61, nvtx 12.8.55",
    ),
    "cpu": ("8f8b3cfc53010a4b4a3c7ecb88c212e9decc4f5eeb6af75c3c803937d2d60947", ""),
}
CHANNEL = "https://conda.anaconda.org/conda-forge/"
TORCH_INDEX = "https://download.pytorch.org/whl/"
# In pixi.lock.in; and what stands there while YAML is read and written, where no plain text begins with "@".
PLACEHOLDERS, STAND_INS = ("@PYPI_INDEX@", "@PYPI_FILES@"), ("https://index.invalid", "https://files.invalid")


def fill_in(text: str, index: str | None = None, files: str | None = None) -> str:
    """pixi.lock from pixi.lock.in; the addresses not given are PyPI's, as pip knows them. Raises ValueError."""
    if not (index and files):
        try:
            from pip._internal.models.index import PyPI
        except ImportError:
            raise ValueError(f"{sys.executable} has no pip, which knows PyPI's addresses: give both") from None
        index, files = index or PyPI.simple_url, files or f"https://{PyPI.file_storage_domain}"
    for placeholder, url in zip(PLACEHOLDERS, (index, files), strict=True):
        if not re.fullmatch(r"(https?|file)://[^\s@#'\"]+", url):
            raise ValueError(f"not an address to fetch packages from: {url}")
        text = text.replace(placeholder, url.rstrip("/"))
    return text


def resolve_pins() -> str:
    """requirements.txt for Python 3.11 to 3.13; a version that is in it and still fits stays."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        raise ValueError(f"no uv beside {sys.executable}; run `make lock` with Python 3.11, 3.12 or 3.13")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, PINS.name)
        out.write_text(PINS.read_text())
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-annotate"]
        command += ["--generate-hashes", "--custom-compile-command", "make lock", "requirements.in", "-o", out]
        subprocess.run(command, check=True, cwd=HERE, stdout=subprocess.DEVNULL)
        return out.read_text()


def read_pins(text: str) -> dict[str, str]:
    """Name -> version of everything in requirements.txt that Python 3.12 on Linux installs."""
    from packaging.requirements import Requirement

    pins = {}
    for line in re.findall(r"^[a-z0-9].*?(?= \\?$)", text, re.MULTILINE):
        requirement = Requirement(line)
        if not requirement.marker or requirement.marker.evaluate({"python_version": PYTHON}):
            pins[requirement.name] = str(requirement.specifier).removeprefix("==")
    return pins


def pip_report(pins: dict[str, str]) -> dict[str, dict]:
    """What pip would install for exactly these pins, from PyPI alone (nothing is installed, little is downloaded)."""
    from packaging.utils import canonicalize_name

    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    with tempfile.TemporaryDirectory() as work:
        report = Path(work, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
        command += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
        command += [word for platform in platforms for word in ("--platform", platform)]
        command += ["--target", work, "--report", str(report)] + [f"{n}=={v}" for n, v in pins.items()]
        skip = ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
        env = {k: v for k, v in os.environ.items() if k not in skip} | {"PIP_CONFIG_FILE": os.devnull}
        subprocess.run(command, check=True, env=env)
        return {canonicalize_name(item["metadata"]["name"]): item for item in json.loads(report.read_text())["install"]}


def wheel(name: str, item: dict, pins: dict[str, str], build: str | None) -> dict:
    """A package as pixi.lock lists it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    meta, download = item["metadata"], item["download_info"]
    path = re.search(r"/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/[^/]+\.whl$", urlsplit(download["url"]).path)
    if not path:
        raise ValueError(f"{name}: not a wheel of PyPI or of an exact mirror: {download['url']}")
    entry = {"pypi": STAND_INS[1] + unquote(path[0]), "name": name, "version": meta["version"]}
    entry["sha256"] = download["archive_info"]["hashes"]["sha256"]
    if name == "torch" and build:
        entry["version"] += f"+{build}"
        file = entry["pypi"].rsplit("/", 1)[1].replace(TORCH, f"{TORCH}%2B{build}")
        entry |= {"pypi": f"{TORCH_INDEX}{build}/{file}", "sha256": BUILDS[build][0]}
    requires = []
    for text in meta.get("requires_dist", ()):
        requirement = Requirement(text)
        wanted = canonicalize_name(requirement.name)
        specifier = requirement.specifier
        if name == "torch" and wanted.startswith(("nvidia-", "triton")):  # of this build, not of PyPI's
            if wanted not in pins:
                continue
            specifier = f"=={pins[wanted]}"
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        marker = f" ; {requirement.marker}".replace('"', "'") if requirement.marker else ""
        requires.append(f"{wanted}{extras}{specifier}{marker}")
    if requires:
        entry["requires_dist"] = requires
    if meta.get("requires_python"):
        entry["requires_python"] = meta["requires_python"].replace(" ", "")
    return entry


def renew() -> tuple[str, str, str]:
    """requirements.txt, pixi.lock.in and pixi.toml, as requirements.in asks for."""
    import yaml

    previous = yaml.safe_load(fill_in(LOCK.read_text(), *STAND_INS))
    conda = [entry for entry in previous["packages"] if "conda" in entry]

    requirements = resolve_pins()
    pins = read_pins(requirements)
    if pins["torch"] != TORCH:
        raise ValueError(f"torch {pins['torch']}: lock.py knows the {' and '.join(BUILDS)} builds of {TORCH} alone")
    environments = {"default": pins}
    for build, (_, cuda) in BUILDS.items():
        own = {f"nvidia-{name}-cu12": version for name, version in (pair.split() for pair in cuda.split(", ") if pair)}
        bare = {n: v for n, v in pins.items() if not n.startswith("nvidia-") and (own or n != "triton")}
        environments[build] = bare | own
    base = pip_report(pins)
    wheels, listed = {}, {}
    for env, wanted in sorted(environments.items()):
        other = {n: v for n, v in wanted.items() if pins[n] != v}
        report = base | (pip_report(other) if other else {})
        entries = [wheel(n, report[n], wanted, env if env in BUILDS else None) for n in sorted(wanted)]
        wheels |= {entry["pypi"]: entry for entry in entries}
        rows = [{kind: entry[kind]} for kind, part in (("conda", conda), ("pypi", entries)) for entry in part]
        listed[env] = {"channels": [{"url": CHANNEL}], "indexes": [STAND_INS[0]], "packages": {"linux-64": rows}}
    packages = conda + sorted(wheels.values(), key=lambda entry: (entry["name"], entry["version"]))
    lock = {"version": 6, "environments": listed, "packages": packages}
    text = yaml.safe_dump(lock, sort_keys=False, width=10**6, allow_unicode=True)
    for placeholder, stand_in in zip(PLACEHOLDERS, STAND_INS, strict=True):
        text = text.replace(stand_in, placeholder)

    asked = re.findall(r"^([\w.-]+)==([\w.]+)", (HERE / "requirements.in").read_text(), re.MULTILINE)
    manifest = MANIFEST.read_text().partition(GENERATED)[0] + GENERATED + "[pypi-dependencies]\n"
    manifest += "".join(f'{name} = "=={version}"\n' for name, version in asked if name != "torch")
    manifest += f'\n[feature.cu126.pypi-dependencies]\ntorch = "=={TORCH}"\n'
    for build in BUILDS:
        torch = f'{{ version = "=={TORCH}", index = "{TORCH_INDEX}{build}" }}'
        manifest += f"\n[feature.{build}.pypi-dependencies]\ntorch = {torch}\n"
    return requirements, text, manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", type=Path, metavar="PIXI_LOCK", help="write pixi.lock there, change nothing else")
    parser.add_argument("--index", metavar="URL", help="the index of a mirror")
    parser.add_argument("--files", metavar="URL", help="what stands before /packages/ in a mirror of the wheels")
    args = parser.parse_args()
    try:
        if args.render:
            files = {args.render: fill_in(LOCK.read_text(), args.index, args.files)}
        else:
            files = dict(zip((PINS, LOCK, MANIFEST), renew(), strict=True))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except subprocess.CalledProcessError as error:  # whose own text is the whole command
        parser.exit(2, f"error: {error.cmd[0]} failed, see above (it needs PyPI): exit code {error.returncode}\n")
    for path, text in files.items():  # not files.write_atomic: rendering has to run before there are any packages
        part = path.with_name(f".{path.name}.tmp")
        part.write_text(text)
        part.replace(path)
        print(f"{path}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
