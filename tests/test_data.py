"""Claims about data.py: what is trained is what was asked for, y' is never an answer to x, and every complaint names its row."""
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import data
from conftest import SHARED, needs_shared
from data import EOT, Feedback, Pair, Turn, batch_at, encode, flatten, lambda_weights, make_row, mismatch, mismatched, read, to_feedback

settings.register_profile("nanokto", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("nanokto")

BYTES = data.load_tokenizer()
NASTY = ["</s>", "<s>", EOT, "<|user|>", "<|assistant|>", "\x0c", "\x85", "\u2028", "\r\n", "\n", "\t", "\x00", "  ", "\u27e60:content\u27e7",
         "\u4f60\u597d\u3002", "\U0001f600", "\u0301", "\ufeff", "{{ x }}", "[INST]", " .", " n't"]
texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=6), max_size=6).map("".join)
answers = texts.filter(lambda s: s.strip())


# --- tokenizers of the three kinds ------------------------------------------------------------------------------------

TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def hf_folder(folder, template=None):
    """A Hugging Face tokenizer over bytes, with a BOS that it writes itself, and four control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|user|>", "<|assistant|>"])
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", fast.bos_token_id)])
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return data.load_tokenizer(hf_folder(tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return data.load_tokenizer(hf_folder(tmp_path_factory.mktemp("chat"), TEMPLATE))


@pytest.fixture(scope="module")
def gpt2():
    return data.load_tokenizer(SHARED / "gpt2-bpe")


@pytest.fixture(scope="module", params=["bytes", pytest.param("gpt2", marks=needs_shared), "hf", "chat"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue(request.param)


@needs_shared
def test_gpt2s_hello_world_is_15496_995(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.eot == 50256 and gpt2.vocab_size == 50257 and gpt2.bos == []


@given(answers)
def test_trained_tokens_decode_to_the_response_and_one_end_of_text(tokenizer, text):
    for prompt in ("Why?", (Turn("user", "Why?"),)):
        (row,), _ = encode([Feedback(prompt, text, True)], tokenizer)
        trained = row.ids[row.mask > 0]
        assert tokenizer.decode(trained[:-1]) == text and trained[-1] == tokenizer.eot
        assert tokenizer.text(trained) == text
        assert tokenizer.eot not in trained[:-1]                                     # "</s>" in a file is four characters


@given(texts)
def test_text_from_users_never_becomes_a_control_token(tokenizer, text):
    control = {tokenizer.eot} if not tokenizer.hf else set(tokenizer.backend.all_special_ids)
    assert not control & set(tokenizer.encode(text))
    assert not control & set(tokenizer.prompt_ids(text)[len(tokenizer.bos):])


@given(texts, texts)
def test_a_prompt_and_its_response_are_encoded_apart(tokenizer, prompt, response):
    assume(response.strip() and len(prompt.encode()) < 400)
    (row,), _ = encode([Feedback(prompt, response, False)], tokenizer)
    assert row.ids.tolist() == (tokenizer.prompt_ids(prompt) or [tokenizer.eot]) + tokenizer.encode(response) + [tokenizer.eot]
    assert row.n_prompt == len(tokenizer.prompt_ids(prompt) or [tokenizer.eot]) and row.mask.tolist() == [0.0] * row.n_prompt + [1.0] * len(row.response)


@needs_shared
def test_no_token_straddles_the_border_of_prompt_and_response(gpt2):
    (row,), _ = encode([Feedback("Hello wor", "ld", True)], gpt2)
    assert row.ids.tolist() == gpt2.encode("Hello wor") + gpt2.encode("ld") + [50256]
    assert gpt2.encode("Hello world") != row.ids.tolist()[:-1]                       # encoded together it would be another row


def test_bos_comes_once_as_the_tokenizer_says_and_only_on_prompts(hf, chat):
    bos, user, assistant = (hf.backend.convert_tokens_to_ids(t) for t in ("<s>", "<|user|>", "<|assistant|>"))
    assert hf.bos == chat.bos == [bos] and BYTES.bos == []
    assert hf.prompt_ids("hi") == [bos, *hf.encode("hi")] and bos not in hf.encode("hi")
    assert chat.prompt_ids((Turn("user", "hi"),)) == [bos, user, *chat.encode("hi"), chat.eot, assistant]     # not a second BOS
    assert hf.prompt_ids("") == [bos] and encode([Feedback("", "x", True)], BYTES)[0][0].n_prompt == 1


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=4))
def test_a_chat_template_renders_every_content_exactly_and_only_its_own_text_is_control(chat, turns):
    ids = {t: chat.backend.convert_tokens_to_ids(t) for t in ("<s>", "<|user|>", "<|assistant|>")}
    wanted = [ids["<s>"]]
    for role, content in turns:
        wanted += [ids[f"<|{role}|>"], *chat.encode(content), chat.eot]              # untrimmed: spaces are the user's
    assert chat.prompt_ids(tuple(Turn(*t) for t in turns)) == [*wanted, ids["<|assistant|>"]]


def test_without_a_template_a_conversation_is_named_turns(hf):
    turns = (Turn("system", "Be brief."), Turn("user", "Hi</s>"))
    text = "System:\nBe brief.\n\nUser:\nHi</s>\n\nAssistant:\n"
    assert BYTES.decode(BYTES.prompt_ids(turns)) == text
    assert hf.prompt_ids(turns) == hf.bos + hf.encode(text) and hf.eot not in hf.prompt_ids(turns)


@pytest.mark.parametrize("template", [
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",                      # drops a turn
    "{% for m in messages %}{{ m.content[:8] }}{% endfor %}",                                        # cuts
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}"], ids=["drops", "cuts", "changes"])
def test_a_template_that_loses_a_message_is_an_error_not_a_silent_loss(tmp_path, template):
    tokenizer = data.load_tokenizer(hf_folder(tmp_path, template))
    with pytest.raises(SystemExit, match="line 3: the chat template loses or changes a message"):
        encode([Feedback((Turn("system", "Answer in French."), Turn("user", "hello world")), "z", True, where="f.jsonl: line 3")], tokenizer)


@pytest.mark.parametrize("prompt, why", [((), "an empty conversation"), ((Turn("system", "x"), Turn("user", "y")), "no system role")])
def test_a_conversation_the_template_refuses_is_an_error_that_names_the_row(tmp_path, prompt, why):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0].content }}"
    tokenizer = data.load_tokenizer(hf_folder(tmp_path, template))
    with pytest.raises(SystemExit, match="line 7"):
        encode([Feedback(prompt, "z", True, where="f.jsonl: line 7")], tokenizer)


def test_tokenizers_survive_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    text = "Hello </s> " + "".join(NASTY)
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert (again.eot, again.bos, again.vocab_size) == (tokenizer.eot, tokenizer.bos, tokenizer.vocab_size)
    turns = (Turn("user", text),)
    assert again.prompt_ids(turns) == tokenizer.prompt_ids(turns)


def test_the_worlds_tokenizer_survives_saving_and_loading(tmp_path):
    import world
    tokenizer = data.Tokenizer(world.tokenizer())
    tokenizer.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    text = next(iter(world.PROMPTS)) + " \u00e9 </s>"
    assert again.encode(text) == tokenizer.encode(text) and again.eot == tokenizer.eot and again.vocab_size == tokenizer.vocab_size


def test_a_folder_without_a_tokenizer_is_a_one_line_error(tmp_path):
    with pytest.raises(SystemExit) as e:
        data.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(e.value) and "tokenizer.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["bytes", "world", pytest.param("gpt2", marks=needs_shared)])
def test_our_tokenizers_are_the_same_in_transformers(kind, tmp_path, request):
    """Random strings of a vocabulary's own tokens, of nasty ones and of any characters: the same ids from AutoTokenizer."""
    import world
    from transformers import AutoTokenizer
    tokenizer = data.Tokenizer(world.tokenizer()) if kind == "world" else BYTES if kind == "bytes" else request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')                  # it lies beside an exported GPT
    copy = data.Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert (copy.eot, copy.bos, copy.vocab_size) == (tokenizer.eot, tokenizer.bos, tokenizer.vocab_size)
    assert not data.load_tokenizer(tmp_path).hf                                      # ours still reads its own file
    rng = random.Random(0)
    own = [tokenizer.decode([i]) for i in rng.sample(range(tokenizer.vocab_size - 1), min(tokenizer.vocab_size - 1, 2000))]
    for _ in range(1500):
        text = "".join(rng.choice([rng.choice(own), rng.choice(NASTY), chr(rng.choice([rng.randrange(0xd800), rng.randrange(256)]))]) for _ in range(rng.randrange(12)))
        assert copy.encode(text) == tokenizer.encode(text), repr(text)
        assert copy.decode(tokenizer.encode(text)) == text
    for turns in (ASK, ASK[:2], ASK[1:]):                                            # and the plain template is the same
        assert copy.prompt_ids(turns) == tokenizer.prompt_ids(turns)


def test_a_token_that_no_merge_leads_to_is_still_found_whole_in_transformers(tmp_path):
    import tiktoken
    from transformers import AutoTokenizer
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    tokenizer = data.Tokenizer(tiktoken.Encoding("odd", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={EOT: 257}))
    tokenizer.save(tmp_path)
    assert tokenizer.encode("abc") == data.Tokenizer(AutoTokenizer.from_pretrained(tmp_path)).encode("abc") == [256]


def test_a_tokenizer_that_is_not_there_or_broken_is_a_one_line_error(tmp_path, monkeypatch):
    import tiktoken, transformers

    def offline(*_, **__):
        raise OSError("no\nnetwork")

    def error(name):
        with pytest.raises(SystemExit) as e:
            data.load_tokenizer(name)
        assert str(e.value).startswith(f"--tokenizer {name}: ") and "\n" not in str(e.value)
        return str(e.value)

    (tmp_path / "tokenizer.json").write_text('{"half')
    assert "unreadable (" in error(tmp_path)
    assert "no tokenizer there" in error(tmp_path / "nowhere") and "no tokenizer there" in error("nowhere")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name in ("someone/some-model", "gpt2"):
        assert "no such folder, and no such tokenizer online either (OSError: no network)" in error(name)


