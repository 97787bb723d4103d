"""Ground truths: made-up files of each format, hostile ones, and Oxford's own if it is there."""

import copyreg
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from lib.data.labelled import read_folder
from lib.evaluation import ground_truth
from lib.evaluation.ground_truth import (
    GroundTruth,
    GroundTruthError,
    from_labels,
    read_landmarks,
    read_revisited,
)
from lib.evaluation.metrics import REVISITED, query_table

OXFORD = Path(__file__).parents[3] / "shared" / "ground_truth" / "gnd_roxford5k.mat"

IMAGES, QUERIES = [f"image_{i}" for i in range(8)], ["first", "second"]
EASY, HARD, JUNK = [[0, 3], []], [[1], [2, 5, 7]], [[4], [0]]
BOXES = [[136.5, 34.1, 648.5, 955.7], [0.0, 1.0, 10.0, 20.0]]


def content(array=list, **changes) -> dict:
    """What a file of the revisited benchmarks holds; its lists are made by ``array``."""
    gnd = [
        {"bbx": array(box), "easy": array(easy), "hard": array(hard), "junk": array(junk)}
        for box, easy, hard, junk in zip(BOXES, EASY, HARD, JUNK, strict=True)
    ]
    return {"imlist": IMAGES, "qimlist": QUERIES, "gnd": gnd} | changes


def integers(values: list, dtype="<i8") -> np.ndarray:
    return np.array(values, dtype="<f8" if float in map(type, values) else dtype)


def write_pickle(folder: Path, content, protocol: int | None = None) -> Path:
    path = folder / "gnd.pkl"
    path.write_bytes(content if protocol is None else pickle.dumps(content, protocol))
    return path


def lists(truth: GroundTruth) -> tuple[list, list]:
    """Positives and junk as sorted lists."""
    return tuple([sorted(n.tolist()) for n in part] for part in (truth.positives, truth.junk))


def check_levels(levels: dict[str, GroundTruth]) -> None:
    assert list(levels) == ["easy", "medium", "hard"]
    assert lists(levels["easy"]) == ([[0, 3], []], [[1, 4], [0, 2, 5, 7]])
    assert lists(levels["medium"]) == ([[0, 1, 3], [2, 5, 7]], [[4], [0]])
    assert lists(levels["hard"]) == ([[1], [2, 5, 7]], [[0, 3, 4], [0]])
    for truth in levels.values():
        assert truth.queries == QUERIES and truth.gallery == IMAGES
        np.testing.assert_array_equal(truth.boxes, BOXES)


# --------------------------------------------------------------------------------------------------
# Oxford and Paris revisited
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        list,
        integers,
        lambda values: integers(values, ">i4"),
        lambda values: integers(values, "u1"),
        lambda values: np.asfortranarray(integers(values).reshape(1, -1)),
        lambda values: list(integers(values)),  # numpy's own numbers in a list
    ],
    ids=["list", "int64", "big-endian", "bytes", "matrix", "scalars"],
)
def test_pickles_of_lists_and_arrays(tmp_path, protocol, array):
    check_levels(read_revisited(write_pickle(tmp_path, content(array), protocol)))


def python_2(value) -> bytes:
    """Opcodes of protocol 2 as Python 2 wrote them: its strings are bytes, in arrays, too."""

    def string(data: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(data)) + data

    if isinstance(value, str):
        return string(value.encode())
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2(v) for item in value.items() for v in item) + b"u"
    empty = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00t" + string(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + string(value.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in value.shape) + b"t"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"


def test_pickles_of_python_2(tmp_path):
    written = content(integers)
    written["gnd"][0]["junk"] = np.array([4])
    data = b"\x80\x02" + python_2(written) + b"."
    # It is what Python 3 takes for a pickle of Python 2.
    assert pickle.loads(data, encoding="latin1")["imlist"] == IMAGES
    check_levels(read_revisited(write_pickle(tmp_path, data)))


