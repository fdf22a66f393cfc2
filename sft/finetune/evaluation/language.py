"""Recognises a dozen languages: by their script, or by their most frequent words.

Of the languages in Latin script only those in WORDS are known; a text in another one is taken for
the most similar of them. That is enough to check whether a chain of thought is in the language that
was asked for. It is not enough for texts of unknown languages, or of fewer than about five words.
"""

import re
import unicodedata

SCRIPTS = {
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "CJK UNIFIED": "Chinese",
    "DEVANAGARI": "Hindi",
    "HANGUL": "Korean",
}
WORDS = {
    "English": """
        the of and to in is it you that he was for on are with as his they at be this from i or
        had by not but what all were when your can said there an which their if do will each how
        them then she many some so these would into has her two him could no than been its who
        now my over did only may after should first where most because also just about why need
        must keep say answer user one up use give mention short make like we me asks wants us
        short without more less not both same between before while better best s t
    """,
    "German": """
        der die das und ist in zu den nicht von sie es ein eine einen einem einer mit dem des
        auf für im auch an als so wie werden wird bei oder nur nach man aus sich noch kann sind
        um am zum zur über hat aber dass wenn war er ich wir ihr haben sein mehr muss soll durch
        dann kein keine ohne alle gegen vor unter schon sehr zwei hier also weil etwas beim vom
        jede jeder nutzer erst dazu gut bis statt daher wer was
    """,
    "French": """
        le la les de des du un une et est à en que qui dans pour pas sur au aux avec ce il elle
        par plus ne se sont ou mais comme on tout je nous vous ses sa son cette ces être fait
        faut très sans sous entre deux donc leur même aussi peut si y d l c qu n s j m ni dire
        réponse pourquoi ainsi puis après avant chaque rien bien car moins plutôt
    """,
    "Spanish": """
        el la los las de del un una y es en que por para con no se su al lo como más pero sus le
        ya o este sí porque esta entre cuando muy sin sobre también me hasta hay donde quien
        desde todo nos durante uno ni contra ese eso son dos ser está hay debe usuario cada
        respuesta luego así hacer tiene puede si mejor decir dar según antes después menos te a
        hacia he ha les fue eran
    """,
    "Italian": """
        il lo la gli le i di del della dei delle dello un una uno e è in che per con non si su
        al alla ai come più ma sono anche da dal dalla nel nella o ha ho se questo questa perché
        quando molto senza tra fra due deve dire poi cui così essere fare può ogni solo già sul
        sulla quindi prima dopo meno sempre utente risposta chi dove dell all l un nell
    """,
    "Portuguese": """
        o a os as de do da dos das um uma e é em no na nos nas que por para com não se ao à às
        mais mas como foi ou seu sua são também já muito sem pelo pela entre depois quando isso
        este esta ele ela eu tem ser dois duas deve cada até porque onde dizer resposta só
        usuário então pode há antes menos melhor num numa
    """,
    "Dutch": """
        de het een en van in is dat op te zijn met voor niet aan er om ook als maar bij dan of
        door naar wordt worden uit nog wel geen over die deze dit je ik hij zij we kan kunnen
        moet moeten heeft hebben was meer zo twee waar wat hoe na tot zonder tegen alle veel
        kort iets want dus omdat eerst gebruiker noemen antwoord goed eens elke onder tussen
    """,
}
LETTERS = {
    "German": "ßäöü",
    "French": "œçèêëîïûù",
    "Spanish": "ñ¿¡áíó",
    "Italian": "ìòàè",
    "Portuguese": "ãõçâê",
}
WORD_SETS = {language: set(words.split()) for language, words in WORDS.items()}
LANGUAGES = frozenset(WORDS) | frozenset(SCRIPTS.values())


def language_of(text: str) -> str | None:
    """A member of LANGUAGES, or None if the text has no known word and no known script."""
    found: dict[str, float] = {}
    letters = [letter for letter in text if letter.isalpha()]
    for letter in letters:
        name = unicodedata.name(letter, "")
        for script, language in SCRIPTS.items():
            if name.startswith(script):
                found[language] = found.get(language, 0) + 1
    # A Japanese sentence has kana and characters that Chinese has too: count those as Japanese.
    if "Japanese" in found and found["Japanese"] >= 0.1 * sum(found.values()):
        found["Japanese"] += found.pop("Chinese", 0)
    # A fifth of the letters is enough: a word has only two or three of these characters, and a text
    # may hold names and terms in Latin letters.
    if found and max(found.values()) >= 0.2 * len(letters):
        return max(found, key=lambda language: found[language])
    return latin_language(text)


def latin_language(text: str) -> str | None:
    """The Latin-script language with the highest score, or None if no word or letter is known.

    A known word counts 1, shared out among the languages that have it; a typical letter 0.25.
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    scores = dict.fromkeys(WORDS, 0.0)
    for word in words:
        matching = [language for language, known in WORD_SETS.items() if word in known]
        for language in matching:
            scores[language] += 1 / len(matching)
    for language, letters in LETTERS.items():
        scores[language] += 0.25 * sum(text.lower().count(letter) for letter in letters)
    best = max(scores, key=lambda language: scores[language])
    return best if scores[best] > 0 else None


def requested_language(instructions: str) -> str | None:
    """The language that a system or developer message asks for, or None.

    The messages of HuggingFaceH4/Multilingual-Thinking do so by a line "reasoning language: ...".
    """
    asked = re.search(r"^reasoning language: *([^\n.,;]+)", instructions, re.I | re.M)
    return asked[1].strip().title() if asked else None
