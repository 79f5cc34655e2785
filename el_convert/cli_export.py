"""`el-convert export`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from el_convert.cli_files import FILE, read_model
from el_convert.console import check_output, errors_as_exits, step

if TYPE_CHECKING:
    from el_convert.exporting import Exported

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--to", "format", type=click.Choice(list(_SUFFIXES)), default="onnx", show_default=True
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write: .onnx, .pt2, or .xml for OpenVINO.",
)
@click.option("--image-size", type=click.IntRange(1), help="Side, where it is not the model's own.")
@click.option("--float-weights", is_flag=True, help="Weights as float32, in ONNX files.")
@click.option("--batch", type=click.IntRange(1), help="Images in a run; OpenVINO.  [default: 1]")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-4,
    show_default=True,
    help="Largest relative difference from the model with which an image agrees; most must.",
)
def export(
    file: Path,
    format: str,
    out: Path,
    image_size: int | None,
    float_weights: bool,
    batch: int | None,
    tolerance: float,
) -> None:
    """Write the network in FILE, packed or not, for another runtime.

    The ONNX file holds standard operators only and takes any batch size. OpenVINO's .xml and the
    .bin beside it run on OpenVINO's own 1-bit convolutions on x86 CPUs. Either is written only
    where the runtime agrees with the model on most of five random images. `--to torch` writes a
    program of torch.export, checked likewise. That is not a safe format: load only what you trust,
    after `import el_convert.kernels`.
    """
    check_output(out, (_SUFFIXES[format],))
    _check_options(format, float_weights, batch)
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
                batch=batch,
                tolerance=tolerance,
            )
    if format == "openvino":
        _say_openvino(done, tolerance)
        return
    reader, kind = "ONNX Runtime", f"opset {done.opset}"
    if format == "torch":
        reader, kind = "the program", "any batch" if done.any_batch else "one image at a time"
    click.echo(
        f"wrote {out} ({done.bytes / 1e6:.1f} MB, {kind}): {done.packed} convolutions "
        f"{'as float32' if float_weights else 'at 1 bit'}; {reader} "
        f"{_how_close(done, tolerance)}"
    )


def _how_close(done: Exported, tolerance: float) -> str:
    """ "differs by ...", and where some images do not agree, how many do and why that may be."""
    if done.agreeing == done.images:
        return f"differs by {done.error:.1e} on {done.images} images"
    return (
        f"agrees to {tolerance:.0e} on {done.agreeing} of {done.images} images and differs by up "
        f"to {done.error:.1e} on the others, where rounding took a value near zero to its other "
        "side, and a sign with it"
    )


def _check_options(format: str, float_weights: bool, batch: int | None) -> None:
    if format != "openvino" and batch is not None:
        raise click.UsageError("--batch is for --to openvino")
    if format != "onnx" and float_weights:
        raise click.UsageError("--float-weights is for --to onnx")


def _say_openvino(done: Exported, tolerance: float) -> None:
    """What runs at 1 bit and how well it agrees, then what stays in float, by reason."""
    click.echo(
        f"wrote {done.path} and {done.path.with_suffix('.bin').name} ({done.bytes / 1e6:.1f} MB): "
        f"OpenVINO runs {len(done.binary)} convolutions as BinaryConvolution at 1 bit and "
        f"{len(done.in_float)} in float; it {_how_close(done, tolerance)}"
    )
    for reason in dict.fromkeys(reason for _, reason in done.in_float):
        names = [name for name, why in done.in_float if why == reason]
        click.echo(f"in float, {reason}: {', '.join(names)}")