def test_mat_files_count_from_one(tmp_path):
    def matlab(values: list) -> np.ndarray:
        return np.array(values if float in map(type, values) else [v + 1.0 for v in values])

    path = tmp_path / "gnd.mat"
    names = {key: np.array(content()[key], dtype=object) for key in ("imlist", "qimlist")}
    savemat(path, content(matlab) | names)
    check_levels(read_revisited(path))


def test_a_mat_file_with_a_single_query(tmp_path):
    path = tmp_path / "gnd.mat"
    gnd = {"bbx": BOXES[0], "easy": 1, "hard": [], "junk": []}
    savemat(path, {"imlist": "only", "qimlist": "q", "gnd": gnd}, do_compression=True)
    truth = read_revisited(path)["easy"]
    assert (truth.queries, truth.gallery, lists(truth)) == (["q"], ["only"], ([[0]], [[]]))
    savemat(path, {"imlist": "only", "qimlist": "q", "gnd": gnd | {"easy": 0}})
    with pytest.raises(GroundTruthError, match=r"query 0 \('q'\): photo -1 is not in the gallery"):
        read_revisited(path)


class Hostile:
    """Asks to be rebuilt by a call."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, protocol):
    mark = tmp_path / "executed"
    for call in (
        (os.system, f"touch {mark}"),
        (eval, f"open({str(mark)!r}, 'w')"),
        (open, mark, "w"),
    ):
        for hostile in (Hostile(*call), content(imlist=[Hostile(*call)])):
            data = pickle.dumps(hostile, protocol)
            path = write_pickle(tmp_path, data)
            with pytest.raises(
                GroundTruthError, match=r"asks for \w+\.(system|eval|open).*refused"
            ):
                read_revisited(path)
            assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(os.system, f"touch {mark}"), protocol))
    assert mark.exists()  # else the test would show nothing


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (global_("numpy", "load"), "asks for numpy.load"),
        (global_("numpy.core.multiarray", "fromfile"), "asks for numpy.core.multiarray.fromfile"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93", "asks for numpy.dtype.__new__"),
        (global_("numpy", "dtype") + b"(X\x01\x00\x00\x00OtR", "an array of 'O', not of numbers"),
        (global_("numpy", "dtype") + b"}b", "changes a function"),
        (global_("numpy", "dtype") + b")\x81", "can't be read"),
        (global_("__builtin__", "bytes") + b"(J\xff\xff\xff\x7ftR", "can't be read"),
        (global_("_codecs", "encode") + b"(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR", "in 'hex'"),
        (b"\x82\x01", "asks for os.system"),  # an object that copyreg knows by a number
        (b"Psomething\n", "can't be read"),
        (b"Nr\xff\xff\xff\x7f", "no 2147483647 objects"),  # would take gigabytes of room
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", "can't be read"),  # so would such a string
        (b"N", "no dictionary"),
        (b"", "can't be read"),
    ],
)
def test_pickles_can_do_nothing_else(tmp_path, monkeypatch, data, message):
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))
    path = write_pickle(tmp_path, data + b".")
    with pytest.raises(GroundTruthError, match=message) as caught:
        read_revisited(path)
    assert "gnd.pkl" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(["a"]), "array of 'U1', not of numbers"),
        (np.array([None]), "array of 'O8', not of numbers"),
        (np.array([1j]), "array of 'c16', not of numbers"),
        (np.array([0.5]), r"query 0 \('first'\): easy has a number that is not whole"),
        (np.array([np.nan]), r"query 0 \('first'\): easy has a number that is not whole"),
        ("photos", r"query 0 \('first'\): easy is no list of numbers"),
        ([[1], [2, 3]], r"query 0 \('first'\): easy is no list of numbers"),
        ([2, 8], r"query 0 \('first'\): photo 8 is not in the gallery of 8"),
        ([2, -1], r"query 0 \('first'\): photo -1 is not in the gallery of 8"),
        ([2, 2], r"query 0 \('first'\): a photo is twice among the positives"),
        ([2, 4], r"query 0 \('first'\): photo 4 \('image_4'\) is both positive and junk"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_wrong_lists_are_named_by_their_query(tmp_path, protocol, array, message):
    wrong = content()
    wrong["gnd"][0]["easy"] = array
    path = write_pickle(tmp_path, wrong, protocol)
    with pytest.raises(GroundTruthError, match=message):
        read_revisited(path)


def test_an_array_is_as_large_as_its_bytes(tmp_path):
    data = pickle.dumps(content(integers), 2)
    assert data.count(b"K\x02\x85") == 1  # the shape (2,) of the first list
    path = write_pickle(tmp_path, data.replace(b"K\x02\x85", b"K\x03\x85"))
    with pytest.raises(GroundTruthError, match=r"2 numbers for an array of \(3,\)"):
        read_revisited(path)


def test_wrong_files_are_refused(tmp_path, monkeypatch):
    for wrong, message in (
        (content(imlist="abc"), "imlist is no list of names"),
        (content(qimlist=[1, 2]), "qimlist is no list of names"),
        (content(imlist=[]), "there are no photos in the gallery"),
        (content(imlist=["a", "a"]), "'a' is twice among the photos"),
        (content(qimlist=["a", "a"]), "'a' is twice among the queries"),
        (content(gnd=content()["gnd"][:1]), "gnd is no list of 2 queries"),
        (content(gnd=[None, None]), r"query 0 \('first'\): bbx has 0 numbers instead of 4"),
        (content(gnd=[{"bbx": BOXES[0]}] * 2), r"query 0 \('first'\): it has no list easy"),
    ):
        with pytest.raises(GroundTruthError, match=message):
            read_revisited(write_pickle(tmp_path, wrong, 4))
    wrong = content()
    wrong["gnd"][1]["bbx"] = [5, 5, 5, 9]
    with pytest.raises(GroundTruthError, match=r"query 1 \('second'\): the box .* x1 < x2"):
        read_revisited(write_pickle(tmp_path, wrong, 4))

    path = write_pickle(tmp_path, content(), 4)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GroundTruthError, match="can't be read"):
        read_revisited(path)
    (tmp_path / "gnd.mat").write_bytes(b"MATLAB 5.0" * 40)
    with pytest.raises(GroundTruthError, match=r"gnd\.mat: it can't be read"):
        read_revisited(tmp_path / "gnd.mat")
    with pytest.raises(GroundTruthError, match="can't be read"):
        read_revisited(tmp_path / "absent.pkl")
    monkeypatch.setattr(ground_truth, "LARGEST", 100)
    with pytest.raises(GroundTruthError, match="never more than"):
        read_revisited(write_pickle(tmp_path, content(), 4))


def literal_evaluation(ranks: np.ndarray, gnd: list, positives: list, junk: list) -> list:
    """mAP and mP@1, 5, 10 in percent, by the plain definitions, from MATLAB's own numbers."""
    rows = []
    for ranking, entry in zip(ranks.tolist(), gnd, strict=True):
        good, bad = (
            {int(number) - 1 for kind in kinds for number in np.atleast_1d(entry[kind])}
            for kinds in (positives, junk)
        )
        if not good:
            continue
        kept = [photo for photo in ranking if photo not in bad]
        found, area, before = 0, 0.0, 1.0
        last = max(kept.index(photo) for photo in good) + 1
        for rank, photo in enumerate(kept, start=1):
            if photo in good:
                found += 1
                area += (before + found / rank) / 2 / len(good)
            before = found / rank
        row = [area]
        for k in (1, 5, 10):
            depth = min(last, k)
            row.append(sum(photo in good for photo in kept[:depth]) / depth)
        rows.append(row)
    return np.mean(rows, axis=0).tolist()


