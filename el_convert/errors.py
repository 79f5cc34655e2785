"""The errors users see: each says what, where, why, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElConvertError(Exception):
    """Base of every error this package raises on purpose."""


class ConversionError(ElConvertError, ValueError):
    """A model cannot be converted; the message names the layer, the reason and the way out."""


class SourceError(ElConvertError, ValueError):
    """A source names what it must not: another hub, an unknown argument, an absurd value."""


class CheckpointError(ElConvertError, ValueError):
    """A file cannot be written or was refused when read; nothing was changed."""


class DataError(ElConvertError, ValueError):
    """Images cannot be trained or evaluated on; the message names the file or folder."""


class TrainingError(ElConvertError, RuntimeError):
    """Training cannot start, or had to stop; the message says what is kept and where."""


class ExportError(ElConvertError, RuntimeError):
    """A model cannot be exported, or what was exported does not agree; nothing was written."""


class UnknownNameError(ElConvertError, LookupError):
    """A model, recipe, field, pattern or glob that does not exist; carries the nearest names.

    Args:
        kind: what was looked up, as in "model" or "recipe field".
        name: what the user wrote.
        known: every name that exists.
        hint: what to type to see all names.

    Example:
        >>> str(UnknownNameError("recipe", "elastic", ["elastic-link", "plain"]))
        "unknown recipe 'elastic'; did you mean 'elastic-link'?"
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], hint: str = "", *, like: str = ""
    ) -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest_names(like or name, known)
        guess = " or ".join(repr(near) for near in self.nearest)
        advice = f"did you mean {guess}?" if guess else hint
        super().__init__(f"unknown {kind} {name!r}" + (f"; {advice}" if advice else ""))


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says, as in "TypeError: 'Proxy' object ..."."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def first_few(items: Iterable[str], count: int = 3) -> str:
    """ "a; b; c; and 2 more"."""
    listed = list(items)
    more = [f"and {len(listed) - count} more"] if len(listed) > count else []
    return "; ".join(listed[:count] + more)


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The up to `count` names most like `name`, best first."""
    candidates = sorted(set(known))
    close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.6)
    # What difflib scores low: one name inside the other ("elastic" in "elastic-link").
    inside = [known_name for known_name in candidates if name and name in known_name]
    return tuple(dict.fromkeys([*close, *sorted(inside, key=len)]))[:count]
