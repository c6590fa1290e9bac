"""Are our BLEU and CIDEr-D those of COCO's evaluation? On random captions, against pycocoevalcap.

    pip install pycocoevalcap
    python scripts/bench/caption_metrics.py            # 500 captions with 1 to 5 references, seed 0

Both get words separated by spaces: pycocoevalcap's own tokeniser is a Java program. BLEU is taken unsmoothed there and
here. Exit status 1 where a value differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import time

from mmft.metrics.bleu import corpus_bleu
from mmft.metrics.cider import corpus_cider_d
from mmft.metrics.rouge_l import coco_rouge_l

TEXT = "a the dog cat red blue big small on in two under tree house runs sleeps and beside of ball black white with"
WORDS = TEXT.split()


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, weights=[1 / (i + 1) for i in range(len(WORDS))], k=rng.randint(1, 14)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = random.Random(args.seed)
    references = [[sentence(rng) for _ in range(rng.randint(1, 5))] for _ in range(args.captions)]
    captions = [rng.choice(of) if rng.random() < 0.2 else sentence(rng) for of in references]
    given, known = {i: [c] for i, c in enumerate(captions)}, dict(enumerate(references))
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(known, given)
    start = time.perf_counter()
    _, cider = Cider().compute_score(known, given)
    theirs = time.perf_counter() - start
    _, rouge = Rouge().compute_score(known, given)
    start = time.perf_counter()
    ours = corpus_cider_d(captions, references)
    seconds = time.perf_counter() - start
    differences = {
        "BLEU-1 to 4": max(
            abs(a - b) for a, b in zip(bleu, corpus_bleu(captions, references, "none").values(), strict=True)
        ),
        "CIDEr-D": max(abs(float(a) - b) for a, b in zip(cider, ours, strict=True)),
        "ROUGE-L": max(
            abs(float(a) - coco_rouge_l(c, of)) for a, c, of in zip(rouge, captions, references, strict=True)
        ),
    }
    for name, value in differences.items():
        print(f"{name}: largest difference {value:.1e}")
    print(f"CIDEr-D took {seconds:.2f} s here and {theirs:.2f} s there")
    return int(max(differences.values()) > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
