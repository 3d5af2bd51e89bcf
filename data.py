"""From examples to tokens: rows with a mask, units, and flat batches.

    {"prompt": "Why?", "completion": "No.", "label": true}    a line of a file

    read       -> Feedback("Why?", "No.", True)               plumbing/formats.py
    encode     -> (row,)      ids   W h y ? N o . <end>       one token per byte, here
                              mask  0 0 0 0 1 1 1 1
    mismatched -> (row, y')   ids   W h y ? F a n s . <end>   the response of another prompt's row
    flatten    -> Flat        all rows of a part end to end, on the device, without padding

A row is one sequence, prompt and response. Its mask says which tokens count: 1 on the tokens of the
response, or only on the assistant's turns that --turns selects. Prompt and response are encoded
separately and joined, so no token spans both (plumbing/chat.py, for texts and conversations).
A unit is the rows of one example of a loss: (y,), (y, y') or (chosen, rejected[, target]).

`python data.py FILE` shows the first batch of FILE in colour; without FILE, of a made-up one.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from plumbing import chat
from plumbing.formats import Feedback, final_text


# --- rows -----------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: prompt ++ response. Its arrays are read-only, because rows share them."""
    prompt: np.ndarray                  # (P,) token ids, 16 bits each where that is enough
    response: np.ndarray                # (T - P,) the same
    mask: np.ndarray                    # (T,) float32, > 0 on the tokens that count
    desirable: bool | None = True       # None: a prompt alone
    where: str = ""                     # file and row, for messages
    score: float | None = None          # of the response, where a pair has scores
    win_prob: float | None = None
    weight: float = 1.0                 # of its example's loss

    @property
    def ids(self):
        """(T,) token ids"""
        return np.concatenate((self.prompt, self.response))

    @property
    def n_prompt(self):
        return len(self.prompt)

    @property
    def prompt_key(self):
        """The prompt's tokens as bytes: two prompts cut to the same tokens are the same."""
        return self.prompt.astype(np.int32).tobytes()

    @property
    def length(self):
        """Number of tokens that count."""
        return int(np.count_nonzero(self.mask > 0))


def make_row(prompt, response, *, desirable=True, where="", train_prompt=False, score=None,
             win_prob=None, weight=1.0, trained=None):
    """A row from token ids. trained: a weight for each token of the response, 1 if None."""
    prompt, response = frozen(prompt), frozen(response)
    n = len(prompt)
    mask = response_mask(n, len(response))
    if train_prompt or not n or not (trained is None or np.all(np.equal(trained, 1))):
        mask = mask.copy()
        mask[:n] = train_prompt
        if trained is not None:
            mask[n:] = trained
        mask[:1] = 0                    # nothing predicts the very first token
        mask.setflags(write=False)
    return Row(prompt, response, mask, desirable, where, score, win_prob, weight)


def frozen(ids):
    """Token ids as a read-only array; an array that is read-only already is not copied.

    A million rows should fit into memory: ids below 65,536 take 2 bytes each, others 4.
    """
    if isinstance(ids, np.ndarray) and not ids.flags.writeable:
        return ids
    ids = np.array(ids, dtype=np.int32)
    if ids.max(initial=0) < 2**16:
        ids = ids.astype(np.uint16)
    ids.setflags(write=False)
    return ids


def response_mask(n_prompt, n_response):
    """0 0 0 1 1 1 1, a view into one long array: nearly all rows have such a mask."""
    size = 1 << max(n_prompt, n_response).bit_length()
    return zeros_then_ones(size)[size - n_prompt:size + n_response]


@lru_cache
def zeros_then_ones(size):
    mask = np.repeat(np.float32([0, 1]), size)
    mask.setflags(write=False)
    return mask


# --- examples to units ----------------------------------------------------------------------------

TURNS = ("last", "all", "segment")


