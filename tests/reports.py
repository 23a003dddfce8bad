"""Reports of fabricated studies, for tests: written, and what stands in them."""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import report
from ouro.verdict import panels, study

import pytest
import yaml


def write_report(root: Path, *arguments: str, figures: bool = False) -> str:
    """Runs report.py in this process on root/output and root/results, in root; what it prints."""
    places = ["--output_dir", str(root / "output"), "--results_dir", str(root / "results")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["report.py", *places, *arguments])
        if not figures:  # most of the time goes to them
            patch.setattr(report, "draw", lambda *_: {})
        report.main()
    return printed.getvalue()


def verdicts(root: Path) -> dict[str, dict]:
    return {told["aspect"]: told for told in json.loads((root / "results/report/verdict.json").read_text())}


def read(root: Path, **declared) -> tuple[study.Reader, dict]:
    """A study's reader and panels."""
    reader = study.Reader(root / "output", root / "results")
    return reader, panels.panels(reader, declared)


def set_config(folder: Path, **values) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


def change(file: Path, **values) -> None:
    """Sets values of a result's study block, or of any other JSON object."""
    content = json.loads(file.read_text())
    content.get("study", content).update(values)
    file.write_text(json.dumps(content))


def table(root: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((root / f"results/report/{name}.csv").read_text().splitlines()))
