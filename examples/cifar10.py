"""What Elastic-Link brings: one training of each recipe, network and seed, on CIFAR-10.

    python examples/cifar10.py --train cifar10-train.tar --test cifar10-test.tar

Every line of the CSV is one training; what is there already is not done again, and a training
that was cut off goes on where it stopped. `--table` prints the README's tables of what is there:
of the recipes as they are, and as they were before what won became their defaults.
Several processes may share a CSV: `--shard 0/2` and `--shard 1/2`.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from el_convert import RECIPES, binarize
from el_convert.datasets import evaluation_loader, open_images
from el_convert.evaluation import evaluate
from el_convert.run_state import EpochRow
from el_convert.train_options import ImageOptions, TrainOptions
from el_convert.training import train
from el_convert.watcher import Watcher

COLUMNS = (
    "model", "row", "seed", "images", "epochs", "batch", "lr", "top1", "top5", "train_loss",
    "seconds", "torch",
)  # fmt: skip
IMAGES, EPOCHS = 10_000, 6  # of one training; `--epochs` makes a table of its own
MODELS = ("resnet26", "mobilenetv1_100", "densenet121")


@dataclass(frozen=True)
class Row:
    """One way to convert a network.

    Attributes:
        recipe: a built-in recipe. "identity" is the float network, bit for bit.
        options: fields set on it.
        seeds: how many trainings.
    """

    recipe: str
    options: tuple[tuple[str, str], ...] = ()
    seeds: int = 1


FLOAT_SHORTCUTS = (("keep.shortcut", "true"),)
# Whether the last norms of residual branches start at 1 or at 0.
BRANCHES_ON, BRANCHES_OFF = ((("norm.zero_weights", choice),) for choice in ("one", "keep"))
THRESHOLDS = (("input.threshold", "learned"),)
ROWS = {
    "plain": Row("plain", seeds=3),
    "elastic-link": Row("elastic-link", seeds=3),
    "plain, float shortcuts": Row("plain", FLOAT_SHORTCUTS, 3),
    "elastic-link, float shortcuts": Row("elastic-link", FLOAT_SHORTCUTS, 3),
    "elastic-link, float shortcuts, branches off": Row(
        "elastic-link", (*FLOAT_SHORTCUTS, *BRANCHES_OFF)
    ),
    "reactnet": Row("reactnet", seeds=3),
    "reactnet, branches on": Row("reactnet", BRANCHES_ON, 3),
    "elastic-reactnet": Row("elastic-reactnet", seeds=3),
    "float": Row("identity"),
    "xnor": Row("xnor"),
    "bi-real": Row("bi-real"),
}
# No norm follows the sum then: with gamma at 3 the maps grow without bounds.
AFTER_NORM = (("link.place", "after-norm"), ("link.gamma_init", "1"))


def ablations(prefix: str, base: tuple[tuple[str, str], ...]) -> dict[str, Row]:
    """One choice each, changed from `base`."""
    values = {
        "link.gamma_init": ("0", "0.25", "0.5", "1", "2", "5"),
        "link.gamma": ("scalar", "fixed"),
        "link.squeeze": ("sum", "slice"),
        "link.expand": ("tile", "zero"),
        "link.downsample": ("average", "max", "slice"),
        "activation.replacement": ("keep", "rprelu", "identity"),
        "activation.slope": ("0.25", "0.5"),
        "input.threshold": ("learned",),
        "input.scale": ("xnor",),
    }
    recipe = RECIPES["elastic-link"].with_options(dict(base))
    changes = [(field, value) for field in values for value in values[field]]
    rows = {
        f"{prefix}{field.removeprefix('link.')}={value}": Row(
            "elastic-link", (*base, (field, value)), 3 if (field, value) in TELLING else 1
        )
        for field, value in changes
        if recipe.with_options({field: value}) != recipe
    }
    name = f"{prefix}place=after-norm, gamma_init=1"
    return rows | {name: Row("elastic-link", (*base, *AFTER_NORM))}


TELLING = (("activation.slope", "0.25"), ("activation.replacement", "identity"))
# What the recipes were before the choices that won became the defaults.
FORMER_SLOPE = (("activation.slope", "0.25"),)
FORMER = (("link.downsample", "average"), *FORMER_SLOPE)
FORMER_SHORTCUTS = (*FLOAT_SHORTCUTS, *BRANCHES_OFF)
IN_FLOAT = (*FORMER, *FORMER_SHORTCUTS)
FORMER_ROWS = {
    "former plain": Row("plain", FORMER_SLOPE, 3),
    "former elastic-link": Row("elastic-link", FORMER, 3),
    "former plain, float shortcuts": Row("plain", (*FORMER_SLOPE, *FORMER_SHORTCUTS), 3),
    "former elastic-link, float shortcuts": Row("elastic-link", IN_FLOAT, 3),
    "former plain, float shortcuts, thresholds": Row(
        "plain", (*FORMER_SLOPE, *FORMER_SHORTCUTS, *THRESHOLDS)
    ),
    "former elastic-link, float shortcuts, thresholds": Row(
        "elastic-link", (*IN_FLOAT, *THRESHOLDS)
    ),
    "former elastic-link, float shortcuts, gamma 1": Row(
        "elastic-link", (*IN_FLOAT, ("link.gamma_init", "1"))
    ),
    "former elastic-link, float shortcuts, gamma 6": Row(
        "elastic-link", (*IN_FLOAT, ("link.gamma_init", "6"))
    ),
    "former elastic-link, float shortcuts, after the norm": Row(
        "elastic-link", (*IN_FLOAT, *AFTER_NORM)
    ),
    "former elastic-link, float shortcuts, RPReLU": Row(
        "elastic-link", (*IN_FLOAT, ("activation.replacement", "rprelu"))
    ),
    "former plain, float shortcuts, branches on": Row(
        "plain", (*FORMER_SLOPE, *FORMER_SHORTCUTS, *BRANCHES_ON), 3
    ),
    "former elastic-link, float shortcuts, branches on": Row(
        "elastic-link", (*IN_FLOAT, *BRANCHES_ON), 3
    ),
    "former elastic-link, float shortcuts, branches on, max": Row(
        "elastic-link", (*FORMER_SLOPE, *FORMER_SHORTCUTS, *BRANCHES_ON)
    ),
    "former plain, branches on": Row("plain", (*FORMER_SLOPE, *BRANCHES_ON)),
    "former elastic-link, branches on": Row("elastic-link", (*FORMER, *BRANCHES_ON)),
    "former elastic-reactnet": Row(
        "elastic-reactnet", (("link.downsample", "average"), ("norm.zero_weights", "keep")), 3
    ),
    "former elastic-reactnet, branches on": Row(
        "elastic-reactnet", (("link.downsample", "average"), *BRANCHES_ON), 3
    ),
} | ablations("former ", FORMER)
ABLATIONS = ablations("", ())
ALL = ROWS | ABLATIONS | FORMER_ROWS
WITH_SHORTCUTS = ("resnet26",)


class Lines(Watcher):
    """One line for each epoch."""

    def epoch_ends(self, row: EpochRow) -> None:
        print(
            f"  epoch {row.epoch + 1}: loss {row.train_loss:.3f}, {row.seconds:.0f} s", flush=True
        )


def trials(models: Sequence[str], rows: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(model, row, seed), the most telling first."""
    for seed in range(3):
        for name in rows:
            for model in models:
                shortcuts = "float shortcuts" in name or "branches on" in name
                if seed < ALL[name].seeds and (not shortcuts or model in WITH_SHORTCUTS):
                    yield model, name, seed