@pytest.mark.skipif(not OXFORD.is_file(), reason="gnd_roxford5k.mat is not at hand")
def test_revisited_oxford_is_measured_as_its_authors_define_it(rng):
    levels = read_revisited(OXFORD)
    counts = {
        level: (
            sum(map(len, truth.positives)),
            sum(map(len, truth.junk)),
            sum(len(numbers) == 0 for numbers in truth.positives),
        )
        for level, truth in levels.items()
    }
    assert counts == {"easy": (3029, 3853, 2), "medium": (5526, 1356, 0), "hard": (2497, 4385, 0)}
    assert len(levels["easy"].queries) == 70 and len(levels["easy"].gallery) == 4993
    assert levels["easy"].queries[0] == "all_souls_000013"
    assert levels["easy"].boxes[0].tolist() == [136.5, 34.1, 648.5, 955.7]

    gnd = loadmat(OXFORD, simplify_cells=True)["gnd"]
    # Made-up descriptors in which the photos of a query's landmark come near it, hard ones less.
    photos, queries = rng.normal(size=(4993, 32)), rng.normal(size=(70, 32))
    for query, entry in zip(queries, gnd, strict=True):
        photos[np.atleast_1d(entry["easy"]).astype(int) - 1] += 0.5 * query
        photos[np.atleast_1d(entry["hard"]).astype(int) - 1] += 0.2 * query
        photos[np.atleast_1d(entry["junk"]).astype(int) - 1] += 0.3 * query
    ranks = np.argsort(-queries @ photos.T, axis=1)
    kinds = {
        "easy": (["easy"], ["hard", "junk"]),
        "medium": (["easy", "hard"], ["junk"]),
        "hard": (["hard"], ["easy", "junk"]),
    }
    for level, truth in levels.items():
        table = query_table(ranks, truth, REVISITED)
        means = table[list(REVISITED)].mean()
        expected = literal_evaluation(ranks, gnd, *kinds[level])
        np.testing.assert_allclose(means, expected, rtol=0, atol=1e-12, err_msg=level)
        without = [len(numbers) == 0 for numbers in truth.positives]
        for name in REVISITED:
            assert table[name].isna().tolist() == without
        assert 0.05 < means["AP"] < 0.95


# --------------------------------------------------------------------------------------------------
# Google Landmarks v2
# --------------------------------------------------------------------------------------------------

INDEX = ["aa", "bb", "cc", "dd"]
SOLUTION = """id,images,Usage
q1,bb dd,Private
q2,None,Ignored
q3,aa,Public
q4,,Ignored
q5,cc aa,Private
"""


def write_solution(folder: Path, text: str) -> Path:
    path = folder / "solution.csv"
    path.write_text(text)
    return path


def test_read_landmarks(tmp_path):
    path = write_solution(tmp_path, SOLUTION)
    private, public = (read_landmarks(path, INDEX, usage) for usage in ("Private", "Public"))
    assert private.queries == ["q1", "q5"] and public.queries == ["q3"]
    assert lists(private) == ([[1, 3], [0, 2]], [[], []])
    assert lists(public) == ([[0]], [[]])
    assert private.gallery == INDEX and private.boxes is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q6,aa zz,Private", "image 'zz' is not in the index"),
        ("q1,aa,Public", "query 'q1' is there twice"),
        ("q2,aa,Public", "query 'q2' is there twice"),
        ("q6,,Public", "query 'q6' has no images"),
        ("q6,None,Public", "image 'None' is not in the index"),
        ("q6,aa,public", "usage 'public' is none of Public, Private, Ignored"),
        ("q6,aa bb aa,Public", "query 'q6' lists an image twice"),
        ("q6,aa,Ignored", "query 'q6' is ignored, but has images"),
        ("q6,aa", "it is not id,images,Usage"),
        (",aa,Public", "it is not id,images,Usage"),
    ],
)
def test_errors_of_a_solution_name_its_line(tmp_path, line, problem):
    path = write_solution(tmp_path, f"{SOLUTION}{line}\nq9,aa,Public\n")
    with pytest.raises(GroundTruthError, match=rf"solution\.csv, line 7: {problem}"):
        read_landmarks(path, INDEX, "Private")


