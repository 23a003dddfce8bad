"""The house: the rooms, their order, and what may import what."""

import ast
import sys
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_rooms_import_only_rooms_before_them(monkeypatch):
    """The contracts of pyproject.toml: the order of the rooms, no torch in data and verdict, modeling_ouro.py alone."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(cache_dir=None) == EXIT_STATUS_SUCCESS


def test_the_model_needs_torch_and_transformers_alone():
    tree = ast.parse((ROOT / "ouro/model/modeling_ouro.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def test_the_top_level_is_four_programs():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "train_qlora.py", "data_config.py", "evaluate.py", "report.py",
    }  # fmt: skip
