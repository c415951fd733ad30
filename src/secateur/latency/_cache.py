"""What was measured on this machine, kept for the next time."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from secateur.artifact import atomic_file, this_machine
from secateur.latency._targets import Target

_FORMAT = 1


def cache_folder() -> Path:
    """Where measurements are kept: ``$XDG_CACHE_HOME/secateur/latency``, by default in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "secateur" / "latency"


@dataclass(eq=False)
class Cache:
    """Seconds by what was measured, for one machine and one target: one JSON file.

    The file is named for the processor, the system, the runtime with its version, threads and batch size, so what was
    measured elsewhere is never used. It is written atomically, together with what another process has written since. A
    file that cannot be read or written is as good as none: measuring again costs only time.

    Attributes:
        path: The file.
        seconds: By what was measured, as text.
        asked: What was asked for, in order: what somebody's result depends on.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    _about: dict[str, object] = field(default_factory=dict[str, object])
    asked: dict[str, None] = field(default_factory=dict[str, None], init=False)

    @classmethod
    def of(cls, target: Target, folder: Path | None = None) -> "Cache":
        """The cache of a target on this machine.

        Args:
            target: What is measured on.
            folder: None means `cache_folder`.
        """
        about: dict[str, object] = {"target": target.key, "machine": this_machine()}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = (folder or cache_folder()) / f"{name}.json"
        return cls(path, _read(path), about)

    def get(self, what: str, measured: Callable[[], float]) -> float:
        """The seconds of something, measured now if they are not known; not yet written."""
        if what not in self.seconds:
            self.seconds[what] = measured()
        return self.known(what)

    def known(self, what: str) -> float:
        """The seconds of something that is known."""
        self.asked[what] = None
        return self.seconds[what]

    def write(self) -> None:
        """Write what is known, and what others have written."""
        self.seconds = {**_read(self.path), **self.seconds}
        content = {"format": _FORMAT, **self._about, "seconds": dict(sorted(self.seconds.items()))}
        with contextlib.suppress(OSError), atomic_file(self.path) as part:
            part.write_text(json.dumps(content, indent=0))


def _read(path: Path) -> dict[str, float]:
    try:
        found = cast(dict[str, Any], json.loads(path.read_text()))
        if found["format"] != _FORMAT:
            return {}
        seconds = {str(what): float(value) for what, value in found["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {what: value for what, value in seconds.items() if 0 < value < math.inf}
