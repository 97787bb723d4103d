"""The index compared with plain NumPy and with a dictionary, and what it refuses.

That a kill at any moment does no harm is in ``tests/search/test_photo_index_kills.py``.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from lib import files as storage
from lib.search import index_files, kinds
from lib.search.index_files import MANIFEST, IndexBusyError
from lib.search.photo_index import (
    IndexSettings,
    PhotoIndex,
    UnusableIndexError,
)
from tests.conftest import unit

MODEL, OTHER_MODEL = "a" * 64, "b" * 64
# Kinds that find all there is to find, and others; of the latter the share of the true ten nearest
# that they must find. Faiss passes over removed photos by itself in some kinds only.
EXACT = (IndexSettings(), IndexSettings("IVF16,Flat", search="nprobe=16"))
RECALL = {
    IndexSettings("IVF16,Flat", search="nprobe=4"): 0.85,
    IndexSettings("SQ8"): 0.95,
    IndexSettings("HNSW16", search="efSearch=64"): 0.95,
    IndexSettings("HNSW16,SQ8", search="efSearch=64", rerank=2): 0.95,
    IndexSettings("PQ8x4", rerank=20): 0.85,
    IndexSettings("PCAR16,IVF8,SQ8", search="nprobe=8", rerank=20): 0.95,
    IndexSettings("IVF8,PQ8x4fs", search="nprobe=8", rerank=40): 0.85,
    IndexSettings("IVF8,RaBitQfs", search="nprobe=8", rerank=40): 0.85,
    IndexSettings("NSG16"): 0.85,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On so few photos, threads that wait for each other take longer than the work."""
    before = kinds.faiss.omp_get_max_threads()
    kinds.faiss.omp_set_num_threads(1)
    yield
    kinds.faiss.omp_set_num_threads(before)


@pytest.fixture
def embeddings(rng) -> np.ndarray:
    return random_units(rng, 50)


@pytest.fixture
def index(embeddings) -> PhotoIndex:
    return PhotoIndex.build(embeddings, [f"photo {i} ü" for i in range(50)], MODEL)


@pytest.fixture
def no_sync(monkeypatch):
    """Skip flushing to the disk."""
    monkeypatch.setattr(storage.os, "fsync", lambda handle: None)


def random_units(rng, n, d=16) -> np.ndarray:
    return unit(rng.normal(size=(n, d))).astype(np.float32)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# --------------------------------------------------------------------------------------------------
# Search
# --------------------------------------------------------------------------------------------------


def test_a_hand_worked_search():
    angles = np.radians([0, 10, 30, 60])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    index = PhotoIndex.build(embeddings, ["0", "10", "30", "60"], MODEL)
    query = np.array([[np.cos(np.radians(22)), np.sin(np.radians(22))]])
    names, similarities = index.search(query, 3)
    assert names == [["30", "10", "0"]]
    np.testing.assert_allclose(similarities, np.cos(np.radians([[8, 12, 22]])), atol=1e-6)
    index.remove(["10"])
    index.add(["21"], [[np.cos(np.radians(21)), np.sin(np.radians(21))]])
    assert index.search(query, 3)[0] == [["21", "30", "0"]]
    assert index.names == ["0", "30", "60", "21"]


