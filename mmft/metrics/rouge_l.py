"""ROUGE-L: the longest common subsequence of words, as an F1.

Source: Lin, ROUGE: a package for automatic evaluation of summaries, 2004. Words: `mmft.metrics.text.tokenise`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmft.metrics.text import tokenise


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of `a` and `b`.

    Bit-parallel: bit i of `row` is 0 where the length grows at a[i]. Source: Hyyro, Bit-parallel LCS-length
    computation revisited, AWOCA 2004.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    ones = (1 << len(a)) - 1
    row = ones
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & ones
    return len(a) - bin(row).count("1")


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """F1 of precision LCS/|caption| and recall LCS/|reference|, the best over `references`, in [0, 1].

    Raises ValueError without references.
    """
    if not references:
        raise ValueError("ROUGE-L needs at least one reference")
    words = tokenise(caption)
    targets = [tokenise(reference) for reference in references]
    # 2PR / (P + R) with P = LCS/|c| and R = LCS/|r| is 2 LCS / (|c| + |r|).
    return max(2 * lcs_length(words, target) / max(1, len(words) + len(target)) for target in targets)


def coco_rouge_l(caption: str, references: Sequence[str], beta: float = 1.2) -> float:
    """F-beta of the best precision and the best recall, each over all `references`, as COCO's evaluation has it."""
    if not references:
        raise ValueError("ROUGE-L needs at least one reference")
    words = tokenise(caption)
    common = [(lcs_length(words, target), len(target)) for target in map(tokenise, references)]
    precision = max(shared for shared, _ in common) / max(1, len(words))
    recall = max(shared / max(1, length) for shared, length in common)
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
