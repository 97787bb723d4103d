"""Each notebook has a notebook of solutions, which has their form and a part for each exercise."""

import re

import nbformat
import pytest

from tests.notebooks.test_form import MOST_LINES, PATHS, check_outputs, too_long

SOLUTIONS = {path.name: path.parent / "solutions" / path.name for path in PATHS}
by_name = pytest.mark.parametrize("name", SOLUTIONS)


def exercises(notebook) -> dict[str, str]:
    """Numbers and texts of the exercises at the end of a notebook of the course."""
    (cell,) = (cell for cell in notebook.cells if "## Exercises" in cell.source)
    _, listed = cell.source.split("## Exercises")
    found = re.findall(r"^(\d+)\. (.*)$", listed.split("\n## ")[0], re.M)
    return {number: plain(text) for number, text in found}


def plain(text: str) -> str:
    """A text without emphasis and quotation marks."""
    return re.sub('[*"]', "", text).strip()


def test_each_notebook_has_solutions_and_there_are_no_others():
    folder = PATHS[0].parent / "solutions"
    assert {path.name for path in folder.glob("*.ipynb")} == set(SOLUTIONS)


@by_name
def test_solutions_have_the_common_form(name):
    notebook = nbformat.read(SOLUTIONS[name], as_version=4)
    first, second = notebook.cells[:2]
    number = name[:2]
    assert notebook.metadata.kernelspec.name == "python3"
    assert first.source.startswith(f"# Solutions to {number} · ")
    assert f"[← back to the notebook](../{name})" in first.source
    assert re.search(r"^\*Takes .* on two processor cores", first.source, re.M)
    assert second.metadata.tags == ["parameters"]
    assert re.search(r"^\w+: \w+ = ", second.source, re.M)
    assert len([line for line in second.source.splitlines() if line.strip()]) <= MOST_LINES
    assert not too_long(notebook)


@by_name
def test_each_exercise_is_solved_in_its_turn(name):
    """A part begins with the exercise, has code, and ends with a sentence that reads the result."""
    (path,) = (path for path in PATHS if path.name == name)
    cells = nbformat.read(SOLUTIONS[name], as_version=4).cells
    starts, said = {}, {}
    for place, cell in enumerate(cells):
        if cell.cell_type == "markdown" and (
            found := re.match(r"\*\*(\d+)\.\*\* (.*)", cell.source)
        ):
            starts[found[1]], said[found[1]] = place, plain(found[2])
    assert said == exercises(nbformat.read(path, as_version=4))
    ends = [*list(starts.values())[1:], len(cells)]
    for start, end in zip(starts.values(), ends, strict=True):
        assert any(cell.cell_type == "code" for cell in cells[start:end])
        assert cells[end - 1].cell_type == "markdown"


@by_name
def test_saved_outputs_of_solutions_are_those_of_one_run_in_order(name):
    check_outputs(nbformat.read(SOLUTIONS[name], as_version=4))
