"""The worked examples that are most like a row: TF-IDF over character n-grams, which needs no word breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from b2batch.errors import SpecError
from b2batch.spec import Example


class NearestExamples:
    """Picks the ``k`` examples whose key (their ``user`` text, if they have none) is most like a text.

    Raises:
        SpecError: scikit-learn is not installed.
    """

    def __init__(self, examples: Sequence[Example], k: int) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise SpecError("prompt.nearest needs scikit-learn: pip install 'b2batch[examples]'") from None
        self._examples = examples
        self._k = k
        self._vectorizer: Any = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
        self._keys: Any = self._vectorizer.fit_transform(
            [example.key or example.user for example in examples]
        )

    def pick(self, text: str) -> list[Example]:
        """The examples for a row, the most similar last: next to the row's own prompt."""
        similarity = (self._keys @ self._vectorizer.transform([text]).T).toarray()[:, 0]
        order = sorted(range(len(self._examples)), key=lambda i: (-similarity[i], i))
        return [self._examples[i] for i in reversed(order[: self._k])]
