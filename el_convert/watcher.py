"""What a training run tells while it goes on."""

from __future__ import annotations

from el_convert.run_state import EpochRow


class Watcher:
    """What a run tells while it goes on; every method may be overridden, none must be."""

    def epoch_starts(self, epoch: int, epochs: int, step: int, batches: int) -> None:
        """An epoch begins, of which `batches` are left."""

    def batch_done(self, loss: float, images: int, lr: float) -> None:
        """A batch of `images` over all processes; `loss` is the epoch's mean so far."""

    def epoch_ends(self, row: EpochRow) -> None:
        """An epoch is complete and stored."""

    def corrupt_image(self, name: str) -> None:
        """An image that does not decode was met for the first time."""
