"""Public benchmarks in miniature: official layouts, fetched from a server, judged as defined."""

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lib.evaluation.ground_truth import read_revisited
from lib.files import project_root, read_json
from lib.network.engine import Engine
from tests.kaggle import serving
from tests.network.test_hub import needs_keras_hub, save_preset
from tools import benchmark, fetch, official
from tools.official import OfficialError, Remote, open_set

OXFORD = project_root().parent / "shared" / "ground_truth" / "gnd_roxford5k.mat"


def photo(seed: int, width: int = 60, height: int = 40) -> bytes:
    """A picture of large patches, as a file."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    picture = Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def archive(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@dataclass
class Server:
    """Serves files by name, and remembers from which byte on it was asked for them."""

    files: dict[str, bytes]
    hang_up_after: int | None = None
    resumes: bool = True
    asked: list[tuple[str, int]] = field(default_factory=list)

    def serving(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.resumes else 0
                server.asked.append((name, start))
                content = server.files.get(name)
                if content is None:
                    return self.send_error(404)
                if start >= len(content) > 0 and start:
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][: server.hang_up_after])

            def log_message(self, *_):
                pass

        return serving(Handler)


def colours(batch: np.ndarray) -> np.ndarray:
    """A descriptor: the mean colours of the four quarters, less grey."""
    h, w = batch.shape[1] // 2, batch.shape[2] // 2
    quarters = [batch[:, y : y + h, x : x + w].mean(axis=(1, 2)) for y in (0, h) for x in (0, w)]
    found = np.concatenate(quarters, axis=1) - 128
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """Runs the program on sets below tmp_path / "sets"; returns its result and what it printed."""
    engine = Engine(colours, 4096, 12, "colours", "numpy", (1.0,))
    monkeypatch.setattr(benchmark, "open_network", lambda *_: engine)

    def run(name, *options, status=0):
        out = ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "sets")]
        assert benchmark.main([name, *out, *options]) == status
        printed = capsys.readouterr()
        if status:
            return printed.err
        return read_json(tmp_path / "out" / "metrics.json")["benchmark"], printed.out

    return run


# --------------------------------------------------------------------------------------------------
# Fetching
# --------------------------------------------------------------------------------------------------


def test_a_broken_transfer_goes_on_and_a_damaged_file_is_refused(tmp_path):
    content = bytes(range(256)) * 40_000
    sha256 = hashlib.sha256(content).hexdigest()
    server = Server({"a.tar": content, "md5.txt": hashlib.md5(content).hexdigest().encode()})
    with server.serving() as url:
        remote = Remote(f"{url}/a.tar", sha256, f"{url}/md5.txt")
        server.hang_up_after = 5_000_000
        with pytest.raises(fetch.FetchError, match="what has arrived is kept; or put the file at"):
            fetch.fetch(remote, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.tar.arriving"]
        server.hang_up_after = None
        assert fetch.fetch(remote, tmp_path).read_bytes() == content
        starts = [start for name, start in server.asked if name == "a.tar"]
        assert starts[0] == 0 < starts[1] <= 5_000_000
        fetch.fetch(remote, tmp_path)  # is there
        assert len([name for name, _ in server.asked if name == "a.tar"]) == 2
        with pytest.raises(fetch.FetchError, match="arrived damaged, as its sha256"):
            fetch.fetch(Remote(f"{url}/md5.txt", sha256), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
        server.resumes = False
        (tmp_path / "a.tar").rename(tmp_path / "a.tar.arriving")
        assert fetch.fetch(remote, tmp_path).read_bytes() == content


def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path):
    whole = archive({"x/a.png": photo(0), "../../b.png": photo(1), "x/readme.txt": b"no photo"})
    (tmp_path / "whole.tgz").write_bytes(whole)
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fetch.FetchError, match=r"cut\.tgz can't be unpacked .*: delete it"):
        fetch.unpack(tmp_path / "cut.tgz", tmp_path / "jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.tgz", "whole.tgz"]
    assert fetch.unpack(tmp_path / "whole.tgz", tmp_path / "jpg") == 2
    assert sorted(path.name for path in (tmp_path / "jpg").glob("*.png")) == ["a.png", "b.png"]
    assert fetch.is_unpacked("whole.tgz", tmp_path / "jpg")


def test_photos_that_a_kill_left_half_moved_are_not_taken_for_somebody_s_own(
    oxford, measured, tmp_path, monkeypatch
):
    """Three of fourteen were moved: the set was opened without the others."""
    move, moved = type(tmp_path).replace, []

    def replace(path, target):
        if path.suffix == ".jpg" and len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(path.name)
        return move(path, target)

    with monkeypatch.context() as context:
        context.setattr(type(tmp_path), "replace", replace)
        measured("roxford5k", status=130)
    jpg = tmp_path / "sets" / "roxford5k" / "jpg"
    assert len(list(jpg.glob("*.jpg"))) < 14
    result, _ = measured("roxford5k")
    assert result["photos"] == 12 and len(list(jpg.glob("*.jpg"))) == 14
    assert not list((tmp_path / "sets").rglob("*.arriving*"))


# --------------------------------------------------------------------------------------------------
# Revisited Oxford and Paris
# --------------------------------------------------------------------------------------------------

GALLERY, QUERIES = [f"g_{i}" for i in range(12)], ["q_0", "q_1"]
ENTRIES = [  # counted from 1, as MATLAB does
    {"bbx": [10.4, 4.6, 50.5, 30.2], "easy": [1, 4], "hard": [2], "junk": [5, 6]},
    {"bbx": [0.0, 0.0, 60.0, 40.0], "easy": [7], "hard": [8, 9], "junk": []},
]


def revisited(folder, entries=ENTRIES):
    """Files of the server: ground truth and archive."""
    file = io.BytesIO()
    names = {"imlist": GALLERY, "qimlist": QUERIES}
    names = {key: np.array(of, dtype=object) for key, of in names.items()}
    gnd = [{key: np.array(value, float) for key, value in entry.items()} for entry in entries]
    savemat(file, names | {"gnd": np.array(gnd, dtype=object)})
    photos = {f"{name}.jpg": photo(i) for i, name in enumerate(GALLERY + QUERIES)}
    return {"gnd_roxford5k.mat": file.getvalue(), "ox.tgz": archive(photos)}


@pytest.fixture
def oxford(tmp_path, monkeypatch):
    server = Server(revisited(tmp_path))
    with server.serving() as url:
        monkeypatch.setitem(official.ARCHIVES, "roxford5k", {"jpg": [Remote(f"{url}/ox.tgz")]})
        monkeypatch.setitem(official.TRUTHS, "roxford5k", [Remote(f"{url}/gnd_roxford5k.mat")])
        yield server


def official_ap(ranked: list[int], positives: list[int], junk: list[int]) -> float:
    """Literally compute_ap of the revisited benchmark's evaluate.py, after its removal of junk."""
    ranked = [one for one in ranked if one not in junk]
    ranks = sorted(ranked.index(one) for one in positives)
    ap = 0.0
    for j, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else j / rank
        ap += (before + (j + 1) / (rank + 1)) / (2 * len(positives))
    return ap


