"""Are negatives from a pool, or from former batches, worth more than those of the batch?

    python -m benchmarks.hard_negatives [PHOTOS ...] [--write]

Trains heads (:mod:`benchmarks.trained_heads`) on the demo world and on each PHOTOS, a folder of
photos for each landmark. Each way is InfoNCE, or the triplet loss with semi-hard mining, over the
batch alone (as notebook 02 does), with stored negatives mined from a pool, or with a memory of
former batches; besides, the triplet loss over mined triplets alone
(:class:`lib.training.stages.TrainingSettings`). ``--write`` keeps the result in
``benchmarks/results/hard_negatives.json``, with nothing of the photographs.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.trained_heads import EPOCHS, HEAD, Way, measure, run
from lib.network.losses import InfoNCE, TripletLoss
from lib.network.mining import Stored
from lib.programs import program
from lib.training.stages import TrainingSettings

SIZE = 96
POOL = MEMORY = 1000
_BATCH_ALONE = {"InfoNCE": InfoNCE(), "triplet": TripletLoss()}
_HARDER = {"": {}, " + pool": {"pool": POOL}, " + memory": {"memory": MEMORY}}
WAYS = {
    f"{name}{more}": Way(TrainingSettings(HEAD, loss, patience=EPOCHS, **settings))
    for name, loss in _BATCH_ALONE.items()
    for more, settings in _HARDER.items()
}
_MINED = replace(WAYS["triplet + pool"].settings, loss=TripletLoss(mining=Stored()))
WAYS["triplet, pool alone"] = Way(_MINED)
AGAINST = {
    way: name for way in WAYS for name in _BATCH_ALONE if way.startswith(name) and way != name
}


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    settings = {"size": SIZE, "pool": POOL, "memory": MEMORY}
    return run(
        "hard_negatives",
        lambda catalogue, scratch: measure(catalogue, lambda _: WAYS, AGAINST, SIZE, scratch),
        settings,
        given,
    )


if __name__ == "__main__":
    sys.exit(main())