def test_a_hub_name_is_looked_up_online_and_code_from_there_runs_only_where_that_is_asked_for(tmp_path, monkeypatch, hf):
    import tiktoken, transformers
    asked = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append((a, k)) or hf.backend)
    assert data.load_tokenizer("someone/some-model").eot == hf.eot and data.load_tokenizer("someone/some-model", trust_remote_code=True)
    assert asked == [(("someone/some-model",), dict(local_files_only=False, trust_remote_code=yes)) for yes in (False, True)]
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": BYTES.backend}[name])
    assert data.load_tokenizer("gpt2").backend is BYTES.backend


# --- files ------------------------------------------------------------------------------------------------------------

def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


def complaint(files, **how):
    """The one line with which reading stops."""
    with pytest.raises(SystemExit) as e:
        read(files, **how)
    message = str(e.value)
    assert isinstance(e.value.code, str) and "\n" not in message                     # a text: printed, and exit status 1
    return message


CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
TURNS = (Turn("system", "S"), Turn("user", "Q"))
SHARE = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}]
LONG = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
GOES_ON = (Turn("assistant", "a"), Turn("user", "b"), Turn("assistant", "c"))
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "\u00c9vry", "unit": "</s>"}}}]
FORMATS = [
    ({"prompt": "Q", "completion": "A", "label": True}, {}, Feedback("Q", "A", True)),
    ({"prompt": "Q", "text": "A", "label": False}, {}, Feedback("Q", "A", False)),
    ({"prompt": "Q", "response": "A", "kto_tag": False}, {}, Feedback("Q", "A", False)),
    ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "A"}], "label": 1}, {}, Feedback(TURNS, "A", True)),
    ({"prompt": "Q", "completion": "A", "reward": 1.5}, {"threshold": 1.0}, Feedback("Q", "A", True, score=1.5)),
    ({"prompt": "Q", "text": "A", "score": 1}, {"threshold": 1.0}, Feedback("Q", "A", False, score=1.0)),       # "> threshold", not ">="
    ({"prompt": "Q", "completion": "A", "reward": 9, "label": False}, {"threshold": 1.0}, Feedback("Q", "A", False)),
    ({"messages": [*CHAT, {"role": "assistant", "content": "A"}], "label": True}, {}, Feedback(TURNS, "A", True)),
    ({"conversations": [*SHARE, {"from": "gpt", "value": "A"}], "kto_tag": False}, {}, Feedback(TURNS, "A", False)),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {}, Pair("Q", "A", "B")),
    ({"prompt": CHAT, "chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"}, {}, Pair(TURNS, "A", "B")),
    ({"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 2, "score_rejected": -1.5}, {}, Pair("Q", "A", "B", 2.0, -1.5)),
    ({"conversations": SHARE, "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}, {}, Pair(TURNS, "A", "B")),
    ({"chosen": [*CHAT, {"role": "assistant", "content": "A"}], "rejected": [*CHAT, {"role": "assistant", "content": "B"}]}, {}, Pair(TURNS, "A", "B")),
    ({"question": "Q", "answer": "A", "good": -1}, {"columns": {"prompt": "question", "completion": "answer", "label": "good"}}, Feedback("Q", "A", False)),
    ({"question": "Q", "response_j": "A", "response_k": "B"}, {"columns": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}}, Pair("Q", "A", "B")),
    ({"prompt": "Q", "completion": "A", "text": "B", "response": "C", "label": True}, {}, Feedback("Q", "A", True)),   # ours before an alias
    ({"prompt": "old", "question": "Q", "completion": "A", "label": 0}, {"columns": {"prompt": "question"}}, Feedback("Q", "A", False)),
    ({"messages": CHAT, "chosen": {"role": "assistant", "content": "A"}, "rejected": {"role": "assistant", "content": "B"}}, {}, Pair(TURNS, "A", "B")),
    ({"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]], "kto_tag": True}, {},
     Feedback((TURNS[0], Turn("user", "q"), Turn("assistant", "a"), Turn("user", "Q\nI")), "A", True)),
    ({"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"}, {}, Pair((Turn("user", "Q"),), "A", "B")),
    ({"conversations": SHARE[1:], "system": "S", "chosen": "A", "rejected": "B"}, {}, Pair(TURNS, "A", "B")),
    ({"conversations": [*SHARE, {"from": "gpt", "value": "A"}], "system": "other", "label": True}, {}, Feedback(TURNS, "A", True)),
    ({"prompt": "Q", "system": "S", "completion": "A", "label": True, "target": None}, {}, Feedback(TURNS, "A", True)),
    ({"prompt": "Q", "system": "", "chosen": "A", "rejected": "B", "target": "C", "score_chosen": None}, {}, Pair("Q", "A", "B", target="C")),
    ({"prompt": "Q", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],            # UltraFeedback's columns
      "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]}, {}, Pair(TURNS[1:], "A", "B")),
    ({"prompt": CHAT, "completion": [*LONG], "label": True}, {}, Feedback(TURNS, GOES_ON, True)),
    ({"prompt": CHAT, "chosen": LONG, "rejected": LONG[:1], "segment": {"start": 0, "end": 1}}, {}, Pair(TURNS, GOES_ON, "a", segment=(0, 1))),
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, {"role": "assistant", "content": "B"}]}, {}, Pair(TURNS, GOES_ON, "B")),
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, *LONG[:2], {"role": "assistant", "content": "B"}]}, {}, Pair((*TURNS, *GOES_ON[:2]), "c", "B")),
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, LONG[0]]}, {}, Pair(TURNS, GOES_ON, "a")),        # one a prefix of the other
    ({"chosen": [*CHAT, LONG[0]], "rejected": [*CHAT, LONG[0]]}, {}, Pair(TURNS, "a", "a")),          # the same: encode drops and counts it
    ({"chosen": [*CHAT, *LONG], "rejected": [*CHAT, LONG[0], {"role": "user", "content": "x"}, LONG[2]]}, {},       # the users differ: back to the assistant
     Pair(TURNS, GOES_ON, (GOES_ON[0], Turn("user", "x"), GOES_ON[2]))),
    ({"messages": [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": None, "tool_calls": CALLS},
                   {"role": "tool", "content": "R", "tool_call_id": "7"}, {"role": "assistant", "content": "A", "id": 3}], "label": True}, {},
     Feedback((Turn("user", "Q", '{"name": "Ann"}'), Turn("assistant", "", json.dumps({"tool_calls": CALLS}, ensure_ascii=False)), Turn("tool", "R", '{"tool_call_id": "7"}')), "A", True)),
]
MANY = ({"prompt": "Q", "responses": ["A", [{"role": "assistant", "content": "B"}]], "scores": [2, 0.5]},
        [Feedback("Q", "A", True, score=2.0), Feedback("Q", "B", False, score=0.5)])


@pytest.mark.parametrize("as_array", [False, True], ids=["jsonl", "array"])
@pytest.mark.parametrize("record, how, example", FORMATS, ids=[",".join(f[0]) + "|" + ",".join(f[1]) for f in FORMATS])
def test_every_format_reads_alike_from_lines_and_from_an_array(tmp_path, record, how, example, as_array):
    path = tmp_path / "f.json"
    path.write_text(json.dumps([record, record], indent=1) if as_array else "\n\n".join([json.dumps(record)] * 2))
    before = json.dumps(record)
    examples, _ = read(path, **how)
    rows = ("record 1", "record 2") if as_array else ("line 1", "line 3")
    assert examples == [dataclasses.replace(example, where=f"{path}: {row}") for row in rows]
    data.parse(record, columns=how.get("columns"), threshold=how.get("threshold"))
    assert json.dumps(record) == before                                              # parsing renames in a copy


PROMPTS = [({"prompt": "Q"}, {}, "Q"), ({"prompt": CHAT, "id": 3}, {}, TURNS), ({"prompt": SHARE}, {}, TURNS), ({"prompt": "Q", "system": "S"}, {}, TURNS),
           ({"question": "Q"}, {"columns": {"prompt": "question"}}, "Q"), ({"messages": CHAT}, {"columns": {"prompt": "messages"}}, TURNS),
           ({"prompt": "Q", "completion": "A"}, {}, "Q"), ({"prompt": "Q", "chosen": None, "rejected": None}, {}, "Q"), ({"prompt": ""}, {}, "")]


@pytest.mark.parametrize("record, how, prompt", PROMPTS, ids=[str(p[0])[:40] for p in PROMPTS])
def test_a_prompt_alone_is_read_from_lines_an_array_and_parquet_where_that_is_asked_for(tmp_path, record, how, prompt):
    import pyarrow as pa, pyarrow.parquet as pq
    jsonl(tmp_path / "a.jsonl", record, record)
    (tmp_path / "a.json").write_text(json.dumps([record, record]))
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    for file, row in (("a.jsonl", "line"), ("a.json", "record"), ("a.parquet", "row")):
        wanted = [Feedback(prompt, "", None, where=f"{tmp_path / file}: {row} {i}") for i in (1, 2)]
        assert read(tmp_path / file, prompts=True, **how) == (wanted, "prompts alone")
        assert f"{tmp_path / file}: {row} 1: " in complaint(tmp_path / file, **how)                     # not asked for: an error


def test_where_prompts_may_stand_alone_every_other_format_reads_as_before_and_may_stand_beside_them(tmp_path):
    for i, (record, how, _) in enumerate(FORMATS):
        path = jsonl(tmp_path / f"{i}.jsonl", record)
        assert read(path, **how) == read(path, prompts=True, **how)
    examples, name = read(jsonl(tmp_path / "both.jsonl", TEXT, {"prompt": "P"}), prompts=True)
    assert [e.desirable for e in examples] == [True, None] and name == "prompt, completion, label, prompts alone"


def test_every_named_format_is_among_the_examples(tmp_path):
    names = {data.parse(record, **how)[0] for record, how, _ in FORMATS} | {data.parse(MANY[0], threshold=1)[0]}
    assert names == set(data.FORMATS)


@pytest.mark.parametrize("label, desirable", [(True, True), (1, True), (False, False), (0, False), (-1, False)])
def test_a_label_is_true_false_one_zero_or_minus_one(tmp_path, label, desirable):
    (example,), _ = read(jsonl(tmp_path / "f.jsonl", {"prompt": "Q", "completion": "A", "label": label}))
    assert example.desirable is desirable


@pytest.mark.parametrize("label", ['"true"', '"1"', '"good"', '""', "2", "-2", "0.5", "1.0", "NaN", "[]", "[1]", "{}"])
def test_any_other_label_is_an_error_that_names_file_and_row(tmp_path, label):
    ok = {"prompt": "Q", "completion": "A", "label": True}
    path = jsonl(tmp_path / "f.jsonl", ok, '{"prompt": "Q", "completion": "A", "label": %s}' % label)
    message = complaint(path)
    assert f"{path}: line 2: label is" in message and "true, false, 1, 0, -1" in message