def test_revisited_oxford_by_the_official_definition_with_boxes(oxford, measured, tmp_path):
    result, printed = measured("roxford5k", "--size", "64")
    jpg = tmp_path / "sets" / "roxford5k" / "jpg"
    gallery = np.concatenate([_described(jpg / f"{name}.jpg") for name in GALLERY])
    for level, (kinds, junk) in {
        "easy": (("easy",), ("junk", "hard")),
        "medium": (("easy", "hard"), ("junk",)),
        "hard": (("hard",), ("junk", "easy")),
    }.items():
        aps = []
        for name, entry in zip(QUERIES, ENTRIES, strict=True):
            query = _described(jpg / f"{name}.jpg", entry["bbx"])[0]
            ranked = np.argsort(-(gallery @ query), kind="stable").tolist()
            found = [[n - 1 for kind in of for n in entry[kind]] for of in (kinds, junk)]
            aps.append(official_ap(ranked, *found))
        assert abs(result["measures"][level]["AP"]["value"] - np.mean(aps)) < 1e-12
    assert "ResNet50, GeM, triplet loss" in printed and "40.9" in printed
    assert result["photos"] == 12 and result["queries"]["hard"] == 2
    asked = len(oxford.asked)
    again, _ = measured("roxford5k", "--size", "64")  # nothing is fetched or embedded anew
    assert again["measures"] == result["measures"] and len(oxford.asked) == asked


