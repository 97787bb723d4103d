"""Turns nested results, such as ``metrics.json``, into tables of texts for a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lib.evaluation.metrics import Interval

MOST = 50  # rows of a list, or values in one cell, that are shown

_WORDS = {"map": "mAP", "gem": "GeM", "val": "validation", "infonce": "InfoNCE"}


class Table(NamedTuple):
    """A table of texts. The first cell of each row names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def metric_tables(content: dict, caption: str = "", *, exact: bool = False) -> Iterator[Table]:
    """Turn a section of ``metrics.json``, however nested, into tables.

    Plain values share one table. Neighbouring dicts with the same keys, such as a measure of
    several models, share one table too, with the longer side downwards. A list of dicts is a
    table as well. Deeper dicts follow in tables of their own.

    Args:
        content: the section; ``{value, low, high}`` counts as one value, an interval.
        caption: names the place of ``content`` in its section.
        exact: show names and values as code has them, not as prose.
    """
    name, text = (str, repr) if exact else (_name, cell_text)

    def below(key: str) -> str:
        return f"{caption} · {name(key)}" if caption else name(key)

    leaves = {key: value for key, value in content.items() if is_leaf(value)}
    if leaves:
        yield Table(caption, ("", "value"), [(name(k), text(v)) for k, v in leaves.items()])

    flat: dict[str, dict] = {}
    deeper: dict[str, dict] = {}
    for key, value in content.items():
        if key in leaves:
            continue
        if isinstance(value, list) and all(map(_is_flat, value)):
            yield _list_table(below(key), value, name, text)
        elif _is_flat(value):
            flat[key] = value
        else:
            deeper[key] = value if is_nested(value) else dict(enumerate(value, 1))

    for group in _alike(flat):
        if len(group) == 1:
            ((key, column),) = group.items()
            yield Table(below(key), ("", "value"), [(name(r), text(v)) for r, v in column.items()])
        else:
            yield _group_table("" if leaves else caption, group, name, text)  # said above

    for key, value in deeper.items():
        yield from metric_tables(value, below(key), exact=exact)


def _alike(flat: dict[str, dict]) -> list[dict[str, dict]]:
    """Group dicts whose keys include one another."""
    groups: list[dict[str, dict]] = []
    for key, value in flat.items():
        for group in groups:
            first = next(iter(group.values()))
            if value.keys() <= first.keys() or value.keys() >= first.keys():
                group[key] = value
                break
        else:
            groups.append({key: value})
    return groups


def _list_table(caption: str, values: list[dict], name: Callable, text: Callable) -> Table:
    """A list of dicts: a numbered row for each."""
    columns = list(dict.fromkeys(column for row in values for column in row))
    rows = [
        (str(number), *(text(row[c]) if c in row else "–" for c in columns))
        for number, row in enumerate(values[:MOST], 1)
    ]
    note = f" (the first {MOST} of {len(values)})" if len(values) > MOST else ""
    return Table(caption + note, ("", *map(name, columns)), rows)


def _group_table(caption: str, group: dict[str, dict], name: Callable, text: Callable) -> Table:
    """Several dicts side by side, with the longer side downwards."""
    columns = list(group)
    rows = list(dict.fromkeys(row for column in group.values() for row in column))
    cells = {(r, c): text(group[c][r]) if r in group[c] else "–" for r in rows for c in columns}
    if len(columns) > len(rows):
        rows, columns = columns, rows
        cells = {(c, r): cell for (r, c), cell in cells.items()}
    body = [(name(r), *(cells[r, c] for c in columns)) for r in rows]
    return Table(caption, ("", *map(name, columns)), body)


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(Interval._fields)
        and all(isinstance(bound, int | float) for bound in value.values())
    )


def is_nested(value: Any) -> bool:
    """Whether a value is a dict that takes more than one cell."""
    return isinstance(value, dict) and bool(value) and not _is_interval(value)


def is_leaf(value: Any) -> bool:
    """Whether a value fits into one cell."""
    if isinstance(value, list):
        return all(map(is_leaf, value))
    return not is_nested(value)


def _is_flat(value: Any) -> bool:
    """Whether a value is a dict of values that fit into one cell each."""
    return is_nested(value) and all(map(is_leaf, value.values()))


def cell_text(value: Any) -> str:
    """A value that fits into one cell, for people."""
    if _is_interval(value):
        return str(Interval(**value))
    if isinstance(value, list) and value:
        more = f", … ({len(value)} in all)" if len(value) > MOST else ""
        return ", ".join(map(cell_text, value[:MOST])) + more
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}"
    return str(value) if value else "–"


def _name(key: Any) -> str:
    """A key of ``metrics.json`` for people: ``map_at_10`` becomes mAP@10."""
    key = str(key)
    if not re.fullmatch(r"[a-z0-9_]+", key):
        return key  # is prose already
    key = re.sub(r"_at_(\d+)", r"@\1", key)
    return re.sub(r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), key.replace("_", " "))


def heading(key: str) -> str:
    """The same with a capital letter."""
    name = _name(key)
    return name if name.startswith("mAP") else name[:1].upper() + name[1:]
