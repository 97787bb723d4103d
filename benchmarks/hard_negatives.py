"""Are negatives from a pool, or from former batches, worth more than those of the batch?

    python -m benchmarks.hard_negatives [PHOTOS ...] [--whole] [--write]

Trains heads, or with ``--whole`` whole networks (:mod:`benchmarks.short_trainings`), on the demo
world and on each PHOTOS, a folder of photos for each landmark. Each way is InfoNCE, or the triplet
loss with semi-hard mining, over the batch alone (as notebook 02 does), with stored negatives mined
from a pool, or with a memory of former batches; besides, the triplet loss over mined triplets alone
(:class:`lib.training.stages.TrainingSettings`). ``--write`` keeps the result in
``benchmarks/results/hard_negatives.json`` (of whole networks: ``hard_negatives_whole.json``), with
nothing of the photographs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.short_trainings import EPOCHS, Stages, Way, measure, run
from lib.data.catalogue import Catalogue
from lib.network.losses import InfoNCE, TripletLoss
from lib.network.mining import Stored
from lib.programs import program
from lib.training.stages import TrainingSettings

SIZE = 96
POOL = MEMORY = 1000
_BATCH_ALONE = {"InfoNCE": InfoNCE(), "triplet": TripletLoss()}
_HARDER = {"": {}, " + pool": {"pool": POOL}, " + memory": {"memory": MEMORY}}


def ways(stages: Stages) -> dict[str, Way]:
    """Each loss over the batch alone, with a pool and with a memory; and mined from the pool."""
    found = {
        f"{name}{more}": Way(TrainingSettings(stages, loss, patience=EPOCHS, **settings))
        for name, loss in _BATCH_ALONE.items()
        for more, settings in _HARDER.items()
    }
    mined = replace(found["triplet + pool"].settings, loss=TripletLoss(mining=Stored()))
    return found | {"triplet, pool alone": Way(mined)}


def measured(catalogue: Catalogue, scratch: Path, stages: Stages) -> dict[str, dict]:
    """The mAP of each way, against its loss over the batch alone."""
    found = ways(stages)
    against = {way: n for way in found for n in _BATCH_ALONE if way.startswith(n) and way != n}
    return measure(catalogue, lambda _: found, against, SIZE, scratch)


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    return run("hard_negatives", measured, {"size": SIZE, "pool": POOL, "memory": MEMORY}, given)


if __name__ == "__main__":
    sys.exit(main())
