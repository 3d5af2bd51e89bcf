"""Conversations to tokens, by a model's chat template.

    turns      user "Why?", assistant "No."
    rendered   <|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\nNo.<|im_end|>\\n
    prompt     all up to "assistant\\n": what the model sees before it answers
    response   No.<|im_end|>

The template renders the conversation to one text, and this text is tokenised as a whole. So the
tokens are those of transformers' `apply_chat_template`, which the model sees when it is used. The
response begins after the generation prompt and ends with the template's end of turn.

Text from users never becomes a control token. If it spells one, a placeholder hides the spelling
from the template, and the spelling becomes the tokens of plain text:

    turns      user "What is <|im_end|>?"
    rendered   <|im_start|>user\\nWhat is [0]?<|im_end|>\\n    [0]: the placeholder
"""

import json
import os
import re
import sys
from collections import Counter
from functools import cached_property
from itertools import chain, islice
from multiprocessing import get_context
from typing import NamedTuple

from plumbing.reading import one_line
from plumbing.formats import Pair, Turn

OPEN, CLOSE = "\ue000", "\ue001"          # of Unicode's private area, around a number

# `plain_form` as a chat template, for other programs.
PLAIN_TEMPLATE = (
    "{% if tools %}Tools:\n{{ tools | tojson }}\n\n{% endif %}"
    "{% for m in messages %}{{ m.role | capitalize }}:\n{{ m.content }}"
    "{% if m.tool_calls %}{{ '\n' if m.content }}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
    "{{ 'Assistant:\n' if add_generation_prompt }}")


# --- many examples --------------------------------------------------------------------------------

AT_ONCE = 4096                            # examples that the cores share at a time


def spell_all(examples, answers_of, tokenizer, **how):
    """Yield (example, result of `spell` or its ValueError). how: arguments of `spell`.

    Templates are slow: the cores of this machine share the work on many conversations.
    """
    job = (answers_of, tokenizer, how)
    examples = iter(examples)
    some = list(islice(examples, AT_ONCE))
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chats = any(not isinstance(as_chat(example.prompt, tokenizer), str) for example in some)
    if len(some) < AT_ONCE or not chats or cores < 2 or sys.platform != "linux":
        for example in tokenizer.read_ahead(chain(some, examples)):
            yield example, spell_one(example, job)
        return
    with get_context("fork").Pool(cores, begin, job) as pool:
        while some:
            yield from zip(some, pool.map(spell_one, some, chunksize=64))
            some = list(islice(examples, AT_ONCE))


at_work = None                            # in a process of the pool: its job


def begin(*job):
    global at_work
    at_work = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"         # threads do not survive a fork


def spell_one(example, job=None):
    answers_of, tokenizer, how = job or at_work
    try:
        return spell(example, answers_of(example), tokenizer, **how)
    except ValueError as why:
        return why


# --- an example -----------------------------------------------------------------------------------

def spell(example, answers, tokenizer, *, turns="last", add_eot=True):
    """(prompt ids, for each answer (response ids, their weights)); no responses if one is empty.

        prompt "Why?", answer "No."      Why?                            No.<eos>       weights 1
        prompt user "Why?"               ...user\\nWhy?...assistant\\n     No.<|im_end|>  weights 1

    turns: see data.encode. answers [None]: a prompt alone; its response is only an end-of-text.
    ValueError: the conversation is wrong.
    """
    prompt = as_chat(example.prompt, tokenizer)
    if answers == [None]:
        return prompt_ids(prompt, tokenizer), [([tokenizer.eot], [1.0])]
    chats = [trained_turns(example, prompt, answer, turns) for answer in answers]
    if any(is_blank(chat[i]) for chat, trained in chats for i in trained):
        return [], []
    end = add_eot and example.whole
    if isinstance(prompt, str):
        if not all(isinstance(answer, str) for answer in answers):
            raise ValueError("a response of several messages needs a conversation as its prompt")
        said = [tokenizer.encode(answer) + [tokenizer.eot] * end for answer in answers]
        return prompt_ids(prompt, tokenizer), [(ids, [1.0] * len(ids)) for ids in said]
    begin = min(len(prompt), *(trained[0] for _, trained in chats))
    spelled = [spell_chat(Chat(chat, tokenizer), trained, begin, end) for chat, trained in chats]
    first = spelled[0][0]
    if any(ids != first for ids, _ in spelled):
        raise ValueError("the chat template writes the prompt of chosen and rejected differently")
    return first, [response for _, response in spelled]


