"""Finds the photos of a folder that are most like query photos, or show the same place.

    python -m tools.search ~/Pictures query.jpg another.jpg
    python -m tools.search ~/Pictures query.jpg --box 120,40,480,360 --k 5 --json

The first search embeds the folder, with a progress bar; later ones only what is new or changed. The
network is pre-trained (:func:`lib.network.engine.packaged_engine`); ``--run-dir`` names a run whose
trained network is used instead. A query that is one of the folder's photos is not among its
results. The ranking is that of the app (:mod:`lib.app.answer`): by similarity, and the first
photos by the probability that they show the query's place.

``--json`` prints a list with an object for each query::

    [{"query": "query.jpg", "results": [{"name": "2024/a.jpg", "similarity": 0.83,
                                         "probability": 0.97, "verdict": "same place"}]}]

Probability and verdict are absent where nothing is verified: beyond the first hundred, or with a
run's trained network.
A query that can't be read has ``"error"`` in place of ``"results"``, a line on standard error, and
makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

from lib.app.answer import Question, Search
from lib.app.gallery import JOBS, open_option
from lib.data.photos import Box, PhotoError
from lib.files import or_cache, project_root, show_name, show_path
from lib.network.engine import OWN_PHOTOS, open_engine, packaged_engine
from lib.programs import UsageError, as_path, one_line, program


@program()
def main(given: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.search", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("photos", type=as_path, metavar="PHOTOS", help="folder to search in")
    parser.add_argument("queries", type=as_path, nargs="+", metavar="QUERY", help="a photo")
    parser.add_argument("--k", type=int, default=10, help="photos to find; default: 10")
    parser.add_argument("--box", type=_box, help="a part of the query in pixels: x0,y0,x1,y1")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--run-dir", type=as_path, help="a run with a trained network")
    options = parser.parse_args(given)
    if options.k < 1:
        raise UsageError(f"--k {options.k}: choose 1 or more")
    if options.box and len(options.queries) > 1:
        raise UsageError("--box is a part of one query: give one QUERY with it")
    if not options.photos.is_dir():
        raise FileNotFoundError(f"there is no folder {show_path(options.photos)} (PHOTOS)")
    run = options.run_dir or or_cache(project_root() / OWN_PHOTOS)
    engine = open_engine(run) if options.run_dir else packaged_engine(run)
    gallery = open_option(engine, options.photos, run / JOBS, "PHOTOS")
    if gallery.unreadable or gallery.left_out:
        unread = f"{gallery.unreadable} can't be read." * bool(gallery.unreadable)
        print(f"{len(gallery.names)} photos. {unread}{gallery.left_out}", file=sys.stderr)
    search = Search(engine, gallery)
    answers = [_answer(search, query, options.k, options.box) for query in options.queries]
    if options.json:
        print(json.dumps(answers, indent=2))
    for answer in answers:
        if "error" in answer:
            print(one_line(answer["error"]), file=sys.stderr)
        elif not options.json:
            print(show_name(answer["query"]))
            for rank, found in enumerate(answer["results"], start=1):
                verdict = f"  {found['verdict']:12}" if "verdict" in found else ""
                shown = f"{found['similarity']:6.3f}{verdict}"
                print(f"{rank:4}  {shown}  {show_name(found['name'])}")
    return int(any("error" in answer for answer in answers))


def _answer(search: Search, query: Path, k: int, box: Box | None) -> dict:
    """The object of one query, see the module's docstring."""
    folder = Path(os.path.realpath(search.gallery.folder))
    # A photo's name in the folder, or that of the photo which a link leads to.
    paths = Path(os.path.realpath(query.parent)) / query.name, Path(os.path.realpath(query))
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_relative_to(folder)]
    own = next((name for name in names if name in search.gallery.names), "")
    try:
        photo = search.read(query, box)
    except PhotoError as error:
        return {"query": str(query), "error": str(error)}
    answer = search.answer(photo, Question(k), without=own)
    pairs = zip(answer.names, answer.similarities.tolist(), strict=True)
    results = [{"name": name, "similarity": round(value, 4)} for name, value in pairs]
    places = zip(answer.probabilities, answer.verdicts, strict=True)  # none if nothing is verified
    for result, (chance, verdict) in zip(results, places, strict=False):
        if verdict:
            result |= {"probability": round(chance, 4), "verdict": verdict}
    return {"query": str(query), "results": results}


def _box(text: str) -> Box:
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not x0,y0,x1,y1, in pixels") from None
    if not (x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1)))):
        raise argparse.ArgumentTypeError(f"{text}: finite x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1


if __name__ == "__main__":
    sys.exit(main())
