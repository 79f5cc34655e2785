"""Export one model of every class of timm and torchvision and write what comes of it, a line each.

    python -m tests.export_sweep                   what the record does not hold yet
    python -m tests.export_sweep 'timm/resnet*'    these, anew
    python -m tests.export_sweep --table           the record as a table

Each model has a process of its own, with a limit of time and memory, so that a crash or a hang is
recorded as such. A run that was stopped goes on where it was. Models are untrained; their norms
are uneven, have seen some images, and gates are at 1, so that outputs are finite, no activation
saturates and a lost layer shows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from el_convert.agreement import random_images
from el_convert.atomic import replace_file
from el_convert.calibration import calibrate
from el_convert.convert import binarize
from el_convert.errors import ElConvertError, first_line
from el_convert.exporting import export

if TYPE_CHECKING:
    from zoo_trials import Trial

RECORD = Path(__file__).with_name("export_sweep.tsv")
SECONDS, BYTES = 300, 14 << 30  # of one core, of address space
_SLOWER = 4  # times that is waited for at most, as other programs want the core too
_REASON = 150  # characters of a reason in the record


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        library, cls, model: its names.
        side: of the square images, in pixels.
        outcome: "agrees", "refused" (with a reason, by `export`), "error" (another exception),
            "crash" or "timeout".
        packed: how many convolutions the file holds at 1 bit a weight.
        error: the largest difference of ONNX Runtime, relative to an image's largest output.
        megabytes: size of the file.
        seconds: of the export, differs from run to run.
        reason: why there is no file, or on how many images a written one does not agree.
    """

    library: str
    cls: str
    model: str
    side: int
    outcome: str
    packed: int = 0
    error: float = 0.0
    megabytes: float = 0.0
    seconds: float = 0.0
    reason: str = ""

    @property
    def name(self) -> str:
        """As `el-convert` takes it."""
        return f"{self.library}/{self.model}"

    def line(self) -> str:
        numbers = (f"{self.error:.1e}", f"{self.megabytes:.2f}", f"{self.seconds:.1f}")
        return "\t".join([*map(str, astuple(self)[:6]), *numbers, self.reason])

    @classmethod
    def parse(cls, line: str) -> Row:
        library, kind, model, side, outcome, packed, error, size, seconds, reason = line.split("\t")
        counts = (int(packed), float(error), float(size), float(seconds))
        return cls(library, kind, model, int(side), outcome, *counts, reason)


def attempt(trial: Trial) -> Row:
    """Export one model in this process."""
    library, _, bare = trial.name.partition("/")
    model = _told_apart(trial.build())
    row = Row(library, type(model).__name__, bare, trial.side, "agrees")
    inputs = trial.inputs()[0]
    size = tuple(inputs[0].shape)
    binary = binarize(model, trial.recipe().with_options({"link.gamma_init": 1.0}), inplace=True)
    with suppress(Exception):  # a forward that does not run is for `export` to refuse
        calibrate(binary, [(random_images(8, size), None)])
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = export(binary.eval(), Path(folder) / "model.onnx", input_size=size)
    except ElConvertError as error:
        return replace(
            row, outcome="refused", seconds=time.perf_counter() - start, reason=str(error)
        )
    except Exception as error:  # recorded, and to be mended
        return replace(row, outcome="error", reason=first_line(error))
    took = time.perf_counter() - start
    apart = done.images - done.agreeing
    reason = f"{apart} of {done.images} images differ" if apart else ""
    figures = {"packed": done.packed, "error": done.error, "megabytes": done.bytes / 1e6}
    return replace(row, **figures, seconds=took, reason=reason)


def _told_apart(model: nn.Module) -> nn.Module:
    """With heads that start at 0 any two outputs would agree."""
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1 and not value.any():
                value.normal_(0, 0.1)
    return model


def _child(trial: Trial, result: Connection) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 10))
    result.send(attempt(trial))


def guarded(trial: Trial, cls: str) -> Row:
    """Export one model in a process of its own."""
    library, _, bare = trial.name.partition("/")
    lost = Row(library, cls, bare, trial.side, "crash")
    late = replace(lost, outcome="timeout", reason=f"more than {SECONDS} s of one core")
    context = multiprocessing.get_context("fork")  # the libraries are imported already
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(trial, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS * _SLOWER):
            return late
        row: Row = ours.recv()
        return replace(row, reason=" ".join(row.reason.split())[:_REASON])
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGXCPU:
            return late
        return replace(lost, reason=signal.Signals(-code).name if code < 0 else f"exit {code}")
    finally:
        process.kill()
        process.join()


def read(path: Path = RECORD) -> dict[str, Row]:
    """The rows of a record by name; none where there is no file. The last of a model counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [Row.parse(line) for line in lines if not line.startswith(("#", "library\t"))]
    return {row.name: row for row in rows}


def header() -> str:
    libraries = ("timm", "torchvision", "torch", "onnxscript", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"# {versions}\n" + "\t".join(field.name for field in fields(Row)) + "\n"


def write(rows: dict[str, Row]) -> None:
    ordered = sorted(rows.values(), key=lambda row: (row.library, row.cls.lower(), row.model))
    text = header() + "".join(row.line() + "\n" for row in ordered)
    replace_file(RECORD, lambda part: _write_text(part, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sweep(chosen: list[Trial]) -> Iterator[Row]:
    """Export models, small ones first, adding each row to the record as it comes."""
    from zoo_sweep import SNAPSHOT
    from zoo_sweep import read as read_zoo

    known = {row.name: row for row in read_zoo(SNAPSHOT)}
    if not RECORD.is_file():
        write({})
    # Where a float transformer surrounds one convolution there is most to wait for.
    for trial in sorted(chosen, key=lambda t: (t.stem_only, known[t.name].convolutions)):
        row = guarded(trial, known[trial.name].cls)
        with RECORD.open("a", encoding="utf-8") as stream:
            stream.write(row.line() + "\n")
        yield row


def table(rows: dict[str, Row]) -> str:
    """The record as Markdown."""
    lines = [
        "| library | class | model | side | 1-bit convolutions | MB | difference |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for row in rows.values():
        found = f"{row.packed} | {row.megabytes:.1f} | {row.error:.0e}"
        if row.outcome != "agrees":
            found = f" | | {row.outcome}: {row.reason}"
        lines.append(f"| {row.library} | {row.cls} | {row.model} | {row.side} | {found} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("glob", nargs="?")
    parser.add_argument("--table", action="store_true", help="print the record")
    options = parser.parse_args()
    known = read()
    if options.table:
        print(table(known))
        return 0
    sys.path.insert(0, str(Path(__file__).parent))  # tests import each other from their folder
    from zoo_trials import TRIALS

    torch.set_num_threads(1)
    wanted = [
        trial
        for trial in TRIALS
        if (fnmatchcase(trial.name, options.glob) if options.glob else trial.name not in known)
    ]
    for number, row in enumerate(sweep(wanted), 1):
        print(f"{number}/{len(wanted)}", row.line(), file=sys.stderr)
    rows = read()
    write(rows)
    counts = Counter(row.outcome for row in rows.values())
    print(*(f"{count:5} {outcome}" for outcome, count in counts.most_common()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
