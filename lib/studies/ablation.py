"""Compares poolings on equal terms: the same trunk, triplets and seeds.

The trunk's feature maps are computed once. Each arm of the comparison trains its own head (pooling
and projection) on them, which takes seconds.

    maps = feature_maps(tower, triplets)            # uint8 (n, 3, s, s, 3) -> (n, 3, h, w, c)
    head = train_head(maps, groups, TowerSettings(pooling="max"), training, batch_size=32, seed=0)
"""

from __future__ import annotations

import keras
import numpy as np

from lib.data.sampling import shuffled_passes
from lib.network.losses import MetricLoss
from lib.network.tower import Siamese, TowerSettings, build_head
from lib.training.stages import TrainingSettings, compile_siamese


def train_head(
    maps: np.ndarray,
    groups: np.ndarray,
    settings: TowerSettings,
    training: TrainingSettings,
    batch_size: int,
    seed: int,
) -> keras.Model:
    """Train a head on the feature maps of triplets.

    Args:
        maps: float (n, 3, h, w, c), the maps of anchor, positive and negative.
        groups: int (n, 3); photos of different groups show different landmarks.
        settings: of the head; the settings of the trunk are ignored.
        training: loss, learning rate and stages; every stage trains the head.
        batch_size: triplets per batch.
        seed: of the head's initial weights and the order of the triplets.

    Returns:
        the head: float (n, h, w, c) -> float32 (n, embedding_size).
    """
    keras.utils.set_random_seed(seed)
    head = build_head(maps.shape[2:], settings)
    siamese = Siamese(head, MetricLoss(training.loss, int(groups.max()) + 1))
    rng = np.random.default_rng(seed)
    for stage in training.stages:
        compile_siamese(siamese, training, stage)
        rows = shuffled_passes(len(maps), stage.steps * batch_size, rng)
        for batch in rows.reshape(-1, batch_size):
            siamese.train_on_batch(maps[batch].astype(np.float32), groups[batch])
        siamese.optimizer.finalize_variable_values(siamese.trainable_variables)
    return head
