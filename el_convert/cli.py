"""The `el-convert` command. Thin: results on stdout, progress on stderr, torch imported late."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from el_convert._version import __version__
from el_convert.cli_export import export
from el_convert.cli_files import FILE, OUT, OUT_HELP, read_model
from el_convert.cli_report import report
from el_convert.cli_training import calibrate, evaluate, train
from el_convert.console import check_model_output, errors_as_exits, print_result, step
from el_convert.errors import UnknownNameError, nearest_names

if TYPE_CHECKING:
    from torch import nn

    from el_convert.recipes import Recipe
    from el_convert.report import Summary


class ModelFirst(click.Group):
    """A group whose first argument may be a model name, which means `convert`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        options = [opt for param in self.commands["convert"].params for opt in param.opts]
        before = [
            opt for opt in options if incomplete.startswith("-") and opt.startswith(incomplete)
        ]
        models = _complete_model(ctx, None, incomplete)
        return [*super().shell_complete(ctx, incomplete), *map(CompletionItem, before), *models]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL --out FILE [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...")


def _complete_model(_: click.Context, __: Any, incomplete: str) -> list[CompletionItem]:
    from el_convert.catalog import bare_names, model_names

    names = model_names() if "/" in incomplete else bare_names()
    return [CompletionItem(name) for name in names if incomplete and name.startswith(incomplete)]


def _complete_recipe(_: click.Context, __: Any, incomplete: str) -> list[str]:
    from el_convert.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


def _complete_field(_: click.Context, __: Any, incomplete: str) -> list[str]:
    from el_convert.recipes import RECIPES

    names = RECIPES["elastic-link"].option_names()
    return [f"{name}=" for name in names if name.startswith(incomplete)]


@click.group(cls=ModelFirst, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="el-convert")
def main() -> None:
    """Turn a torchvision or timm MODEL into a binarized network with Elastic-Link gates.

    \b
      el-convert resnet50 --out bnn.pt      convert and save
      el-convert resnet50 --dry-run         only show what would happen
      el-convert models 'mobilenet*'        list models
      el-convert pack bnn.pt --out small.pt store a trained network at 1 bit
      el-convert inspect bnn.pt             show what a file holds
      el-convert report bnn.pt --out r.html write a page about it
      el-convert bench small.pt             time it against its float original

    `el-convert convert --help` lists the options. The converted network must be trained.
    """


@main.command()
@click.argument("model", shell_complete=_complete_model)
@click.option("--out", type=OUT, help=OUT_HELP)
@click.option(
    "--recipe", default="elastic-link", show_default=True, shell_complete=_complete_recipe
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a recipe field.",
    shell_complete=_complete_field,
)
@click.option("--keep", multiple=True, metavar="GLOB", help="Leave matching layers in float.")
@click.option("--pretrained", is_flag=True, help="Start from the library's trained weights.")
@click.option("--num-classes", type=click.IntRange(0), help="Classes of the classifier.")
@click.option("--dry-run", is_flag=True, help="Show the table, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def convert(
    model: str,
    out: str | None,
    recipe: str,
    options: Sequence[str],
    keep: Sequence[str],
    pretrained: bool,
    num_classes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert MODEL: resnet50 (timm first, then torchvision), timm/NAME or torchvision/NAME."""
    if out is None and not dry_run:
        near = nearest_names(model, main.commands, 1)
        guess = f"; or did you mean `el-convert {near[0]}`?" if near else ""
        raise click.UsageError(f"name the file to write with --out FILE, or use --dry-run{guess}")
    if out is not None:
        check_model_output(out)
    with errors_as_exits():
        chosen = _recipe(recipe, options)
        binary, source = _build(model, chosen, keep, pretrained, num_classes)
        summary = _summarize(binary)
        if out is not None and not dry_run:
            from el_convert.checkpoint import save

            with step(f"writing {out}"):
                save(binary, out, source=source)
    written = None if dry_run else out
    _show(summary, as_json, {"source": str(source), "file": written and str(written)})
    if written is not None and not as_json:
        from el_convert.folders import stored_bytes

        click.echo(f"wrote {written} ({stored_bytes(written) / 1e6:.1f} MB); now train it")


def _recipe(name: str, options: Sequence[str]) -> Recipe:
    from el_convert.recipes import find_recipe

    pairs = [option.partition("=") for option in options]
    for option, (_, equals, _) in zip(options, pairs, strict=True):
        if not equals:
            raise click.BadParameter(f"{option!r} is not FIELD=VALUE", param_hint="--set")
    return find_recipe(name).with_options({key: value for key, _, value in pairs})


def _build(
    name: str,
    recipe: Recipe,
    keep: Sequence[str],
    pretrained: bool,
    num_classes: int | None,
) -> tuple[nn.Module, Any]:
    with step("loading torch"):
        from el_convert.convert import binarize
        from el_convert.zoo import create, find_source, source_of
    # torch.hub says on stdout what it downloads.
    with step(f"building {name}"), redirect_stdout(sys.stderr):
        source = find_source(name, num_classes=num_classes)
        model = create(source, pretrained=pretrained)
    with step(f"binarizing {name}"):
        return binarize(model, recipe, keep=keep, inplace=True), source_of(model)


def _summarize(model: nn.Module) -> Summary:
    from el_convert.errors import ConversionError
    from el_convert.report import summarize

    with step("counting operations"):
        try:
            return summarize(model)
        except ConversionError as error:
            click.echo(f"operations left out: {error}", err=True)
            return summarize(model, ())


def _show(summary: Summary, as_json: bool, extra: dict[str, Any]) -> None:
    if as_json:
        click.echo(json.dumps({**extra, **summary.to_dict()}))
    else:
        print_result(summary)


@main.command()
@click.argument("glob", default="*", shell_complete=_complete_model)
def models(glob: str) -> None:
    """List the models whose name matches GLOB, and how many convolutions would be binarized.

    In a terminal "52 of 53"; piped, tab-separated: name, binarized, convolutions.
    """
    with step("listing models"):
        from el_convert.catalog import LIST_MODELS, bare_names, model_names, snapshot_counts

        names = model_names(glob)
    if not names:
        with errors_as_exits():
            raise UnknownNameError("model", glob, bare_names(), LIST_MODELS)
    counts = snapshot_counts()
    wide = sys.stdout.isatty()
    for name in names:
        binarized, total = map(str, counts.get(name, ("?", "?")))
        line = (
            f"{name:<56} {binarized:>4} of {total:>4}" if wide else f"{name}\t{binarized}\t{total}"
        )
        click.echo(line)


@main.command()
@click.argument("file", type=FILE)
@click.option("--out", type=OUT, required=True, help=OUT_HELP)
@click.option("--half", is_flag=True, help="Store what stays float in float16.")
def pack(file: Path, out: str, half: bool) -> None:
    """Store the weights of a trained FILE at 1 bit each.

    The file must be of a timm or torchvision model; FILE itself stays as it is.
    """
    check_model_output(out)
    with step("loading torch"):
        from el_convert.checkpoint import load, save
        from el_convert.errors import first_few
        from el_convert.folders import stored_bytes
        from el_convert.packing import pack, slow_layers
    with errors_as_exits():
        with step(f"reading {file}"):
            model = load(file).eval()
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            packed = pack(model, inplace=True)
        for doubt in doubts:
            click.echo(f"warning: {doubt.message}", err=True)
        with step(f"writing {out}"):
            save(packed, out, half=half)
    slow = [f"{path}: {why}" for path, why in slow_layers(packed)]
    if slow:
        click.echo(f"{len(slow)} layers run in plain torch: {first_few(slow)}", err=True)
    before, after = stored_bytes(file), stored_bytes(out)
    click.echo(f"wrote {out} ({after / 1e6:.1f} MB, {before / after:.1f}x smaller than {file})")


@main.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def inspect(file: Path, as_json: bool) -> None:
    """Show what a saved FILE holds."""
    with step("loading torch"):
        from el_convert.folders import stored_bytes
    with errors_as_exits():
        model, source, header = read_model(file)
        summary = _summarize(model)
    versions = ", ".join(f"{name} {v}" for name, v in (header.created_with or {}).items())
    size = stored_bytes(file)
    extra: dict[str, Any] = {
        "source": str(source),
        "file": str(file),
        "created_with": versions,
    }
    extra |= {"packed": header.packed, "bytes": size}
    if not as_json:
        kind = "packed, " if header.packed else ""
        stored = header.stored or header.dtype
        click.echo(f"{file}: {source}, {kind}{stored}, {size / 1e6:.1f} MB, written by {versions}")
    _show(summary, as_json, extra)


@main.command()
@click.argument("model", metavar="FILE_OR_MODEL", shell_complete=_complete_model)
@click.option(
    "--against",
    default="torch",
    show_default=True,
    help="What to compare with, separated by commas: torch, torch-compile, onnxruntime, "
    "onnxruntime-int8, openvino, openvino-binary. What is not installed is named and left out.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--layers", is_flag=True, help="Time every packed convolution too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def bench(model: str, against: str, as_json: bool, **options: Any) -> None:
    """Time a packed network against its float original, in turns.

    Takes a file of `pack` or of a conversion, which is then packed in memory, or the name of a
    model, whose weights are then random.
    """
    with step("loading torch"):
        from el_convert.benchmark import benchmark
        from el_convert.peers import find_peers
        from el_convert.timings import to_json
        from el_convert.zoo import input_spec
    with errors_as_exits():
        peers = [name for name in against.split(",") if name]
        find_peers(peers)
        packed, original, source = _contestants(model)
        result = benchmark(
            packed,
            original,
            input_size=input_spec(original, source).size,
            peers=peers,
            progress=lambda step: click.echo(f"{step} ...", err=True),
            **options,
        )
    if as_json:
        click.echo(json.dumps(to_json(result), indent=1))
    else:
        print_result(result)


def _contestants(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """The packed model, a float one of the same architecture, and where both come from."""
    from el_convert.benchmark import pack_untrained
    from el_convert.folders import is_saved
    from el_convert.packing import pack
    from el_convert.zoo import create, find_source

    if not is_saved(name):
        source = find_source(name)
        with step(f"building and packing {name}"), redirect_stdout(sys.stderr):
            original = create(source).eval()
            return pack_untrained(original), original, source
    model, source, header = read_model(Path(name))
    packed = model.eval()
    if not header.packed:
        with step(f"packing {name}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how well it was trained does not matter here
            packed = pack(packed, inplace=True)
    return packed, create(source).eval(), source


for _command in (train, evaluate, calibrate, export, report):
    main.add_command(_command)
