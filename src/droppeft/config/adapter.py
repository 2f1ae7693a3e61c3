"""The adapter table: what is trained beside the backbone."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from droppeft.config.table import Real, Table, TextList, Whole

# All other adapter types have the defaults of peft's configuration class.
ADAPTER_DEFAULTS: dict[str, dict[str, int | float]] = {
    "lora": {"rank": 8, "dropout": 0.0},
    "bottleneck": {"width": 64},
    "prefix_tuning": {"tokens": 20},
    "prompt_tuning": {"tokens": 20},
    "p_tuning": {"tokens": 20},
}


class AdapterConfig(Table):
    """What is trained beside the backbone; a setting that the type does not have is refused."""

    type: str = Field("lora", description="PEFT type; [adapter types](adapters.md)")
    rank: Whole | None = Field(
        None, ge=1, description="rank r, for types that have one (8 for `lora` if not given)"
    )
    alpha: Real | None = Field(
        None,
        gt=0,
        description="for types that have one: the adapter's output is scaled by alpha/rank (for "
        "`lora` twice the rank if not given)",
    )
    dropout: Real | None = Field(None, ge=0, lt=1, description="dropout on the adapter's input")
    width: Whole | None = Field(
        None, ge=1, description="for `bottleneck`: its inner dimension (64 if not given)"
    )
    tokens: Whole | None = Field(
        None, ge=1, description="virtual tokens of prefix, prompt and P-tuning (20 if not given)"
    )
    targets: TextList = Field(
        ("default",),
        description="names of modules that get an adapter, `default` (peft's choice for the type "
        "and architecture) or `all-linear`; for `bottleneck`: `attention`, `feed_forward`",
    )
    options: dict[str, bool | int | float | str | tuple[str, ...]] = Field(
        {}, description="further settings of the type, named as in peft's configuration class"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_type(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kind = str(value.get("type", "lora"))
        given = {key: item for key, item in value.items() if item is not None}
        found = {**ADAPTER_DEFAULTS.get(kind, {}), **given}
        if kind == "lora" and type(found["rank"]) is int:
            found.setdefault("alpha", 2.0 * found["rank"])
        return found

    @field_validator("options", mode="before")
    @classmethod
    def _plain_values(cls, value: Any) -> Any:
        for name, item in value.items() if isinstance(value, Mapping) else ():
            texts = isinstance(item, list | tuple) and all(isinstance(text, str) for text in item)
            if not texts and not isinstance(item, bool | int | float | str):
                raise ValueError(f"{name} must be a number, true, false, a text or a list of texts")
        return value