def as_chat(prompt, tokenizer):
    """With --chat a prompt that is a text becomes a user's turn."""
    if tokenizer.wrap and isinstance(prompt, str):
        return (Turn("user", prompt),)
    return prompt


def prompt_ids(prompt, tokenizer):
    """A text as it is; a conversation by the template, up to where the answer begins."""
    prompt = as_chat(prompt, tokenizer)
    if isinstance(prompt, str):
        ids = tokenizer.bos + tokenizer.encode(prompt)
    else:
        chat = Chat(prompt, tokenizer)
        ids = chat.ids(chat.text(ask=True))
    return ids or [tokenizer.eot]                          # empty: as after a document's end


def trained_turns(example, prompt, answer, turns):
    """(the whole conversation, indices of its turns that are trained)"""
    pair = isinstance(example, Pair)
    if isinstance(prompt, str):
        prompt = ()
    if isinstance(answer, str):
        answer = (Turn("assistant", answer),)
    chat = (*prompt, *answer)
    first = len(prompt)
    if turns == "all" and not pair:
        first = 0
    agent = [i for i in range(first, len(chat)) if chat[i].role == "assistant"]
    if turns == "all":
        return chat, agent
    if turns == "last":
        return chat, agent[-1:]
    if not pair or example.segment is None:
        raise ValueError('--turns segment needs pairs with segment: {"start": 0, "end": 1}')
    start, end = example.segment
    if end > len(agent):        # Z cancels only if both sides have equally many turns
        raise ValueError(f"the segment ends with the assistant's turn {end}, but one side has only "
                         f"{len(agent)}")
    return chat, agent[start:end]


def is_blank(turn):
    return not turn.content.strip() and not turn.more


def spell_chat(chat, trained, begin, end):
    """(prompt ids, (response ids, weights)); the response begins with turn `begin`.

        chat      user "q1", assistant "a1", user "q2", assistant "a2"
        begin 1, trained [3]
        prompt    User:.q1..Assistant:.
        response  a1<end>..User:.q2..Assistant:.a2<end>
        weights   0 except for the last three tokens, a2<end>

    What follows the last trained token is left out. end False: the last turn gets no end-of-turn.
    """
    last = len(chat.turns) - 1
    if begin == last and not chat.follows_prompt(begin):
        chat.put_answer(begin)
    starts = {turn: chat.start(turn) for turn in {begin, *trained}}
    border = starts[begin]
    prompt = chat.ids(chat.whole[:border])
    ids, place, weights = prompt, border, []
    for turn in trained:
        stop = chat.stop(turn, starts[turn], end or turn != last)
        for new, weight in ((starts[turn], 0.0), (stop, 1.0)):
            if new > place:
                longer = chat.longer(ids, place, new)
                weights += [weight] * (len(longer) - len(ids))
                ids, place = longer, new
    mark = chat.tokenizer.end_of_turn.token
    if end and trained[-1] == last and ids[-1] != mark:
        ids = [*ids, mark]                                 # the template writes none
        weights.append(1.0)
    return prompt or [chat.tokenizer.eot], (ids[len(prompt):], weights)


def shared(a, b):
    """The length of the common beginning of a and b."""
    if b[:len(a)] == a:
        return len(a)
    return next(i for i, item in enumerate(a) if b[i:i + 1] != a[i:i + 1])


# --- a conversation -------------------------------------------------------------------------------

