"""The federated methods by name.

To add a method, write a module that defines a :class:`~droppeft.federated_method.Method`
(``fedlora.py`` is the shortest one), list it in :data:`METHODS`, and add a row to ``ROWS`` in
``tests/methods/test_methods.py``, which runs the tests that every method must pass. If the method
needs other defaults, they are added to ``METHOD_DEFAULTS`` in ``droppeft/config/defaults.py``.
"""

import difflib

from droppeft.config.other_words import meant_method
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, Setup
from droppeft.methods.adaptive import ADAPTIVE
from droppeft.methods.centralised import CENTRALISED
from droppeft.methods.ditto import DITTO
from droppeft.methods.droppeft import DROPPEFT
from droppeft.methods.fedadapter import FEDADAPTER
from droppeft.methods.fedex_lora import FEDEX_LORA
from droppeft.methods.fedhetlora import FEDHETLORA
from droppeft.methods.fedlora import FEDLORA
from droppeft.methods.fedra import FEDRA
from droppeft.methods.fedsa_lora import FEDSA_LORA
from droppeft.methods.ffa_lora import FFA_LORA
from droppeft.methods.flexlora import FLEXLORA
from droppeft.methods.flora import FLORA
from droppeft.methods.legend import LEGEND
from droppeft.methods.local import LOCAL
from droppeft.methods.other_types import OTHER_TYPES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        DROPPEFT,
        ADAPTIVE,
        FEDLORA,
        FEDADAPTER,
        FEDHETLORA,
        FEDRA,
        LEGEND,
        FFA_LORA,
        FLEXLORA,
        FLORA,
        FEDEX_LORA,
        FEDSA_LORA,
        *OTHER_TYPES.values(),
        DITTO,
        LOCAL,
        CENTRALISED,
    )
}

_BUILT_IN = frozenset(METHODS)

__all__ = ["METHODS", "Method", "Setup", "method_named", "register"]


def register(method: Method) -> Method:
    """Make a method of your own known by its name in this process, and return it.

    A later one of the same name replaces it, so that a cell of a notebook can be run again.

    Raises:
        DroppeftError: droppeft has a method of this name.
    """
    if method.name in _BUILT_IN:
        raise DroppeftError(f"method {method.name}: droppeft has one of this name; choose another")
    METHODS[method.name] = method
    return method


def method_named(name: str) -> Method:
    """Return the method with this name.

    Raises:
        DroppeftError: if there is no such method; the message lists the known ones.
    """
    if name not in METHODS:
        near = meant_method(name) or _nearest(name)
        hint = f"did you mean {near}? Known are" if near else "known are"
        raise DroppeftError(
            f"method={name}: unknown method; {hint} {', '.join(METHODS)}, and your own after "
            "droppeft.register(METHOD)"
        )
    return METHODS[name]


def _nearest(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.7)), None)