def test_files_that_are_no_solution_are_refused(tmp_path):
    for text, problem in (
        ("", r"line 1: the columns must be"),
        (
            "id,landmark_id\na,1\n",
            r"line 1: the columns must be id,images,Usage, not id,landmark_id",
        ),
        ("id,images,Usage\nq1,aa,Public\n", "usage 'Private': there are no queries"),
    ):
        with pytest.raises(GroundTruthError, match=problem):
            read_landmarks(write_solution(tmp_path, text), INDEX, "Private")
    with pytest.raises(GroundTruthError, match="'aa' is twice among the photos in the gallery"):
        read_landmarks(write_solution(tmp_path, SOLUTION), [*INDEX, "aa"], "Private")
    (tmp_path / "solution.csv").write_bytes(b"id,images,Usage\n\xff\xfe,aa,Public\n")
    for path in (tmp_path / "solution.csv", tmp_path / "absent.csv"):
        with pytest.raises(GroundTruthError, match="can't be read as a CSV file"):
            read_landmarks(path, INDEX, "Private")


# --------------------------------------------------------------------------------------------------
# Photos with labels
# --------------------------------------------------------------------------------------------------


def test_each_labelled_photo_is_a_query_and_left_out_of_its_own_ranking():
    truth = from_labels(["c", "a", "d", "b"], ["x", "y", "x", "x"])
    assert truth.queries == truth.gallery == ["c", "a", "d", "b"]
    assert lists(truth) == ([[2, 3], [], [0, 3], [0, 2]], [[0], [1], [2], [3]])


def test_the_first_photo_by_name_of_each_landmark_is_the_query():
    truth = from_labels(["c", "a", "d", "b"], ["x", "y", "x", "x"], queries="first")
    assert truth.queries == ["a", "b"] and truth.gallery == ["c", "a", "d", "b"]
    assert lists(truth) == ([[], [0, 2]], [[1], [3]])


def test_labels_of_a_folder_with_photos(tmp_path):
    for name in ("arch/2.jpg", "arch/1.jpg", "tower/9.jpg", "tower/10.jpg", "tower/8.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    photos = read_folder(tmp_path).table
    truth = from_labels(photos["image_id"], photos["landmark_id"], queries="first")
    assert truth.queries == ["arch/1.jpg", "tower/10.jpg"]
    found = [[truth.gallery[i] for i in numbers] for numbers in truth.positives]
    assert found == [["arch/2.jpg"], ["tower/8.jpg", "tower/9.jpg"]]


def test_wrong_labels_are_refused():
    with pytest.raises(GroundTruthError, match="2 names, but 1 labels"):
        from_labels(["a", "b"], ["x"])
    with pytest.raises(GroundTruthError, match="'a' is twice among the queries"):
        from_labels(["a", "a"], ["x", "x"])
    for queries in ("all", "first"):
        with pytest.raises(GroundTruthError, match="there are no queries"):
            from_labels([], [], queries)
    with pytest.raises(ValueError, match="queries must be 'all' or 'first'"):
        from_labels(["a"], ["x"], "each")


def test_a_ground_truth_is_checked_when_it_is_made():
    one = [np.array([0])]
    none = [np.array([], dtype=int)]
    for arguments, problem in (
        ((["q"], ["a"], one, none * 2), "1 queries, but positives of 1 and junk of 2"),
        ((["q"], ["a"], [np.array([0.0])], none), r"query 0 \('q'\): positives must be int"),
        ((["q"], ["a"], none, [np.array([[0]])]), r"query 0 \('q'\): junk must be int \(n,\)"),
        ((["q"], ["a"], one, none, np.zeros((2, 4))), r"boxes must be \(q, 4\), got \(2, 4\)"),
        ((["q"], ["a"], one, none, np.array([[0, 0, np.inf, 1]])), r"query 0 \('q'\): the box"),
    ):
        with pytest.raises(GroundTruthError, match=problem):
            GroundTruth(*arguments)
    # What is junk twice is junk.
    GroundTruth(["q"], ["a", "b"], one, [np.array([1, 1])], np.array([[0.0, 0.0, 1.0, 1.0]]))
