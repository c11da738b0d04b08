"""How good the filters are: a corpus with planted faults, and precision and recall of each step on it.

    python tools/measure_cleaning.py                                    on text that every Python carries
    python tools/measure_cleaning.py --shared=/work/shared/data --write  with real pages, languages and prose too; and into docs/data.md

The same Python gives the same corpus. Precision is the share of what a step removed, redacted or changed that was planted; recall the share of what was planted
that it found. Nothing here trains anything: the rules were not fitted to these faults, but they were written by the same hands.
A measurement is a function (sources) -> rows; MEASUREMENTS lists them, and a new one joins it.
"""

import argparse
import gzip
import ipaddress
import json
import pathlib
import random
import re
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jaxlm import config  # noqa: E402
from jaxlm.data import clean, extract, languages, pii, python_docs  # noqa: E402
from jaxlm.data.corpora import Document  # noqa: E402

MARKS = ("<!-- measure_cleaning: begin -->", "<!-- measure_cleaning: end -->")
COUNT = 200  # planted of each fault


class Sources(NamedTuple):
    prose: list[str]  # clean English documents of 60 to some 300 words, from Python's documentation; and from Debian's with --shared
    held_out: list[str]  # paragraphs of the same kind that are in none of them
    shared: pathlib.Path | None


class Row(NamedTuple):
    key: str  # the config key that does it
    fault: str  # what was planted
    planted: int
    found: int  # of the planted
    false: int  # found that were not planted
    clean: int  # places or documents where nothing was planted

    def cells(self) -> list[str]:
        precision = f"{self.found / (self.found + self.false):.3f}" if self.found + self.false else "-"
        return [f"`{self.key}`", self.fault, str(self.planted), precision, f"{self.found / self.planted:.3f}", f"{self.false} of {self.clean}"]


def cleaner(**parts) -> Callable[[str | bytes, bool], clean.Cleaned]:
    run = clean.cleaner(config.build(parts))
    return lambda text, html=False: run(Document("planted", "planted", text, "", html))


def paragraphs() -> list[str]:
    found = [" ".join(p.split()) for _, text in python_docs.texts() for p in re.split(r"\n\s*\n", text)]
    return list(dict.fromkeys(p for p in found if p[:1].isupper() and p.endswith(".") and len(p.split()) >= 20 and not re.search(r"@|[{}]|>>>|\d{6}", p)))


def documents(texts: list[str], rng: random.Random) -> list[str]:
    """Paragraphs put together, three to five of them, each used once."""
    texts, made = rng.sample(texts, len(texts)), []
    while len(texts) >= 5:
        take = rng.randint(3, 5)
        made.append("\n\n".join(texts[:take]))
        texts = texts[take:]
    return made


def sources(shared: pathlib.Path | None) -> Sources:
    rng = random.Random(0)
    texts = rng.sample(paragraphs(), len(paragraphs()))
    prose = documents(texts[600:], rng)[:600]
    if shared:
        with gzip.open(shared / "corpus/debian-prose.jsonl.gz", "rt", encoding="utf-8") as file:
            pages = [" ".join(p.split()) for line in file for p in json.loads(line)["text"].split("\n\n")]
        pages = list(dict.fromkeys(p for p in pages if len(p.split()) >= 20 and p.endswith((".", "!", "?")) and "@" not in p))
        prose += documents(rng.sample(pages, 3000), rng)[:600]
    return Sources([text for text in prose if len(text.split()) >= 60], texts[:600], shared)


# Personal data and secrets --------------------------------------------------------------------------------------------------------------------------

