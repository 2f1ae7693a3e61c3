"""Render conversations with the tokenizer's chat template, and mark the tokens that are learnt.

Ours. What is learnt is found by rendering: a message of the assistant begins where the prompt for
it ends (``add_generation_prompt``), and ends where the rendering of the messages up to it ends. So
the token that ends a turn is learnt, the tokens of the assistant's header are not, and padding
plays no part. TRL's SFTTrainer masks a prompt and its completion in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from droppeft.data.conversations import Conversation, Document, Example, Message
from droppeft.errors import DroppeftError

DATE = "26 Jul 2024"
"""For templates that print ``date_string``, as those of Llama 3: rows must not change with the day.
It is the date that these templates take if they cannot ask for today's."""

EXCERPT = 40  # characters of a row that identify it in a message


@dataclass(frozen=True)
class Rendered:
    """The text that a model sees for a row, before tokenisation.

    Attributes:
        text: with all special tokens; the tokenizer must not add any.
        spans: (start, end) of each part that is learnt, in characters.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render_rows(rows: Sequence[Example], tokenizer: Any) -> list[Rendered]:
    """Render rows for training.

    With a tokenizer that has no chat template, a prompt and its completion are joined without
    anything between them, and the end-of-text token follows, as in TRL. So does it after a
    document. BOS comes first if the tokenizer puts it before texts.

    Args:
        rows: conversations or documents.
        tokenizer: of transformers.

    Raises:
        DroppeftError: the tokenizer has no chat template and a conversation is not one prompt with
            one completion, the template refuses a conversation or renders its beginning
            differently when messages follow, or there is no end-of-text token.
    """
    if tokenizer.chat_template:
        return _in_order(rows, tokenizer)
    return [_plainly(row, tokenizer) for row in rows]


def render_prompts(prompts: Sequence[Sequence[Message]], tokenizer: Any) -> list[str]:
    """Render the messages before an answer of the assistant, for generation.

    Without messages, as before a document, the prompt is BOS, or empty if the tokenizer does not
    use it.

    Raises:
        DroppeftError: as in :func:`render_rows`.
    """
    if tokenizer.chat_template:
        asked = [messages for messages in prompts if messages]
        rendered = iter(_templated(asked, tokenizer, prompt=True))
        return [next(rendered) if messages else _beginning(tokenizer) for messages in prompts]
    for messages in prompts:
        if [message.role for message in messages] not in ([], ["user"]):
            raise _no_template(messages)
    beginning = _beginning(tokenizer)
    return [beginning + "".join(message.content for message in one) for one in prompts]


# With a chat template


def _in_order(rows: Sequence[Example], tokenizer: Any) -> list[Rendered]:
    """Render documents plainly and conversations with the template, which takes many at once."""
    conversations = [row for row in rows if isinstance(row, Conversation)]
    rendered = iter(_conversations(conversations, tokenizer))
    return [
        _plainly(row, tokenizer) if isinstance(row, Document) else next(rendered) for row in rows
    ]


def _conversations(rows: Sequence[Conversation], tokenizer: Any) -> list[Rendered]:
    answers = [
        (row.messages, number)
        for row in rows
        for number, message in enumerate(row.messages)
        if message.role == "assistant"
    ]
    led = [(messages, number) for messages, number in answers if number]
    unfinished = [(messages, number) for messages, number in answers if number + 1 < len(messages)]
    wholes = _templated([row.messages for row in rows], tokenizer)
    prompts = iter(_templated([one[:number] for one, number in led], tokenizer, prompt=True))
    turns = iter(_templated([one[: number + 1] for one, number in unfinished], tokenizer))
    rendered = []
    for row, whole in zip(rows, wholes, strict=True):
        spans = []
        for number, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            is_last = number + 1 == len(row.messages)
            turn = whole if is_last else next(turns)
            before = next(prompts) if number else _header(row, whole, tokenizer)
            if not (whole.startswith(turn) and turn.startswith(before)):
                raise _inconsistent(row.messages)
            spans.append((len(before), len(turn)))
        rendered.append(Rendered(whole, tuple(spans)))
    return rendered


def _header(row: Conversation, whole: str, tokenizer: Any) -> str:
    """Return what stands before a conversation's first message if that is the assistant's."""
    asked = [Message("user", "?")]
    [with_header] = _templated([asked], tokenizer, prompt=True)
    [without] = _templated([asked], tokenizer)
    header, content = with_header.removeprefix(without), row.messages[0].content.strip()
    before, found, _ = whole.partition(header + content)
    if not found:
        raise _inconsistent(row.messages)
    return before + header


def _templated(
    conversations: Sequence[Sequence[Message]], tokenizer: Any, *, prompt: bool = False
) -> list[str]:
    if not conversations:
        return []
    asdicts = [[vars(message) for message in messages] for messages in conversations]
    try:
        rendered: list[str] = tokenizer.apply_chat_template(
            asdicts, tokenize=False, add_generation_prompt=prompt, date_string=DATE
        )
    except (TemplateError, TypeError, ValueError) as error:
        if len(conversations) > 1:  # find the first that is refused
            for messages in conversations:
                _templated([messages], tokenizer, prompt=prompt)
        raise _refused(conversations[0], error) from None
    return rendered


def _refused(messages: Sequence[Message], error: Exception) -> DroppeftError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DroppeftError(
        f"the model's chat template refuses {_named(messages)}: {reason}; change the "
        "conversation, or use a model with another template"
    )


def _inconsistent(messages: Sequence[Message]) -> DroppeftError:
    return DroppeftError(
        f"the model's chat template renders the beginning of {_named(messages)} differently when "
        "messages follow, so it cannot be said which tokens are learnt; use conversations with one "
        "answer, or a model with another template"
    )


# Without a chat template


def _plainly(row: Example, tokenizer: Any) -> Rendered:
    """Join BOS, prompt, completion and the end-of-text token."""
    if tokenizer.eos_token is None:
        raise DroppeftError(
            "the model's tokenizer has no end-of-text token (eos_token), so the model could not "
            "learn to stop; use another model"
        )
    beginning = _beginning(tokenizer)
    if isinstance(row, Document):
        learnt = row.text
    else:
        if [message.role for message in row.messages] != ["user", "assistant"]:
            raise _no_template(row.messages)
        beginning += row.messages[0].content
        learnt = row.messages[1].content
    text = beginning + learnt + tokenizer.eos_token
    return Rendered(text, ((len(beginning), len(text)),))


def _beginning(tokenizer: Any) -> str:
    """Return BOS if the tokenizer puts it before a text, or else ""."""
    added = tokenizer("")["input_ids"]
    return tokenizer.bos_token if added and added[0] == tokenizer.bos_token_id else ""


def _no_template(messages: Sequence[Message]) -> DroppeftError:
    return DroppeftError(
        "the model's tokenizer has no chat template, and without one only a prompt with its "
        f"completion can be learnt, not {_named(messages)} with the roles "
        f"{', '.join(message.role for message in messages)}; use a model for chats, such as "
        "model=smollm2, or rows with prompt and completion"
    )


def _named(messages: Sequence[Message]) -> str:
    text = " ".join(messages[0].content.split())
    return f"the conversation that begins with '{text[:EXCERPT]}{'…' * (len(text) > EXCERPT)}'"
