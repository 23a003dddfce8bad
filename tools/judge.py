"""Rates replies that were made with `--judge none`: without model and GPU, as on a cluster's login node.

    export JUDGE_BASE_URL=https://host/v1 JUDGE_MODEL=gpt-4o-2024-05-13 JUDGE_PRICE=2.5,10
    read -rs JUDGE_API_KEY && export JUDGE_API_KEY
    python tools/judge.py results/exp2-wangchan-ut1/mt_bench_thai-ut4.json …

JUDGE_PRICE, dollars per million tokens in and out, may be left out: it is for the estimate of the cost alone. What is
rated by this judge already is not rated again, but with --again.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.evaluate.endpoint import Reply, Server, find_judge
from ouro.evaluate.judge import is_rated, rate_replies, result_key
from ouro.evaluate.replies import Cache
from ouro.evaluate.results import cache_of, harness_rows, save, set_aside
from ouro.files import Parser, UserError, call, one_line, regular


def rate_file(file: Path, grader: Server, again: bool = False) -> None:
    """Rates the replies of a result and writes it again. again: also where this judge has rated them; what there was is
    kept as ….old.
    Raises UserError: not a result of mt_bench_thai; the judge's errors."""
    items = file.with_suffix(".items.jsonl")
    try:
        result = json.loads(regular(file).read_text(encoding="utf-8"))
        study = result["study"]
        if study["metric"] != "rating":
            raise UserError(f"{file} holds no conversations: its metric is {study['metric']!r}")
        old = [json.loads(line) for line in regular(items).read_text(encoding="utf-8").split("\n") if line]
        questions = [
            {"id": line["id"], "question_id": line["doc"]["question_id"], "category": line["category"],
             "turns": [turn["prompt"] for turn in line["turns"]], "reference": line["target"]}
            for line in old
        ]  # fmt: skip
        pairs = [zip(line["resps"], line["turns"], strict=True) for line in old]
        replies = [[Reply(text, turn["end"]) for (text,), turn in pair] for pair in pairs]
        done = is_rated(study, "api")
        name = f"{one_line(study['run'])} at {study['total_ut_steps']} loops"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} (and {items.name}) is not a result of mt_bench_thai: {error!r}") from None
    if done and not again:
        print(f"{one_line(file)}: rated by {grader.model} already")
        return

    def rate(by: Server | None) -> None:
        with Cache(cache_of(file)) as saved:
            numbers, lines = rate_replies(questions, replies, by, saved, name)
        rated = study | numbers | {"key": result_key(study["generation_key"], by)}
        unrated = result | {"study": study | {"key": None, "judge": None, "value": None}}
        save(file, result | {"results": harness_rows(rated), "study": rated}, lines, unrated)

    if again:  # the replies stay, unrated: after an interruption the command goes on without --again
        set_aside([file])
        rate(None)
    rate(grader)


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results/<run>/mt_bench_thai-ut<k>.json")
    parser.add_argument("--again", action="store_true", help="rate anew what is rated; the old files stay as ….old")
    options = parser.parse_args()
    for file in options.files:
        if not file.is_file():
            raise UserError(f"no file {file}: replies are in RESULTS_DIR/<run>/mt_bench_thai-ut<k>.json")
    grader = find_judge()
    for file in options.files:
        rate_file(file, grader, options.again)


if __name__ == "__main__":
    call(main)
