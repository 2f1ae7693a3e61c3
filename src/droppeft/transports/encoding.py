"""Encode what travels between server and clients, on any transport. Ours.

The server keeps its values in fp32 and sends them rounded. A client replies with the change from
what it received, which the server adds to its own value. So nothing that the server rounds is lost,
and what the client rounds is in its next change (:mod:`droppeft.client.rounding_errors`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft.messages.encoding import decode_tensors, encode
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.messages.tensors import Array, LayerKey, Layout, flatten
from droppeft.transports.base import Arrival, Transport


@dataclass(frozen=True)
class EncodingTransport:
    """Encodes the tensors of instructions, and decodes those of updates.

    With ``fp32`` it changes nothing.

    Attributes:
        inner: carries the messages.
        layout: of an adapter.
    """

    inner: Transport
    layout: Callable[[AdapterSpec], Layout]

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Yield one arrival per instruction, in any order."""
        sent = [encoded_instruction(instruction) for instruction in instructions]
        for arrival in self.inner.exchange(sent):
            reply = self._decoded(instructions[arrival.index], arrival.reply)
            yield Arrival(arrival.index, reply)

    def _decoded(self, instruction: Instruction, reply: Reply) -> Reply:
        if instruction.encoding == "fp32" or not isinstance(reply, Update):
            return reply
        held = {name: array for _, name, array in flatten(instruction.tensors)}
        layout = self.layout(instruction.adapter)
        try:
            changes = decode_tensors(reply.tensors, instruction.encoding, layout)
        except ValueError as error:
            return Failure(instruction.client, f"refused: sends another encoding: {error}")
        tensors: dict[LayerKey, dict[str, Array]] = {}
        for key, name, change in flatten(changes):
            tensors.setdefault(key, {})[name] = change
            if name in held:
                # What a client sent may be infinite, which validation refuses.
                with np.errstate(over="ignore", invalid="ignore"):
                    tensors[key][name] = np.add(held[name], change, dtype=np.float32)
        return replace(reply, tensors=tensors)


def encoded_instruction(instruction: Instruction) -> Instruction:
    """Return an instruction as it travels; its base delta stays fp32."""
    if instruction.encoding == "fp32":
        return instruction
    tensors = {
        key: {name: encode(array, instruction.encoding) for name, array in named.items()}
        for key, named in instruction.tensors.items()
    }
    return replace(instruction, tensors=tensors)
