"""The encoding of a text file. Ours."""

import codecs

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SAMPLE = 1024


def decode(content: bytes, *, whole: bool = True) -> tuple[str, str | None]:
    """Decode a text file.

    A byte order mark decides. Without one, a file whose every other byte is 0 is UTF-16. All other
    files are UTF-8, or Windows-1252 if they are not valid UTF-8, or Latin-1 if they are neither.

    Args:
        content: the bytes of the file.
        whole: whether this is the whole file; otherwise it may end within a character.

    Returns:
        The text, and a remark if the encoding is not UTF-8.
    """
    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None
    ) or _without_mark(content, whole)
    text = codecs.getincrementaldecoder(encoding)().decode(content, final=whole)
    if encoding.startswith("utf-8"):
        return text, None
    shown = {"cp1252": "Windows-1252", "latin-1": "Latin-1"}.get(encoding, "UTF-16")
    return text, f"the file is not UTF-8 and was read as {shown}"


def _without_mark(content: bytes, whole: bool) -> str:
    sample = content[:SAMPLE]
    for start, name in ((0, "utf-16-be"), (1, "utf-16-le")):
        if len(sample) >= 4 and sample[start::2].count(0) > 0.4 * len(sample):
            return name
    for name in ("utf-8", "cp1252"):
        try:
            codecs.getincrementaldecoder(name)().decode(content, final=whole)
        except UnicodeDecodeError:
            continue
        return name
    return "latin-1"