def encode(examples, tokenizer, *, max_len=1024, max_prompt_len=512, add_eot=True,
           train_prompt=False, turns="last"):
    """(units, Counter): feedback becomes (row,), a pair becomes (chosen, rejected[, target]).

    turns says which of the assistant's turns are trained, each with its end-of-text:
        prompt     user "q1", assistant "a1", user "q2"
        response   assistant "a2", user "q3", assistant "a3"
        "last"     a3
        "all"      of a pair a2, a3; of feedback a1, a2, a3, and the row's prompt ends before a1
        "segment"  what Pair.segment names, in both sides: (0, 1) is a2
                   (segment SDPO, Kong et al. 2025, arXiv 2501.01821)
    Other turns are context, mask 0. What follows the last trained token is left out.

    A long prompt loses its LEFT end (the question is at the right), a long response its RIGHT end.
    A response that was cut, here or when it was sampled, gets no end-of-text.
    Three kinds are dropped and counted: empty responses, rows whose trained tokens were all cut
    away, and pairs whose sides are the same. Duplicates are kept and counted.
    """
    check(max_len, max_prompt_len, turns)
    units = []
    counts = Counter(read=0, desirable=0, undesirable=0)
    for example, spelled in chat.spell_all(examples, answers_of, tokenizer, turns=turns,
                                           add_eot=add_eot):
        counts["read"] += 1
        if isinstance(spelled, ValueError):
            raise SystemExit(f"{example.where}: {spelled}")
        prompt, responses = spelled
        if not responses:
            counts["dropped: empty response"] += 1
            continue
        room = min(max_prompt_len, max_len - 1)
        counts["prompt cut from the left"] += len(prompt) > room
        prompt = frozen(cut_left(prompt, room, tokenizer.bos))    # one for all sides
        room = max_len - len(prompt)
        unit = []
        for side, (ids, weights) in zip(sides_of(example), responses):
            counts["response cut from the right"] += len(ids) > room
            unit.append(make_row(prompt, ids[:room], trained=weights[:room], where=example.where,
                                 train_prompt=train_prompt, desirable=side.desirable,
                                 score=side.score, win_prob=side.win_prob,
                                 weight=example.weight))
        if not all(row.mask.any() for row in unit):
            counts["dropped: nothing left to train"] += 1
        elif len(unit) > 1 and np.array_equal(unit[0].response, unit[1].response):
            counts["dropped: chosen is rejected"] += 1
        else:
            units.append(tuple(unit))
    count(units, counts)
    return units, +counts


def check(max_len, max_prompt_len, turns):
    if max_len < 2 or max_prompt_len < 1:
        raise ValueError(f"max_len {max_len}, max_prompt_len {max_prompt_len}: a row needs a "
                         "prompt token and a response token")
    if turns not in TURNS:
        raise ValueError(f"turns is {turns!r}; valid are {', '.join(TURNS)}")


class Side(NamedTuple):
    """A response of an example, with its label, score and win probability."""
    answer: str | tuple | None          # None: a prompt alone
    desirable: bool | None
    score: float | None = None
    win_prob: float | None = None


def sides_of(example):
    if isinstance(example, Feedback):
        if example.desirable is None:
            return [Side(None, None)]
        return [Side(example.completion, example.desirable, example.score)]
    sides = [Side(example.chosen, True, example.score_chosen, example.win_prob_chosen),
             Side(example.rejected, False, example.score_rejected, example.win_prob_rejected)]
    if example.target and final_text(example.target).strip():
        sides.append(Side(example.target, True))
    return sides


def answers_of(example):
    return [side.answer for side in sides_of(example)]


def cut_left(ids, room, bos):
    """The last `room` tokens; `bos`, where the prompt starts with it, stays in front."""
    if len(ids) <= room:
        return ids
    kept = bos if ids[:len(bos)] == bos else []
    return kept + ids[len(ids) - room + len(kept):]


def count(units, counts):
    """Count labels, duplicates and prompts, after the cut; texts are compared by their hashes."""
    texts = {True: set(), False: set(), None: set()}      # of each label
    prompts = {True: set(), False: set(), None: set()}
    names = {True: "desirable", False: "undesirable", None: "prompts alone"}
    for unit in units:
        prompt, label = unit[0].prompt_key, unit[0].desirable
        name = "pairs"
        if len(unit) == 1:
            name = names[label]
        counts[name] += 1
        text = hash((prompt, *(row.response.tobytes() for row in unit[:2])))
        counts["duplicates (kept)"] += text in texts[label]
        texts[label].add(text)
        prompts[label].add(hash(prompt))
    counts["same text with both labels"] = len(texts[True] & texts[False])
    counts["prompts"] = len(set.union(*prompts.values()))
    counts["prompts with both labels"] = len(prompts[True] & prompts[False])


