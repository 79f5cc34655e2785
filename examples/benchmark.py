"""Time packed networks against their float originals.

Run `python examples/benchmark.py resnet18 --against torch,onnxruntime,onnxruntime-int8 --layers`.
The networks are untrained: the times do not depend on what was learned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch

from el_convert.benchmark import benchmark, pack_untrained
from el_convert.errors import ElConvertError
from el_convert.peers import PEERS
from el_convert.timings import Benchmark, to_json
from el_convert.zoo import create, find_source, input_spec

SOURCES = {"resnet18": "torchvision/resnet18", "resnet50": "torchvision/resnet50"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1)
@click.option("--batch", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--against", default="torch", show_default=True, help=f"Of {', '.join(PEERS)}.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--layers", is_flag=True, help="Time every packed convolution too.")
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write everything to a file.",
)
def main(models: tuple[str, ...], file: Path | None, against: str, **options: Any) -> None:
    """Time MODELS (resnet18, resnet50 and mobilenetv1_100), packed and in float."""
    peers = [name for name in against.split(",") if name]
    results = []
    for name in models or ("resnet18", "resnet50", "mobilenetv1_100"):
        try:
            result = measure(SOURCES.get(name, name), peers=peers, **options)
        except ElConvertError as error:
            raise click.ClickException(str(error)) from error
        results.append(to_json(result))
        show(result)
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(name: str, **options: Any) -> Benchmark:
    say(f"{name}: building and packing")
    torch.manual_seed(0)
    source = find_source(name)
    model = create(source).eval()
    size = input_spec(model, source).size
    return benchmark(
        pack_untrained(model),
        model,
        input_size=size,
        progress=lambda step: say(f"{name}: {step}"),
        **options,
    )


def say(step: str) -> None:
    click.echo(f"{step} ...", err=True)


def show(result: Benchmark) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(result)
    else:
        click.echo(str(result))


if __name__ == "__main__":
    main()
