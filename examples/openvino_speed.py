"""How much faster OpenVINO runs a network at 1 bit than its float original.

Run `taskset -c 0 python examples/openvino_speed.py`. The networks are untrained: the times do not
depend on what was learned.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import click
import timm
import torch

from el_convert import ElConvertError, export
from el_convert.benchmark import benchmark, pack_untrained

FLOAT, BINARY = "openvino", "openvino-binary"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1)
@click.option("--recipe", default="elastic-link", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--rounds", default=30, show_default=True)
def main(models: tuple[str, ...], recipe: str, image_size: int, rounds: int) -> None:
    """Time MODELS of timm (resnet18 and resnet50), batch 1, on one thread, in turns."""
    for name in models or ("resnet18", "resnet50"):
        try:
            click.echo(measured(name, recipe, (3, image_size, image_size), rounds))
        except ElConvertError as error:
            raise click.ClickException(f"{name}: {error}") from error


def measured(name: str, recipe: str, size: tuple[int, int, int], rounds: int) -> str:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    packed = pack_untrained(model, recipe)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        path = Path(folder) / "model.xml"
        done = export(packed, path, format="openvino", input_size=size)
        result = benchmark(packed, model, input_size=size, peers=(FLOAT, BINARY), rounds=rounds)
    if result.skipped:
        raise click.ClickException("; ".join(f"{one.name}: {one.reason}" for one in result.skipped))
    times = {one.name: one.median for one in result.contestants}
    return (
        f"{name}: {len(done.binary)} convolutions as BinaryConvolution, {len(done.in_float)} in "
        f"float, differs by {done.error:.1e}; OpenVINO float32 {times[FLOAT]:.1f} ms, 1 bit "
        f"{times[BINARY]:.1f} ms: {times[FLOAT] / times[BINARY]:.2f}x; "
        f"packed {times['packed']:.1f} ms"
    )


if __name__ == "__main__":
    main()
