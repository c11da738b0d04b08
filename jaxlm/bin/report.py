"""jaxlm report: a page and a model card about a run, from what its folder holds.

  jaxlm report --workdir=runs/quickstart                 WORKDIR/report.html and WORKDIR/MODEL_CARD.md
  jaxlm report --workdir=runs/quickstart --step=400      about another checkpoint than the newest (or best) one

report.html is one file that needs no network: learning curves, throughput, time and energy, data with sources and licences, the ledger, figures of held-out text and tasks with
95 % intervals, confusion and error pages of a classifier, the audit for bias, samples over time, the config, and how to make the model again. It shows
what is there and says what is not, and which command makes it; runs that have not finished, or only begun, have a page too.

MODEL_CARD.md has the form of the Hugging Face Hub: metadata (with the figures as model-index) and sections. Three sections are for people to write, Intended
use, Limitations, Licence and contact: they, and the line "license:", stay as they are when the card is written again. jaxlm export puts the card, as
README.md, into the directory that it makes.

Nothing is computed anew and nothing else in the folder is changed: run jaxlm eval first for the figures.
"""

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint to tell about; without it the best, where the run says what is best, else the newest.", flag_values=values)


def main(values: flags.FlagValues) -> int:
    import pathlib

    from jaxlm.evaluate import results
    from jaxlm.train import card, run_page, summary

    found = summary.gather(pathlib.Path(values.workdir), values.step)
    results.replace(found.workdir / "report.html", run_page.render(found))
    print(f"wrote {found.workdir / 'report.html'}")
    unwritten = card.write(found, found.workdir / card.FILE)
    print(f"wrote {found.workdir / card.FILE}" + (f"; for people to write: {', '.join(unwritten)}" if unwritten else ""))
    for what, how in found.missing:
        print(f"  missing: {what} ({how})")
    return 0
