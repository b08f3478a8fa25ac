"""RULER's tasks of counting: the common words of a list (cwe), the frequent words of a coded text (fwe)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from kvfactory.benchmarks.ruler_tasks import Sample, Task, filling, words


class CommonWords(Task):
    """A list in which ten words stand more often than the others; a solved example goes before.

    The size is the number of different words. There are 8,166 of them, which is more than fit 128k tokens.
    """

    common = 10
    template = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n{context}\n"
        "Question: What are the 10 most common words in the above list?"
    )
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    short = 4096
    """Tokens below which everything is repeated less."""

    def draw(self, place: str, number: int, length: int) -> Sample:
        common = random.Random(place).sample(words("noun", "adjective", "verb"), self.common)
        often, seldom = (6, 1) if length < self.short else (30, 3)
        example_size, example_often, example_seldom = (20, 3, 1) if length < self.short else (40, 10, 3)

        def text(size: int) -> str:
            rng = filling(place)
            solved = rng.sample(words("noun", "adjective", "verb"), example_size)
            example = self._text(solved[: self.common], example_often, solved[self.common :], example_seldom, rng)
            pool = [word for word in words("noun", "adjective", "verb") if word not in common]
            rng.shuffle(pool)
            task = self._text(common, often, pool[: size - self.common], seldom, rng)
            return f"{example}{self.prefix} {_numbered(solved[: self.common])}\n{task}"

        most = len(words("noun", "adjective", "verb"))
        return Sample(common, self.prefix, text, least=2 * self.common, most=most)

    def _text(self, common: Sequence[str], often: int, others: Sequence[str], seldom: int, rng: random.Random) -> str:
        listed = [*common] * often + [*others] * seldom
        rng.shuffle(listed)
        return self.template.format(context=_numbered(listed))


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))


class FrequentWords(Task):
    """Words of six random letters, the n-th as often as 1/n² says; the first is noise, the next three are asked for.

    The size is the number of words, of which less than one for each rank is lost in rounding down.
    """

    alpha = 2.0
    zeta = math.pi**2 / 6  # the sum over all ranks of rank ** -alpha
    asked = 3
    noise = "..."
    template = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. {context}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    least = 53
    """From here on the last word that is asked for stands more often than the next one."""

    def draw(self, place: str, number: int, length: int) -> Sample:
        vocabulary = dict.fromkeys([self.noise])
        rng = random.Random(place)
        _extend(vocabulary, 1 + self.asked, rng)
        answers = [*vocabulary][1:]

        def text(size: int) -> str:
            rng = filling(place)
            coded = dict.fromkeys(vocabulary)
            _extend(coded, max((length - 50) // 50, 2 + self.asked), rng)
            counts = [int(size * rank**-self.alpha / self.zeta) for rank in range(1, len(coded) + 1)]
            listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
            rng.shuffle(listed)
            return self.template.format(context=" ".join(listed))

        return Sample(answers, self.prefix, text, least=self.least)


def _extend(vocabulary: dict[str, None], size: int, rng: random.Random) -> None:
    """Add coded words until there are so many."""
    while len(vocabulary) < size:
        vocabulary["".join(rng.choices(string.ascii_lowercase, k=6))] = None
