"""Several processes train as one: equal weights, and those of one process with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from pictures import draw_folder

CODE = """
import sys, torch
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pictures import *
from el_convert.datasets import open_images
from el_convert.processes import join_processes
from el_convert.training import train
torch.set_num_threads(1)
with join_processes(torch.device("cpu")) as processes:
    torch.manual_seed(3 + processes.rank)  # the first one's weights count
    images = replace(IMAGES, batch_size=8 // processes.world, auto_augment="rand-m5")
    options = replace(OPTIONS, epochs=3, lr=1e-3, opt="sgd", images=images, accumulate=2)
    network = binarize(float_network(norm_layer="groupnorm1"), "elastic-link")
    opened = open_images({root!r}, images, training=True)
    held_out = open_images({root!r}, images, training=False)
    done = train(network, opened, held_out, options, run={run!r}, processes=processes)
    torch.save([done.model.state_dict(), [r.train_loss for r in done.rows], done.rows[-1].top1],
               {out!r}.format(processes.rank))
"""


def run_world(world: int, root: Path, folder: Path) -> list[tuple[dict[str, torch.Tensor], ...]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = CODE.format(
        tests=str(Path(__file__).parent), root=str(root), run=str(folder / f"run{world}"),
        out=str(folder / f"{world}-{{}}.pt"),
    )  # fmt: skip
    running = []
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        setting = {name: str(value) for name, value in names.items()}
        env = os.environ | setting | {"MASTER_ADDR": "127.0.0.1"}
        running.append(subprocess.Popen([sys.executable, "-c", code], env=env))
    assert [process.wait(300) for process in running] == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "images")
    (alone,) = run_world(1, root, tmp_path)
    first, second = run_world(2, root, tmp_path)
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
        torch.testing.assert_close(value, alone[0][name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(first[1]), torch.tensor(alone[1]), rtol=1e-4, atol=1e-4)
    assert first[1] == second[1]
    assert first[2] == second[2]
