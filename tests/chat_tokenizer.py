"""A small fast tokenizer with a chat template, trained on a few words in the test."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")

CORPUS = (
    "user assistant system hello world the answer is yes or no\n",
    "    def function(argument):\n        return argument + 1\n\n\n",
    "question: what is it?  answer:  it is  a  test\n\n",
)


def chat_tokenizer(
    template: str | None = CHATML, *, bos: bool = False, eos: str | None = "<|im_end|>"
) -> Any:
    """Return a byte-level BPE tokenizer, whose padding token is its end-of-text token.

    Args:
        template: its chat template.
        bos: whether it puts ``<s>`` before a text.
        eos: its end-of-text token.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer
