"""PPO: the policy writes, a reward judges, and a clipped update makes the better tokens likelier. RLHF in one reading.

Schulman, Wolski, Dhariwal, Radford, Klimov 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347; advantages: Schulman et
al. 2015, arXiv 1506.02438 (GAE); for language models: Ziegler et al. 2019, arXiv 1909.08593, and Ouyang et al. 2022, arXiv 2203.02155.

    1  a reward model learns from pairs            reward_model_loss, RewardModel
    2  the policy answers a batch of prompts       rollouts: sampled at temperature 1, scored by policy, reference, critic, reward
    3  a reward for every token                    token_rewards: the response's score on its last token, a KL penalty on all
    4  was this token better than expected?        gae: advantages; the critic says what was expected
    5  a few clipped steps on the same samples     ppo_loss, value_loss, updates;   then again from 2

THE SIGN. The paper's L^CLIP = E[min(ratio A, clip(ratio) A)] is an objective to MAXIMISE (the Chinese source documents call it L too).
Everything named *_loss here is its negative, to be minimised.

Notation. log is natural. A token is an action y_t, the text before it a state s_t; gradient only where it says so.
    token_logps        (B, T)  log pi(y_t|s_t) under the policy that is being trained            carries the gradient
    old_token_logps    (B, T)  the same under the policy that sampled
    ref_token_logps    (B, T)  the same under the frozen reference
    values             (B, T)  V(s_t), the critic's estimate of what is still to come, y_t included       value_loss: carries the gradient
    mask               (B, T)  > 0 on response tokens; every other entry may hold anything, NaN included, and has no influence
    scores             (B,)    the reward of a whole response
Means are over the TOKENS of the batch, not over responses. Their functions need no shape: a flat row (M,) will do. float64 in, float64 out.
"""

import math

import torch
import torch.nn.functional as F

MAX_LOG_RATIO = 20.0         # ratio <= 4.9e8. In float32 e^89 is inf, and from 1e19 on its square in the gradient's norm; 0 * inf is NaN


# --- 1. the reward model ----------------------------------------------------------------------------------------------

def reward_model_loss(chosen_rewards, rejected_rewards, *, centre=0.0):
    """-log sigma(r_w - r_l) + centre (r_w + r_l)^2.   (B,)

    Paper: Ouyang et al. 2022, Training language models to follow instructions with human feedback, arXiv 2203.02155 (Eq. 1, one pair per prompt)
    Idea: the rewards under which the annotator's choices are likeliest, if P(w beats l) = sigma(r_w - r_l) (Bradley and Terry 1952).
    log 2 at equal rewards. Blind to a constant added to both; `centre` > 0 (0.01, say) draws their mean to 0 (as in TRL, from memory).
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards) + centre * (chosen_rewards + rejected_rewards) ** 2


# --- 3. a reward for every token --------------------------------------------------------------------------------------

def kl_estimates(token_logps, ref_token_logps):
    """Three estimates of KL(pi || ref) per token that pi sampled: k1, k2, k3.   (B, T) each, nats

    With d = log pi(y_t|s_t) - log ref(y_t|s_t), E over y_t ~ pi:   (Schulman 2020, joschu.net/blog/kl-approx.html, from memory)
        k1 = d                 unbiased, but negative for every token that became less likely: noisy
        k2 = d^2 / 2           biased, second-order right near pi = ref, >= 0
        k3 = e^-d - 1 + d      unbiased and >= 0: the mean of e^-d = ref/pi is 1, and e^x >= 1 + x
    All that for samples of pi itself: a token sampled at another temperature or from the top p alone would make k1's mean anything.
    """
    d = token_logps - ref_token_logps
    cap = math.log(torch.finfo(d.dtype).max) - 1                        # only what is inf anyway: a masked inf would be 0 * inf = NaN
    return d, d ** 2 / 2, torch.expm1((-d).clamp(max=cap)) + d                         # expm1: 1e-9 apart, e^-d - 1 has no digits left


@torch.no_grad()
def token_rewards(scores, token_logps, ref_token_logps, mask, *, kl_coef=0.05):
    """R_t = -kl_coef (log pi(y_t|s_t) - log ref(y_t|s_t)), plus the response's score on its last token.   (B, T), 0 where mask is 0

    Summed over t and averaged over samples of pi: E[score] - kl_coef KL(pi || ref), what RLHF maximises (Ouyang et al., Eq. 2, without
    its pretraining term). k1, although it is noisy: only its sum has the KL's gradient when it is a reward. A row without any token has
    nothing to put its score on.
    """
    on = mask > 0
    index = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = torch.where(on, index, -1).amax(1, keepdim=True)                                                      # (B, 1)
    penalty = torch.where(on, -kl_coef * (token_logps - ref_token_logps), 0.0)
    return torch.where(index == last, penalty + scores[:, None].to(penalty.dtype), penalty)


# --- 4. was it better than expected? ----------------------------------------------------------------------------------

@torch.no_grad()
def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: (advantages, returns).   (B, T) each, 0 where mask is 0

        delta_t = R_t + gamma V(s_t+1) - V(s_t)                   one step of surprise; V after the last token is 0
        A_t     = sum_l>=0 (gamma lam)^l delta_t+l                computed backwards: A_t = delta_t + gamma lam A_t+1
        returns = A_t + V(s_t)                                    what the critic should have said
    (1506.02438, Eq. 16; PPO's Eq. 11-12.) lam = 0 trusts the critic from the next token on (little noise, its bias); lam = 1 is the sum of
    rewards to come minus V(s_t) (no bias, all the noise). Where mask is 0, reward and value count as 0.
    """
    on = mask > 0
    rewards, values = torch.where(on, rewards, 0.0), torch.where(on, values, 0.0)
    advantages, following, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                                                # Eq. 12
        advantages[:, t] = following = delta + gamma * lam * following                                           # Eq. 11
        next_value = values[:, t]
    advantages = torch.where(on, advantages, 0.0)
    return advantages, advantages + values


