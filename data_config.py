"""Checks a training set and shows what would be trained: its rows as masked tokens, and the data report.

    python data_config.py --config configs/smoke.yaml --dataset sample                       # the embedded rows
    python data_config.py --config configs/default.yaml --dataset wangchan
    python data_config.py --config configs/default.yaml --dataset wangchan --dataset_path FOLDER_OR_FILE

configs/datasets.yaml names the training sets; a Hub id and a local copy of the same layout are read by the same code.
A row becomes a chat in the model's own template, of which the assistant's turns and their end-of-turn tokens are
trained. The rows are kept, memory-mapped, in CACHE_DIR/<dataset>-<split>-<key>/; the key covers data, tokenizer,
template, settings and code, so that no change to any of them can serve old rows. This command also writes the report
to OUTPUT_DIR/data-report/<dataset>.json, and says how such rows would go through this machine's GPU.
"""

from pathlib import Path

from ouro.data.cache import prepare
from ouro.data.report import print_report, save_report
from ouro.data.sources import check_places
from ouro.files import call, check_writable, one_line
from ouro.settings import resolve


def main() -> None:
    s = resolve(__doc__).settings
    check_writable("output_dir", s.output_dir)
    check_places(s)  # said before the model is asked for, which may take a network, and before seconds of imports
    from ouro.model.loading import load_tokenizer
    from ouro.train.machine import plan_steps

    import torch

    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
    rows, report = prepare(s, tokenizer)
    print_report(report)
    if torch.cuda.is_available():
        plan_steps(s, rows, torch.cuda.current_device())
    path = Path(s.output_dir) / "data-report" / f"{s.dataset}.json"
    save_report(path, report)
    print(f"file: {one_line(path)}")


if __name__ == "__main__":
    call(main)
