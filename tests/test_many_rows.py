"""What a large file costs: calls of the tokenizer, and memory per row."""
import tracemalloc

import pytest

import data
from lab import WORDS, write_rows
from plumbing import formats
from plumbing.formats import Feedback
from plumbing.tokenizer import load_tokenizer
from test_tokenizer import hf_folder


def test_texts_are_tokenised_in_batches_to_the_same_tokens(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(hf_folder(tmp_path / "hf"))
    examples = [Feedback(f"question {i % 7}?", f"answer {i}</s>", True) for i in range(600)]
    expected = [tokenizer.prompt_ids(e.prompt) + tokenizer.encode(e.completion) + [tokenizer.eot]
                for e in examples]
    calls = []

    def counted(self, text, *args, real=type(tokenizer.backend).__call__, **how):
        calls.append(text)
        return real(self, text, *args, **how)

    monkeypatch.setattr(type(tokenizer.backend), "__call__", counted)
    units, _ = data.encode(iter(examples), tokenizer)
    assert [row.ids.tolist() for row, in units] == expected
    assert [len(texts) for texts in calls] == [256 + 7, 256 + 7, 88 + 7]
    assert tokenizer.known == {}                                 # nothing is kept


@pytest.mark.parametrize("tokens", [200, 800])
def test_a_row_and_its_partner_take_1600_bytes_and_3_per_token(tmp_path, tokens):
    n = 3000
    text = " ".join(WORDS * 16)[:tokens // 2]
    file = write_rows(tmp_path / "f.jsonl", [
        {"prompt": f"{i:06d}{text}", "completion": f"{i:06d}{text}", "label": i % 2 == 0}
        for i in range(n)])
    tokenizer = load_tokenizer()                                 # a token per byte
    data.response_mask(2 * tokens, 2 * tokens)
    tracemalloc.start()
    examples, _ = formats.read(file)
    units, _ = data.encode(examples, tokenizer)
    of_reading = tracemalloc.get_traced_memory()[1] / n
    del examples                                                 # as sources.Files lets them go
    tracemalloc.reset_peak()
    units = data.mismatched_units(units, seed=0, max_len=1024)
    of_partners = tracemalloc.get_traced_memory()[1] / n
    tracemalloc.stop()
    assert sum(len(row.ids) for row, _ in units) == n * (2 * tokens // 2 + 13)
    # of a token its text, a byte here, and its id, two bytes
    assert max(of_reading, of_partners) < 1600 + 3 * tokens
