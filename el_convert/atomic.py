"""Writing files so that nothing is ever half-written or lost."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a sibling temporary file, then put it in the place of `path` in one step.

    Args:
        path: the file to create or replace; its folder must exist.
        write: fills the temporary file it is given.

    Raises:
        Whatever `write` raises, an interrupt included; then `path` is as it was and the temporary
        file is gone.
    """
    path = Path(os.path.realpath(path))  # through a link, not in its place
    temporary = path.with_name(f".el_convert-{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
