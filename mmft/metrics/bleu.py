"""BLEU of captions, computed by sacrebleu, on a scale of 0 to 1.

Source: Papineni et al., BLEU: a method for automatic evaluation of machine translation, ACL 2002; smoothing after
Chen and Cherry, A systematic comparison of smoothing techniques for sentence-level BLEU, WMT 2014; computed by
sacrebleu (Post, A call for clarity in reporting BLEU scores, WMT 2018): 13a tokens, lowercase.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest

from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

_REMEMBERED = 2048  # captions that are kept tokenised
SMOOTHING = ("exp", "add-k", "floor", "none")


@lru_cache(maxsize=32)
def _scorer(max_order: int, smoothing: str, smooth_value: float | None, sentence: bool) -> BLEU:
    if smoothing not in SMOOTHING:
        raise ValueError(f"BLEU smoothing {smoothing!r} is not one of {', '.join(SMOOTHING)}")
    return BLEU(
        lowercase=True,
        force=True,  # no warning about captions that look tokenised: generated text often does
        smooth_method=smoothing,
        smooth_value=smooth_value,
        max_ngram_order=max_order,
        effective_order=sentence,  # a caption of three words has no 4-gram; it is scored on the orders it has
    )


def sentence_bleu(
    caption: str,
    references: Sequence[str],
    *,
    max_order: int = 4,
    smoothing: str = "exp",
    smooth_value: float | None = None,
) -> float:
    """BLEU of one caption against all its references, in [0, 1]; 0 for an empty caption.

    smoothing: exp, add-k, floor or none; smooth_value: k of add-k or the floor, sacrebleu's 1 and 0.1 when None.
    Raises ValueError without references.
    """
    if not references:
        raise ValueError("BLEU needs at least one reference")
    _forget_captions()
    return _scorer(max_order, smoothing, smooth_value, True).sentence_score(caption, list(references)).score / 100


def _forget_captions() -> None:
    """sacrebleu keeps 65,536 captions a tokenizer, of which a policy says few again: memory would grow for hours."""
    for tokenizer in (Tokenizer13a, TokenizerRegexp):
        if tokenizer.__call__.cache_info().currsize > _REMEMBERED:
            tokenizer.__call__.cache_clear()


def corpus_bleu(
    captions: Sequence[str], references: Sequence[Sequence[str]], smoothing: str = "exp"
) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4 (keys bleu_1 .. bleu_4), in [0, 1]; captions may have different numbers of references.

    smoothing: "none" gives 0 where no n-gram of an order matches, as COCO's evaluation does.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError("corpus BLEU needs captions, each with at least one reference")
    # sacrebleu reads reference streams: the k-th holds every caption's k-th reference, None where there is none.
    streams = [list(stream) for stream in zip_longest(*references)]
    return {
        f"bleu_{n}": _scorer(n, smoothing, None, False).corpus_score(captions, streams).score / 100 for n in range(1, 5)
    }
