"""Search: a photo in, the most similar photos out, from a folder."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import takewhile

import cv2
import numpy as np
import pytest
from PIL import Image

from lib.app import answer
from lib.app.answer import KINDS, Question, Search
from lib.app.gallery import (
    Gallery,
    SearchError,
    folder_below,
    landmark_of,
    open_gallery,
    open_option,
)
from lib.data.decoding import resize
from lib.data.photos import read_photo
from lib.evaluation.explain import occlusion_heat
from lib.files import only_writer, project_root, read_json
from lib.network.engine import Engine
from lib.network.whitening import learn_pca_whitening
from lib.search.embedding import JOB, EmbeddingJobError, JobBusyError
from lib.search.local_features import LONGEST, LocalFeatures, local_features, packed
from lib.search.same_place import PERHAPS, SAME, SIMILAR
from tests.conftest import textured, unit

SIZE = 16


def fake_engine(calls=None):
    """An engine that sees colours: the mean of each quarter of the photo."""

    def compute(photos):
        if calls is not None:
            calls.append(len(photos))
        quarters = photos.reshape(-1, 2, SIZE // 2, 2, SIZE // 2, 3).mean(axis=(2, 4))
        return unit(quarters.reshape(len(photos), -1) + 1).astype(np.float32)

    return Engine(compute, SIZE, 12, "fake", "fake")


def colour(number, landmark):
    rng = np.random.default_rng(landmark)
    photo = np.empty((24, 24, 3))
    photo[:12], photo[12:] = rng.integers(0, 256, (2, 3))
    return (0.9 * photo + 2 * number).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Five photos of each of 20 landmarks."""
    for landmark in range(20):
        (tmp_path / "photos" / f"landmark_{landmark}").mkdir(parents=True)
        for number in range(5):
            path = tmp_path / "photos" / f"landmark_{landmark}" / f"{number}.png"
            Image.fromarray(colour(number, landmark)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def search(folder, tmp_path):
    engine = fake_engine()
    return Search(engine, open_gallery(engine, folder, tmp_path / "jobs"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rerank", ["none", "query expansion"])
def test_each_kind_finds_the_landmark(search, kind, rerank):
    for name in search.gallery.names[::7]:
        answer = search.answer(search.photo(name), Question(4, kind, rerank), without=name)
        assert name not in answer.names and len(set(answer.names)) == 4
        assert {landmark_of(found) for found in answer.names} == {landmark_of(name)}
        assert answer.votes == {landmark_of(name): pytest.approx(1)}
        assert (np.diff(answer.similarities) <= 0).all() and answer.similarities[0] > 0.99
        assert 0 < answer.seconds < 5


def test_exact_similarities_are_the_cosines(search):
    photo = colour(3, 77)[:SIZE, :SIZE]
    answer = search.answer(photo, Question(k=500))
    expected = search.gallery.embeddings @ search.engine.embed(photo[None])[0]
    assert len(answer.names) == 100
    np.testing.assert_allclose(answer.similarities, np.sort(expected)[::-1], atol=1e-5)
    assert answer.names[0] == search.gallery.names[int(expected.argmax())]


def test_without_passes_over_no_other_photo(search):
    name = search.gallery.names[0]
    all_of_them = search.answer(search.photo(name), Question(100))
    others = search.answer(search.photo(name), Question(100), without=name)
    assert all_of_them.names[0] == name and others.names == all_of_them.names[1:]


def test_query_expansion_does_not_let_a_photo_vote_for_itself(search):
    name = search.gallery.names[0]
    gallery = search.gallery
    alone = Gallery(gallery.folder, gallery.names[1:], gallery.embeddings[1:], 0)
    question = Question(5, rerank="query expansion")
    expected = Search(search.engine, alone).answer(search.photo(name), question)
    found = search.answer(search.photo(name), question, without=name)
    assert found.names == expected.names
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)


def test_votes_are_shares_weighed_by_similarity(search):
    answer = search.answer(search.photo(search.gallery.names[0]), Question(12))
    weights = {}
    for name, similarity in zip(answer.names, answer.similarities, strict=True):
        weights[landmark_of(name)] = weights.get(landmark_of(name), 0) + float(similarity)
    assert len(weights) > 1 and next(iter(answer.votes)) == "landmark_0"
    assert list(answer.votes.values()) == sorted(answer.votes.values(), reverse=True)
    for landmark, weight in weights.items():
        assert answer.votes[landmark] == pytest.approx(weight / sum(weights.values()))


def test_folders_of_one_name_in_two_places_are_two_landmarks(tmp_path):
    """Their votes were added up, under a name that both had."""
    for place, landmark in (("Paris", 0), ("Rome", 1)):
        (tmp_path / place / "old").mkdir(parents=True)
        Image.fromarray(colour(landmark, landmark)).save(tmp_path / place / "old" / "1.png")
    engine = fake_engine()
    search = Search(engine, open_gallery(engine, tmp_path, tmp_path / ".jobs"))
    assert search.gallery.landmarks() == ["Paris/old", "Rome/old"]
    votes = search.answer(search.photo("Rome/old/1.png"), Question(2)).votes
    assert next(iter(votes)) == "Rome/old" and len(votes) <= 2


def test_photos_in_no_landmark_s_folder_have_no_votes(tmp_path):
    Image.fromarray(colour(0, 0)).save(tmp_path / "only.png")
    engine = fake_engine()
    search = Search(engine, open_gallery(engine, tmp_path, tmp_path / ".jobs"))
    question = Question(4, rerank="query expansion")
    assert search.answer(search.photo("only.png"), question).votes == {}
    assert search.answer(search.photo("only.png"), question, without="only.png").names == []
    assert search.gallery.landmarks() == []


def test_why_looks_at_both_photos(search, rng):
    a, b = rng.integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
    embed = search.engine.embed
    ours, theirs = search.why(a, b)
    np.testing.assert_array_equal(ours, occlusion_heat(embed, a, embed(b[None])[0]))
    np.testing.assert_array_equal(theirs, occlusion_heat(embed, b, embed(a[None])[0]))
    assert ours.any() and theirs.any() and (ours != theirs).any()


def test_a_gallery_is_embedded_once_and_says_how_far_it_is(folder, tmp_path):
    (folder / "landmark_0" / "broken.jpg").write_text("no photo")
    (folder / "landmark_0" / "phone.jxl").touch()
    calls, reports = [], []
    first = open_gallery(
        fake_engine(calls), folder, tmp_path / "jobs", lambda *report: reports.append(report)
    )
    assert first.unreadable == 1 and sum(calls) == 100 and len(first.landmarks()) == 20
    assert first.left_out == " Left out: 1 .jxl files."
    assert reports == [(32, 101), (64, 101), (96, 101), (101, 101)]
    again = open_gallery(fake_engine(calls), folder, tmp_path / "jobs")
    assert sum(calls) == 100 and again.names == first.names
    Image.fromarray(colour(5, 0)).save(folder / "landmark_0" / "new.png")
    assert len(open_gallery(fake_engine(calls), folder, tmp_path / "jobs").names) == 101


def test_only_photos_that_changed_are_embedded_again(folder, tmp_path):
    """One touched photo had all of the folder embedded again, in one more folder of jobs."""
    jobs, place = tmp_path / "jobs", folder / "landmark_3"

    def embedded() -> tuple[int, list[str]]:
        calls = []
        gallery = open_gallery(fake_engine(calls), folder, jobs)
        (job,) = jobs.iterdir()  # the same for each state of the folder
        assert not (job / "taken.bin").exists()
        for name, row in zip(gallery.names, gallery.embeddings, strict=True):
            photo = read_photo(folder / name, SIZE)[None]
            np.testing.assert_allclose(row, fake_engine().embed(photo)[0], atol=1e-6)
        return sum(calls), gallery.names

    assert embedded() == (100, sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*")))
    Image.fromarray(colour(9, 9)).save(place / "2.png")
    Image.fromarray(colour(8, 8)).save(place / "0_new.png")
    count, names = embedded()
    assert count == 2 and len(names) == 101
    (place / "1.png").unlink()
    count, names = embedded()
    assert count == 0 and "landmark_3/1.png" not in names and len(names) == 100
    assert embedded() == (0, names)


def test_a_photo_keeps_its_row_by_any_name_and_time(folder, tmp_path):
    """One that was touched, renamed, moved or copied was embedded again."""
    calls, jobs, place = [], tmp_path / "jobs", folder / "landmark_3"
    first = open_gallery(fake_engine(calls), folder, jobs)
    rows = dict(zip(first.names, np.array(first.embeddings), strict=True))
    os.utime(place / "2.png", (1, 1))
    (place / "0.png").rename(place / "renamed.png")
    (folder / "landmark_4").rename(folder / "Rome")
    shutil.copy(place / "1.png", folder / "copy.png")
    was = {"landmark_3/renamed.png": "landmark_3/0.png", "copy.png": "landmark_3/1.png"}
    for _ in range(2):  # the second time from the rows that were taken over
        found = open_gallery(fake_engine(calls), folder, jobs)
        assert sum(calls) == 100 and len(found.names) == 101
        for name, row in zip(found.names, found.embeddings, strict=True):
            name = was.get(name, name.replace("Rome", "landmark_4"))
            np.testing.assert_array_equal(row, rows[name])
        (place / "2.png").touch()
    Image.fromarray(colour(9, 9)).save(place / "renamed.png")
    open_gallery(fake_engine(calls), folder, jobs)
    assert sum(calls) == 101


def test_an_open_gallery_keeps_its_rows_when_its_folder_is_read_again(folder, tmp_path):
    first = open_gallery(fake_engine(), folder, tmp_path / "jobs")
    rows = np.array(first.embeddings)
    for path in folder.glob("*/[0-3].png"):
        path.unlink()
    assert len(open_gallery(fake_engine(), folder, tmp_path / "jobs").names) == 20
    np.testing.assert_array_equal(first.embeddings, rows)  # the file must not be cut: a bus error


def test_stored_embeddings_of_no_more_use_are_removed(folder, tmp_path):
    """Folders that are gone, other networks, and the jobs of earlier versions piled up."""
    jobs, other = tmp_path / "jobs", tmp_path / "gr\u00fc\u00dfe \udcff"
    shutil.copytree(folder / "landmark_0", other)
    open_gallery(fake_engine(), folder, jobs)
    open_gallery(replace(fake_engine(), name="bfloat16"), folder, jobs)
    kept = set(jobs.iterdir())
    open_gallery(fake_engine(), other, jobs)
    earlier, foreign = jobs / ("0" * 16), jobs / "notes"
    for place in (earlier, foreign):
        place.mkdir()
        (place / "job.json").write_text('{"tower": "fake", "digest": "some"}')
    open_gallery(fake_engine(), folder, jobs)
    assert len(set(jobs.iterdir()) - kept) == 2 and foreign.is_dir() and not earlier.exists()
    shutil.rmtree(other)
    open_gallery(fake_engine(), folder, jobs)
    assert len(set(jobs.iterdir()) - kept) == 2  # it may lie on a drive that is not connected today
    for path in jobs.glob("*/job.json"):
        os.utime(path, (0, 0))
    open_gallery(fake_engine(), folder, jobs)
    assert set(jobs.iterdir()) == kept | {foreign}
    open_gallery(replace(fake_engine(), fingerprint="trained on"), folder, jobs)
    assert len(list(jobs.iterdir())) == 2


def test_a_run_that_was_moved_with_its_photos_keeps_their_embeddings(folder, tmp_path):
    (tmp_path / "project").mkdir()
    folder = folder.rename(tmp_path / "project" / "photos")
    open_gallery(fake_engine(), folder, tmp_path / "project" / "jobs")
    moved, calls = (tmp_path / "project").rename(tmp_path / "moved"), []
    open_gallery(fake_engine(calls), moved / "photos", moved / "jobs")
    assert calls == []


def test_folders_without_photos_are_refused_without_a_path(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchError, match=r"^There are no photos in this folder"):
        open_gallery(fake_engine(), tmp_path / "empty", tmp_path / "jobs")
    (tmp_path / "empty" / "b.jxl").touch()
    with pytest.raises(SearchError, match=r"^There are no photos .* Left out: 1 \.jxl files\.$"):
        open_gallery(fake_engine(), tmp_path / "empty", tmp_path / "jobs")
    (tmp_path / "empty" / "a.jpg").write_text("no photo")
    with pytest.raises(SearchError, match=r"^None of the photos .* Left out: 1 \.jxl files\.$"):
        open_gallery(fake_engine(), tmp_path / "empty", tmp_path / "jobs")


def test_two_windows_may_open_one_folder_at_once(folder, tmp_path):
    gallery = open_gallery(fake_engine(), folder, tmp_path / "jobs")
    (job,) = (tmp_path / "jobs").iterdir()
    with ThreadPoolExecutor(1) as other:
        with only_writer(job, RuntimeError()):
            opened = other.submit(open_gallery, fake_engine(), folder, tmp_path / "jobs")
            assert wait([opened], 0.3).not_done
        assert opened.result().names == gallery.names


def test_two_windows_do_not_embed_one_folder_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.search.embedding._LOOK", 0.1)
    open_gallery(fake_engine(), folder, tmp_path / "jobs")
    (job,) = (tmp_path / "jobs").iterdir()
    with only_writer(job, RuntimeError()), pytest.raises(JobBusyError, match="wait") as busy:
        open_gallery(fake_engine(), folder, tmp_path / "jobs")
    assert str(busy.value).startswith("another process reads these photos")
    (job / JOB).write_text("damaged")
    named = rf"^\S*{folder.name} \(--x\): \S*{job.name}/{JOB} is not valid JSON"
    with pytest.raises(EmbeddingJobError, match=named):
        open_option(fake_engine(), folder, tmp_path / "jobs", "--x")


@pytest.mark.parametrize("typed", ["Pictures/2024", "./Pictures//2024/", " Pictures/2024 "])
def test_a_folder_below_the_root_is_found(tmp_path, typed):
    (tmp_path / "Pictures" / "2024").mkdir(parents=True)
    expected = (tmp_path / "Pictures" / "2024").resolve()
    assert folder_below(tmp_path, typed) == expected
    assert folder_below(tmp_path, str(expected)) == expected


@pytest.mark.parametrize(
    "typed",
    [
        *("", ".", "..", "/", "/etc", "../outside", "link", "Pictures/../..", ".hidden", "a/.ssh"),
        *("absent", "file.jpg", "nul\0", "~nobody-of-this-name/x", "loop", "x" * 5000),
    ],
)
def test_no_other_folder_is(tmp_path, typed):
    root = tmp_path / "root"
    for folder in ("Pictures", ".hidden", "a/.ssh"):
        (root / folder).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "file.jpg").touch()
    with pytest.raises(SearchError, match=r"^There is no such folder that may be searched in\.$"):
        folder_below(root, typed)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"kind": "best"}, {"rerank": "magic"}])
