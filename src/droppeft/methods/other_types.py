"""FedLoRA with other PEFT types, each under the name that papers use for it in comparisons."""

from collections.abc import Mapping

from droppeft.config import Config
from droppeft.config.defaults import METHOD_DEFAULTS
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, average_by_targets
from droppeft.methods.fedlora import FEDLORA


def _check(config: Config) -> None:
    wanted = METHOD_DEFAULTS[config.method]["adapter"]["type"]
    if config.adapter.type != wanted:
        raise DroppeftError(
            f"method={config.method} needs adapter.type={wanted}, but adapter.type="
            f"{config.adapter.type}; leave it out, or set method=fedlora"
        )


def _with_type(name: str, summary: str) -> Method:
    return Method(
        name=name,
        summary=summary,
        tables=FEDLORA.tables,
        init=FEDLORA.init,
        instruct=FEDLORA.instruct,
        merge=average_by_targets,
        check=_check,
        sent=FEDLORA.sent,
    )


OTHER_TYPES: Mapping[str, Method] = {
    method.name: method
    for method in (
        _with_type("fedprompt", "soft prompts before the text, averaged"),
        _with_type("fedptuning", "prompts from a small encoder, averaged"),
        _with_type("fedprefix", "prefixes in every layer, averaged"),
        _with_type("fedia3", "(IA)³ scales in every layer, averaged"),
        # BEFT adds a trained vector to a linear map's output, which is equivalent to training its
        # bias. The biases of layer norms are not trained.
        _with_type("fedbitfit", "biases of all linear maps, averaged (BitFit, by PEFT's BEFT)"),
    )
}
