"""Claims about plumbing/huggingface.py: any causal LM gives on flat rows what separate forwards
give, its probes reject what would be silently wrong, and adapters are what peft says."""

import json
import math
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
from plumbing import huggingface, kernels
from plumbing.huggingface import HFPolicy, TokenClassifier, load_policy
from test_model import close, flat_row, gpt, gradients, naive_generate

COMMON = dict(vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=0)
SMALL = COMMON | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=2, num_key_value_heads=1)
WINDOW = SMALL | dict(head_dim=16, sliding_window=4, final_logit_softcapping=5.0)
FAST = {  # an architecture for every difference; the window is shorter than the sequences
    "gpt2": COMMON | dict(n_embd=32, n_layer=2, n_head=2),
    "llama": SMALL | dict(tie_word_embeddings=False),
    "qwen3": SMALL | dict(head_dim=16),
    "gemma": SMALL | dict(head_dim=16),
    "cohere": SMALL,
    "mistral": SMALL | dict(sliding_window=4),
    "mixtral": SMALL | dict(num_local_experts=4),
    "bloom": COMMON | dict(hidden_size=32, n_layer=2, n_head=2),
}
SLOW = {
    "qwen2": SMALL | dict(tie_word_embeddings=True), "gemma2": WINDOW, "gemma3_text": WINDOW,
    "granite": SMALL | dict(logits_scaling=7.0), "phi": SMALL,
    "opt": SMALL | dict(ffn_dim=64, word_embed_proj_dim=16),
}
CORNERS = {
    "llama4_text": SMALL | dict(attention_chunk_size=16, num_local_experts=2, head_dim=8,
                                intermediate_size_mlp=32),
    "mamba": dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2),
    "gpt_neo": dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, window_size=4,
                    attention_types=[[["global", "local"], 1]], max_position_embeddings=16),
}
MODELS = FAST | SLOW | CORNERS
PADDED = ("bloom",)  # no position_ids at all
WINDOWED = ("mistral", "gemma2", "gemma3_text")  # their layers ask for more than our attention has
PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4]]