@pytest.mark.parametrize("kind", [*EXACT, *RECALL], ids=str)
def test_kinds_of_index_against_numpy(kind, rng, tmp_path, no_sync):
    # Photos of 40 landmarks; of some 30 % of all are removed, and of one landmark all but one.
    landmark = rng.integers(40, size=2000)
    vectors = random_units(rng, 40, 32)[landmark] + rng.normal(size=(2000, 32)) * 0.1
    vectors = unit(vectors).astype(np.float32)
    queries = vectors[rng.integers(2000, size=50)] + rng.normal(size=(50, 32)) * 0.05
    queries = unit(queries).astype(np.float32)
    names = [str(i) for i in range(2000)]
    PhotoIndex.build(vectors[:1900], names[:1900], MODEL, kind).save(tmp_path / "index")
    index = PhotoIndex.load(tmp_path / "index", MODEL)
    index.add(names[1900:], vectors[1900:])
    live = np.ones(2000, bool)
    for _ in range(2):
        cosine = np.where(live, queries @ vectors.T, -2)
        truth = np.argsort(-cosine, axis=1)[:, :10]
        found, similarities = index.search(queries, 10)
        assert similarities.shape == (50, 10) and similarities.dtype == np.float32
        assert (np.diff(similarities, axis=1) <= 0).all()
        numbers = np.array(found, int)
        assert live[numbers].all() and all(len(set(row)) == 10 for row in found)
        if kind in EXACT:
            assert numbers.tolist() == truth.tolist()
        else:
            hits = [len(set(a) & set(b)) for a, b in zip(numbers, truth, strict=True)]
            assert np.mean(hits) / 10 >= RECALL[kind]
        if kind in EXACT or kind.rerank:
            np.testing.assert_allclose(
                similarities, np.take_along_axis(cosine, numbers, 1), atol=1e-5
            )
        # All photos, each once, although lists and graphs end before.
        everything = index.search(queries[:3], 5000)[0]
        assert all(sorted(row) == sorted(index.names) for row in everything)
        live[rng.random(2000) < 0.3] = False
        live[np.flatnonzero(landmark == 7)[1:]] = False
        if len(index) == 2000:
            index.remove([names[i] for i in np.flatnonzero(~live)])
    index.compact()
    again = PhotoIndex.load(tmp_path / "index", MODEL)
    assert again.names == index.names
    assert again.search(queries, 10)[0] == index.search(queries, 10)[0]


def test_a_query_among_removed_photos_gets_k_results(rng):
    # All 300 photos near the query are gone, and the lists that are searched hold no other.
    near = unit(random_units(rng, 1) + rng.normal(size=(300, 16)) * 0.01).astype(np.float32)
    vectors = np.concatenate([near, random_units(rng, 700)])
    for factory in ("IVF16,Flat", "HNSW16", "PQ8x4fs"):
        index = PhotoIndex.build(vectors, range(1000), MODEL, IndexSettings(factory))
        index.remove(range(300))
        names, similarities = index.search(near[:2], 10)
        assert np.isfinite(similarities).all()
        assert all(len(set(row)) == 10 and min(row) >= 300 for row in names)


@pytest.mark.parametrize("n", [1, 38])
def test_one_list_is_made_of_few_photos_without_a_warning(n, embeddings, capfd):
    """Faiss asked for 39 photos on stderr, in the app and in the notebook on indexes."""
    names = [str(i) for i in range(n)]
    small = PhotoIndex.build(embeddings[:n], names, MODEL, IndexSettings("IVF1,Flat"))
    assert small.search(embeddings[:1], 1)[0] == [["0"]]
    assert "WARNING" not in capfd.readouterr().err


def test_asking_for_more_than_there_is_gives_all_once(index, embeddings):
    names, similarities = index.search(embeddings[:1], k=500)
    assert len(names[0]) == len(set(names[0])) == similarities.shape[1] == 50


def test_an_empty_index_is_filled_later(tmp_path, embeddings):
    kind = IndexSettings("IVF4,Flat", search="nprobe=4")
    PhotoIndex.build(np.empty((0, 16), np.float32), [], MODEL, kind).save(tmp_path / "index")
    index = PhotoIndex.load(tmp_path / "index", MODEL)
    names, similarities = index.search(embeddings[:2], 3)
    assert names == [[], []] and similarities.shape == (2, 0)
    index.add([str(i) for i in range(50)], embeddings)
    index.compact()
    assert PhotoIndex.load(tmp_path / "index", MODEL).search(embeddings[:2], 1)[0] == [["0"], ["1"]]
    index.remove(index.names)
    index.compact()
    assert len(PhotoIndex.load(tmp_path / "index", MODEL)) == 0
    assert files_of(tmp_path / "index").keys() == {MANIFEST}


