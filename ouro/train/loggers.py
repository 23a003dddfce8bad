"""Where else a run's metrics go: TensorBoard, Weights & Biases.

check_logger(settings)                     # before the data is read: a run that could not be logged is refused
start_logger(run, folder)                  # W&B: the run, or the rest of it
continue_tensorboard(trainer, folder, 40)  # TensorBoard: the rest of it, after step 40
"""

import os
from importlib.util import find_spec
from pathlib import Path

from ouro.files import UserError, regular, write_atomic
from ouro.settings import Resolved, Settings
from ouro.train.processes import RANK

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, is_tensorboard_available, is_wandb_available


def check_logger(settings: Settings) -> None:
    """Whether the package is there and the W&B server takes a run of this user; nothing is asked on the terminal.
    Raises UserError: no such package, no API key, one that the server refuses, no server, or a WANDB_… variable that
    W&B does not know."""
    there = {"tensorboard": is_tensorboard_available(), "wandb": find_spec("wandb")}
    if not there.get(settings.report_to, True):
        raise UserError(f"report_to = {settings.report_to} needs the package {settings.report_to}; or --report_to none")
    if settings.report_to != "wandb" or RANK > 0:
        return
    import wandb
    from pydantic import ValidationError

    if not is_wandb_available():
        raise UserError("report_to = wandb, and WANDB_DISABLED is set: unset it, or --report_to none")
    try:
        # silent: never asks for a key; one retry: with more it times out before it says what is wrong
        wandb.setup(wandb.Settings(silent=True, x_graphql_retry_max=1))
        wandb.login(verify=True)  # asks no server with WANDB_MODE=offline or disabled
        return
    except ValidationError as error:  # whose own text shows the value
        reason = "; ".join(f"WANDB_{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
    except wandb.Error as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
    finally:
        wandb.teardown()
    raise UserError(
        f"report_to = wandb, and no run can be logged: {reason}",
        "set WANDB_API_KEY or run `wandb login` (WANDB_BASE_URL names a server of your own); or WANDB_MODE=offline and "
        "`wandb sync` later; or --report_to none",
    )


def start_logger(run: Resolved, folder: Path) -> None:
    """Starts the W&B run, or the rest of it, that transformers' callback then writes to; its files are in `folder`.
    Raises UserError: the server refuses it, as for an entity that is not the user's."""
    if run.settings.report_to != "wandb" or RANK > 0:
        return
    import wandb

    stored = folder / "wandb" / "run_id"  # goes with the folder's contents when the run starts anew
    try:
        started = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ouro-thai"),
            name=run.run,
            dir=str(folder),
            id=regular(stored).read_text(encoding="utf-8") if stored.exists() else None,
            resume="allow",
            config={"settings": vars(run.settings)},
        )
    except wandb.Error as error:
        raise UserError(f"W&B does not start the run: {' '.join(str(error).split())[:300]}") from None
    write_atomic(stored, started.id)


def continue_tensorboard(trainer: Trainer, folder: Path, step: int) -> None:
    """Charts go on after `step`, and drop what was logged of later steps before the run was interrupted."""
    from torch.utils.tensorboard import SummaryWriter

    if trainer.pop_callback(TensorBoardCallback) and trainer.is_world_process_zero():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)))
