"""A trained head keeps each class's row, whatever the order of the classes is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from architecture_contract import CASES, CLASSIFIES, Case, batch, build, classification
from droppeft.models.classifier_head import arrange_head, matching_rows, output_map
from droppeft.models.loading import HEAD_MODULES, load_backbone
from refusals import refused
from tiny import save_tiny_model

ORDER = [2, 0, 3, 1]
CLASSIFIERS = [case for case in CASES if classification(case) in CLASSIFIES]


@pytest.mark.sample("bert", "llama", "roberta", "deberta-v2", "modernbert", "distilbert")
@pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: case.name)
def test_rows_are_those_of_the_logits(case: Case) -> None:
    model = build(case, AutoModelForSequenceClassification, num_labels=len(ORDER))
    with torch.no_grad():
        before = model(**batch(case)).logits
        assert arrange_head(model, ORDER, HEAD_MODULES, "m") is None
        assert torch.equal(model(**batch(case)).logits, before[:, ORDER])


@pytest.mark.parametrize(
    ("own", "wanted", "rows"),
    [
        (["pos", "neg"], ["neg", "pos"], [1, 0]),
        (["NEGATIVE", "POSITIVE"], ["negative", "positive "], [0, 1]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["a", "A"], ["b", "B"], None),
        (["yes", "no"], ["neg", "pos"], None),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["1", "0"], [1, 0]),
        (["neg", "pos"], ["0", "1"], [0, 1]),
        (["1", "0"], ["0", "1"], [1, 0]),
        # A configuration without names has two; the files may have rows for more.
        (["LABEL_0", "LABEL_1"], ["a", "b", "c"], [0, 1, 2]),
        (["x", "y"], ["0", "1", "2"], None),
    ],
)
def test_classes_match_by_name_or_number(
    own: Sequence[str], wanted: Sequence[str], rows: list[int] | None
) -> None:
    assert matching_rows(own, wanted) == rows


@pytest.fixture
def yes_or_no(tmp_path: Path) -> Path:
    """The folder of a model that was trained for the classes no and yes."""
    folder = save_tiny_model(tmp_path / "model", 1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(folder)
    return folder


def _head(folder: Path, *names: str, seed: int = 0) -> tuple[torch.Tensor, tuple[str, ...]]:
    backbone = load_backbone(str(folder), names, seed)
    found = output_map(backbone.model, HEAD_MODULES)
    assert found is not None
    return found[1].weight.detach(), backbone.new_modules


def test_a_head_for_other_classes_is_new_and_follows_from_the_seed(yes_or_no: Path) -> None:
    trained, nothing_new = _head(yes_or_no, "no", "yes")
    new, parts = _head(yes_or_no, "down", "up")
    assert (nothing_new, parts) == ((), ("classifier",))
    assert not torch.allclose(new, trained)
    assert torch.equal(_head(yes_or_no, "down", "up")[0], new)
    assert not torch.equal(_head(yes_or_no, "down", "up", seed=1)[0], new)
    assert 0 < float(new.std()) < 0.1
    assert torch.equal(_head(yes_or_no, "yes", "no")[0], trained.flip(0))


def test_one_label_per_row_is_learnt_whatever_the_model_was_trained_for(yes_or_no: Path) -> None:
    config: Any = load_backbone(str(yes_or_no), ("no", "yes"), 0).model.config
    assert config.problem_type == "single_label_classification"


def test_contradicting_tables_of_classes_are_refused(yes_or_no: Path) -> None:
    path = yes_or_no / "config.json"
    path.write_text(path.read_text().replace('"no": 0', '"no": 1').replace('"yes": 1', '"yes": 0'))
    with refused("'no' is 0 in id2label and 1 in label2id; correct config.json"):
        load_backbone(str(yes_or_no), ("no", "yes"), 0)
