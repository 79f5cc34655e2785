"""`el-convert export`."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from el_convert.cli_files import FILE, read_model
from el_convert.console import check_output, errors_as_exits, step

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--to", "format", type=click.Choice(list(_SUFFIXES)), default="onnx", show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="File to write: .onnx or .pt2."
)
@click.option("--image-size", type=click.IntRange(1), help="Side, where it is not the model's own.")
@click.option("--float-weights", is_flag=True, help="Weights as float32, in ONNX files.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-4,
    show_default=True,
    help="Largest relative difference from the model with which the file is written.",
)
def export(
    file: Path,
    format: str,
    out: Path,
    image_size: int | None,
    float_weights: bool,
    tolerance: float,
) -> None:
    """Write the network in FILE, packed or not, for another runtime.

    The ONNX file holds standard operators only and takes any batch size. It is written only where
    ONNX Runtime agrees with the model on random images. `--to torch` writes a program of
    torch.export, checked likewise. That is not a safe format: load only what you trust, after
    `import el_convert.kernels`.
    """
    check_output(out, (_SUFFIXES[format],))
    with step("loading torch"):
        from el_convert.exporting import export as export_model
        from el_convert.zoo import input_spec
    with errors_as_exits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file is of an untrained model shows elsewhere
        model, source, _ = read_model(file)
        size = input_spec(model.eval(), source).size
        if image_size is not None:
            size = (size[0], image_size, image_size)
        with step("exporting and comparing"):
            done = export_model(
                model,
                out,
                format=format,
                input_size=size,
                float_weights=float_weights,
                tolerance=tolerance,
            )
    reader, kind = "ONNX Runtime", f"opset {done.opset}"
    if format == "torch":
        reader, kind = "the program", "any batch" if done.any_batch else "one image at a time"
    click.echo(
        f"wrote {out} ({done.bytes / 1e6:.1f} MB, {kind}): {done.packed} convolutions "
        f"{'as float32' if float_weights else 'at 1 bit'}; {reader} differs by "
        f"{done.error:.1e} on {done.images} images"
    )