def test_memory_mapped_embeddings_are_indexed_in_blocks(tmp_path, rng, monkeypatch, no_sync):
    for module in (kinds, index_files):
        monkeypatch.setattr(module, "_BLOCK", 64)
    np.save(tmp_path / "embeddings.npy", random_units(rng, 1000))
    embeddings = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    for kind in EXACT:
        index = PhotoIndex.build(embeddings, range(1000), MODEL, kind)
        index.remove(range(0, 1000, 3))
        index.save(tmp_path / "index")
        index.compact()
        left = np.setdiff1d(np.arange(1000), np.arange(0, 1000, 3))
        expected = left[np.argsort(-(embeddings[:5] @ embeddings[left].T), axis=1)[:, :70]]
        assert index.search(embeddings[:5], 70)[0] == expected.tolist()


# --------------------------------------------------------------------------------------------------
# Saving, loading, changes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [IndexSettings(), IndexSettings("HNSW8", "efSearch=32")], ids=str)
def test_a_saved_index_answers_alike(kind, embeddings, tmp_path):
    index = PhotoIndex.build(embeddings, [f"photo {i} ü\udc80" for i in range(50)], MODEL, kind)
    before = index.search(embeddings, 5)
    index.save(tmp_path / "gallery.index")
    loaded = PhotoIndex.load(tmp_path / "gallery.index", MODEL)
    assert len(loaded) == 50 and loaded.settings == kind
    for one in (index, loaded):
        after = one.search(embeddings, 5)
        assert before[0] == after[0]
        np.testing.assert_array_equal(before[1], after[1])
    kinds = ["index-"] if kind.factory != "Flat" else []
    assert [name[:6] for name in sorted(files_of(tmp_path / "gallery.index"))] == [
        *kinds, "manife", "names-", "vector",
    ]  # fmt: skip
    # Another index replaces it.
    PhotoIndex.build(embeddings[:3], ["a", "b", "c"], OTHER_MODEL).save(tmp_path / "gallery.index")
    assert PhotoIndex.load(tmp_path / "gallery.index", OTHER_MODEL).names == ["a", "b", "c"]
    assert len(files_of(tmp_path / "gallery.index")) == 3
    with pytest.raises(UnusableIndexError, match="made by another model"):
        index.add(["d"], embeddings[:1])
    assert loaded.search(embeddings, 5)[0] == before[0]  # an open index does not change