def build(model: str, row: Row, seed: int) -> nn.Module:
    """The converted network, its weights drawn from the seed."""
    torch.manual_seed(seed)
    network = timm.create_model(model, num_classes=10)
    # As timm starts them, logits of some networks deviate by 4, and a short run goes to undo that.
    nn.init.normal_(network.get_classifier().weight, std=0.01)
    recipe = RECIPES[row.recipe].with_options(dict(row.options))
    binary: nn.Module = binarize(network, recipe, inplace=True)
    return binary


def run(args: argparse.Namespace, model: str, name: str, seed: int) -> dict[str, object]:
    """Train and evaluate one of them; a line of the CSV."""
    images = ImageOptions(
        (3, 32, 32), batch_size=args.batch, workers=0, scale=(0.8, 1.0), crop_pct=1.0
    )
    options = TrainOptions(
        epochs=args.epochs, steps=1, loss="cross-entropy", lr=args.lr, seed=seed, images=images
    )
    training = open_images(args.train, images, training=True).first(args.images)
    test = open_images(args.test, images, training=False)
    network = build(model, ALL[name], seed)
    folder = args.runs / f"{model}-{name}-{args.epochs}-{seed}".replace(" ", "").replace(",", "-")
    resume = (folder / "last.pt").exists()
    trained = train(
        network,
        training,
        options=options,
        run=folder,
        resume=resume,
        watcher=Lines(),
        device=args.device,
    )
    result = evaluate(trained.model, evaluation_loader(test, images), device=args.device)
    shutil.rmtree(folder)
    seconds = sum(row.seconds for row in trained.rows)
    values = (
        model, name, seed, args.images, args.epochs, args.batch, args.lr, round(result.top1, 2),
        round(result.top5, 2), round(trained.rows[-1].train_loss, 4), round(seconds),
        torch.__version__,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def read(path: Path, images: int = IMAGES, epochs: int = EPOCHS) -> list[dict[str, str]]:
    """The lines that are there, of trainings that were as long."""
    lines = csv.DictReader(path.read_text().splitlines() if path.exists() else [])
    wanted = (str(images), str(epochs))
    return [line for line in lines if (line["images"], line["epochs"]) == wanted]


def append(path: Path, line: dict[str, object]) -> None:
    """Add a line in one write, so that processes may share the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerow(line)
    with path.open("a") as stream:
        stream.write(text.getvalue())


def table(lines: Sequence[dict[str, str]], rows: Iterable[str]) -> str:
    """Top-1 by row and network: the mean, and the lowest to highest where there are several."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        found[line["row"], line["model"]].append(float(line["top1"]))
    models = [model for model in MODELS if any(model == known for _, known in found)]
    text = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for row in rows:
        cells = [cell(found[row, model]) for model in models]
        if any(cells):
            text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def cell(values: Sequence[float]) -> str:
    """As in "49.8 (49.1-50.3)"."""
    if not values:
        return ""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train", type=Path, default=Path("cifar10-train.tar"))
    parser.add_argument("--test", type=Path, default=Path("cifar10-test.tar"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cifar10.csv"))
    parser.add_argument("--runs", type=Path, default=Path("cifar10-runs"))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--rows", nargs="+", choices=ALL, metavar="ROW")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.table:
        lines = read(args.out, args.images, args.epochs)
        print(table(lines, [*ROWS, *ABLATIONS]), table(lines, FORMER_ROWS), sep="\n\n")
        return
    torch.set_num_threads(args.threads)
    part, parts = map(int, args.shard.split("/"))
    wanted = list(trials(args.models, args.rows or [*ROWS, *ABLATIONS]))
    for model, name, seed in wanted[part::parts]:
        lines = read(args.out, args.images, args.epochs)
        done = {(line["model"], line["row"], int(line["seed"])) for line in lines}
        if (model, name, seed) in done:
            continue
        print(f"{model}, {name}, seed {seed}", flush=True)
        line = run(args, model, name, seed)
        append(args.out, line)
        print(f"  top-1 {line['top1']}", flush=True)


if __name__ == "__main__":
    main()