def tiny_lm(kind, std=0.3, **changes):
    """Weights of 0.3, not 0.02: logits of size 10, so that a leak between sequences shows."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    settings = MODELS[kind] | {"initializer_range": std} | changes
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=std)  # zeros would hide a forgotten bias
    return lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder("llama"): a folder with that tiny model, in several files."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_lm(kind).save_pretrained(made[kind], max_shard_size="10KB")
        return made[kind]

    return folder_of


ROW = flat_row(vocab=64)
PREDICT = torch.tensor([0, 2, 4, 6, 9, 13, 16, 18])
TARGETS = ROW[0][PREDICT + 1]


def alone(lm):
    """Logits of each sequence of ROW in a forward of its own, by transformers."""
    ids, _, lengths = ROW
    with torch.no_grad():
        parts = [lm(part[None], use_cache=False).logits[0] for part in ids.split(lengths)]
    return torch.cat(parts)


def logits_of(policy):
    with torch.no_grad():
        return policy(*ROW)


def ways(policy):
    """Sets one after the other all ways in which the policy can treat a flat row."""
    fastest = (policy.shares_prompts, policy.flat)
    for way in {fastest, (False, policy._keeps_apart()), (False, False)}:
        policy.shares_prompts, policy.flat = way
        yield way
    policy.shares_prompts, policy.flat = fastest


def one_line(call, *args, **how):
    with pytest.raises(SystemExit) as stop:
        call(*args, **how)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# --- any architecture -----------------------------------------------

def test_a_window_that_only_the_mask_knows_is_kept():
    """Llama 4's layers do not tell it to their attention, and the probe's rows are shorter."""
    lm = tiny_lm("llama4_text")
    policy = HFPolicy(lm)
    assert not policy.shares_prompts
    ids = torch.arange(3, 27)
    with torch.no_grad():
        found = policy(ids, torch.arange(24), [24])
        expected = lm(ids[None], use_cache=False).logits[0]
    assert torch.allclose(found, expected, atol=1e-3)            # logits of 10 in float32


@pytest.mark.parametrize("kind", [
    *FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_every_architecture_gives_what_separate_forwards_give(folder, kind):
    """Logits near 10: float64 rounds at 1e-15. A leak would show as 0.1."""
    policy = load_policy(folder(kind), dtype=torch.float64)
    expected = alone(policy.lm)
    logps = expected.log_softmax(-1)[PREDICT, TARGETS]
    assert policy.chunked and policy.vocab_size == 64
    assert policy.flat == (kind not in PADDED)
    assert policy.shares_prompts == (kind not in PADDED + WINDOWED)
    rounding = 1e-5 if kind == "gemma2" else 1e-12  # its softmax is in float32
    for _ in ways(policy):
        for policy.chunked in (True, False):
            with torch.no_grad():
                close(policy(*ROW), expected, rounding)
                close(policy(*ROW, PREDICT), expected[PREDICT], rounding)
                close(policy(*ROW, PREDICT, TARGETS), logps, rounding)
    policy = load_policy(folder(kind))
    with torch.no_grad():
        wanted = naive_generate(policy, PROMPTS, eot=5, max_new_tokens=6, temperature=2.0)
        assert policy.generate(PROMPTS, eot=5, max_new_tokens=6, temperature=2.0) == wanted


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma", "mixtral", "granite", "opt"])
def test_a_prompt_computed_once_gives_what_it_gives_before_each_response(folder, kind):
    """Log-probs and gradients, in float64. Gemma, Granite and OPT scale their queries otherwise."""
    policy = load_policy(folder(kind), dtype=torch.float64)
    rows = [data.make_row([5, 6, 7], response) for response in ([8, 9], [3], [4, 9, 2, 7])]
    rows.append(data.make_row([9, 3], [5, 6]))
    found = []
    for share in (True, False):
        flat = data.flatten(rows, share=share)
        sums = flat.sums(policy(*flat[:5]))
        found.append([sums, *gradients(sums.square().sum(), policy)])
    assert data.flatten(rows, share=True).lengths == [(3, 2, 1, 4), 4]
    rounding = 1e-12 if kind in ("gpt2", "opt") else 1e-5  # norms in float32
    for shared, apart in zip(*found):
        close(shared, apart, rounding * apart.abs().max().clamp(min=1).item())


def test_architectures_that_ended_in_a_traceback_train(folder, tmp_path):
    """An adapter on Mamba; experts in float64; a flat row longer than GPT-Neo's own mask of 16."""
    adapted = load_policy(folder("mamba"), lora=2)
    train_a_little(adapted)
    adapted.save(tmp_path / "adapter", adapter=True)
    close(logits_of(load_policy(tmp_path / "adapter")), logits_of(adapted), 1e-4)
    experts = load_policy(folder("mixtral"), dtype=torch.float64)
    close(logits_of(experts), alone(experts.lm), 1e-10)
    neo = load_policy(folder("gpt_neo"))
    rows = torch.arange(24) % 12
    with torch.no_grad():
        one = neo(rows[:12], rows[:12], [12])
        close(neo(rows, rows, [12, 12]), torch.cat([one, one]), 1e-4)


def test_the_head_in_parts_has_the_gradient_of_the_whole_in_flat_and_in_padded_rows(monkeypatch):
    """By blocks of words (llama), or chunks of positions where it has a cap, or a bias (phi)."""
    for head in (model.head_log_probs, model.chunked_log_probs):
        monkeypatch.setitem(head.__kwdefaults__, "chunk_elements", 3 * 64)
    for kind in ("llama", "gemma2", "phi"):
        policy, found = HFPolicy(tiny_lm(kind).double()), []
        assert (policy.head_weight() is not None) == (kind == "llama")
        for _ in ways(policy):
            for policy.chunked in (True, False):
                logps = policy(*ROW, PREDICT, TARGETS)
                found.append(gradients(logps.square().sum(), policy))
        for other in found[1:]:
            for a, b in zip(other, found[0]):
                # transformers keeps rotary angles in float32
                close(a, b, 1e-5 * b.abs().max().clamp(min=1).item())