TEXT = {"prompt": "Q", "completion": "A", "label": True}
BAD_ROWS = [                                                                         # second row of a file, words of the complaint, flags
    ('{"prompt": "Q"', "broken JSON", {}),
    ('{"prompt": "Q", "completion": "A", "label": true} trailing', "broken JSON", {}),
    ("3", "JSON object", {}),
    ('["prompt"]', "JSON object", {}),
    ("{}", "unknown format", {}),
    ({"prompt": "Q", "label": True}, "unknown format with columns prompt, label", {}),
    ({"instruction": "Q", "output": "A"}, "prompt + completion + label", {}),
    ({"prompt": "Q", "completion": "A", "reward": 1.0}, "--threshold", {}),
    ({"prompt": "Q", "completion": "A", "reward": "high"}, "reward is 'high'", {"threshold": 1.0}),
    ({"prompt": "Q", "completion": "A", "reward": True}, "finite number", {"threshold": 1.0}),
    ('{"prompt": "Q", "completion": "A", "reward": NaN}', "finite number", {"threshold": 1.0}),
    ('{"prompt": "Q", "completion": "A", "reward": 1e999}', "finite number", {"threshold": 1.0}),
    ({"prompt": "Q", "completion": "A", "reward": None}, "line 2: reward is null; the format prompt + completion + reward needs it", {"threshold": 1.0}),
    ({"prompt": "Q", "completion": "A", "label": None}, "line 2: label is null; the format prompt + completion + label needs it", {}),
    ({"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": "2"}, "score_chosen is '2'", {}),
    ({"prompt": 5, "completion": "A", "label": True}, "text or a list of messages", {}),
    ({"prompt": [], "completion": "A", "label": True}, "text or a list of messages", {}),
    ({"prompt": None, "completion": "A", "label": True}, "line 2: prompt is null", {}),
    ({"prompt": "Q", "completion": None, "label": True}, "line 2: completion is null", {}),
    ({"prompt": "Q", "completion": 7, "label": True}, "text or a list of messages", {}),
    ({"prompt": "Q", "completion": CHAT, "label": True}, "one assistant message", {}),
    ({"prompt": "Q", "completion": [{"role": "assistant", "content": "A"}, *CHAT], "label": True}, "from the assistant's to the assistant's", {}),
    ({"prompt": "Q", "completion": [*CHAT, {"role": "assistant", "content": "A"}], "label": True}, "from the assistant's to the assistant's", {}),
    ({"prompt": "Q", "chosen": {"role": "user", "content": "A"}, "rejected": "B"}, "one assistant message", {}),
    ({"prompt": "Q", "chosen": None, "rejected": "B"}, "line 2: chosen is null; the format prompt + chosen + rejected needs it", {}),
    ({"prompt": "Q", "rejected": "B"}, "unknown format with columns prompt, rejected (nearest: prompt + chosen + rejected, without chosen)", {}),
    ({"prompt": "Q", **{k: [{"role": "user", "content": "other"}, {"role": "assistant", "content": k}] for k in ("chosen", "rejected")}},
     "chosen must be a text, one assistant message", {}),                           # chats, but not of this prompt
    ({"chosen": "Q A", "rejected": "Q B"}, "never guessed from a common beginning", {}),
    *(({"prompt": "Q", "chosen": "A", "rejected": "B", "segment": x}, 'expected {"start": 0, "end": 2}', {})
      for x in ([0, 1], 1, {}, {"start": 0}, {"start": 1, "end": 1}, {"start": 2, "end": 1}, {"start": -1, "end": 1}, {"start": 0, "end": 1.0}, {"start": False, "end": 1})),
    ({"instruction": "Q", "output": "A", "label": True, "history": [["q"]]}, "list of [question, answer]", {}),
    ({"instruction": "Q", "output": "A", "label": True, "history": "q"}, "list of [question, answer]", {}),
    ({"instruction": ["Q"], "output": "A", "label": True}, "instruction and input must be texts", {}),
    ({"instruction": "Q", "input": 1, "output": "A", "label": True}, "instruction and input must be texts", {}),
    ({"instruction": "Q", "system": 1, "output": "A", "label": True}, "text content", {}),
    ({"prompt": "Q", "responses": ["A"], "scores": [1, 2]}, "two lists of one length", {"threshold": 1.0}),
    ({"prompt": "Q", "responses": "A", "scores": [1]}, "two lists of one length", {"threshold": 1.0}),
    ({"prompt": "Q", "responses": False, "scores": [1]}, "two lists of one length", {"threshold": 1.0}),
    ({"prompt": "Q", "responses": [], "scores": []}, "two lists of one length", {"threshold": 1.0}),
    ({"prompt": "Q", "responses": ["A"], "scores": ["1"]}, "scores is '1'", {"threshold": 1.0}),
    ({"prompt": "Q", "responses": ["A"], "scores": [1]}, "--threshold", {}),
    ({"messages": CHAT, "label": True}, "last message is the user's", {}),
    ({"messages": [], "label": True}, "list of messages", {}),
    ({"messages": "Q", "label": True}, "list of messages", {}),
    ({"messages": [{"role": "wizard", "content": "A"}], "label": True}, "role (human, gpt", {}),
    ({"messages": [{"role": "assistant", "content": None}], "label": True}, "text content", {}),
    ({"messages": [{"role": ["user"], "content": "A"}], "label": True}, "role (human, gpt", {}),
    ({"prompt": "Q", "completion": "A", "label": True}, "--columns prompt=question", {"columns": {"prompt": "question"}}),
    ({"prompt": "Q"}, "a prompt and no response to it; completion + label is missing, or chosen + rejected (--loss ppo alone", {}),
    ({"prompt": CHAT, "source": "x"}, "a prompt and no response to it; completion + label is missing", {}),
    ({"prompt": "Q", "completion": "A"}, "unknown format with columns prompt, completion (nearest: prompt + completion + label, without label)", {}),
    ({"query": "Q"}, "unknown format with columns query; known: conversations + chosen + rejected; ", {"prompts": True}),
    ({"query": "Q"}, "; prompt + responses + scores; prompt", {"prompts": True}),
    ({"prompt": None, "source": "x"}, "prompt is null; the format prompt needs it", {"prompts": True}),
    ({"prompt": 5}, "expected a text or a list of messages", {"prompts": True}),
    ({"prompt": []}, "expected a text or a list of messages", {"prompts": True}),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair", {"prompts": True}),
    ({"prompt": "Q", "completion": "A", "label": "good"}, "label is 'good'", {"prompts": True}),         # what claims to be more is read as more
]


@pytest.mark.parametrize("record, words, how", BAD_ROWS, ids=[str(r[0])[:60] for r in BAD_ROWS])
def test_a_bad_row_is_a_one_line_error_that_names_file_and_row(tmp_path, record, words, how):
    good = {**TEXT, "reward": 1.0, "question": "Q"} if how else TEXT
    path = jsonl(tmp_path / "f.jsonl", good, record)
    message = complaint(path, **how)
    assert f"{path}: line 2" in message and words in message, message


@pytest.mark.parametrize("record", [{"a\nb": 1}, {**TEXT, "label": "yes\nno"}, {**TEXT, "completion": {"role": "x\ny"}}], ids=["column", "label", "role"])
def test_a_line_break_in_the_data_does_not_break_the_line_of_the_error(tmp_path, record):
    complaint(jsonl(tmp_path / "f.jsonl", record))


@pytest.mark.parametrize("record", [{**TEXT, "reward": 10 ** 400}, {**TEXT, "score": -10 ** 400}], ids=["reward", "score"])
def test_a_number_too_large_for_a_float_is_an_error_that_names_the_row(tmp_path, record):
    del record["label"]
    assert "line 1" in complaint(jsonl(tmp_path / "f.jsonl", record), threshold=0.0)


def test_rows_of_an_array_are_named_by_record(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps([TEXT, TEXT, {**TEXT, "label": "x"}], indent=2))
    assert f"{path}: record 3: label is 'x'" in complaint(path)
    path.write_text('[{"prompt": "Q",\n"completion": }]')
    assert f"{path}: line 2: broken JSON" in complaint(path)


def test_files_that_are_missing_empty_or_not_utf8_are_one_line_errors_that_name_the_file(tmp_path):
    assert f"{tmp_path / 'none'}: no such file" in complaint(tmp_path / "none")
    assert f"{tmp_path}: no such file" in complaint(tmp_path)
    for text in ("", " \n\n", "\ufeff"):
        (tmp_path / "empty").write_text(text, "utf-8")
        assert f"{tmp_path / 'empty'}: the file is empty" in complaint(tmp_path / "empty")
    (tmp_path / "empty").write_text("[]")
    assert f"{tmp_path / 'empty'}: no rows" in complaint(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b'{"prompt": "caf\xe9"}')
    assert f"{tmp_path / 'latin'}: not UTF-8 at byte 15" in complaint(tmp_path / "latin")


