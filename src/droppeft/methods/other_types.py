"""FedLoRA's loop with another PEFT type, by the names under which papers compare them."""

from collections.abc import Mapping

from droppeft.config import Config
from droppeft.config.schema import METHOD_DEFAULTS
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, average_by_examples
from droppeft.methods.fedlora import FEDLORA


def _check(config: Config) -> None:
    wanted = METHOD_DEFAULTS[config.method]["adapter"]["type"]
    if config.adapter.type != wanted:
        raise DroppeftError(
            f"method={config.method} trains adapter.type={wanted}, and the configuration has "
            f"adapter.type={config.adapter.type}; leave it out, or take method=fedlora"
        )


def _variant(name: str, summary: str) -> Method:
    return Method(
        name=name,
        summary=summary,
        tables=FEDLORA.tables,
        init=FEDLORA.init,
        instruct=FEDLORA.instruct,
        merge=average_by_examples,
        check=_check,
    )


OTHER_TYPES: Mapping[str, Method] = {
    method.name: method
    for method in (
        _variant("fedprompt", "soft prompts before the text, averaged"),
        _variant("fedptuning", "prompts from a small encoder, averaged"),
        _variant("fedprefix", "prefixes in every layer, averaged"),
        _variant("fedia3", "(IA)³ scales in every layer, averaged"),
        # A trained vector added to a linear map's output is what its trained bias would be; the
        # biases of layer norms are not trained.
        _variant("fedbitfit", "biases of all linear maps, averaged (BitFit, by peft's BEFT)"),
    )
}
