"""Change attributes of modules for a while, without changing copies of the modules; ours."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes_set(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Set attributes of a module inside, such as its ``forward``, and restore them afterwards.

    Copies and pickles that are made inside have the attributes of before: a ``forward`` that is
    bound to the original would run the original's weights.
    """
    values = vars(module)
    reduce_before = getattr(module, "__reduce_ex__")  # noqa: B009  # an instance's, if nested

    def reduce(protocol: Any) -> Any:
        """Reduce the module as its class does; ``copy`` and ``pickle`` ask the instance first."""
        function, arguments, state, *rest = reduce_before(protocol)
        if isinstance(state, dict):
            kept = {name: value for name, value in state.items() if name not in temporary}
            before_alone = {n: value for n, value in before.items() if n != "__reduce_ex__"}
            state = {**kept, **before_alone}
        return (function, arguments, state, *rest)

    temporary = {**attributes, "__reduce_ex__": reduce}
    before = {name: values[name] for name in temporary if name in values}
    values.update(temporary)
    try:
        yield
    finally:
        for name in temporary:
            del values[name]
        values.update(before)


@contextmanager
def own_layerdrop_off(model: nn.Module) -> Iterator[None]:
    """Switch off the layer dropping of a model's own code inside, as ``config.layerdrop`` sets it.

    Such models (OPT, BART and others) skip layers at random in training mode, in addition to those
    that are dropped from outside.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if vars(module).get("layerdrop"):
                undo.enter_context(attributes_set(module, layerdrop=0.0))
        yield