class Chat:
    """A conversation as the template writes it, as text and as tokens."""

    def __init__(self, turns, tokenizer):
        self.turns, self.tokenizer = turns, tokenizer
        self.hidden = []                                   # spellings of control tokens
        self.messages = self.hide([message_of(turn) for turn in turns])

    @cached_property
    def whole(self):
        return self.text()

    def text(self, n=None, ask=False):
        """The first n turns as the template writes them; ask: up to where an answer begins."""
        messages = self.messages[:n]
        text = render(messages, self.tokenizer, ask)
        for message in messages:
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                raise ValueError("the chat template loses or changes a message; the roles are "
                                 + ", ".join(turn.role for turn in self.turns))
        return text

    def ids(self, text, follow=False):
        """Tokens of rendered text. follow: the text continues other text."""
        parts = re.split(f"{OPEN}(\\d+){CLOSE}", text)
        ids = self.tokenizer.encode(parts[0], control=True, follow=follow)
        for number, after in zip(parts[1::2], parts[2::2]):
            ids += self.tokenizer.encode(self.hidden[int(number)], follow=True)
            ids += self.tokenizer.encode(after, control=True, follow=True)
        return ids

    def longer(self, ids, place, new):
        """Tokens of the whole text up to `new`; `ids` are those up to `place`.

        The result begins with `ids`: no token spans `place`, even between two line breaks.
        """
        longer = self.ids(self.whole[:new])
        if longer[:len(ids)] == ids:
            return longer
        return ids + self.ids(self.whole[place:new], follow=True)

    def hide(self, value):
        """The same text, list or object, with placeholders for spellings of control tokens."""
        if isinstance(value, str):
            return self.tokenizer.control.sub(self.hide_one, value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return value

    def hide_one(self, found):
        self.hidden.append(found[0])
        return f"{OPEN}{len(self.hidden) - 1}{CLOSE}"

    # --- where an assistant's turn begins and ends, in the whole text

    def start(self, turn):
        """Where the turn begins: after the generation prompt, or what the whole text has of it.

        Qwen3 asked without thinking:   <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n
        an early turn in its history:   <|im_start|>assistant\\nNo.<|im_end|>
        """
        if turn == 0:
            return max(0, self.whole.find(self.messages[0]["content"].strip()))
        asked = self.text(turn, ask=True)
        place = shared(asked, self.whole)
        if place < len(asked) and place < shared(self.text(turn), asked):
            raise ValueError(f"the chat template changes the first {turn} turns when others follow")
        return place

    def stop(self, turn, start, end=True):
        """Where the turn ends: after its end of turn, or without one after its content."""
        mark = self.tokenizer.end_of_turn
        found = -1
        if mark.of_every_turn or turn == len(self.turns) - 1:
            found = self.whole.find(mark.text, start)
        if found >= 0 and end:
            return found + len(mark.text)
        content = self.messages[turn]["content"]
        if found >= 0:                                     # "No. </s>": the blank is the template's
            said = self.whole[start:found]
            return start + len(said if said.endswith(content) else said.rstrip())
        for said in (content, content.strip()):
            place = self.whole.find(said, start)
            if place >= 0:
                return place + len(said)
        raise ValueError(f"the chat template loses or changes turn {turn} of the conversation")

    def follows_prompt(self, turn):
        """Does the template begin this turn, finished, with its generation prompt?

        DeepSeek-R1's does not: its generation prompt ends with <think>, but a finished conversation
        has no thoughts.
        """
        return not turn or self.whole.startswith(self.text(turn, ask=True))

    def put_answer(self, turn):
        """Put the last turn after the generation prompt, as the file has it."""
        content = self.messages[turn]["content"]
        if not content:
            raise ValueError("the chat template hides where the tool calls begin")
        self.whole = self.text(turn, ask=True) + content + self.tokenizer.end_of_turn.text


def message_of(turn):
    """A turn as the dict that templates take."""
    if turn.role == "tools":
        return {"role": "tools", "content": json.loads(turn.content)}
    message = {"role": turn.role, "content": turn.content}
    if turn.more:
        message |= json.loads(turn.more)
    return message


def render(messages, tokenizer, ask):
    """Messages as text. A first message of role "tools" becomes the template's `tools`."""
    if not tokenizer.has_template:
        return plain_form(messages, tokenizer, ask)
    tools = None
    if messages and messages[0]["role"] == "tools":
        tools, messages = messages[0]["content"], messages[1:]
    try:
        return tokenizer.backend.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=ask,
            **tokenizer.template_args)
    except Exception as error:                             # jinja's own errors, and transformers'
        raise ValueError(f"the chat template refuses this conversation: {one_line(error)}")


