"""RESULTS.md and report.html: the same content as Markdown, and as one page that needs no network."""

import base64
import hashlib
from collections import defaultdict
from pathlib import Path

from ouro.files import markdown, printable
from ouro.verdict.panels import Key, Panel
from ouro.verdict.rule import Verdict
from ouro.verdict.study import ASPECTS, Reader

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def about(verdict: Verdict, made: list[Verdict]) -> str:
    """The aspect, with the training set where there are several."""
    several = len({other.dataset for other in made}) > 1
    return ASPECTS[verdict.aspect] + (f" ({verdict.dataset})" if several else "")


def verdict_lines(made: list[Verdict]) -> list[tuple[str, list[str], str]]:
    """(aspect and headline, the numbers of each depth, what they rest on)."""
    return [(f"{about(v, made)}{', ' if v.words else ': '}{v.headline}", v.numbers, v.rests) for v in made]


def missing_lines(made: list[Verdict]) -> list[str]:
    """What would make the answer firmer; said once where it is missing everywhere."""
    aspects = defaultdict(list)
    for verdict in made:
        for what in verdict.missing:
            aspects[what].append(about(verdict, made))
    return [what if len(of) == len(made) else f"{what}, for {', '.join(of)}" for what, of in aspects.items()]


def basis(reader: Reader, found: dict[Key, Panel], made: list[Verdict]) -> str:
    """What the verdict rests on, in a line."""
    counts = ((len(reader.runs), "training run"), (len(reader.results), "result"))
    told = ", ".join(f"{n:,} {what}{'s' * (n != 1)}" for n, what in counts)
    if count := len(set(reader.left_out)):
        told += f", {count:,} thing{'s' * (count != 1)} left out or noted (at the end)"
    datasets = list(dict.fromkeys(verdict.dataset for verdict in made))
    study = next((panel.study for key, panel in found.items() if key.dataset == datasets[0]), None)
    if study is None:
        return f"{told[0].upper()}{told[1:]}."
    revision = f" at {study['model_revision'][:12]}" if study["model_revision"] else ""
    return f"{study['model']}{revision}, {study['precision']}, trained on {' and on '.join(datasets)}; {told}."


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name.endswith(".html.j2"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    finalize=lambda value: printable(value) if type(value) is str else value,  # but the plots, which are markup
)
TEMPLATES.filters["md"] = markdown
TEMPLATES.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def fill(name: str, **content) -> str:
    """The page of that name, from the template beside this file."""
    return TEMPLATES.get_template(f"{name}.j2").render(content)