def test_pairs_and_single_responses_do_not_mix_in_one_file_or_over_several(tmp_path):
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    message = complaint(jsonl(tmp_path / "both.jsonl", TEXT, pair))
    assert "both.jsonl" in message and "mixes pairs and single responses" in message
    a, b = jsonl(tmp_path / "a.jsonl", TEXT), jsonl(tmp_path / "b.jsonl", pair)
    assert "b.jsonl: line 1" in complaint([a, b])
    (first, second), formats = read([a, jsonl(tmp_path / "c.jsonl", {"messages": [{"role": "assistant", "content": "A"}], "label": 0})])
    assert (first.where, second.where) == (f"{a}: line 1", f"{tmp_path / 'c.jsonl'}: line 1") and "messages + label" in formats


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for text in (json.dumps(TEXT), json.dumps([TEXT])):
        (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(tmp_path / "f")[0][0].prompt == "Q"


@pytest.mark.parametrize("separator", ["\x0c", "\x85", "\u2028", "\x1c", "\\n", "\\r\\n"])
def test_line_separators_inside_a_string_do_not_split_a_line(tmp_path, separator):
    path = tmp_path / "f.jsonl"
    path.write_bytes(('{"prompt": "a%sb", "completion": "A", "label": true}\r\n' % separator).encode() * 2)
    if separator in "\x0c\x1c":                                                      # raw control characters are no valid JSON:
        assert "line 1: broken JSON" in complaint(path)                              # an error on the right line, not a split
        path.write_bytes(path.read_bytes().replace(separator.encode(), json.dumps(separator)[1:-1].encode()))
    examples, _ = read(path)
    assert [e.prompt for e in examples] == ["a" + separator.encode().decode("unicode_escape" if "\\" in separator else "utf-8") + "b"] * 2
    assert [e.where for e in examples] == [f"{path}: line 1", f"{path}: line 2"]


@pytest.mark.parametrize("mark, whole", [({}, True), ({"truncated": True}, False), ({"truncated": False}, True),
                                         ({"finish_reason": "length"}, False), ({"finish_reason": "stop"}, True)], ids=str)
def test_a_response_that_was_cut_when_it_was_sampled_gets_no_end_of_text(tmp_path, mark, whole):
    (example,), _ = read(jsonl(tmp_path / "f.jsonl", {**TEXT, **mark}))
    (row,), _ = encode([example], BYTES)
    assert example.whole is whole and (row.ids[-1] == BYTES.eot) == whole and BYTES.text(row.response) == "A"


# --- examples to rows -------------------------------------------------------------------------------------------------

def feedback(prompt, response, desirable=True, **how):
    return Feedback(prompt, response, desirable, **how)


@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 40), st.integers(1, 40), st.booleans(), st.booleans())
def test_prompts_lose_their_left_responses_their_right_and_a_cut_response_has_no_end(hf, n, m, max_len, max_prompt_len, whole, add_eot):
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    for tokenizer in (BYTES, hf):
        (row,), counts = encode([feedback(text[:n], text[-m:], whole=whole)], tokenizer, max_len=max_len, max_prompt_len=max_prompt_len, add_eot=add_eot)
        full = tokenizer.prompt_ids(text[:n]) or [tokenizer.eot]
        room = min(max_prompt_len, max_len - 1)
        bos = tokenizer.bos
        kept = full if len(full) <= room else bos + full[len(full) - room + len(bos):] if room > len(bos) else bos
        assert row.ids[:row.n_prompt].tolist() == kept and len(kept) <= room
        answer = tokenizer.encode(text[-m:]) + [tokenizer.eot] * (whole and add_eot)
        assert row.response.tolist() == answer[:max_len - len(kept)] and len(row.ids) <= max_len
        assert row.mask.sum() == len(row.response) >= 1                              # something is always trained
        cut = len(answer) > len(row.response)
        assert (tokenizer.eot in row.response) == (whole and add_eot and not cut)
        assert counts["response cut from the right"] == cut and counts["prompt cut from the left"] == (len(full) > room)


def test_the_bos_survives_a_cut_prompt(hf):
    (row,), _ = encode([feedback("abcdef", "x")], hf, max_prompt_len=3)
    assert row.ids[:row.n_prompt].tolist() == hf.bos + hf.encode("ef")


def test_add_eot_false_ends_no_row(tmp_path):
    rows, _ = encode([feedback("Q", "A"), feedback("Q", "</s>" + EOT)], BYTES, add_eot=False)
    assert [BYTES.decode(r.response) for r in rows] == ["A", "</s>" + EOT] and all(BYTES.eot not in r.ids for r in rows)


@pytest.mark.parametrize("how", [{}, dict(add_eot=False), dict(turns="all")], ids=str)
def test_a_prompt_alone_is_a_row_that_ends_where_its_answer_would_begin(hf, how):
    talk = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    examples = [Feedback("Question?", "", None), Feedback(talk, "", None), Feedback("", "", None), Feedback("x" * 80, "", None), Feedback("Question?", "A", True)]
    for tokenizer in (hf, BYTES):
        rows, counts = encode(examples, tokenizer, max_len=60, max_prompt_len=59, **how)
        asked = [tokenizer.prompt_ids(e.prompt) or [tokenizer.eot] for e in examples[:3]]
        assert [r.ids[:r.n_prompt].tolist() for r in rows[:3]] == asked and all(len(p) < 60 for p in asked)
        assert all(r.response.tolist() == [tokenizer.eot] and r.desirable is None and r.mask.sum() == 1 for r in rows[:4])
        cut = rows[3].ids[:rows[3].n_prompt].tolist()
        assert len(cut) == 59 and cut == tokenizer.bos + tokenizer.prompt_ids("x" * 80)[len(tokenizer.bos) - 59:]            # the left end is lost
        assert counts["prompts alone"] == 4 and counts["desirable"] == 1 and counts["prompts"] == 4 and not counts["prompts with both labels"]
        assert rows[4].prompt_key == rows[0].prompt_key and rows[4].desirable is True


def test_train_prompt_trains_all_but_the_very_first_token():
    (row,), _ = encode([feedback("abc", "d")], BYTES, train_prompt=True)
    assert row.mask.tolist() == [0, 1, 1, 1, 1] and row.n_prompt == 3


def test_empty_responses_are_dropped_and_counted_and_never_change_their_label():
    rows, counts = encode([feedback("Q", ""), feedback("Q", " \n\x85", False), feedback("Q", "A", True)], BYTES)
    assert [BYTES.text(r.response) for r in rows] == ["A"] and rows[0].desirable
    assert counts == {"read": 3, "dropped: empty response": 2, "desirable": 1, "prompts": 1}


def test_duplicates_are_kept_and_counted_and_so_are_prompts_with_both_labels():
    examples = [feedback("Q", "A"), feedback("Q", "A"), feedback("Q", "A", False), feedback("Q", "B"), feedback("P", "A"), feedback("P", "A"), feedback("P", "A")]
    rows, counts = encode(examples, BYTES)
    assert len(rows) == 7 and counts["duplicates (kept)"] == 3                       # the other label is no duplicate
    assert counts["prompts"] == 2 and counts["prompts with both labels"] == 1 and counts["desirable"] == 6 and counts["undesirable"] == 1


def test_the_border_is_part_of_a_row_so_moving_it_is_no_duplicate():
    _, counts = encode([feedback("ab", "c"), feedback("a", "bc")], BYTES)
    assert "duplicates (kept)" not in counts and counts["prompts"] == 2


def test_prompts_cut_to_the_same_tokens_are_the_same_prompt():
    rows, counts = encode([feedback("1 same end", "A"), feedback("2 same end", "B", False)], BYTES, max_prompt_len=8)
    assert rows[0].prompt_key == rows[1].prompt_key and counts["prompts"] == 1 and counts["prompts with both labels"] == 1


