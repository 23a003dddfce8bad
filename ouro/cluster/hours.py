"""What the study costs, before anything is typed: hours of training and of scoring, and disk.

    python -m ouro.cluster.hours                             # make plan: the README's table, of two machines
    python -m ouro.cluster.hours --gpu H100 --count 4        # make plan GPU=H100 COUNT=4: each part of the study
    python -m ouro.cluster.hours --gpu H100 --count 4 --study core     # the experiments of a part, a line each
    python -m ouro.cluster.hours --gpu RTX3080 --hours 48        # a study that fits so many hours, and what to type

Predicted from counted operations and the share of its peak that a GPU reached (ouro/model/cost.py): of rows of typical
lengths (configs/datasets.yaml), and at most, were each of them max_length tokens long. Any setting can follow.
"""

import argparse
import dataclasses
import functools
import sys

from ouro.cluster.plan import Prediction, predict
from ouro.cluster.sweep import study_of
from ouro.files import UserError, call, one_line, quoted, read_yaml
from ouro.model.cost import GPUS, REACHED, layer_weights, product_sizes, training_flops
from ouro.model.loading import sizes
from ouro.settings import EVALS, EXPERIMENTS, STUDIES, Settings, resolve

ONE, FOUR = "exp2-wangchan-ut1", "exp1-wangchan-ut4"  # of one loop and of four
TEXTS = "thai_text,parallel_text_thai,parallel_text_english,english_text"  # a verdict for little time
ENVIRONMENT, DATA = 6e9, 4e9  # bytes: of .venv; of all training sets and benchmarks, by their cards
LEAST = 30  # steps of a run, below which the learning rate hardly rises and falls


@dataclasses.dataclass(eq=False)
class Machine:
    """Some GPUs, and the settings that are meant for them."""

    gpu: str
    count: int
    s: Settings
    given: frozenset[str] = frozenset()  # settings of the command line, which come after an experiment's row

    @functools.cache  # noqa: B019 - lives as long as the program
    def epoch(self, rows: str, **row) -> Prediction:
        return predict(dataclasses.replace(self.s, num_train_epochs=1, **row), self.gpu, self.count, rows)

    def run(self, exp: str, rows: str = "cached", **changes) -> Prediction:
        """Of an experiment's training; epochs are predicted once, and multiplied."""
        row = {k: v for k, v in read_yaml(EXPERIMENTS)[exp].items() if k not in self.given} | changes
        epochs = row.pop("num_train_epochs", self.s.num_train_epochs) if self.s.max_steps < 0 else 1
        learnt = {k: v for k, v in row.items() if k not in ("arm", "learning_rate", "development", "shuffle_answers")}
        p = self.epoch(rows, **learnt)
        return dataclasses.replace(p, hours=p.hours * epochs, steps=round(p.steps * epochs))

    def scoring(self, tasks: str) -> float:
        """Hours of one model on one of the GPUs, all depths from one pass of four loops."""
        tokens = sum(read_yaml(EVALS)["tokens"].get(task, 0) for task in tasks.split(","))
        forward = training_flops(sizes(self.s), 4, 0, tokens, 0, tokens) / 2
        return forward / (GPUS[self.gpu][0] * 1e12 * REACHED["nf4" if self.s.use_qlora else "bf16"]) / 3600

    def part(self, name: str, rows: str = "cached") -> tuple[int, float, float]:
        """Runs of a part of the study, and the hours of their training and scoring, one after the other."""
        exps, seeds, evaluated = study_of(name)
        scored = len(exps) * len(seeds) * evaluated / self.count * self.scoring(self.s.tasks)
        trained = sum(self.run(exp, rows).hours for exp in exps)
        return len(exps) * len(seeds), len(seeds) * trained, scored


def config_for(gpu: str) -> str:
    return "configs/default.yaml" if GPUS[gpu][1] < 80 else "configs/a100.yaml"


