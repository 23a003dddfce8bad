"""The answer: every run and result there is -> RESULTS.md, report.html, plots and tables for a paper, and a verdict.

    python report.py                                        # reads output/ and results/, whatever is there
    python report.py --out site --csv --latex               # report elsewhere; tables as files too
    python report.py --serve                                # as a page on this machine, which follows a sweep
    python report.py --power                                # what a study can find, before anything is trained
    python report.py --explain                              # the numbers behind each word
    python report.py --config configs/a100.yaml             # only runs that have this file's settings count
    python report.py --compare exp2-wangchan-ut1:1 exp1-wangchan-ut4:4 > appendix.md      # two runs, item by item

Reads OUTPUT_DIR/<run> and RESULTS_DIR/<run> (with seeds: seed<n>/<run>). Writes OUT/RESULTS.md, OUT/report.html (one
file, no network) and RESULTS_DIR/report/: each plot as PNG and SVG, verdict.json, and the tables that were asked for.
The same inputs give the same bytes. What could not be used is listed in the report, with the reason.
"""

import argparse
import json
import os
import textwrap
from pathlib import Path

from ouro.files import UserError, call, one_line, place, printable, quoted, read_yaml, write_atomic, write_json
from ouro.settings import Resolved, resolve, runs_in
from ouro.verdict.compare import compare
from ouro.verdict.live import inputs, serve
from ouro.verdict.page import basis, fill, missing_lines, verdict_lines
from ouro.verdict.panels import SETTINGS_ALIKE, Key, Panel, panels
from ouro.verdict.plots import draw, save
from ouro.verdict.power import STUDIES, curves, plans
from ouro.verdict.rule import Verdict, verdicts
from ouro.verdict.study import TEXTS, Reader, about_answers, conversations
from ouro.verdict.tables import tables


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=".", type=place, help="folder of RESULTS.md and report.html (default: here)")
    parser.add_argument("--csv", action="store_true", help="tables as RESULTS_DIR/report/<table>.csv too")
    parser.add_argument("--latex", action="store_true", help="the same as .tex, for booktabs")
    parser.add_argument("--power", action="store_true", help="print what a study can find, and write OUT/power.png")
    parser.add_argument(
        "--serve", action="store_true", help="serve it on this machine, with each run's loss and time left"
    )
    parser.add_argument("--explain", action="store_true", help="print the chain of numbers behind each word, too")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two runs item by item to stdout; run or run:depth"
    )


def as_json(verdict: Verdict) -> dict:
    """A verdict for programs: its words by depth, and the numbers of each test as they are compared."""
    told = {name: value for name, value in vars(verdict).items() if name != "tests"}
    numbers = ("quantity", "depth", "word", "task", "items", "clusters", "p", "adjusted", "level", "smallest")
    told["tests"] = [
        {name: getattr(test, name) for name in numbers}
        | {"value": float(test.estimate.value), "half": float(test.estimate.half(test.level))}
        | {"margin": test.metric.margin, "seeds": test.estimate.seeds}
        for test in verdict.tests
    ]
    return json.loads(json.dumps(told), parse_constant=lambda _: None)  # what is not known is null


def print_power(found: dict[Key, Panel], out: Path) -> None:
    print("The smallest true difference at 4 loops that the whole rule finds four times in five, all tests one family.")
    print("U: worth on Thai against 1 loop; X: the same in Thai minus in English. Takes a minute: each line rests on")
    print(f"{STUDIES} simulated studies, and with {STUDIES} others its figures differ by 2 to 5 % of themselves.\n")
    for row in plans(found):
        print("; ".join(f"{name} {cell}" for name, cell in row.items()), flush=True)
    save("power", curves(), out)
    print(f"\nthe curves of Thai text: {one_line(out / 'power.png')}")


def elsewhere(output: Path) -> str:
    """Of the folders in OUTPUT_DIR that hold runs, the commands that report on them."""
    told = ""
    for folder in sorted(output.glob("*/")):
        if runs := runs_in(folder):
            scores = read_yaml(folder / runs[0] / "config.yaml")["results_dir"]
            told += f"\n  make report OUTPUT_DIR={quoted(folder)} RESULTS_DIR={quoted(scores)}"
    return told