def test_padding_is_at_most_an_eighth_of_a_group():
    lengths = [3, 40, 38, 5]
    assert huggingface.groups_of_like_length(lengths) == [[0], [3], [2, 1]]  # 2 of 80 are pads


def test_dropout_is_off_and_stays_off():
    policy = HFPolicy(tiny_lm("gpt2")).train()  # GPT-2's default dropout is 0.1
    assert policy.lm.config.resid_pdrop == 0.1 and torch.equal(policy(*ROW), policy(*ROW))


def test_weights_have_the_dtype_asked_for_and_log_probs_are_float32_or_better(folder):
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        policy = load_policy(folder("llama"), dtype=dtype)
        assert {p.dtype for p in policy.parameters()} == {dtype}
        assert policy(*ROW, PREDICT, TARGETS).dtype == wide and policy.flat and policy.chunked
    kinds = {(p.dtype, p.requires_grad)
             for p in load_policy(folder("llama"), dtype=torch.bfloat16, lora=4).parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}  # adapters are float32


# --- the three probes -----------------------------------------------

def test_a_head_that_is_not_the_models_is_rejected_and_the_answer_is_right_all_the_same(
        monkeypatch):
    """Also with weights of 0.02: an untrained model's logits are far below any cap."""
    changes = (("gemma2", dict(softcap=None)), ("gemma2", dict(softcap=6.0)),
               ("cohere", dict(scale=1)), ("granite", dict(scale=1 / 6)))
    probe = HFPolicy._head_is_ours
    for kind, change in changes:
        def spoiled(self, change=change):
            vars(self).update(change)
            return probe(self)

        monkeypatch.setattr(HFPolicy, "_head_is_ours", spoiled)
        for std in (0.3, 0.02):
            policy = HFPolicy(tiny_lm(kind, std))
            assert not policy.chunked, (kind, change, std)
            close(logits_of(policy), alone(policy.lm), 1e-4)  # float32, logits near 10


def test_sequences_that_see_each_other_are_noticed_and_padded(monkeypatch):
    run = HFPolicy._run

    def forgetful(self, rows, positions=None, pieces=None):
        return run(self, rows, None, pieces)

    monkeypatch.setattr(HFPolicy, "_run", forgetful)
    for std in (0.3, 0.02):
        policy = HFPolicy(tiny_lm("llama", std))  # position_ids are forgotten
        assert not policy.flat
        close(logits_of(policy), alone(policy.lm), 1e-4)
        policy.flat = True
        assert (logits_of(policy) - alone(policy.lm)).abs().max() > 1e-3


def test_a_leak_too_small_for_the_comparison_with_rounding_is_noticed(monkeypatch):
    """In bf16 two forwards may differ by 0.1; that a change of the first sequence does not reach
    the second is exact."""
    run = HFPolicy._run

    def leaky(self, rows, positions=None, pieces=None):
        out = run(self, rows, positions, pieces)
        return out if positions is None else out + 1e-4 * rows.sum()

    assert HFPolicy(tiny_lm("llama", 0.1)).flat
    assert HFPolicy(tiny_lm("llama", 0.1).bfloat16()).flat
    monkeypatch.setattr(HFPolicy, "_run", leaky)
    assert not HFPolicy(tiny_lm("llama", 0.1).bfloat16()).flat


def test_a_flat_row_that_forgets_its_sliding_window_is_noticed(monkeypatch):
    run = HFPolicy._run
    lm, wide = (tiny_lm("mistral", sliding_window=window) for window in (30, 999))

    def forgetful(self, rows, positions=None, pieces=None):
        if positions is None or pieces is not None:
            return run(self, rows, positions, pieces)
        flat = dict(input_ids=rows, position_ids=positions, use_cache=False)
        return wide.base_model(**flat).last_hidden_state

    monkeypatch.setattr(HFPolicy, "_run", forgetful)
    assert not HFPolicy(lm).flat and HFPolicy(wide).flat
    with pytest.raises(TypeError, match="sliding_window"):  # ours has none, however wide it is
        huggingface.flat_attention(None, *torch.ones(3, 1, 2, 5, 4), None, 0.5,
                                   flat_row=SimpleNamespace(pieces=[]), sliding_window=999)


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertLMHeadModel(BertConfig(**shape, vocab_size=64)).save_pretrained(tmp_path)
    assert f"--model {tmp_path}: its tokens see later ones" in one_line(load_policy, tmp_path)