def span(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h" if hours < 72 else f"{hours / 24:,.0f} days"


def disk(m: Machine) -> str:
    c = sizes(m.s)
    model = 2 * (c.num_hidden_layers * layer_weights(c) + 2 * c.vocab_size * c.hidden_size)
    adapter = 4 * m.s.r * c.num_hidden_layers * sum(i + o for i, o in product_sizes(c))
    checkpoint = adapter * (1.5 if "8bit" in m.s.optim else 3)
    base = f"environment {ENVIRONMENT / 1e9:.0f} GB, model {model / 1e9:.1f} GB, data about {DATA / 1e9:.0f} GB"
    more = f"while it trains {(m.s.save_total_limit + 1) * checkpoint / 1e9:.1f} GB more"
    return f"disk: {base}; a run {adapter / 1e9:.2f} GB, {more}; a merged model {model / 1e9:.1f} GB"


def table() -> str:
    """The README's: what its commands take on its two machines."""
    both = (("RTX3080", 1), ("H100", 4))
    machines = [Machine(gpu, count, resolve("", ["--config", config_for(gpu)]).settings) for gpu, count in both]
    lines = ["| typical rows (and at most) | RTX 3080 | 4 × H100 |", "|---|---|---|"]
    for title, cost in (
        (f"training `{ONE}`", lambda m, r: m.run(ONE, r).hours),
        (f"training `{FOUR}`", lambda m, r: m.run(FOUR, r).hours),
        ("`make eval`, a model, on one GPU", lambda m, r: m.scoring(m.s.tasks)),
        ("`STUDY=core`: 4 depths, 3 seeds, scored", lambda m, r: sum(m.part("core", r)[1:])),
        ("`STUDY=english`: 2 depths, 3 seeds, scored", lambda m, r: sum(m.part("english", r)[1:])),
    ):
        cells = [tuple(dict.fromkeys(span(cost(m, rows)) for rows in ("typical", "longest"))) for m in machines]
        lines.append(" | ".join([f"| {title}", *(f"{c[0]} ({c[1]})" if c[1:] else c[0] for c in cells)]) + " |")
    return "\n".join(lines) + "\n"


def print_parts(m: Machine) -> None:
    print("study       runs   training  (at most)    scoring   together")
    total = 0.0
    for name in read_yaml(STUDIES):
        try:
            (runs, trained, scored), (_, most, _) = m.part(name), m.part(name, "longest")
        except UserError as error:
            print(f"{name:<10} {error}")
            continue
        total += trained + scored
        cells = (span(trained), f"({span(most)})", span(scored), span(trained + scored))
        print(f"{name:<10} {runs:>5} " + " ".join(f"{cell:>10}" for cell in cells))
    print(f"all of it, one after the other: {span(total)}, {total * m.count:,.0f} GPU-hours; the base's scores, once: "
          f"{span(m.scoring(m.s.tasks))}\n{disk(m)}")  # fmt: skip


def print_experiments(m: Machine, study: str) -> None:
    print(f"{'':<24} loops  twice    GiB  tokens/epoch  steps    hours  at most")
    exps, seeds, _ = study_of(study)
    for exp in exps:
        loops = m.s.total_ut_steps if "total_ut_steps" in m.given else read_yaml(EXPERIMENTS)[exp]["total_ut_steps"]
        p, most = m.run(exp), m.run(exp, "longest")
        print(f"{exp:<24} {loops:>5} {p.recomputed:>6.0%} {p.memory / 2**30:>6.1f} {p.tokens:>13,.0f} {p.steps:>6,} "
              f"{p.hours:>8.1f} {most.hours:>8.1f}")  # fmt: skip
    print(f"each with seeds {' '.join(seeds)}")


def print_offer(m: Machine, hours: float, file: str) -> None:
    """The study of one and four loops with three seeds, on as many rows, an epoch, as fit.
    Raises UserError: too few do."""
    scored = 7 * m.scoring(TEXTS)  # six runs and the base, on one GPU
    whole = {exp: m.run(exp, num_train_epochs=1) for exp in (ONE, FOUR)}
    full, left = 3 * sum(p.hours for p in whole.values()), hours - scored
    tokens = int(min(1, left / full) * whole[ONE].tokens / 1e5) * 100_000
    steps = 0
    if tokens > 0:
        fits = [m.run(exp, max_tokens=str(tokens), num_train_epochs=1) for exp in (ONE, FOUR)]
        steps = fits[0].steps
    if steps < LEAST:
        need = f"{scored + full * LEAST / whole[ONE].steps:.0f} are needed for {LEAST} steps"
        raise UserError(f"{hours:g} hours hold too little on {m.count} x {m.gpu}: {need}")
    one, four = (p.hours for p in fits)
    config = "" if file == "configs/default.yaml" else f" CONFIG={quoted(file)}"
    names = ",".join(f"seed{seed}/{exp}" for seed in range(3) for exp in (ONE, FOUR))
    print(f"1 and 4 loops, 3 seeds, {tokens / 1e6:.1f} of {whole[ONE].tokens / 1e6:.0f} million tokens, one epoch "
          f"({steps} steps): a run {span(one)} and {span(four)}, scoring {span(scored)}, together "
          f"{span(3 * (one + four) + scored)}. Of typical rows; repeated, each line continues.\n")  # fmt: skip
    settings = f"--seed $seed --max_tokens {tokens} --num_train_epochs 1"
    train = f'make train{config} EXP=$exp OUTPUT_DIR=output/fits/seed$seed \\\n    ARGS="{settings}"'
    if m.count > 1:
        train = (f".venv/bin/torchrun --nproc_per_node {m.count} train_qlora.py --config {quoted(file)} --exp $exp \\\n"
                 f"    --output_dir output/fits/seed$seed {settings}")  # fmt: skip
    print(f"""make fetch{config}
make preflight{config} EXP={FOUR} GPU=1
for seed in 0 1 2; do for exp in {ONE} {FOUR}; do
  {train}
done; done
make eval{config} EXP={names} \\
  OUTPUT_DIR=output/fits RESULTS_DIR=results/fits BENCH={TEXTS}
make report OUTPUT_DIR=output/fits RESULTS_DIR=results/fits""")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=GPUS, help="without it: the README's table")
    parser.add_argument("--count", type=int, default=1, help="how many of them")
    parser.add_argument("--study", help="the experiments of a part of the study")
    parser.add_argument("--hours", type=float, help="what fits in so many")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    asked = run.options
    if asked.count < 1:
        raise UserError(f"--count must be at least 1, got {asked.count}")
    if not asked.gpu:
        if asked.hours or asked.study:
            raise UserError(f"for which GPU? --gpu (make plan GPU=…): one of {', '.join(GPUS)}")
        print(table(), end="")
        return
    if asked.hours is not None and asked.study:
        raise UserError("HOURS offers 1 and 4 loops, and STUDY is a part of the whole study: give one of them")
    if not run.config:
        run = resolve(__doc__, ["--config", config_for(asked.gpu), *sys.argv[1:]], add_options=options)
    given = frozenset(name for name, origin in run.origins.items() if origin == "command line")
    m = Machine(asked.gpu, asked.count, run.settings, given)
    print(f"{asked.count} x {asked.gpu}, {one_line(run.config)}")
    if asked.hours is not None:
        print_offer(m, asked.hours, run.config)
    elif asked.study:
        print_experiments(m, asked.study)
    else:
        print_parts(m)


if __name__ == "__main__":
    call(main)
