"""Converts labelled photos into triplet shards, a training set.

    photos = read_folder(Path("photos"))          # or read_csv(Path("train.csv"), Path("train"))
    report = convert(photos, Path("Dataset/own"), ConversionSettings(size=256))
    verify(Path("Dataset/own"))                   # reads everything again

The same from a shell: ``python -m tools.convert photos Dataset/own``. The folder then holds

    conversion.json      settings and a digest of the plan, to recognise the conversion
    train00.tfrec ...    the records, with image/id and landmark_id (lib/data/records.py)
    skipped.csv          each photo and record left out, and why
    shards.json          the report and checksums of the files; written last
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from lib.data.photos import open_picture, picture_of
from lib.data.records import RecordError, Triplet, read_triplets, write_shard
from lib.files import (
    checksum_of_manifest,
    naming,
    only_writer,
    read_json,
    remove_half_written,
    replacing,
    show_path,
    write_json,
)
from lib.programs import UsageError, as_path, program
from tools.labelled import ConversionError, LabelledPhotos, plan_triplets, read_csv, read_folder

PLAN, SKIPPED, COMPLETE = "conversion.json", "skipped.csv", "shards.json"
_AGAIN = "and do the same conversion again"


@dataclass(frozen=True)
class ConversionSettings:
    """How photos become shards.

    Attributes:
        size: the longer side of a picture has at most so many pixels.
        quality: of the JPEG files, from 1 to 100.
        records_per_shard: 2048 records with pictures of 256 pixels take about 150 MB.
        seed: of the choice of positives and negatives.
    """

    size: int = 256
    quality: int = 94
    records_per_shard: int = 2048
    seed: int = 0

    def __post_init__(self):
        if min(self.size, self.quality, self.records_per_shard, self.seed + 1) < 1:
            raise ConversionError(f"{self}: the seed must be at least 0, the others at least 1")
        if self.quality > 100:
            raise ConversionError(f"{self}: the quality must be at most 100")


@dataclass(frozen=True)
class Report:
    """Counts of a conversion.

    Attributes:
        photos: without those that were listed but absent.
        landmarks, single_landmarks: of these photos; landmarks with just one photo.
        records, shards: that were written.
        skipped: photos and records left out, by kind of reason.
        examples: the first three image ids of each kind.
    """

    photos: int
    landmarks: int
    single_landmarks: int
    records: int
    shards: int
    skipped: dict[str, int]
    examples: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [
            f"{self.photos:,} photos of {self.landmarks:,} landmarks",
            f"landmarks with a single photo, used as a negative only: {self.single_landmarks:,}",
            f"{self.records:,} records in {self.shards:,} shards",
        ]
        for kind, count in self.skipped.items():
            first = f", the first: {', '.join(self.examples[kind])}" if self.examples[kind] else ""
            lines.append(f"{kind}: {count:,}{first}")
        return "\n".join(lines)


# ---- photos

_KINDS = {
    FileNotFoundError: "absent",
    UnidentifiedImageError: "not a picture",
    Image.DecompressionBombError: "too large",
}


class Failure(NamedTuple):
    """Why a photo is left out: the kind of reason, and the error's message."""

    kind: str
    reason: str


def encode_photo(path: Path, size: int, quality: int) -> bytes | Failure:
    """Encode a photo as a JPEG file without metadata, or return why it can't be read.

    It becomes upright RGB (:func:`lib.data.photos.picture_of`), with its aspect ratio and
    at most ``size`` pixels on the longer side.
    """
    file = io.BytesIO()
    try:
        with open_picture(path) as image:
            picture_of(image, size).save(file, "JPEG", quality=quality, comment=b"")
    except MemoryError:
        raise  # says nothing about the photo
    except Exception as error:  # decoders of damaged files raise anything
        return Failure(_KINDS.get(type(error), "unreadable"), str(error))
    return file.getvalue()


# ---- shards


