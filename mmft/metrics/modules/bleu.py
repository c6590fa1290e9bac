"""`evaluate` module: corpus BLEU-1 to BLEU-4 and mean sentence BLEU, by sacrebleu."""

from typing import Any

import datasets
import evaluate

from mmft.metrics.bleu import corpus_bleu, sentence_bleu

_CITATION = "Papineni et al., BLEU: a method for automatic evaluation of machine translation, ACL 2002; Post, WMT 2018."


class Bleu(evaluate.Metric):
    """bleu_1 .. bleu_4 over the corpus; sentence_bleu is the mean over captions of the smoothed sentence score."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=__doc__, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, float]:
        scores = [sentence_bleu(p, r, **options) for p, r in zip(predictions, references, strict=True)]
        return {**corpus_bleu(predictions, references), "sentence_bleu": sum(scores) / len(scores)}
