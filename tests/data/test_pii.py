import random

import pytest

from jaxlm.data import pii, python_docs

ALL = tuple(pii.KINDS)
FOUND = [
    ("email", "mail me at {}.", ["jane.doe+list@example.co.uk", "a@b.io", "JOHN_SMITH@EXAMPLE.COM", "x@mail-1.example.museum"]),
    ("phone", "reach us on {}, any time", ["+49 30 1234567", "+1-202-555-0143", "(202) 555-0143", "202-555-0143", "202.555.0143", "+44 (0)20 7946 0958",
    "020 7946 0958",
                                           "(030) 1234 5678", "01 23 45 67 89", "0049 30 1234567", "1-800-555-0199", "+12025550143", "+33 1 23 45 67 89"]),
    ("phone", "in 2024 Tel.: {} worked", ["030 1234567", "0171/1234567", "555 123 4567", "5551234"]),
    ("ip", "a request from {} came in", ["93.184.216.34", "93.184.216.34:8080", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001::200e"]),
    ("ip", "http://{}/index", ["93.184.216.34"]),
    ("card", "charged to {} yesterday", ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "3782 822463 10005", "6011111111111117",
    "3530111333300000"]),
    ("iban", "to {} please", ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO93 8601 1117 947"]),
    ("key", "export KEY={}\n", ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "xoxb-1234567890-abcdef", "AIza" + "Sy4_-" * 7, "sk-proj-abcdefghijklmnop1234",
    "hf_" + "aB3" * 12,
                                "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.dBjftJeZ4CVPmB92K27uhbUJU1p1r"]),
    ("key", "{}", ["-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nx\n-----END RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\nno end",
    "q8Zr2LxVb7TnKw4PdYs9HfMc3GjRe6UaXt5B"]),
    ("key", "aws_secret = \"{}\"", ["wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"]),
    ("key", "api_key: '{}'", ["9f8d7c6b5a4e3d2c1b0a9f8e7d6c5b4a"]),
]
KEPT = """version 1.2.3.4|Python 3.11.7.1|Chrome/120.0.0.0|Section 7.1.4.34|v74.125.3.4|1.2.3.4.5|8.8.8|256.100.100.100|093.184.216.034
10.0.0.1, 192.168.1.1, 127.0.0.1, 0.0.0.0, 255.255.255.0|fe80::1|::1|2001:db8::1|std::vector<int>|abc::def|12:34:56|00:1A:2B:3C:4D:5E
2024-01-15|15/01/2024|01.02.2024|01 02 2024|30 June 1998|10-11-12|2024-01-15T12:34:56+00:00|1999-2005|1941-1945|2023 2024 2025
ISBN 978-0-306-40615-7|0-306-40615-2|ISBN 9780306406157|10.1038/nature12373|pp. 123-456|555-1234|1-212-555|100-200-3000
$1,234,567.89|1 000 000 000|10 000 000|20,000-30,000|1234567890|3.14159265358979|x = 0.1234567890|-0.000000001|+1.5e10|+352364.50|+100000|+/-15|0.5 0.25 0.125
0 1 2 3 4 5 6 7 8 9 10|00000000 00000010|0000 1111 2222|1-2-3-4|(1) 2345|0x1F|call 911|text 2024|cell 1 2 3 4 5 6 7|phone 2024-01-15
1234 5678 9012 3456|4111 1111 1111 1112|0000 0000 0000 0000|4.1111111111111111|DE89 3704 0044 0532 0130 01
sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709|uuid 550e8400-e29b-41d4-a716-446655440000|https://example.com/a/b-c_d/ThisIsALongPath/With/ManyPieces2024
getElementsByClassNameAndSomethingElse123|token = previous_token_of_this_line|key=ThisIsTheNameOfAnIdentifier2|-----BEGIN PUBLIC KEY-----
logo@2x.png|@decorator|user@localhost|a@b|name@.com|<EMAIL> <PHONE> <IP> <CARD> <IBAN> <KEY>""".replace("\n", "|").split("|")


@pytest.mark.parametrize("kind, frame, value", [(kind, frame, value) for kind, frame, values in FOUND for value in values])
def test_found_and_replaced(kind, frame, value):
    text = frame.format(value)
    redacted, counts = pii.redact(text, ALL)
    port = ":8080" if value.endswith(":8080") else ""
    assert redacted == frame.format(f"<{kind.upper()}>{port}")
    assert {name: n for name, n in counts.items() if n} == {f"pii.{kind}": 1}
    assert pii.redact(redacted, ALL)[0] == redacted
    assert pii.redact(text, tuple(k for k in ALL if k != kind and {k, kind} != {"iban", "key"}))[1].get(f"pii.{kind}") is None


@pytest.mark.parametrize("text", KEPT)
def test_kept(text):
    for frame in ("{}", "It says {} here.", "({})", "x, {}, y"):
        assert pii.redact(frame.format(text), ALL)[0] == frame.format(text)


def test_only_the_kinds_that_are_asked_for():
    text = "jane@example.com, 202-555-0143, 93.184.216.34"
    assert pii.redact(text, ("ip", "email")) == ("<EMAIL>, 202-555-0143, <IP>", {"pii.email": 1, "pii.ip": 1})
    assert pii.redact(text, ()) == (text, {})


def test_several_beside_each_other():
    assert pii.redact("a@b.io,c@d.org;e@f.net 202-555-0143 202-555-0144", ALL)[0] == "<EMAIL>,<EMAIL>;<EMAIL> <PHONE> <PHONE>"


def test_the_help_of_python_is_nearly_free_of_it():
    """2.3 MB of numbers, versions, dates and identifiers; "123.45.67.89" of ssl's and socket's examples is the only address."""
    counts = {}
    for _, text in python_docs.texts():
        for name, n in pii.redact(text, ("phone", "ip", "card", "iban", "key"))[1].items():
            counts[name] = counts.get(name, 0) + n
    assert counts["pii.ip"] <= 4 and counts["pii.phone"] + counts["pii.card"] + counts["pii.iban"] + counts["pii.key"] <= 2


def test_what_was_refused_is_looked_at_again():
    assert pii.redact("cell 1 2 3 202-555-0143", ALL)[0] == "cell 1 2 3 <PHONE>"


def test_luhn():
    for digits in ("79927398713", "4111111111111111", "0"):
        assert pii.luhn(digits)
        assert not any(pii.luhn(digits[:-1] + str((int(digits[-1]) + i) % 10)) for i in range(1, 10))


def test_random_characters_never_break_it():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("0123456789+-.:/()@ abAB_=\n<>é٣", k=200))
        redacted, _ = pii.redact(text, ALL)
        assert pii.redact(redacted, ALL)[0].count("<") >= redacted.count("<")
