"""The map of photos as a string: what is in it, and that nothing in it gets out of hand."""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lib.app.picture_map import framed, picture_map


def solid(n, size=16):
    """Photos of one colour each: uint8 (n, size, size, 3)."""
    colours = np.random.default_rng(1).integers(0, 256, (n, 1, 1, 3), dtype=np.uint8)
    return np.tile(colours, (1, size, size, 1))


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def sprite_of(data):
    kind, _, content = data["sprite"].partition(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=int)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_each_dot_has_its_place_its_landmark_and_its_photo():
    points = np.array([[0, 0], [4, 2], [2, 1], [0, 2], [4, 0]], dtype=np.float32)
    labels, photos = ["b", "a", "b", "c", "a"], solid(5)
    data = data_of(picture_map(points, photos, labels, title="t"))
    assert (data["width"], data["height"], data["columns"]) == (1000, 500, 3)
    assert data["landmarks"] == ["a", "b", "c"]
    assert data["landmark"] == [0, 0, 1, 1, 2]
    # Up is up, though a screen counts downwards.
    assert data["points"] == [[1000, 0], [1000, 500], [0, 500], [500, 250], [0, 0]]
    sprite = sprite_of(data)
    assert sprite.shape == (32, 48, 3)
    for place, photo in enumerate([1, 4, 0, 2, 3]):
        row, column = divmod(place, 3)
        pixel = sprite[row * 16 + 8, column * 16 + 8]
        np.testing.assert_allclose(pixel, photos[photo][8, 8], atol=12)


def test_numbers_are_landmarks_in_the_order_of_numbers():
    data = data_of(picture_map(np.eye(3)[:, :2], solid(3), np.array([10, 9, 10]), title="t"))
    assert data["landmarks"] == ["9", "10"]


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_few_photos_even_in_one_place(n):
    data = data_of(picture_map(np.ones((n, 2)), solid(n), ["x"] * n, title="t"))
    assert data["points"] == [[0, 0]] * n
    assert sprite_of(data).shape[1] == 16 * data["columns"]


def test_text_stays_text():
    odd = "</script><script>alert(1)</script> \"' & @TITLE@ <!-- 塔"
    page = picture_map(np.eye(2), solid(2), [odd, "@DATA@"], title=odd)
    tags = [tag for tag, _ in Tags(page).found]
    assert tags.count("script") == 2 and tags.count("svg") == 1
    assert sorted(data_of(page)["landmarks"]) == sorted([odd, "@DATA@"])
    assert f"<title>{html.escape(odd)}</title>" in page


def test_a_frame_holds_the_whole_page():
    page = picture_map(np.eye(2), solid(2), ['"a"', "<b>"], title="&quot;")
    tags = Tags(framed(page, height=300)).found
    assert [tag for tag, _ in tags] == ["div", "iframe"]
    assert tags[1][1]["srcdoc"] == page
    assert tags[1][1]["sandbox"] == "allow-scripts" and "height: 300px" in tags[1][1]["style"]


def test_nothing_is_fetched():
    page = picture_map(np.eye(2), solid(2), ["a", "b"], title="t")
    addresses = set(re.findall(r"\w+://[^\"' ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not {"src", "href"} & {a for _, attrs in Tags(page).found for a in attrs}


def test_the_same_input_gives_the_same_page(rng):
    points = rng.normal(size=(30, 2))
    first, second = (picture_map(points, solid(30), range(30), title="t") for _ in range(2))
    assert first == second


def test_500_photos_stay_small(small_world):
    from lib.data.photos import list_photos, read_photos

    paths = list_photos(small_world / "Test_set" / "demo_world")
    photos, *_ = read_photos(paths, 64)
    photos = photos[np.arange(500) % len(photos)]
    points = np.random.default_rng(0).normal(size=(500, 2))
    size = len(picture_map(points, photos, np.arange(500) // 10, title="t"))
    assert size < 400_000, size


@pytest.mark.parametrize(
    ("points", "photos", "labels", "message"),
    [
        (np.ones((2, 3)), solid(2), "ab", "points must be"),
        (np.ones((0, 2)), solid(0), "", "n at least 1"),
        (np.array([[0, np.nan]]), solid(1), "a", "finite"),
        (np.ones((2, 2)), solid(1), "ab", "2 points, 1 photos and 2 labels"),
        (np.ones((2, 2)), solid(2), "a", "2 points, 2 photos and 1 labels"),
    ],
)
def test_what_does_not_fit_is_refused(points, photos, labels, message):
    with pytest.raises(ValueError, match=message):
        picture_map(points, photos, list(labels), title="t")
