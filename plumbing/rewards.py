"""Who judges a response: a reward model, the help desk's true utility, a Python function.

    load_reward    a reward of any kind: reward(prompts, responses) -> numbers
    RewardModel    r(x, y), one number per response, read at its last token
    Critic         V(s_t), one number per token: the rewards that PPO's policy can still expect
"""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import data
import world
from model import GPT, widened
from plumbing.chat import Chat
from plumbing.formats import Turn
from plumbing.huggingface import HFPolicy, TokenClassifier, read_model_config, refuse_nan
from plumbing.reading import reading, tensors_of
from plumbing.tokenizer import load_tokenizer


# --- one number per token: critic and reward model ------------------------------------------------

class Scorer(nn.Module):
    """A transformer whose head gives one number per token. It takes flat rows, as a policy does.

    A new head is 0, and so is every output: a new critic expects nothing, a new reward model has
    loss log 2. The transformer is not shared with the policy. This costs one more forward, but the
    value loss cannot damage the policy.
    """

    shares_prompts = False
    chunked = True
    sft_adapter = None
    ahead = 0                 # 0: the number is for the text before a token; 1: including it

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.flat = trunk.flat
        self.token_budget = trunk.token_budget
        self.context = trunk.context
        self.vocab_size = trunk.vocab_size
        self.score = trunk.head                              # a TokenClassifier has its own
        if isinstance(trunk, GPT):
            like = trunk.wte.weight
            self.score = nn.Linear(trunk.config.d_model, 1, bias=False, device=like.device,
                                   dtype=like.dtype)
            nn.init.zeros_(self.score.weight)

    def forward(self, ids, positions, lengths, predict, targets=None, extra=None):
        """A number at each of the M positions; targets and extra are ignored.   (M,)"""
        hidden = self.trunk.hidden(ids, positions, lengths, predict + self.ahead)
        return widened(self.score(hidden)[:, 0])

    def checkpoint_activations(self):
        self.trunk.checkpoint_activations()

    def save(self, folder, *, eot=None):
        """Our GPT and score.safetensors; any other model as a classifier of transformers."""
        if isinstance(self.trunk, GPT):
            self.trunk.save(folder, eot=eot)
            weight = self.score.weight.detach().cpu().contiguous()
            save_file({"score.weight": weight}, Path(folder) / "score.safetensors")
        else:
            self.trunk.lm.classifier.save_pretrained(folder)

    @classmethod
    def load(cls, folder, *, new=False, device="cpu", dtype=torch.float32, flag="reward"):
        """Load what `save` or transformers wrote. new: a language model gets a head of 0."""
        said = f"--{flag} {folder}"
        has_head = any("score.weight" in names for names in tensors_of(folder, said).values())
        if not has_head and not new:
            raise SystemExit(f"{said}: a language model without a reward head; "
                             "--loss rm trains one from it")
        own = "nanokto" in read_model_config(folder, flag)
        with reading(said):
            if own:
                scorer = cls(GPT.from_pretrained(folder, device=device, dtype=dtype))
                if has_head:
                    saved = load_file(Path(folder) / "score.safetensors")
                    scorer.score.load_state_dict({"weight": saved["score.weight"]})
            else:
                classifier = TokenClassifier(folder, dtype, flag).to(device)
                if not has_head:
                    nn.init.zeros_(classifier.get_output_embeddings().weight)
                scorer = cls(HFPolicy(classifier))
        refuse_nan(scorer, said)
        return scorer


class Critic(Scorer):
    """V(s_t): the rewards still to come, estimated before y_t is known."""


class RewardModel(Scorer):
    """r(x, y), read at the last token, which sees the whole response: see last_token."""
    ahead = 1


def last_token(row):
    """The row with its mask on the last token only: the sum over the mask is then the reward."""
    mask = np.zeros_like(row.mask)
    mask[-1] = 1
    mask.setflags(write=False)
    return replace(row, mask=mask)


@torch.no_grad()
def rewards_of(reward_model, rows):
    """r(x, y) of any number of rows.   (B,) float64 on the CPU"""
    device = next(reward_model.parameters()).device
    rows = [last_token(row) for row in rows]
    rewards = torch.zeros(len(rows), dtype=torch.float64)
    for part in data.token_batches(rows, reward_model.token_budget):
        some = slice(part.start, part.stop)
        flat = data.flatten(rows[some], device)
        rewards[some] = reward_model(*flat[:4]).cpu().double()
    return rewards