@torch.no_grad()
def whiten(x, mask):
    """(x - mean) / sqrt(var + 1e-8), both over the mask, var unbiased (divided by n - 1); 0 where mask is 0.   same shape

    The mean is a baseline, which leaves the expected gradient as it is; the scale makes learning rate and clip independent of the
    reward's unit. Over the WHOLE batch of rollouts, before it is split: the mean of a micro-batch would be another number.
    """
    on = mask > 0
    n = on.sum()
    centred = torch.where(on, x - torch.where(on, x, 0.0).sum() / n.clamp(min=1), 0.0)
    return centred / ((centred ** 2).sum() / (n - 1).clamp(min=1) + 1e-8).sqrt()


# --- 5. the clipped step ----------------------------------------------------------------------------------------------

def ppo_loss(token_logps, old_token_logps, advantages, mask, *, clip=0.2):
    """-mean_t min(ratio A, clip(ratio, 1 - eps, 1 + eps) A),  ratio = pi(y_t|s_t) / pi_old(y_t|s_t).   ()

    Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347 (Eq. 7, negated: a loss to MINIMISE)
    Idea: policy gradient on samples of a slightly older policy; a token that has moved by eps in the good direction has no slope left.
    At pi = pi_old it is -mean A, with the gradient -mean A grad log pi: REINFORCE's. The min is pessimistic: a token that moved the
    WRONG way (A > 0 and ratio < 1 - eps, or A < 0 and ratio > 1 + eps) keeps its slope. The log-ratio is cut at +20 before exp: beyond,
    loss and slope would be inf, then NaN; a token that far out waits, without a slope, for the next rollouts.
    """
    on = mask > 0
    log_ratio = torch.where(on, token_logps - old_token_logps.detach(), 0.0)                 # where BEFORE exp: a masked inf stays out
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    advantages = torch.where(on, advantages.detach(), 0.0)
    return token_mean(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), mask)             # Eq. 7


def value_loss(values, old_values, returns, mask, *, clip_value=0.2):
    """1/2 mean_t max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2),  G = returns.   ()

    The critic's regression, pessimistic like the policy's: a value that has moved by eps towards its target waits for the next rollouts. Not in
    the paper: from OpenAI's baselines and TRL. eps is in units of the REWARD, so 0.2 is slow where scores are large; inf switches it off.
    """
    on = mask > 0
    values, old_values, returns = (torch.where(on, x, 0.0) for x in (values, old_values.detach(), returns.detach()))
    clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return 0.5 * token_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def token_mean(x, mask):
    """sum(mask x) / sum(mask), 0 for an empty mask. x must be finite where mask is 0.   ()"""
    mask = mask.to(x.dtype)
    return (x * mask).sum() / mask.sum().clamp(min=torch.finfo(x.dtype).tiny)


