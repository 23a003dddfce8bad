"""Downloads what runs read from the Hub, for jobs without a network: no code, no pickles."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ouro.data.sources import PATTERNS, benchmark_files, hub_error
from ouro.files import UserError, nearest, read_yaml
from ouro.settings import DATASETS, EVALS, REVISIONS, Settings

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import filter_repo_objects


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@dataclass
class Download:
    """A repository, at a revision, and the files of it that are wanted."""

    name: str
    hub_id: str
    revision: str | None
    repo_type: str
    patterns: list[str]


def wanted(settings: Settings) -> list[Download]:
    """Everything that a run with these settings could read from the Hub, and no code or pickles."""
    model = settings.model_name_or_path
    everything = []
    if not Path(model).exists():
        revision = settings.model_revision or REVISIONS.get(model)
        everything.append(Download("model", model, revision, "model", ["*.safetensors", "*.json", "*.txt", "*.jinja"]))
    benchmarks = read_yaml(EVALS)["benchmarks"]
    for name, entry in (read_yaml(DATASETS) | benchmarks).items():
        if "hub_id" in entry and name not in settings.paths:
            files = [entry["archive"]] if "archive" in entry else PATTERNS
            if name in benchmarks and "archive" not in entry:
                files = benchmark_files(entry)
            everything.append(Download(name, entry["hub_id"], entry["revision"], "dataset", files))
    return everything


def fetch(settings: Settings, only: str | None) -> None:
    """Downloads what is not in the cache yet, after telling how much that is.

    Raises:
        UserError: an unknown name in `only`; no network; a repository or revision that does not exist; not enough disk.
    """
    everything = wanted(settings)
    names = [download.name for download in everything]
    for name in only.split(",") if only else ():
        if name not in names:
            raise UserError(f"--only: nothing called {name!r} to download{nearest(name, names)}")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and this is what needs the network: unset it")
    downloads = [d for d in everything if not only or d.name in only.split(",")]
    print(f"cache: {constants.HF_HUB_CACHE}")
    plans, missing = [], 0
    for d in downloads:
        try:
            info = HfApi().repo_info(d.hub_id, revision=d.revision, repo_type=d.repo_type, files_metadata=True)
            files = list(filter_repo_objects(info.siblings, allow_patterns=d.patterns, key=lambda f: f.rfilename))
            absent = [f for f in files if not _cached(d, f.rfilename, info.sha)]
        except (OSError, ValueError) as error:
            raise hub_error(d.name, d.hub_id, error) from None
        if not files:
            raise UserError(f"{d.hub_id} at {info.sha} holds none of {', '.join(d.patterns)}")
        total, rest = (sum(f.size or 0 for f in part) for part in (files, absent))
        plans.append((d, info.sha))
        missing += rest
        state = f"{size(rest)} to download" if absent else "in the cache"
        commit = info.sha[:12] + ("" if d.revision else " (main)")
        print(f"  {d.name:<14} {d.hub_id:<62} {commit:<19} {size(total):>9}, {state}")
    place = Path(constants.HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    print(f"to download: {size(missing)}, free in the cache's file system: {size(free)}")
    if missing > 0.98 * free:
        raise UserError(f"{size(missing)} do not fit; set HF_HOME to a place with more room")
    for d, commit in plans:
        try:
            # by its own revision too, so that the cache knows what main was
            snapshot_download(d.hub_id, repo_type=d.repo_type, revision=d.revision, allow_patterns=d.patterns)
        except (OSError, ValueError) as error:
            raise UserError(f"{hub_error(d.name, d.hub_id, error)}\nrun it again: it continues") from None
        if not d.revision:
            print(f"{d.name}: to stay with these rows, set revision: {commit} in configs/")
    print("all there; jobs with HF_HUB_OFFLINE=1 need no network")


def _cached(download: Download, file: str, commit: str) -> bool:
    found = try_to_load_from_cache(download.hub_id, file, revision=commit, repo_type=download.repo_type)
    return isinstance(found, str)
