"""Indexes the shards: where each picture lies, which landmark it shows, and the splits.

The Kaggle records have no labels. But pictures recur byte for byte, and anchor and positive of a
record show the same landmark, so records that share one of them show the same landmark, too:

    catalogue = open_catalogue(Path("Dataset"))    # one pass over the shards, kept as a file
    catalogue.pictures                             # a row for each different picture
    catalogue.triplets                             # a row for each record, as rows of pictures
    parts = split_landmarks(catalogue, {"train": 0.9, "validation": 0.1}, seed=0)

``python -m lib.data.catalogue Dataset`` builds it and prints a summary.

The file ``landmarks.parquet`` beside the shards has a row for every picture of every record, in
file order, with the columns ``shard``, ``record``, ``offset`` (of the record), ``role``, ``image``
(hash of the bytes), ``position`` and ``length`` (of the JPEG file within the shard), ``width``,
``height``, ``perceptual_hash``, ``landmark`` and ``group`` (see :class:`Catalogue`), ``image_id``
and ``landmark_id`` (where the shard states them); and a row for each unusable record, with its
``problem`` and ``detail``. Offsets and positions are in bytes from the beginning of the shard.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg
import xxhash
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from lib.data.decoding import is_endless
from lib.data.duplicates import near_duplicates, perceptual_hash
from lib.data.neighbours import pair_neighbours
from lib.data.records import (
    FEATURES,
    Frame,
    Place,
    RecordError,
    find_shards,
    image_hash,
    misnamed_shards,
    parse_triplet,
    read_message,
    scan_frames,
    shard_number,
)
from lib.files import remove_half_written, replacing, show_error, show_path
from lib.programs import as_path, program
from lib.workers import process_pool

CATALOGUE = "landmarks.parquet"
ROLES = tuple(name.removesuffix("_img") for name in FEATURES)

MAX_PIXELS = 50_000_000  # a header that claims more is damaged or malicious
UNKNOWN = -1  # landmark of a picture that occurs as a negative only

_FORMAT = 1
_CHUNK = 256  # records in one task of a worker process
_FEW = 2_000  # up to so many records, starting processes takes longer than reading them


class CatalogueError(ValueError):
    """A catalogue can't be read or made, or does not fit the shards."""