def _described(path, box=None) -> np.ndarray:
    """By Pillow alone: crop, then to multiples of 32 pixels, as the engine does."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB").crop(box) if box else picture.convert("RGB")
        size = tuple(max(round(side / 32), 1) * 32 for side in picture.size)
    from lib.data.decoding import resize

    return colours(resize(np.asarray(picture), size[::-1])[None])


def test_a_box_outside_of_its_photo_and_a_missing_photo_are_named(oxford, measured, tmp_path):
    outside = [ENTRIES[0] | {"bbx": [100, 100, 120, 120]}, ENTRIES[1]]
    oxford.files |= revisited(tmp_path, outside)
    line = measured("roxford5k", status=2)
    assert "q_0.jpg: no pixel of its 60 x 40 pixels lies in the box" in line
    (tmp_path / "sets" / "roxford5k" / "jpg" / "g_3.jpg").unlink()
    line = measured("roxford5k", status=2)
    assert "g_3.jpg is missing" in line and "1 of 12 in all" in line
    (tmp_path / "sets" / "roxford5k" / "jpg" / "g_3.jpg").write_bytes(b"no picture")
    (tmp_path / "sets" / "roxford5k" / "gnd_roxford5k.mat").unlink()
    oxford.files |= revisited(tmp_path)
    line = measured("roxford5k", "--size", "65", status=1)
    assert "1 photos of the gallery can't be read, first g_3" in line


def test_distractors_push_photos_down(oxford, measured, monkeypatch, tmp_path):
    """They are embedded archive by archive, and nothing of the archives is left."""
    before, _ = measured("roxford5k")
    oxford.files |= {
        f"d{n}.tgz": archive({f"jpg/{n}{i}.jpg": photo(100 * n + i) for i in range(40)})
        for n in (1, 2)
    }
    url = official.ARCHIVES["roxford5k"]["jpg"][0].url.removesuffix("ox.tgz")
    monkeypatch.setattr(benchmark, "_DISTRACTORS", url + "d{}.tgz")
    monkeypatch.setattr(benchmark, "_ARCHIVES", 2)
    after, _ = measured("roxford5k", "--distractors")
    assert after["distractors"] == 80 and after["published mAP"][0]["hard"] == 50.8
    assert after["measures"]["medium"]["AP"]["value"] < before["measures"]["medium"]["AP"]["value"]
    asked = len(oxford.asked)
    measured("roxford5k", "--distractors")
    assert len(oxford.asked) == asked
    assert [path.name for path in (tmp_path / "sets" / "revisitop1m").iterdir()] == []


@pytest.mark.skipif(not OXFORD.is_file(), reason="needs the official gnd_roxford5k.mat")
def test_the_official_truth_by_an_independent_evaluation():
    """Random rankings of the real ground truth, all levels."""
    truths, rng = read_revisited(OXFORD), np.random.default_rng(0)
    names, queries = truths["hard"].gallery, truths["hard"].queries
    vectors = rng.normal(size=(len(names) + len(queries), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gallery, asked = vectors[: len(names)], vectors[len(names) :]
    described = benchmark.Described(gallery, names, asked, queries)
    source = official.PhotoSource(names, None, "")
    task = official.Task("roxford5k", source, source, lambda _: truths, official.metrics.REVISITED)
    tables = benchmark.evaluate(task, described, "none", None)
    for level, truth in truths.items():
        for number in range(0, len(queries), 7):
            ranked = np.argsort(-(gallery @ asked[number]), kind="stable").tolist()
            positives, junk = (of[number].tolist() for of in (truth.positives, truth.junk))
            if positives:
                ap = official_ap(ranked, positives, junk)
                assert abs(tables[level]["AP"].iloc[number] - ap) < 1e-12


# --------------------------------------------------------------------------------------------------
# The other sets
# --------------------------------------------------------------------------------------------------


def test_holidays_asks_the_first_photo_of_each_group(tmp_path, measured, monkeypatch):
    groups = {1000: 3, 1001: 2, 1002: 2}
    files = {f"jpg/{g * 100 + i}.jpg": photo(g) for g, n in groups.items() for i in range(n)}
    names = sorted(files)
    server = Server({"1.tgz": archive({n: files[n] for n in names[:4]})})
    server.files["2.tgz"] = archive({n: files[n] for n in names[4:]})
    with server.serving() as url:
        remotes = [Remote(f"{url}/{n}.tgz") for n in (1, 2)]
        monkeypatch.setitem(official.ARCHIVES, "holidays", {"jpg": remotes})
        result, _ = measured("holidays")
    assert result["photos"] == 7 and result["queries"] == {"all": 3}
    assert result["measures"]["all"]["AP"]["value"] == 1.0  # equal photos
    task = open_set("holidays", tmp_path / "sets")
    truth = task.truths(task.gallery.names)["all"]
    assert truth.queries == ["100000.jpg", "100100.jpg", "100200.jpg"]
    assert [of.tolist() for of in truth.positives] == [[1, 2], [4], [6]]
    assert [of.tolist() for of in truth.junk] == [[0], [3], [5]]  # itself
    (tmp_path / "sets" / "holidays" / "jpg" / "mine.jpg").write_bytes(photo(0))
    with pytest.raises(OfficialError, match=r"'mine\.jpg' is not named like 100000\.jpg"):
        open_set("holidays", tmp_path / "sets")


def test_copies_of_copydays_search_for_their_originals(tmp_path, measured):
    place = tmp_path / "sets" / "copydays"
    for part in ("original", "strong"):
        (place / part).mkdir(parents=True)
    for number in range(5):
        (place / "original" / f"20{number}000.jpg").write_bytes(photo(number))
        (place / "strong" / f"20{number}001.jpg").write_bytes(photo(number, 90, 60))
    result, _ = measured("copydays")
    assert result["measures"]["strong"]["AP"]["value"] == 1.0 and result["photos"] == 5


def test_google_landmarks_has_public_and_private_queries(tmp_path, measured):
    place = tmp_path / "sets" / "gldv2"
    for part, seeds in {"index": range(6), "test": range(2)}.items():
        (place / part).mkdir(parents=True)
        for seed in seeds:
            (place / part / f"{part[0]}{seed}.jpg").write_bytes(photo(seed % 3))
    listed = "".join(f"i{seed}\n" for seed in range(6))
    (place / "index.csv").write_text(f"id\n{listed}")
    lines = "t0,i0 i3,Public\nt1,i1 i4 i2,Private\nt9,None,Ignored\n"
    (place / "retrieval_solution_v2.1.csv").write_text(f"id,images,Usage\n{lines}")
    result, _ = measured("gldv2")
    assert result["measures"]["public"]["AP@100"]["value"] == 1.0
    private = result["measures"]["private"]["AP@100"]["value"]  # i2 is another picture
    assert min(abs(private - (1 + 1 + 3 / rank) / 3) for rank in (3, 4, 5, 6)) < 1e-12


def test_the_lists_of_ilias(tmp_path):
    ids = tmp_path / "image_ids"
    ids.mkdir()
    (ids / "image_query_ids.txt").write_text("b/query/0.jpg,0\na/query/0.jpg,0\n")
    (ids / "positive_ids.txt").write_text("a/pos/1.jpg,0.1,3\nb/pos/0.jpg,0.2,5\na/pos/0.jpg,0,0\n")
    queries, positives, truth = official.read_ilias(tmp_path)
    assert queries == ["a/query/0.jpg", "b/query/0.jpg"]
    assert positives == ["a/pos/0.jpg", "a/pos/1.jpg", "b/pos/0.jpg"]
    assert [of.tolist() for of in truth.positives] == [[0, 1], [2]]
    (ids / "positive_ids.txt").unlink()
    with pytest.raises(OfficialError, match=r"get it from https://vrg\.fel\.cvut\.cz/ilias_data"):
        official.read_ilias(tmp_path)


@pytest.fixture
def folder(tmp_path):
    for landmark in range(4):
        (tmp_path / "mine" / str(landmark)).mkdir(parents=True)
        for view in range(3):
            (tmp_path / "mine" / str(landmark) / f"{view}.png").write_bytes(photo(landmark))
    return tmp_path / "mine"


@pytest.mark.parametrize("reranking", benchmark.RERANKINGS)
def test_a_folder_of_ones_own_with_each_reranking(folder, measured, reranking):
    (folder / "0" / "broken.jpg").write_bytes(b"no picture")
    result, printed = measured(f"folder:{folder}", "--rerank", reranking)
    assert result["photos"] == 12 and result["queries"] == {"all": 12}
    assert result["measures"]["all"]["AP"]["value"] == 1.0
    assert "packaged (this run)" in printed


def test_a_whitening_comes_from_other_photos(folder, measured, tmp_path):
    (tmp_path / "others" / "a").mkdir(parents=True)
    for seed in range(20):
        (tmp_path / "others" / "a" / f"{seed}.png").write_bytes(photo(50 + seed))
    name = f"folder:{tmp_path / 'others'}"
    result, _ = measured(f"folder:{folder}", "--whiten", name, "--dimensions", "5")
    assert result["settings"]["dimension"] == 5 and result["settings"]["whitened by"] == name
    line = measured(f"folder:{folder}", "--whiten", f"folder:{folder}", status=2)
    assert "must not be learned on what is measured" in line


@needs_keras_hub
@pytest.mark.long
def test_a_vision_transformer_embeds_squares(folder, tmp_path, capsys):
    network = save_preset(tmp_path / "preset", "dinov2")
    options = ["--network", network, "--size", "64", "--out", str(tmp_path / "out")]
    assert benchmark.main([f"folder:{folder}", *options]) == 0, capsys.readouterr().err
    found = read_json(tmp_path / "out" / "metrics.json")["benchmark"]["settings"]
    assert (found["scales"], found["dimension"]) == ([], 16)


def test_wrong_names_are_refused_in_one_line(measured, tmp_path):
    assert "there is no set 'oxford'" in measured("oxford", status=2)
    assert "has no folders with photos" in measured(f"folder:{tmp_path}", status=2)
