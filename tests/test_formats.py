"""Every format reads as what it says, and what cannot be read is one line that names its row."""
import csv
import gzip
import json
import sys
import types
from dataclasses import replace

import pytest

from plumbing import formats
from plumbing.formats import FORMATS, Feedback, Pair, Turn, pairs_from_scores, read, to_feedback

TEXT = {"prompt": "Q", "completion": "A", "label": True}


def user(content):
    return {"role": "user", "content": content}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


CHAT = [{"role": "system", "content": "S"}, user("Q")]
TURNS = (Turn("system", "S"), Turn("user", "Q"))
SHARE = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}]
LONG = [says("a"), user("b"), says("c")]
GOES_ON = (Turn("assistant", "a"), Turn("user", "b"), Turn("assistant", "c"))
CALLS = [{"function": {"name": "weather", "arguments": {"unit": "</s>"}}}]
CALL = json.dumps({"tool_calls": CALLS})
TOOLS = [{**user("Q"), "name": "Ann"}, says(None, tool_calls=CALLS),
         {"role": "tool", "content": "R", "tool_call_id": "7"}, {**says("A"), "id": 3}]
TOOL_TURNS = (Turn("user", "Q", '{"name": "Ann"}'), Turn("assistant", "", CALL),
              Turn("tool", "R", '{"tool_call_id": "7"}'))
BOTH = {"chosen": "A", "rejected": "B"}
PARTS = [{"type": "text", "text": "A"}, {"text": "B"}]
HH = "\n\nHuman: Q\n\nAssistant: a\n\nHuman: b?\nPlease, Human: b\n\nAssistant:"
HH_TURNS = (TURNS[1], *GOES_ON[:1], Turn("user", "b?\nPlease, Human: b"))

ROWS = [                                                     # a row, what it becomes
    (TEXT, Feedback("Q", "A", True)),
    ({"prompt": "Q", "text": "A", "label": 0}, Feedback("Q", "A", False)),
    ({"prompt": "Q", "response": "A", "kto_tag": -1}, Feedback("Q", "A", False)),
    ({**TEXT, "truncated": True}, Feedback("Q", "A", True, whole=False)),
    ({**TEXT, "finish_reason": "length"}, Feedback("Q", "A", True, whole=False)),
    ({**TEXT, "weight": 2}, Feedback("Q", "A", True, weight=2.0)),
    ({"prompt": [{"role": "Developer", "content": "S"}, {"from": "HUMAN", "value": "Q"}],
      "completion": [{"role": "bot", "content": PARTS}], "label": 0}, Feedback(TURNS, "AB", False)),
    ({"prompt": "Q", **BOTH, "rejected": [], "weight": 0}, Pair("Q", "A", "", weight=0.0)),
    ({"prompt": "Q", "chosen": [says("A")], "rejected": []}, Pair("Q", "A", "")),
    ({"chosen": HH + " c", "rejected": HH + " x \n"}, Pair(HH_TURNS, "c", "x")),         # hh-rlhf
    ({"chosen": HH + " c", "rejected": "\n\nHuman: Q\n\nAssistant: x"},
     Pair(TURNS[1:], GOES_ON[:1] + HH_TURNS[2:] + GOES_ON[2:], "x")),
    ({**TEXT, "system": "S", "chosen": None}, Feedback(TURNS, "A", True)),
    ({"prompt": CHAT, "completion": LONG, "label": 1}, Feedback(TURNS, GOES_ON, True)),
    ({"messages": TOOLS, "label": True}, Feedback(TOOL_TURNS, "A", True)),
    ({"conversations": [*SHARE, {"from": "gpt", "value": "A"}], "kto_tag": 0, "system": "other"},
     Feedback(TURNS, "A", False)),
    ({"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]],
      "label": 1}, Feedback((TURNS[0], Turn("user", "q"), Turn("assistant", "a"),
                             Turn("user", "Q\nI")), "A", True)),
    ({"prompt": "Q", "completion": "A", "reward": 1.5}, Feedback("Q", "A", True, score=1.5)),
    ({"prompt": "Q", "text": "A", "score": 1}, Feedback("Q", "A", False, score=1.0)),   # not >=
    ({"prompt": "Q", **BOTH}, Pair("Q", "A", "B")),
    ({"prompt": "Q", **BOTH, "score_chosen": 2, "score_rejected": -1.5, "target": "C",
      "win_prob_chosen": 1, "win_prob_rejected": None},
     Pair("Q", "A", "B", 2.0, -1.5, win_prob_chosen=1.0, target="C")),
    ({"prompt": CHAT, "chosen": [says("A")], "rejected": "B"}, Pair(TURNS, "A", "B")),
    ({"prompt": CHAT, "chosen": LONG, "rejected": LONG[:1], "segment": {"start": 0, "end": 1}},
     Pair(TURNS, GOES_ON, "a", segment=(0, 1))),
    ({"prompt": "Q", "chosen": [user("Q"), says("A")], "rejected": [user("Q"), says("B")]},
     Pair(TURNS[1:], "A", "B")),                                         # UltraFeedback
    ({"conversations": SHARE, "chosen": {"from": "gpt", "value": "A"}, "rejected": "B"},
     Pair(TURNS, "A", "B")),
    ({"instruction": "Q", "input": "", **BOTH}, Pair(TURNS[1:], "A", "B")),
    # whole chats: the turns that both share are the prompt, then both go on with the assistant
    ({"chosen": [*CHAT, says("A")], "rejected": [*CHAT, says("B")]}, Pair(TURNS, "A", "B")),
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, *LONG[:2], says("B")]},
     Pair((*TURNS, *GOES_ON[:2]), "c", "B")),
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, LONG[0]]}, Pair(TURNS, GOES_ON, "a")),
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, LONG[0], user("x"), LONG[2]]},
     Pair(TURNS, GOES_ON, (GOES_ON[0], Turn("user", "x"), GOES_ON[2]))),
]
MANY = {"prompt": "Q", "responses": ["A", [says("B")]], "scores": [2, 0.5]}


