"""Rates replies that were made with `--judge none`.

python tools/judge.py results/exp2-wangchan-ut1/mt_bench_thai-ut4.json …
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.evaluate.endpoint import find_judge
from ouro.evaluate.judge import judge_file
from ouro.files import Parser, UserError, call


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results/<run>/mt_bench_thai-ut<k>.json")
    files = parser.parse_args().files
    for file in files:
        if not file.is_file():
            raise UserError(f"no file {file}: replies are in RESULTS_DIR/<run>/mt_bench_thai-ut<k>.json")
    grader = find_judge()
    for file in files:
        judge_file(file, grader)


if __name__ == "__main__":
    call(main)
