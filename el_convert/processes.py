"""One training process among several: torchrun's environment, on GPUs or CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process and how many there are.

    Attributes:
        rank: of this one, from 0.
        world: how many.
        local_rank: of this one on its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, sync_norm: bool = False) -> nn.Module:
        """The model with its gradients averaged over all processes."""
        if self.world == 1:
            return model
        if sync_norm:
            convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
            model = convert(model)
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(value) / self.world

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        return float(self.mean(torch.tensor(float(flag), device=device))) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the group that torchrun started; alone without torchrun.

    Args:
        device: "cuda" means NCCL, anything else gloo.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
