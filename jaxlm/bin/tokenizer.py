"""jaxlm tokenizer: train a tokenizer alone, or look at what one does to a text

  jaxlm tokenizer --config=quickstart --config.tokenizer.vocab_size=4096 --out=tokenizers/mine
  jaxlm tokenizer --model=tokenizers/mine --text="The with statement"

The first trains the tokenizer of a config (config.tokenizer: unigram or bpe by SentencePiece with byte fallback, or bytes) on the training
split of config.data.source and writes tokenizer.model (or tokenizer.json for bytes). `jaxlm prepare` and `jaxlm train` do this by
themselves; train one alone to share it between corpora (config.tokenizer.path) or to compare sizes by bytes per token.

The second prints every piece with its id, the number of tokens and the bytes per token, and whether decoding gives the text back. --model
is a .model file, a prepared folder, or any folder that holds a tokenizer.

Next: jaxlm prepare --config=... --config.tokenizer.path=tokenizers/mine/tokenizer.model --out=data/mine
"""

import os
import tempfile

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", "", "Recipe: a name (quickstart) or a path (configs/quickstart.py).", flag_values=values)
    flags.DEFINE_string("out", "", "Folder for the trained tokenizer.", flag_values=values)
    flags.DEFINE_string("model", "", "A tokenizer to look at: its file, or the folder that holds it.", flag_values=values)
    flags.DEFINE_string("text", None, "Text to encode with --model.", flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    if values.model and values.text is not None and not values.config:
        _show(values.model, values.text)
    elif values.config and values.out and not values.model:
        _train(values.config, overrides, values.out)
    else:
        raise ValueError("give --config=... and --out=FOLDER to train a tokenizer, or --model=... and --text=... to look at one; "
                         "see jaxlm tokenizer --help")
    return 0


def _train(name: str, overrides: list[tuple[str, str]], out: str) -> None:
    from jaxlm import config
    from jaxlm.data import prepare, sums

    cfg = config.load(name, overrides)
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=out) as work:
        tok = prepare.make_tokenizer(cfg.data, cfg.tokenizer, work, clean=cfg.clean, filter=cfg.filter, dedup=cfg.dedup, objective=cfg.objective.name)
    path = tok.save(out)
    sums.write(out, [path.name])
    print(f"{path}: {tok.vocab_size} tokens, sha256 {tok.fingerprint}")
    print(f'next: jaxlm tokenizer --model={path} --text="..."')


def _show(model: str, text: str) -> None:
    from jaxlm.data import tokenizer

    tok = tokenizer.load(model)
    ids = tok.encode(text)
    for i, piece in zip(ids, tok.pieces(ids)):
        print(f"{i:>7}  {piece!r}")
    print(f"{len(ids)} tokens, {len(text.encode())} bytes, {len(text.encode()) / max(len(ids), 1):.2f} bytes per token; "
          + ("decodes to the same text" if tok.decode(ids) == text else f"decodes to {tok.decode(ids)!r}"))
