"""Times as Slurm writes them."""

import argparse
import re


def seconds(text: str, each: int = 60) -> float:
    """A time as Slurm writes it: minutes (or so many seconds `each`), MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS,
    UNLIMITED.
    Raises ValueError: anything else."""
    if text in ("UNLIMITED", "INFINITE"):
        return float("inf")
    if not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}", text):
        raise ValueError(text)
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    first = 3600 if days or len(parts) == 3 else 60 if len(parts) == 2 else each
    return int(days or 0) * 86400 + sum(part * first / 60**i for i, part in enumerate(parts))


def time_limit(text: str) -> float:
    try:
        return seconds(text, each=1)
    except ValueError:
        message = f"{text!r} is neither seconds nor HH:MM:SS nor D-HH:MM:SS"
        raise argparse.ArgumentTypeError(message) from None