def pick(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def email(rng: random.Random) -> str:
    name = rng.choice(["jane.doe", "j_smith", "info", "maria-luisa", "bob+news", "x.y.z", "kontakt2"]) + rng.choice(["", str(rng.randint(1, 99))])
    return f"{name}@{rng.choice(['example', 'mail.uni-x', 'shop24', 'a-b'])}.{rng.choice(['com', 'org', 'de', 'co.uk', 'io', 'museum'])}"


def phone(rng: random.Random) -> str:
    d = lambda n: str(rng.randint(2, 9)) + pick(rng, string.digits, n - 1)
    return rng.choice([f"+1-{d(3)}-{d(3)}-{d(4)}", f"({d(3)}) {d(3)}-{d(4)}", f"{d(3)}-{d(3)}-{d(4)}", f"{d(3)}.{d(3)}.{d(4)}", f"+49 {d(2)} {d(7)}",
        f"+44 (0)20 {d(4)} {d(4)}",
                       f"0{d(2)} {d(4)} {d(4)}", f"01 {d(2)} {d(2)} {d(2)} {d(2)}", f"+33 1 {d(2)} {d(2)} {d(2)} {d(2)}", f"+{d(2)}{d(9)}"])


def ip(rng: random.Random) -> str:
    while True:
        address = (ipaddress.IPv4Address(rng.getrandbits(32)) if rng.random() < 0.7 else
                   ipaddress.IPv6Address((rng.choice([0x2001, 0x2a00, 0x2606, 0x2400]) << 112) | (rng.getrandbits(48) << 64) | rng.getrandbits(rng.choice([16,
                       64]))))
        if address.is_global and not address.is_multicast:
            return str(address)


def card(rng: random.Random) -> str:
    start, length = rng.choice([("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("34", 15), ("37", 15), ("6011", 16), ("3528", 16)])
    digits = start + pick(rng, string.digits, length - len(start) - 1)
    digits += next(c for c in string.digits if pii.luhn(digits + c))
    sep = rng.choice(["", " ", "-"])
    cuts = (4, 10, 15) if length == 15 else (4, 8, 12, 16)
    return sep.join(digits[a:b] for a, b in zip((0, *cuts), cuts))


def iban(rng: random.Random) -> str:
    country, length = rng.choice([("DE", 22), ("GB", 22), ("FR", 27), ("ES", 24), ("NL", 18), ("CH", 21)])
    body = ("ABCD" if country in ("GB", "NL") else "") + pick(rng, string.digits, length - 4 - 4 * (country in ("GB", "NL")))
    check = 98 - int("".join(str(int(c, 36)) for c in body + country + "00")) % 97
    code = f"{country}{check:02d}{body}"
    return code if rng.random() < 0.5 else " ".join(code[i:i + 4] for i in range(0, len(code), 4))


def key(rng: random.Random) -> str:
    base62 = string.ascii_letters + string.digits
    return rng.choice([
        "AKIA" + pick(rng, string.ascii_uppercase + string.digits, 16), "ghp_" + pick(rng, base62, 36), "sk-" + pick(rng, base62, 32),
        "AIza" + pick(rng, base62, 35),
        "xoxb-" + pick(rng, string.digits, 12) + "-" + pick(rng, base62, 24), "hf_" + pick(rng, string.ascii_letters, 34),
        "secret = " + pick(rng, base62 + "/+", 40),
        "api_key: \"" + pick(rng, "0123456789abcdef", 32) + "\"", pick(rng, base62, 40),
        "-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join(pick(rng, base62 + "+/", 64) for _ in range(4)) + "\n-----END RSA PRIVATE KEY-----"])


def decoy(rng: random.Random) -> str:
    """What looks like it and is not."""
    d = lambda n: pick(rng, string.digits, n)
    return rng.choice([
        f"version {rng.randint(1, 30)}.{rng.randint(0, 99)}.{rng.randint(0, 20)}.{rng.randint(0, 300)}",
        f"{rng.randint(1950, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.{rng.randint(1950, 2030)}", f"ISBN 978-{d(1)}-{d(4)}-{d(4)}-{d(1)}", f"ISBN {d(10)}",
        f"${rng.randint(1, 999)},{d(3)},{d(3)}.{d(2)}",
        f"192.168.{rng.randint(0, 255)}.{rng.randint(1, 254)}", f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}.1", pick(rng, "0123456789abcdef", 40),
        f"doi 10.{d(4)}/{d(7)}",
        f"{rng.randint(10, 99)} {d(3)} {d(3)} units", f"pp. {rng.randint(100, 400)}-{rng.randint(401, 900)}", f"x = {rng.random()}", f"order {d(16)}",
        f"{d(4)} {d(4)} {d(4)}",
        "2001:db8::" + pick(rng, "0123456789abcdef", 4), f"{rng.randint(0, 23):02d}:{d(2)}:{d(2)}",
        f"{pick(rng, '0123456789abcdef', 8)}-{pick(rng, '0123456789abcdef', 4)}-4abc-8def-"
        + pick(rng, "0123456789abcdef", 12), "@decorator", "std::map::iterator", "photo@2x.png", "getElementsByTagName" + d(2),
            f"row {d(5)}, column {d(5)}, {d(7)}"])


def personal_data(s: Sources) -> Iterator[Row]:
    """One value in a sentence among real text; as many texts hold a decoy of the same looks."""
    makers = {"email": email, "phone": phone, "ip": ip, "card": card, "iban": iban, "key": key}
    frames = ("Please use {} for this.", "It was {}, as they said.", "({})", "See {} - or ask again.", "The answer: {}")
    run = cleaner(clean={"pii": tuple(makers)})
    rng, false, clean_texts = random.Random(1), Counter(), 0
    for i in range(6 * COUNT):
        text = s.prose[i % len(s.prose)] + "\n\n" + rng.choice(frames).format(decoy(rng))
        false.update(run(text).counts)
        clean_texts += 1
    for kind, make in makers.items():
        found = 0
        for _ in range(COUNT):
            value = make(rng)
            result = run("Before it. " + rng.choice(frames).format(value) + " After it.")
            secret = value.split("= ")[-1].split(": ")[-1].strip('"')
            found += secret not in result.text and result.counts == {f"pii.{kind}": 1}
        yield Row(f'clean.pii=("{kind}",)', kind, COUNT, found, false[f"pii.{kind}"], clean_texts)


# Characters and pages -------------------------------------------------------------------------------------------------------------------------------

ACCENTS = str.maketrans({"a": "ä", "e": "é", "o": "ö", "u": "ü", "c": "ç", "n": "ñ", "s": "š"})
CYRILLIC = str.maketrans(dict(zip("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстувшхыз")))


def accented(text: str, rng: random.Random) -> str:
    return " ".join(word.translate(ACCENTS) if rng.random() < 0.08 else f"“{word}”" if rng.random() < 0.02 else word for word in text.split(" "))


def mojibake(s: Sources) -> Iterator[Row]:
    import ftfy  # noqa: F401  (it registers the codec)
    rng, run = random.Random(2), cleaner(clean={"repair": True})
    texts = [accented(text, rng) for text in s.prose[:2 * COUNT]]
    for name, times in (("UTF-8 read as Windows-1252", 1), ("the same, twice", 2)):
        found = false = 0
        for text in texts[:COUNT]:
            wrong = text
            for _ in range(times):
                wrong = wrong.encode().decode("sloppy-windows-1252")  # ftfy's: as browsers do, without holes in the code page
            found += run(wrong).text == text
        for text in texts[COUNT:]:
            false += bool(run(text).counts)
        yield Row("clean.repair", f"{name}: texts restored exactly", COUNT, found, false, COUNT)


def encodings(s: Sources) -> Iterator[Row]:
    """Texts in their own language, as a page would hold them, without a declaration."""
    run = cleaner()
    texts = {code: [text] for code, text in (("deu", ARTICLE_1["de"]), ("fra", ARTICLE_1["fr"]), ("rus", ARTICLE_1["ru"]))}
    if s.shared:
        texts = {}
        for code, text in udhr_paragraphs(s.shared):
            texts.setdefault(code, []).append(text)
    for code, encoding in (("deu", "cp1252"), ("fra", "cp1252"), ("rus", "cp1251"), ("rus", "koi8-r"), ("pol", "cp1250"), ("ell_monotonic", "cp1253"),
    ("jpn", "shift_jis"),
                           ("jpn", "euc_jp"), ("kor", "euc_kr"), ("cmn_hans", "gb18030"), ("fra", "utf-16"), ("rus", "utf-8")):
        if code in texts:
            raw = [text.encode(encoding, "ignore") for text in texts[code]]
            raw = [text for text in raw if not text.isascii()]
            yield Row("(bytes)", f"paragraphs in {code.partition('_')[0]}, {encoding}, not declared", len(raw),
                sum(run(text).text == text.decode(encoding) for text in raw), 0, 0)


def boilerplate(s: Sources) -> Iterator[Row]:
    """Generated pages: menus, a side bar, scripts, comments and a footer around an article. Planted are the article's words; false are words of the rest."""
    rng = random.Random(4)
    words = sorted({word for text in s.held_out for word in re.findall("[a-z]{4,9}", text)})
    pages = []
    for text in s.prose[:60]:
        menu = "".join(f'<li><a href="/{w}">{w.title()} {rng.choice(words)}</a></li>' for w in rng.choices(words, k=rng.randint(5, 20)))
        side = "".join(f"<div class='teaser'><a href='#'>{' '.join(rng.choices(words, k=8))}</a></div>" for _ in range(rng.randint(2, 8)))
        article = "".join(f"<p>{p.replace('&', '&amp;').replace('<', '&lt;')}</p>" for p in text.split("\n\n"))
        comments = "".join(f"<div class='comment'><p>{' '.join(rng.choices(words, k=12))}</p></div>" for _ in range(rng.randint(0, 5)))
        pages.append((text, f"<html><head><title>x</title><script>var {rng.choice(words)} = 1;</script></head><body><header><nav><ul>{menu}</ul></nav></header>"
                      f"<div class='sidebar'>{side}</div><main><article><h1>{rng.choice(words)}</h1>{article}</article></main>"
                      f"<div id='comments'>{comments}</div>"
                      f"<footer>{' '.join(rng.choices(words, k=20))}</footer></body></html>"))
    for extractor in ("resiliparse", "trafilatura"):
        run, planted, found, false, rest = cleaner(clean={"extract": extractor}), 0, 0, 0, 0
        for text, page in pages:
            want, all_words, got = (Counter(re.findall(r"\w+", t)) for t in (text, re.sub("<[^>]*>", " ", page), run(page, True).text))
            planted, found = planted + want.total(), found + (want & got).total()
            false, rest = false + (got - want).total(), rest + (all_words - want).total()
        yield Row(f'clean.extract="{extractor}"', "words of articles in generated pages", planted, found, false, rest)


# Whole documents ------------------------------------------------------------------------------------------------------------------------------------

ARTICLE_1 = {
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y y están dotados de razón y conciencia.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en geweten.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью.",
}


def foreign(s: Sources) -> Iterator[Row]:
    run = cleaner(clean={"languages": ("en",)})
    texts = list(ARTICLE_1.values())
    if s.shared:
        texts = [text for code, text in udhr_paragraphs(s.shared) if code not in ("eng", "sco", "pcm")]  # Scots and Nigerian Pidgin are half English
    found = sum(run(text).removed_by == "clean.languages" for text in texts)
    yield Row('clean.languages=("en",)', "paragraphs in other languages", len(texts), found, sum(bool(run(text).removed_by) for text in s.prose), len(s.prose))


def udhr_paragraphs(shared: pathlib.Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted((shared / "text/udhr2").glob("*.txt")):
        found += [(path.stem, " ".join(p.split())) for p in path.read_text(encoding="utf-8").split("\n") if len(p.strip()) >= 60]
    return found


def bad_pages(s: Sources) -> Iterator[Row]:
    """Each kind of bad page with the rule that is meant for it, at the threshold of its paper, alone."""
    rng = random.Random(5)
    words = sorted({word for text in s.held_out for word in re.findall("[a-z]{3,9}", text)})
    sentence = lambda: rng.choice(s.held_out)
    some = lambda low, high: rng.choices(words, k=rng.randint(low, high))
    kinds = {
        "min_words": (50, "stubs: a sentence or two", lambda: " ".join(sentence().split()[:rng.randint(5, 45)])),
        "max_mean_word_length": (10.0, "words run together", lambda: " ".join("".join(some(2, 4)) for _ in range(80))),
        "min_mean_word_length": (3.0, "letters and fragments", lambda: " ".join(pick(rng, string.ascii_lowercase, rng.randint(1, 3)) for _ in range(90))),
        "max_symbols_per_word": (0.1, "hash tags", lambda: sentence() + " " + " ".join("#" + word for word in some(20, 40))),
        "max_bullet_lines": (0.9, "lists of nothing but bullets", lambda: "\n".join("* " + " ".join(some(2, 9)) for _ in range(20))),
        "max_ellipsis_lines": (0.3, "teasers cut off", lambda: "\n".join(" ".join(sentence().split()[:12]) + rng.choice(["...", "…"]) for _ in range(9))),
        "min_alphabetic_words": (0.8, "tables of numbers", lambda: "\n".join(" ".join(rng.choices([*words[:30], "12.5", "3", "-", "88%", "1,204"],
        [0.02] * 30 + [1] * 5, k=8)) for _ in range(20))),
        "min_stop_words": (2, "keyword lists", lambda: ", ".join(w for w in some(80, 120) if w not in ("the", "and", "that", "have", "with"))),
        "max_duplicate_lines": (0.3, "the same lines again and again", lambda: "\n".join(rng.choices([sentence() for _ in range(6)], k=14))),
        "max_duplicate_5grams": (0.15, "templates: one sentence with other names", lambda: " ".join(
            f"The best place to buy {word} at a low price is our shop, order your {word} now." for word in some(8, 15))),
        "max_top_2gram": (0.2, "spam for one phrase", lambda: " ".join(rng.choice([f"{a} {b}", w, f"{a} {b}"]) for a, b in [some(2, 2)] for w in some(70, 90))),
        "lorem_ipsum": (1, "placeholder text", lambda: s.prose[rng.randrange(len(s.prose))] + "\n\nLorem ipsum dolor sit amet, consectetur adipiscing elit."),
        "curly_brackets": (1, "code and style sheets", lambda: "\n".join(f".{word} {{ margin: {rng.randint(0, 9)}px; }}" for word in some(20, 30))),
        "min_closed_lines": (0.12, "menus and captions", lambda: "\n".join(" ".join(some(2, 6)).title() for _ in range(40))),
        "max_digits": (0.3, "logs",
        lambda: "\n".join(f"2024-01-{rng.randint(1, 28):02d} 12:{rng.randint(10, 59)}:{rng.randint(10, 59)} {rng.choice(words)} {rng.getrandbits(48)}"
            for _ in range(20))),
        "max_uppercase": (0.5, "shouting", lambda: sentence().upper() + "\n\n" + sentence().upper()),
    }
    for rule, (threshold, fault, make) in kinds.items():
        run = cleaner(filter={rule: threshold})
        found = sum(run(make()).removed_by == f"filter.{rule}" for _ in range(COUNT))
        yield Row(f"filter.{rule}={threshold}", fault, COUNT, found, sum(bool(run(text).removed_by) for text in s.prose), len(s.prose))


def leaks(s: Sources) -> Iterator[Row]:
    """Items of a test set, from paragraphs that the clean documents do not hold, put into documents as they stand and changed."""
    rng = random.Random(6)
    words = lambda text: re.findall(r"\w+", text.lower())
    grams = lambda text: set(zip(*(words(text)[i:] for i in range(13))))
    known = set().union(*map(grams, s.prose))  # Python's documentation repeats itself: such an item would be no planted leak, but a true one
    items = [" ".join(text.split()[:rng.randint(15, 50)]) for text in s.held_out if not grams(text) & known]

    def edited(text: str, every: int) -> str:
        return " ".join(word if (i + 1) % every else "something" for i, word in enumerate(text.split()))

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "quiz.jsonl"
        path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
        run = cleaner(clean={"decontaminate": (("quiz", f"{path}:question"),)})
    false = sum(bool(run(text).removed_by) for text in s.prose)
    changes = {
        "test items as they stand": lambda t: t, "in capitals, without punctuation": lambda t: re.sub(r"[^\w\s]", "", t.upper()),
        "half of an item": lambda t: " ".join(t.split()[:len(t.split()) // 2]),
        "every 20th word replaced": lambda t: edited(t, 20), "every 10th word replaced": lambda t: edited(t, 10)}
    for fault, change in changes.items():
        found = 0
        for i in range(COUNT):
            before, after = s.prose[i % len(s.prose)].split("\n\n", 1)
            found += run(f"{before} {change(items[i])} {after}").removed_by == "decontaminate.quiz"
        yield Row("clean.decontaminate", fault, COUNT, found, false, len(s.prose))


MEASUREMENTS: tuple[Callable[[Sources], Iterator[Row]], ...] = (personal_data, mojibake, encodings, boilerplate, foreign, bad_pages, leaks)


# Real data ------------------------------------------------------------------------------------------------------------------------------------------

# Files of UDHR whose language the model knows, with its code.
UDHR = dict(pair.split("=")
    for pair in """afr=af als=sq amh=am arb=ar ast=ast azj_latn=az bel=be ben=bn bod=bo bos_latn=bs bre=br bul=bg cat=ca ceb=ceb ces=cs ckb=ckb cmn_hans=zh
cmn_hant=zh cos=co cym=cy dan=da deu=de deu_1901=de div=dv ell_monotonic=el eng=en epo=eo est=et eus=eu fin=fi fra=fr fri=fy gla=gd gle=ga glg=gl guj=gu heb=he
hin=hi hrv=hr hun=hu hye=hy ido=io ilo=ilo ina=ia ind=id isl=is ita=it jav=jv jpn=ja kan=kn kat=ka kaz=kk khk=mn khm=km kir=ky kor=ko lao=lo lat=la
lat_1=la lav=lv lit=lt ltz=lb mal=ml mar=mr mkd=mk mlt=mt mya=my nds=nds nep=ne nld=nl nno=nn nob=no oss=os pan=pa pes_1=fa pol=pl por_BR=pt por_PT=pt
ron=ro rus=ru san=sa sah=sah slk=sk slv=sl spa=es sme=se srp_cyrl=sr sun=su swe=sv swh=sw tam=ta tat=tt tgk=tg tgl=tl tha=th tur=tr uig_arab=ug ukr=uk
urd=ur uzn_latn=uz vie=vi war=war yor=yo ydd=yi""".split())


def real_pages(shared: pathlib.Path) -> list[str]:
    """Token-level F1 against the extraction that mozilla/readability expects; pages a second on one core, best of three."""
    from resiliparse.parse.html import HTMLTree
    folders = sorted((shared / "html/readability").iterdir())
    pages = [(extract.decode((f / "source.html").read_bytes(), True)[0], HTMLTree.parse((f / "expected.html").read_text(encoding="utf-8")).body.text)
        for f in folders]
    lines = [f"| `clean.extract` ({len(pages)} real pages) | F1 | precision | recall | pages/s |", "|---|---|---|---|---|"]
    for extractor in ("resiliparse", "trafilatura"):
        scores, seconds = [], []
        for _ in range(3):
            start = time.process_time()
            texts = [extract.main_content(page, extractor) for page, _ in pages]
            seconds.append(time.process_time() - start)
        for text, (_, expected) in zip(texts, pages):
            a, b = Counter(re.findall(r"\w+", text)), Counter(re.findall(r"\w+", expected))
            same = (a & b).total()
            precision, recall = same / max(a.total(), 1), same / max(b.total(), 1)
            scores.append((2 * precision * recall / max(precision + recall, 1e-9), precision, recall))
        lines.append(f"| {extractor} | " + " | ".join(f"{sum(column) / len(scores):.3f}" for column in zip(*scores)) + f" | {len(pages) / min(seconds):.0f} |")
    return lines


def real_languages(shared: pathlib.Path) -> list[str]:
    identify = languages.identifier(("en",))
    rows = [(UDHR[code], text) for code, text in udhr_paragraphs(shared) if code in UDHR]
    whole = [(iso, " ".join((shared / f"text/udhr2/{code}.txt").read_text(encoding="utf-8").split())) for code, iso in UDHR.items()]
    lines = [f"| `clean.languages` (UDHR, {len(set(UDHR.values()))} languages that the model has) | right | right where probability >= 0.65 | share of these |",
        "|---|---|---|---|"]
    for name, texts in ((f"{len(whole)} whole texts", whole), (f"{len(rows)} paragraphs", rows)):
        results = [(iso, *identify(text)) for iso, text in texts]
        sure = [result for result in results if result[2] >= 0.65]
        right, right_sure = (sum(a == b for a, b, _ in some) / len(some) for some in (results, sure))
        lines.append(f"| {name} | {right:.3f} | {right_sure:.3f} | {len(sure) / len(results):.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=pathlib.Path, help="folder with corpus/, html/readability and text/udhr2")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/data.md, between the marks")
    args = parser.parse_args()
    s = sources(args.shared)
    lines = ["| config | planted | how many | precision | recall | false, of clean ones |", "|---|---|---|---|---|---|"]
    for measure in MEASUREMENTS:
        lines += ["| " + " | ".join(row.cells()) + " |" for row in measure(s)]
    if args.shared:
        lines += ["", *real_pages(args.shared), "", *real_languages(args.shared)]
    print("\n".join(lines))
    if args.write:
        path = ROOT / "docs/data.md"
        before, _, rest = path.read_text().partition(MARKS[0])
        path.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
