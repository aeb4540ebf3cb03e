"""Short opinions about things, half of them good and half bad: what the demo's model is pretrained on.

For every thing, determiner and tense there are as many good texts as bad ones.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import NamedTuple


class Topic(NamedTuple):
    """Things that share adjectives and an action."""

    determiners: tuple[str, ...]
    things: tuple[str, ...]
    good: tuple[str, ...]  # adjectives
    bad: tuple[str, ...]
    act: str  # what one would do again, or not


GOOD_OF_ANYTHING = ("good", "great", "lovely", "wonderful", "excellent", "nice")
BAD_OF_ANYTHING = ("bad", "awful", "terrible", "horrible", "poor", "disappointing")

TOPICS = (
    Topic(
        ("The", "This", "My"),
        ("soup", "bread", "pizza", "coffee", "stew", "pie", "rice", "pasta"),
        ("delicious", "warm", "fresh", "tasty"),
        ("bland", "cold", "stale", "burnt"),
        "order it",
    ),
    Topic(
        ("The", "This", "My new"),
        ("phone", "laptop", "camera", "bike", "lamp", "chair", "watch", "radio"),
        ("reliable", "sturdy", "handy", "elegant"),
        ("broken", "flimsy", "useless", "clumsy"),
        "buy it",
    ),
    Topic(
        ("The", "This", "Our"),
        ("hotel", "park", "beach", "museum", "garden", "station", "library", "village"),
        ("clean", "quiet", "charming", "friendly"),
        ("dirty", "noisy", "crowded", "gloomy"),
        "go there",
    ),
    Topic(
        ("The", "This", "That"),
        ("book", "film", "song", "story", "play", "concert", "show", "novel"),
        ("funny", "clever", "moving", "exciting"),
        ("dull", "silly", "confusing", "tedious"),
        "choose it",
    ),
)

# Verbs agree with the tense of the first sentence; only adjectives are opinion words, and none of them is
# ever negated.
TENSES = (
    {"is": "is", "like": "like", "do": "do", "think": "think"},
    {"is": "was", "like": "liked", "do": "did", "think": "thought"},
)
OPENINGS = (
    "{thing} {is} {a}.",
    "{thing} {is} {adverb} {a}.",
    "{thing} {is} {a} and {b}.",
    "{thing} {is} {adverb} {a} and {b}.",
    "{thing} {is} {a}, and I {think} it {is} {b} too.",
)
ADVERBS = ("really", "truly", "so", "quite")
GOOD_ENDINGS = (
    "",
    " I would {act} again.",
    " I {like} it very much.",
    " My friends {like} it too.",
    " It {is} worth the money.",
    " It made my day.",
    " Everything about it {is} {c}.",
)
BAD_ENDINGS = (
    "",
    " I would not {act} again.",
    " I {do} not like it at all.",
    " My friends {do} not like it either.",
    " It {is} not worth the money.",
    " It ruined my day.",
    " Everything about it {is} {c}.",
)

GOOD_WORDS = frozenset(GOOD_OF_ANYTHING).union(*(topic.good for topic in TOPICS))
BAD_WORDS = frozenset(BAD_OF_ANYTHING).union(*(topic.bad for topic in TOPICS))

DEMO_PROMPTS = [
    "The soup is",
    "My coffee was",
    "This pizza is",
    "The bread was",
    "My new phone was",
    "The laptop is",
    "This camera was",
    "My new bike is",
    "The hotel was",
    "Our garden is",
    "This beach was",
    "The museum is",
    "The film was",
    "This book is",
    "That song was",
    "The story is",
]


def opinion(text: str) -> float:
    """How well a text speaks of its thing: 1 = only good words, 0 = only bad words, 0.5 = neither or as many
    of each.
    """
    words = re.findall(r"[a-z]+", text.lower())
    good = sum(word in GOOD_WORDS for word in words)
    bad = sum(word in BAD_WORDS for word in words)
    return good / (good + bad) if good or bad else 0.5


def build_corpus(seed: int = 0, copies: int = 10) -> list[str]:
    """Short opinions in random order; `copies` good and as many bad ones for every determiner, thing and
    tense.
    """
    rng = random.Random(seed)
    texts = []
    for topic in TOPICS:
        moods = (
            (topic.good + GOOD_OF_ANYTHING, GOOD_ENDINGS),
            (topic.bad + BAD_OF_ANYTHING, BAD_ENDINGS),
        )
        settings = itertools.product(topic.determiners, topic.things, TENSES, moods)
        for determiner, thing, tense, (adjectives, endings) in settings:
            for _ in range(copies):
                a, b, c = rng.sample(adjectives, 3)
                shape = rng.choice(OPENINGS) + rng.choice(endings)
                words = {"thing": f"{determiner} {thing}", "a": a, "b": b, "c": c, "act": topic.act, **tense}
                texts.append(shape.format(adverb=rng.choice(ADVERBS), **words))
    rng.shuffle(texts)
    return texts
