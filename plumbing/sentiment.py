"""Two judges of a text's sentiment: VADER's lexicon, and a classifier fitted to people's ratings.

Both come from one source distribution, vaderSentiment 3.3.2 (MIT): the lexicon, and 23,703 texts
from tweets, film reviews, product reviews and a newspaper, each rated by about twenty people from
-4, extremely negative, to 4, extremely positive (Hutto and Gilbert 2014, VADER, ICWSM).
"""

import html
import importlib.util
import re
import zlib

import numpy as np
import torch

from plumbing import parallel

SOURCES = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")


def rated_texts(folder):
    """{source: [(text, mean rating from -4 to 4), ...]}"""
    found = {}
    for source in SOURCES:
        file = folder / "hutto_ICWSM_2014" / f"{source}_GroundTruth.txt"
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        cells = [line.split("\t") for line in lines]
        found[source] = [(html.unescape(text), float(rating)) for _, rating, text in cells]
    return found


class Lexicon:
    """VADER's compound score of a text, -1 to 1: its words' valences, negation and emphasis."""

    def __init__(self, folder):
        file = next(folder.glob("*/vaderSentiment/vaderSentiment.py"))
        spec = importlib.util.spec_from_file_location("vaderSentiment", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.analyzer = module.SentimentIntensityAnalyzer()

    def __call__(self, texts):
        return [self.analyzer.polarity_scores(text)["compound"] for text in texts]


class Reader:
    """log-odds that people would call a text positive: logistic regression on its words.

    It counts words and pairs of neighbouring words. A hash gives each one of 2^18 weights; words
    with the same hash share one. `fit`: AdamW, 4 passes over the texts.
    """

    def __init__(self, places=2**18):
        self.weights = torch.nn.EmbeddingBag(places, 1, mode="mean")
        torch.nn.init.zeros_(self.weights.weight)

    def __call__(self, texts):
        with torch.no_grad():
            return self.logits(texts).tolist()

    def logits(self, texts):
        bags = [self.features(text) for text in texts]
        starts = np.cumsum([0, *(len(bag) for bag in bags[:-1])])
        return self.weights(torch.cat(bags), torch.as_tensor(starts))[:, 0]

    def features(self, text):
        words = re.findall(r"[a-z']+|[!?]", text.lower())
        pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
        places = [zlib.crc32(word.encode()) % self.weights.num_embeddings
                  for word in ["", *words, *pairs]]                  # "": the constant
        return torch.tensor(places)

    def fit(self, texts, positive, *, seed=0, passes=4, batch=256):
        optimizer = torch.optim.AdamW(self.weights.parameters(), lr=0.3, weight_decay=0.01)
        rng = np.random.default_rng(seed)
        with parallel.bar(passes, "the second judge reads") as bar:
            for _ in range(passes):
                order = rng.permutation(len(texts))
                for part in np.array_split(order, -(-len(texts) // batch)):
                    logits = self.logits([texts[i] for i in part])
                    target = torch.tensor([float(positive[i]) for i in part])
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                bar.update()
        return self


def fit_reader(texts, lexicon, seed=0):
    """(the second judge, how often either judge agrees with people on texts it was not fitted to).

    The question is only whether a text is positive or negative; texts that people rate within 0.5
    of neutral are left out.
    """
    clear = [pair for group in texts.values() for pair in group if abs(pair[1]) > 0.5]
    order = np.random.default_rng(seed).permutation(len(clear))
    held_out, fitted = order[:len(clear) // 5], order[len(clear) // 5:]
    said = [text for text, _ in clear]
    positive = np.array([rating > 0 for _, rating in clear])
    reader = Reader().fit([said[i] for i in fitted], positive[fitted], seed=seed)
    agrees = {"texts": len(held_out), "positive": float(positive[held_out].mean())}
    for name, judge in (("lexicon", lexicon), ("reader", reader)):
        scores = np.array(judge([said[i] for i in held_out]))
        agrees[name] = float(((scores > 0) == positive[held_out]).mean())
    return reader, agrees
