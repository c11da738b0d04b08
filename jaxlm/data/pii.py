"""Personal data and secrets, replaced by what they were: <EMAIL>, <PHONE>, <IP>, <CARD>, <IBAN>, <KEY>.

Every pattern finds candidates in linear time (bounded repetitions, no start inside a run that was looked at); a check of its own then decides, so that dates,
versions, prices, ISBNs and hash sums stay. Patterns begin with the characters that may stand first and look behind these afterwards: `re` then skips the rest
of the text several times faster.
"""

import ipaddress
import math
import re
from collections.abc import Callable
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of personal data: how it is found, checked and replaced."""

    placeholder: str
    pattern: re.Pattern
    accept: Callable[[re.Match], bool]


# RFC 5321: at most 64 octets before the @, labels of at most 63.
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])")
_NOT_DOMAINS = {"png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css"}  # "logo@2x.png"


def _is_email(match: re.Match) -> bool:
    return match[0].rpartition(".")[2].lower() not in _NOT_DOMAINS and ".." not in match[0]


_IP = re.compile(r"[0-9](?<![\w.-].)(?:[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.\w)"
                 r"|(?<!:.)(?<=[23])[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:]))")
_VERSION = re.compile(r"(?:version|release|firmware|build|driver|update|ver|rev|v|section|sect|sec|chapter|clause|§|[A-Za-z]/)[.:]?\s{0,2}$", re.IGNORECASE)
# Addresses that belong to nobody in particular: private networks, this machine, examples, multicast (IANA's special-purpose registries, RFC 6890).
_SPECIAL = [ipaddress.ip_network(network) for network in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3", "2001:db8::/32", "3fff::/20")]
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def _is_ip(match: re.Match) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if any(address.version == network.version and address in network for network in _SPECIAL):
        return False
    if address.version == 6:
        return address in _GLOBAL_UNICAST and not match[0].endswith("::")
    # A version, "3.11.7.1", has small numbers; of all addresses one in 256 has four below 64.
    return max(address.packed) >= 64 and not match[0].endswith(".0.0") and not _VERSION.search(match.string, max(0, match.start() - 12), match.start())


_CARD = re.compile(r"[2-6](?<![\w.,-].)(?:\d{12,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{3}([ -])\d{6}\2\d{4,5})(?![\w-]|[.,]\d)")
# Beginnings and lengths of the payment networks' numbers (ISO/IEC 7812 ranges of Visa, Mastercard, American Express, Discover, JCB, Diners Club).
_NETWORKS = ((re.compile("4"), (13, 16, 19)), (re.compile("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)), (re.compile("3[47]"), (15,)),
             (re.compile("6011|64[4-9]|65"), (16, 19)), (re.compile("35(?:2[89]|[3-8])"), (16,)), (re.compile("30[0-5]|3[689]"), (14,)))


def _is_card(match: re.Match) -> bool:
    digits = re.sub("[ -]", "", match[0])
    return len(set(digits)) > 1 and any(start.match(digits) and len(digits) in lengths for start, lengths in _NETWORKS) and luhn(digits)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    values = [int(digit) for digit in reversed(digits)]
    return (sum(values[0::2]) + sum(sum(divmod(2 * value, 10)) for value in values[1::2])) % 10 == 0


_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")


def _is_iban(match: re.Match) -> bool:
    """ISO 13616: the first four characters moved to the end and letters read as 10 to 35, the number is 1 modulo 97."""
    code = match[0].replace(" ", "")
    return 15 <= len(code) <= 34 and int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1


_PHONE = re.compile(
    r"[+(0-9](?<![\w+.,/=-].)(?<!\d:.)(?:"
    r"(?:(?<=\+)[1-9]|(?<!\d .)(?<=0)0[1-9](?=\d?\d?[ -]))\d{0,3}(?:[ .-]?\(0\))?(?:[ ./-]?(?:\(\d{1,5}+\)|\d{1,5}+)){1,6}+"  # international, ITU-T E.123
    r"|(?:(?:(?<=1)[ .-]?\(|(?<=\())[2-9]\d\d\)[ -]?|(?:(?<=1)[ .-]?[2-9]|(?<=[2-9]))\d\d[.-])[2-9]\d\d[ .-]\d{4}"  # North American
    r"|(?<!\d .)(?:(?<=\()0[1-9]|(?<=0)[1-9])\d{0,3}\)?(?:[ /-]\d{2,8}){1,4}"  # national, with its leading zero
    r"|(?P<any>(?:(?<=[^\W\d_][ .:].)|(?<=[^\W\d_][.:][ :].)|(?<=[^\W\d_]\.: .))"  # after a word that says what it is
    r"(?:(?<=\+)\(?\d|(?<=\()\d|(?<=\d))(?:[ ./()-]{0,2}\d){6,14})"
    r")(?!\w|[-.,:/]\d)")
_PHONE_WORD = re.compile(r"(?<!\w)(?:tel|telephone|telefon|phone|mobile|mobil|cell|fax|call|text|whatsapp|sms|tél|téléphone|teléfono|handy)"
                         r"(?: ?(?:no|nr|number))?\.? ?:? ?$",
                         re.IGNORECASE)


def _is_phone(match: re.Match) -> bool:
    number, digits = match[0], re.sub(r"\D", "", match[0])
    if _PHONE_WORD.search(match.string, max(0, match.start() - 24), match.start()):
        groups = re.findall(r"\d+", number)
        return 7 <= len(digits) <= 15 and sum(len(group) == 1 for group in groups) <= 1 and not re.match(r"(?:19|20)\d\d[-/. ]\d\d[-/. ]\d\d$", number)
    if match["any"] or re.fullmatch(r"\+?\d+\.\d+", number):
        return False
    return 8 <= len(digits) <= 17 if number.startswith(("+", "00")) else len(digits) in (10, 11)


_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{40,255}|glpat-[A-Za-z0-9_-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,255}|AIza[A-Za-z0-9_-]{35}|[sr]k_live_[A-Za-z0-9]{16,255}|sk-[A-Za-z0-9_-]{20,255}|hf_[A-Za-z0-9]{30,64}"
    r"|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,255}|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{8,2000})(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9+/=_.-])(?P<token>[A-Za-z0-9+/_-]{24,128}={0,2})(?![A-Za-z0-9+/=_-])")
_KEY_NAME = re.compile(r"(?:key|secret|token|passw(?:or)?d|pwd|credential|auth\w{0,20}|bearer)[\"'`]?\s{0,3}[:= ]{1,2}\s{0,3}[\"'`]?$", re.IGNORECASE)
_PRIVATE = re.compile(r"-----BEGIN ((?:[A-Z]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?)-----")


def _is_key(match: re.Match) -> bool:
    """A known form; or characters as unevenly mixed as only chance mixes them: both cases and digits, and near the entropy of a random string."""
    token = match["token"]
    if not token:
        return True
    digits = sum(map(str.isdigit, token))
    in_words = sum(map(len, re.findall(r"[A-Z]?[a-z]{4,}|[A-Z]{5,}", token)))
    if _KEY_NAME.search(match.string, max(0, match.start() - 40), match.start()):
        return digits >= 1 and in_words < 0.7 * len(token) and entropy(token) >= 3.2
    mixed = digits >= 3 and any(map(str.islower, token)) and any(map(str.isupper, token))
    return mixed and digits < 0.6 * len(token) and in_words < 0.3 * len(token) and len(token) >= 32 and entropy(token) >= 4.2


def entropy(text: str) -> float:
    """Shannon entropy of a text's own characters, in bits a character."""
    counts = [text.count(character) for character in set(text)]
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