def actor_critic_loss(token_logps, values, old_token_logps, old_values, advantages, returns, mask, *, clip=0.2, clip_value=0.2, vf_coef=0.1):
    """ppo_loss + vf_coef value_loss.   ()   No entropy bonus: the KL penalty already keeps the policy from collapsing."""
    return (ppo_loss(token_logps, old_token_logps, advantages, mask, clip=clip)
            + vf_coef * value_loss(values, old_values, returns, mask, clip_value=clip_value))


# --- offline: thumbs as one-step episodes -----------------------------------------------------------------------------

def offline_ppo_loss(logratios, desirable, *, clip=0.5, kl_coef=0.1):
    """-min(ratio A, clip(ratio, eps, 1/eps) A) - kl_coef r,  r = log pi/ref of the response, ratio = e^r, A = +1 desirable, -1 not.   (B,)

    Paper: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306 (its offline PPO baseline)
    Idea: PPO's clipped step on KTO's data: somebody else's responses, taken as if the reference had sampled them, rewarded with +-1.
    clip is HALOs' cliprange: the ratio counts between clip and 1 / clip. Under that same reading E[-r] is KL(ref || pi), hence the sign of the
    penalty: it raises every response a little. Departures from HALOs' trainer: the response is ONE action (they take ratios per token), so
    there is no critic (.01), no GAE and no whitening to do. Cut at r = 20 like ppo_loss.
    """
    ratio = logratios.clamp(max=MAX_LOG_RATIO).exp()
    advantages = torch.where(desirable, torch.ones_like(ratio), -torch.ones_like(ratio))
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(clip, 1 / clip)) - kl_coef * logratios


# ======================================================================================================================
# So far torch alone. From here on things act: models score and write, rewards are asked for.

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.nn as nn
from safetensors.torch import load_file, save_file

import evaluate
import model
from data import flatten, load_tokenizer, make_row, token_batches


# --- one number per state: critic and reward model --------------------------------------------------------------------

class Scorer(nn.Module):
    """A transformer whose head says one number per token instead of a vocabulary of logits. Takes flat rows, as a policy does.

    The head starts at 0 and so does every answer: a new critic expects nothing, a new reward model has loss log 2. The trunk is a copy of
    its OWN, not the policy's: the value loss then cannot move the policy, and critic, reward model and policy load and save the same
    way. It costs a second forward; a shared trunk costs tuning vf_coef until neither task spoils the other.
    """
    ahead = 0                                               # read the state this many tokens after `predict`, where y_t is predicted from s_t

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.flat, self.token_budget, self.context, self.vocab_size = trunk.flat, trunk.token_budget, trunk.context, trunk.vocab_size
        self.shares_prompts, self.chunked, self.sft_adapter = False, True, None                     # what train.py asks of a policy
        self.score = trunk.head                                                                     # a Hugging Face classifier brings its own
        if isinstance(trunk, model.GPT):
            weight = trunk.wte.weight
            self.score = nn.Linear(trunk.config.d_model, 1, bias=False, device=weight.device, dtype=weight.dtype)
            nn.init.zeros_(self.score.weight)

    def forward(self, ids, positions, lengths, predict, targets=None, extra=None):
        """One number for each of the M positions.   (M,)   targets and extra are a policy's and not looked at"""
        x = self.score(self.trunk.hidden(ids, positions, lengths, predict + self.ahead))[:, 0]
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

    @property
    def head_weight(self):
        return self.score.weight if isinstance(self.trunk, model.GPT) else self.trunk.lm.classifier.score.weight

    def checkpoint_activations(self):
        self.trunk.checkpoint_activations()

    def save(self, folder, *, eot=None):
        """GPT-2's format and score.safetensors beside it; a Hugging Face model as AutoModelForSequenceClassification reads it."""
        if isinstance(self.trunk, model.GPT):
            self.trunk.save(folder, eot=eot)
            save_file({"score.weight": self.score.weight.detach().cpu().contiguous()}, Path(folder) / "score.safetensors", metadata={"format": "pt"})
        else:
            self.trunk.lm.classifier.save_pretrained(folder, safe_serialization=True)

    @classmethod
    def load(cls, folder, *, new=False, device="cpu", dtype=torch.float32, flag="reward"):
        """From a folder that `save` or transformers wrote; new=True also takes a language model and gives it a head of zeros."""
        config = model.read_model_config(folder, flag)
        headless = f"--{flag} {folder}: a language model without a reward head; --loss rm trains one from it"
        if "nanokto" in config:
            scorer, file = cls(model.GPT.from_pretrained(folder, device=device, dtype=dtype)), Path(folder) / "score.safetensors"
            if file.is_file():
                scorer.score.weight.data.copy_(load_file(file)["score.weight"])
            elif not new:
                raise SystemExit(headless)
            return scorer
        has_head = any("SequenceClassification" in a for a in config.get("architectures") or [])
        if not has_head and not new:
            raise SystemExit(headless)
        trunk = model.HFPolicy(_PerToken(folder, dtype, flag).to(device))
        if not has_head:
            nn.init.zeros_(trunk.lm.classifier.score.weight)
        return cls(trunk)


