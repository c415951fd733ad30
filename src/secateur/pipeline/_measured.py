"""What a run has measured and decides by: kept with its work, so that it decides the same when it goes on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from secateur.architecture import Architecture
from secateur.artifact import atomic_file
from secateur.errors import ArtifactError
from secateur.latency import LatencyRecord
from secateur.pipeline._disk import told_of_disk


@dataclass(eq=False)
class Measurements:
    """The measured numbers of one run.

    A time is never the same twice. A run that is interrupted and measured again would find another network than it
    would have found; so it does not.

    Attributes:
        path: The file; None keeps them in memory alone.
        seconds: Of layers and whole models, by what was measured, as a `secateur.latency.Cache` has them.
        pairs: The original and a candidate side by side, by the digest of the candidate's architecture.
    """

    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    pairs: dict[str, LatencyRecord] = field(default_factory=dict[str, LatencyRecord])

    @classmethod
    def at(cls, path: Path | None) -> "Measurements":
        """Those of a file that `Measurements` wrote; none if it is not there.

        Raises:
            ArtifactError: If it is damaged.
        """
        if path is None or not path.is_file():
            return cls(path)
        try:
            content = cast(dict[str, Any], json.loads(path.read_text()))
            seconds = {str(what): float(value) for what, value in content["seconds"].items()}
            pairs = {str(name): LatencyRecord.from_json(record) for name, record in content["pairs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ArtifactError(
                f"The unfinished run in {path.parent} is damaged ({path.name}: {error}). Begin again with --restart."
            ) from error
        return cls(path, seconds, pairs)

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Keep what was measured of layers and whole models.

        Raises:
            ArtifactError: If it cannot be written.
        """
        if dict(seconds) != self.seconds:
            self.seconds = dict(seconds)
            self._write()

    def pair(self, architecture: Architecture, measured: Callable[[], LatencyRecord]) -> LatencyRecord:
        """The original and a candidate side by side, measured now if it never was.

        Raises:
            ArtifactError: If it cannot be written.
        """
        name = hashlib.sha256(json.dumps(architecture.to_json(), sort_keys=True).encode()).hexdigest()
        if name not in self.pairs:
            self.pairs[name] = measured()
            self._write()
        return self.pairs[name]

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"seconds": self.seconds, "pairs": {name: record.to_json() for name, record in self.pairs.items()}}
        with told_of_disk(self.path.parent), atomic_file(self.path) as part:
            part.write_text(json.dumps(content, indent=1))
