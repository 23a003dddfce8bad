"""RESULTS.md and report.html: the same content as Markdown, and as one page that needs no network."""

import base64
import hashlib
import html
import re
from collections import defaultdict

from ouro.verdict.plots import CAPTIONS
from ouro.verdict.rule import Verdict
from ouro.verdict.study import ASPECTS, Panel, Reader
from ouro.verdict.tables import Table, markdown

TITLE = "Does looping help a language model learn Thai?"


def about(verdict: Verdict, made: list[Verdict]) -> str:
    """The aspect, with the training set where there are several."""
    several = len({other.dataset for other in made}) > 1
    return ASPECTS[verdict.aspect] + (f" ({verdict.dataset})" if several else "")


def verdict_lines(made: list[Verdict]) -> list[tuple[str, str]]:
    """(aspect and headline, sentence)."""
    return [(f"{about(verdict, made)}: {verdict.headline}", verdict.sentence) for verdict in made]


def basis(reader: Reader, found: dict[tuple[str, str], Panel], made: list[Verdict]) -> str:
    """What the verdict rests on, in a line."""
    counts = ((len(reader.runs), "training run"), (len(reader.results), "result"))
    told = ", ".join(f"{n:,} {what}{'s' * (n != 1)}" for n, what in counts)
    if reader.left_out:
        count = len(set(reader.left_out))
        told += f", {count:,} thing{'s' * (count != 1)} left out or noted (at the end)"
    datasets = list(dict.fromkeys(verdict.dataset for verdict in made))
    for panel in (panel for (_, dataset), panel in found.items() if dataset == datasets[0]):
        study = panel.study
        revision = f" at {study['model_revision'][:12]}" if study["model_revision"] else ""
        return f"{study['model']}{revision}, {study['precision']}, trained on {' and on '.join(datasets)}; {told}."
    return f"{told[0].upper()}{told[1:]}."


def missing_lines(made: list[Verdict]) -> list[str]:
    """What would make the answer firmer; said once where it is missing everywhere."""
    aspects = defaultdict(list)
    for verdict in made:
        for what in verdict.missing:
            aspects[what].append(about(verdict, made))
    return [what if len(of) == len(made) else f"{what}, for {', '.join(of)}" for what, of in aspects.items()]


STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1b;--paper:#fff;--soft:#f3f4f6;--line:#d5d8dd;--accent:#2f6f9f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#15171a;--soft:#202429;--line:#3a4048;--accent:#7db7e0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem 1.2rem 4rem;color:var(--ink);background:var(--paper);line-height:1.55;
 font-family:system-ui,"Segoe UI",Roboto,"Noto Sans","Noto Sans Thai","Noto Sans Thai Looped","Leelawadee UI",Thonburi,
 Sarabun,Loma,"TH Sarabun New",Garuda,Tahoma,sans-serif}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
a{color:var(--accent)}nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}
p,li,figcaption{max-width:50rem}figcaption,section>p{font-size:.9rem;opacity:.85}
.verdict{background:var(--soft);border-left:4px solid var(--accent);border-radius:4px;padding:.2rem 1.2rem}
.verdict dt{font-weight:600;margin-top:.8rem}.verdict dd{margin:0 0 .8rem;overflow-wrap:anywhere}
figure{margin:1rem 0}figure .box{max-width:52rem}figure svg{display:block;width:100%;min-width:34rem;height:auto}
figure.narrow .box{max-width:34rem}figure.narrow svg{min-width:20rem}
svg text{font-family:system-ui,"Noto Sans",sans-serif}
.box{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}td.n{text-align:right}
#left-out td,#data td{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
blockquote{margin:.3rem 0;padding:.4rem .9rem;background:var(--soft);border-radius:4px;white-space:pre-wrap;
 overflow-wrap:anywhere;line-height:1.8}
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentNode, row = head.parentNode, body = head.closest("table").tBodies[0];
  const column = [...row.cells].indexOf(head), down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of row.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  const number = (c) => (c.dataset.v === undefined ? c.textContent : Number(c.dataset.v));
  const key = (r) => number(r.cells[column]);
  const rank = (x) => (typeof x === "number" ? 0 : 1);
  const order = (a, b) => rank(a) - rank(b) || down * (rank(a) ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
});
"""


def page(made: list[Verdict], rests_on: str, shown: list[Table], figures: dict[str, str], talks: list) -> str:
    """report.html: one file; its policy allows no network and no script but the one above, by its hash."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    e = html.escape
    dl = "".join(f"<dt>{e(name)}</dt><dd>{e(sentence)}</dd>" for name, sentence in verdict_lines(made))
    missing = "".join(f"<li>{e(what)}</li>" for what in missing_lines(made))
    missing = f"<h2>What is missing</h2><ul>{missing}</ul>" if missing else ""
    plots = ""
    for name, svg in figures.items():
        narrow = ' class="narrow"' if float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1]) < 400 else ""
        caption = e(CAPTIONS[name])
        plots += f'<figure id="plot-{name}"{narrow}><div class="box">{svg}</div>'
        plots += f"<figcaption>{caption}</figcaption></figure>\n"
    spoken = "".join(
        f'<h3 lang="th">{e(prompt)}</h3>'
        + "".join(f'{e(who)}<blockquote lang="th">{e(reply)}</blockquote>' for who, reply in all)
        for prompt, all in talks
    )
    spoken = f'<section id="answers"><h2>Answers</h2>{spoken}</section>' if spoken else ""
    links = "".join(f'<a href="#{e(table.name)}">{e(table.title)}</a>' for table in shown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><title>{TITLE}</title><style>{STYLE}</style></head><body>
<h1>{TITLE}</h1><p>{e(rests_on)}</p><div class="verdict"><dl>{dl}</dl></div>
<nav>{links}</nav>
{missing}
{plots}{"".join(table.html() for table in shown)}{spoken}
<script>{SCRIPT}</script></body></html>
"""


def document(
    made: list[Verdict], rests_on: str, shown: list[Table], figures: dict[str, str], talks: list, place: str
) -> str:
    """RESULTS.md; `place`: the plots' folder as seen from it."""
    text = f"# {TITLE}\n\n{markdown(rests_on)}\n\n"
    text += "".join(f"- **{markdown(name)}.** {markdown(sentence)}\n" for name, sentence in verdict_lines(made))
    if missing := missing_lines(made):
        text += "\n## What is missing\n\n" + "".join(f"- {markdown(what)}\n" for what in missing)
    text += "\n" + "".join(f"![{name}]({place}/{name}.png)\n\n{CAPTIONS[name]}\n\n" for name in figures)
    text += "".join(table.markdown() for table in shown if not table.folded)
    if talks:
        text += "## Answers\n\n"
    for prompt, all in talks:
        text += (
            f"**{markdown(prompt)}**\n\n"
            + "".join(f"- {markdown(who)}: {markdown(reply[:600])}\n" for who, reply in all)
            + "\n"
        )
    return text
