"""Conversations have the tokens of inference, and a trained turn ends as the template ends it."""

import json
from itertools import groupby

import pytest
import torch

import evaluate
import model
import rollouts
from data import encode
from lab import run, tiny_llama, write_rows
from plumbing import chat, show
from plumbing.formats import Feedback, Pair, Turn, parse
from plumbing.huggingface import load_policy
from plumbing.tokenizer import load_tokenizer
from styles import STYLES, make

THOUGHT = "<think>\nHm.\n</think>\n\nYes."
CHATS = [
    [("user", "What is the sun?")],
    [("user", "q1"), ("assistant", "a1"), ("user", "q2")],
    [("system", "Be brief."), ("user", "Why?")],
    [("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"),
     ("user", "q3")],
    [("user", "\u4f60\u597d, \U0001f600 \u00e9"), ("assistant", "\u2603"), ("user", "\u0301")],
    [("user", "  blanks \t"), ("assistant", " and \n"), ("user", "\n\nlines\n\n\nof\n")],
    [("user", "{{ messages }} {% if x %} </notoken> <|no|>"), ("assistant", "[0] xyzzy1"),
     ("user", "[/inst] a assistant user model")],
    [("user", "Is it?"), ("assistant", THOUGHT), ("user", "Sure?")],
    [("user", "The sun is hot. " * 150)],
    [("user", "1 + 1"), ("assistant", "2"), ("user", "+ 1"), ("assistant", "3"), ("user", "+ 1"),
     ("assistant", "4"), ("user", "")],
]
ANSWERS = ["The core is.", "  and \n", "two\n\n\nlines", "\u2603 \U0001f600 \u00e9", THOUGHT, "a",
           "\n\nLate.", "{{ x }}", "[0] xyzzy3", "The sun is a star. " * 40]


def turns(pairs):
    return tuple(Turn(*pair) for pair in pairs)


def messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def allowed(name, pairs):
    return name not in ("gemma", "mistral") or pairs[0][0] != "system"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    return {name: load_tokenizer(make(name, tmp_path_factory.mktemp(name))) for name in STYLES}


def plainly(text):
    """Without the blank at the left that a Metaspace decoder takes away."""
    return text.lstrip(" ")


# --- prompts --------------------------------------------------------------------------------------

def test_prompts_have_the_tokens_of_apply_chat_template(tokenizers):
    for name, tokenizer in tokenizers.items():
        for pairs in CHATS:
            if not allowed(name, pairs):
                with pytest.raises(ValueError, match="no system role"):
                    tokenizer.prompt_ids(turns(pairs))
                continue
            real = tokenizer.backend.apply_chat_template(
                messages(pairs), add_generation_prompt=True, return_dict=False)
            assert tokenizer.prompt_ids(turns(pairs)) == real, (name, pairs)


def test_control_tokens_in_texts_stay_text_wherever_they_stand(tokenizers):
    for name, (_, control, kind, _) in STYLES.items():
        tokenizer = tokenizers[name]
        special = {token: tokenizer.backend.convert_tokens_to_ids(token) for token in control
                   if tokenizer.control.fullmatch(token)}
        for text in ("{}", "Say {}!", "{}{} \n{}", "\ue0000\ue001 {}"):
            counts = []
            for token in ("nothing", *special):
                said = text.replace("{}", token)
                talk = [("user", said), ("assistant", said), ("user", said)]
                ((row,),), _ = encode([Feedback(turns(talk), said, True)], tokenizer, turns="all")
                ids = row.ids.tolist()
                counts.append([ids.count(i) for i in special.values()])
                real = tokenizer.backend.apply_chat_template(
                    messages(talk), add_generation_prompt=True, tokenize=False)
                decoded = tokenizer.decode(tokenizer.prompt_ids(turns(talk)))
                if kind == "bytes":
                    assert decoded == real, name
                assert "".join(decoded.split()) == "".join(real.split()), (name, said)
                assert said.strip() in decoded, name                     # and no blank between
            assert counts.count(counts[0]) == len(counts), name          # the template's alone


