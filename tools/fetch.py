"""Downloads model, training sets and benchmarks, for jobs without a network.

    python tools/fetch.py --config configs/default.yaml                     # make fetch: all that is not there yet
    python tools/fetch.py --config configs/default.yaml --only model,wangchan,thai_exam

After it, jobs run with HF_HUB_OFFLINE=1 and no network. An interrupted download continues where it stopped. A Hub id
can always be replaced by a local folder of the same layout (--dataset_path, --paths).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.data.fetch import fetch
from ouro.files import call
from ouro.settings import resolve


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="names, comma-separated: model, datasets and benchmarks of configs/")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    fetch(run.settings, run.options.only)


if __name__ == "__main__":
    call(main)
