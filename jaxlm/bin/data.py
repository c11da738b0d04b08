"""jaxlm data: audit proves which documents a checkpoint has seen, how often and when

  jaxlm data audit runs/mine                                   the newest whole checkpoint
  jaxlm data audit runs/mine --step=2000                       an older one; also: jaxlm data audit runs/mine/checkpoints/2000
  jaxlm data audit runs/mine --doc=books/moby.jsonl:17         one document: its source, licence, how often it was seen, at which steps
  jaxlm data audit runs/mine --data=/mnt/corpus                the corpus has moved

Every checkpoint carries a ledger, data.json: fingerprint of the corpus, seed, rows, and the same of the run it was initialised from. Rows are a pure
function of these, so the audit plans them once more, without reading a token, and counts. A corpus with another fingerprint is refused.

It prints for each source: training documents; how many were seen, and not yet; how many bring nothing into a row (they are empty, or their source is not in
the mixture); tokens; how often a document was seen (a document that was cut is seen by parts: 1.5 is once and a half); licences of what was seen. Then the
documents that were seen most, and the corpora that the first parameters had been trained on. Documents held out for validation and test are never seen.

An id is "path:line" (row, piece), or the value of config.data.id_key; near ones are named when it is not there.
"""

from absl import flags

ARGUMENTS = True  # words without "--": audit, and the run


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("step", None, "Checkpoint to audit; without it the newest whole one.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("doc", "", "Id of one document to look for.", flag_values=values)
    flags.DEFINE_string("data", "", "Prepared shards; without it those that the ledger names.", flag_values=values)
    flags.DEFINE_integer("most", 10, "How many of the documents that were seen most to list.", lower_bound=0, flag_values=values)
    values.set_gnu_getopt()


def main(values: flags.FlagValues, arguments: list[str]) -> int:
    import pathlib

    if len(arguments) != 2 or arguments[0] != "audit":
        raise ValueError(f"write jaxlm data audit WORKDIR, not jaxlm data {' '.join(arguments)}".rstrip())
    from jaxlm.data import audit, rows, shards
    from jaxlm.train import origin, saved

    workdir, step = _checkpoint(pathlib.Path(arguments[1]), values.step)
    config, tokenizer, ledger = origin.read_files(workdir, step)
    if not ledger["manifest"]:
        raise ValueError(f"{workdir}, step {step}, was imported and has not been trained here: nothing is known of what it has seen")
    corpus = shards.open_corpus(saved.data_folder(workdir, ledger, values.data))
    task = rows.build(config, tokenizer, corpus)
    notes = audit.check(corpus, ledger, task)
    print(f"{workdir}, step {step}: {ledger['rows']:,} rows, {ledger['rows_per_step']} a step with seed {ledger['seed']}, of {corpus.folder} "
          f"(fingerprint {corpus.fingerprint[:12]}, the ledger's)")
    print("".join(f"note: {note}\n" for note in notes), end="")
    if values.doc:
        _show_document(audit, corpus, task, ledger, values.doc)
        return 0
    found = audit.seen(corpus, task, ledger["seed"], ledger["rows"])
    print(f"\n{audit.summary(corpus, found)}")
    held_out = {split: len(index.tokens) for split, index in corpus.splits.items() if split != "train"}
    print("held out, never seen: " + ", ".join(f"{count:,} of {split}" for split, count in held_out.items()))
    most = audit.most_seen(corpus, found, values.most)
    print("".join(["\nseen most:\n" * bool(most), *(f"  {times:8.2f} times  {corpus.document_id('train', i)}\n" for i, times in most)]), end="")
    _show_history(ledger)
    return 0


def _checkpoint(path, step: int | None):
    """Workdir and step of a workdir or of one of its checkpoints."""
    from jaxlm.train import checkpoint
    if path.parent.name == "checkpoints" and path.name.isdigit():
        if step not in (None, int(path.name)):
            raise ValueError(f"--step={step} and {path} name two checkpoints: leave one out")
        path, step = path.parent.parent, int(path.name)
    if step is None:
        step = checkpoint.newest(path, log=print) if path.is_dir() else None
        if step is None:
            raise ValueError(f"{path} holds no checkpoint: give the workdir of a run")
    if step not in checkpoint.steps(path):
        raise ValueError(f"{path} holds no checkpoint of step {step}; it holds {', '.join(map(str, checkpoint.steps(path))) or 'none'}")
    return path, step


def _show_document(audit, corpus, task, ledger, document_id: str) -> None:
    split, number = audit.find(corpus, document_id)
    index = corpus.splits[split]
    print(f"\ndocument  {document_id}\nsource    {corpus.sources[index.sources[number]]}\nlicence   {corpus.licence(split, number) or 'unknown'}")
    print(f"length    {index.tokens[number]:,} tokens, {index.text_bytes[number]:,} bytes")
    if split != "train":
        print(f"seen      never: it is held out in the {split} split")
    else:
        once = audit.tokens_of(corpus, task, number)
        visits = audit.visits(corpus, task, ledger["seed"], ledger["rows"], ledger["rows_per_step"], number)
        total = sum(visit.tokens for visit in visits)
        print(f"seen      {total / once:.2f} times: {total:,} tokens in {len(visits)} of {ledger['step']} steps" if total else "seen      never")
        print("".join(f"  step {visit.step}: {visit.tokens:,} tokens\n" for visit in visits), end="")
    _show_history(ledger)


def _show_history(ledger) -> None:
    for before in ledger["history"]:
        if "manifest" in before:
            print(f"before that: {before['origin']}, {before['step']} steps, {before.get('rows', 0):,} rows of {before['dir']} "
                  f"(fingerprint {before['manifest'][:12]}); audit it there")
        else:
            print(f"before that: {before['origin']}, of whose data nothing is known")