def convert(
    photos: LabelledPhotos, target_dir: Path, settings: ConversionSettings | None = None
) -> Report:
    """Write the shards, on all processor cores; after an interruption the same call continues.

    If the size or time of change of a photo's file has changed since, it begins anew.

    Equal photos, settings and version of Pillow give equal shards, byte for byte, however often the
    work is interrupted. About one shard's pictures are in memory at a time.

    An anchor that can't be read has no record. A positive or negative that can't be read, or that
    equals another picture of the record, is replaced by the next usable photo, cyclically: of the
    anchor's landmark for a positive, of any other for a negative. Records without such a photo are
    left out. ``skipped.csv`` lists everything left out.

    Args:
        photos: from :func:`read_folder` or :func:`read_csv`.
        target_dir: a folder for this conversion alone; made if absent.
        settings: the defaults if None.

    Raises:
        ConversionError: no record can be made; ``target_dir`` holds other shards or damaged files;
            or another process is writing there.
    """
    settings, target_dir = settings or ConversionSettings(), Path(target_dir)
    plan = plan_triplets(photos.landmark, settings.seed)
    starts = range(0, len(plan), settings.records_per_shard)
    digits = max(2, len(str(len(starts) - 1)))
    shards = {  # name -> the plan of its records
        f"train{number:0{digits}d}.tfrec": plan[start : start + settings.records_per_shard]
        for number, start in enumerate(starts)
    }
    target_dir.mkdir(parents=True, exist_ok=True)
    message = f"another process is writing in {show_path(target_dir)}: wait for its end"
    with only_writer(target_dir, ConversionError(message)):
        _claim(target_dir, _describe(photos, plan, settings))
        # A shard under its name is whole. Without skipped.csv it is unknown what the shard lacks.
        names = {path.name for path in target_dir.iterdir()}
        done = names & shards.keys() if SKIPPED in names else set()
        for name in names & shards.keys() - done:  # else the next run would take them for whole
            (target_dir / name).unlink()
        todo = {name: rows for name, rows in shards.items() if name not in done}
        if not todo and COMPLETE in names:
            files, report = _read_complete(target_dir)
            cut = [n for n in done if (target_dir / n).stat().st_size != files[n]["bytes"]]
            if not cut:
                return report
            for name in cut:  # made anew
                (target_dir / name).unlink()
            todo, done = {name: shards[name] for name in cut}, done - {*cut}
        (target_dir / COMPLETE).unlink(missing_ok=True)  # a file was deleted after completion
        _open_skipped(target_dir / SKIPPED, photos.absent, done)
        _write_shards(target_dir, todo, photos, settings)
        return _finish(target_dir, list(shards), photos)


def _describe(photos: LabelledPhotos, plan: np.ndarray, settings: ConversionSettings) -> dict:
    """Everything that determines the shards; a picture by its file's size and time of change."""
    digest = hashlib.sha256(plan.astype("<i8").tobytes())
    for table in (photos.table, photos.absent):
        names = table[["image_id", "landmark_id"]]
        digest.update(pd.util.hash_pandas_object(names, index=False).to_numpy().tobytes())
    files = hashlib.sha256(json.dumps([*map(_state, photos.table["path"])]).encode()).hexdigest()
    size = {"photos": len(photos.table), "absent": len(photos.absent), "records": len(plan)}
    made_by = {"pillow": PIL.__version__, "sha256": digest.hexdigest(), "files": files}
    return asdict(settings) | size | made_by


