"""Where rows come from, and how the result is judged: the embedded world, or the user's files.

Both have: task, tokenizer, units, counts (what happened to the rows), format, story and hint (lines
to print), shape (of the small GPT), base_stages() (its training before alignment), held_out(),
quick(policy, reference) (a few numbers, every --eval_every steps), and
report(policy, reference, seconds) (eval.json, pictures, the printed summary).
"""

import evaluate
import world
from data import encode
from model import GPTConfig
from objective import score
from plumbing import chat, formats, parallel
from plumbing.formats import Feedback, Pair, Turn, counts_line
from plumbing.huggingface import adapter_base, local_folder, read_model_config
from plumbing.reading import check_kind, reading
from plumbing.tokenizer import Tokenizer, chat_settings, load_tokenizer
from pathlib import Path


class World:
    """The embedded help desk: an annotator's pairs or thumbs, and a judge that knows the truth."""

    task = "world"
    format = "embedded world"
    hint = None

    def __init__(self, config, recipe):
        self.config = config
        self.sessions = recipe.learns_from == "sessions"
        self.tokenizer = Tokenizer(world.tokenizer())
        shape = dict(world.MODEL)
        if self.sessions:
            shape["context"] = world.SESSION["context"]
        self.shape = GPTConfig(vocab_size=self.tokenizer.vocab_size, **shape)
        config.max_len = min(config.max_len, self.shape.context)
        config.max_prompt_len = min(config.max_prompt_len, config.max_len * 3 // 4)
        give = {"pairs": self.pairs, "thumbs": self.thumbs, "prompts": self.thumbs,
                "sessions": self.segments, "replies": self.replies}
        self.units, self.counts = give[recipe.learns_from]()
        self.story = self.tell(recipe)

    def encode(self, examples, **how):
        return encode(examples, self.tokenizer, max_len=self.config.max_len,
                      max_prompt_len=self.config.max_prompt_len, **how)

    # --- its data

    def pairs(self):
        pairs = world.pairs(world.N_PAIRS, self.config.seed, flip=self.config.flip)
        return self.encode(Pair(**pair, where=f"world: pair {i}") for i, pair in enumerate(pairs))

    def thumbs(self):
        pairs = world.pairs(world.N_PAIRS, self.config.seed, flip=self.config.flip)
        thumbs = world.thumbs(pairs, self.config.seed)
        return self.encode(Feedback(t["prompt"], t["completion"], t["label"]) for t in thumbs)

    def segments(self):
        """Pairs of conversations. The rejected one has one bad reply."""
        sessions = world.sessions(world.N_PAIRS, self.config.seed)
        examples = [formats.parse(session, f"world: session {i}")[1][0]
                    for i, session in enumerate(sessions)]
        return self.encode(examples, turns="segment")

    def replies(self):
        """Replies of a good help desk, which SPIN imitates."""
        dialogues = world.dialogues(world.N_EXPERT, self.config.seed + 2, "expert")
        return self.encode(Feedback(prompt, reply, True) for prompt, reply in dialogues)

    # --- before alignment

    def base_stages(self):
        """[(what, units, settings)]: pretraining on all text, then SFT on replies good and bad."""
        stages = []
        steps_of = {"pretrain": self.config.pretrain_steps, "sft": self.config.sft_steps}
        for mix, steps in steps_of.items():
            how = {**world.BASE[mix], "steps": steps}
            if self.sessions:
                how["batch_size"] = world.SESSION["batch_size"]
            n = max(1, steps) * how["batch_size"]
            texts = self.texts(n, mix)
            units, _ = self.encode(texts, train_prompt=mix == "pretrain", turns="all")
            stages.append((mix, units, how))
        return stages

    def texts(self, n, mix):
        seed = self.config.seed + 1
        if not self.sessions:
            return [Feedback(*text, True) for text in world.dialogues(n, seed, mix)]
        talks = [[Turn(**message) for message in messages]
                 for messages in world.session_dialogues(n, seed, mix)]
        return [Feedback(tuple(talk[:1]), tuple(talk[1:]), True) for talk in talks]

    # --- after alignment

    def held_out(self):
        """Pairs on questions that no training and no choice of settings has used."""
        pairs = world.pairs(2000, self.config.seed + 3, part="report")
        return self.encode(Pair(**pair) for pair in pairs)[0]

    def judge(self, policy, reference, **how):
        return evaluate.evaluate_world(policy, reference, self.tokenizer, seed=self.config.seed,
                                       sessions=self.sessions, **how)

    def quick(self, policy, reference):
        """A few numbers on the tuning questions; the report's are only for the end."""
        found = self.judge(policy, reference, part="tune", n=192)
        return {key: found[key] for key in ("win_rate", "reward", "kl", "malformed")}

    def report(self, policy, reference, seconds):
        evaluate.report_world(self.judge, policy, reference, self.tokenizer, self.config, seconds,
                              self.sessions)

    def tell(self, recipe):
        counts = self.counts
        feedback = {
            "pairs": f"{counts['pairs']:,} pairs",
            "thumbs": f"{counts['desirable']:,} thumbs up and {counts['undesirable']:,} down",
            "sessions": f"{counts['pairs']:,} pairs of sessions",
            "replies": f"{counts['read']:,} replies of an expert",
            "prompts": "rewards for its own replies"}[recipe.learns_from]
        return ("task: a help desk learns what its customers like. The true utility of every reply "
                "is known,\n      so the result can be checked. A base model is pretrained and "
                "fine-tuned on replies good\n      and bad: the reference. Then alignment starts "
                f"from it, with {feedback}.\n      About a minute on 2 cores (PPO: three).")


class Files:
    """The user's own preference files, for a Hugging Face model or for the small GPT."""

    task = "files"

    def __init__(self, config, recipe):
        self.config = config
        self.recipe = recipe
        for folder in filter(None, (config.model, config.init, config.ref)):
            config.max_len = min(config.max_len, context_of(folder) or config.max_len)
        named = config.model
        if named and not (Path(named) / "tokenizer_config.json").is_file():
            base = adapter_base(config.model)                          # a bare adapter has none
            named = local_folder(base) if base else config.model
        self.tokenizer = load_tokenizer(named or config.tokenizer or None,
                                        trust_remote_code=config.trust_remote_code,
                                        settings=chat_settings(config))
        self.shape = GPTConfig(vocab_size=self.tokenizer.vocab_size, context=config.max_len,
                               n_layer=4, n_head=4, d_model=128)
        self.held_out_units = []
        examples, self.units, self.counts, self.format = self.read(config.data, "--data")
        self.refuse_weights()
        self.story = f"task: {' '.join(config.data)}"
        hints = chat.remarks(examples, self.tokenizer)
        hints.append(formats.cut_hint(formats.to_feedback(examples), config.add_eot) or "")
        self.hint = "\n".join(filter(None, hints))
        if config.eval_data:
            examples, self.held_out_units, *_ = self.read(config.eval_data, "--eval_data")
        self.prompts = list(dict.fromkeys(example.prompt for example in examples))[:6]

    def read(self, files, flag):
        config, recipe = self.config, self.recipe
        paired = recipe.learns_from in ("pairs", "sessions")
        threshold = config.threshold
        if recipe.learns_from == "prompts" and threshold is None:      # labels are not used
            threshold = 0.0
        scored = "pairs" if paired else "labels"
        examples, name = formats.read(
            files, flag=flag, watch=parallel.watch, scored=scored, threshold=threshold,
            columns=formats.parse_columns(config.columns), prompts=recipe.learns_from == "prompts")
        named = f"{flag} {' '.join(files)}"
        if paired and not isinstance(examples[0], Pair):
            raise SystemExit(f"{named}: --loss {config.loss} needs pairs (prompt, chosen, "
                             f"rejected); the file has {name}")
        if not paired:
            examples = formats.to_feedback(examples)
        turns = config.turns
        if recipe.learns_from == "sessions":
            turns = "segment"
        units, counts = encode(parallel.watch(examples, "tokenising"), self.tokenizer,
                               max_len=config.max_len, max_prompt_len=config.max_prompt_len,
                               add_eot=config.add_eot, turns=turns)
        if not units:
            raise SystemExit(f"{named}: no rows left ({counts_line(counts)})")
        return examples, units, counts, name

    def refuse_weights(self):
        """Refuse weights where no row has a loss of its own: PPO's prompts, a loss that sorts."""
        loss = self.recipe.loss
        own = self.recipe.learns_from != "prompts" and not hasattr(loss, "needs_whole_batch")
        for unit in self.units:
            if unit[0].weight != 1 and not own:
                raise SystemExit(f"{unit[0].where}: column weight: --loss {self.config.loss} gives "
                                 "no loss per row that a weight could multiply")

    def base_stages(self):
        """SFT on the desirable responses, from random weights."""
        rows = [row for unit in self.units for row in unit if row.desirable is not None]
        if not rows:
            raise SystemExit(f"--data {' '.join(self.config.data)}: prompts without responses, "
                             "from which no small GPT can be trained; give --model")
        good = [(row,) for row in rows if row.desirable] or [(row,) for row in rows]
        how = dict(steps=self.config.sft_steps, batch_size=self.config.batch_size, lr=1e-3,
                   warmup=20, weight_decay=0.1)
        return [("sft", good, how)]

    def held_out(self):
        return self.held_out_units

    def margins(self, policy, reference, units):
        rows = [(row,) for unit in units for row in unit if row.desirable is not None]
        if not rows:
            return {}
        labels = [row.desirable for row, in rows]
        return evaluate.margins(score(policy, rows)[:, 0], score(reference, rows)[:, 0], labels)

    def quick(self, policy, reference):
        return self.margins(policy, reference, (self.held_out_units or self.units)[:512])

    def report(self, policy, reference, seconds):
        result = {"train": self.margins(policy, reference, self.units[:128])}
        if self.held_out_units:
            result["eval"] = self.margins(policy, reference, self.held_out_units)
        evaluate.report_files(result, policy, reference, self.tokenizer, self.prompts, self.config,
                              seconds)


def context_of(folder):
    """The context length of the model in `folder`, or None."""
    found = read_model_config(folder)
    found = found.get("text_config", found)
    with reading(f"{folder}: config.json"):
        for name in ("max_position_embeddings", "n_positions"):
            if found.get(name) is not None:
                check_kind(found[name], int, name)
                return found[name]