def test_a_run_says_how_many_prompts_differ_and_why(tokenizers):
    for name, tokenizer in tokenizers.items():
        talks = [turns(pairs) for pairs in CHATS if allowed(name, pairs)]
        odd = (Turn("user", f"What is {STYLES[name][1][0]}?"),)
        n = len(talks)
        first, line, *more = chat.remarks([Feedback(talk, "a", True) for talk in talks], tokenizer)
        assert f"a turn ends with {STYLES[name][3][1].strip()!r}" in first
        assert f"0 of {n} prompts differ" in line
        assert len(more) == (name == "r1") and all("as the file has them" in m for m in more)
        _, line, *_ = chat.remarks([Feedback(talk, "a", True) for talk in (*talks, odd)], tokenizer)
        assert f"1 of {n + 1} prompts differ" in line and "1 spell a control token" in line


# --- responses ------------------------------------------------------------------------------------

def test_an_answer_is_trained_as_the_template_writes_it_up_to_its_end_of_turn(tokenizers):
    for name, tokenizer in tokenizers.items():
        end = STYLES[name][3][1].strip()
        render = tokenizer.backend.apply_chat_template
        for pairs, answer in zip(CHATS, ANSWERS):
            if not allowed(name, pairs):
                continue
            asked = render(messages(pairs), add_generation_prompt=True, tokenize=False)
            whole = render(messages([*pairs, ("assistant", answer)]), tokenize=False)
            said = answer + end                                          # R1: as the file has it
            if name != "r1":
                assert whole.startswith(asked)
                said = whole[len(asked):whole.index(end, len(asked)) + len(end)]
            ((row,),), _ = encode([Feedback(turns(pairs), answer, True)], tokenizer,
                                  max_len=8192, max_prompt_len=8000)
            assert row.ids[:row.n_prompt].tolist() == tokenizer.prompt_ids(turns(pairs))
            if name == "phi3":                                           # see styles.make
                said = said.lstrip()
            assert plainly(tokenizer.decode(row.response)) == plainly(said), (name, answer)
            assert row.mask.tolist() == [0] * row.n_prompt + [1] * len(row.response)
            assert tokenizer.decode(row.ids[-1:]) == end
            before, after = STYLES[name][3]
            if answer == "a":
                assert said == before + answer + after


def runs_of(row, tokenizer):
    """The texts of the unbroken runs of trained tokens."""
    return [plainly(tokenizer.decode([token for token, _ in run]))
            for on, run in groupby(zip(row.ids, row.mask), key=lambda pair: pair[1] > 0) if on]


def test_inner_turns_end_as_the_template_ends_them(tokenizers):
    talk = turns([("user", "q1"), ("assistant", "a1"), ("user", "q2")])
    go = turns([("assistant", "a2"), ("user", "q3"), ("assistant", "a3")])
    other = turns([("assistant", "b2"), ("user", "q3"), ("assistant", "b3")])
    for name, tokenizer in tokenizers.items():
        before, after = plainly(STYLES[name][3][0]), STYLES[name][3][1]
        last = f"{before}a3{after}"                       # thoughts stand in the last turn alone
        ((row,),), _ = encode([Feedback(talk, go, True)], tokenizer, turns="all")
        assert runs_of(row, tokenizer) == [f"a1{after}", f"a2{after}", last], name
        ((row,),), _ = encode([Feedback(talk, go, True)], tokenizer)
        assert runs_of(row, tokenizer) == [last], name
        ((row,),), _ = encode([Feedback(talk, go, True, whole=False)], tokenizer)
        assert runs_of(row, tokenizer) == [f"{before}a3"], name          # cut when it was sampled
        ((chosen, rejected),), _ = encode([Pair(talk, go, other)], tokenizer)
        assert chosen.prompt_key == rejected.prompt_key
        assert runs_of(rejected, tokenizer) == [last.replace("a", "b")], name


def test_without_an_end_of_every_turn_the_last_one_ends_with_the_end_of_text(tmp_path):
    folder = make("qwen2", tmp_path)
    talk = turns([("user", "q"), ("assistant", "a1"), ("user", "q")])
    template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}")
    at_the_end = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    for more, last in [("", "a2<|endoftext|>"), (at_the_end, "a2\n<|endoftext|>")]:
        tokenizer = load_tokenizer(folder)
        tokenizer.backend.chat_template = template + more
        ((row,),), _ = encode([Feedback(talk, "a2", True)], tokenizer, turns="all")
        assert runs_of(row, tokenizer) == ["a1", last]