def _state(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # the message comes when it is read
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _claim(target_dir: Path, description: dict) -> None:
    """Reserve the folder for this conversion, or check that it is; remove half-written files."""
    where, path = show_path(target_dir), target_dir / PLAN
    if path.is_file():
        try:
            found = dict(read_json(path))
        except (ValueError, TypeError):
            raise ConversionError(f"{show_path(path)} is damaged: delete the folder") from None
        differing = [name for name in description if found.get(name) != description[name]]
        # Older versions did not note the files; whether these have changed is unknown.
        if differing == ["files"] and "files" in found:
            for name in (COMPLETE, SKIPPED):  # without them, convert() begins anew
                (target_dir / name).unlink(missing_ok=True)
            write_json(path, description)
        elif differing:
            raise ConversionError(
                f"{where} holds another conversion (other {', '.join(differing)}): choose another "
                "folder, or delete this one"
            )
    elif any(target_dir.glob("*.tfrec")):
        raise ConversionError(f"{where} holds shards of another origin: choose an empty folder")
    else:
        write_json(path, description)
    remove_half_written(target_dir)


def _open_skipped(path: Path, absent: pd.DataFrame, done: Iterable[str]) -> None:
    """Start ``skipped.csv``, or drop its rows of shards that a killed run did not finish."""
    rows = [["shard", "image_id", "landmark_id", "kind", "reason"]]
    if path.is_file():
        known = {"", *done}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows += [row for row in csv.reader(file) if row and row[0] in known]
        except (UnicodeDecodeError, csv.Error):
            rows.append([])
        if {len(row) for row in rows} != {len(rows[0])}:
            raise ConversionError(f"{show_path(path)} is damaged: delete it {_AGAIN}")
    else:
        for image_id, landmark_id in zip(absent["image_id"], absent["landmark_id"], strict=True):
            rows.append(["", image_id, landmark_id, "absent", "no such file"])
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def _write_shards(
    target_dir: Path,
    todo: dict[str, np.ndarray],
    photos: LabelledPhotos,
    settings: ConversionSettings,
) -> None:
    landmark = photos.landmark
    paths, ids, labels = (photos.table[name] for name in ("path", "image_id", "landmark_id"))

    def encode(photo: int) -> bytes | Failure:
        return encode_photo(paths[photo], settings.size, settings.quality)

    with (
        naming(target_dir),
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes and resizes without the GIL
        tqdm(total=sum(len(np.unique(rows)) for rows in todo.values()), unit=" photos") as bar,
        (target_dir / SKIPPED).open("a", encoding="utf-8", newline="") as file,
    ):
        for shard, rows in todo.items():
            pictures, needed = {}, np.unique(rows).tolist()
            # Closing cancels the tasks that still wait for a thread, so that Ctrl-C is fast.
            with contextlib.closing(pool.map(encode, needed)) as encoded:
                for photo, picture in zip(needed, encoded, strict=True):
                    pictures[photo] = picture
                    bar.update()
            chosen, failures = _choose(rows, pictures, encode, landmark)
            # Before the shard, so that a shard that exists has its reasons here.
            csv.writer(file).writerows(
                (shard, ids[photo], labels[photo], *failure) for photo, failure in failures.items()
            )
            file.flush()
            os.fsync(file.fileno())
            # One lookup for all records: pandas is slow for single values.
            names = (x.iloc[chosen.ravel()].to_numpy().reshape(-1, 3) for x in (ids, labels))
            triplets = (
                Triplet(
                    *(pictures[photo] for photo in three), tuple(image_ids), tuple(landmark_ids)
                )
                for three, image_ids, landmark_ids in zip(chosen.tolist(), *names, strict=True)
            )
            write_shard(target_dir / shard, triplets)


def _choose(
    rows: np.ndarray,
    pictures: dict[int, bytes | Failure],
    encode: Callable[[int], bytes | Failure],
    landmark: np.ndarray,
) -> tuple[np.ndarray, dict[int, Failure]]:
    """Replace photos of the plan as :func:`convert` says; ``pictures`` gains the ones tried.

    Returns:
        the photos of each record, int (records, 3); and a failure for each photo left out.
    """

    def usable(photo: int, unlike: list[bytes]) -> bool:
        if photo not in pictures:
            pictures[photo] = encode(photo)
        return not isinstance(pictures[photo], Failure) and pictures[photo] not in unlike

    chosen, left_out = [], {}
    begin, end = (
        np.searchsorted(landmark, landmark[rows[:, 0]], side) for side in ("left", "right")
    )
    for (anchor, positive, negative), a, b in zip(rows.tolist(), begin, end, strict=True):
        same = chain(range(positive, b), range(a, positive))
        others = chain(range(negative, len(landmark)), range(negative))
        three = []
        for candidates in ([anchor], same, (photo for photo in others if not a <= photo < b)):
            taken = [pictures[photo] for photo in three]
            three += islice((photo for photo in candidates if usable(photo, taken)), 1)
            if not three:
                break
        if len(three) == 3:
            chosen.append(three)
        elif three:
            left_out[anchor] = Failure("no partner", "no positive or no negative can be used")
    failures = {p: picture for p, picture in pictures.items() if isinstance(picture, Failure)}
    return np.array(chosen, dtype=int).reshape(-1, 3), failures | left_out


def _inspect(path: Path) -> dict:
    """The entry of a file in ``shards.json``; reads all records of a shard."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records = sum(1 for _ in read_triplets(path)) if path.suffix == ".tfrec" else 0
    except (FileNotFoundError, RecordError) as error:
        raise ConversionError(f"{error}: delete this file, if it is there, {_AGAIN}") from None
    return {"records": records, "bytes": path.stat().st_size, "sha256": digest}


def _read_complete(target_dir: Path) -> tuple[dict, Report]:
    """Read ``shards.json``: the entry of each file, and the report."""
    path = target_dir / COMPLETE
    try:
        content = read_json(path)
        if content["xxh3"] != checksum_of_manifest(content):
            raise ValueError
        return dict(content["files"]), Report(**content["report"])
    except (ValueError, KeyError, TypeError):
        raise ConversionError(f"{show_path(path)} is damaged: delete it {_AGAIN}") from None


def _finish(target_dir: Path, shards: list[str], photos: LabelledPhotos) -> Report:
    files = {name: _inspect(target_dir / name) for name in (*shards, SKIPPED)}
    skipped = pd.read_csv(target_dir / SKIPPED, dtype=str, na_filter=False)
    # A photo may have been tried for several shards.
    by_kind = skipped.drop_duplicates(["image_id", "kind"]).groupby("kind")["image_id"]
    count = photos.table["landmark_id"].value_counts()
    report = Report(
        photos=len(photos.table),
        landmarks=len(count),
        single_landmarks=int((count == 1).sum()),
        records=sum(files[name]["records"] for name in shards),
        shards=len(shards),
        skipped={kind: len(ids) for kind, ids in by_kind} | photos.left_out,
        examples={kind: list(ids[:3]) for kind, ids in by_kind}
        | {kind: [] for kind in photos.left_out},
    )
    if not report.records:
        raise ConversionError(
            f"no record can be made, {show_path(target_dir / SKIPPED)} says why: mend the photos "
            "and delete this folder"
        )
    content = {"files": files, "report": asdict(report)}
    content["xxh3"] = checksum_of_manifest(content)
    write_json(target_dir / COMPLETE, content)
    return report


def verify(target_dir: Path) -> Report:
    """Read every record of a finished conversion, and compare all checksums.

    Raises:
        ConversionError: it is not complete, or a file is missing, damaged or foreign.
    """
    target_dir = Path(target_dir)
    if not (target_dir / COMPLETE).is_file():
        raise ConversionError(f"{show_path(target_dir)} is not complete: convert again")
    files, report = _read_complete(target_dir)
    for path in sorted({*target_dir.glob("*.tfrec"), *(target_dir / name for name in files)}):
        if _inspect(path) != files.get(path.name):
            raise ConversionError(f"{show_path(path)} is not what was written: delete it {_AGAIN}")
    return report


@program(prefix="error: ")
def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description="Turn labelled photos into triplet shards. The same command continues.",
    )
    parser.add_argument(
        "photos", type=as_path, help="a folder with a folder of photos per landmark"
    )
    parser.add_argument("target", type=as_path, help="where the shards go")
    parser.add_argument(
        "--labels", type=as_path, help="Google Landmarks v2's train.csv, if PHOTOS are its images"
    )
    for field in fields(ConversionSettings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=field.default, help="default: %(default)s")
    args = vars(parser.parse_args(arguments))
    folder, target, labels = args.pop("photos"), args.pop("target"), args.pop("labels")
    warnings.filterwarnings("ignore", module="PIL")  # unreadable photos are counted
    try:
        settings = ConversionSettings(**args)
    except ConversionError as error:
        raise UsageError(str(error)) from None
    photos = read_csv(labels, folder) if labels else read_folder(folder)
    print(convert(photos, target, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
