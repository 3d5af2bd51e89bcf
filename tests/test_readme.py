"""README.md's commands run and reach its numbers; README.zh.md says what README.md says."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest

import recipes
from lab import metrics, torchrun

ROOT = Path(__file__).parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")

FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.M)
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
# Not the digits of z0, bf16, Qwen2.
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


# --- the main command ---------------------------------------------------------------------------

def main_command():
    """The torchrun command of the README's first code block, as written there."""
    block = re.search(r"```sh\n(.*?)```", ENGLISH, re.S)[1]
    command = re.search(r"torchrun (train\.py.*)", block)[1]
    words = shlex.split(command.split("&&")[0])
    return [sys.executable, "-m", "torch.distributed.run", *words]


def run_main_job(out, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([*main_command(), "--out", str(out), *flags], cwd=ROOT, text=True,
                          capture_output=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_main_job(out, steps):
    result = json.loads((out / "eval.json").read_text())
    low, high = result["win_rate_ci95"]
    assert low <= result["win_rate"] <= high
    assert result["n"] == 480 and result["split"] == "report"
    for name in ("curves.png", "frontier.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert len(metrics(out)) == steps
    # No policy lies above the exact frontier; two standard errors of a mean of 480 utilities.
    assert result["reward"] <= result["optimum_at_same_kl"]["reward"] + 0.1
    return result


def test_the_main_command_runs(tmp_path):
    """On a base model of a few steps; the whole job is a slow test."""
    few = ("--pretrain_steps", "20", "--sft_steps", "20", "--steps", "10")
    said = run_main_job(tmp_path / "kto", *few)
    check_main_job(tmp_path / "kto", 10)
    for part in ("step 0: loss 0.500000 (predicted 0.500000)", "What came out", "next:"):
        assert part in said
    words = [sys.executable, ROOT / "evaluate.py", tmp_path / "kto", "--prompt", "Help, my router!"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert "reference" in answer.stdout and "policy" in answer.stdout, answer.stderr


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    out = tmp_path_factory.mktemp("main") / "kto"
    run_main_job(out)
    return out


@pytest.mark.slow
def test_the_main_command_reaches_its_numbers(main_job):
    """Of one seed; the bounds leave two standard errors below what is promised."""
    result = check_main_job(main_job, 400)
    assert result["win_rate"] >= 0.81 and result["reward"] >= 1.75
    assert result["malformed"] <= 0.10
    assert result["reward_greedy"] > result["reward_ref_greedy"] + 1


@pytest.mark.slow
def test_two_processes_reach_the_same_win_rate_in_fp32(main_job):
    done = torchrun(2, "--loss", "kto", "--out", main_job.parent / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((main_job.parent / name / "eval.json").read_text())
                for name in ("kto", "two"))
    assert one["win_rate_ci95"][0] <= two["win_rate"] <= one["win_rate_ci95"][1]
    assert two["win_rate_ci95"][0] <= one["win_rate"] <= two["win_rate_ci95"][1]


# --- two languages ------------------------------------------------------------------------------

def same(english, chinese, what):
    """One line per difference of two lists, or of two multisets, that should be equal."""
    if isinstance(english, Counter):
        lost = sorted((english - chinese).elements())
        extra = sorted((chinese - english).elements())
        if not lost and not extra:
            return []
        return [f"{what}: only in README.md {lost}, only in README.zh.md {extra}"]
    return [f"{what} {i}: README.md has {a!r}, README.zh.md {b!r}"
            for i, (a, b) in enumerate(zip_longest(english, chinese), 1) if a != b]


def check(differences):
    assert not differences, "\n" + "\n".join(differences)


def tables(text):
    return [t.rstrip("\n").split("\n") for t in TABLE.findall(FENCE.sub("", text))]


def cells(row):
    return re.split(r"(?<!\\)\|", row)[1:-1]


def flags(text):
    return Counter(" ".join(flag.split()) for flag in re.findall(r"`([^`]+)`", text))


def numbers(text):
    words = LINK.sub(lambda link: link[0].split("](")[0], re.sub(r"`[^`]+`", "` `", text))
    return Counter(NUMBER.findall(words))


def targets(text):
    return [mark + to for mark, to in LINK.findall(text)
            if not to.startswith("#") and to not in ("README.md", "README.zh.md")]


def shape(text):
    paragraphs = re.split(r"\n\s*\n", text.strip())
    items = re.findall(r"^(?:-|\d+\.) ", text, re.M)
    return [f"{len(paragraphs)} paragraphs", f"{len(items)} list items"]


def sections(text):
    """[(level, heading, prose)], without code, tables and the translator's notes (> ...)."""
    text = re.sub(r"^>.*\n", "", TABLE.sub("", FENCE.sub("", text)), flags=re.M)
    parts = re.split(r"^(#+) (.+)\n", text, flags=re.M)
    return list(zip(map(len, parts[1::3]), parts[2::3], parts[3::3]))


def test_headings_are_as_many_and_of_the_same_levels():
    english, chinese = ([level for level, *_ in sections(text)] for text in (ENGLISH, CHINESE))
    assert english == chinese


def test_code_blocks_are_identical():
    check(same(FENCE.findall(ENGLISH), FENCE.findall(CHINESE), "code block"))


def test_tables_have_the_same_rows_columns_flags_and_numbers():
    english, chinese = tables(ENGLISH), tables(CHINESE)
    assert [len(table) for table in english] == [len(table) for table in chinese]
    differences = []
    for a, b in zip(sum(english, []), sum(chinese, [])):
        for x, y in zip(cells(a), cells(b), strict=True):
            differences += same(flags(x), flags(y), f"flags, cell {x!r}")
            differences += same(numbers(x), numbers(y), f"numbers, cell {x!r}")
    check(differences)


def test_each_section_has_the_same_numbers_flags_links_and_shape():
    differences = []
    for (_, name, a), (_, _, b) in zip(sections(ENGLISH), sections(CHINESE), strict=True):
        for compare in (numbers, flags, targets, shape):
            differences += same(compare(a), compare(b), f"{name!r}, {compare.__name__}")
    check(differences)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_first_page_is_short_and_no_command_is_cut_off():
    assert len(ENGLISH.splitlines()) <= 250 and len(CHINESE.splitlines()) <= 250
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            assert max(map(len, block.splitlines())) <= 100, (page.name, block)


def test_every_objective_is_on_the_first_page():
    missing = [name for name in [*recipes.LOSSES, *recipes.RECIPES] if f"`{name}`" not in ENGLISH]
    assert not missing
