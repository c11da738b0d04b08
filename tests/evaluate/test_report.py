"""The run report and the model card: everything a folder holds is told, what is missing is named, and nothing is run or escaped wrongly."""

import html.parser
import json
import re

import numpy as np
import pytest

from jaxlm import config
from jaxlm.evaluate import answers, bias, follow, results
from jaxlm.train import card, report, run_page, summary
from tests.evaluate.test_bias import classifier  # noqa: F401, a fixture
from tests.evaluate.test_binaries import call, fails

EVIL = "<script>alert(1)</script> & | \x07"


class Page(html.parser.HTMLParser):
    """Tags must close in order, and nothing may come from outside."""
    VOID = {"meta", "br", "line", "polyline", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.heads, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert not re.search(r"(src|href)=\"(?!#|report-)", text) and "http" not in text.replace("http-equiv", "") and "<script" not in text

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        (self.heads if self.open and self.open[-1] == "h2" else self.words).append(data)


def log(workdir, steps=(1, 2, 3, 4)):
    """What a trainer leaves behind besides checkpoints."""
    reporter = report.Reporter(workdir, 0, {})
    for step in steps:
        reporter.scalars(step, {"train/loss": 5.0 - step / 4, "train/lr": 0.1, "train/grad_norm": 1.0, "train/tokens": 512 * step, "train/skipped": 0,
                                "perf/tokens_per_second": 1000.0 + step, "perf/mfu": 0.25, "perf/data_wait": 0.01, "perf/step_seconds": 0.1, "memory/peak_gib": 1.5})
        reporter.scalars(step, {"eval/loss": 5.1 - step / 4, "eval/bits_per_byte": 3.0 - step / 8})
        reporter.text(step, "sample", f"[the] sample {step} {EVIL}")
    reporter.scalars(steps[-1], {"test/loss": 4.0, "test/bits_per_byte": 2.5, "test/bits_per_byte_low": 2.4, "test/bits_per_byte_high": 2.6, "test/documents": 9,
                                 "time/steps": 60.0, "time/lost": 20.0, "energy/kwh": 2.0, "energy/kwh_low": 1.0, "energy/kwh_high": 3.0, "energy/kg_co2": 0.962, "energy/dollars": 1.5})
    reporter.close()
    (workdir / "FINISHED").write_text('{"step": 4}')


def task(workdir, step=4, name="quiz"):
    columns = np.stack([np.arange(20) % 2, np.ones(20)], axis=1).astype(float)
    result = {"task": name, "kind": "choice", "metric": "acc", "items": 20, "shots": 0, "limit": 0, "metrics": {"acc": answers.figures(columns, "acc", 20)},
              "notes": [f"a note {EVIL}"], "source": {"file": "x"}, "contamination": {"searched": True, "hit": 3, "items": 20, "words": 13}}
    results.write(results.folder(workdir, step) / f"{name}.json", result, [{"item": i, "columns": {"acc": row}} for i, row in enumerate(columns)])


def audited(workdir, verdict="within"):
    row = bias.Row("crows_pairs", "stereotyped", "", 100, 0.57, 0.47, 0.67, 0.07, 0.4, 300, 0.1, verdict)
    bias.write(results.folder(workdir, 4) / bias.FILE, [row, row._replace(group=f"g {EVIL}", limit=None, verdict="")], ["swaps: not asked"])


def test_a_whole_run_is_told(run_copy, corpus, capsys):
    log(run_copy)
    task(run_copy)
    audited(run_copy)
    follow.append(run_copy / "eval.jsonl", {"step": 4, "split": "validation", "loss": 4.2, "loss_low": 4.1, "loss_high": 4.3, "documents": 17})
    assert call("report", f"--workdir={run_copy}") == 0
    out = capsys.readouterr().out
    assert "for people to write: Intended use, Limitations, Licence and contact" in out and "missing" not in out
    page = Page((run_copy / "report.html").read_text())
    assert page.heads == ["Learning curves", "Throughput", "Time, energy and cost", "Held-out figures", "Tasks", "Bias", "Samples over time", "Data", "Ledger", "Config", "How to reproduce"]
    words = " ".join(page.words)
    for text in ("2.4000 to 2.6000", "3 of 20", "quiz", "0.5000", "No limit is broken", "sample 4", corpus.fingerprint[:16], "corpus.jsonl", "25%", "1.50 GiB",
                 "<script>alert(1)</script>", "4.1000 to 4.3000", "steps 75.0%", "lost to restarts 25.0%", "2 kWh (modelled, 1 to 3)", "962 g at 481 g/kWh", "$1.50 (list price)"):
        assert text in words, text
    audited(run_copy, "BROKEN")
    assert call("report", f"--workdir={run_copy}", "--step=2") == 0
    assert "A limit is broken" in (run_copy / "report.html").read_text() and "checkpoint of step 2" in (run_copy / "report.html").read_text()


def test_the_card_has_the_hubs_form_and_keeps_what_people_wrote(run_copy):
    yaml = pytest.importorskip("yaml")
    log(run_copy)
    task(run_copy)
    audited(run_copy)
    assert call("report", f"--workdir={run_copy}") == 0
    path = run_copy / card.FILE
    text = path.read_text()
    _, head, body = text.split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "unknown" and found["pipeline_tag"] == "text-generation" and found["library_name"] == "transformers"
    values = {metric["type"]: metric["value"] for entry in found["model-index"][0]["results"] for metric in entry["metrics"]}
    assert values == {"loss": 4.0, "bits_per_byte": 2.5, "acc": 0.5}
    assert all({"type", "name"} <= set(entry["dataset"]) and entry["task"]["type"] for entry in found["model-index"][0]["results"])
    assert re.findall("^## (.*)", body, re.M) == ["Intended use", "Model", "Use", "Training data", "Training", "Evaluation", "Bias", "Limitations", "Reproduce",
                                                 "Licence and contact"]
    assert found["co2_eq_emissions"]["emissions"] == 962 and "modelled" in found["co2_eq_emissions"]["source"] and "| energy | 2 kWh (modelled, 1 to 3) |" in body
    assert "| quiz |  | acc | 0.5000 |" in body and "quiz: 3 of 20" in body and "No limit was broken" in body
    mine = text.replace("license: unknown", "license: apache-2.0").replace("*Not written yet.* What it does badly, and what was not tested.", "It cannot count.\n\nAt all.")
    path.write_text(mine)
    task(run_copy, name="second")
    assert call("report", f"--workdir={run_copy}") == 0
    again = path.read_text()
    assert "license: apache-2.0" in again and "It cannot count.\n\nAt all.\n\n## Reproduce" in again and "| second |" in again
    assert call("export", f"--workdir={run_copy}", f"--to={run_copy / 'out'}") == 0
    exported = (run_copy / "out" / "README.md").read_text()
    assert exported.startswith("---\nlicense: apache-2.0\n") and "It cannot count." in exported and "| second |" in exported and path.read_text() == again


def test_the_recipe_of_a_page_gives_the_same_config(cfg):
    space = {}
    exec(card.recipe(cfg), space)
    assert config.build(space["get_config"]().to_dict()) == cfg


def test_samples_come_back_whatever_happened_to_the_files(tmp_path):
    log(tmp_path)
    [first] = tmp_path.glob("events.out*")
    first.rename(first.with_name("events.out.tfevents.1000000000.here"))  # names hold the second
    again = report.Reporter(tmp_path, 2, {})  # a run that went on after step 2
    again.text(3, "sample", "another 3")
    again.close()
    [*_, last] = sorted(tmp_path.glob("events.out*"))
    last.write_bytes(last.read_bytes() + b"\x99\x00\x00\x00\x00\x00\x00\x00half")
    found = dict(report.read_texts(tmp_path, "sample"))
    assert found[3] == "another 3" and set(found) == {1, 2, 3} and found[1].startswith("[the] sample 1")
    assert report.read_texts(tmp_path, "config") == []


def test_a_run_that_has_only_begun(tmp_path, cfg, capsys):
    (tmp_path / "config.json").write_text(config.to_json(cfg))
    assert call("report", f"--workdir={tmp_path}") == 0
    assert "missing: a checkpoint" in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text())
    assert page.heads[0] == "What is missing" and "no checkpoint yet" in " ".join(page.words) and "Nothing was evaluated yet" in (tmp_path / card.FILE).read_text()