def comparable(run: Resolved, reader: Reader) -> dict[Key, Panel]:
    """What may be compared, of runs that have the settings which --config or the command line names."""
    asked = (name for name in SETTINGS_ALIKE if run.origins[name] != "default")
    return panels(reader, {name: getattr(run.settings, name) for name in asked})


def write(run: Resolved, reader: Reader) -> dict:
    """Writes the report, its plots and tables, and gives what its templates show."""
    found = comparable(run, reader)
    out = Path(run.options.out)
    made = verdicts(reader, found)
    talks = conversations(reader)
    shown = tables(reader, found, made)  # after all that may be left out, which is one of them
    figures = draw(reader.runs, found, made)

    folder = Path(run.settings.results_dir) / "report"
    for table in shown:
        if run.options.csv:
            write_atomic(folder / f"{table.name}.csv", table.csv())
        if run.options.latex:
            write_atomic(folder / f"{table.name}.tex", table.latex())
    for name in TEXTS["figures"].keys() - figures.keys():  # of an earlier report, no longer true
        for suffix in (".png", ".svg"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    content = {
        "basis": basis(reader, found, made),
        "verdicts": verdict_lines(made),
        "missing": missing_lines(made),
        "figures": {name: (figure.get_label(), save(name, figure, folder)) for name, figure in figures.items()},
        "texts": TEXTS,
        "plots": Path(os.path.relpath(folder, out)).as_posix(),
        "tables": shown,
        "conversations": talks,
        "live": [],  # runs_now, where it is served
        "answers": about_answers(reader) if talks else "",
    }
    for name in ("RESULTS.md", "report.html"):
        write_atomic(out / name, fill(name, **content))
    write_json(folder / "verdict.json", [as_json(verdict) for verdict in made])
    return content


def main() -> None:
    run = resolve(__doc__, add_options=options)
    out = Path(run.options.out)
    places = [Path(run.settings.output_dir), Path(run.settings.results_dir)]
    read = " and ".join(f"{place}{' (which is not there)' * (not place.is_dir())}" for place in places)
    if not any(place.is_dir() for place in places) and not run.options.power:
        raise UserError(f"nothing to report on: {read}; OUTPUT_DIR and RESULTS_DIR name other folders")
    there, reader = inputs(*places), Reader(*places)
    if not (run.options.power or reader.runs or reader.results) and (others := elsewhere(places[0])):
        print(one_line(f"no run is in {places[0]}, and no result in {places[1]}; runs there are for") + f"{others}\n")
    if run.options.compare:
        print(compare(reader, *run.options.compare), end="")
        return
    if run.options.power:
        print_power(comparable(run, reader), out)
        return
    content = write(run, reader)
    print(printable(f"{content['basis']}\n"))
    for name, numbers, rests in content["verdicts"]:
        print(textwrap.fill(printable(name), 100, subsequent_indent="  "))
        for line in (*numbers, *([rests] if rests else [])):
            print(textwrap.fill(printable(line), 100, initial_indent="  ", subsequent_indent="    "))
    for what in content["missing"]:
        print(printable(f"missing: {what}"))
    if run.options.explain and (table := next((t for t in content["tables"] if t.name == "tests"), None)):
        print(f"\n{table.title}\n{textwrap.fill(table.note, 100)}")
        for row in table.texts():
            told = (f"{name} {cell}" for name, cell in zip(table.columns, row, strict=True))
            print(textwrap.fill("; ".join(told), 100, initial_indent="- ", subsequent_indent="  "))
    print(f"\nread: {one_line(read)}")
    print(one_line(f"{out / 'report.html'}, {out / 'RESULTS.md'}; plots in {places[1] / 'report'}"))
    if run.options.serve:
        serve(content, lambda: write(run, Reader(*places)), there, *places)


if __name__ == "__main__":
    call(main)
