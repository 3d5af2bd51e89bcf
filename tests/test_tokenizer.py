"""Text is text, control tokens come from the template, and everybody reads the same tokens."""
import json
import random

import pytest
import tiktoken
from hypothesis import given, settings, strategies as st

from conftest import SHARED, needs_shared
from plumbing.chat import Chat
from plumbing.formats import Turn
from plumbing.tokenizer import EOT, HFTokenizer, Tokenizer, load_tokenizer

settings.register_profile("nanokto", deadline=None, derandomize=True, database=None,
                          max_examples=50)
settings.load_profile("nanokto")

BYTES = load_tokenizer()
NASTY = ["</s>", "<s>", EOT, "<|user|>", "<|assistant|>", "\x0c", "\x85", "\u2028", "\r\n", "\n",
         "\t", "\x00", "  ", "\u27e60:content\u27e7", "\u4f60\u597d\u3002", "\U0001f600", "\u0301",
         "\ufeff", "{{ x }}", "[INST]", " .", " n't"]
texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=6), max_size=6).map("".join)

TRIM = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
# ChatML with <|user|> for <|im_start|> and </s> for <|im_end|>
CHATML = ("{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<call>"
          "{{ m.tool_calls | tojson }}{% endif %}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
          "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}")
CALLS = [{"function": {"name": "weather", "arguments": {"place": "\u00c9vry", "unit": "</s>"}}}]
CALLS_TEXT = json.dumps(CALLS, ensure_ascii=False)
CALL = json.dumps({"tool_calls": CALLS}, ensure_ascii=False)


def hf_folder(folder, template=None):
    """A Hugging Face tokenizer over bytes, with a BOS of its own and four control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"])
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", fast.bos_token_id)])
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """One of every kind: ours, Hugging Face's without a template, and with three templates."""
    found = {"bytes": BYTES}
    for name, template in dict(plain=None, trim=TRIM, chatml=CHATML, llama2=LLAMA2).items():
        found[name] = load_tokenizer(hf_folder(tmp_path_factory.mktemp(name), template))
    return found


# --- text and prompts -----------------------------------------------------------------------------

@given(texts)
def test_text_from_users_never_becomes_a_control_token(tokenizers, text):
    for tokenizer in (BYTES, tokenizers["plain"]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids, default=0) < 256   # a token per byte
        assert tokenizer.prompt_ids(text) == (tokenizer.bos + ids or [tokenizer.eot])
        assert tokenizer.text([*ids, tokenizer.eot]) == text


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=4))
def test_a_template_renders_contents_exactly_and_only_its_own_text_is_control(tokenizers, turns):
    trim = tokenizers["trim"]
    wanted = [trim.backend.bos_token_id]                                 # one BOS, not two
    for role, content in turns:
        role = trim.backend.convert_tokens_to_ids(f"<|{role}|>")
        wanted += [role, *trim.encode(content.strip()), trim.eot]
    wanted.append(trim.backend.convert_tokens_to_ids("<|assistant|>"))
    assert trim.prompt_ids(tuple(Turn(*turn) for turn in turns)) == wanted


def test_without_a_template_a_conversation_is_named_turns_and_tool_calls_are_content(tokenizers):
    turns = (Turn("system", "Be brief."), Turn("user", "Hi</s>"))
    text = "System:\nBe brief.\n\nUser:\nHi</s>\n\nAssistant:\n"
    for tokenizer in (BYTES, tokenizers["plain"]):
        assert tokenizer.prompt_ids(turns) == tokenizer.bos + tokenizer.encode(text)
    turns = (Turn("user", "Q"), Turn("assistant", "Wait.", CALL), Turn("tool", "R"))
    text = f"User:\nQ\n\nAssistant:\nWait.\n{CALLS_TEXT}{EOT}\n\nTool:\nR\n\nAssistant:\n"
    assert BYTES.decode(BYTES.prompt_ids(turns)) == text
    chat = Chat((turns[0], Turn("assistant", "", CALL)), BYTES)
    assert BYTES.decode(chat.ids(chat.whole)) == f"User:\nQ\n\nAssistant:\n{CALLS_TEXT}{EOT}\n\n"


