"""Claims about plumbing/rewards.py: critics and reward models, and who may judge."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import world
from plumbing import rewards
from plumbing.formats import Turn
from plumbing.tokenizer import Tokenizer, load_tokenizer
from test_rollouts import close, scorer, toy

BYTES = load_tokenizer()


# --- critics and reward models --------------------------------------------------------------------

ROWS = [data.make_row([1, 2], [3, 4, 5]), data.make_row([9], [8, 5]),
        data.make_row([1, 2], [3, 4, 6]), data.make_row([1, 2, 3], [7, 7, 7, 5])]


def test_a_new_critic_expects_nothing_and_a_language_model_is_no_reward_model(tmp_path):
    toy(dtype=torch.float32).save(tmp_path)
    flat = data.flatten(ROWS)
    for kind in (rewards.Critic, rewards.RewardModel):
        assert (kind.load(tmp_path, new=True)(*flat[:4]) == 0).all()
    narrow = rewards.Critic.load(tmp_path, new=True, dtype=torch.bfloat16)
    assert narrow(*flat[:4]).dtype == torch.float32      # what follows is float32 in any case
    with pytest.raises(SystemExit, match="without a reward head"):
        rewards.RewardModel.load(tmp_path)


def test_a_reward_model_reads_the_last_token_and_loads_as_it_was_saved(tmp_path):
    reward_model = scorer(rewards.RewardModel, torch.float32)
    found = rewards.rewards_of(reward_model, ROWS)
    for row, reward in zip(ROWS, found):
        ids = torch.tensor(row.ids.astype(np.int64))
        hidden = reward_model.trunk.hidden(ids, torch.arange(len(ids)), [len(ids)], [-1])
        close(reward_model.score(hidden)[0, 0].detach().double(), reward, 1e-5)      # float32
    assert found[0] != found[2]                          # they differ in their last token alone
    reward_model.token_budget = 4
    close(rewards.rewards_of(reward_model, ROWS), found, 1e-5)
    reward_model.save(tmp_path, eot=256)
    close(rewards.rewards_of(rewards.RewardModel.load(tmp_path), ROWS), found, 0)


def test_accuracy_counts_a_tie_as_half_and_a_third_response_not_at_all(monkeypatch):
    monkeypatch.setattr(rewards, "rewards_of", lambda reward_model, rows:
                        torch.tensor([float(row.ids[-1]) for row in rows]))
    five, also_five, six, _ = ROWS
    units = [(five, also_five, six), (six, five, six), (six, five, five), (five, six, five)]
    found = rewards.accuracy(None, units)                # a tie, right, right, wrong
    assert found == {"accuracy": 2.5 / 4, "margin": 0.25, "n": 4}


def tiny_llama(folder, vocab):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, eos_token_id=5,
        pad_token_id=5)
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_hugging_face_reward_model_loads_as_it_was_saved_and_may_be_padded(tmp_path):
    tiny_llama(tmp_path / "lm", vocab=61)
    reward_model = rewards.RewardModel.load(tmp_path / "lm", new=True)
    assert reward_model.flat and (rewards.rewards_of(reward_model, ROWS) == 0).all()
    reward_model.trunk.lm.classifier.score.weight.data.normal_()
    found = rewards.rewards_of(reward_model, ROWS)
    reward_model.save(tmp_path / "rm")
    close(rewards.rewards_of(rewards.RewardModel.load(tmp_path / "rm"), ROWS), found, 1e-6)
    reward_model.trunk.flat = False
    close(rewards.rewards_of(reward_model, ROWS), found, 1e-5)                      # float32


# --- rewards --------------------------------------------------------------------------------------

REWARDS = """
def good(prompts, responses): return [float(len(r)) for r in responses]
def short(prompts, responses): return [1.0]
def nan(prompts, responses): return [float("nan")] * len(responses)
def infinite(prompts, responses): return [1.0, float("-inf")]
def nothing(prompts, responses): pass
def texts(prompts, responses): return ["good", "bad"]
"""


def test_a_reward_that_is_none_is_one_line_that_names_the_flag(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    prompts, responses = ["hi", "hi"], ["yes", "no, never"]
    assert rewards.load_reward(f"{file}:good")(prompts, responses) == [3.0, 9.0]
    question = world.eval_prompts("train", 1)[0]
    assert rewards.load_reward("world")([question], ["Happy to help."]) == \
        [world.utility(question, "Happy to help.")]
    toy(dtype=torch.float32).save(tmp_path / "policy", eot=256)
    for spec in (f"{file}:short", f"{file}:nan", f"{file}:infinite", f"{tmp_path}/no.py:f",
                  f"{file}:nothing", f"{file}:texts", f"{file}:goood", "wrold", "world",
                  f"{tmp_path}/policy", str(tmp_path)):
        with pytest.raises(SystemExit) as stopped:       # world: these are no questions of its own
            rewards.load_reward(spec)(prompts, responses)
        line = stopped.value.code
        assert "reward" in line and "\n" not in line and len(line) < 400


def test_a_reward_model_judges_rows_as_it_judges_texts(tmp_path):
    reward_model = scorer(rewards.RewardModel, torch.float32)
    reward_model.save(tmp_path, eot=256)
    BYTES.save(tmp_path)
    reward = rewards.load_reward(str(tmp_path), BYTES)
    rows = [data.make_row(BYTES.encode("hi"), BYTES.encode(text) + [BYTES.eot])
            for text in ("yes", "no")]
    wanted = rewards.rewards_of(reward_model, rows)
    close(rewards.ask(reward, rows, BYTES), wanted, 0)
    close(torch.tensor(reward(["hi", "hi"], ["yes", "no"])), wanted.to(torch.float32), 1e-6)
    with pytest.raises(SystemExit, match="its tokenizer is not the policy's"):
        rewards.load_reward(str(tmp_path), Tokenizer(world.tokenizer()))
    long = "x" * 19 + "why"                              # 25 tokens for a context of 24
    assert reward.row(long, "no").ids.tolist() == BYTES.encode("x" * 18 + "why" + "no") + [256]


def test_a_reward_function_is_not_told_of_the_beginning_of_text():
    told = []

    def reward(prompts, responses):
        told.extend([prompts, responses])
        return [0.0]
    rewards.ask(reward, [data.make_row([7, 8], [9])], SimpleNamespace(bos=[7], text=list))
    assert told == [[[8]], [[9]]]


def chat_reward_model(folder):
    """A tiny llama classifier with a chat template that goes on after the end of the turn."""
    import tokenizers as hf
    from transformers import PreTrainedTokenizerFast
    letters = {chr(i): i - 32 for i in range(32, 127)}
    core = hf.Tokenizer(hf.models.BPE({**letters, "<s>": 95, "</s>": 96}, []))
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = ("<s>{% for m in messages %}{{ m.role }}:{{ m.content }}</s> "
                               "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    tiny_llama(folder, vocab=97)
    reward_model = rewards.RewardModel.load(folder, new=True)
    reward_model.trunk.lm.classifier.score.weight.data.normal_()
    reward_model.save(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_with_a_chat_template_the_judge_reads_what_transformers_would(tmp_path):
    from transformers import AutoModelForSequenceClassification
    tokenizer = chat_reward_model(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    reward = rewards.load_reward(str(tmp_path), flag="judge")
    for prompt in ("a?", (Turn("user", "a?"),)):         # a text is the user's turn
        messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "no"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert reward.row(prompt, "no").ids.tolist() == ids
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits[0, 0]
        close(torch.tensor(reward([prompt], ["no"])[0]), wanted, 1e-5)               # float32
    assert 96 in ids and reward.row("a?", "</s>").ids.tolist().count(96) == 2        # text is text
    cut = reward.row("a" * 50, "no").ids.tolist()
    assert len(cut) == 32 and cut[0] == 95 and cut[-5:] == ids[-5:]                  # BOS stays