# In this order: what is longer and surer first.
KINDS = {
    "key": Kind("<KEY>", _KEY, _is_key),
    "email": Kind("<EMAIL>", _EMAIL, _is_email),
    "iban": Kind("<IBAN>", _IBAN, _is_iban),
    "card": Kind("<CARD>", _CARD, _is_card),
    "ip": Kind("<IP>", _IP, _is_ip),
    "phone": Kind("<PHONE>", _PHONE, _is_phone),
}


def redact(text: str, kinds: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    """The text with placeholders, and {"pii.email": places, ...}. What is redacted once is not found again.

    Args:
      text: any text.
      kinds: keys of `KINDS`; their order does not matter.
    """
    counts = {}
    for name, kind in KINDS.items():
        if name not in kinds or (name == "email" and "@" not in text):
            continue
        if name == "key":
            text, counts["pii.key"] = _private_keys(text)
        text, count = _replace(text, kind)
        counts[f"pii.{name}"] = counts.get(f"pii.{name}", 0) + count
    return text, counts


def _replace(text: str, kind: Kind) -> tuple[str, int]:
    """What is not accepted is looked at again from its second character on: it may hold something that is ("in 2024 202-555-0143")."""
    parts, done, position = [], 0, 0
    while match := kind.pattern.search(text, position):
        if kind.accept(match):
            parts += [text[done:match.start()], kind.placeholder]
            done = position = match.end()
        else:
            position = match.start() + 1
    return ("".join([*parts, text[done:]]), len(parts) // 2) if parts else (text, 0)


def _private_keys(text: str) -> tuple[str, int]:
    """Private keys in PEM, from their first line to their last; to the end of the text where it has none."""
    parts, position = [], 0
    while begin := _PRIVATE.search(text, position):
        last = f"-----END {begin[1]}-----"
        end = text.find(last, begin.end())
        parts += [text[position:begin.start()], "<KEY>"]
        position = end + len(last) if end >= 0 else len(text)
    return ("".join([*parts, text[position:]]), len(parts) // 2) if parts else (text, 0)
