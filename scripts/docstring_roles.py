"""References in docstrings, such as ``:func:`train```, as links of the documentation site.

``mkdocs.yml`` names this file as an extension of griffe, which reads the docstrings.
"""

import re
from functools import partial
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?([\w.]+)`")
LITERAL_BLOCK = re.compile(r"::\n\n(?=    )")


class DocstringRoles(griffe.Extension):
    """Rewrites the notation of Sphinx, in which the docstrings are written, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(partial(_link, obj), obj.docstring.value)
            obj.docstring.value = LITERAL_BLOCK.sub(":\n\n", text)


def _link(obj: griffe.Object, role: re.Match[str]) -> str:
    """A link if the site has the name, and otherwise the name alone."""
    try:
        path = obj.resolve(role[1])
    except griffe.NameResolutionError:
        path = role[1]
    name = role[1].rpartition(".")[2]
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