def test_a_template_that_loses_a_message_or_refuses_is_an_error(tmp_path):
    tokenizer = load_tokenizer(hf_folder(tmp_path))
    for template in (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "{% for m in messages %}{{ m.content[:8] }}{% endfor %}",
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "{{ raise_exception('no system role') }}"):
        tokenizer.backend.chat_template = template
        with pytest.raises(ValueError, match="chat template"):
            tokenizer.prompt_ids((Turn("system", "In French."), Turn("user", "hello world")))


# --- loading and saving ---------------------------------------------------------------------------

@needs_shared
def test_gpt2s_hello_world_is_15496_995():
    gpt2 = load_tokenizer(SHARED / "gpt2-bpe")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.eot, gpt2.vocab_size, gpt2.bos) == (50256, 50257, [])


def odd_encoding():
    """A token, abc, that no merge of two tokens leads to."""
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    return tiktoken.Encoding("odd", pat_str=r"\S+|\s", mergeable_ranks=ranks,
                             special_tokens={EOT: 257})


def is_the_same_saved_and_in_transformers(tokenizer, folder):
    from transformers import AutoTokenizer
    tokenizer.save(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')       # it lies beside a model
    copies = [load_tokenizer(folder), HFTokenizer(AutoTokenizer.from_pretrained(folder))]
    assert type(copies[0]) is Tokenizer                                 # ours reads its own file
    rng = random.Random(0)
    size = tokenizer.vocab_size
    strings = [*NASTY, *(tokenizer.decode([rng.randrange(size - 1)]) for _ in range(500)),
               *(chr(rng.randrange(0xd800)) for _ in range(150)), "abc"]
    turns = (Turn("system", "S"), Turn("user", "q</s>"), Turn("assistant", "a"))
    for copy in copies:
        assert (copy.eot, copy.bos, copy.vocab_size) == (tokenizer.eot, tokenizer.bos, size)
        for _ in range(300):
            text = "".join(rng.choices(strings, k=rng.randrange(12)))
            assert copy.encode(text) == tokenizer.encode(text), repr(text)
            assert copy.decode(tokenizer.encode(text)) == text
        assert copy.prompt_ids(turns) == tokenizer.prompt_ids(turns)


@pytest.mark.parametrize("kind", ["bytes", "odd", "world"])
def test_our_tokenizers_are_the_same_after_saving_and_in_transformers(kind, tmp_path):
    import world
    made = {"bytes": BYTES, "odd": Tokenizer(odd_encoding()), "world": Tokenizer(world.tokenizer())}
    is_the_same_saved_and_in_transformers(made[kind], tmp_path)


@pytest.mark.slow
@needs_shared
def test_gpt2s_tokenizer_is_the_same_after_saving_and_in_transformers(tmp_path):
    is_the_same_saved_and_in_transformers(load_tokenizer(SHARED / "gpt2-bpe"), tmp_path)


def test_hugging_face_tokenizers_survive_saving(tokenizers, tmp_path):
    tokenizers["trim"].save(tmp_path)
    again, turns = load_tokenizer(tmp_path), (Turn("user", "".join(NASTY)),)
    assert again.prompt_ids(turns) == tokenizers["trim"].prompt_ids(turns)


def test_a_tokenizer_that_is_not_there_or_broken_is_one_line_that_names_it(tmp_path, monkeypatch):
    def offline(*args, **how):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"half')
    for name in (tmp_path / "empty", tmp_path / "broken", tmp_path / "nowhere", "gpt2", "a/b"):
        with pytest.raises(SystemExit) as stop:
            load_tokenizer(name)
        assert str(stop.value).startswith(f"--tokenizer {name}: ") and "\n" not in str(stop.value)


def test_code_from_the_hub_runs_only_where_that_is_asked_for(tokenizers, monkeypatch):
    import transformers
    asked = []

    def load(name, **how):
        asked.append(how["trust_remote_code"])
        return tokenizers["plain"].backend

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    load_tokenizer("someone/model")
    load_tokenizer("someone/model", trust_remote_code=True)
    assert asked == [False, True]


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    backend = load_tokenizer(hf_folder(tmp_path)).backend
    backend.eos_token = None
    with pytest.raises(SystemExit, match="eos_token"):
        HFTokenizer(backend)
