"""Which version of Flower is known: parts of it are replaced that are not its public API. Ours."""

from importlib.metadata import version

from droppeft.errors import DroppeftError

KNOWN = "1.41."
"""Beginning of the versions whose SuperLink and SuperNode have been read."""


def check_flower() -> None:
    """Refuse another version, with which a guard might silently guard nothing.

    Raises:
        DroppeftError: another version of Flower is installed.
    """
    installed = version("flwr")
    if not installed.startswith(KNOWN):
        raise DroppeftError(
            f"Flower {installed} is installed, and this version of droppeft protects SuperLinks "
            f"and SuperNodes of Flower {KNOWN}*; install that one"
        )