class Critic(Scorer):
    """V(s_t): what is still to come, said where the policy predicts y_t, before y_t is known."""


class RewardModel(Scorer):
    """r(x, y), read at the LAST token, where the whole response with its end is known. Rows for it: `last_token`."""
    ahead = 1

    @property
    def trained_before(self):
        return bool(self.head_weight.any())


class _PerToken(nn.Module):
    """transformers' sequence classifier without its pooling, dressed as a causal LM with one logit per token, which HFPolicy takes.

    Its own pooling looks for pads, and finds one in every end-of-text where both have the same id; so that pad id is taken away.
    """

    def __init__(self, folder, dtype, flag):
        super().__init__()
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging
        logging.disable_progress_bar()
        try:
            self.classifier = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=dtype, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as e:
            raise SystemExit(f"--{flag} {folder}: cannot be loaded as a reward model with one score: {' '.join(str(e).split())[:300]}") from None
        self.config, self.name_or_path = self.classifier.config, str(folder)
        c = self.config
        if not isinstance(getattr(self.classifier, "score", None), nn.Linear):
            raise SystemExit(f"--{flag} {folder}: {type(self.classifier).__name__} keeps its head elsewhere than in `score`; not supported")
        if c.pad_token_id == c.eos_token_id:
            c.pad_token_id = None

    @property
    def device(self):
        return self.classifier.device

    def get_decoder(self):
        return self.classifier.base_model

    def get_output_embeddings(self):
        return self.classifier.score

    def forward(self, **how):
        return SimpleNamespace(logits=self.classifier.score(self.classifier.base_model(**how).last_hidden_state))


def last_token(row):
    """The row with its mask on the last token alone: summed over the mask, a RewardModel's answer is the reward."""
    mask = np.zeros_like(row.mask)
    mask[-1] = 1
    return replace(row, mask=mask)


@torch.no_grad()
def rewards_of(reward_model, rows):
    """r(x, y) of any number of rows.   -> float64 (B,) on the CPU"""
    device, rows = next(reward_model.parameters()).device, [last_token(r) for r in rows]
    flats = [flatten(rows[part.start:part.stop], device) for part in token_batches(rows, reward_model.token_budget)]
    return torch.cat([reward_model(*flat[:4]).cpu().double() for flat in flats] or [torch.zeros(0, dtype=torch.float64)])


def accuracy(reward_model, units):
    """On (chosen, rejected) rows: how often the chosen response has the larger reward, ties counting half; and by how much on average.   -> dict"""
    gaps = rewards_of(reward_model, [row for u in units for row in u[:2]]).view(-1, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return {"accuracy": float(((gaps > 0) + 0.5 * (gaps == 0)).mean()), "margin": float(gaps.mean()), "n": len(units)} if len(units) else None


# --- rewards: the world's utility, a reward model, or any Python function ---------------------------------------------

def load_reward(spec, tokenizer, *, device="cpu", dtype=torch.float32, flag="reward"):
    """`world`, a reward model's folder, or `file.py:function` -> reward(prompts, responses) -> list of numbers, one per response."""
    if Path(spec).is_dir():
        return ModelReward(RewardModel.load(spec, device=device, dtype=dtype, flag=flag).requires_grad_(False), spec, tokenizer, flag)
    return evaluate.find_judge(spec, flag=flag)


class ModelReward:
    """A reward model as a reward: on rows of tokens where there are rows, so that nothing is decoded and encoded again."""

    def __init__(self, reward_model, folder, tokenizer, flag="reward"):
        probe, own = "Help, my router's fan (2) makes\na strange noise: 100%!", load_tokenizer(folder)
        if (own.vocab_size, own.eot, own.encode(probe)) != (tokenizer.vocab_size, tokenizer.eot, tokenizer.encode(probe)):
            raise SystemExit(f"--{flag} {folder}: its tokenizer is not the policy's ({own.vocab_size} tokens against {tokenizer.vocab_size})")
        self.model, self.tokenizer = reward_model, tokenizer

    def of_rows(self, rows):
        return rewards_of(self.model, rows).tolist()

    def __call__(self, prompts, responses):
        t = self.tokenizer
        return self.of_rows([make_row((t.prompt_ids(p) or [t.eot]), t.encode(r) + [t.eot]) for p, r in zip(prompts, responses)])


def ask(reward, rows, tokenizer, flag="reward"):
    """The reward of each row's response.   -> float64 (B,)   SystemExit with one line where the function does not do what it should"""
    if hasattr(reward, "of_rows") or not rows:
        return torch.tensor(reward.of_rows(rows) if rows else [], dtype=torch.float64)
    name, bos = getattr(reward, "__name__", "the reward function"), tokenizer.bos
    prompts = [r.ids[:r.n_prompt].tolist() for r in rows]
    prompts = [tokenizer.text(p[len(bos):] if p[:len(bos)] == bos else p) for p in prompts]
    responses = [tokenizer.text(r.response) for r in rows]
    try:
        scores = torch.tensor([float(s) for s in reward(prompts, responses)], dtype=torch.float64)
    except Exception as e:
        raise SystemExit(f"--{flag}: {name}(prompts, responses) raised {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    if len(scores) != len(rows):
        raise SystemExit(f"--{flag}: {name} returned {len(scores)} numbers for {len(rows)} responses")
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0])
        raise SystemExit(f"--{flag}: {name} returned {float(scores[i])} for the response {responses[i][:60]!r}")
    return scores


