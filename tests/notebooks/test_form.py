"""The notebooks have the common form, and their saved outputs are those of one run in order."""

import re

import nbformat
import pytest

from lib.files import project_root

PATHS = sorted((project_root() / "notebooks").glob("*.ipynb"))
OF_A_MACHINE = re.compile(r"(?<![\w.])(?:/(?:home|root|Users|tmp|work)/|[A-Z]:\\)")


def texts(output):
    """What an output shows as text; pictures are bytes in base64, in which any letters occur."""
    yield output.get("text", "")
    yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_have_the_common_form(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert re.search(r"^\*Takes .* on two processor cores", notebook.cells[0].source, re.M)
    assert code[0].metadata.tags == ["parameters"]
    assert "record_metrics(" in code[-1].source
    assert "Exercises" in notebook.cells[-1].source


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_saved_outputs_are_those_of_one_run_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            for text in texts(output):
                assert str(project_root().parent) not in text
                assert not OF_A_MACHINE.search(text), "a path of one machine"
