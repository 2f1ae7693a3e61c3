"""Git LFS pointers, which are in a file's place until the file is downloaded. Ours."""

from pathlib import Path

from droppeft.errors import DroppeftError

POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of a pointer."""


def check_no_pointer(file: Path) -> None:
    """Refuse a file that is still a Git LFS pointer.

    A file that cannot be read is left to its reader, which says why.

    Raises:
        DroppeftError: it is one.
    """
    try:
        with file.open("rb") as content:
            is_pointer = content.read(len(POINTER)) == POINTER
    except OSError:
        return
    if is_pointer:
        raise DroppeftError(
            f"{file}: is a Git LFS pointer in place of the file; run git lfs pull in its folder, "
            "or download the file"
        )
