"""How much longer a training step of a binarized network takes, and how much more memory.

    python examples/step_time.py

One step is forward, backward and the optimizer's update, of both networks in turns; the ratio is
the median over the rounds. Memory is the peak of each network's process, measured by itself.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from el_convert import binarize


def steps(name: str, recipe: str, batch: int, size: int) -> Callable[[], float]:
    """A function that takes one step and gives its seconds; recipe "float" converts nothing."""
    model: nn.Module = timm.create_model(name, num_classes=10)
    if recipe != "float":
        model = binarize(model, recipe, inplace=True)
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return time.perf_counter() - start

    return step


def most_memory() -> float:
    """What this process has held at most, in MB; Linux alone tells."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak(args: argparse.Namespace, recipe: str) -> float:
    """Peak memory in MB of a process that takes three steps, without what imports take."""
    command = [sys.executable, Path(__file__), args.model, "--recipe", recipe, "--memory"]
    command += ["--batch", str(args.batch), "--size", str(args.size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--recipe", default="elastic-link")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        before = most_memory()
        step = steps(args.model, args.recipe, args.batch, args.size)
        _ = [step() for _ in range(3)]
        print(most_memory() - before)
        return
    makers = [steps(args.model, name, args.batch, args.size) for name in ("float", args.recipe)]
    times = [[step() for step in makers] for _ in range(args.rounds + 2)][2:]
    ratio = statistics.median(binary / plain for plain, binary in times)
    plain, binary = (statistics.median(column) for column in zip(*times, strict=True))
    memory = [peak(args, name) for name in ("float", args.recipe)]
    print(f"{args.model}, {args.recipe}, batch {args.batch}, {args.size} pixels, one thread")
    print(f"step: {1e3 * plain:.0f} ms float, {1e3 * binary:.0f} ms binarized, {ratio:.2f}x")
    print(f"peak: {memory[0]:.0f} MB float, {memory[1]:.0f} MB, {memory[1] / memory[0]:.2f}x")


if __name__ == "__main__":
    main()
