"""The language that is recognised, against the one that a conversation asks for."""

import json
from collections import Counter

from finetune.evaluation.language import LANGUAGES, language_of, requested_language
from helpers.paths import CONVERSATIONS


def thoughts() -> list[tuple[str, str]]:
    """(language asked for, thinking) of every turn of the shipped conversations."""
    rows = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
    return [
        (row["reasoning_language"], message["thinking"])
        for row in rows
        for message in row["messages"]
        if message["thinking"]
    ]


def test_the_language_of_the_shipped_chains_of_thought_is_recognised() -> None:
    pairs = thoughts()
    assert len({language for language, _ in pairs}) == 10 and len(pairs) > 130
    wrong = [
        (asked, language_of(text), text) for asked, text in pairs if language_of(text) != asked
    ]
    assert len(wrong) <= 0.05 * len(pairs), wrong
    # One of the nine in Dutch is only a sum, which has no language.
    misses = Counter(asked for asked, _, _ in wrong)
    assert all(count <= 2 for count in misses.values()), wrong


def test_every_language_is_recognised_in_a_text_that_the_word_lists_were_not_made_from() -> None:
    """Article 1 of the Universal Declaration of Human Rights."""
    for language, text in {
        "English": "All human beings are born free and equal in dignity and rights. They are "
        "endowed with reason and conscience.",
        "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit "
        "Vernunft und Gewissen begabt.",
        "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
        "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
        "Italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
        "Portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
        "Dutch": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
        "Chinese": "人人生而自由,在尊严和权利上一律平等。",
        "Japanese": "すべての人間は、生まれながらにして自由であり、"
        "かつ、尊厳と権利とについて平等である。",
        "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
        "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    }.items():
        assert language_of(text) == language and language in LANGUAGES
    assert language_of("2 + 2 = 4") is None


def test_the_requested_language_is_read_from_its_line_only() -> None:
    assert requested_language("reasoning language: French\n\nYou are terse.") == "French"
    assert requested_language("# Instructions\n\nreasoning language: german") == "German"
    assert requested_language("Speak of the reasoning language: none") is None
