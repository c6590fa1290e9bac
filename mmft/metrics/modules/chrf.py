"""`evaluate` module: mean chrF against the nearest reference."""

import datasets
import evaluate

from mmft.metrics.chrf import chrf

_CITATION = "Popovic, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015."


class Chrf(evaluate.Metric):
    """chrf: mean over captions, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=__doc__, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [chrf(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"chrf": sum(scores) / len(scores)}
