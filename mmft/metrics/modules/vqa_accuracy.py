"""`evaluate` module: VQA accuracy and exact match; references are each question's answers."""

import datasets
import evaluate

from mmft.metrics.vqa import exact_match, vqa_accuracy

_CITATION = "Antol et al., VQA: visual question answering, ICCV 2015."


class VqaAccuracy(evaluate.Metric):
    """vqa_accuracy and exact_match: means over questions, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=__doc__, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "vqa_accuracy": sum(vqa_accuracy(p, r) for p, r in pairs) / len(pairs),
            "exact_match": sum(exact_match(p, r) for p, r in pairs) / len(pairs),
        }
