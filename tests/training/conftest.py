"""What the tests of a training share: the small world's photos in two parts."""

import numpy as np
import pytest

from lib.data.catalogue import build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings


@pytest.fixture(scope="module")
def parts(shards):
    catalogue = build_catalogue(shards)
    return catalogue, split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)


@pytest.fixture
def handler(parts) -> DatasetHandler:
    catalogue, part = parts
    settings = DataSettings(image_size=16, batch_size=4, seed=1)
    return DatasetHandler(catalogue, settings, part == "train")


@pytest.fixture(scope="module")
def validation(parts) -> np.ndarray:
    catalogue, part = parts
    handler = DatasetHandler(catalogue, DataSettings(image_size=16), part == "validation")
    return handler.photos(handler.validation_triplets(50))