# --- other units from units -----------------------------------------------------------------------

def length_desensitised(unit, alpha):
    """LD-DPO: mask 1 on the first min(n_w, n_l) trained tokens of both, alpha on the rest."""
    shared = min(row.length for row in unit)
    rows = []
    for row in unit:
        mask = row.mask.copy()
        mask[np.flatnonzero(mask)[shared:]] *= alpha
        mask.setflags(write=False)
        rows.append(replace(row, mask=mask))
    return tuple(rows)


def mismatched(row, partner, max_len):
    """(x, y'): this row's prompt with another row's response, cut to max_len tokens in all.

    y' begins at the partner's first trained token: the turns before it are another conversation.
    """
    trained = partner.mask[partner.n_prompt:]
    start = int(np.flatnonzero(trained)[0])
    stop = start + max_len - row.n_prompt
    return make_row(row.prompt, partner.response[start:stop], trained=trained[start:stop],
                    desirable=row.desirable, where=partner.where)


def mismatched_units(units, *, seed, max_len):
    """(y,) -> (y, y'): y' is the response of a row with another prompt, drawn once per run.

    KTO measures its reference point z0 on y'. ValueError where all prompts are the same.
    """
    rows = [unit[0] for unit in units]
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows)).tolist()
    places = mismatch([hash(rows[i].prompt_key) for i in order])
    partner = {i: rows[order[place]] for i, place in zip(order, places)}
    return [(*unit, mismatched(unit[0], partner[i], max_len)) for i, unit in enumerate(units)]


def mismatch(prompts):
    """For each row i the index j of a row with ANOTHER prompt: y_j is then no answer to x_i.

        prompts   a a b c       the largest group, a, has m = 2 rows
        partners  2 3 0 1       the rows, sorted by group, shifted by m places

    No group is longer than m, so no row gets a partner of its own group. It is a permutation if
    2 m <= n. If one prompt has more than half of the n rows, the others take turns as its partners.
    ValueError if all prompts are the same.
    """
    groups = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    if len(groups) < 2:
        raise ValueError(f"mismatched pairs need two distinct prompts, got {len(groups)} in "
                         f"{len(prompts)} rows")
    largest, *others = sorted(groups.values(), key=len, reverse=True)
    ordered = largest + [row for group in others for row in group]
    n, m = len(ordered), len(largest)
    partners = [0] * n
    for place, row in enumerate(ordered):
        turned = (place + m) % n
        if place < m:                                    # from the largest group to the others
            turned = m + place % (n - m)
        partners[row] = ordered[turned]
    return partners


def lambda_weights(n_desirable, n_undesirable, *, ratio=4 / 3):
    """(lambda_d, lambda_u) with lambda_d n_d / (lambda_u n_u) = ratio; the smaller one is 1.

    KTO, Eq. 9: the ratio should lie in [1, 3/2] (version 4; the first version and TRL: up to 4/3),
    so that a rare class has enough weight. A count of 0 gives (1.0, 1.0).
    """
    if not 1 <= ratio <= 1.5:
        raise ValueError(f"ratio is {ratio}; KTO's Eq. 9 asks for 1 <= ratio <= 3/2")
    if n_desirable == 0 or n_undesirable == 0:
        return 1.0, 1.0
    lambda_d = ratio * n_undesirable / n_desirable        # with lambda_u = 1
    if lambda_d >= 1:
        return lambda_d, 1.0
    return 1.0, 1 / lambda_d


# --- the order of the data ------------------------------------------------------------------------