def test_small_changes_do_not_write_the_large_files_anew(embeddings, tmp_path, rng, no_sync):
    kind = IndexSettings("IVF4,SQ8")
    PhotoIndex.build(embeddings, [str(i) for i in range(50)], MODEL, kind).save(tmp_path)
    large = {name: of for name, of in files_of(tmp_path).items() if name != MANIFEST}
    for i in range(100):
        index = PhotoIndex.load(tmp_path, MODEL)
        index.add([f"new {i}"], random_units(rng, 1))
        if i % 10 == 0:
            index.remove([str(i // 10)])
        assert large.items() <= files_of(tmp_path).items()
        assert len(json.loads((tmp_path / MANIFEST).read_text())["parts"]) <= 8
    assert len(index) == 140 and index.names[40:] == [f"new {i}" for i in range(100)]
    index.compact()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert [part["photos"] for part in manifest["parts"]] == [manifest["photos"]] == [140]
    assert not large.keys() & files_of(tmp_path).keys()


def test_names_are_unique(index, embeddings):
    with pytest.raises(ValueError, match="names must be unique \\('a' comes twice\\)"):
        PhotoIndex.build(embeddings[:3], ["a", "b", "a"], MODEL)
    with pytest.raises(ValueError, match="has a photo 'photo 3 ü' already: remove it first"):
        index.add(["new", "photo 3 ü"], embeddings[:2])
    with pytest.raises(ValueError, match="has no photo 'absent'"):
        index.remove(["photo 3 ü", "absent"])
    assert len(index) == 50
    index.remove(["photo 3 ü"])
    with pytest.raises(ValueError, match="has no photo 'photo 3 ü'"):
        index.remove(["photo 3 ü"])
    index.add(["photo 3 ü"], embeddings[:1])
    assert len(index) == 50 and index.names[-1] == "photo 3 ü"


def test_the_search_can_be_tuned(rng, tmp_path):
    vectors = random_units(rng, 1000)
    kind = IndexSettings("IVF64,SQ4", search="nprobe=1")
    index = PhotoIndex.build(vectors, range(1000), MODEL, kind)
    truth = np.argsort(-(vectors[:100] @ vectors.T), axis=1)[:, :10]

    def recall(index):
        found = index.search(vectors[:100], 10)[0]
        return np.mean([len(set(a) & set(b)) for a, b in zip(found, truth.tolist(), strict=True)])

    index.save(tmp_path)
    before = recall(index)
    index.tune("nprobe=64", rerank=10)
    assert before < 8 and recall(index) > 9.9
    loaded = PhotoIndex.load(tmp_path, MODEL)
    assert loaded.settings == IndexSettings("IVF64,SQ4", "nprobe=64", 10) and recall(loaded) > 9.9
    with pytest.raises(ValueError, match="can't search by 'efSearch=3'"):
        index.tune("efSearch=3", 0)


def test_search_parameters_hold_after_every_way_to_change_them(rng, tmp_path, monkeypatch):
    vectors = random_units(rng, 2000)
    index = PhotoIndex.build(vectors, range(2000), MODEL, IndexSettings("IVF64,Flat"))
    index.remove(range(0, 2000, 10))
    left = np.flatnonzero(np.arange(2000) % 10)
    truth = left[np.argsort(-(vectors[:50] @ vectors[left].T), axis=1)[:, :10]].tolist()
    assert index.search(vectors[:50], 10)[0] != truth
    # After a search all later ones kept the old nprobe: recall 0.16.
    index.tune("nprobe=64", 0)
    assert index.search(vectors[:50], 10)[0] == truth
    # A parameter that is not named keeps its value, which was lost when the index was reopened.
    index.save(tmp_path)
    index.tune("", 0)
    assert index.settings.search == "nprobe=64"
    assert PhotoIndex.load(tmp_path, MODEL).search(vectors[:50], 10)[0] == truth
    # What fails changes nothing. The first parameter had been set before the second was refused,
    # and both before the disk was found full.
    with pytest.raises(ValueError, match="can't search by 'nprobe=1,efSearch=3'"):
        index.tune("nprobe=1,efSearch=3", 0)
    assert index.search(vectors[:50], 10)[0] == truth
    with monkeypatch.context() as patched:
        patched.setattr(index_files, "write_json", full_disk)
        with pytest.raises(OSError, match="full"):
            index.tune("nprobe=1", 0)
    assert index.search(vectors[:50], 10)[0] == truth
    index.compact()
    assert index.search(vectors[:50], 10)[0] == truth
    # Another process has replaced the index: its kind had become the old one again.
    PhotoIndex.build(vectors, range(2000), MODEL, IndexSettings("SQ8")).save(tmp_path)
    index.tune("", 5)
    assert (
        index.settings == PhotoIndex.load(tmp_path, MODEL).settings == IndexSettings("SQ8", "", 5)
    )


def full_disk(*arguments):
    raise OSError("the disk is full")


class AgainstADictionary(RuleBasedStateMachine):
    """Random changes; after each the index holds what a dictionary does."""

    names = Bundle("names")

    @initialize(kind=st.sampled_from([*EXACT, IndexSettings("HNSW8"), IndexSettings("PQ4x4fs")]))
    def build(self, kind):
        self.rng = np.random.default_rng(0)
        self.folder = Path(tempfile.mkdtemp())
        self.kind = kind
        vectors = random_units(self.rng, 60)
        self.expected = {f"first {i}": vector for i, vector in enumerate(vectors)}
        self.index = PhotoIndex.build(vectors, list(self.expected), MODEL, kind)
        self.fresh = 0

    @rule(target=names, n=st.integers(0, 9))
    def add(self, n):
        new = [f"{self.fresh + i}" for i in range(n)]
        self.fresh += n
        vectors = random_units(self.rng, n)
        self.index.add(new, vectors)
        self.expected |= zip(new, vectors, strict=True)
        return multiple(*new)

    @rule(gone=st.lists(consumes(names), max_size=5))
    def remove(self, gone):
        self.index.remove(gone)
        for name in gone:
            del self.expected[name]

    @rule(numbers=st.sets(st.integers(0, 59), max_size=9))
    def remove_of_the_first(self, numbers):
        gone = [f"first {i}" for i in numbers if f"first {i}" in self.expected]
        if len(self.expected) - len(gone) >= 20:  # so many are needed to train
            self.remove(gone)

    @rule(name=names)
    def move(self, name):
        self.index.remove([name])
        del self.expected[name]
        self.expected[name] = random_units(self.rng, 1)[0]
        self.index.add([name], self.expected[name][None])

    @rule()
    def save(self):
        self.index.save(self.folder)

    @rule()
    def load(self):
        if self.index.path:
            self.index = PhotoIndex.load(self.folder, MODEL)

    @rule()
    def compact(self):
        self.index.compact()

    @invariant()
    def holds_the_same(self):
        assert self.index.names == list(self.expected) and len(self.index) == len(self.expected)
        vectors = np.array(list(self.expected.values()))
        queries = random_units(self.rng, 3)
        found, similarities = self.index.search(queries, 7)
        cosine = queries @ vectors.T
        if self.kind in EXACT:
            order = np.argsort(-cosine, axis=1)[:, :7]
            assert found == [[self.index.names[i] for i in row] for row in order]
            expected = np.take_along_axis(cosine, order, 1)
            np.testing.assert_allclose(similarities, expected, atol=1e-5)
        assert all(len(set(row)) == 7 and set(row) <= self.expected.keys() for row in found)
        if self.index.path:
            parts = json.loads((self.folder / MANIFEST).read_text())["parts"]
            listed = {entry["name"] for part in parts for entry in part["files"].values()}
            assert files_of(self.folder).keys() == listed | {MANIFEST}

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def test_random_changes_against_a_dictionary(no_sync):
    check = settings(
        max_examples=30,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    run_state_machine_as_test(AgainstADictionary, settings=check)


# --------------------------------------------------------------------------------------------------
# Several processes, a full disk
# --------------------------------------------------------------------------------------------------


def test_two_writers_keep_each_other_out(index, embeddings, tmp_path):
    index.save(tmp_path)
    before = files_of(tmp_path)
    with storage.only_writer(tmp_path, AssertionError()):
        for change in (
            lambda: index.add(["new"], embeddings[:1]),
            lambda: index.remove(index.names[:1]),
            lambda: index.tune("", 0),
            index.compact,
            lambda: index.save(tmp_path),
        ):
            with pytest.raises(IndexBusyError, match="another process writes to"):
                change()
    assert files_of(tmp_path) == before and len(index) == 50


def test_a_writer_goes_on_from_what_another_left(index, embeddings, tmp_path):
    index.save(tmp_path)
    other = PhotoIndex.load(tmp_path, MODEL)
    other.remove(other.names[:10])
    index.add(["new"], embeddings[:1])
    assert index.names == [f"photo {i} ü" for i in range(10, 50)] + ["new"]
    with pytest.raises(ValueError, match="has a photo 'new' already"):
        other.add(["new"], embeddings[1:2])
    assert PhotoIndex.load(tmp_path, MODEL).names == index.names == other.names


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_readers_see_one_state_while_a_writer_works(factory, embeddings, tmp_path, no_sync):
    names = [str(i) for i in range(50)]
    index = PhotoIndex.build(embeddings, names, MODEL, IndexSettings(factory))
    index.save(tmp_path)
    first = PhotoIndex.load(tmp_path, MODEL)
    answer = first.search(embeddings, 5)
    states = [list(index.names)]
    failures = []

    def write():
        try:
            for i in range(60):
                change = i % 3
                if change == 0:
                    states.append([*index.names, f"new {i}"])
                    index.add([f"new {i}"], embeddings[:1])
                elif change == 1:
                    states.append(index.names[1:])
                    index.remove(index.names[:1])
                else:
                    index.compact()
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    loads = 0
    while writer.is_alive():
        loaded = PhotoIndex.load(tmp_path, MODEL)
        assert loaded.names in states
        found = loaded.search(embeddings, len(loaded))[0]
        assert all(sorted(row) == sorted(loaded.names) for row in found)
        loads += 1
    writer.join()
    assert not failures and loads > 5
    again = first.search(embeddings, 5)  # from files that are deleted by now
    assert again[0] == answer[0]
    np.testing.assert_array_equal(again[1], answer[1])


def test_a_reader_that_comes_late_reads_the_manifest_again(
    index, embeddings, tmp_path, monkeypatch
):
    index.save(tmp_path)
    read_part = index_files._read_part

    def late(*arguments):
        if index.path:
            monkeypatch.setattr(index_files, "_read_part", read_part)
            index.remove(index.names[:10])
            index.compact()  # deletes what the manifest listed before
        return read_part(*arguments)

    monkeypatch.setattr(index_files, "_read_part", late)
    assert PhotoIndex.load(tmp_path, MODEL).names == index.names and len(index) == 40


@pytest.mark.parametrize("room", [0, 2_000, 4_000, 14_000])
def test_a_full_disk_changes_nothing(room, rng, tmp_path):
    # The new files have 12,800 bytes of vectors, some 1,500 of names, 800 of the manifest; the
    # graph, which is not written for an addition, has more than the vectors it contains.
    names = [str(i) for i in range(200)]
    index = PhotoIndex.build(random_units(rng, 200), names, MODEL, IndexSettings("HNSW16"))
    index.save(tmp_path / "index")
    before = files_of(tmp_path / "index")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    new = random_units(rng, 200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        if room < 14_000:
            with pytest.raises(OSError, match="File too large"):
                index.add([f"new {i}" for i in range(200)], new)
        with pytest.raises(OSError, match="File too large"):
            index.compact()
        with pytest.raises(OSError, match="File too large"):
            index.save(tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_of(tmp_path / "index") == before
    assert index.names == PhotoIndex.load(tmp_path / "index", MODEL).names == names
    index.add([f"new {i}" for i in range(200)], new)
    assert len(PhotoIndex.load(tmp_path / "index", MODEL)) == 400


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


def test_an_index_of_another_model_is_refused(index, tmp_path):
    index.save(tmp_path / "gallery.index")
    with pytest.raises(UnusableIndexError, match="made by another model"):
        PhotoIndex.load(tmp_path / "gallery.index", OTHER_MODEL)


def test_damaged_files_are_refused_before_faiss_sees_them(embeddings, tmp_path, rng, monkeypatch):
    names = [str(i) for i in range(50)]
    index = PhotoIndex.build(embeddings, names, MODEL, IndexSettings("IVF4,SQ8"))
    index.save(tmp_path)
    index.remove(["3"])
    index.add(["new"], random_units(rng, 1))
    names = index.names
    whole = files_of(tmp_path)
    assert {name.partition("-")[0] for name in whole} == {
        "vectors", "names", "live", "index", MANIFEST,
    }  # fmt: skip

    def parse(*arguments):
        raise AssertionError("Faiss was given a damaged file")

    for name, content in whole.items():
        path = tmp_path / name
        if name.startswith("index"):
            monkeypatch.setattr(index_files.faiss, "read_index", parse)
        for _ in range(20):
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            try:
                assert PhotoIndex.load(tmp_path, MODEL).names == names
                assert json.loads(path.read_bytes()) == json.loads(content)  # a space, made a tab
            except UnusableIndexError as error:
                assert name in str(error) and "anew" in str(error)
        for damaged in (content[:-2], content[: len(content) // 2], b"", content + b"!"):
            path.write_bytes(damaged)
            with pytest.raises(UnusableIndexError, match=name):
                PhotoIndex.load(tmp_path, MODEL)
        path.unlink()
        with pytest.raises(UnusableIndexError, match=rf"{name} is missing"):
            PhotoIndex.load(tmp_path, MODEL)
        path.write_bytes(content)
        monkeypatch.undo()
    assert PhotoIndex.load(tmp_path, MODEL).names == names


def test_a_damaged_manifest_costs_no_other_file(index, embeddings, tmp_path):
    index.save(tmp_path)
    whole = files_of(tmp_path)
    (tmp_path / MANIFEST).write_bytes(whole[MANIFEST].replace(b"vectors-", b"vectors_"))
    with pytest.raises(UnusableIndexError, match=r"manifest\.json is damaged"):
        index.add(["new"], embeddings[:1])
    assert files_of(tmp_path).keys() == whole.keys()
    index.save(tmp_path)
    assert PhotoIndex.load(tmp_path, MODEL).names == index.names
    assert len(files_of(tmp_path)) == 3


def test_what_is_no_index_is_refused(index, tmp_path, rng):
    with pytest.raises(FileNotFoundError, match="absent"):
        PhotoIndex.load(tmp_path / "absent", MODEL)
    with pytest.raises(UnusableIndexError, match=r"manifest\.json is missing: this is no index"):
        PhotoIndex.load(tmp_path, MODEL)
    old = tmp_path / "old.index"
    for content in (b"PK\3\4", rng.bytes(200), b""):
        old.write_bytes(content)
        with pytest.raises(UnusableIndexError, match=r"old\.index is a file.*build it anew"):
            PhotoIndex.load(old, MODEL)
        with pytest.raises(UnusableIndexError, match="delete it"):
            index.save(old)
    for content in ("[]", "3", "{}", '{"format": "x", "xxh3": ""}'):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(UnusableIndexError, match=r"manifest\.json is damaged"):
            PhotoIndex.load(tmp_path, MODEL)
    (tmp_path / MANIFEST).write_text('{"format": 3, "xxh3": "unknown"}')
    with pytest.raises(UnusableIndexError, match="format 3, of a newer version"):
        PhotoIndex.load(tmp_path, MODEL)


def test_an_index_of_another_dimension_is_refused(index, tmp_path):
    index.save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text()) | {"dimension": 8}
    manifest["xxh3"] = index_files.checksum_of_manifest(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UnusableIndexError, match="does not hold 50 x 8 numbers"):
        PhotoIndex.load(tmp_path, MODEL)


def test_unsuitable_embeddings_queries_and_settings_are_refused(index, embeddings):
    with pytest.raises(ValueError, match="unit norm"):
        PhotoIndex.build(2 * embeddings, index.names, MODEL)
    with pytest.raises(ValueError, match="unit norm"):
        PhotoIndex.build(np.full((1, 4), np.nan), ["a"], MODEL)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        PhotoIndex.build(embeddings[0], ["a"], MODEL)
    with pytest.raises(ValueError, match="50 embeddings, but 1 names"):
        PhotoIndex.build(embeddings, ["a"], MODEL)
    with pytest.raises(ValueError, match=r"\(n, 16\)"):
        index.search(embeddings[:, :8], 1)
    with pytest.raises(ValueError, match=r"\(n, 16\)"):
        index.add(["new"], unit(embeddings[:1, :8]))
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(embeddings, 0)
    for factory in ("Nonsense", "IVF64,Flat", "PQ3"):  # unknown; 50 photos are too few; 16 / 3
        with pytest.raises(ValueError, match=f"can't make an index '{factory}' of 50 x 16"):
            PhotoIndex.build(embeddings, index.names, MODEL, IndexSettings(factory))
    with pytest.raises(ValueError, match="can't search by 'efSearch=3'"):
        kind = IndexSettings("IVF4,Flat", search="efSearch=3")
        PhotoIndex.build(embeddings, index.names, MODEL, kind)
    with pytest.raises(ValueError, match="rerank must be at least 0"):
        IndexSettings("SQ8", rerank=-1)
    with pytest.raises(ValueError, match="compares every photo has no 'nprobe=3'"):
        IndexSettings(search="nprobe=3")


def test_errors_name_the_index_from_any_working_directory(index, embeddings, tmp_path, monkeypatch):
    # Outside the project they had been "no environment.yml in ... or above it".
    index.save(tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UnusableIndexError, match="file is a file, an index is a folder"):
        index.save(Path("file"))
    with pytest.raises(FileNotFoundError, match=r"no index at .*absent"):
        PhotoIndex.load(Path("absent"), MODEL)
    with pytest.raises(
        UnusableIndexError, match="index was made by another model, or by an earlier"
    ):
        PhotoIndex.load(Path("index"), OTHER_MODEL)
    (tmp_path / "index" / MANIFEST).write_text("{")
    with pytest.raises(UnusableIndexError, match=r"manifest\.json is damaged"):
        index.add(["new"], embeddings[:1])


def signed(folder: Path, change) -> None:
    """Change a manifest, its checksum as well."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["xxh3"] = index_files.checksum_of_manifest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("value", [10**12, 10**30, -1, 0, 1.5, "x", None, [], {}, 1e308])
@pytest.mark.parametrize("key", ["rows", "dimension", "bytes", "number", "settings", "files"])
def test_numbers_of_a_manifest_are_not_believed(index, tmp_path, key, value, no_sync):
    """10**12 rows of dimension 0 had been allocated: 8 GB and 36 s before the refusal."""
    index.save(tmp_path)

    def change(manifest):
        part = manifest["parts"][0]
        if key in manifest:
            manifest[key] = value
        elif key in part:
            part[key] = value
            if key == "rows":
                manifest["dimension"] = 0
                part["files"]["vectors"]["bytes"] = 0
        else:
            part["files"]["vectors"][key] = value

    signed(tmp_path, change)
    if (isinstance(value, int) and key == "number") or (key, value) == ("settings", {}):
        assert PhotoIndex.load(tmp_path, MODEL).names == index.names
    else:
        with pytest.raises(UnusableIndexError, match="anew"):
            PhotoIndex.load(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("names", b"{"),
        ("names", b"\xff"),
        ("names", b"[" * 100_000),
        ("names", b"[]"),
        ("names", b"3"),
        ("live", b""),
        ("live", b"\xff" * 99),
        ("index", b"IxF2" + b"\xff" * 200),
        ("index", b""),
    ],
)
def test_content_that_is_not_what_it_should_be_is_damage(rng, tmp_path, kind, content):
    """It had come through as JSONDecodeError, UnicodeDecodeError, MemoryError or RecursionError."""
    index = PhotoIndex.build(random_units(rng, 50), range(50), MODEL, IndexSettings("SQ8"))
    index.remove([3])
    index.save(tmp_path)

    def change(manifest):
        entry = manifest["parts"][0]["files"][kind]
        (tmp_path / entry["name"]).write_bytes(content)
        entry |= {
            "bytes": len(content),
            "xxh3": index_files.checksum(tmp_path / entry["name"]),
        }

    signed(tmp_path, change)
    with pytest.raises(UnusableIndexError, match=f"{kind}-.* is damaged.*anew"):
        PhotoIndex.load(tmp_path, MODEL)


def test_the_index_is_imported_without_heavy_libraries():
    code = "import sys, lib.search.photo_index; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "faiss" in loaded
    assert not loaded & {
        "keras", "tensorflow", "jax", "torch", "openvino", "pandas", "scipy", "sklearn", "seaborn",
        "matplotlib", "PIL", "tqdm", "filelock",
    }  # fmt: skip