def write(path, *rows):
    path.write_text("\n\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def complaint(files, **how):
    """The one line with which reading stops."""
    with pytest.raises(SystemExit) as stop:
        read(files, **how)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_every_format_reads_alike_from_lines_an_array_and_parquet(tmp_path):
    from pyarrow import Table, parquet
    lines, array, table = tmp_path / "f.jsonl", tmp_path / "f.json", tmp_path / "f.parquet"
    for row, example in ROWS:
        write(lines, row, row)
        array.write_text(json.dumps([row, row], indent=1))
        named = {lines: ("line 1", "line 3"), array: ("record 1", "record 2")}
        one_type = not any(isinstance(row.get(name), list) for name in
                           ("history", "completion", "messages", "prompt", "rejected"))
        if one_type or row.get("prompt") == CHAT:            # parquet's lists have one type
            parquet.write_table(Table.from_pylist([row, row]), table)
            named[table] = ("row 1", "row 2")
        for file, rows in named.items():
            wanted = [replace(example, where=f"{file}: {name}") for name in rows]
            assert read(file, threshold=1.0)[0] == wanted, row
            assert read(file, threshold=1.0, prompts=True)[0] == wanted


def test_every_format_of_the_table_is_among_these_examples():
    examples = formats.parse(MANY, threshold=1)[1]
    assert examples == [Feedback("Q", "A", True, score=2.0), Feedback("Q", "B", False, score=0.5)]
    seen = {formats.parse(row, threshold=1.0)[0] for row, _ in [*ROWS, (MANY, None)]}
    assert seen == {", ".join(columns) for columns in FORMATS}


def test_columns_are_renamed_before_anything_else(tmp_path):
    columns = formats.parse_columns("prompt=question,completion=answer,label=good")
    row = {"prompt": "old", "question": "Q", "answer": "A", "good": -1}
    assert formats.parse(row, columns=columns)[1] == [Feedback("Q", "A", False)]
    assert "--columns prompt=question" in complaint(write(tmp_path / "f", TEXT), columns=columns)
    for text in ("promt=question", "prompt"):
        with pytest.raises(SystemExit, match="--columns .* completion"):
            formats.parse_columns(text)


def test_a_prompt_alone_is_read_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "f.jsonl"
    for row, prompt in [({"prompt": SHARE}, TURNS), ({"prompt": ""}, ""),
                        ({"prompt": "Q", "completion": "A", "chosen": None}, "Q")]:
        write(path, row)
        wanted = [Feedback(prompt, "", None, where=f"{path}: line 1")]
        found, name = read(path, prompts=True)
        assert found == wanted and name.startswith("prompts alone")
        assert f"{path}: line 1: " in complaint(path)


BAD_CELLS = dict(                                            # in place of a good row's
    label=["true", "", 2, 0.5, 1.0, None, [1]], prompt=[5, [], None, "\ud800"], system=[1],
    completion=[7, None, CHAT, [says("A"), user("Q")], [*CHAT, says("A")], {"role": "x\ny"}])
BAD_ROWS = [
    3, ["prompt"], {}, {"a\nb": 1}, {"prompt": "Q"}, {"chosen": "Q A", "rejected": "Q B"},
    *({**TEXT, name: cell} for name, cells in BAD_CELLS.items() for cell in cells),
    {"prompt": "Q", "completion": "A", "reward": 1.0},                  # and no threshold
    *({"prompt": "Q", **BOTH, "segment": x} for x in [
        [0, 1], {"start": 0}, {"start": 1, "end": 1}, {"start": -1, "end": 1},
        {"start": 0, "end": 1.0}, {"start": False, "end": 1}]),
    {"prompt": "Q", **BOTH, "score_chosen": "2"},
    {"prompt": "Q", "chosen": [user("other"), says("A")], "rejected": [user("other"), says("B")]},
    {"instruction": ["Q"], "output": "A", "label": True},
    {"instruction": "Q", "output": "A", "label": True, "history": [["q"]]},
    *({**TEXT, "weight": weight} for weight in [-1, "2", True, float("inf")]),
    *({"chosen": text, "rejected": HH} for text in [                     # not by turns
        "", "Hello" + HH, HH[:-11], "\n\nHuman: P" + HH, "\n\nAssistant: A" + HH,
        HH + "\n\nHuman: Q"]),
    {**TEXT, "completion": [says([{"type": "image", "url": "x"}])]},
    *({"messages": messages, "label": 1} for messages in [
        CHAT, "Q", [], ["A"], [{"role": ["user"], "content": "A"}], [says(None)]]),
]
BAD_SCORES = [{"reward": x} for x in ["high", True, None, float("nan"), 1e999, 10 ** 400]]
BAD_SCORES += [{"responses": responses, "scores": scores} for responses, scores in [
    (["A"], [1, 2]), ("A", [1]), ([], 1), (["A"], ["1"])]]


def test_a_bad_row_is_one_line_that_names_file_and_row(tmp_path):
    path = tmp_path / "f.jsonl"
    for row in BAD_ROWS:
        good = TEXT
        if isinstance(row, dict) and "rejected" in row:
            good = {"prompt": "Q", **BOTH}                              # kinds must not mix
        write(path, good, row)
        assert complaint(path).startswith(f"{path}: line 3: "), row
    for cells in BAD_SCORES:
        row = {"prompt": "Q", "completion": "A", **cells}
        write(path, {**TEXT, "reward": 1.0}, row)
        assert complaint(path, threshold=0.0).startswith(f"{path}: line 3: "), row


def test_a_bad_file_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "f.jsonl"
    assert complaint(path) == f"--data {path}: no such file"
    for content in (b"", b"[]", b"\xef\xbb\xbf", b'{"prompt": "caf\xe9"}', b"PAR1",
                    b'{"prompt": "Q"', b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
        path.write_bytes(content)
        assert str(path) in complaint(path), content[:40]
    path.write_text(json.dumps(TEXT) + '\n{"prompt": }')
    assert f"{path}: line 2: broken JSON" in complaint(path)


def test_line_separators_inside_a_string_do_not_split_a_line(tmp_path):
    path = tmp_path / "f.jsonl"
    for separator in ("\x0c", "\x85", "\u2028", "\x1c", "\n", "\r\n"):
        lines = [json.dumps({**TEXT, "prompt": f"a{separator}b"}, ensure_ascii=False)] * 2
        path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())      # and a byte order mark
        examples, _ = read(path)
        assert [e.prompt for e in examples] == [f"a{separator}b"] * 2
        assert examples[1].where == f"{path}: line 2"


def test_packed_files_csv_and_a_folder_of_save_to_disk_read_like_the_lines(tmp_path):
    from pyarrow import Table, ipc
    rows = [{**TEXT, "prompt": 'a, "b"\n\u2028c', "weight": 0.5},
            {**TEXT, "prompt": "12", "completion": "true", "label": False, "weight": 2.0}]
    wanted = [(e.prompt, e.completion, e.desirable, e.weight)
              for e in read(write(tmp_path / "f.jsonl", *rows))[0]]
    array = tmp_path / "f.json"
    array.write_text("\n" + json.dumps(rows))
    with open(tmp_path / "f.csv", "w", newline="", encoding="utf-8-sig") as file:
        sheet = csv.DictWriter(file, rows[0])
        sheet.writeheader()
        sheet.writerows(rows)
    folder = tmp_path / "saved"
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, row in zip(names, rows):
        table = Table.from_pylist([row])
        with ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    files = [array, tmp_path / "f.csv", folder]
    for file in (tmp_path / "f.jsonl", *files[:2]):
        files.append(tmp_path / (file.name + ".gz"))
        files[-1].write_bytes(gzip.compress(file.read_bytes()))
    for file in files:
        found = [(e.prompt, e.completion, e.desirable, e.weight) for e in read(file)[0]]
        assert found == wanted, file
    assert read(folder)[0][1].where == f"{folder}: row 2"
    files[-1].write_bytes(files[-1].read_bytes()[:-9])                   # packed by half
    (tmp_path / "f.csv").write_text("prompt,completion,label\nQ,A,1\nQ,A\n")
    (folder / names[1]).unlink()
    for file in (tmp_path / "f.csv", folder, files[-1], tmp_path):
        assert complaint(file).startswith(f"--data {file}: cannot be read")


def test_a_complaint_names_the_flag_the_column_of_the_file_and_what_stands_there(tmp_path):
    row = {"question": "Q", "answer": [{"role": "boss"}], "good": "yes"}
    path = write(tmp_path / "f.jsonl", row)
    assert complaint(tmp_path / "none", flag="--eval_data").startswith("--eval_data ")
    for columns, named in [
            ({}, ["question", "--columns"]), ({"prompt": "ask"}, ["--columns prompt=ask", "good"]),
            ({"prompt": "question", "completion": "answer", "label": "good"},
             ["column answer", "'boss'", "bot", "--columns completion="]),
            ({"prompt": "question", "completion": "question", "label": "good"},
             ["column good", "'yes'", "true", "--columns label="])]:
        found = complaint(path, columns=columns)
        assert [part for part in named if part not in found] == [], found


def test_columns_that_are_ignored_are_named_once_and_rows_without_answers_counted(tmp_path):
    rows = [{**TEXT, "id": i, "Q": None, "text": "B"} for i in range(3)]
    rows.append({"prompt": "Q", "responses": [], "scores": [], "split": "x"})
    examples, name = read(write(tmp_path / "f.jsonl", *rows), threshold=0.0)
    assert len(examples) == 3
    assert name == ("prompt, completion, label, prompt, responses, scores; dropped: 1 rows without "
                    "an answer; ignored columns: id, text, split")
    name = read(write(tmp_path / "f.jsonl", {**TEXT, "reward": 1}))[1]
    assert name.endswith("; ignored columns: reward")
    columns = {"completion": "text", "prompt": "Q"}
    name = read(write(tmp_path / "f.jsonl", {**TEXT, "text": "A", "Q": "Q"}), columns=columns)[1]
    assert name.endswith("; ignored columns: prompt, completion")


def test_pairs_and_single_responses_do_not_mix(tmp_path):
    first = write(tmp_path / "a.jsonl", TEXT)
    second = write(tmp_path / "b.jsonl", {"prompt": "Q", **BOTH})
    assert complaint([first, second]).startswith(f"{second}: line 1: mixes")
    examples, name = read([first, write(tmp_path / "c", {"messages": [says("A")], "label": 0})])
    assert [e.desirable for e in examples] == [True, False]
    assert name == "prompt, completion, label, messages, label"


def test_a_name_that_is_no_file_is_a_hub_dataset(tmp_path, monkeypatch):
    def load(name, configuration, split):
        return [{**TEXT, "prompt": f"{name} {configuration} {split}", "reward": None}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    wanted = Feedback("org/name None train", "A", True, where="org/name: train row 1")
    assert read("org/name")[0] == [wanted]
    for name, asked in {"org/name:test[:5%]": "org/name None test[:5%]",
                        "org/name/en-1.0:test": "org/name en-1.0 test"}.items():
        assert read([name])[0][0].prompt == asked
    for name in ("org/name.jsonl", "name", "a/b/c/d", "x" * 5000, "nul\0"):
        assert complaint(name) == f"--data {name}: no such file"
    monkeypatch.setitem(sys.modules, "datasets", None)                  # not installed
    assert "--data org/other: no such file" in complaint("org/other")


def test_a_pair_becomes_a_desirable_and_an_undesirable_response_to_the_same_prompt():
    pair = Pair("The sky", " is blue", " is", whole=False, where="w", weight=3)
    assert to_feedback([pair]) == [Feedback("The sky", " is blue", True, False, "w", weight=3),
                                   Feedback("The sky", " is", False, False, "w", weight=3)]


def test_scored_responses_pair_the_best_with_the_worst_and_ties_and_odd_ones_are_counted():
    scores = [("P", 1.0), ("P", 3.0), ("Q", 2.0), ("P", 0.0), ("P", 2.0), ("P", 5.0), ("Q", 2.0),
              ("R", 1.0)]
    scored = [Feedback(p, f"{p}{score}", None, where=f"row {i}", score=score)
              for i, (p, score) in enumerate(scores)]
    pairs, counts = pairs_from_scores(scored)
    assert pairs == [Pair("P", "P5.0", "P0.0", 5.0, 0.0, where="row 5"),
                     Pair("P", "P3.0", "P1.0", 3.0, 1.0, where="row 1")]
    assert counts == {"scored responses": 8, "left over": 2, "ties dropped": 1}    # P's 2, and R
    scored[3] = replace(scored[3], whole=False, weight=0.5)
    pairs = pairs_from_scores(scored)[0]
    assert [(pair.whole, pair.weight) for pair in pairs] == [(False, 0.5), (True, 1)]
    with pytest.raises(SystemExit, match="here: "):
        pairs_from_scores([Feedback("P", "A", True, where="here")])


def test_scored_files_become_pairs_without_a_threshold_and_a_label_hides_no_score(tmp_path):
    path = tmp_path / "f.jsonl"
    rows = [{"prompt": "Q", "completion": f"A{r}", "reward": r} for r in (1, 2, 0)]
    rows[1]["label"] = False
    (pair,), name = read(write(path, *rows), scored="pairs")
    assert (pair.chosen, pair.rejected, pair.score_chosen) == ("A2", "A0", 2.0)
    assert name.endswith("as pairs (scored responses 3 | left over 1)")
    assert str(path) in complaint(write(path, rows[0]), scored="pairs")              # no pairs
    write(path, TEXT)                                                    # labels stay labels
    assert read(path, scored="pairs")[0] == [Feedback("Q", "A", True, where=f"{path}: line 1")]


def test_the_hint_appears_where_most_responses_were_cut_and_only_there():
    cut = [Feedback("Q", f"a text that stops in the mid {i}", True) for i in range(20)]
    ended = [Feedback("Q", f"A sentence ({i}).", True) for i in range(20)]
    known = [replace(e, whole=False) for e in cut]
    assert "--add_eot false" in formats.cut_hint([*cut, *ended[:19]], True)
    for examples, add_eot in [(cut, False), (cut[:19], True), (known, True), (cut + ended, True)]:
        assert formats.cut_hint(examples, add_eot) is None