@dataclass(frozen=True)
class Catalogue:
    """The pictures of the shards and their landmarks.

    Pictures with the same ``landmark`` (a number) certainly show the same landmark, unless it is
    UNKNOWN. Pictures with different ``group`` certainly show different landmarks. So positives are
    drawn from the same landmark and negatives from other groups.

    Attributes:
        shards: their paths.
        rows: three rows for each usable record (anchor, positive, negative), with the columns of
            the file; ``shard`` and ``role`` are indices of ``shards`` and ROLES.
        problems: a row for each unusable record: ``shard``, ``record``, ``offset``, ``problem``,
            ``detail``.
    """

    shards: list[Path]
    rows: pd.DataFrame
    problems: pd.DataFrame

    @cached_property
    def pictures(self) -> pd.DataFrame:
        """A row for each different picture (by its bytes), as of its first occurrence."""
        first = self.rows.loc[~self.rows["image"].duplicated()]
        return first.drop(columns=["record", "offset", "role"]).reset_index(drop=True)

    @cached_property
    def triplets(self) -> pd.DataFrame:
        """A row for each usable record: ``shard``, ``record`` (its number within the shard),
        ``offset``; ``anchor``, ``positive`` and ``negative`` are rows of ``pictures``."""
        table = self.rows.loc[::3, ["shard", "record", "offset"]].reset_index(drop=True)
        table[list(ROLES)] = pd.factorize(self.rows["image"])[0].reshape(-1, 3)
        return table

    @cached_property
    def places(self) -> list[Place]:
        """Where each picture lies, for :func:`lib.data.records.read_picture`."""
        shards = [(str(shard), shard.stat().st_mtime_ns) for shard in self.shards]
        columns = (self.pictures[c].tolist() for c in ("shard", "position", "length", "image"))
        return [Place(*shards[shard], *rest) for shard, *rest in zip(*columns, strict=True)]

    @cached_property
    def degenerate(self) -> np.ndarray:
        """bool (triplets,): whether the positive is the anchor itself."""
        return (self.triplets["anchor"] == self.triplets["positive"]).to_numpy()

    def damage(self) -> pd.DataFrame:
        """The unusable records by kind of problem: their number, and where the first one is."""
        by_kind = self.problems.groupby("problem", sort=False)
        table = by_kind.first().assign(records=by_kind.size())
        table["shard"] = [self.shards[number].name for number in table["shard"]]
        table = table.rename(columns={"shard": "first in", "record": "as record"})
        return table[["records", "first in", "as record", "detail"]]

    def report(self) -> pd.Series:
        """Counts of records, pictures, landmarks and unusable or doubtful triplets."""
        landmark = self.pictures["landmark"].to_numpy()
        sizes = pd.Series(landmark[landmark != UNKNOWN]).value_counts()
        false_negative = landmark[self.triplets["anchor"]] == landmark[self.triplets["negative"]]
        copies = near_duplicates(self.pictures["perceptual_hash"].to_numpy())
        return pd.Series(
            {
                "records": len(self.triplets) + len(self.problems),
                "records that can't be used": len(self.problems),
                "pictures": 3 * len(self.triplets),
                "different pictures": len(self.pictures),
                "landmarks found": len(sizes),
                "landmarks with two pictures or more": int((sizes >= 2).sum()),
                "pictures per landmark, mean": round(float(sizes.mean()), 2),
                "pictures per landmark, most": int(sizes.max()),
                "degenerate triplets": int(self.degenerate.sum()),
                "false negatives": int(false_negative.sum()),
                "pairs of near-duplicates": len(copies),
            },
            dtype=object,
        )


# ---- the pass over the shards


def open_catalogue(dataset_dir: Path) -> Catalogue:
    """Read the catalogue of a folder of shards, or build it if it is absent or does not fit them.

    Raises:
        DatasetNotFoundError: the folder has no shards.
        CatalogueError: none of their records can be used.
    """
    path = Path(dataset_dir) / CATALOGUE
    shards = find_shards(dataset_dir)
    if misnamed := misnamed_shards(dataset_dir):
        print(f"Left out, as not named like a shard: {misnamed}")
    if path.is_file():
        try:
            return load_catalogue(path)
        except CatalogueError as error:
            print(f"Making {CATALOGUE} anew: {error}")
    remove_half_written(path.parent)
    catalogue = build_catalogue(shards)
    try:
        save_catalogue(catalogue, path)
    except OSError as error:  # such as a read-only folder
        print(f"{show_path(path)} can't be kept ({show_error(error)}): made again each time")
    return catalogue


