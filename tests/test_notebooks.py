"""The notebooks run, they still say what they said, and they fit the page.

`python tests/test_notebooks.py 03` runs notebook 03 (those whose names begin so; without an
argument all) and stores the new outputs in place: do that after changing it or what it calls.
"""

import base64
import copy
import io
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def answers(notebook):
    """The code in the folded answers, as cells."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [nbformat.v4.new_code_cell(code, id=f"answer-{k}")
            for k, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S), 1)]


def execute(path):
    """(stored, fresh, errors): the notebook as committed, a copy that was run anew in its own
    folder, and what failed in it or in the answers to its exercises, which run after it.
    """
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    fresh.cells += answers(stored)
    # allow_errors: every cell runs, so that the test can name the one that failed.
    client = nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", record_timing=False, coalesce_streams=True,
        allow_errors=True, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    errors = [(cell, error.ename, error.evalue) for cell, error in outputs(fresh, "error")]
    fresh.cells = fresh.cells[:len(stored.cells)]
    fresh.metadata["language_info"] = {"name": "python"}                 # without its version
    return stored, fresh, errors


def notebook(path):
    """All but one are slow."""
    marks = [] if "02_kto" in path.stem else [pytest.mark.slow]
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.fixture(scope="module", params=[notebook(path) for path in NOTEBOOKS])
def run(request):
    return execute(request.param)


def outputs(notebook, kind):
    """[(id of the cell, output), ...]"""
    return [(cell.id, output) for cell in notebook.cells
            for output in cell.get("outputs", []) if output.output_type == kind]


def printed(notebook):
    """{cell: what it printed}, without stderr, where matplotlib says that it looks for fonts."""
    text = {cell.id: "" for cell in notebook.cells}
    for cell, output in outputs(notebook, "stream"):
        if output.name == "stdout":
            text[cell] += output.text
    return text


def pictures(notebook):
    """The cells that show them."""
    return [cell for cell, output in outputs(notebook, "display_data")
            if "image/png" in output.data]


def words_and_numbers(text):
    words = " ".join(NUMBER.sub("#", text).split())
    return words, [float(x) for x in NUMBER.findall(text)]


def close_to(numbers):
    """Relative 1e-3: other CPUs and torch versions round differently, a stale output is further
    off. Absolute 1e-6: what is printed as rounding, or as a distance to an optimum, is noise.
    """
    return pytest.approx(numbers, rel=1e-3, abs=1e-6)


def test_there_are_notebooks():
    assert NOTEBOOKS


# --- the page: without running anything -----------------------------------------------------------

PAGE = 95                                # columns; GitHub shows these without a scroll bar
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def too_long(where, text):
    return [f"{where}: {line}" for line in text.splitlines() if len(line) > PAGE]


@each
def test_code_and_what_it_prints_fit_the_page(path):
    found = []
    stored = nbformat.read(path, as_version=4)
    for cell in stored.cells:
        if cell.cell_type == "code":
            found += too_long(cell.id, cell.source)
            lines = len(cell.source.splitlines())
            if lines > 25:
                found.append(f"{cell.id}: {lines} lines, 25 fit a screen")
    for cell, text in printed(stored).items():
        found += too_long(f"{cell} prints", text)
    assert not found, "\n" + "\n".join(found)


@each
def test_a_notebook_begins_with_its_question(path):
    """Its first cell is a title, the question in a paragraph of its own, and more."""
    title, question, *_ = nbformat.read(path, as_version=4).cells[0].source.split("\n\n")
    assert title.startswith("# ") and "\n" not in title
    assert question.strip("* \n").endswith("?"), question


@each
def test_a_notebook_ends_with_three_exercises_whose_answers_are_folded(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    *_, (number, title) = re.findall(r"^## (\d+\. )?(.*)$", text, re.M)
    assert title == "Exercises"
    exercises = text.split(f"## {number}{title}")[1]
    for tag in ("<details>", "<summary>", "</details>"):
        assert exercises.count(tag) == 3, tag


@each
def test_the_glossary_is_one_click_away(path):
    assert "../docs/glossary.md" in nbformat.read(path, as_version=4).cells[0].source


def test_the_helpers_fit_the_page_and_the_glossary_has_twenty_words():
    helpers = ROOT / "notebooks" / "plots.py"
    assert too_long("plots.py", helpers.read_text()) == []
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| ", glossary, re.M)) == 1 + 20


# --- the run --------------------------------------------------------------------------------------


def test_a_notebook_runs_without_errors(run):
    *_, errors = run
    assert errors == []


def test_what_a_notebook_printed_is_what_it_prints(run):
    stored, fresh = printed(run[0]), printed(run[1])
    for cell, text in fresh.items():
        words, numbers = words_and_numbers(text)
        old_words, old_numbers = words_and_numbers(stored[cell])
        assert old_words == words, f"{cell}: run `python tests/test_notebooks.py` and read it again"
        assert old_numbers == close_to(numbers), f"cell {cell}"
    assert any(fresh.values())


def test_pictures_are_committed_and_in_the_same_cells(run):
    stored, fresh, _ = run
    assert pictures(stored)
    assert pictures(stored) == pictures(fresh)


def test_a_notebook_is_small_and_carries_no_times(run):
    stored, *_ = run
    refresh = "run `python tests/test_notebooks.py`: it shrinks pictures, drops times and versions"
    assert len(nbformat.writes(stored)) < 600_000, refresh
    assert stored.metadata["language_info"] == {"name": "python"}, refresh
    assert not any(cell.metadata for cell in stored.cells), refresh


def test_a_stale_number_or_word_would_be_seen():
    words, numbers = words_and_numbers("loss  0.500 at r")
    for changed in ("loss 0.502 at r", "loss 0.500 at z", "loss 0.500"):
        new_words, new_numbers = words_and_numbers(changed)
        assert words != new_words or numbers != close_to(new_numbers), changed


# --- storing new outputs --------------------------------------------------------------------------

def shrink(png):
    """The picture with 128 colours, a third of the bytes."""
    from PIL import Image                                                # comes with matplotlib
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    small = io.BytesIO()
    picture.convert("RGB").quantize(128).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def refresh(path):
    _, fresh, errors = execute(path)
    for cell, name, value in errors:
        raise SystemExit(f"{path.name}, cell {cell}: {name}: {value}; nothing stored")
    for cell in fresh.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    for _, output in outputs(fresh, "display_data"):
        if "image/png" in output.data:
            output.data["image/png"] = shrink(output.data["image/png"])
    nbformat.write(fresh, path)
    size = path.stat().st_size / 1000
    print(f"{path.name}: {len(pictures(fresh))} pictures, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    names = tuple(sys.argv[1:]) or ("",)
    for path in NOTEBOOKS:
        if path.stem.startswith(names):
            refresh(path)
