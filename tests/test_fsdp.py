"""With `fsdp` each of two processes holds half of the frozen weights, and every number is that of plain DDP.

python tests/test_fsdp.py FOLDER     # one of the two processes; the test starts them
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ouro.model import loading
from ouro.train import build, processes, stopping, trainer

import pytest
from helpers import assert_same_run, in_processes, trained
from torch.distributed.tensor import DTensor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_the_repository")]
# One row of five is left for the last pass of the held-out loss: one process has none.
# Three rows a step, apart: one process makes two passes, the other one. No dropout: each process draws PEFT's own,
# also for a pass that is added.
TWO = ["--total_ut_steps", "2", "--rows_per_step", "3", "--pass_tokens", "64", "--max_steps", "2", "--save_steps", "1"]
TWO += ["--lora_dropout", "0", "--logging_steps", "1", "--eval_steps", "2", "--eval_rows", "5"]
KINDS = {
    "nf4": [],  # all layers recomputed
    "fp32": ["--use_qlora", "false", "--activation_checkpointing", "none", "--max_length", "512"],
}


def frozen_bytes(model) -> int:
    """What this process holds of the layers' frozen projections."""
    total = 0
    for name, p in model.named_parameters():
        if ".layers." in name and not p.requires_grad and p.dim() > 1:
            p = p.to_local() if isinstance(p, DTensor) else p
            total += p.untyped_storage().nbytes()
    return total


def pefts_own(model, plan, largest: int, **_) -> None:
    model.get_base_model().recompute_layers(plan(largest).recomputed // 2)


def process(folder: Path) -> None:
    """Trains each kind plainly, with fsdp, and with fsdp stopped after its first step; writes down what it held."""
    held, measure = {}, trainer.LoopTrainer.held_out_loss

    def measured(self):
        """In the middle of training: after a step, and after a forward pass without gradients."""
        before, losses = frozen_bytes(self.model), measure(self)
        held.setdefault(name, []).extend((before, frozen_bytes(self.model)))
        return losses

    trainer.LoopTrainer.held_out_loss = measured
    # With fsdp the layers are PEFT's, so here they are without it too.
    loading.fuse = lambda *_: None
    build.run_by_plan = pefts_own
    for kind, argv in KINDS.items():
        for way in ("ddp", "fsdp", "stopped"):
            name = f"{kind} {way}"
            options = [*TWO, *argv, "--fsdp", str(way != "ddp"), "--cache_dir", str(folder / "cache")]
            if way == "stopped":
                with pytest.raises(stopping.Stopped):
                    trained(folder / kind / way, *options, "--time_limit", "0")
            trained(folder / kind / way, *options)
    (folder / f"held-{processes.RANK}.json").write_text(json.dumps(held))
    os._exit(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, in_the_repository):
    """The folder of all runs, and the bytes that each process held in them."""
    folder = tmp_path_factory.mktemp("fsdp")
    codes, printed = in_processes(2, __file__, str(folder))
    assert codes == [0, 0], "\n".join(text[-3000:] for text in printed)
    return folder, [json.loads((folder / f"held-{rank}.json").read_text()) for rank in "01"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_fsdp_a_run_ends_in_the_bytes_of_plain_ddp_also_when_stopped_and_continued(runs, kind):
    folder, _ = runs
    assert_same_run(folder / kind / "fsdp/smoke", folder / kind / "ddp/smoke")
    assert_same_run(folder / kind / "stopped/smoke", folder / kind / "ddp/smoke")
    continued = json.loads((folder / kind / "stopped/smoke/manifest.json").read_text())["continued"]
    assert [c["step"] for c in continued] == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_the_frozen_weights_after_a_step_and_after_the_held_out_loss(runs, kind):
    for held in runs[1]:
        (whole,), (half,) = set(held[f"{kind} ddp"]), set(held[f"{kind} fsdp"])
        assert half * 2 == whole > 0


if __name__ == "__main__":
    process(Path(sys.argv[1]))
