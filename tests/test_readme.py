"""Claims about README.zh.md: it says what README.md says, to the number, the flag, the link and the picture.

README.md comes first; a failure lists everything that has to follow, by section or table."""
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
EN, ZH = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))

GENERATED = ("| run | win rate", "| `--loss`, its equation", "| `--loss` | win rate", "| claim |")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.M)
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")      # not the digits of z0, bf16, Qwen2


def same(english, chinese, what):
    """One line per difference of two lists, or of two multisets, that should be equal."""
    if isinstance(english, Counter):
        lost, extra = (sorted((a - b).elements()) for a, b in ((english, chinese), (chinese, english)))
        return [f"{what}: only in README.md {lost}, only in README.zh.md {extra}"] if lost or extra else []
    return [f"{what} {i}: README.md has {a!r}, README.zh.md {b!r}" for i, (a, b) in enumerate(zip_longest(english, chinese), 1) if a != b]


def check(differences):
    assert not differences, "\n" + "\n".join(differences)


def tables(text, generated):
    return [t.rstrip("\n").split("\n") for t in TABLE.findall(FENCE.sub("", text)) if t.startswith(GENERATED) == generated]


def cells(row):
    return re.split(r"(?<!\\)\|", row)[1:-1]


def flags(text):
    return Counter(" ".join(f.split()) for f in re.findall(r"`([^`]+)`", text))


def numbers(text):
    return Counter(NUMBER.findall(LINK.sub(lambda m: m[0].split("](")[0], re.sub(r"`[^`]+`", "` `", text))))


def sections(text):
    """[(level, heading, prose)]: no code blocks, no tables, and no notes of the translator's (lines that begin with >)."""
    text = re.sub(r"^>.*\n", "", TABLE.sub("", FENCE.sub("", text)), flags=re.M)
    parts = re.split(r"^(#+) (.+)\n", text, flags=re.M)
    return list(zip(map(len, parts[1::3]), parts[2::3], parts[3::3]))


def by_section(compare):
    english, chinese = sections(EN), sections(ZH)
    assert len(english) == len(chinese), "sections first: see test_headings_are_as_many_and_of_the_same_levels"
    check([line for (_, name, a), (_, _, b) in zip(english, chinese) for line in compare(name, a, b)])


def test_each_readme_links_to_the_other_under_its_title():
    assert EN.split("\n")[:4] == ["# nanoKTO", "", "[中文](README.zh.md)", ""]
    assert ZH.split("\n")[:4] == ["# nanoKTO", "", "[English](README.md)", ""]


def test_headings_are_as_many_and_of_the_same_levels():
    levels = [[level for level, *_ in sections(text)] for text in (EN, ZH)]
    names = [[name for _, name, _ in sections(text)] for text in (EN, ZH)]
    assert levels[0] == levels[1], f"\nREADME.md: {names[0]}\nREADME.zh.md: {names[1]}"


def test_code_blocks_are_identical():
    check(same(FENCE.findall(EN), FENCE.findall(ZH), "code block"))


def test_generated_tables_are_pasted_in_unchanged():
    english, chinese = tables(EN, True), tables(ZH, True)
    assert [t[0] for t in english] == [t[0] for t in chinese] and len(english) == len(GENERATED)
    for a, b in zip(english, chinese):
        check(same(Counter(a), Counter(b), f"copy the table {a[0][:30]!r} from README.md again"))
        assert a == b, f"the rows of {a[0][:30]!r} are in another order than in README.md"


def test_a_note_before_the_first_generated_table_says_why_they_are_in_english():
    note = [line for line in ZH.split(GENERATED[0])[0].split("\n") if line.startswith("> ")]
    assert len(note) == 1 and "表" in note[0] and "生成" in note[0] and "英文" in note[0]


def test_other_tables_have_the_same_rows_columns_flags_and_numbers():
    english, chinese = tables(EN, False), tables(ZH, False)
    check(same([(len(t), len(cells(t[0]))) for t in english], [(len(t), len(cells(t[0]))) for t in chinese], "(rows, columns) of translated table"))
    differences = []
    for a, b in ((a, b) for t in zip(english, chinese) for a, b in zip(*t)):
        assert len(cells(a)) == len(cells(b)), f"columns:\n{a}\n{b}"
        for x, y in zip(cells(a), cells(b)):
            differences += same(flags(x), flags(y), f"flags, cell {x!r}") + same(numbers(x), numbers(y), f"numbers, cell {x!r}")
    check(differences)


def test_pictures_and_links_lead_to_the_same_places_in_the_same_order():
    def targets(text):
        return [mark + to for mark, to in LINK.findall(text) if not to.startswith("#") and to not in ("README.md", "README.zh.md")]
    by_section(lambda name, a, b: same(targets(a), targets(b), f"section {name!r}, link"))


def test_each_section_has_the_same_numbers():
    by_section(lambda name, a, b: same(numbers(a), numbers(b), f"section {name!r}, numbers"))


def test_each_section_has_the_same_flags_files_and_commands():
    by_section(lambda name, a, b: same(flags(a), flags(b), f"section {name!r}, in backticks"))


def test_each_section_has_as_many_paragraphs_and_list_items():
    def shape(text):
        paragraphs, items = re.split(r"\n\s*\n", text.strip()), re.findall(r"^(?:-|\d+\.) ", text, re.M)
        return [f"{len(paragraphs)} paragraphs", f"{len(items)} list items"]
    by_section(lambda name, a, b: same(shape(a), shape(b), f"section {name!r}, count"))
