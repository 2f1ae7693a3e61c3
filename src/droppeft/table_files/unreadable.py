"""What is wrong with the content of a file. Ours."""


class Unreadable(Exception):
    """A file that cannot be read; the message is to be read after its name and a colon."""
