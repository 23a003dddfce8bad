"""The house: the rooms, their order, and what may import what."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]


def imported(nodes: Iterable[ast.AST]) -> list[str]:
    """The packages that these statements import, in their order."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.partition(".")[0])
    return names


def test_rooms_import_only_rooms_before_them(monkeypatch):
    """The contracts of pyproject.toml: the order of the rooms, no torch in data and verdict, modeling_ouro.py alone."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(cache_dir=None) == EXIT_STATUS_SUCCESS


def test_the_model_needs_torch_and_transformers_alone():
    tree = ast.parse((ROOT / "ouro/model/modeling_ouro.py").read_text(encoding="utf-8"))
    assert set(imported(ast.walk(tree))) - sys.stdlib_module_names == {"torch", "transformers"}


def test_the_top_level_is_four_programs():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "train_qlora.py", "data_config.py", "evaluate.py", "report.py",
    }  # fmt: skip


def test_programs_and_tools_import_ouro_before_torch():
    """ouro/__init__.py sets what torch, bitsandbytes and PyThaiNLP read from the environment when they are imported."""
    ours = {"ouro", *(path.stem for path in ROOT.glob("*.py"))}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        first = next(x for x in imported(ast.parse(path.read_text()).body) if x not in sys.stdlib_module_names)
        assert first in ours, path


def test_transformers_is_never_allowed_code_of_a_model_folder():
    """Without `trust_remote_code=False` it asks on stdin, and `echo y |` would run a folder's Python."""
    asked = []
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("ouro/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_\w+", ast.unparse(node.func)):
                allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("trust_remote_code")
                asked.append((path.name, node.lineno, allowed))
    assert len(asked) >= 5 and {allowed for *_, allowed in asked} == {"False"}, asked


def test_architecture_names_what_is_there():
    """Each `path.py:name` of docs/architecture.md is a function, a class or a Class.method of that file."""
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    kinds = (ast.FunctionDef, ast.ClassDef)
    for path, name in named:
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [node for node in body if isinstance(node, kinds) and node.name == part]
            assert found, f"docs/architecture.md: no {name} in {path}"
            body = found[0].body


def test_the_thai_readme_says_what_the_english_one_says():
    """The same sections, commands, links and output, and no number that the English one does not have."""
    english, thai = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.th.md"))

    def same(text: str) -> list:
        commands = [re.split(r" +# ", line)[0] for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
                    for line in block.splitlines()]  # fmt: skip
        links = set(re.findall(r"\]\(((?!README).*?)\)", text))
        return [text.count("\n## "), commands, links, re.findall(r"^Thai text, .*\n.*$", text, re.MULTILINE)]

    numbers = [set(re.findall(r"\d+(?:[.,]\d+)*", text)) for text in (english, thai)]
    assert same(english) == same(thai)
    assert numbers[1] <= numbers[0], numbers[1] - numbers[0]
