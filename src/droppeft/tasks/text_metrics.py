"""How close generated texts are to reference texts, by ``rouge-score`` and ``sacrebleu``."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from droppeft.errors import DroppeftError
from droppeft.extras import require


@dataclass(frozen=True)
class TextScores:
    """Scores of generated texts, each from 0 to 1, where 1 is best.

    Attributes:
        rouge_l: ROUGE-L, the mean F1 of the longest common subsequence of words (Lin 2004). Words
            are made of the letters a to z and digits, in lower case, without stemming, so texts in
            other scripts score 0.
        chrf: chrF, the F2 of character n-grams up to 6, over all texts together (Popović 2015;
            sacrebleu's defaults, divided by 100). It suits every script.
        exact_match: fraction of the texts that equal their reference, apart from white space at the
            ends.
    """

    rouge_l: float
    chrf: float
    exact_match: float


def text_scores(generated: Sequence[str], references: Sequence[str]) -> TextScores:
    """Compare each generated text with its reference.

    Raises:
        DroppeftError: a package is missing, there are no texts, or not as many of both kinds.
    """
    require("llm", "ROUGE-L and chrF")
    if not generated or len(generated) != len(references):
        raise DroppeftError(
            f"{len(generated)} generated texts cannot be compared with {len(references)} "
            "references; give one reference for each text, and at least one"
        )
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    pairs = list(zip(generated, references, strict=True))
    scorer = RougeScorer(["rougeL"])
    return TextScores(
        rouge_l=float(np.mean([scorer.score(ref, text)["rougeL"].fmeasure for text, ref in pairs])),
        chrf=float(CHRF().corpus_score(list(generated), [list(references)]).score) / 100,
        exact_match=float(
            np.mean([text.strip() == reference.strip() for text, reference in pairs])
        ),
    )
