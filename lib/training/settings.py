"""The rarely changed settings of a training run, with their defaults: notebook 02's ``settings``.

    chosen = read_settings({"pooling": "average", "patience": 8})
    chosen.pooling, chosen.margin     # "average", and a default, 0.3

What is changed often are the notebook's own parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lib.programs import UsageError, check_types

_ROW = {"part": "str", "epochs": "int", "learning_rate": "float"}  # of a stage


@dataclass(frozen=True)
class RunSettings:
    """What a training run takes besides data, backbone, batches and stages.

    Attributes:
        pooling, embedding_size, last_stage, precision: of :class:`lib.network.tower.TowerSettings`;
            precision "auto": mixed_bfloat16 where a ResNet is faster so.
        weights_required: stop, rather than go on from others, if the weights can't be had.
        loss: "infonce", "triplet", "soft-margin", "multi-similarity" or "arcface".
        mining: of "triplet" and "soft-margin": "semi-hard", "batch-hard", "batch-all" or "stored".
        margin: of the triplet loss, in squared distance.
        temperature: of InfoNCE.
        cached_variants: of each picture in the feature cache that the head learns from.
        ema_momentum: of a moving average of the weights; 0: none.
        patience: epochs without a better validation mAP before a stage ends.
        pool: pictures that each epoch mines its negatives from; 0: it takes the stored ones.
        memory: photos of former batches that the loss takes as further negatives; 0: none.
        teacher: file of an exported tower, such as another run's ``tower.engine``, whose
            descriptors this one learns too, see :func:`lib.search.descriptors.teacher_descriptors`;
            "": none.
        teacher_share: of that in the loss, from 0 to 1.
        random_stages: the stages in place of the others if there are only random weights.
        compared_epochs: of the heads that compare the losses; 0: leave that out.
        photographs_result: file of results on photographs to print; "": none.
        seed: of weights, order and variation.
    """

    pooling: str = "gem"
    embedding_size: int = 128
    last_stage: int = 5
    precision: str = "float32"
    weights_required: bool = False
    loss: str = "infonce"
    mining: str = "semi-hard"
    margin: float = 0.3
    temperature: float = 0.07
    cached_variants: int = 1
    ema_momentum: float = 0.0
    patience: int = 4
    pool: int = 0
    memory: int = 0
    teacher: str = ""
    teacher_share: float = 0.5
    random_stages: list = (("all", 8, 4e-3),)
    compared_epochs: int = 2
    photographs_result: str = "benchmarks/results/real_training.json"
    seed: int = 1


def read_settings(values: Mapping[str, Any], where: str = "settings") -> RunSettings:
    """The settings with some values changed.

    Args:
        values: by name.
        where: they stand, to begin a message with.

    Raises:
        lib.programs.UsageError: there is no such setting, or its value is of another type.
    """
    types = {field.name: field.type for field in fields(RunSettings)}
    check_types(values, types, where)
    check_stages(values.get("random_stages", []), f"{where}: random_stages")
    return RunSettings(**values)


def check_stages(rows: Iterable, where: str = "stages") -> None:
    """Check the form of stages; :class:`lib.training.stages.Stage` checks the values.

    Args:
        rows: (part, epochs, learning rate at its highest) each.
        where: see :func:`read_settings`.

    Raises:
        lib.programs.UsageError: another form, or a value of another type.
    """
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != len(_ROW):
            raise UsageError(f'{where} holds {row!r:.100}, which is not like ["head", 5, 0.003]')
        check_types(dict(zip(_ROW, row, strict=True)), _ROW, where)
