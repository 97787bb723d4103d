"""Ground truths: made-up files of each format, damaged ones, and Oxford's own if it is there."""

import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from lib.evaluation import ground_truth
from lib.evaluation.ground_truth import (
    GroundTruth,
    GroundTruthError,
    from_labels,
    read_landmarks,
    read_revisited,
)
from lib.evaluation.metrics import REVISITED, query_table
from tools.labelled import read_folder

OXFORD = Path(__file__).parents[3] / "shared" / "ground_truth" / "gnd_roxford5k.mat"

IMAGES, QUERIES = [f"image_{i}" for i in range(8)], ["first", "second"]
EASY, HARD, JUNK = [[0, 3], []], [[1], [2, 5, 7]], [[4], [0]]
BOXES = [[136.5, 34.1, 648.5, 955.7], [0.0, 1.0, 10.0, 20.0]]


def content(matlab=list, **changes) -> dict:
    """What a file of the revisited benchmarks holds, counted from 1; ``matlab`` makes its lists."""
    gnd = [
        {"bbx": matlab(box)}
        | {
            kind: matlab([float(number + 1) for number in numbers])
            for kind, numbers in (("easy", easy), ("hard", hard), ("junk", junk))
        }
        for box, easy, hard, junk in zip(BOXES, EASY, HARD, JUNK, strict=True)
    ]
    return {"imlist": IMAGES, "qimlist": QUERIES, "gnd": gnd} | changes


def write_mat(folder: Path, compressed: bool = False) -> Path:
    path = folder / "gnd.mat"
    names = {key: np.array(content()[key], dtype=object) for key in ("imlist", "qimlist")}
    savemat(path, content(np.array) | names, do_compression=compressed)
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


@pytest.mark.parametrize("compressed", [False, True])
def test_mat_files_count_from_one(tmp_path, compressed):
    check_levels(read_revisited(write_mat(tmp_path, compressed)))


def test_a_mat_file_with_a_single_query(tmp_path):
    path = tmp_path / "gnd.mat"
    gnd = {"bbx": BOXES[0], "easy": 1, "hard": [], "junk": []}
    savemat(path, {"imlist": "only", "qimlist": "q", "gnd": gnd}, do_compression=True)
    truth = read_revisited(path)["easy"]
    assert (truth.queries, truth.gallery, lists(truth)) == (["q"], ["only"], ([[0]], [[]]))
    savemat(path, {"imlist": "only", "qimlist": "q", "gnd": gnd | {"easy": 0}})
    with pytest.raises(GroundTruthError, match=r"query 0 \('q'\): photo -1 is not in the gallery"):
        read_revisited(path)


def test_a_file_of_matlab_s_new_format_is_told_from_a_damaged_one(tmp_path):
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n"
    (tmp_path / "gnd.mat").write_bytes(header)
    with pytest.raises(GroundTruthError, match=r"gnd\.mat: it is of version 7\.3: save .*'-v7'$"):
        read_revisited(tmp_path / "gnd.mat")


def test_a_pickle_is_not_read(tmp_path):
    """A pickle runs what it says; the official .mat beside it holds the same."""
    mark = tmp_path / "executed"
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(f"cos\nsystem\n(Vtouch {mark}\ntR.".encode())
    with pytest.raises(GroundTruthError, match=r"5k\.pkl: only \.mat .*datasets/roxford5k/gnd_rox"):
        read_revisited(tmp_path / "gnd_roxford5k.pkl")
    assert not mark.exists()


# Each of these bytes makes SciPy end the process it runs in: the first is that of a type, the
# second and third are those of dimensions.
@pytest.mark.parametrize(("at", "value"), [(200, 5), (212, 0), (232, 255)])
def test_a_damaged_file_does_not_end_the_process(tmp_path, at, value):
    path = write_mat(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)
    with pytest.raises(GroundTruthError, match=r"gnd\.mat: it can't be read \(signal 11\)"):
        read_revisited(path)


@pytest.mark.long
def test_any_damaged_byte_is_refused_or_harmless(tmp_path):
    data = write_mat(tmp_path).read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(128, len(data), 12):  # of 500 such files none ended the process
        damaged = bytearray(data)
        damaged[at] ^= rng.integers(1, 256)
        (tmp_path / "damaged.mat").write_bytes(damaged)
        try:
            assert list(read_revisited(tmp_path / "damaged.mat")) == ["easy", "medium", "hard"]
        except GroundTruthError as error:
            assert "damaged.mat: " in str(error)


