"""Texts in a language that the model's tokenizer does not know are noticed."""

from typing import Any

import pytest

from droppeft.data.builtin import load_builtin
from droppeft.data.findings import Findings
from droppeft.data.language import with_language
from droppeft.models.sources import find_source

NOTICED = {
    "German": "Mein Paket ist noch nicht angekommen, und ich warte schon seit zwei Wochen auf die "
    "Lieferung. Die Rechnung wurde doppelt abgebucht, bitte erstatten Sie mir den Betrag.",
    "French": "Je n'ai toujours pas reçu mon colis et j'attends depuis deux semaines. Pouvez-vous "
    "me dire où il se trouve ? La facture a été débitée deux fois, je ne suis pas content.",
    "Spanish": "Mi paquete todavía no ha llegado y llevo dos semanas esperando la entrega. "
    "¿Pueden decirme dónde está? La factura se ha cobrado dos veces por error.",
    "a language of another script": "Моя посылка до сих пор не пришла, я жду уже две недели.",
}
ANOTHER_SCRIPT = (
    "我的包裹还没有到，我已经等了两个星期了。请告诉我它在哪里？发票被重复扣款了，请退款。",
    "荷物がまだ届いていません。もう二週間も待っています。どこにあるか教えてください。",
)
NOT_NOTICED = {
    "English": "My parcel has not arrived yet. The invoice was charged twice, please refund me.",
    "slang": "lol omg u r sooo gr8 luv it!!! pls fix ur app asap thx btw gonna uninstall smh",
    "terms": "Patient with hypothyroidism, hyperlipidemia and gastroesophageal reflux; prescribed "
    "levothyroxine and atorvastatin, echocardiography unremarkable.",
    "code": "for(i=0;i<n;i++){ptr->nxt=malloc(sizeof(struct nd)); memcpy(dst,src,len); } import os",
    "log": "12:00:01 ERROR sshd[1234]: pam_unix(sshd:auth): logname= uid=0 euid=0 rhost=1.2.3.4",
    "numbers": "12 34 5.6 78 9 12345 0.334 1e-5 2024-01-31",
    "names": "Schwarzenegger and Krzyzewski met Venkataraman in Massachusetts, n° 3, à la carte",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return find_source("builtin").load_tokenizer()


def language_of(texts: list[str], tokenizer: Any) -> str:
    return with_language(Findings(), texts, tokenizer).language


def test_other_languages_are_noticed(tokenizer: Any) -> None:
    for language, text in NOTICED.items():
        assert language_of([text] * 3, tokenizer) == language
    for text in ANOTHER_SCRIPT:
        assert language_of([text] * 3, tokenizer) == "a language of another script"
    [sentence] = with_language(Findings(), [NOTICED["German"]] * 3, tokenizer).sentences()
    assert "the texts seem to be in German" in sentence
    assert "a multilingual model, or one of that language" in sentence


def test_english_code_and_numbers_are_not(tokenizer: Any) -> None:
    for text in NOT_NOTICED.values():
        assert language_of([text] * 6, tokenizer) == ""
    assert language_of(list(load_builtin().train.texts), tokenizer) == ""
    assert language_of([], tokenizer) == language_of(["Ja, das ist es."], tokenizer) == ""
    # One foreign text among many.
    assert language_of([NOT_NOTICED["English"]] * 9 + [NOTICED["German"]], tokenizer) == ""


def test_a_tokenizer_that_knows_the_language_is_not_warned_about() -> None:
    class Whole:
        unk_token = "[UNK]"

        @staticmethod
        def tokenize(word: str) -> list[str]:
            return [word]

    for text in (*NOTICED.values(), *ANOTHER_SCRIPT):
        assert language_of([text] * 3, Whole()) == ""
