"""`evaluate` module: mean ROUGE-L F1, the best over each caption's references."""

import datasets
import evaluate

from mmft.metrics.rouge_l import rouge_l

_CITATION = "Lin, ROUGE: a package for automatic evaluation of summaries, 2004."


class RougeL(evaluate.Metric):
    """rouge_l: mean over captions of the F1 of the longest common subsequence."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=__doc__, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [rouge_l(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"rouge_l": sum(scores) / len(scores)}
