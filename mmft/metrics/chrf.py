"""chrF: overlap of character n-grams, by sacrebleu, on a scale of 0 to 1.

Source: Popovic, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015; n up to 6, beta 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics import CHRF

_SCORER = CHRF(lowercase=True)


def chrf(caption: str, references: Sequence[str]) -> float:
    """chrF of one caption against the reference nearest to it, in [0, 1]. Raises ValueError without references."""
    if not references:
        raise ValueError("chrF needs at least one reference")
    return _SCORER.sentence_score(caption, list(references)).score / 100