def test_rows_and_examples_cannot_be_changed(tmp_path):
    examples, _ = read(jsonl(tmp_path / "f.jsonl", {"messages": [*CHAT, {"role": "assistant", "content": "A" * 50}], "label": True}))
    turns = examples[0].prompt
    (row,), _ = encode(examples, BYTES, max_len=20, max_prompt_len=8)
    partner = mismatched(row, row, 12)
    for array in (row.ids, row.mask, row.response, partner.ids, partner.mask):
        with pytest.raises(ValueError):
            array[0] = 1
    for thing, field in ((row, "mask"), (examples[0], "completion"), (Pair("Q", "A", "B"), "chosen")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
        with pytest.raises((AttributeError, TypeError)):
            thing.something_new = 1
    assert examples[0].prompt is turns and turns == TURNS and examples[0].completion == "A" * 50       # truncation cut a copy


def test_the_cached_order_of_an_epoch_cannot_be_changed_by_who_asks_for_it():
    with pytest.raises(ValueError):
        data.epoch_order(5, 0, 0)[0] = 3                                             # the next batch_at would replay and skip rows


def test_arrays_have_the_types_of_the_contract():
    row = make_row([1, 2], [3])
    assert row.ids.dtype == np.int32 and row.mask.dtype == np.float32


def test_mismatched_keeps_the_prompt_and_cuts_the_response_to_fit():
    row = make_row([1, 2, 3], [4, 9], desirable=False, where="here")
    partner = make_row([5], [6, 7, 8, 9], desirable=True)
    for max_len, response in [(7, [6, 7, 8, 9]), (6, [6, 7, 8]), (4, [6])]:          # 9 is the end-of-text: lost with the cut
        y = mismatched(row, partner, max_len)
        assert y.ids.tolist() == [1, 2, 3] + response and y.mask.tolist() == [0, 0, 0] + [1] * len(response)
        assert (y.n_prompt, y.prompt_key, y.desirable, y.where) == (3, row.prompt_key, False, "here")


# --- scored responses -------------------------------------------------------------------------------------------------

def test_several_scored_responses_in_a_row_are_each_an_example(tmp_path):
    path = jsonl(tmp_path / "f.jsonl", MANY[0])
    examples, name = read(path, threshold=1)
    assert examples == [dataclasses.replace(e, where=f"{path}: line 1") for e in MANY[1]] and name == "scored: prompt, responses, scores"


def test_scored_responses_pair_the_best_with_the_worst_and_ties_and_odd_ones_are_counted():
    scored = [feedback(p, f"{p}{s}{i}", score=s, where=f"{p}{i}") for i, (p, s) in enumerate(
        [("P", 1.0), ("P", 3.0), ("Q", 2.0), ("P", 0.0), ("P", 2.0), ("P", 5.0), ("Q", 2.0), ("R", 1.0)])]
    pairs, counts = data.pairs_from_scores(scored)
    assert pairs == [Pair("P", "P5.05", "P0.03", 5.0, 0.0, where="P5"), Pair("P", "P3.01", "P1.00", 3.0, 1.0, where="P1")]      # P's 2 is left over
    assert counts == {"scored responses": 8, "left over": 2, "ties dropped": 1}      # P's middle one and R; Q's two
    with pytest.raises(SystemExit, match="here: has no score"):
        data.pairs_from_scores([feedback("P", "A", where="here")])
    cut = data.pairs_from_scores([feedback("P", "A", score=1.0), feedback("P", "B", score=0.0, whole=False)])[0]
    assert not cut[0].whole


def test_scored_files_become_pairs_without_a_threshold_and_a_label_does_not_hide_the_score(tmp_path):
    rows = [{"prompt": "Q", "completion": f"A{r}", "reward": r, **({"label": False} if r == 2 else {})} for r in (1, 2, 0)]
    examples, name = read(jsonl(tmp_path / "f.jsonl", *rows), scored="pairs")
    assert [(e.chosen, e.rejected, e.score_chosen, e.score_rejected) for e in examples] == [("A2", "A0", 2.0, 0.0)]
    assert name.endswith("as pairs (scored responses 3 | left over 1)")
    assert "no pairs in" in complaint(jsonl(tmp_path / "f.jsonl", *rows[:1]), scored="pairs")
    assert "line 2: has no score" in complaint(jsonl(tmp_path / "f.jsonl", rows[0], TEXT), scored="pairs")
    ((feedback,), _), path = read(jsonl(tmp_path / "g.jsonl", TEXT), scored="pairs"), tmp_path / "g.jsonl"
    assert feedback == Feedback("Q", "A", True, where=f"{path}: line 1")             # nothing scored: labels stay labels
    rows, _ = encode(examples, BYTES)
    assert [r.score for r in rows[0]] == [2.0, 0.0]


# --- parquet and the hub ----------------------------------------------------------------------------------------------

def test_parquet_is_read_like_lines_and_null_cells_are_absent(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [{"prompt": CHAT, "completion": "A", "label": True, "reward": None, "chosen": None}, {"prompt": CHAT, "completion": None, "label": False}]
    pq.write_table(pa.Table.from_pylist(rows[:1] * 2), tmp_path / "f.parquet")
    examples, name = read(tmp_path / "f.parquet")
    assert examples == [Feedback(TURNS, "A", True, where=f"{tmp_path / 'f.parquet'}: row {i}") for i in (1, 2)] and name == "prompt, completion, label"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "g.parquet")
    assert f"{tmp_path / 'g.parquet'}: row 2: completion is null" in complaint(tmp_path / "g.parquet")
    for n in (0, 3, 100, -1):                                                        # written by half
        (tmp_path / "h.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:n])
        assert f"{tmp_path / 'h.parquet'}: no readable parquet file" in complaint(tmp_path / "h.parquet")


def test_parquet_without_pyarrow_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "f").write_bytes(b"PAR1")
    assert "parquet needs pyarrow" in complaint(tmp_path / "f")


def test_json_beyond_pythons_limits_is_a_one_line_error(tmp_path):
    for text in ('{"prompt": ' + "9" * 5000 + "}", "[" * 100_000, '{"a":' * 50_000):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(SystemExit, match=r"^--data .*x.jsonl: .*(unreadable|broken) JSON"):
            read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", ['[{"prompt": "Q", "comp', '[{"prompt": "Q"},\n', '{"prompt": "Q", "completion": "A", "label": true}\n{"prompt": "Q", "co'])
def test_json_written_by_half_is_a_one_line_error_that_names_the_line(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    assert "broken JSON" in complaint(tmp_path / "f.json") and f"line {1 + text.count(chr(10))}" in complaint(tmp_path / "f.json")


def test_a_name_that_is_no_file_is_a_hub_dataset(tmp_path, monkeypatch):
    import sys, types
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: [{**TEXT, "prompt": f"{name} {split}", "reward": None}]))
    assert read("org/some-name")[0] == [Feedback("org/some-name train", "A", True, where="org/some-name:train: row 1")]
    assert read(["org/name:test[:5%]"])[0][0].prompt == "org/name test[:5%]"
    for name in ("org/name.jsonl", "name", "a/b/c"):
        assert f"{name}: no such file" in complaint(name)
    (tmp_path / "org").mkdir()
    jsonl(tmp_path / "org" / "name", TEXT)
    assert read("org/name")[0][0].prompt == "Q"                                      # a file comes first

    def offline(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    assert complaint("org/some:dev") == "--data org/some: no such file, and split 'dev' does not come from the Hugging Face hub either (ConnectionError: no network)"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in complaint("org/some")


# --- continuations of several turns -----------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}{% endif %}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}")                          # <|user|> for <|im_start|>, </s> for <|im_end|>
LLAMA2 = ("{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}{{ bos_token }}"
          "{{ '[INST] <<SYS>>' ~ m.content ~ '<</SYS>>' if m.role == 'system' else '[INST] ' ~ m.content }} [/INST]{% endif %}{% endfor %}")
ASK = (Turn("system", "S"), Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"))
GO = (Turn("assistant", "a2"), Turn("user", "q3"), Turn("assistant", "a3"), Turn("tool", "r4"), Turn("assistant", "a4"))


@pytest.fixture(scope="module", params=["chatml", "llama2", "plain", "bytes"])
def talker(request, tmp_path_factory):
    if request.param == "bytes":
        return BYTES
    return data.load_tokenizer(hf_folder(tmp_path_factory.mktemp(request.param), {"chatml": CHATML, "llama2": LLAMA2}.get(request.param)))


def rendered(tokenizer, turns):
    """The whole conversation by the template, or by the documented plain one, and its ids as the tokenizer itself makes them of it."""
    if tokenizer.hf and tokenizer.backend.chat_template:
        text = tokenizer.backend.apply_chat_template([{"role": t.role, "content": t.content} for t in turns], tokenize=False)
        return tokenizer.backend(text, add_special_tokens=False).input_ids
    ids = list(tokenizer.bos)
    for t in turns:
        ids += tokenizer.encode(f"{t.role.capitalize()}:\n{t.content}") + [tokenizer.eot] * (t.role == "assistant") + tokenizer.encode("\n\n")
    return ids


def trained_runs(row, tokenizer):
    """The trained tokens, a text for each unbroken run of them, "#" for the end-of-text."""
    runs = "".join(tokenizer.decode([i]).replace("</s>", "#").replace(EOT, "#") if m else "\n" for i, m in zip(row.ids.tolist(), row.mask))
    return [r.replace(" #", "#") for r in runs.split("\n") if r]                                   # Llama 2 has a space before its </s>


@pytest.mark.parametrize("turns, runs, context", [("last", ["a4#"], "q2"), ("all", ["a1#", "a2#", "a3#", "a4#"], "q1")])
def test_a_conversations_ids_are_the_templates_and_its_mask_the_turns_asked_for(talker, turns, runs, context):
    (row,), counts = encode([Feedback(ASK, GO, False)], talker, turns=turns)
    ids = rendered(talker, ASK + GO)
    n = len(ids) - ids[::-1].index(talker.eot)                                       # what follows the last end-of-text is not needed
    assert row.ids.tolist() == ids[:n] and trained_runs(row, talker) == runs
    before = talker.decode(row.ids[:row.n_prompt])
    assert context in before and runs[0][:2] not in before.split(context)[1] and (turns == "all" or talker.decode(row.response).startswith("a2"))
    assert counts == {"read": 1, "undesirable": 1, "prompts": 1} and not row.desirable


def test_turns_all_also_trains_the_prompts_answers_of_a_response_of_one_turn(talker):
    (row,), _ = encode([Feedback(ASK, "a2", True)], talker, turns="all")
    assert trained_runs(row, talker) == ["a1#", "a2#"] and talker.decode(row.response).startswith("a1")
    (row,), _ = encode([Feedback(ASK, "a2", True)], talker)
    assert trained_runs(row, talker) == ["a2#"] and row.ids[:row.n_prompt].tolist() == talker.prompt_ids(ASK)
    (alone,), _ = encode([Feedback(ASK[:2], "a2", True)], talker, turns="all")       # nothing but the response to train: the row of "last"
    assert alone.ids.tolist() == encode([Feedback(ASK[:2], "a2", True)], talker)[0][0].ids.tolist()


@pytest.mark.parametrize("turns, segment, runs", [
    ("last", None, ["a4#"]), ("all", None, ["a2#", "a3#", "a4#"]), ("segment", (0, 1), ["a2#"]), ("segment", (1, 2), ["a3#"]), ("segment", (1, 3), ["a3#", "a4#"])])
def test_branches_of_a_pair_are_trained_after_their_shared_prompt(talker, turns, segment, runs):
    other = tuple(t._replace(content=t.content.replace("a", "b")) for t in GO)
    ((chosen, rejected),), _ = encode([Pair(ASK, GO, other, segment=segment)], talker, turns=turns)
    assert trained_runs(chosen, talker) == runs and trained_runs(rejected, talker) == [r.replace("a", "b") for r in runs]
    assert chosen.prompt_key == rejected.prompt_key and talker.decode(chosen.response).startswith("a2") and chosen.desirable and not rejected.desirable
    assert chosen.mask[-1] == 1                                                      # nothing follows the last trained token
    assert rendered(talker, ASK + GO)[:len(chosen.ids)] == chosen.ids.tolist()


def test_a_branch_of_one_turn_and_one_of_several_still_share_their_prompt(talker):
    ((chosen, rejected, target),), _ = encode([Pair(ASK, GO[:1], GO, target="c")], talker)
    assert chosen.prompt_key == rejected.prompt_key == target.prompt_key
    assert [trained_runs(r, talker) for r in (chosen, rejected, target)] == [["a2#"], ["a4#"], ["c#"]]


@given(st.lists(texts, min_size=5, max_size=5))
@pytest.mark.parametrize("turns", ["last", "all"])
def test_trained_turns_are_exactly_the_assistants_texts_whatever_they_spell(chat, turns, contents):
    assume(contents[0].strip() and contents[2].strip() and contents[4].strip())
    roles = ("assistant", "user", "assistant", "user", "assistant")
    for tokenizer in (chat, BYTES):
        (row,), _ = encode([Feedback((Turn("user", "Q"),), tuple(map(Turn, roles, contents)), True)], tokenizer, turns=turns, max_len=4000)
        wanted = contents[4:] if turns == "last" else contents[::2]
        assert row.ids[row.mask > 0].tolist() == [i for c in wanted for i in [*tokenizer.encode(c), tokenizer.eot]]
        assert (row.ids == tokenizer.eot).sum() == (3 if tokenizer is BYTES else 6)  # the ends of turns, and no text that spells one


@pytest.mark.parametrize("whole, add_eot", [(False, True), (True, False)])
def test_a_continuation_that_was_cut_has_no_end_but_its_earlier_turns_do(talker, whole, add_eot):
    (row,), _ = encode([Feedback(ASK, GO, True, whole)], talker, turns="all", add_eot=add_eot)
    assert trained_runs(row, talker) == ["a1#", "a2#", "a3#", "a4"]                  # nor a space that the template has before the end


def test_a_continuation_is_cut_from_the_right_and_dropped_where_nothing_trained_is_left():
    prompt, go = (Turn("user", "Q"),), (Turn("assistant", "a" * 9), Turn("user", "b" * 9), Turn("assistant", "c" * 9))
    n = len(encode([Feedback(prompt, go, True)], BYTES)[0][0].ids)
    (row,), counts = encode([Feedback(prompt, go, True)], BYTES, max_len=n - 1)
    assert trained_runs(row, BYTES) == ["c" * 9] and counts["response cut from the right"] == 1      # its end is what was cut
    rows, counts = encode([Feedback(prompt, go, True), Feedback(prompt, "x", False)], BYTES, max_len=n - 10)
    assert [BYTES.text(r.response) for r in rows] == ["x"] and counts["dropped: nothing left to train"] == 1 and "desirable" not in counts
    pairs, counts = encode([Pair(prompt, "x", go)], BYTES, max_len=n - 10)
    assert pairs == [] and counts == {"read": 1, "response cut from the right": 1, "dropped: nothing left to train": 1}
    (row,), _ = encode([Feedback(prompt, go, True)], BYTES, max_len=n - 10, turns="all")
    assert trained_runs(row, BYTES) == ["a" * 9 + "#"]
    (row,), counts = encode([Feedback(prompt, go, True)], BYTES, max_prompt_len=3)
    assert row.ids[:3].tolist() == BYTES.encode("nt:\n")[-3:] and trained_runs(row, BYTES) == ["c" * 9 + "#"] and counts["prompt cut from the left"] == 1


def test_pairs_that_differ_only_after_their_segment_are_the_same():
    other = (GO[0], GO[1], Turn("assistant", "else"))
    pairs, counts = encode([Pair(ASK, GO[:3], other, segment=(0, 1))], BYTES, turns="segment")
    assert pairs == [] and counts["dropped: chosen is rejected"] == 1
    assert len(encode([Pair(ASK, GO[:3], other, segment=(0, 2))], BYTES, turns="segment")[0]) == 1


def test_a_blank_turn_is_dropped_where_it_would_be_trained():
    blank = (GO[0], GO[1], Turn("assistant", " \n"))
    for example in (Feedback(ASK, blank, True), Pair(ASK, GO[:3], blank), Pair(ASK, blank, "x")):
        assert encode([example], BYTES) == ([], {"read": 1, "dropped: empty response": 1})
    early = Feedback((Turn("user", "Q"), Turn("assistant", ""), Turn("user", "Q")), "A", True)
    assert len(encode([early], BYTES)[0]) == 1 and encode([early], BYTES, turns="all")[1]["dropped: empty response"] == 1


@pytest.mark.parametrize("example, words", [
    (Pair(ASK, GO, GO[:3], where="f: line 2"), "--turns segment needs the column segment"),
    (Pair(ASK, GO, GO[:3], segment=(0, 3), where="f: line 2"), "turns 0 to 3 (end excluded, from 0), but rejected has only 2"),
    (Pair(ASK, "A", GO, segment=(1, 2), where="f: line 2"), "turns 1 to 2 (end excluded, from 0), but chosen has only 1"),
    (Feedback(ASK, GO, True, where="f: line 2"), "--turns segment is for pairs"),
])
def test_a_segment_that_is_not_in_both_branches_is_an_error_that_names_the_row(example, words):
    with pytest.raises(SystemExit) as e:
        encode([example], BYTES, turns="segment")
    assert str(e.value).startswith("f: line 2: ") and words in str(e.value) and "\n" not in str(e.value)


def test_several_turns_after_a_prompt_that_is_a_text_are_an_error_and_so_are_unknown_turns():
    with pytest.raises(SystemExit, match="f: line 2: a response of several messages needs a conversation as its prompt"):
        encode([Feedback("Q", GO, True, where="f: line 2")], BYTES)
    with pytest.raises(ValueError, match="last, all, segment"):
        encode([Feedback("Q", "A", True)], BYTES, turns="first")


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content if not loop.last else '' }}</s>{% endfor %}",
                                      "{% for m in messages %}{{ m.content[:3] if m.role == 'assistant' else m.content }}</s>{% endfor %}"], ids=["drops", "cuts"])