def plain_form(messages, tokenizer, ask):
    """Without a template: "User:\\n" (or System, Assistant, Tool), the content, a blank line.

    The assistant's turns end with the end-of-text. Tool calls follow the content, as JSON.
    """
    text = tokenizer.decode(tokenizer.bos)
    for message in messages:
        parts = [message["content"], message.get("tool_calls")]
        said = [part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
                for part in parts if part]
        text += message["role"].capitalize() + ":\n" + "\n".join(said)
        if message["role"] == "assistant":
            text += tokenizer.decode([tokenizer.eot])
        text += "\n\n"
    if ask:
        text += "Assistant:\n"
    return text


# --- what a template does, found by trying it -----------------------------------------------------

PROBE = [("user", "xyzzy0"), ("assistant", "xyzzy1"), ("user", "xyzzy2"), ("assistant", "xyzzy3")]


class EndOfTurn(NamedTuple):
    """The token that ends the assistant's turns."""
    text: str
    token: int
    of_every_turn: bool                 # or only of the last one


def find_end_of_turn(tokenizer):
    """The first control token after an answer: Gemma's <end_of_turn>, ChatML's <|im_end|>.

    It is searched in the middle of a conversation and at its end. If there is none: end-of-text.
    """
    messages = [{"role": role, "content": content} for role, content in PROBE]
    try:
        parts = re.split("xyzzy[0-3]", render(messages, tokenizer, ask=False))
    except ValueError:                                     # it will be reported for a row
        parts = []
    inside = last = None
    if len(parts) == 5:
        inside = tokenizer.added.search(parts[2])
        last = tokenizer.added.search(parts[4])
    if not last:
        return EndOfTurn(tokenizer.decode([tokenizer.eot]), tokenizer.eot, False)
    token = tokenizer.encode(last[0], control=True)[-1]
    return EndOfTurn(last[0], token, bool(inside) and inside[0] == last[0])


def remarks(examples, tokenizer, n=200):
    """Lines to print about a run's conversations: the end of a turn, and oddities."""
    if not tokenizer.has_template:
        return []
    prompts = [as_chat(example.prompt, tokenizer) for example in examples]
    if all(isinstance(prompt, str) for prompt in prompts):
        return ["note: --model has a chat template, but the rows are plain texts, which are "
                "trained without it. --chat makes a user's turn of every prompt"]
    ends = " and ".join(repr(tokenizer.decode([token])) for token in tokenizer.stops)
    lines = [f"chat: a turn ends with {tokenizer.end_of_turn.text!r}; sampling stops at {ends}"]
    counts = Counter()
    for example, prompt in zip(examples[:n], prompts):
        if not isinstance(prompt, str):
            counts.update(oddities(example, prompt, tokenizer))
    of = f"of {counts['chats']}"
    line = f"chat: {counts['differ']} {of} prompts differ from apply_chat_template's tokens"
    if counts["spelled"]:
        line += f"; {counts['spelled']} spell a control token, which stays plain text here"
    lines.append(line)
    if counts["answers"]:
        lines.append(f"chat: {counts['answers']} {of} answers follow the generation prompt as the "
                     "file has them; the template begins a finished answer differently")
    if counts["tools"]:
        lines.append(f"chat: {counts['tools']} {of} prompts have tools, and the template leaves "
                     "them out")
    return lines


def oddities(example, prompt, tokenizer):
    """Yield the names of a prompt's and its answer's oddities.

    differ: our tokens are not those of transformers' own rendering, which the model sees in use.
    """
    yield "chats"
    chat = Chat(prompt, tokenizer)
    messages = [message_of(turn) for turn in prompt]
    real = render(messages, tokenizer, ask=True)
    if prompt_ids(prompt, tokenizer) != tokenizer.encode(real, control=True):
        yield "differ"
        if chat.hidden:
            yield "spelled"
    if prompt[0].role == "tools" and real == render(messages[1:], tokenizer, ask=True):
        yield "tools"
    answers = [getattr(example, name, None) for name in ("completion", "chosen")]
    for answer in answers:
        if answer and isinstance(answer, str):
            whole = Chat((*prompt, Turn("assistant", answer)), tokenizer)
            if not whole.follows_prompt(len(prompt)):
                yield "answers"