def test_without_results_it_says_what_is_missing_and_how_to_get_it(run_folder):
    found = summary.gather(run_folder)
    assert [what.partition(":")[0] for what, _ in found.missing] == ["the end of the run", "tasks", "an evaluation of held-out text", "an audit for bias"]
    assert all(str(run_folder) in how for _, how in found.missing[1:])
    Page(run_page.render(found))
    imported = found._replace(ledger={"manifest": "", "history": [{"origin": "/x/m.gguf"}]})
    assert f"jaxlm import --from=/x/m.gguf --to={run_folder}-again" in card.commands(imported) and card.PROMISE not in card.render(imported)


def test_a_classifier(classifier, tmp_path):  # noqa: F811
    import shutil
    workdir = shutil.copytree(classifier, tmp_path / "run")
    follow.append(workdir / "eval.jsonl", {"step": 1, "split": "validation", "accuracy": 0.75, "documents": 4, "confusion": [[1, 1], [0, 2]]})
    (workdir / "report-validation.html").write_text("x")
    found = summary.gather(workdir)
    page = Page(run_page.render(found))
    assert "Errors" in page.heads and "report-validation.html" in page.words and found.labelled
    text = card.render(found)
    assert "pipeline_tag: text-classification" in text and "| classes | neg, pos |" in text and "AutoModelForSequenceClassification" in text


def test_what_is_wrong_is_one_line(tmp_path, run_folder, capsys):
    assert "does not exist" in fails(capsys, "report", f"--workdir={tmp_path / 'none'}")
    assert "holds no run: neither checkpoints nor config.json" in fails(capsys, "report", f"--workdir={tmp_path}")
    assert "holds no checkpoint of step 9; it holds 2, 4" in fails(capsys, "report", f"--workdir={run_folder}", "--step=9")
    (tmp_path / "config.json").write_text(json.dumps({"modle": {}}))
    assert "did you mean" in fails(capsys, "report", f"--workdir={tmp_path}") and not (tmp_path / "report.html").exists()
