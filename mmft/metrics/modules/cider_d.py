"""`evaluate` module: mean CIDEr-D, with the document frequencies of the references given."""

import datasets
import evaluate

from mmft.metrics.cider import corpus_cider_d

_CITATION = "Vedantam, Zitnick and Parikh, CIDEr: consensus-based image description evaluation, CVPR 2015."


class CiderD(evaluate.Metric):
    """cider_d: mean over captions, in [0, 10]."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=__doc__, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = corpus_cider_d(predictions, references)
        return {"cider_d": sum(scores) / len(scores)}