# --- generation -----------------------------------------------------

def test_samples_are_ours_whatever_shares_the_batch_and_stop_at_eot_or_room(folder):
    policy = load_policy(folder("llama"), dtype=torch.float64)
    prompts = PROMPTS + PROMPTS[:1]
    for how in (dict(temperature=0), dict(temperature=3.0, top_p=0.8)):
        how |= dict(eot=5, seed=4, max_new_tokens=8, room=12)
        with torch.no_grad():
            expected = naive_generate(policy, prompts, **how)
        for rows in (2, None):
            assert policy.generate(prompts, rows=rows, **how) == expected
        assert policy.generate(prompts[3:1:-1], numbers=[3, 2], **how) == expected[3:1:-1]
    many = policy.generate([[3]] * 60, eot=5, max_new_tokens=20, temperature=3.0)
    assert all(5 not in r[:-1] and (r[-1] == 5 or len(r) == 20) for r in many)
    assert {r[-1] == 5 for r in many} == {True, False}
    assert policy.generate([[3]], eot=1, max_new_tokens=0) == [[]]
    with pytest.raises(ValueError):
        policy.generate([[3] * 20], eot=1, max_new_tokens=3, room=20)


def test_the_folders_generation_config_changes_no_sample_and_is_saved_as_it_was(folder, tmp_path):
    how = dict(eot=1, max_new_tokens=8)
    wanted = load_policy(folder("llama")).generate(PROMPTS, **how)
    file, saved = "generation_config.json", tmp_path / "saved"
    shutil.copytree(folder("llama"), tmp_path / "source")
    for setting in (dict(repetition_penalty=5.0), dict(top_k=1, do_sample=True)):
        text = json.dumps(setting | {"eos_token_id": [1, 5]})
        (tmp_path / "source" / file).write_text(text)
        policy = load_policy(tmp_path / "source")
        assert policy.generate(PROMPTS, **how) == wanted
        policy.save(saved)
        assert (saved / file).read_text() == text
    (tmp_path / "source" / file).unlink()
    load_policy(tmp_path / "source").save(saved)
    assert not (saved / file).exists()


# --- folders --------------------------------------------------------