# --- arguments of the template, and tools ---------------------------------------------------------

def test_template_arguments_reach_the_prompt_and_are_saved_with_the_model(tmp_path):
    folder = make("qwen3", tmp_path / "from")
    asks, empty = [("user", "q")], "<think>\n\n</think>\n\n"
    talk = turns(asks)
    settings = {"template_args": {"enable_thinking": False}}
    plain, without = load_tokenizer(folder), load_tokenizer(folder, settings=settings)
    without.save(tmp_path / "to")
    for tokenizer, asked, said in [(plain, "", empty + "a<|im_end|>"),
                                   (without, empty, "a<|im_end|>"),
                                   (load_tokenizer(tmp_path / "to"), empty, "a<|im_end|>")]:
        real = tokenizer.backend.apply_chat_template(
            messages(asks), add_generation_prompt=True, return_dict=False,
            enable_thinking=not asked)
        ((row,),), _ = encode([Feedback(talk, "a", True)], tokenizer)
        assert row.ids[:row.n_prompt].tolist() == real == tokenizer.prompt_ids(talk)
        assert tokenizer.decode(real).endswith("assistant\n" + asked)
        assert tokenizer.decode(row.response) == said
        history = (*talk, Turn("assistant", "a"), *talk)                 # there are no thoughts
        ((row,),), _ = encode([Feedback(history, "b", True)], tokenizer, turns="all")
        assert runs_of(row, tokenizer) == ["a<|im_end|>", said.replace("a", "b")]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"x": "<|im_end|>"}}}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}


def test_tools_and_their_calls_are_written_by_the_template(tokenizers):
    qwen3 = tokenizers["qwen3"]
    row = {"messages": [{"role": "user", "content": "q"}, CALL], "label": True, "tools": TOOLS}
    for tools in (TOOLS, json.dumps(TOOLS)):                             # many files have a text
        (example,) = parse({**row, "tools": tools})[1]
        real = qwen3.backend.apply_chat_template(
            row["messages"][:1], tools=TOOLS, add_generation_prompt=True, tokenize=False)
        assert qwen3.decode(qwen3.prompt_ids(example.prompt)) == real
        ((coded,),), _ = encode([example], qwen3)
        assert qwen3.decode(coded.response) == (
            '<think>\n\n</think>\n\n<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
            "<|im_end|>")
        ends = coded.ids.tolist().count(qwen3.end_of_turn.token)
        assert ends == real.count("<|im_end|>")  # one more is text of the tools
    assert "tools" in chat.remarks([example], tokenizers["smollm2"])[-1]     # no place for them
    assert "Tools:" in load_tokenizer().decode(load_tokenizer().prompt_ids(example.prompt))
    with pytest.raises(SystemExit, match="column tools: expected a list of functions, got 3"):
        parse({**row, "tools": 3})


# --- generation -----------------------------------------------------------------------------------

class Parrot(model.GPT):
    """Says the tokens of `script`, whatever it is asked."""

    def head(self, hidden):
        said, *self.script = self.script
        return torch.nn.functional.one_hot(torch.tensor([said]), self.vocab_size).float() * 100


def test_sampling_stops_at_the_templates_end_of_turn_everywhere(tokenizers):
    talk = turns([("user", "q")])
    for name, tokenizer in tokenizers.items():
        parrot = Parrot(model.GPTConfig(tokenizer.vocab_size, 200, 1, 1, 8))
        end = tokenizer.end_of_turn.token
        script = [*tokenizer.encode("No."), end, *tokenizer.encode("User", follow=True)]
        parrot.script = script
        (text,), (row,) = evaluate.replies(parrot, tokenizer, [talk])
        assert text == "No." and row.ids[-1] == end, name
        parrot.script = script
        asked = [tokenizer.prompt_ids(talk)]
        (ids,) = rollouts.answers(parrot, asked, tokenizer, max_len=200, seed=0)
        assert ids == script[:script.index(end) + 1], name


