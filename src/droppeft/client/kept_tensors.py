"""What a client must not send in a run, because it was told, or chose, to keep it. Ours.

An instruction says which tensors may be sent, and a server could say something else in the next
round. A client therefore remembers, in a file beside its saved state, which tensors were trained
and not sent. It refuses every later instruction of the run that asks for one of them. The only way
out is the one that a method documents: under a sharing rule a client chooses again which layers it
shares, and the rule's fraction may not grow.

The file is not in the folder of the client's state, so that it outlives a state that is lost.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from droppeft.client.client_state import client_folder
from droppeft.errors import DroppeftError
from droppeft.files import make_private, write_atomically
from droppeft.messages.instruction import Instruction
from droppeft.refusals import Refused


@dataclass(frozen=True)
class Kept:
    """What one client must keep in one run, as far as it knows.

    Attributes:
        always: names of tensors that the server told it to keep. They are never sent.
        chosen: names of tensors of layers that it chose to keep under a sharing rule. They are sent
            only if it chooses to share them under such a rule.
        fraction: the smallest fraction of a sharing rule; ``None`` if there was no rule.
    """

    always: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()
    fraction: float | None = None

    def check(
        self,
        instruction: Instruction,
        trained: Collection[str],
        loaded: Collection[str],
        loaded_chosen: Collection[str],
    ) -> None:
        """Check that an instruction asks for nothing that is kept.

        Args:
            instruction: to be checked before it is run.
            trained: names of the tensors that it trains.
            loaded: names of the tensors that begin with a value from the saved state.
            loaded_chosen: those of them that belong to layers which the client chose to keep.

        Raises:
            Refused: it asks for a kept tensor, or shares a larger fraction than before.
        """
        rule = instruction.sharing
        asked = instruction.share.intersection(trained)
        forbidden = self.always.union(loaded)
        if rule is None:
            forbidden |= self.chosen
        else:
            forbidden -= frozenset(loaded_chosen) - self.always
            if self.fraction is not None and rule.fraction > self.fraction:
                raise Refused("sharing_grew", self.fraction, rule.fraction)
        if wrong := asked & forbidden:
            raise Refused("kept", len(wrong))

    def after(
        self, instruction: Instruction, trained: Collection[str], chosen: Collection[str]
    ) -> "Kept":
        """Return what is to be kept after an instruction.

        Args:
            instruction: that was run.
            trained: names of the tensors that it trained.
            chosen: names of the tensors of the layers that the client now keeps by its own choice.
        """
        rule = instruction.sharing
        fraction = self.fraction
        if rule is not None:
            fraction = rule.fraction if fraction is None else min(fraction, rule.fraction)
        return Kept(
            always=self.always | (frozenset(trained) - instruction.share),
            chosen=self.chosen.union(chosen),
            fraction=fraction,
        )


def read_kept(run: str, client: int) -> Kept:
    """Read what a client must keep in a run; nothing if nothing was kept yet.

    Raises:
        DroppeftError: the file is damaged, so that the client cannot know what it must keep.
    """
    if not run:
        return Kept()  # without a name of the run nothing can be saved
    path = _path(run, client)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        fraction = tree["fraction"]
        return Kept(
            frozenset(map(str, tree["always"])),
            frozenset(map(str, tree["chosen"])),
            None if fraction is None else float(fraction),
        )
    except FileNotFoundError:
        return Kept()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DroppeftError(
            f"{path} cannot be read ({type(error).__name__}), so that this client does not know "
            "which tensors it must keep; put it back from a copy, or end its part in this run"
        ) from None


def remember_kept(
    instruction: Instruction, trained: Collection[str], chosen: Collection[str]
) -> None:
    """Write what a client must keep after an instruction, before anything of it is sent.

    Args:
        instruction, trained, chosen: see :meth:`Kept.after`.

    Raises:
        Refused: another instruction, which ran at the same time, told it to keep what would be
            sent.
        DroppeftError: the file cannot be read or written.
    """
    run, client = instruction.run, instruction.client
    if not run:
        return
    before = read_kept(run, client)
    if before.after(instruction, trained, chosen) == before:
        before.check(instruction, trained, (), ())
        return
    path = _path(run, client)
    try:
        make_private(path.parent)
        with FileLock(path.with_suffix(".lock"), mode=0o600):
            before = read_kept(run, client)
            before.check(instruction, trained, (), ())
            _write(path, before.after(instruction, trained, chosen))
    except OSError as error:
        raise DroppeftError(
            f"{path} cannot be written ({error}); check the disk, or set DROPPEFT_STATE to another "
            "folder"
        ) from None


def _write(path: Path, kept: Kept) -> None:
    tree = {
        "always": sorted(kept.always),
        "chosen": sorted(kept.chosen),
        "fraction": kept.fraction,
    }
    write_atomically(path, json.dumps(tree).encode(), private=True)


def _path(run: str, client: int) -> Path:
    folder = client_folder(run, client)
    return folder.with_name(f"{folder.name}-kept.json")
