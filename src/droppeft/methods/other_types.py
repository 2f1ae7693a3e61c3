"""FedLoRA's loop with another PEFT type, by the names under which papers compare them."""

from collections.abc import Callable, Mapping
from typing import Any

from droppeft.config import AdapterConfig, Config
from droppeft.errors import DroppeftError
from droppeft.methods.base import Method, average_by_examples
from droppeft.methods.fedlora import FEDLORA


def with_type(**wanted: Any) -> Callable[[Config], Config]:
    """An ``adjust`` that takes these adapter settings where the configuration says nothing.

    Args:
        wanted: of the adapter table, its type among them.

    Raises:
        DroppeftError: (the ``adjust``) the configuration has settings of another type.
    """
    usual = AdapterConfig.model_validate({})

    def adjust(config: Config) -> Config:
        if config.adapter.type == wanted["type"]:
            return config
        if config.adapter != usual:
            raise DroppeftError(
                f"method={config.method} has adapter.type={wanted['type']}, and the configuration "
                f"has settings of adapter.type={config.adapter.type}; leave adapter out, or set "
                f"adapter.type={wanted['type']} and what belongs to it"
            )
        return config.model_copy(update={"adapter": AdapterConfig.model_validate(wanted)})

    return adjust


def _variant(name: str, summary: str, **wanted: Any) -> Method:
    return Method(
        name=name,
        summary=summary,
        tables=FEDLORA.tables,
        init=FEDLORA.init,
        plan=FEDLORA.plan,
        merge=average_by_examples,
        adjust=with_type(**wanted),
    )


OTHER_TYPES: Mapping[str, Method] = {
    method.name: method
    for method in (
        _variant("fedprompt", "soft prompts before the text, averaged", type="prompt_tuning"),
        _variant("fedptuning", "prompts from a small encoder, averaged", type="p_tuning"),
        _variant("fedprefix", "prefixes in every layer, averaged", type="prefix_tuning"),
        _variant("fedia3", "(IA)³ scales in every layer, averaged", type="ia3"),
        # A trained vector added to a linear map's output is what its trained bias would be; the
        # biases of layer norms are not trained.
        _variant(
            "fedbitfit",
            "biases of all linear maps, averaged (BitFit, by peft's BEFT)",
            type="beft",
            targets=("all-linear",),
        ),
    )
}