def test_a_small_file_can_not_fill_the_memory(tmp_path, monkeypatch):
    """2 GB of zeros in a file of 2 MB were read before anything was checked."""
    zeros = zlib.compressobj(9)
    header = struct.pack("<8I", 14, 2**31 - 8, 6, 8, 6, 0, 5, 8)  # an array of doubles
    header += struct.pack("<2i2I8s2I", 2**28 - 8, 1, 1, 6, b"imlist", 9, 2**31 - 64)
    packed = zeros.compress(header) + zeros.flush(zlib.Z_FULL_FLUSH)
    packed += 128 * (zeros.compress(bytes(2**24)) + zeros.flush(zlib.Z_FULL_FLUSH))
    path = tmp_path / "gnd.mat"
    start = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    path.write_bytes(start + struct.pack("<2I", 15, len(packed)) + packed)
    assert path.stat().st_size < 3_000_000
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of other tests' processes
    with pytest.raises(GroundTruthError, match=r"it can't be read \(.*MemoryError"):
        read_revisited(path)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child begins as a copy of this one
    assert most < max(1_200_000, own + 200_000) or most == before  # kB
    savemat(path, {"imlist": np.zeros(3000)}, do_compression=True)
    monkeypatch.setattr(ground_truth, "LARGEST", 3000)
    with pytest.raises(GroundTruthError, match="it holds more than 3000 letters"):
        read_revisited(path)


def test_a_file_that_takes_long_is_given_up(tmp_path, monkeypatch):
    """The only limit was a minute."""
    assert '"CPU", 8' in ground_truth._READ_MAT
    endless = ground_truth._READ_MAT.replace('"CPU", 8', '"CPU", 1').replace(
        "from scipy.io import loadmat", "while True: pass"
    )
    monkeypatch.setattr(ground_truth, "_READ_MAT", endless)
    with pytest.raises(GroundTruthError, match=r"gnd\.mat: it can't be read \(signal"):
        read_revisited(write_mat(tmp_path))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (["a"], r"query 0 \('first'\): easy is no list of numbers"),
        ({"a": 1}, r"query 0 \('first'\): easy is no list of numbers"),
        ([0.5], r"query 0 \('first'\): easy has a number that is not whole"),
        ([np.nan], r"query 0 \('first'\): easy has a number that is not whole"),
        ([1e300], r"query 0 \('first'\): easy has a number that is not whole"),
        ("photos", r"query 0 \('first'\): easy is no list of numbers"),
        ([[1], [2, 3]], r"query 0 \('first'\): easy is no list of numbers"),
        ([3, 9], r"query 0 \('first'\): photo 8 is not in the gallery of 8"),
        ([3, 0], r"query 0 \('first'\): photo -1 is not in the gallery of 8"),
        ([3, 3], r"query 0 \('first'\): a photo is twice among the positives"),
        ([3, 5], r"query 0 \('first'\): photo 4 \('image_4'\) is both positive and junk"),
    ],
)
def test_wrong_lists_are_named_by_their_query(monkeypatch, numbers, message):
    wrong = content()
    wrong["gnd"][0]["easy"] = numbers
    monkeypatch.setattr(ground_truth, "_load_mat", lambda path: wrong)
    with pytest.raises(GroundTruthError, match=rf"gnd\.mat: {message}"):
        read_revisited(Path("gnd.mat"))


def test_wrong_contents_are_refused(monkeypatch):
    wrong_box = content()
    wrong_box["gnd"][1]["bbx"] = [5, 5, 5, 9]
    for wrong, message in (
        (content(imlist=7), "imlist is no list of names"),
        (content(imlist=None), "imlist is no list of names"),
        (content(qimlist=[1, 2]), "qimlist is no list of names"),
        (content(imlist=[]), "there are no photos in the gallery"),
        (content(imlist=["a", "a"]), "'a' is twice among the photos"),
        (content(qimlist=["a", "a"]), "'a' is twice among the queries"),
        (content(gnd=content()["gnd"][:1]), "gnd is no list of 2 queries"),
        (content(gnd=None), "gnd is no list of 2 queries"),
        (content(gnd=[None, None]), r"query 0 \('first'\): it has no list bbx"),
        (content(gnd=[{"bbx": []}] * 2), r"query 0 \('first'\): bbx has 0 numbers instead of 4"),
        (content(gnd=[{"bbx": BOXES[0]}] * 2), r"query 0 \('first'\): it has no list easy"),
        (wrong_box, r"query 1 \('second'\): the box .* x1 < x2"),
    ):
        monkeypatch.setattr(ground_truth, "_load_mat", lambda path, wrong=wrong: wrong)
        with pytest.raises(GroundTruthError, match=message):
            read_revisited(Path("gnd.mat"))