def build_catalogue(shards: Sequence[Path]) -> Catalogue:
    """Read the shards, sorted by number, once on all processor cores, and find their landmarks.

    It verifies every record's checksums and decodes every picture, so that training meets no
    damage. Unusable records are left out and listed in ``problems``.

    Raises:
        CatalogueError: none of their records can be used.
    """
    shards = [Path(shard) for shard in shards]
    frames = [list(scan_frames(shard)) for shard in shards]
    total = sum(map(len, frames))
    where = f"the {len(shards)} shards of {show_path(shards[0].parent)}"
    if not total:
        raise CatalogueError(f"{where} are empty: fetch or convert them again")
    rows, problems = [], []
    with (
        process_pool() as pool,
        tqdm(total=total, desc="cataloguing", unit=" records", leave=False) as bar,
    ):
        chunks = (
            (number, shards[number], of_shard[start : start + _CHUNK])
            for number, of_shard in enumerate(frames)
            for start in range(0, len(of_shard), _CHUNK)
        )
        for found, failed in (map if total <= _FEW else pool.map)(_read_chunk, chunks):
            rows += found
            problems += failed
            bar.update(len(found) // 3 + len(failed))
    if not rows:
        reasons = "; ".join(f"{problem}: {detail}" for *_, problem, detail in problems[:3])
        raise CatalogueError(
            f"no usable record in {where} ({reasons}): fetch or convert them again"
        )
    rows = pd.DataFrame(rows, columns=_COLUMNS).astype({"perceptual_hash": np.uint64})
    return identify(Catalogue(shards, rows, pd.DataFrame(problems, columns=_PROBLEMS)))


_COLUMNS = [
    *("shard", "record", "offset", "role", "image", "position", "length"),
    *("width", "height", "perceptual_hash", "image_id", "landmark_id"),
]
_PROBLEMS = ["shard", "record", "offset", "problem", "detail"]


def _read_chunk(chunk: tuple[int, Path, list[Frame]]) -> tuple[list[tuple], list[tuple]]:
    """Inspect records of one shard; returns rows of _COLUMNS and of _PROBLEMS."""
    number, shard, frames = chunk
    rows, problems, inspected = [], [], {}
    with shard.open("rb") as file:
        for frame in frames:
            try:
                message = read_message(file, frame)
                triplet = parse_triplet(message)
                record = []
                for role, picture in enumerate(triplet.pictures):
                    image = image_hash(picture)
                    if image not in inspected:
                        inspected[image] = inspect_picture(picture)
                    # Equal bytes are the same picture, so the first occurrence will do.
                    place = (frame.message_offset + message.find(picture), len(picture))
                    names = [ids[role] if ids else None for ids in triplet[3:]]
                    where = (number, frame.number, frame.offset)
                    record.append((*where, role, image, *place, *inspected[image], *names))
                rows += record
            except RecordError as error:
                problems.append((number, frame.number, frame.offset, error.kind, error.detail))
    return rows, problems


def inspect_picture(picture: bytes) -> tuple[int, int, int]:
    """Check a JPEG picture by decoding it, small and grey.

    Returns:
        width and height in pixels, and :func:`lib.data.duplicates.perceptual_hash`.

    Raises:
        RecordError: it is not an RGB or grey JPEG picture, has more than 50 megapixels, or would
            take many seconds to decode.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(picture)
    except ValueError as error:
        raise RecordError("not a JPEG picture", str(error)) from None
    if width * height > MAX_PIXELS:
        raise RecordError("picture too large", f"its header claims {width} x {height} pixels")
    if is_endless(picture, width, height):
        raise RecordError("picture too slow", "it has far too many scans")
    if colours not in ("YCbCr", "Gray", "RGB"):
        raise RecordError("neither RGB nor grey", f"its colours are {colours}")
    try:
        grey = simplejpeg.decode_jpeg(picture, "GRAY", min_height=32, min_width=32)
    except ValueError as error:
        raise RecordError("picture does not decode", str(error)) from None
    return width, height, perceptual_hash(Image.fromarray(grey[..., 0]))


# ---- landmarks and splits


def identify(catalogue: Catalogue, merge_neighbours: bool = True) -> Catalogue:
    """Fill in the columns ``landmark`` and ``group``.

    Landmarks are the connected components of the graph that links each record's anchor and
    positive. Neighbouring records are merged where :func:`lib.data.neighbours.pair_neighbours` is
    certain, and put into one group where it finds them possible. Without ``merge_neighbours``, two
    groups may show the same landmark. If the shards state the landmarks of all pictures, these are
    used instead.
    """
    triplets, pictures = catalogue.triplets, catalogue.pictures
    anchor, positive, negative = (triplets[role].to_numpy() for role in ROLES)
    n = len(pictures)
    joined = [(anchor, positive)]
    landmark = group = _components(n, joined)
    known = np.zeros(n, dtype=bool)
    known[anchor] = known[positive] = True
    stated, _ = pd.factorize(pictures["landmark_id"])  # -1 where nothing is stated
    if (stated >= 0).all():
        landmark, known[:] = stated, True
        representative = np.unique(stated, return_index=True)[1]  # a picture of each landmark
        group = _components(n, [*joined, (np.arange(n), representative[stated])])
    elif merge_neighbours:
        pairs = pair_neighbours(landmark, anchor, positive, negative, _follows_previous(catalogue))
        sure, perhaps = map(np.flatnonzero, pairs)
        landmark = _components(n, [*joined, (anchor[sure], anchor[sure + 1])])
        group = _components(n, [*joined, (anchor[perhaps], anchor[perhaps + 1])])
    # Renumbered in the order of the pictures.
    landmark = pd.factorize(np.where(known, landmark, np.nan))[0]
    group = pd.factorize(group)[0]
    picture_of_row = triplets[list(ROLES)].to_numpy().ravel()
    rows = catalogue.rows.assign(landmark=landmark[picture_of_row], group=group[picture_of_row])
    return replace(catalogue, rows=rows)


def _follows_previous(catalogue: Catalogue) -> np.ndarray:
    """bool (triplets,): whether no record is missing between a triplet and the one before."""
    triplets, shards = catalogue.triplets, catalogue.shards
    record, shard = triplets["record"].to_numpy(), triplets["shard"].to_numpy()
    number = np.array([-10 if (n := shard_number(path)) is None else n for path in shards])[shard]
    everything = pd.concat([triplets[["shard", "record"]], catalogue.problems[["shard", "record"]]])
    last = everything.groupby("shard")["record"].max().to_dict()
    at_end = record == np.array([last[s] for s in shard])
    within = (np.diff(shard) == 0) & (np.diff(record) == 1)
    across = (np.diff(number) == 1) & at_end[:-1] & (record[1:] == 0)
    return np.concatenate([[number[0] == 0 and record[0] == 0], within | across])


def _components(n: int, edges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The number of the connected component of each of n nodes."""
    a, b = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    return connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)))[1]