def test_a_template_that_loses_the_response_is_an_error(tmp_path, template):
    with pytest.raises(SystemExit, match="f: line 2: the chat template loses or changes a message"):
        encode([Feedback(ASK, GO, True, where="f: line 2")], data.load_tokenizer(hf_folder(tmp_path, template)))


def test_a_template_that_writes_the_shared_prompt_in_two_ways_is_an_error(tmp_path):
    tokenizer = data.load_tokenizer(hf_folder(tmp_path, "{{ messages | length }}{% for m in messages %}|{{ m.content }}</s>{% endfor %}"))
    with pytest.raises(SystemExit, match="f: line 2: the chat template writes the prompt of chosen and rejected differently"):
        encode([Pair(ASK, GO, GO[:3], where="f: line 2")], tokenizer)


def test_tool_calls_go_through_the_template_and_their_text_is_no_control_token(tmp_path):
    tokenizer = data.load_tokenizer(hf_folder(tmp_path, CHATML))
    more = json.dumps({"tool_calls": CALLS}, ensure_ascii=False)
    chat = (Turn("user", "Q"), Turn("assistant", "", more), Turn("tool", "R"))
    (row,), _ = encode([Feedback(chat, "A", True)], tokenizer)
    start, end = tokenizer.backend.convert_tokens_to_ids("<|user|>"), tokenizer.eot
    says = tokenizer.encode
    assert row.ids.tolist() == [start, *says("user\nQ"), end, *says("\n"), start, *says("assistant\n<call>" + json.dumps(CALLS, ensure_ascii=False)), end, *says("\n"),
                                start, *says("tool\nR"), end, *says("\n"), start, *says("assistant\nA"), end]
    assert trained_runs(encode([Feedback(chat, "A", True)], tokenizer, turns="all")[0][0], tokenizer) == ["A#"]    # calls are the template's own text
    both = (chat[0], Turn("assistant", "Wait.", more), chat[2])
    (row,), _ = encode([Feedback(chat[:1], (*chat[1:], Turn("assistant", "A")), True)], tokenizer)
    assert row.ids[:row.n_prompt].tolist() == tokenizer.prompt_ids(chat[:1]) and trained_runs(row, tokenizer) == ["A#"]
    with pytest.raises(SystemExit, match="f: line 2: the last turn is nothing but tool calls"):
        encode([Feedback(chat[:1], chat[1:2], True, where="f: line 2")], tokenizer)
    plain = BYTES.decode(BYTES.prompt_ids(both))
    assert plain == f"User:\nQ\n\nAssistant:\nWait.\n{json.dumps(CALLS, ensure_ascii=False)}{EOT}\n\nTool:\nR\n\nAssistant:\n"
    (row,), _ = encode([Feedback(chat[:1], chat[1:2], True)], BYTES)                 # the plain template's calls are content: they can be trained
    assert BYTES.text(row.response) == json.dumps(CALLS, ensure_ascii=False)


def test_a_mismatched_response_begins_at_its_first_trained_token_and_keeps_its_weights():
    (row, partner), _ = encode([Feedback("Q", "x", True), Feedback(ASK, GO, False)], BYTES)
    assert BYTES.text(mismatched(row, partner, 99).response) == "a4"
    (_, partner), _ = encode([Feedback("Q", "x", True), Feedback(ASK, GO, False)], BYTES, turns="all")
    y = mismatched(row, partner, 99)
    assert y.ids.tolist() == [*row.ids[:row.n_prompt], *partner.response] and y.mask.tolist() == [0.0] * row.n_prompt + partner.mask[partner.n_prompt:].tolist()
    assert trained_runs(mismatched(row, partner, row.n_prompt + 2), BYTES) == ["a1"]


def test_length_desensitising_counts_trained_tokens_wherever_they_stand():
    long, short = make_row([1], [2, 3, 4, 5, 6], trained=[1, 0, 1, 1, 1]), make_row([1], [7, 8, 9], trained=[0, 1, 1])
    a, b = data.length_desensitised((long, short), 0.25)
    assert a.mask.tolist() == [0, 1, 0, 1, 0.25, 0.25] and b.mask.tolist() == [0, 0, 1, 1]


def test_the_worlds_sessions_train_the_segment_only():
    import world
    tokenizer, sessions = data.Tokenizer(world.tokenizer()), world.sessions(20, 0)
    pairs = [data.parse(s, f"session {i}")[1][0] for i, s in enumerate(sessions)]
    rows, counts = encode(pairs, tokenizer, turns="segment")
    assert counts["pairs"] == 20 and {len(s["chosen"]) for s in sessions} == {1, 3}
    for s, unit in zip(sessions, rows, strict=True):
        for side, row in zip(("chosen", "rejected"), unit, strict=True):
            assert tokenizer.text(row.ids[row.mask > 0]) == s[side][0]["content"] and row.ids[-1] == tokenizer.eot


# --- pairs ------------------------------------------------------------------------------------------------------------

def test_a_pair_becomes_a_desirable_and_an_undesirable_response_to_the_same_prompt():
    pair = Pair("The sky", " is blue", " is", where="w")                             # one a prefix of the other: nothing is extracted
    assert to_feedback([pair]) == [Feedback("The sky", " is blue", True, True, "w"), Feedback("The sky", " is", False, True, "w")]
    single = Feedback("Q", "A", False)
    assert to_feedback([single]) == [single] and pair.chosen == " is blue"


def test_batches_of_pairs_mix_both_classes_and_never_pair_the_two_answers_of_a_prompt():
    rows, _ = encode(to_feedback([Pair(f"Q{i}", f"good{i}", f"bad{i}") for i in range(500)]), BYTES)
    prompts = [r.prompt_key for r in rows]
    for step in range(data.steps_per_epoch(1000, 20)):
        batch = batch_at(prompts, 20, seed=0, step=step)
        assert 0 < sum(rows[i].desirable for i in batch.rows) < 20                   # all of one class: 2^-19 by chance, per batch
        assert all(prompts[i] != prompts[j] for i, j in zip(batch.rows, batch.partners, strict=True))


# --- flat rows --------------------------------------------------------------------------------------------------------

