"""The arithmetic of many photos, against an example by hand."""

import pytest

from lib.cluster.capacity import capacity

ROUND = dict(
    workers=10,
    embedded_per_second=100,
    trained_per_second=10,
    efficiency=0.5,
    epochs=4,
    trained_share=0.25,
    photo_bytes=1000,
    dimension=100,
    index_bytes=1,
    index_overhead=1.5,
    replicas=2,
    node_memory=100e6,
    worker_price=3,
    node_price=0.5,
    storage_price=10,
)


def test_an_example_by_hand():
    row = capacity([1_800_000], **ROUND).loc[1_800_000]
    # 1.8 million photos, a quarter of them four times, by 5 photos a second and worker: 360,000 s.
    assert row["training_worker_hours"] == pytest.approx(100)
    assert row["training_hours"] == pytest.approx(10)
    # 1.8 million by 50: 36,000 s.
    assert row["embedding_worker_hours"] == pytest.approx(10)
    assert row["embedding_hours"] == pytest.approx(1)
    assert row["photo_bytes"] == pytest.approx(1.8e9)
    assert row["embedding_bytes"] == pytest.approx(0.72e9)  # 400 bytes each
    assert row["index_bytes"] == pytest.approx(0.54e9)  # 300 bytes each, twice 150
    assert row["search_nodes"] == 6  # 5.4 of them
    assert row["once"] == pytest.approx(330)
    assert row["monthly"] == pytest.approx(2.52 * 10 + 6 * 0.5 * 730)


def test_ten_times_the_photos_take_ten_times_as_much_beyond_the_first_nodes():
    small, large = capacity([10**8, 10**9], **ROUND).to_dict("records")
    for name in small:
        assert large[name] == pytest.approx(10 * small[name]), name
    assert capacity([10], **ROUND)["search_nodes"].tolist() == [2]  # one for each replica


@pytest.mark.parametrize(
    "change", [{"workers": 0}, {"embedded_per_second": -1}, {"efficiency": 1.2}, {"node_price": -1}]
)
def test_numbers_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        capacity([10], **ROUND | change)
