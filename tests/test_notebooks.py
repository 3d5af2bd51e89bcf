"""Claims about the notebooks: they run, they still say what they said, and their pictures are in the file.

`python tests/test_notebooks.py` runs them and stores the new outputs in place: do that after changing a notebook or what it calls.
"""
import base64
import copy
import io
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def execute(path):
    """(stored, fresh): the notebook as committed, and a copy of it run anew in its own folder, without times and versions."""
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # allow_errors: every cell runs, so that the test can name the one that failed.
    nbclient.NotebookClient(fresh, timeout=60, kernel_name="python3", record_timing=False, coalesce_streams=True, allow_errors=True,
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    fresh.metadata["language_info"] = {"name": "python"}
    return stored, fresh


SLOW = [pytest.mark.slow]                                                                 # all but one, which is always run


@pytest.fixture(scope="module", params=[pytest.param(path, marks=SLOW * ("02_kto" not in path.stem), id=path.stem) for path in NOTEBOOKS])
def run(request):
    return execute(request.param)


def outputs(notebook, kind):
    return [(cell.id, output) for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def printed(notebook):
    """{cell: what it printed}. stderr is left out: matplotlib reports there that it builds its font cache."""
    text = {cell.id: "" for cell in notebook.cells}
    for cell, output in outputs(notebook, "stream"):
        text[cell] += output.text if output.name == "stdout" else ""
    return text


def pictures(notebook):
    return [cell for cell, output in outputs(notebook, "display_data") if "image/png" in output.data]


def words_and_numbers(text):
    return " ".join(NUMBER.sub("#", text).split()), [float(x) for x in NUMBER.findall(text)]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_a_notebook_runs_without_errors(run):
    _, fresh = run
    assert [(cell, error.ename, error.evalue) for cell, error in outputs(fresh, "error")] == []


def test_what_a_notebook_printed_is_what_it_prints(run):
    # Relative 1e-3: other CPUs and torch versions round differently, a stale output is further off. Absolute 1e-6: what is
    # printed as rounding or as distance to an optimum is zero but for the machine's own noise.
    stored, fresh = printed(run[0]), printed(run[1])
    for cell, text in fresh.items():
        (words, numbers), (old_words, old_numbers) = words_and_numbers(text), words_and_numbers(stored[cell])
        assert old_words == words, f"cell {cell}: run `python tests/test_notebooks.py` and read the new output"
        assert old_numbers == pytest.approx(numbers, rel=1e-3, abs=1e-6), f"cell {cell}"
    assert any(fresh.values())


def test_pictures_are_committed_and_in_the_same_cells(run):
    stored, fresh = run
    assert pictures(stored) and pictures(stored) == pictures(fresh)


def test_a_notebook_is_small_and_carries_no_times(run):
    stored, _ = run
    refresh = "run `python tests/test_notebooks.py`, which shrinks the pictures and drops times and versions"
    assert len(nbformat.writes(stored)) < 600_000, refresh
    assert stored.metadata["language_info"] == {"name": "python"} and not any(cell.metadata for cell in stored.cells), refresh


@pytest.mark.parametrize("changed", ["loss 0.502 at r", "loss 0.500 at z", "loss 0.500"])
def test_a_stale_number_or_word_would_be_seen(changed):
    (old_words, old_numbers), (words, numbers) = words_and_numbers("loss  0.500 at r"), words_and_numbers(changed)
    assert old_words != words or old_numbers != pytest.approx(numbers, rel=1e-3, abs=1e-6)


def shrink(png):
    """The picture with 128 colours, a third of the bytes."""
    from PIL import Image                                                                 # comes with matplotlib
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    for path in NOTEBOOKS:
        _, fresh = execute(path)
        if errors := outputs(fresh, "error"):
            raise SystemExit(f"{path.name}, cell {errors[0][0]}: {errors[0][1].ename}: {errors[0][1].evalue}; nothing stored")
        for cell in fresh.cells:
            if "outputs" in cell:
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for _, output in outputs(fresh, "display_data"):
            output.data["image/png"] = shrink(output.data["image/png"])
        nbformat.write(fresh, path)
        print(f"{path.name}: {len(pictures(fresh))} pictures, {path.stat().st_size / 1000:.0f} kB")