def accuracy(reward_model, units):
    """How often the chosen response has the larger reward, ties counting half.   -> dict"""
    if not units:
        return None
    rewards = rewards_of(reward_model, [row for unit in units for row in unit[:2]])
    gaps = rewards[0::2] - rewards[1::2]
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return {"accuracy": float(right.mean()), "margin": float(gaps.mean()), "n": len(units)}


# --- rewards --------------------------------------------------------------------------------------

def load_reward(spec, tokenizer=None, *, device="cpu", flag="reward"):
    """reward(prompts, responses) -> a list of numbers; more is better.

    spec       "world": the help desk's true utility, in points
               a folder: a reward model, trained by --loss rm or elsewhere
               "file.py:function": a Python function of the same two lists
    tokenizer  the policy's: then a reward model must have the same one, and can judge rows of
               tokens (reward.of_rows). Texts go through the folder's own tokenizer.
    """
    said = f"--{flag} {spec}"
    file, _, name = str(spec).rpartition(":")
    if spec == "world":
        return world_reward
    if file.endswith(".py") and Path(file).is_file():
        return python_reward(file, name, said)
    if Path(spec).is_dir():
        return ModelReward(spec, tokenizer, device, flag)
    raise SystemExit(f"{said}: no such reward; valid are world, the folder of a reward model, "
                     "or file.py:function")


def world_reward(prompts, responses):
    for prompt in prompts:
        if not isinstance(prompt, str) or world.parse_prompt(prompt) is None:
            raise SystemExit("--reward world: it knows the help desk's questions only, "
                             f"not {str(prompt)[:60]!r}")
    return [world.utility(prompt, response) for prompt, response in zip(prompts, responses)]


def python_reward(file, name, said):
    """`name` in `file`. An error in the user's code keeps its traceback."""
    spec = importlib.util.spec_from_file_location("reward_" + Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                          # dataclasses look it up there
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise SystemExit(f"{said}: {file} has no function {name}")

    def reward(prompts, responses):
        return finite_numbers(function(prompts, responses), len(responses), said)
    return reward


def finite_numbers(scores, n, said):
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError):                          # None, texts, one number for all
        raise SystemExit(f"{said}: gave {str(scores)[:80]}; expected a list of {n} numbers")
    if len(numbers) != n or not all(math.isfinite(number) for number in numbers):
        raise SystemExit(f"{said}: gave {str(numbers)[:80]} for {n} responses; expected a finite "
                         "number for each")
    return numbers


class ModelReward:
    """A reward model as a reward: of rows, or of texts."""

    def __init__(self, folder, tokenizer, device, flag):
        self.said = f"--{flag} {folder}"
        self.model = RewardModel.load(folder, device=device, flag=flag).requires_grad_(False)
        self.tokenizer = load_tokenizer(folder)
        if tokenizer is not None and fingerprint(tokenizer) != fingerprint(self.tokenizer):
            raise SystemExit(f"{self.said}: its tokenizer is not the policy's")

    def of_rows(self, rows):
        return finite_numbers(rewards_of(self.model, rows).tolist(), len(rows), self.said)

    def __call__(self, prompts, responses):
        return self.of_rows([self.row(p, r) for p, r in zip(prompts, responses)])

    def row(self, prompt, response):
        """A prompt and a response as tokens. With a chat template a text is a user's turn.

        A row that is too long loses its left end (a beginning-of-text stays), so that the question
        is cut and not the answer.
        """
        tokenizer = self.tokenizer
        if tokenizer.has_template:
            if isinstance(prompt, str):
                prompt = [Turn("user", prompt)]
            chat = Chat([*prompt, Turn("assistant", response)], tokenizer)
            ids = chat.ids(chat.whole)
        else:
            ids = tokenizer.prompt_ids(prompt) + tokenizer.encode(response) + [tokenizer.eot]
        bos = [getattr(tokenizer.backend, "bos_token_id", None)]
        ids = data.cut_left(ids, self.model.context, bos)
        return data.make_row(ids[:-1], ids[-1:])


def fingerprint(tokenizer):
    text = "Help, my router's fan (2) makes\na strange noise: 100%!"
    return tokenizer.vocab_size, tokenizer.eot, tokenizer.encode(text)


def ask(reward, rows, tokenizer):
    """The reward of each row's response. A function gets texts without a BOS.   (B,) float64"""
    if hasattr(reward, "of_rows"):
        return torch.tensor(reward.of_rows(rows), dtype=torch.float64)
    prompts = [tokenizer.text(i for i in row.prompt.tolist() if i not in tokenizer.bos)
               for row in rows]
    responses = [tokenizer.text(row.response) for row in rows]
    return torch.tensor(reward(prompts, responses), dtype=torch.float64)