@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """The order of n rows in an epoch; the same on every process and in a resumed run."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)                           # it is cached, so it is shared
    return order


def steps_per_epoch(n, batch_size):
    return -(-n // batch_size)                            # rounded up: the last batch may be short


def batch_rows(n, batch_size, *, seed, step):
    """The indices of the global batch of a step. Every row comes once per epoch."""
    epoch, place = divmod(step, steps_per_epoch(n, batch_size))
    order = epoch_order(n, seed, epoch)
    return order[place * batch_size:(place + 1) * batch_size].tolist()


def token_batches(items, budget):
    """Consecutive ranges of rows or units, of at most `budget` tokens but at least one item."""
    start, tokens = 0, 0
    for index, item in enumerate(items):
        rows = [item] if isinstance(item, Row) else item
        size = sum(len(row.mask) for row in rows)
        if index > start and tokens + size > budget:
            yield range(start, index)
            start, tokens = index, 0
        tokens += size
    if len(items):
        yield range(start, len(items))


# --- rows to one flat row -------------------------------------------------------------------------

class Flat(NamedTuple):
    """Sequences end to end, on the device. The first five fields are the input of a policy's
    forward; `sums` adds its output up per sequence. N tokens, M of them count, B sequences.

        two rows       W h y ? N o <end>  W h o ? I <end>      response in the mask
        positions      0 1 2 3 4 5 6      0 1 2 3 4 5
        predict        ? N o              ? I                  M = 5: where to read the logits
        targets        N o <end>          I <end>
        sequence       0 0 0              1 1
    """
    ids: torch.Tensor                   # (N,)
    positions: torch.Tensor             # (N,)
    lengths: list                       # (B,) ints; shared prompts: a tuple (p, n_1, n_2, ...)
    predict: torch.Tensor               # (M,) index of the token before each token that counts
    targets: torch.Tensor               # (M,)
    mask: torch.Tensor                  # (M,) the target's weight
    sequence: torch.Tensor              # (M,) the target's sequence, 0 to B - 1
    rows: int                           # B

    def sums(self, logps):
        """sum_t mask_t log pi(y_t | x, y_<t) of each sequence, added up in float64.  (M,) -> (B,)

        In float32 a sum over 400 tokens would be off by up to 8e-5, as large as a log-ratio.
        """
        wide = torch.float64
        if logps.device.type == "mps":
            wide = torch.float32
        weighted = logps.to(wide) * self.mask.to(wide)
        return weighted.new_zeros(self.rows).index_add(0, self.sequence, weighted)


def flatten(rows, device="cpu", share=False):
    """Rows end to end.

    share: consecutive rows with the same prompt become [x][y_1][y_2]. The prompt is computed only
    once, and its last token predicts the first token of y_2.
    """
    skipped, starts = [], []
    end = 0
    prompt_ends = {}                    # start of a response without its own prompt -> prompt's end
    for index, row in enumerate(rows):
        if share and index and may_share(rows[index - 1], row):
            skipped.append(row.n_prompt)
            prompt_ends[end] = prompt_end
        else:
            skipped.append(0)
            prompt_end = end + row.n_prompt - 1
        starts.append(end)
        end += len(row.mask) - skipped[-1]
    sizes = [len(row.mask) - skip for row, skip in zip(rows, skipped)]

    pieces = []
    for row, skip in zip(rows, skipped):
        pieces += [row.response] if skip else [row.prompt, row.response]
    ids = np.concatenate(pieces).astype(np.int64)
    mask = np.concatenate([row.mask[skip:] for row, skip in zip(rows, skipped)])
    sequence = np.repeat(np.arange(len(rows)), sizes)
    positions = np.arange(end) - np.repeat(np.subtract(starts, skipped), sizes)
    before = np.arange(-1, end - 1)     # the token that predicts each token: the one to its left
    for start, prompt_end in prompt_ends.items():
        before[start] = prompt_end
    trained = np.flatnonzero(mask)

    def tensor(array):
        return torch.from_numpy(array).to(device)

    return Flat(tensor(ids), tensor(positions), lengths_of(sizes, skipped),
                tensor(before[trained]), tensor(ids[trained]), tensor(mask[trained]),
                tensor(sequence[trained]), len(rows))


def lengths_of(sizes, skipped):
    """A length per sequence, but one (p, n_1, n_2, ...) for those that share a prompt of p."""
    lengths = []
    for size, skip in zip(sizes, skipped):
        if not skip:
            lengths.append(size)
        elif isinstance(lengths[-1], tuple):
            lengths[-1] += (size,)
        else:
            lengths[-1] = (skip, lengths[-1] - skip, size)
    return lengths


def may_share(first, row):
    """True if `row` has the prompt of `first`, and the prompt is not trained."""
    p = row.n_prompt
    if not 0 < p < len(row.mask) or row.mask[:p].any():
        return False
    return np.array_equal(row.prompt, first.prompt)


if __name__ == "__main__":
    from plumbing import show
    if sys.argv[1:]:
        show.main(sys.argv[1:])
    else:
        show.made_up_file()
