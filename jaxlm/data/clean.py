"""What is done to each document by itself: decode, extract, repair, normalise, tell its language, filter, redact, decontaminate."""

from collections.abc import Callable
from typing import NamedTuple

from jaxlm.config import Config
from jaxlm.data import contamination, extract, filters, languages, pii, repair
from jaxlm.data.corpora import Document


class Cleaned(NamedTuple):
    """A document after cleaning and filtering, kept or not."""

    text: str  # as it goes on; or as it stood when it was removed
    removed_by: str  # "" kept, else the rule: "filter.min_words", "clean.languages", "decontaminate.hellaswag", "clean.extract" (nothing left)
    value: float  # the figure that broke the rule (0.0 when kept)
    language: str  # ISO code, "" when not asked for
    counts: dict[str, int]  # what was changed or found: {"pii.email": 3, "clean.repair": 1, ...}; documented at `cleaner`


def cleaner(config: Config) -> Callable[[Document], Cleaned]:
    """The function that cleans one document, a pure one. Built once in each process, as models and evaluation sets are loaded here.

    It counts, where the count is not 0: "clean.decode" (1: the bytes were not UTF-8), "clean.undecodable" (bytes that mean nothing), "clean.extract" (1:
    the content of a page was extracted), "clean.repair" (lines repaired), "clean.normalise" (unwanted characters dropped), "filter.drop_..." (lines
    dropped), "pii.email" ... (places redacted), "decontaminate.NAME:ITEM" (item of an evaluation set found; `contamination.items_found` sums these up).

    Raises:
      ValueError: one line: a package, file or field that is missing, a language that is not known.
    """
    clean = config.clean
    identify = languages.identifier(clean.languages) if clean.languages else None
    drop_lines = filters.line_filter(config.filter)
    judge = filters.judge(config.filter, filters.read_word_list(clean.word_list) if clean.word_list else ())
    contaminated = contamination.finder(clean) if clean.decontaminate else None

    def clean_document(document: Document) -> Cleaned:
        text, counts, language = document.text, {}, ""

        def done(rule: str = "", value: float = 0.0) -> Cleaned:
            return Cleaned(text, rule, value, language, {key: int(count) for key, count in counts.items() if count})

        if isinstance(text, bytes):
            text, encoding = extract.decode(text, document.html)
            counts["clean.decode"] = encoding != "utf-8"
            counts["clean.undecodable"] = text.count("\ufffd")
        if document.html:
            page, text = text, extract.main_content(text, clean.extract)
            counts["clean.extract"] = 1
            if not text.strip():
                text = page
                return done("clean.extract")
        if clean.repair:
            text, counts["clean.repair"] = repair.undo_mojibake(text)
        if clean.normalise:
            text, counts["clean.normalise"] = repair.normalise(text)
            if not text:
                return done("clean.normalise")
        if identify:
            language, confidence = identify(text)
            if languages.ANY not in clean.languages and (language not in clean.languages or confidence < clean.language_confidence):
                return done("clean.languages", confidence if language in clean.languages else 0.0)
        text, dropped = drop_lines(text)
        counts |= dropped
        broken = judge(text)
        if broken:
            return done(*broken)
        if clean.pii:
            text, redacted = pii.redact(text, clean.pii)
            counts |= redacted
        if contaminated:
            name, overlap, found = contaminated(text)
            counts |= found
            if name:
                return done(f"decontaminate.{name}", overlap)
        return done()

    return clean_document