# --- 2. rollouts: the policy writes, everybody judges -----------------------------------------------------------------

@dataclass
class Experience:
    """One global batch of responses with all that the update needs of them; index t is the t-th response token. float64, on the CPU."""
    rows: list                                              # (B,) data.Row
    scores: torch.Tensor                                    # (B,)
    mask: torch.Tensor                                      # (B, T) bool
    old_token_logps: torch.Tensor                           # (B, T), as everything below
    ref_token_logps: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor                                # whitened
    returns: torch.Tensor
    stats: dict = field(default_factory=dict)

    def take(self, some, like):
        """What the loss measures on the rows `some` before the update, in the order of `flatten([rows[i] for i in some])`.   dict of (M,)"""
        on = self.mask[some]
        named = {name: getattr(self, name)[some][on].to(like.dtype).to(like.device)
                 for name in ("old_token_logps", "old_values", "advantages", "returns")}
        return named | {"mask": torch.ones_like(named["returns"])}


def answers(policy, prompts, tokenizer, *, max_len, seed, rank=0, size=1, combine=lambda table: table):
    """A response to each prompt (lists of tokens) at temperature 1; each rank writes its share, and all hold the same ones.   -> lists of tokens

    The random numbers are a function of (seed, row, position), so shares and their number do not matter: in float64 these are exactly what one process writes. In
    float32 sums round otherwise in another batch, and now and then a number falls between a token's old border and its new one: in 2 of 478,104 tokens
    (tests/test_ppo.py counts; bfloat16: 18 of 8,517). Whatever the dtype, every rank holds the same rows, since they are exchanged, not drawn again.
    """
    mine, table = range(rank, len(prompts), size), torch.zeros(len(prompts), max_len, dtype=torch.int64)           # a token + 1; 0: nothing
    written = policy.generate([prompts[i] for i in mine], eot=tokenizer.eot, max_new_tokens=max_len, room=max_len, seed=seed, numbers=mine)
    for i, response in zip(mine, written):
        table[i, :len(response)] = torch.tensor(response) + 1
    return [[t - 1 for t in row if t] for row in combine(table).tolist()]