def test_files_that_are_no_ground_truth_are_refused(tmp_path, monkeypatch):
    path = write_mat(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GroundTruthError, match="can't be read"):
        read_revisited(path)
    path.write_bytes(b"MATLAB 5.0" * 40)
    with pytest.raises(GroundTruthError, match=r"gnd\.mat: it can't be read"):
        read_revisited(path)
    savemat(path, {"imlist": IMAGES})
    with pytest.raises(GroundTruthError, match=r"gnd\.mat: qimlist is no list of names"):
        read_revisited(path)
    with pytest.raises(GroundTruthError, match="can't be read"):
        read_revisited(tmp_path / "absent.mat")
    monkeypatch.setattr(ground_truth, "LARGEST", 100)
    with pytest.raises(GroundTruthError, match="never more than"):
        read_revisited(path)
    monkeypatch.undo()
    monkeypatch.setattr(ground_truth, "_SECONDS", 0.01)
    with pytest.raises(GroundTruthError, match=r"can't be read \(.*timed out"):
        read_revisited(path)


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
    "content",
    [
        SOLUTION.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig"),
        SOLUTION.replace(",", "\t").encode("utf-16"),
        SOLUTION.replace("id,images,Usage", "ID , Images,usage").replace(",Pri", ", Pri").encode(),
        SOLUTION.replace("\n", ",,\n\n").encode(),
    ],
)
def test_a_solution_that_a_spreadsheet_saved_again(tmp_path, content):
    (tmp_path / "solution.csv").write_bytes(content)
    truth = read_landmarks(tmp_path / "solution.csv", INDEX, "Private")
    assert truth.queries == ["q1", "q5"] and lists(truth) == ([[1, 3], [0, 2]], [[], []])


def test_blank_lines_count_as_lines(tmp_path):
    path = write_solution(tmp_path, SOLUTION.replace("\n", "\n\n") + "q6,aa,Nobody\n")
    with pytest.raises(GroundTruthError, match=r"solution\.csv, line 13: usage 'Nobody'"):
        read_landmarks(path, INDEX, "Public")


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


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        f"q6,{LONG},Private",
        f"q6,aa,{LONG}",
        f"{LONG},,Public",
        f"{LONG},aa,Ignored",
        f"{LONG},aa aa,Public",
        f"{LONG},aa,Public\n{LONG},aa,Public",
    ],
)
def test_a_name_of_any_length_makes_a_short_message(tmp_path, line):
    with pytest.raises(GroundTruthError, match=r"solution\.csv, line \d: .*x{150}") as caught:
        read_landmarks(write_solution(tmp_path, f"{SOLUTION}{line}\n"), INDEX, "Private")
    assert len(str(caught.value)) < 500


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


def test_labels_of_a_folder_with_photos(tmp_path):
    for name in ("arch/2.jpg", "arch/1.jpg", "tower/9.jpg", "tower/10.jpg", "tower/8.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    photos = read_folder(tmp_path).table
    truth = from_labels(photos["image_id"], photos["landmark_id"])
    positives = [{truth.gallery[i] for i in numbers} for numbers in truth.positives]
    found = dict(zip(truth.queries, positives, strict=True))
    assert found["arch/1.jpg"] == {"arch/2.jpg"}
    assert found["tower/10.jpg"] == {"tower/8.jpg", "tower/9.jpg"}


def test_wrong_labels_are_refused():
    with pytest.raises(GroundTruthError, match="2 names, but 1 labels"):
        from_labels(["a", "b"], ["x"])
    with pytest.raises(GroundTruthError, match="'a' is twice among the queries"):
        from_labels(["a", "a"], ["x", "x"])
    with pytest.raises(GroundTruthError, match="there are no queries"):
        from_labels([], [])


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
    for arguments in (
        (["q"] * 2, [LONG] * 2, one * 2, none * 2),
        ([LONG] * 2, ["a"], one * 2, none * 2),
        ([LONG], [LONG], one, one),
    ):
        with pytest.raises(GroundTruthError, match=r"twice|both") as caught:
            GroundTruth(*arguments)
        assert len(str(caught.value)) < 1000
    # What is junk twice is junk.
    GroundTruth(["q"], ["a", "b"], one, [np.array([1, 1])], np.array([[0.0, 0.0, 1.0, 1.0]]))