@st.composite
def rows_with_weights(draw):
    """Rows of 1 to 4 prompt tokens and 1 to 6 response tokens, each with its own weight, some 0."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        prompt, response = (draw(st.lists(st.integers(0, 255), min_size=1, max_size=n)) for n in (4, 6))
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(response), max_size=len(response)))
        rows.append(dataclasses.replace(make_row(prompt, response), mask=np.array([0.0] * len(prompt) + weights, np.float32)))
    return rows


@given(rows_with_weights())
def test_flatten_is_the_naive_loop_over_rows_and_tokens(rows):
    flat = flatten(rows)
    ids, positions, predict, targets, mask, sequence, sums = [], [], [], [], [], [], []
    for b, row in enumerate(rows):
        total = 0.0
        for t in range(len(row.ids)):
            if row.mask[t] > 0:
                total += float(row.mask[t]) * len(predict)                           # the "log-prob" of the k-th trained token is k
                predict.append(len(ids) - 1), targets.append(int(row.ids[t])), mask.append(float(row.mask[t])), sequence.append(b)
            ids.append(int(row.ids[t])), positions.append(t)
        sums.append(total)
    assert flat.ids.tolist() == ids and flat.positions.tolist() == positions and flat.lengths == [len(r.ids) for r in rows]
    assert (flat.predict.tolist(), flat.targets.tolist(), flat.mask.tolist(), flat.sequence.tolist()) == (predict, targets, mask, sequence)
    assert flat.ids.dtype == flat.predict.dtype == flat.targets.dtype == torch.int64
    assert torch.equal(flat.ids[flat.predict + 1], flat.targets)
    assert flat.sums(torch.arange(len(predict), dtype=torch.float64)).tolist() == sums       # small halves: exact


def test_sums_keep_the_type_of_the_log_probs_and_are_zero_for_a_row_that_trains_nothing():
    rows = [make_row([1], [2, 3]), dataclasses.replace(make_row([1], [2]), mask=np.zeros(2, np.float32)), make_row([1, 2], [3])]
    flat = flatten(rows)
    for dtype in (torch.float64, torch.float32):
        logps = torch.tensor([-1.0, -2.0, -4.0], dtype=dtype, requires_grad=True)
        sums = flat.sums(logps)
        assert sums.tolist() == [-3.0, 0.0, -4.0] and sums.dtype == dtype
        assert torch.autograd.grad(sums.sum(), logps)[0].tolist() == [1.0, 1.0, 1.0]


@given(st.lists(st.integers(2, 12), max_size=12), st.integers(1, 40))
def test_token_batches_cover_every_row_once_within_the_budget_and_no_earlier_than_needed(lengths, budget):
    rows = [make_row([0], [1] * (n - 1)) for n in lengths]
    parts = list(data.token_batches(rows, budget))
    assert [i for part in parts for i in part] == list(range(len(rows)))
    for part, following in zip(parts, parts[1:] + [range(0)]):
        tokens = sum(lengths[i] for i in part)
        assert len(part) == 1 or tokens <= budget
        assert not following or tokens + lengths[following[0]] > budget


# --- partners ---------------------------------------------------------------------------------------------------------

groups = st.lists(st.integers(1, 12), min_size=2, max_size=6).flatmap(                # sizes of groups, then their rows in any order
    lambda sizes: st.permutations([i for i, n in enumerate(sizes) for _ in range(n)]))


@given(groups)
@settings(max_examples=300)
def test_a_partner_never_has_the_same_prompt_and_they_are_a_permutation_where_that_can_be(prompts):
    partners = mismatch(prompts)
    assert len(partners) == len(prompts) and all(isinstance(j, int) and 0 <= j < len(prompts) for j in partners)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))
    if 2 * max(prompts.count(p) for p in prompts) <= len(prompts):
        assert sorted(partners) == list(range(len(prompts)))


@given(st.integers(1, 20), st.integers(1, 5))
def test_where_one_prompt_holds_more_than_half_each_other_row_still_serves_about_equally_often(extra, others):
    partners = mismatch(["x"] * (others + extra) + [f"y{i}" for i in range(others)])
    uses = [partners.count(j) for j in range(others + extra, 2 * others + extra)]
    assert max(uses) - min(uses) <= 1 and sum(uses) == others + extra


@pytest.mark.parametrize("prompts", [["x"], ["x"] * 5, []], ids=len)
def test_a_single_prompt_has_no_mismatched_pair(prompts):
    with pytest.raises(ValueError, match="two distinct prompts"):
        mismatch(prompts)


def test_the_middle_row_and_neighbours_with_one_prompt_are_no_exception():
    assert mismatch(["a", "b", "c"]) == [1, 2, 0]                                    # reversal would pair the middle row with itself
    assert all(p != q for p, q in zip("aabb", ("aabb"[j] for j in mismatch("aabb"))))         # rotation by 1 would pair the two a


# --- class weights ----------------------------------------------------------------------------------------------------

@given(st.integers(1, 10 ** 6), st.integers(1, 10 ** 6), st.floats(1, 1.5))
def test_lambda_weights_reach_the_ratio_and_the_smaller_is_one(n_d, n_u, ratio):
    lambda_d, lambda_u = lambda_weights(n_d, n_u, ratio=ratio)
    assert min(lambda_d, lambda_u) == 1.0
    assert lambda_d * n_d / (lambda_u * n_u) == pytest.approx(ratio, rel=1e-15 * 4)  # four rounded operations


def test_lambda_weights_examples_of_the_paper_and_the_default():
    assert lambda_weights(1, 10) == (pytest.approx(40 / 3), 1.0)                     # 1:10 gives 13.33
    assert lambda_weights(10, 1) == (1.0, 7.5) and lambda_weights(100, 100, ratio=1) == (1.0, 1.0)
    assert lambda_weights(100, 100) == (pytest.approx(4 / 3), 1.0)


@pytest.mark.parametrize("ratio", [0.99, 1.51, 0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_outside_equation_9_is_an_error_even_without_a_class(ratio):
    for counts in ((3, 4), (0, 4)):
        with pytest.raises(ValueError, match="3/2"):
            lambda_weights(*counts, ratio=ratio)


def test_without_one_of_the_classes_there_is_nothing_to_balance():
    assert lambda_weights(0, 5) == lambda_weights(5, 0) == lambda_weights(0, 0) == (1.0, 1.0)


# --- global batches ---------------------------------------------------------------------------------------------------

datasets = st.lists(st.integers(0, 4), min_size=1, max_size=30)                       # prompts, often repeated


@given(datasets, st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=150)
def test_every_row_comes_once_per_epoch_and_partners_always_have_another_prompt(prompts, size, seed):
    n, per_epoch = len(prompts), data.steps_per_epoch(len(prompts), size)
    for epoch in range(3):
        batches = [batch_at(prompts, size, seed=seed, step=epoch * per_epoch + k) for k in range(per_epoch)]
        assert sorted(i for b in batches for i in b.rows) == list(range(n))
        assert [len(b.rows) for b in batches[:-1]] == [size] * (per_epoch - 1) and len(batches[-1].rows) == n - size * (per_epoch - 1)
        for b in batches:
            if len(set(prompts)) == 1:
                assert b.partners == []
            else:
                assert all(prompts[i] != prompts[j] for i, j in zip(b.rows, b.partners, strict=True))
            if len({prompts[i] for i in b.rows}) > 1:
                assert set(b.partners) <= set(b.rows)                                # no borrowing where the batch has its own
        assert batches[-1].epoch == epoch + 1 and [b.step for b in batches] == [epoch * per_epoch + k for k in range(per_epoch)]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_batch_is_a_function_of_seed_and_step_alone(prompts, size, chance):
    steps = list(range(3 * data.steps_per_epoch(len(prompts), size)))
    forward = {s: batch_at(prompts, size, seed=1, step=s) for s in steps}
    chance.shuffle(steps)                                                            # another order, another process, other global seeds
    data.epoch_order.cache_clear()
    for s in steps:
        random.seed(s), np.random.seed(s), torch.manual_seed(s)
        assert batch_at(prompts, size, seed=1, step=s) == forward[s]


def test_epochs_and_seeds_are_reordered():
    prompts = list(range(50))
    orders = [tuple(batch_at(prompts, 50, seed=s, step=e).rows) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9 and tuple(prompts) not in orders                    # 50! orders: no coincidence


def test_partners_are_drawn_anew_in_every_epoch():
    pairs = [set(zip(b.rows, b.partners)) for b in (batch_at(list(range(50)), 50, seed=0, step=e) for e in range(2))]
    assert len(pairs[0] & pairs[1]) < 10                                             # 1 in common is expected of 50 random ones


def test_a_batch_of_one_row_borrows_the_next_row_with_another_prompt_wrapping():
    prompts = [0, 0, 1, 1, 2]
    order = data.epoch_order(5, 3, 0).tolist()
    for k in range(5):
        following = order[k + 1:] + order[:k]
        batch = batch_at(prompts, 1, seed=3, step=k)
        assert batch.rows == [order[k]] and batch.partners == [next(i for i in following if prompts[i] != prompts[order[k]])]


def test_a_short_last_batch_with_a_single_prompt_borrows_as_many_partners_as_it_has_rows():
    prompts = ["x"] * 7 + ["y", "z"]
    found = 0
    for seed in range(200):
        batch = batch_at(prompts, 6, seed=seed, step=1)                              # 3 rows are left for the second batch
        if all(prompts[i] == "x" for i in batch.rows):
            found += 1
            assert len(batch.rows) == 3 and len(set(batch.partners)) == 2 and all(prompts[j] != "x" for j in batch.partners)
    assert found > 40                                                                # 200 x (7 6 5)/(9 8 7) = 83 expected, sd 7


def test_the_epoch_counts_rows_not_batches():
    assert [batch_at(list(range(5)), 2, seed=0, step=s).epoch for s in range(6)] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


# --- python data.py FILE ----------------------------------------------------------------------------------------------

def test_showing_a_file_prints_prompt_trained_tokens_partner_and_label(tmp_path, capsys):
    path = jsonl(tmp_path / "f.jsonl", {"prompt": "Why is it hot?", "completion": "Vents.", "label": True},
                 {"prompt": "Why is it loud?", "completion": "Fans.", "label": False, "truncated": True})
    data.main([str(path)])
    out = capsys.readouterr().out
    assert "format: prompt, completion, label" in out and "read 2 | desirable 1 | undesirable 1 | prompts 2" in out
    assert "lambda_d 1.33, lambda_u 1" in out
    blocks = {f"line {i}": next(b for b in out.split("\n\n") if f"{path}: line {i}\n" in b and "trained" in b) for i in (1, 2)}
    assert "line 1\n    Why is it hot?\n  desirable, 14 prompt + 7 trained tokens\n  + Vents. <end>\n" in blocks["line 1"]
    assert blocks["line 1"].strip().endswith(f"y' for z0, from {path}: line 2: Fans.")
    assert "line 2\n    Why is it loud?\n  undesirable, 15 prompt + 5 trained tokens\n  - Fans. (cut: no end)\n" in blocks["line 2"]
    assert blocks["line 2"].strip().endswith(f"y' for z0, from {path}: line 1: Vents.")
    assert "\033" not in out                                                         # no colour codes where nobody sees them


def test_colours_say_prompt_label_and_partner(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = jsonl(tmp_path / "f.jsonl", {"prompt": "P1", "completion": "C1", "label": 1}, {"prompt": "P2", "completion": "C2", "label": 0})
    data.main([str(path)])
    out = capsys.readouterr().out
    assert all(s in out for s in ("\033[90mP1\033[0m", "\033[90mP2\033[0m", "\033[32mC1\033[0m", "\033[31mC2\033[0m", "\033[34my' for z0"))


def test_showing_pairs_marks_the_trained_turns_of_both_branches(tmp_path, capsys):
    path = jsonl(tmp_path / "f.jsonl", {"prompt": CHAT, "chosen": LONG, "rejected": "B", "segment": {"start": 0, "end": 1}})
    data.main([str(path), "--paired"])
    out = capsys.readouterr().out
    assert "read 1 | pairs 1 | prompts 1" in out and "lambda" not in out
    assert f"{path}: line 1\n    System:" in out and "trained tokens\n    a<|endoftext|>\n    \n    User:\n    b\n    \n    Assistant:\n    \n  + c <end>\n  rejected, " in out
    assert out.endswith("2 trained tokens\n  - B <end>\n\n")
    data.main([str(path), "--paired", "--turns", "segment"])
    assert "trained tokens\n  + a <end>\n  rejected, " in capsys.readouterr().out
    data.main([str(path), "--turns", "all"])                                         # as labels: two rows, the turns of both trained
    out = capsys.readouterr().out
    assert "  + a <end>\n    \n    \n    User:\n    b\n    \n    Assistant:\n    \n  + c <end>" in out and "undesirable" in out
    with pytest.raises(SystemExit, match="--paired needs pairs"):
        data.main([str(jsonl(tmp_path / "g.jsonl", TEXT)), "--paired"])


def test_showing_takes_columns_threshold_lengths_and_end_of_text(tmp_path, capsys):
    path = jsonl(tmp_path / "f.jsonl", *({"q": f"question {i}", "a": "abcdef", "reward": i} for i in range(3)))
    data.main([str(path), "--columns", "prompt=q,completion=a", "--threshold", "1", "--max_prompt_len", "4", "--max_len", "9",
               "--batch_size", "2", "--add_eot", "false"])
    out = capsys.readouterr().out
    assert "| desirable 1 | undesirable 2 |" in out and "prompt cut from the left 3" in out and "response cut from the right 3" in out
    assert out.count("4 prompt + 5 trained tokens") == 2 and "  + abcde (cut: no end)" in out and "<end>" not in out


def test_a_single_prompt_shows_its_rows_without_partners(tmp_path, capsys):
    data.main([str(jsonl(tmp_path / "f.jsonl", TEXT))])
    out = capsys.readouterr().out
    assert "  + A <end>" in out and "y'" not in out


def test_the_hint_appears_where_most_responses_were_cut_and_only_there():
    cut = [feedback("Q", f"a text that stops in the mid {i}") for i in range(20)]
    whole = [feedback("Q", f"A sentence ({i}).") for i in range(20)]
    assert "0 of 20" in data.cut_hint(cut, True) and "--add_eot false" in data.cut_hint(cut, True)
    assert data.cut_hint(cut, False) is data.cut_hint(whole, True) is data.cut_hint(cut[:19], True) is data.cut_hint(cut[:10] + whole[:10], True) is None
    assert data.cut_hint([dataclasses.replace(e, whole=False) for e in cut], True) is None   # known to be cut: no end anyway


# --- real files -------------------------------------------------------------------------------------------------------

def test_columns_may_be_any_that_a_format_knows_and_nothing_else():
    assert data.parse_columns("score_chosen=a,segment=b,history=c,responses=d,prompt=e") == {
        "score_chosen": "a", "segment": "b", "history": "c", "responses": "d", "prompt": "e"}
    for text in ("promt=question", "prompt"):
        with pytest.raises(SystemExit, match="--columns .* OURS=THEIRS with OURS one of chosen, completion, conversations"):
            data.parse_columns(text)


def n_turns(e):
    return len(e.prompt)


@needs_shared
def test_shared_kto_file_is_read_as_its_readme_counts_it():
    examples, name = read(SHARED / "llamafactory/kto_en_demo.json")
    assert name == "messages + label" and len(examples) == 300 and sum(e.desirable for e in examples) == 150
    assert sum(n_turns(e) > 1 for e in examples) == 77 and max(map(n_turns, examples)) == 11
    assert "</s>" in examples[139].completion and "<|user|>" in examples[257].completion     # the README counts from 0,
    assert examples[139].where.endswith("record 140") and not examples[139].desirable and not examples[257].desirable     # we from 1
    rows, counts = encode(examples, BYTES, max_len=60_000, max_prompt_len=50_000)
    assert len(rows) == 300 and counts["prompts with both labels"] == 1 and counts["prompts"] == 297       # 3 repeated
    assert all(BYTES.text(r.response) == e.completion and r.ids[-1] == BYTES.eot for r, e in zip(rows, examples))


@needs_shared
def test_shared_kto_files_control_token_text_stays_text(chat):
    examples, _ = read(SHARED / "llamafactory/kto_en_demo.json")
    control = set(chat.backend.all_special_ids)
    for e in (examples[139], examples[257]):
        (row,), _ = encode([e], chat, max_len=60_000, max_prompt_len=50_000)
        assert [t for t in row.response.tolist() if t in control] == [chat.eot] and chat.text(row.response) == e.completion


@needs_shared
def test_shared_long_prompts_are_cut_to_the_bpe_limits(gpt2):
    examples, _ = read(SHARED / "llamafactory/kto_en_demo.json")
    rows, counts = encode(examples, gpt2)
    assert max(r.n_prompt for r in rows) == 512 and max(len(r.ids) for r in rows) <= 1024 and counts["prompt cut from the left"] > 0
    assert all(r.mask.sum() >= 1 for r in rows) and min(r.mask.sum() for r in rows) == 2      # one token and its end


@needs_shared
def test_shared_pairs_are_read_as_the_readme_counts_them():
    pairs, name = read(SHARED / "llamafactory/dpo_en_demo.json")
    assert name == "paired conversations" and len(pairs) == 300 and all(isinstance(p, Pair) for p in pairs)
    assert sum(p.prompt[0].role == "system" for p in pairs) == 80 and max(map(n_turns, pairs)) == 13
    assert 300 - len({(p.prompt, p.chosen, p.rejected) for p in pairs}) == 5
    assert "\x0c" in pairs[286].chosen + pairs[286].rejected + "".join(t.content for t in pairs[286].prompt)      # from 0
    rows, counts = encode(to_feedback(pairs), BYTES, max_len=60_000, max_prompt_len=50_000)
    assert counts["desirable"] == counts["undesirable"] == 300 and counts["duplicates (kept)"] >= 10


@needs_shared
def test_shared_chinese_pairs_are_read_as_the_readme_counts_them():
    pairs, _ = read(SHARED / "llamafactory/dpo_zh_demo.json")
    assert len(pairs) == 300 and 300 - len({(p.prompt, p.chosen, p.rejected) for p in pairs}) == 11
    assert any(p.chosen.startswith(p.rejected) or p.rejected.startswith(p.chosen) for p in pairs)
    rows, _ = encode(to_feedback(pairs), BYTES, max_len=60_000, max_prompt_len=50_000)
    assert all(BYTES.text(r.response) == e.completion for r, e in zip(rows, to_feedback(pairs), strict=True))


@needs_shared
def test_shared_scored_reviews_are_read_as_the_readme_counts_them():
    examples, name = read(SHARED / "odpo/imdb-sft-test.jsonl", threshold=1.0)
    assert name == "scored: prompt, completion, reward" and len(examples) == 2560 and sum(e.desirable for e in examples) == 1682
    assert len({e.prompt for e in examples}) == 252
    assert sum(len({e.desirable for e in examples if e.prompt == p}) == 2 for p in {e.prompt for e in examples}) == 221
    assert sum("\x85" in e.prompt + e.completion for e in examples) == 3
    rows, counts = encode(examples, BYTES, add_eot=False)
    assert counts["dropped: empty response"] == 17 and len(rows) == 2543
    assert len(examples) - len({(e.prompt, e.completion) for e in examples}) == 4 and "duplicates (kept)" not in counts   # all four empty
    assert all(BYTES.eot not in r.ids for r in rows)


@needs_shared
def test_shared_scored_reviews_make_pairs_best_with_worst():
    pairs, name = read(SHARED / "odpo/imdb-sft-test.jsonl", scored="pairs")
    assert "scored responses 2,560" in name and all(p.score_chosen > p.score_rejected for p in pairs)
    counts = {k: int(v.replace(",", "")) for k, v in (x.rsplit(" ", 1) for x in name[name.index("(") + 1:-1].split(" | "))}
    assert 2 * (len(pairs) + counts.get("ties dropped", 0)) + counts.get("left over", 0) == 2560      # every response is accounted for
    units, found = encode(pairs, BYTES, add_eot=False)
    assert len(units) + found["dropped: empty response"] + found.get("dropped: chosen is rejected", 0) == len(pairs)


@needs_shared
def test_shared_answers_need_columns_and_repeat_their_questions():
    path = SHARED / "torchtune/stack_exchange_paired_tiny.json"
    assert "unknown format with columns question, response_j, response_k" in complaint(path)
    pairs, _ = read(path, columns=dict(prompt="question", chosen="response_j", rejected="response_k"))
    assert len(pairs) == 25 and 25 - len({p.prompt for p in pairs}) == 17
    rows, _ = encode(to_feedback(pairs), BYTES)
    prompts = [r.prompt_key for r in rows]
    for step in range(4 * data.steps_per_epoch(len(rows), 8)):
        batch = batch_at(prompts, 8, seed=0, step=step)
        assert all(prompts[i] != prompts[j] for i, j in zip(batch.rows, batch.partners, strict=True))


@needs_shared
def test_shared_whole_chats_have_their_shared_turns_as_prompt():
    (pair,), _ = read(SHARED / "torchtune/hh_rlhf_tiny.json")
    assert pair.prompt == (Turn("user", "What do I do when I have a hole in my trousers?"),)
    assert (pair.chosen, pair.rejected) == ("Fix the hole.", "Take them off.")
