"""The index against plain numpy, and what it refuses."""

import numpy as np
import pytest
from conftest import unit

from lib.index import PhotoIndex, UnusableIndexError, near_duplicates

MODEL, OTHER_MODEL = "a" * 64, "b" * 64


@pytest.fixture
def embeddings(rng) -> np.ndarray:
    return unit(rng.normal(size=(50, 16))).astype(np.float32)


@pytest.fixture
def index(embeddings) -> PhotoIndex:
    return PhotoIndex.build(embeddings, [f"photo {i} ü" for i in range(50)], MODEL)


def test_search_agrees_with_numpy(index, embeddings, rng):
    queries = unit(rng.normal(size=(4, 16))).astype(np.float32)
    names, similarities = index.search(queries, k=7)
    cosine = queries @ embeddings.T
    order = np.argsort(-cosine, axis=1)[:, :7]
    assert names == [[f"photo {i} ü" for i in row] for row in order]
    np.testing.assert_allclose(similarities, np.take_along_axis(cosine, order, 1), atol=1e-5)


def test_asking_for_more_than_there_is_gives_all_once(index, embeddings):
    names, similarities = index.search(embeddings[:1], k=500)
    assert len(names[0]) == len(set(names[0])) == similarities.shape[1] == 50


def test_a_saved_index_answers_alike(index, embeddings, tmp_path):
    index.save(tmp_path / "gallery.index")
    loaded = PhotoIndex.load(tmp_path / "gallery.index", MODEL)
    assert len(loaded) == 50
    before, after = index.search(embeddings, 5), loaded.search(embeddings, 5)
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.index"]


def test_an_index_of_another_model_is_refused(index, tmp_path):
    index.save(tmp_path / "gallery.index")
    with pytest.raises(UnusableIndexError, match="made by another model"):
        PhotoIndex.load(tmp_path / "gallery.index", OTHER_MODEL)


def test_damaged_files_are_refused(index, tmp_path, rng):
    path = tmp_path / "gallery.index"
    index.save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    for content in (whole[:-100], bytes(flipped), rng.bytes(200), b""):
        path.write_bytes(content)
        with pytest.raises(UnusableIndexError, match=r"gallery\.index is no index"):
            PhotoIndex.load(path, MODEL)
    with pytest.raises(FileNotFoundError):
        PhotoIndex.load(tmp_path / "absent", MODEL)


def test_unsuitable_embeddings_and_queries_are_refused(index, embeddings):
    with pytest.raises(ValueError, match="unit norm"):
        PhotoIndex.build(2 * embeddings, index.names, MODEL)
    with pytest.raises(ValueError, match="unit norm"):
        PhotoIndex.build(np.full((1, 4), np.nan), ["a"], MODEL)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        PhotoIndex.build(embeddings[0], ["a"], MODEL)
    with pytest.raises(ValueError, match="50 embeddings, but 1 names"):
        PhotoIndex.build(embeddings, ["a"], MODEL)
    with pytest.raises(ValueError, match=r"\(q, 16\)"):
        index.search(embeddings[:, :8], 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(embeddings, 0)


def test_near_duplicates_against_brute_force(rng):
    hashes = rng.integers(0, 2**64, size=300, dtype=np.uint64)
    for i in range(0, 120, 2):  # plant pairs that differ in 0 to 5 bits
        bits = rng.permutation(64)[: i // 2 % 6]
        hashes[i + 1] = hashes[i] ^ np.uint64(sum(1 << int(b) for b in bits))
    for most in range(4):
        expected = [
            [a, b]
            for a in range(300)
            for b in range(a + 1, 300)
            if int(hashes[a] ^ hashes[b]).bit_count() <= most
        ]
        assert len(expected) == 10 * (most + 1)
        assert near_duplicates(hashes, most).tolist() == expected
    with pytest.raises(ValueError, match="from 0 to 3"):
        near_duplicates(hashes, 4)
