"""Downloads model, training sets and benchmarks, for jobs without a network: no code, no pickles.

    python -m ouro.data.fetch --config configs/default.yaml                     # make fetch: all that is not there yet
    python -m ouro.data.fetch --config configs/default.yaml --only model,wangchan,thai_exam

After it, jobs run with HF_HUB_OFFLINE=1 and no network. An interrupted download continues where it stopped. A Hub id
can always be replaced by a local folder of the same layout (--dataset_path, --paths).
"""

import argparse
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ouro.data.sources import benchmark_files, hub_error, patterns_of
from ouro.files import Progress, UserError, call, nearest, one_line, read_yaml
from ouro.settings import DATASETS, EVALS, REVISIONS, Settings, resolve

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects


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
            files = benchmark_files(entry) if name in benchmarks else patterns_of(entry)
            files = [entry["archive"]] if "archive" in entry else files
            everything.append(Download(name, entry["hub_id"], entry.get("revision"), "dataset", files))
    return everything


def fetch(settings: Settings, only: str | None) -> None:
    """Downloads what is not in the cache yet, after telling how much that is.
    Raises UserError: an unknown name in `only`; no network; a repository or revision that does not exist; not enough
    disk."""
    downloads = {download.name: download for download in wanted(settings)}
    names = only.split(",") if only else list(downloads)
    for name in names:
        if name not in downloads:
            raise UserError(f"--only: nothing called {name!r} to download{nearest(name, downloads)}")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and this is what needs the network: unset it")
    chosen = [download for name, download in downloads.items() if name in names]
    print(f"cache: {one_line(constants.HF_HUB_CACHE)}")
    looked = [look_up(download) for download in chosen]
    missing = sum(absent for _, absent in looked)
    place = Path(constants.HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    print(f"to download: {in_units(missing)}, free in the cache's file system: {in_units(free)}")
    if missing > 0.98 * free:
        raise UserError(f"{in_units(missing)} do not fit; set HF_HOME to a place with more room")
    disable_progress_bars()  # which a log would not show; ours counts the bytes on the disk
    for d, (commit, absent) in zip(chosen, looked, strict=True):
        folder = place / repo_folder_name(repo_id=d.hub_id, repo_type=d.repo_type)
        what = f"{d.name}: downloading {d.hub_id}" if absent else f"{d.name}: looking at the cache"
        try:
            # by its own revision too, so that the cache knows what main was
            with Progress(what, absent, "B", count=partial(added, folder, size_of(folder))):
                snapshot_download(d.hub_id, repo_type=d.repo_type, revision=d.revision, allow_patterns=d.patterns)
        except (OSError, ValueError) as error:
            raise UserError(*hub_error(d.name, d.hub_id, error).args, "run it again: it continues") from None
        if not d.revision:
            setting = "model_revision" if d.repo_type == "model" else "revision"
            print(one_line(f"{d.name}: to stay with this commit, set {setting}: {commit} in configs/"))
    print("all there; jobs with HF_HUB_OFFLINE=1 need no network")


def look_up(d: Download) -> tuple[str, int]:
    """The commit of a repository that is downloaded, and how many bytes of it the cache lacks; told in one line."""
    try:
        info = HfApi().repo_info(d.hub_id, revision=d.revision, repo_type=d.repo_type, files_metadata=True)
    except (OSError, ValueError) as error:
        raise hub_error(d.name, d.hub_id, error) from None
    total, absent = 0, 0
    for file in filter_repo_objects(info.siblings, allow_patterns=d.patterns, key=lambda file: file.rfilename):
        cached = try_to_load_from_cache(d.hub_id, file.rfilename, revision=info.sha, repo_type=d.repo_type)
        total += file.size
        absent += 0 if isinstance(cached, str) else file.size
    if not total:
        raise UserError(f"{d.hub_id} at {info.sha} holds none of {', '.join(d.patterns)}")
    state = f"{in_units(absent)} to download" if absent else "in the cache"
    commit = info.sha[:12] + ("" if d.revision else " (main)")
    print(one_line(f"  {d.name:<14} {d.hub_id:<62} {commit:<19} {in_units(total):>9}, {state}"))
    return info.sha, absent


def added(folder: Path, before: int) -> int:
    """Bytes by which a folder of the cache has grown, unfinished files too."""
    return max(0, size_of(folder) - before)


def size_of(folder: Path) -> int:
    total = 0
    for file in folder.glob("blobs/*"):
        with suppress(FileNotFoundError):  # an unfinished one that was just given its name
            total += file.stat().st_size
    return total


def in_units(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="names, comma-separated: model, datasets and benchmarks of configs/")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    fetch(run.settings, run.options.only)


if __name__ == "__main__":
    call(main)
