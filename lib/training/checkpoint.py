"""Saves and loads a training's checkpoint, a single file with all that a resume needs.

    identity = describe_training(tower, handler, validation, settings)
    checkpoint = Checkpoint.load(run / CHECKPOINT, tower, identity)   # refuses another training's
    checkpoint.restore(tower, loss, optimizer)
    checkpoint.save(tower, loss, optimizer)                           # atomically

A resume needs the network, start weights, pictures and settings of the interrupted training. The
file keeps the settings and digests of the rest, to compare them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import keras
import numpy as np
import xxhash
from keras import ops

from lib.data.dataset import DatasetHandler
from lib.files import check_stored, replacing, show_path
from lib.network.tower import structure

CHECKPOINT = "checkpoint.npz"

_FORMAT = 2  # format 1 had neither a number nor an identity
_PARTS = ("tower", "loss", "optimizer", "best")
_CURE = "choose another run_dir, or delete the file to begin again"
# Of checkpoints that were written before these settings existed.
_BEFORE = {"pool": 0, "memory": 0, "teacher_share": 0.5}


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to change."""


def describe_training(
    tower: keras.Model,
    handler: DatasetHandler,
    validation: np.ndarray,
    settings,
    teacher: np.ndarray | None = None,
) -> dict:
    """Return the identity of a training as JSON values: its settings, and digests of the rest.

    The arguments are those of :func:`lib.training.stages.train`. The training pictures' digest
    covers their landmarks and triplets as well.
    """
    pictures, chosen = handler.catalogue.pictures, np.flatnonzero(handler.chosen)
    images = pictures["image"].to_numpy()
    landmarks = pictures[["landmark", "group"]].to_numpy(np.int64)[chosen]
    # asdict drops the names of classes; repr keeps those of the loss and its miner.
    asked = asdict(handler.settings) | asdict(settings) | {"loss": repr(settings.loss)}
    return {
        "settings": json.loads(json.dumps(asked)),
        "network": _digest(structure(tower).encode()),
        "start": _digest(*tower.get_weights()),
        "training pictures": _digest(*images[chosen], landmarks, *images[handler.triplets].ravel()),
        "validation pictures": _digest(validation),
        "teacher's descriptors": "" if teacher is None else _digest(teacher[chosen]),
    }


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


@dataclass
class Checkpoint:
    """The state of a training after the last epoch of its history, a row for each epoch.

    The history determines the next batches, the current stage and whether that is over.

    Attributes:
        values: the variables of "tower", "loss" (with its random state) and "optimizer"; and
            "best", the weights of tower and loss after the best epoch (at first, at the start).
    """

    path: Path
    identity: dict
    history: list[dict] = field(default_factory=list)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def restore(self, tower, loss, optimizer=None) -> None:
        """Restore all variables; without an optimizer, the best weights, to begin a stage."""
        self._assign(tower.variables, self.values["tower"])
        self._assign(loss.variables, self.values["loss"])
        if optimizer is None:
            self._assign([*tower.weights, *loss.weights], self.values["best"])
        else:
            self._assign(optimizer.variables, self.values["optimizer"])

    def restore_best(self, tower: keras.Model) -> None:
        self._assign(tower.weights, self.values["best"][: len(tower.weights)])

    def _assign(self, variables: list, values: list[np.ndarray]) -> None:
        if [tuple(v.shape) for v in variables] != [v.shape for v in values]:
            raise TrainingError(f"{show_path(self.path)} is of another network: {_CURE}")
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def take_best(self, tower, loss) -> None:
        """Keep the current weights as the best so far; :meth:`save` writes them."""
        self.values["best"] = [*tower.get_weights(), *loss.get_weights()]

    def save(self, tower, loss, optimizer=None) -> None:
        """Write the current values of all variables to the file, atomically."""
        for name, part in zip(_PARTS, (tower, loss, optimizer), strict=False):
            variables = [] if part is None else part.variables
            self.values[name] = [np.array(ops.convert_to_numpy(v)) for v in variables]
        arrays = {f"{n}_{i}": value for n in _PARTS for i, value in enumerate(self.values[n])}
        facts = {"format": _FORMAT, "identity": self.identity, "history": self.history}
        facts["digest"] = _digest(*arrays.values())
        with replacing(self.path) as part:
            np.savez(part, facts=np.array(json.dumps(facts)), **arrays)

    @classmethod
    def load(cls, path: Path, tower: keras.Model, identity: dict) -> Checkpoint:
        """Read the checkpoint of the training with that identity.

        The tower has its start weights, or the best epoch's, as after a finished training.

        Raises:
            TrainingError: the file is damaged, of an earlier format, or of another training.
        """
        try:
            facts, values = _read(path)
            if facts.get("format") == _FORMAT:
                checkpoint = cls(path, facts["identity"], facts["history"], values)
                differences = checkpoint._differences(identity, len(tower.weights))
            else:
                differences = ["another version of this project, which kept no identity in it"]
        except Exception as error:  # damage raises many types, from zipfile, NumPy and json
            reason = f"{type(error).__name__}: {error}"[:200]
            raise TrainingError(f"{show_path(path)} can't be read ({reason}): {_CURE}") from error
        if differences:
            raise TrainingError(f"{show_path(path)} is of {' and '.join(differences)}: {_CURE}")
        return checkpoint

    def _differences(self, identity: dict, weights: int) -> list[str]:
        """Describe what differs from ``identity``; ``weights`` is how many the tower has."""
        found, asked = _BEFORE | self.identity["settings"], identity["settings"]
        changed = [name for name in asked if name not in found or found[name] != asked[name]]
        differences = [f"other settings ({', '.join(changed)})"] if changed else []
        best = _digest(*self.values["best"][:weights])
        if self.identity["network"] != identity["network"]:
            differences.append("another network")
        elif identity["start"] not in (self.identity["start"], best):
            differences.append("other start weights")
        # Earlier checkpoints had no teacher.
        parts = ("training pictures", "validation pictures", "teacher's descriptors")
        return differences + [
            f"other {x}" for x in parts if self.identity.get(x, "") != identity[x]
        ]


def _read(path: Path) -> tuple[dict, dict[str, list[np.ndarray]]]:
    with np.load(path) as arrays:
        check_stored(arrays.zip)
        # All checksums first: NumPy would read less than the whole array if its header is damaged.
        if damaged := arrays.zip.testzip():
            raise ValueError(f"{damaged} is damaged")
        facts = json.loads(str(arrays["facts"]))
        # In the file's order, which is that of the variables.
        names = {part: [n for n in arrays.files if n.startswith(f"{part}_")] for part in _PARTS}
        values = {part: [arrays[name] for name in of_part] for part, of_part in names.items()}
    digest = _digest(*chain.from_iterable(values.values()))
    if facts.get("digest", digest) != digest:  # the archive's list of arrays has no checksum
        raise ValueError("arrays are missing or exchanged")
    [(row["stage"], float(row["val_map"])) for row in facts["history"]]  # raises if one is missing
    return facts, values