def test_a_question_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        Question(**wrong)


def test_neither_keras_nor_tensorflow_is_loaded():
    script = (
        "import lib.app.widget, sys; print({'keras', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


def test_threads_may_share_a_search(search):
    name, results = search.gallery.names[0], []
    photo = search.photo(name)
    ask = lambda: results.append(search.answer(photo, Question(3)).names)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len({tuple(names) for names in results}) == 1


def test_a_search_is_there_while_its_whitening_is_learned(folder, monkeypatch):
    """The page is shown, and the query embedded, meanwhile; an error is not lost."""
    own, learned, embedded = with_views(fake_engine()), threading.Event(), threading.Event()
    gallery = open_gallery(own, folder, folder.parent / "jobs")
    searched = answer._searched

    def wait_and_learn(engine, gallery):
        assert learned.wait(10)
        return searched(engine, gallery)

    def compute(photos):
        embedded.set()
        return own.compute(photos)

    monkeypatch.setattr(answer, "_searched", wait_and_learn)
    search = Search(replace(own, compute=compute), gallery)
    assert len(search.landmarks) == 20
    photo, question = search.photo(gallery.names[0]), Question(k=1, verify=False)
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(search.answer, photo, question)
        assert embedded.wait(10) and not asked.done()
        learned.set()
        assert asked.result().names == [gallery.names[0]]
    monkeypatch.setattr(answer, "_searched", lambda engine, gallery: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Search(own, gallery).answer(photo, question)


def test_an_engine_with_views_is_whitened_by_the_folders_own_photos(folder):
    """Photos that share a strong colour are told apart by what little differs."""
    own = with_views(fake_engine())
    gallery = open_gallery(own, folder, folder.parent / "jobs")
    search = Search(own, gallery)
    name = gallery.names[7]
    photo = search.photo(name)
    found = search.answer(photo, Question(k=1, verify=False))
    assert found.names == [name] and found.similarities[0] == pytest.approx(1, abs=1e-4)
    whitening = learn_pca_whitening(np.asarray(gallery.embeddings), shrinkage=answer.SHRINKAGE)
    expected = whitening.apply(gallery.embeddings)
    similarities = expected @ expected[7]
    best = [gallery.names[i] for i in np.argsort(-similarities)[:4]]
    assert search.answer(photo, Question(k=4, verify=False)).names == best
    heats = search.why(photo, search.photo(gallery.names[8]))
    assert [heat.shape for heat in heats] == [(8, 8)] * 2


def test_copies_of_one_photo_are_not_whitened(tmp_path):
    for number in range(answer._LEAST_TO_WHITEN):
        Image.fromarray(colour(0, 0)).save(tmp_path / f"{number}.png")
    own = with_views(fake_engine())
    search = Search(own, open_gallery(own, tmp_path, tmp_path / "jobs"))
    found = search.answer(search.photo("3.png"), Question(k=20), without="3.png")
    assert len(found.names) == answer._LEAST_TO_WHITEN - 1
    np.testing.assert_allclose(found.similarities, 1, atol=1e-5)


def with_views(engine):
    """The engine, for photos of any shape."""
    compute = engine.compute
    return replace(engine, views=(SIZE,), compute=lambda photos: compute(_squares(photos)))


def landmarks_of(folder, engine):
    return Search(engine, open_gallery(engine, folder, folder.parent / "jobs")).landmarks


@pytest.mark.parametrize("whole", [False, True], ids=["parts of landmarks", "whole landmarks"])
def test_folders_are_landmarks_where_photos_nearest_others_lie_in_them(folder, whole):
    """Years and trips voted, and the app told which one a photo "looks most like"."""
    engine, months = with_views(fake_engine()), folder.parent / "months"
    assert len(landmarks_of(folder, engine)) == 20
    for number, place in enumerate(sorted(folder.iterdir())):
        for path in place.iterdir():
            month = months / f"0{number % 5 if whole else path.stem}"
            month.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, month / f"{place.name}_{path.name}")
    assert landmarks_of(months, engine) == []
    assert len(landmarks_of(months, fake_engine())) == 5  # trained on landmarks' folders
    search = Search(engine, open_gallery(engine, months, folder.parent / "jobs"))
    assert search.answer(search.photo(search.gallery.names[3]), Question(8)).votes == {}


@pytest.mark.parametrize("places", [["one"] * 4, ["a", "b", "c", "d"], [""] * 4])
def test_one_folder_or_single_photos_are_no_landmarks(tmp_path, places):
    for number, place in enumerate(places):
        (tmp_path / "photos" / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour(number, 0)).save(tmp_path / "photos" / place / f"{number}.png")
    assert landmarks_of(tmp_path / "photos", with_views(fake_engine())) == []


def shapes(seed):
    """A picture with many different frequencies, as a photo has."""
    patches = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(patches).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.fixture
def copied(tmp_path):
    """Ten photos, three copies of the first; two plain ones, and a copy of one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(10):
        shapes(seed).save(folder / f"{seed}.png")
    shapes(0).save(folder / "jpeg.jpg", quality=60)
    shapes(0).resize((80, 60)).save(folder / "small.png")
    shutil.copy(folder / "0.png", folder / "same.png")
    Image.new("RGB", (40, 40), "navy").save(folder / "navy.png")
    Image.new("RGB", (40, 40), (0, 0, 127)).save(folder / "nearly navy.png")
    shutil.copy(folder / "navy.png", folder / "zz same bytes.png")
    engine = with_views(fake_engine())
    return Search(engine, open_gallery(engine, folder, tmp_path / "jobs"))


def test_copies_are_folded_into_the_best_ranked_one(copied):
    photo = copied.photo("0.png")
    plain = copied.answer(photo, Question(5))
    same = {"0.png", "same.png", "jpeg.jpg", "small.png"}
    assert set(plain.names[:4]) == same and plain.copies == [[]] * 5
    folded = copied.answer(photo, Question(5, fold=True))
    assert [folded.names[0], *folded.copies[0]] == plain.names[:4]
    assert len(folded.names) == 5 and folded.names[1] == plain.names[4]
    assert folded.similarities[1] == plain.similarities[4]
    everything = copied.answer(photo, Question(50, fold=True))
    assert len(everything.names) == 12 and everything.copies.count([]) == 10
    assert ["zz same bytes.png"] in everything.copies  # not with "nearly navy.png"
    own = copied.answer(photo, Question(5, fold=True), without="0.png")
    assert {own.names[0], *own.copies[0]} == same - {"0.png"}
    for kind in KINDS:  # there are more copies than photos looked for at first
        assert len(copied.answer(photo, Question(2, kind, fold=True)).names) == 2


def test_only_pairs_that_may_be_copies_are_read(copied, monkeypatch):
    monkeypatch.setattr("lib.data.copies.PICTURE", 1.1)
    monkeypatch.setattr("lib.app.answer.open_picture", None)
    assert copied.answer(copied.photo("0.png"), Question(5, fold=True)).copies == [[]] * 5


def test_a_photo_that_is_gone_is_no_copy(copied):
    (copied.gallery.folder / "jpeg.jpg").unlink()
    answer = copied.answer(copied.photo("0.png"), Question(3, fold=True))
    assert "small.png" in answer.copies[0] and "jpeg.jpg" in answer.names


def _squares(photos):
    return np.stack([resize(photo, SIZE) for photo in photos])


VIEW = np.array([[0.8, -0.15, 40], [0.15, 0.8, -10], [1e-4, 0, 1]])  # of a photo, from elsewhere


@pytest.fixture
def places(tmp_path):
    """Twelve photos of as many places, and a plain one."""
    (folder := tmp_path / "places").mkdir()
    for number in range(12):
        Image.fromarray(textured(number)).save(folder / f"{number:02}.png")
    Image.new("RGB", (480, 360), "teal").save(folder / "plain.png")
    return folder


def test_the_place_of_a_photo_comes_first_and_is_named(places, tmp_path):
    """The fake engine sees mean colours, and finds other photos more similar."""
    engine = with_views(fake_engine())
    search = Search(engine, open_gallery(engine, places, tmp_path / "jobs"))
    assert search.image_size == LONGEST
    other = cv2.warpPerspective(textured(3)[:, :, ::-1] // 2, VIEW, (480, 360))[:, :, ::-1]
    plainly = search.answer(other, Question(k=13, verify=False))
    assert plainly.names[0] != "03.png" and plainly.verdicts == plainly.probabilities == []
    found = search.answer(other, Question(k=13))
    assert found.names[0] == "03.png" and found.verdicts[0] == SAME
    assert found.probabilities[0] > 0.9 and (np.diff(found.probabilities) <= 0).all()
    assert {*found.verdicts[1:]} <= {SIMILAR, PERHAPS}
    similarity = dict(zip(plainly.names, plainly.similarities, strict=True))
    assert [similarity[name] for name in found.names] == pytest.approx(found.similarities)
    assert "03.png" not in search.answer(other, Question(k=13), without="03.png").names


def test_a_photo_that_is_gone_or_plain_is_verified_as_far_as_can_be(places, tmp_path):
    engine = with_views(fake_engine())
    gallery = open_gallery(engine, places, tmp_path / "jobs")
    del gallery.features["05.png"]  # it could not be read any more
    search = Search(engine, gallery)
    plain = np.full((360, 480, 3), 200, np.uint8)
    for photo in (plain, plain[:1, :1], textured(5)):
        found = search.answer(photo, Question(k=13))
        assert len(found.names) == len(found.verdicts) == 13
        assert SAME not in found.verdicts and found.votes == {}


@pytest.mark.parametrize("kind", KINDS)
def test_verified_answers_with_copies_and_beyond_the_first(places, tmp_path, monkeypatch, kind):
    """Copies fold into one, each kind of index is verified, and what is beyond has no verdict."""
    monkeypatch.setattr(answer, "TOP", 5)
    for number in range(3):
        shutil.copy(places / "03.png", places / f"copy{number}.png")
    engine = with_views(fake_engine())
    search = Search(engine, open_gallery(engine, places, tmp_path / "jobs"))
    view = cv2.warpPerspective(textured(3), VIEW, (480, 360), borderMode=cv2.BORDER_REFLECT)
    found = search.answer(view, Question(k=10, kind=kind, fold=True), without="copy1.png")
    own = [{name, *copies} for name, copies in zip(found.names, found.copies, strict=True)]
    assert {"03.png", "copy0.png", "copy2.png"} in own and len(own) == 10
    assert own[0] == {"03.png", "copy0.png", "copy2.png"} and found.verdicts[0] == SAME
    assert found.verdicts[5:] == [""] * 5 and found.probabilities[5:] == [0] * 5
    assert "" not in found.verdicts[:2]


def test_votes_are_of_photos_of_the_same_place(places, tmp_path):
    """Seven similar photos of another landmark outvoted the one of the same place."""
    for path in places.glob("*.png"):
        landmark = "it" if path.name == "03.png" else "other"
        (places / landmark).mkdir(exist_ok=True)
        path.rename(places / landmark / path.name)
    engine = with_views(fake_engine())
    search = Search(engine, open_gallery(engine, places, tmp_path / "jobs"))
    search.landmarks = ["it", "other"]
    view = cv2.warpPerspective(textured(3), VIEW, (480, 360))
    assert "other" in search.answer(view, Question(k=8, verify=False)).votes
    assert search.answer(view, Question(k=8)).votes == {"it": 1.0}


def test_few_photos_are_verified_by_geometry_alone(places, tmp_path):
    """What a cosine means is not known of a folder that is too small to be whitened."""
    for path in sorted(places.iterdir())[4:]:
        path.unlink()
    engine = with_views(fake_engine())
    search = Search(engine, open_gallery(engine, places, tmp_path / "jobs"))
    found = search.answer(cv2.warpPerspective(textured(2), VIEW, (480, 360)), Question(k=4))
    assert found.names[0] == "02.png" and found.verdicts == [SAME] + [SIMILAR] * 3


def test_local_features_are_kept_in_step_with_the_folder(places, tmp_path, monkeypatch):
    engine, jobs = with_views(fake_engine()), tmp_path / "jobs"
    open_gallery(engine, places, jobs)
    asked, found = [], LocalFeatures.embed
    monkeypatch.setattr(
        LocalFeatures,
        "embed",
        lambda self, photos: asked.append(len(photos)) or found(self, photos),
    )
    (places / "01.png").rename(places / "moved.png")
    Image.fromarray(textured(20)).save(places / "new.png")
    (places / "02.png").unlink()
    gallery = open_gallery(engine, places, jobs)
    assert sum(asked) == 1 and {*gallery.features} == {*gallery.names}
    for name in gallery.names:
        own = packed(local_features(read_photo(places / name, LONGEST, squash=False)))
        np.testing.assert_array_equal(gallery.features[name], own)
    assert len([*jobs.glob("*/job.json")]) == 2  # another network's are removed, not these
    open_gallery(replace(engine, fingerprint="newer"), places, jobs)
    assert len([*jobs.glob("*/job.json")]) == 2


def test_without_room_for_local_features_one_searches_without(places, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    engine = with_views(fake_engine())
    gallery = open_gallery(engine, places, tmp_path / "jobs")
    assert gallery.features is None and "no room to verify" in gallery.left_out
    search = Search(engine, gallery)
    assert search.image_size == SIZE
    assert search.answer(search.photo("00.png"), Question(k=3)).verdicts == []


RESULTS = project_root() / "benchmarks/results"


def table_of(page: str, begin: str) -> tuple[list[str], list[list[str]]]:
    """The header's and the rows' cells, without emphasis, of the table from ``begin`` in a page."""
    text = (project_root() / page).read_text("utf-8")
    lines = takewhile(lambda line: line.startswith("|"), text[text.index(begin) :].splitlines())
    header, _, *rows = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines)
    return header, rows


def test_the_steps_in_the_readme_are_the_stored_ones():
    _, rows = table_of("README.md", "| step | mAP | gain")
    stored = read_json(RESULTS / "postprocessing_holidays803.json")["summary"]
    found = {row["step"]: row for row in stored}
    assert len(rows) == 6
    for step, value, gain in rows:
        row = found[step.partition(":")[0]]
        assert f"{row['map']:.3f}" == value
        told = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        assert gain in (told, "") and (gain or row["gain"] == 0)


def test_the_steps_in_the_benchmarks_readme_are_the_stored_ones():
    (_, *names), rows = table_of("benchmarks/README.md", "| step | holidays803")
    for place, name in enumerate(names, 1):
        stored = read_json(RESULTS / f"postprocessing_{name}.json")
        every = stored["every_photo"]["map"]
        first = {row["step"]: row["map"] for row in stored["summary"]}
        said = {row[0].partition(":")[0]: row[place] for row in rows}
        assert said == {
            step: f"{100 * every[step]:.1f} ({100 * first[step]:.1f})"
            for step in every
            if step != "no re-ranking"
        }


def test_the_changed_photos_in_the_benchmarks_readme_are_the_stored_ones():
    begin = "| | holidays803 | smvs_books | smvs_paintings |\n|---|---|---|---|\n| JPEG"
    (_, *names), rows = table_of("benchmarks/README.md", begin)
    for place, name in enumerate(names, 1):
        stored = read_json(RESULTS / f"own_photos_{name}.json")["changed"]
        said = {row[0]: row[place] for row in rows}
        assert said == {change: f"{row['first']:.1f}" for change, row in stored.items()}


def test_the_figures_of_the_readme_are_the_stored_ones():
    text = (project_root() / "README.md").read_text("utf-8")
    _, rows = table_of("README.md", "| each step adds")
    said = [[float(cell) for cell in row[1:]] for row in rows]
    stored = read_json(RESULTS / "own_photos_holidays803.json")
    own, changed = stored["steps"], stored["changed"]
    assert f"{min(row['first'] for row in changed.values()):.0f} % or more find their" in text
    found = {
        step: (row["mAP, every photo"], row["recall@1, every photo"]) for step, row in own.items()
    }
    del found["query expansion"]
    verified = read_json(RESULTS / "geometry_holidays803.json")["steps"]
    for step in (
        "itself, geometric verification as shipped",
        "whitening, geometric verification of the first 100",
    ):
        (row,) = (row for name, row in verified.items() if name.endswith(step))
        found[step] = (100 * row["mAP"][0], 100 * row["recall@1"][0])
    *ours, cross_fitted, shipped, both = found.values()
    np.testing.assert_allclose(
        100 * np.array(said), [*ours, shipped, cross_fitted, both], atol=0.06
    )
