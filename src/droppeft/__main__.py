"""``python -m droppeft`` is the command ``droppeft``."""

from droppeft.cli import main

if __name__ == "__main__":
    main()