@torch.no_grad()
def rollouts(policy, critic, reference, prompts, reward, tokenizer, *, max_len, seed, kl_coef=0.05, gamma=1.0, lam=0.95,
             rank=0, size=1, combine=lambda table: table):
    """A response to each prompt (lists of tokens), sampled and judged.   -> Experience of the global batch, the same on every rank

    Temperature 1 and the whole vocabulary, since log pi(y_t|s_t) below is of that distribution and no other. The random numbers are a function
    of (seed, row, position): give seed=[seed, step]. Sampling, asking for rewards and measuring are shared out: `combine` adds up the ranks'
    tables, each of them 0 outside its share.
    """
    device = next(policy.parameters()).device
    responses = answers(policy, prompts, tokenizer, max_len=max_len, seed=seed, rank=rank, size=size, combine=combine)
    rows = [make_row(p, r) for p, r in zip(prompts, responses)]
    lengths = torch.tensor([len(r) for r in responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                                                   # (B, T)
    table = torch.zeros(4, *mask.shape, dtype=torch.float64)                                    # log pi, its entropy, log ref, V
    scores, mine = torch.zeros(len(rows), dtype=torch.float64), list(range(rank, len(rows), size))
    scores[mine] = ask(reward, [rows[i] for i in mine], tokenizer)
    for part in token_batches([rows[i] for i in mine], min(m.token_budget for m in (policy, critic, reference))):
        some = mine[part.start:part.stop]
        flat = flatten([rows[i] for i in some], device)
        measured = torch.cat([policy(*flat[:5], entropy), reference(*flat[:5])[None].to(device), critic(*flat[:4])[None]])
        block = torch.zeros(4, len(some), mask.shape[1], dtype=torch.float64)
        block[:, mask[some]] = measured.cpu().double()
        table[:, some] = block
    (logps, entropies, ref_logps, values), scores = combine(table), combine(scores)
    rewards = token_rewards(scores, logps, ref_logps, mask, kl_coef=kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    k1, _, k3 = (token_mean(k, mask) * lengths.sum() / len(rows) for k in kl_estimates(logps, ref_logps))        # nats per response
    on, ended = (lambda x: x[mask]), torch.tensor([r[-1] == tokenizer.eot for r in responses])
    stats = {"reward": float(scores.mean()), "objective": float(scores.mean() - kl_coef * k1), "kl/k1": float(k1), "kl/k3": float(k3),
             "entropy": float(on(entropies).mean()), "explained_variance": explained_variance(on(values), on(returns)),
             "length": float(lengths.double().mean()), "ended": float(ended.double().mean())}
    return Experience(rows, scores, mask, logps, ref_logps, values, whiten(advantages, mask), returns, stats)


def entropy(logits, targets, rows):
    """Entropy of the next-token distribution at each position, nats: an `extra` for a policy's forward.   (m, V) -> (1, m)"""
    logps = model.wide_log_softmax(logits)
    return -(logps.exp() * logps).sum(-1)[None]


def explained_variance(values, returns):
    """1 - var(returns - values) / var(returns): 1 a perfect critic, 0 no better than a constant, None where returns do not vary."""
    spread = float(returns.var())
    return 1 - float((returns - values).var()) / spread if spread > 0 else None


# --- 5. updates: minibatches of one experience ------------------------------------------------------------------------

class ActorCritic(nn.Module):
    """Policy and critic as one module: one optimiser, one all-reduce, one gradient norm, one checkpoint; flat rows in."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.token_budget = min(policy.token_budget, critic.token_budget)

    def forward(self, ids, positions, lengths, predict, targets):
        """(token_logps, values).   (M,) each"""
        return self.policy(ids, positions, lengths, predict, targets), self.critic(ids, positions, lengths, predict)


def updates(n, *, epochs=4, minibatches=1, seed=0):
    """The minibatches of one experience: `epochs` times all n rows in a new order, cut in `minibatches` parts.   yields lists of indices

    A function of (n, seed) alone, so every rank knows them. Each is one optimiser step; from the second on, pi is not pi_old any more.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(n)
        yield from (part.tolist() for part in np.array_split(order, min(minibatches, n)))


def measure(actor_critic, experience, some, device):
    """What actor_critic_loss names, for the rows `some`: what is now and what was when they were sampled.   dict of (M,)

    Weigh the loss of a micro-batch by its share of the minibatch's tokens: the means are over tokens.
    """
    flat = flatten([experience.rows[i] for i in some], device)
    token_logps, values = actor_critic(*flat[:5])
    return {"token_logps": token_logps, "values": values, **experience.take(some, token_logps)}


@torch.no_grad()
def update_stats(measured, *, clip=0.2):
    """SUMS over the tokens of a (micro-)batch: [tokens, clipped, k3 of (pi_old || pi)]; divide the last two by the first.   (3,)

    Clipped: outside [1 - eps, 1 + eps], on the side where the slope is gone. KL(pi_old || pi) is what the early stop looks at.
    """
    d, a, on = measured["token_logps"] - measured["old_token_logps"], measured["advantages"], measured["mask"] > 0
    clipped = ((d.exp() > 1 + clip) & (a > 0)) | ((d.exp() < 1 - clip) & (a < 0))
    k3 = kl_estimates(measured["old_token_logps"], measured["token_logps"])[2]
    return torch.stack([x[on].double().sum() for x in (on, clipped, k3)]).cpu()
