"""Tests of the comparison of kinds of index."""

import faiss
import numpy as np
import pytest

from lib.studies import figures
from lib.studies.index_kinds import PARTS, fastest_of_each, measure_kinds, memory_parts
from lib.studies.index_tuning import memory_of
from tests.conftest import unit

N, D, K = 3000, 16, 10
KINDS = ["Flat", "SQ8", "PQ4np", "HNSW8", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4fs,RFlat"]
KINDS += ["PCAR8,IVF16,Flat", "IVF16,RaBitQfs"]


@pytest.fixture(scope="module")
def indexes():
    rng = np.random.default_rng(5)
    vectors = unit(rng.normal(size=(N + 100, D))).astype(np.float32)
    vectors, queries = vectors[:N], vectors[N:]
    made = {kind: faiss.index_factory(D, kind, faiss.METRIC_INNER_PRODUCT) for kind in KINDS}
    for index in made.values():
        index.train(vectors)
        index.add(vectors)
    return made, queries, made["Flat"].search(queries, K)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_all_the_memory(indexes, kind):
    index = indexes[0][kind]
    parts = memory_parts(index)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == memory_of(index)
    assert 0 <= parts["rest"] < 0.1 * memory_of(index)
    lists, graph = "IVF" in kind, "HNSW" in kind
    assert parts["numbers"] == (8 * N if lists else 0) and bool(parts["links"]) == graph


def test_parts_of_known_kinds(indexes):
    made, *_ = indexes
    assert memory_parts(made["Flat"])["vectors"] == 4 * N * D
    both = memory_parts(made["IVF16,PQ8x4fs,RFlat"])
    assert (both["vectors"], both["codes"]) == (4 * N * D, 4 * N)
    assert both["learned"] == 4 * (16 * D + 16 * D)  # centres, and 16 standard pieces of each
    turned = memory_parts(made["PCAR8,IVF16,Flat"])
    assert turned["vectors"] == 4 * N * 8 and turned["learned"] == 4 * (8 * D + 8 + 16 * 8)


def test_each_setting_is_measured_and_the_fastest_that_finds_enough_chosen(indexes, tmp_path):
    made, queries, exact = indexes
    kinds = {
        "flat": (made["Flat"], "", [0]),
        "IVF": (made["IVF16,Flat"], "nprobe", [1, 16]),
        "PQ": (made["PQ4np"], "", [0]),
    }
    table = measure_kinds(kinds, queries, exact, one_by_one=3)
    assert table["setting"].tolist() == ["", "nprobe=1", "nprobe=16", ""]
    recall = table["recall"].to_numpy()
    assert recall[0] == recall[2] == 1 and recall[1] < 1 > recall[3]
    assert (table[["ms", "ms_at_once"]] > 0).all(axis=None)
    best = fastest_of_each(table, target_recall=1.0)
    assert best["setting"].to_dict() == {"flat": "", "IVF": "nprobe=16", "PQ": ""}
    figures.plot_kinds(table, 0.9, save=tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").stat().st_size > 10_000
