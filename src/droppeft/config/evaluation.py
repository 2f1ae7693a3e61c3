"""The evaluation table: when and on which rows models are evaluated."""

from pydantic import Field

from droppeft.config.table import Table, Whole


class EvaluationConfig(Table):
    """When and on which test rows models are evaluated."""

    every: Whole = Field(1, ge=1, description="rounds between evaluations")
    rows: Whole = Field(
        250, ge=1, description="test rows of a round's evaluation, the same in every round"
    )
    final_rows: Whole | None = Field(
        None, ge=1, description="test rows of the evaluation at the end; all if not given"
    )
    batch_size: Whole = Field(16, ge=1, description="rows per forward pass")
    validation_clients: Whole = Field(
        3,
        ge=0,
        description="clients that measure the global model on their validation rows after each "
        "evaluated round, on `evaluation.rows` rows in all; the round with the lowest loss is "
        "delivered. 0 delivers the last round",
    )
    personalised: bool = Field(
        True,
        description="when the run ends, evaluate each client's own model on its own test rows, "
        "whether the client ever trained or not",
    )
    mistakes: Whole = Field(
        0,
        ge=0,
        description="for `classification`: test texts that the delivered model classifies wrongly "
        "to copy to `mistakes.jsonl` and to the page of the run, those with the highest "
        "probability first",
    )
    generated: Whole = Field(
        32,
        ge=0,
        description="for `causal_lm`: test rows whose completions are generated when the run ends, "
        "by the model before and after training",
    )
    personalised_generated: Whole = Field(
        0,
        ge=0,
        description="for `causal_lm`: own test rows whose completions each client's own model "
        "generates when the run ends, which takes time for every client; needs "
        "`evaluation.personalised`",
    )
    max_new_tokens: Whole = Field(
        64, ge=1, description="for `causal_lm`: most tokens of a generated completion"
    )