def pair_agreement(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of a clustering of n pictures, over pairs in the same cluster.

    Args:
        found, truth: int (n,), labels; UNKNOWN in ``found`` stands for a cluster of its own.

    Returns:
        precision and recall; each is 1.0 where it would divide by 0.
    """
    from sklearn.metrics.cluster import pair_confusion_matrix  # here, as it loads slowly

    found = np.where(found == UNKNOWN, -1 - np.arange(len(found)), found)
    _, wrong, missed, right = pair_confusion_matrix(truth, found).ravel().tolist()
    precision = right / (right + wrong) if right + wrong else 1.0
    return precision, (right / (right + missed) if right + missed else 1.0)


def split_landmarks(catalogue: Catalogue, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Split the pictures by group, so that no landmark is in two splits.

    Args:
        catalogue: with n pictures.
        shares: the share of the groups for each split's name; they sum to 1.
        seed: of the random assignment.

    Returns:
        str (n,), the split of each picture.

    Raises:
        ValueError: a share is negative, or they do not sum to 1.
    """
    if not np.isclose(sum(shares.values()), 1.0) or min(shares.values()) < 0:
        raise ValueError(f"shares must be at least 0 and sum to 1, not {dict(shares)}")
    group = catalogue.pictures["group"].to_numpy()
    n = group.max() + 1
    order = np.random.default_rng(seed).permutation(n)
    bounds = np.round(np.cumsum([0.0, *shares.values()]) * n).astype(int)
    bounds[-1] = n
    split_of_group = np.empty(n, dtype=np.int64)
    split_of_group[order] = np.repeat(np.arange(len(shares)), np.diff(bounds))
    return np.array(list(shares))[split_of_group[group]]


# ---- the file


_MADE_FROM = b"made_from"
_CHECKSUM = b"xxh3_128="  # 32 hexadecimal digits follow it in the file
# Nullable, since the rows of unusable records have no picture.
_TYPES = dict.fromkeys(
    ["record", "offset", "position", "length", "width", "height", "landmark", "group"], "Int64"
) | {"perceptual_hash": "UInt64"}


def save_catalogue(catalogue: Catalogue, path: Path) -> None:
    """Write the catalogue as a Parquet file, atomically; the module says what is in it."""
    problems = catalogue.problems.astype({"record": "Int64", "offset": "Int64"})
    rows = pd.concat([catalogue.rows.astype(_TYPES), problems], ignore_index=True)
    names = [shard.name for shard in catalogue.shards]
    rows["shard"] = pd.Categorical.from_codes(rows["shard"].astype(np.int64), names)
    rows["role"] = rows["role"].map(dict(enumerate(ROLES))).astype("category")
    table = pa.Table.from_pandas(rows, preserve_index=False)
    made_from = json.dumps({"format": _FORMAT, "shards": _state(catalogue.shards)})
    table = table.replace_schema_metadata(
        {_MADE_FROM: made_from, b"checksum": _CHECKSUM + b"0" * 32}
    )
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    with replacing(path) as part:
        part.write_bytes(_with_checksum(file.getvalue()))


def _with_checksum(content: bytes) -> bytes:
    """Put the right digits behind _CHECKSUM in a Parquet file: XXH3 of all other bytes."""
    # Parquet's own checksums do not cover the footer, where columns are named and located.
    before, _, after = content.rpartition(_CHECKSUM)
    digits = xxhash.xxh3_128_hexdigest(before + after[32:]).encode()
    return before + _CHECKSUM + digits + after[32:]


def load_catalogue(path: Path) -> Catalogue:
    """Read a catalogue.

    Raises:
        CatalogueError: it is damaged, or the shards beside it are not those it was made from.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content != _with_checksum(content):
            raise ValueError("its checksum is wrong or missing")
        table = pq.read_table(io.BytesIO(content))
        made_from = json.loads(table.schema.metadata[_MADE_FROM])
        usable = pc.is_null(table["problem"])
        # Separated before they become pandas: there, gaps would turn integers into floats.
        rows = table.filter(usable).drop_columns(["problem", "detail"]).to_pandas()
        problems = table.filter(pc.invert(usable)).select(_PROBLEMS).to_pandas()
        for part in (rows, problems):
            part["shard"] = part["shard"].cat.codes.astype(np.int64)
        rows["role"] = rows["role"].map({name: i for i, name in enumerate(ROLES)}).astype(np.int64)
    except Exception as error:  # Arrow and pandas raise errors of many types
        reason = show_error(error)
        raise CatalogueError(f"{show_path(path)} is damaged, or no catalogue ({reason})") from None
    shards = find_shards(path.parent)
    if made_from != {"format": _FORMAT, "shards": _state(shards)}:
        raise CatalogueError(
            f"{show_path(path)} was made from other shards than those that are there now"
        )
    return Catalogue(shards, rows, problems)


def _state(shards: list[Path]) -> list[dict]:
    """What tells shards from changed ones: names, sizes and times of modification."""
    stats = [(shard.name, shard.stat()) for shard in shards]
    return [{"name": n, "bytes": s.st_size, "modified_ns": s.st_mtime_ns} for n, s in stats]


@program()
def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.data.catalogue", description=f"Make {CATALOGUE} of a folder of shards."
    )
    parser.add_argument("dataset_dir", type=as_path, help="the folder with train00.tfrec ...")
    options = parser.parse_args(arguments)
    catalogue = open_catalogue(options.dataset_dir)
    print(catalogue.report().to_string())
    if len(catalogue.problems):
        print(f"\nLeft out:\n{catalogue.damage().to_string()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