def test_models_stop_at_whichever_token_of_several_comes_first(tmp_path):
    torch.manual_seed(0)
    llama = load_policy(tiny_llama(tmp_path, ["the sun is a star"] * 3))
    for policy in (model.GPT(model.GPTConfig(300, 64, 1, 1, 8)), llama):
        how = dict(max_new_tokens=30, seed=1, temperature=2.0)
        prompts = [[3], [4, 5], [6, 7, 8]]
        endless = policy.generate(prompts, eot=[policy.vocab_size - 1], **how)
        stops = [endless[0][20], endless[1][9]]
        for whole, part in zip(endless, policy.generate(prompts, eot=stops, **how)):
            places = [whole.index(token) + 1 for token in stops if token in whole]
            assert part == whole[:min(places, default=len(whole))]


def test_what_the_models_folder_says_of_the_end_is_a_stop_too(tmp_path):
    folder = make("gemma", tmp_path)
    for said, also in [(7, [7]), ([1, 7], [1, 7]), (None, [])]:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.stops == [tokenizer.end_of_turn.token, tokenizer.eot, *also]
        assert tokenizer.text([*tokenizer.encode("No."), *tokenizer.stops[:2]]) == "No."


# --- texts ----------------------------------------------------------------------------------------

def test_texts_with_a_chat_model_are_noticed_and_chat_makes_turns_of_them(tmp_path, capsys):
    folder = tiny_llama(tmp_path / "model", [" ".join(map(str, range(400)))])
    make("qwen2", folder)                                                # another tokenizer
    rows = [{"prompt": f"Why {i}?", "completion": "No.", "label": i % 2 == 0} for i in range(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--model", folder, "--data", data, "--dry_run", "--out", tmp_path / "out", "--max_len",
             64, "--max_prompt_len", 48]
    run(*words)
    assert "trained without it. --chat makes" in capsys.readouterr().out
    run(*words, "--chat", "--template_args", "enable_thinking=false", "date=today")
    said = capsys.readouterr().out
    assert "a turn ends with '<|im_end|>'; sampling stops at '<|im_end|>' and '<|endof" in said
    assert "chat: 0 of 4 prompts differ" in said
    show.main([str(data), "--model", str(folder), "--chat"])
    said = capsys.readouterr().out
    assert "a turn ends with '<|im_end|>'" in said
    assert "<|im_start|>user\n    Why 0?<|im_end|>\n    <|im_start|>assistant" in said
    with pytest.raises(SystemExit, match="--template_args thinking: expected NAME=VALUE"):
        run(*words, "--template_args", "thinking")
    with pytest.raises(SystemExit, match="--chat: needs a --model"):
        run("--data", data, "--chat")


def test_conversations_shared_out_over_cores_are_the_same_rows(tokenizers, monkeypatch):
    """Also the complaint about a bad one, in whichever process it is found."""
    tokenizer = tokenizers["qwen2"]
    talks = [Feedback((Turn("user", f"Why {i}?"),), f"No {i}.", i % 2 == 0, where=f"row {i}")
             for i in range(50)]
    alone, counts = encode(talks, tokenizer)
    monkeypatch.setattr(chat, "AT_ONCE", 16)
    monkeypatch.setattr(chat.os, "cpu_count", lambda: 2)
    here = []
    spell = chat.spell
    monkeypatch.setattr(chat, "spell", lambda *a, **k: here.append(1) or spell(*a, **k))
    shared, shared_counts = encode(talks, tokenizer)
    assert not here                                              # all of it elsewhere
    assert shared_counts == counts and len(shared) == 50
    for (a,), (b,) in zip(alone, shared):
        assert a.ids.tolist() == b.ids.tolist() and a.mask.tolist() == b.mask.tolist()
        assert (a.where, a.desirable) == (b.where, b.desirable)
    bad = Feedback("Why?", (Turn("assistant", "No."),), True, where="row 40")
    with pytest.raises(SystemExit, match="^row 40: a response of several messages"):
        encode([*talks[:40], bad, *talks[40:]], tokenizer)
