"""Model cards: what a folder that leaves this project says of itself, for people and, as YAML, for the Hub.

`card` makes README.md of a merged model or an adapter, `scores` the Hub's `.eval_results/*.yaml`, both from what the
run's folder and RESULTS_DIR hold.
"""

import re
from pathlib import Path

from ouro.evaluate.benchmarks import table
from ouro.evaluate.results import harness_name, read_study
from ouro.files import read_json, read_yaml
from ouro.settings import DATASETS, REVISIONS, Settings

import yaml
from huggingface_hub import EvalResult, ModelCardData, constants
from jinja2 import StrictUndefined, Template

# What a merged folder ran in (docs/clients.md; a test compares the two).
TRIED = {"transformers": "4.54.1, 4.57.6, 5.24.0", "lm-eval": "0.4.13", "vLLM": "0.26.0, 0.29.0, 0.32.0"}
BASE_LICENCE = "apache-2.0"  # of the repositories in REVISIONS
WHEEL = "ouro_vllm-1.0-py3-none-any.whl"

TEMPLATE = Path(__file__).with_name("card.md.j2")


def licences(report: dict, base: str) -> dict[str, str]:
    """`license`, and where there are several, `license_name`: those of the base and of the rows that went in."""
    of_base = BASE_LICENCE if base in REVISIONS else "not-stated"
    names = {re.sub(r"[\s_]+", "-", name.strip().lower()) for name in report["licences"]} | {of_base}
    if len(names) == 1:
        return {"license": names.pop()}
    return {"license": "other", "license_name": "-and-".join(sorted(names))}


def published_results(results: Path, run: str, depth: int, adapter_sha256: str) -> dict[str, dict]:
    """The study block of each result that the Hub can show, by the result's file name: of this adapter, at this depth,
    on all items of a benchmark that was read at a commit of its repository."""
    found = {}
    for file in sorted((results / run).glob(f"*-ut{depth}.json")):
        study = read_study(file)
        whole = study and study["value"] is not None and not (study["limit"] or study["part"])
        at_commit = study and re.fullmatch("[0-9a-f]{40}", study["benchmark_revision"] or "")
        if whole and at_commit and study["adapter_sha256"] == adapter_sha256:
            found[file.name] = study
    return found


def benchmark_id(study: dict) -> str:
    """The repository of the items that were scored."""
    row = table()["benchmarks"][study["benchmark"]]
    return row["hub_id"] if "hub_id" in row else read_yaml(DATASETS)[row["dataset"]]["hub_id"]


def conditions(study: dict) -> str:
    depth, protocol = study["total_ut_steps"], study["protocol"]
    return f"total_ut_steps={depth}, protocol {protocol}, frozen weights in {study['precision']}"


def path_in_repository(result: str) -> str:
    """Where a push puts a result file: under the name by which lm-evaluation-harness finds it."""
    return f"results/{harness_name(result)}"


def source(result: str, repo: str) -> dict[str, str]:
    url = f"{constants.ENDPOINT}/{repo}/blob/main/{path_in_repository(result)}"
    return {"url": url, "name": "result file of this run"}


def scores(studies: dict[str, dict], repo: str) -> dict[str, str]:
    """`.eval_results/<task>.yaml` by path: a score each, with the benchmark's revision and the source."""
    files = {}
    for file, study in studies.items():
        dataset = {"id": benchmark_id(study), "task_id": study["task"], "revision": study["benchmark_revision"]}
        score = {"dataset": dataset, "value": study["value"], "source": source(file, repo),
                 "notes": f"{study['metric']}, {conditions(study)}"}  # fmt: skip
        files[f".eval_results/{study['task']}.yaml"] = yaml.safe_dump([score], sort_keys=False)
    return files


def metadata(
    name: str, trained: Settings, report: dict, studies: dict[str, dict], repo: str | None, merged: bool
) -> ModelCardData:
    base, on_hub = trained.model_name_or_path, not report["data_revision"].startswith("sha256:")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=benchmark_id(study),
            dataset_name=study["task"],
            dataset_split=study["split"],
            dataset_revision=study["benchmark_revision"],
            metric_type=study["metric"],
            metric_name=f"{study['metric']} ({conditions(study)})",
            metric_value=study["value"],
            **{f"source_{key}": value for key, value in source(file, repo).items()},
        )
        for file, study in studies.items()
    ]
    place = trained.dataset_path or read_yaml(DATASETS)[report["dataset"]].get("hub_id")
    relation = {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
    return ModelCardData(
        **({} if Path(base).exists() else relation),
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        language=report.get("language", "th"),
        **licences(report, base),
        datasets=[place or trained.paths[report["dataset"]]] if on_hub else None,
        tags=["looped-transformer", "ouro", *([] if merged else ["lora"])],
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def card(
    name: str, trained: Settings, adapter: Path, *, record: dict | None = None, studies: dict[str, dict] | None = None,
    repo: str | None = None, revision: str | None = None,
) -> str:  # fmt: skip
    """README.md of an adapter or, with the `record` of its merge, of a merged model.

    studies: of `published_results`. repo: where it is pushed to. revision: the base's commit."""
    report = read_json(adapter.parent / "data_report.json", "dataset", "data_revision", "licences")
    text = (adapter / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2].strip("\n")
    base = trained.model_name_or_path
    if Path(base).exists():  # nobody else has it, and its path is nobody else's business
        text, base = text.replace(base, Path(base).name), Path(base).name
    about = metadata(name, trained, report, studies or {}, repo, merged=record is not None).to_yaml()
    place, at = repo or "PLACE", f', revision="{revision}"' if revision else ""
    known = {"base": base, "depth": trained.total_ut_steps, "record": record, "text": text, "place": place, "at": at}
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, undefined=StrictUndefined)
    return template.render(known, yaml=about, tried=TRIED, wheel=WHEEL)