def spoiled(source, place, change=lambda tensors: None):
    """The model in `source`, in one file, its tensors changed."""
    tensors = {}
    for file in huggingface.tensors_of(source, ""):
        tensors |= load_file(file)
    change(tensors)
    place.mkdir()
    shutil.copy(source / "config.json", place)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_folders_that_are_not_right_are_a_one_line_error_that_names_them(folder, tmp_path):
    up = "model.layers.1.mlp.up_proj.weight"
    changes = {
        "missing": (lambda t: t.pop(up), up),
        "no-head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),  # untied
        "shape": (lambda t: t.update({up: torch.zeros(70, 32)}), up),
        "nan": (lambda t: t[up][3].fill_(math.nan), up),
        "inf": (lambda t: t["lm_head.weight"][0].fill_(-math.inf), "lm_head.weight")}
    for name, (change, word) in changes.items():
        line = one_line(load_policy, spoiled(folder("llama"), tmp_path / name, change))
        assert line.startswith(f"--model {tmp_path / name}: ") and word in line

    place = spoiled(folder("llama"), tmp_path / "place")
    config, weights = place / "config.json", place / "model.safetensors"
    for text in ('{"model_type": ', "{}", '{"model_type": "t5"}'):
        config.write_text(text)
        assert one_line(load_policy, place, flag="ref").startswith(f"--ref {place}: ")
    shutil.copy(folder("llama") / "config.json", config)
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(place) in one_line(load_policy, place)
    weights.rename(place / "pytorch_model.bin")
    assert "no *.safetensors" in one_line(load_policy, place)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_config_with_fewer_layers_than_the_files_is_a_one_line_error(kind, folder, tmp_path):
    def as_the_hub_has_gpt2(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    place = spoiled(folder(kind), tmp_path / kind, as_the_hub_has_gpt2)
    config = json.loads((place / "config.json").read_text())
    load_policy(place)
    for name in config.keys() & {"num_hidden_layers", "n_layer"}:
        config[name] = 1
    config.pop("layer_types", None)
    (place / "config.json").write_text(json.dumps(config))
    line = one_line(load_policy, place)
    assert line.startswith(f"--model {place}: ") and re.search(r"\.1\..*fewer layers", line)


def test_our_own_gpt_comes_back_as_our_own_and_a_tied_head_is_not_missed(folder, tmp_path):
    gpt().save(tmp_path / "own")
    assert isinstance(load_policy(tmp_path / "own"), model.GPT)
    assert "--lora" in one_line(load_policy, tmp_path / "own", lora=4)
    tied = spoiled(folder("gemma"), tmp_path / "tied", lambda t: t.pop("lm_head.weight", None))
    policy = load_policy(tied)
    policy.save(tmp_path / "again")
    assert torch.equal(logits_of(load_policy(tmp_path / "again")), logits_of(policy))


def test_code_in_a_folder_is_not_run_unless_asked_for(folder, tmp_path):
    place = spoiled(folder("llama"), tmp_path / "m")
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "homemade",
               "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): model_type = 'homemade'\n"
        "class M(LlamaForCausalLM): config_class = C\n")
    assert str(place) in one_line(load_policy, place)
    policy = load_policy(place, trust_remote_code=True)
    assert torch.equal(logits_of(policy), logits_of(load_policy(folder("llama"))))


