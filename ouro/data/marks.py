"""What the name of a column, or of a key in a turn, says of training."""

import re
from functools import lru_cache

MARKS = ("weight", "train", "trainable", "used_in_training", "loss", "need_loss", "loss_weight", "loss_mask")
MARK = re.compile(r"(?:is|do|to|should|needs?|used?(?:in|for))?(?:weight|train(?:ing|able|ed)?|loss(?:weight|mask)?)")
INVERSE_MARKS = ("mask", "ignore_loss")  # where they are true a row or turn is not trained
INVERSE = re.compile(r"(?:is)?mask(?:ed|loss)?|(?:ignore|skip|no|donot|dont|not|excludefrom)(?:loss|train(?:ing|ed)?)")
LIKE_MARK = re.compile(r"train|loss|mask|weight|ignore|exclude|skip|supervis")


@lru_cache(maxsize=4096)
def speaks_of_training(key: str) -> str:
    """What a key says of training: "mark", whether a row or turn is trained; "inverse", whether it is not; "facts", it
    may hold such keys; or "". In any case, with and without underscores."""
    plain = re.sub("[^a-z]", "", key.lower())
    if MARK.fullmatch(plain):
        return "mark"
    if INVERSE.fullmatch(plain):
        return "inverse"
    return "facts" if plain.startswith(("meta", "extra", "info", "annotation", "flag")) else ""


@lru_cache(maxsize=4096)
def like_mark(key: str) -> bool:
    """Whether a key that is not read sounds as if it said what is trained."""
    return not speaks_of_training(key) and bool(LIKE_MARK.search(key.lower()))
