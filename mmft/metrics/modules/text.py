"""`evaluate` module: length, repetition, bad endings and diversity of captions; needs no references."""

import datasets
import evaluate

from mmft.metrics.text import bad_ending, distinct_n, repetition_rate, tokenise

_CITATION = (
    "Distinct-n: Li et al., A diversity-promoting objective function for neural conversation models, NAACL 2016."
)


class CaptionText(evaluate.Metric):
    """length (words), repetition and bad_ending as means over captions; distinct_1 and distinct_2 over all of them."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation=_CITATION, inputs_description="", features=features)

    def _compute(self, predictions: list[str]) -> dict[str, float]:
        count = len(predictions)
        return {
            "length": sum(len(tokenise(text)) for text in predictions) / count,
            "repetition": sum(map(repetition_rate, predictions)) / count,
            "bad_ending": sum(map(bad_ending, predictions)) / count,
            "distinct_1": distinct_n(predictions, 1),
            "distinct_2": distinct_n(predictions, 2),
        }