def test_a_name_that_is_no_folder_is_asked_of_the_hub_and_a_path_never(
        monkeypatch, folder, tmp_path):
    import huggingface_hub
    asked = []

    def download(name, **how):
        asked.append(name)
        return str(folder("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_policy("someone/llama", lora=2).save(tmp_path, adapter=True)
    assert asked == ["someone/llama"]
    assert huggingface.adapter_base(tmp_path) == "someone/llama"  # not our cache's folder
    for path in ("/no/such", "./no/such", "out/run/model"):
        assert "no config.json" in one_line(load_policy, path)
    assert asked == ["someone/llama"]


# --- adapters -------------------------------------------------------

def train_a_little(policy, steps=3):
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(steps):
        policy(*ROW, PREDICT, TARGETS).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


@pytest.fixture(scope="module")
def sft_adapter(folder, tmp_path_factory):
    """What a user of peft has: an adapter's folder."""
    place = tmp_path_factory.mktemp("sft")
    policy = load_policy(folder("llama"), dtype=torch.float64, lora=3)
    train_a_little(policy).save(place, adapter=True)
    return place


def test_a_fresh_adapter_is_the_base_bit_for_bit_and_the_only_thing_trained(folder):
    for kind in ("gpt2", "llama"):
        policy, again = (load_policy(folder(kind), lora=4) for _ in range(2))
        assert torch.equal(logits_of(policy), logits_of(load_policy(folder(kind))))
        before = {name: p.clone() for name, p in policy.named_parameters()}
        assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
        train_a_little(policy)
        for name, p in policy.named_parameters():
            assert torch.equal(p, before[name]) == (not p.requires_grad) == ("lora_" not in name)
        assert not any("lora_" in name and "lm_head" in name for name in before)
        other = dict(load_policy(folder(kind), lora=4, seed=1).named_parameters())
        assert not all(torch.equal(other[name], p) for name, p in before.items())


def test_the_reference_stays_the_base_in_all_it_does_and_is_no_second_copy(folder):
    base = load_policy(folder("llama"), dtype=torch.float64)
    policy = train_a_little(load_policy(folder("llama"), dtype=torch.float64, lora=4))
    reference = policy.reference().requires_grad_(False)
    for policy.shares_prompts, policy.flat in ways(base):
        assert torch.equal(logits_of(reference), logits_of(base))
        assert (logits_of(policy) - logits_of(reference)).abs().max() > 1e-2
    assert not reference(*ROW, PREDICT, TARGETS).requires_grad
    hidden = reference.hidden(*ROW, PREDICT)
    assert torch.equal(reference.head(hidden), base(*ROW, PREDICT)) and not hidden.requires_grad
    how = dict(eot=1, max_new_tokens=8, temperature=0)
    assert reference.generate(PROMPTS, **how) == base.generate(PROMPTS, **how)
    assert next(reference.parameters()) is next(policy.parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


def test_a_reference_asked_inside_the_policys_chunks_leaves_the_gradient_right(
        monkeypatch, folder):
    """The adapter goes off and on amid the forward, and again when backward recomputes it."""
    base = load_policy(folder("llama"), dtype=torch.float64)
    policy = train_a_little(load_policy(folder("llama"), dtype=torch.float64, lora=4))

    def gradient(reference):
        hidden = reference.hidden(*ROW, PREDICT).detach()

        def kl(logits, targets, rows):
            theirs = reference.head(hidden[rows]).detach().log_softmax(-1)
            return (theirs.exp() * (theirs - logits.log_softmax(-1))).sum(-1)[None]

        return gradients(policy(*ROW, PREDICT, TARGETS, kl).sum(), policy)

    expected = gradient(base)
    monkeypatch.setitem(model.chunked_log_probs.__kwdefaults__, "chunk_elements", 3 * 64)
    for a, b in zip(gradient(policy.reference()), expected, strict=True):
        assert b.abs().max() > 1e-6
        close(a, b, 1e-9 * b.abs().max().clamp(min=1).item())  # another order of sums


def test_an_adapter_folder_is_base_plus_adapter_as_policy_and_as_reference(folder, sft_adapter):
    """The trap: with the bare base as reference, the SFT stage is forgotten."""
    from peft import AutoPeftModelForCausalLM
    expected = alone(AutoPeftModelForCausalLM.from_pretrained(sft_adapter, dtype=torch.float64))
    load = partial(load_policy, sft_adapter, dtype=torch.float64)
    full, lora = load(), load(lora=4)
    base = logits_of(load_policy(folder("llama"), dtype=torch.float64))
    for policy in (full, lora, lora.reference()):
        close(logits_of(policy), expected, 1e-5)  # rotary angles are float32
        assert (logits_of(policy) - base).abs().max() > 0.1
    assert torch.equal(logits_of(lora), logits_of(full))
    assert all(p.requires_grad for p in full.parameters())  # without lora it is trained whole


def test_saved_models_and_adapters_are_the_policy_wherever_they_are_loaded(
        folder, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM
    for kind in ("gpt2", "gemma"):  # their heads are tied
        monkeypatch.chdir(folder(kind).parent)
        policy = train_a_little(load_policy(folder(kind).name, lora=4))  # by a relative name
        policy.checkpoint_activations()
        expected, before = logits_of(policy), {n: p.clone() for n, p in policy.named_parameters()}
        merged, adapter = tmp_path / f"{kind}-merged", tmp_path / f"{kind}-adapter"
        policy.save(merged)
        policy.save(adapter, adapter=True)
        assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
        monkeypatch.chdir(tmp_path)
        # W + BA added before or after the product: float32, logits near 10
        close(alone(AutoModelForCausalLM.from_pretrained(merged)), expected, 2e-4)
        close(alone(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected, 2e-4)


def test_what_adapters_cannot_do_is_a_one_line_error(sft_adapter, tmp_path):
    stacked = load_policy(sft_adapter, lora=2)
    assert str(sft_adapter) in one_line(stacked.save, tmp_path / "x", adapter=True)
    changes = {"cut": lambda t: t.pop(sorted(t)[3]), "more": lambda t: t.update(x=torch.zeros(1))}
    for name, change in changes.items():
        place = tmp_path / name
        shutil.copytree(sft_adapter, place)
        tensors = load_file(place / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        assert "does not fit its base" in one_line(load_policy, place)


# --- layers, classifiers, memory ------------------------------------

def test_recomputed_layers_give_the_same_numbers_and_run_again_in_backward(folder):
    for kind, lora in (("llama", 4), ("bloom", 0)):
        plain, policy = (load_policy(folder(kind), lora=lora) for _ in range(2))
        policy.checkpoint_activations()
        runs, block = [], policy.blocks("x")[0]
        next(block.children()).register_forward_hook(lambda *_: runs.append(1))
        logps, wanted = policy(*ROW, PREDICT, TARGETS), plain(*ROW, PREDICT, TARGETS)
        forwards = len(runs)  # bloom's rows are padded, in three groups
        found = gradients(logps.sum(), policy)
        assert torch.equal(logps, wanted) and len(runs) == 2 * forwards
        assert all(map(torch.equal, found, gradients(wanted.sum(), plain)))


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers(folder, monkeypatch):
    monkeypatch.setattr(model, "compiled", {})
    for kind, lora, backend in (("gpt2", 4, "aot_eager"), ("llama", 0, "inductor")):
        torch._dynamo.reset()
        fuse = partial(torch.compile, dynamic=True, backend=backend)
        monkeypatch.setattr(kernels, "fuse", fuse)
        monkeypatch.setattr(huggingface, "fuse", fuse)
        plain, policy = (load_policy(folder(kind), lora=lora) for _ in range(2))
        policy.compile_layers()
        wanted, logps = plain(*ROW, PREDICT, TARGETS), policy(*ROW, PREDICT, TARGETS)
        close(logps, wanted, 1e-4)  # float32, logits near 10
        for a, b in zip(gradients(logps.sum(), policy), gradients(wanted.sum(), plain)):
            close(a, b, 1e-5 * max(1.0, b.abs().max().item()))
        how = dict(eot=1, max_new_tokens=6, temperature=0)
        assert policy.generate(PROMPTS, **how) == plain.generate(PROMPTS, **how)


@pytest.fixture
def classifier(tmp_path):
    from transformers import AutoModelForSequenceClassification, LlamaConfig
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"pad_token_id": 1, "num_labels": 1, "initializer_range": 0.3})
    lm = AutoModelForSequenceClassification.from_config(config)
    lm.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_classifier_gives_one_number_per_token_in_flat_rows(classifier):
    policy = HFPolicy(TokenClassifier(classifier, torch.float32, "reward"))
    assert policy.flat and policy.chunked
    classifier = policy.lm.classifier
    assert classifier.config.pad_token_id is None  # it was the end-of-text's id
    ids, positions, lengths = ROW
    with torch.no_grad():
        scores = policy.head(policy.hidden(ids, positions, lengths, slice(None)))[:, 0]
        for part, score in zip(ids.split(lengths), scores.split(lengths)):
            close(score[-1], classifier(part[None]).logits[0, 0], 1e-4)  # float32 near 10


def test_a_classifier_may_lack_its_head_and_nothing_else(classifier, folder, tmp_path):
    load = partial(TokenClassifier, dtype=torch.float32, flag="reward")
    body = "model.layers.1.mlp.up_proj.weight"
    for name in (body, "model.norm.weight"):
        broken = spoiled(classifier, tmp_path / name, lambda tensors: tensors.pop(name))
        assert name in one_line(load, broken)
    wide = spoiled(classifier, tmp_path / "wide",
                   lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    assert one_line(load, wide).startswith(f"--reward {wide}: ")
    found = dict(load(folder("llama")).classifier.named_parameters())  # a language model
    wanted = dict(load_policy(folder("llama")).lm.named_parameters())
    assert torch.equal(found[body], wanted[body])
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "model.layers.1." in one_line(load, classifier)
