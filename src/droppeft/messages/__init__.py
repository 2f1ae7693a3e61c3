"""The messages of a round: the server's instruction to one client, and the client's reply.

In every round the server sends an ``Instruction`` to each client of the cohort. The client replies
with an ``Update`` if it trained, with an ``EvaluationReply`` if it only evaluated its model, or
with a ``Failure``. What a method carries from one round to the next is a ``ServerState``.

All messages are frozen dataclasses of numbers, strings and numpy arrays, so this folder needs
neither torch nor a transport. ``docs/reference/source_code.md`` shows how each method uses them.
"""
