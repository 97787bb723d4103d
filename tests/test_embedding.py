"""Own photos to embeddings: all of them, in a known order, whatever is wrong with some."""

import keras
import numpy as np
import pytest
from PIL import Image

from lib.embedding import embed_folder
from lib.photos import TestSetError, read_photo


@pytest.fixture(scope="module")
def tower() -> keras.Model:
    """Embeds a photo as the direction of its mean colour."""
    photos = keras.Input((8, 8, 3), dtype="uint8")
    means = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(photos))
    return keras.Model(photos, keras.layers.UnitNormalization()(means))


def save(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path)


def test_all_photos_below_a_folder_are_embedded_by_name(tmp_path, tower):
    colours = {f"{i:02d}.png": (9 * i + 1, 5, 200 - i) for i in range(7)}
    colours |= {"rome/a.jpg": (255, 0, 0), "rome/old/b.JPG": (0, 255, 0)}
    for name, colour in colours.items():
        save(tmp_path / name, colour)
    save(tmp_path / ".hidden" / "c.jpg", (0, 0, 0))
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "rome" / "broken.jpg").write_text("no photo either")
    embeddings, names, skipped = embed_folder(tower, tmp_path, batch_size=3)
    assert names == sorted(colours)
    assert len(skipped) == 1 and "rome/broken.jpg is not a readable picture" in skipped[0]
    for name, embedding in zip(names, embeddings, strict=True):
        mean = read_photo(tmp_path / name, 8).reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_folder_without_a_readable_photo_is_named(tmp_path, tower):
    with pytest.raises(TestSetError, match="holds no photos"):
        embed_folder(tower, tmp_path / "absent")
    (tmp_path / "a.jpg").write_text("no photo")
    with pytest.raises(TestSetError, match=r"none of the photos.*a\.jpg is not a readable"):
        embed_folder(tower, tmp_path)
