"""What a run and `jaxlm eval` ask of a model: its figures on a split, and a sample."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxlm import generate
from jaxlm.config import LABELLED, Config, ObjectiveConfig
from jaxlm.data import rows, shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.evaluate import classification, classify, likelihood, outputs, preference
from jaxlm.models.decoder import Model


class Subject(NamedTuple):
    """A model whatever its parameters, and what it is asked."""
    config: Config
    model: Model
    mesh: Mesh
    corpus: shards.Corpus
    tokenizer: tokenizers.Tokenizer
    task: rows.Task
    scorer: likelihood.Scorer | classify.Predictor


def scorer(objective: ObjectiveConfig, model: Model, mesh: Mesh) -> likelihood.Scorer | classify.Predictor:
    """What `Subject.scorer` is."""
    if objective.name in LABELLED:
        return classify.predictor(model, mesh)
    return likelihood.scorer(model, mesh, objective.chunk_rows)


def score(of: Subject, params: Any, split: str, *, limit: int = 0, batch_size: int = 0, progress: Callable[[int, int], None] | None = None,
          keep: Callable[[likelihood.Scores], None] = lambda scores: None) -> dict[str, float]:
    """The summary (`likelihood.summary`) of a split. In several processes all call this together.

    Args:
      limit: documents to score, spread evenly over the split; 0: all.
      batch_size: rows of a batch; 0: the config's.
      progress: called with what is done and what there is in all, of targets and then of outputs.
      keep: called with the scores of the documents.

    Raises:
      ValueError: see `likelihood.score_documents`.
    """
    config = of.config
    batch_size = batch_size or config.eval.batch_size or config.data.batch_size
    if config.objective.name == "preference":
        return preference.score(of.scorer, params, of.mesh, of.corpus, split, of.task, batch_size=batch_size, bootstrap=config.eval.bootstrap, limit=limit,
                                progress=progress)
    scores = likelihood.score_documents(of.scorer, params, of.mesh, of.corpus, split, of.task, batch_size=batch_size, overlap=config.eval.overlap,
                                        limit_documents=limit, progress=progress)
    keep(scores)
    exact = None
    if config.objective.name == "seq2seq" and config.eval.outputs:
        answer = lambda inputs: generate.generate(of.model, params, inputs, max_tokens=of.task.target_length, context=config.model.context,
                                                  stop_ids=(of.tokenizer.eos,), settings=generate.Settings(temperature=0), vocab_size=of.tokenizer.vocab_size)
        exact = outputs.exact_matches(answer, of.corpus, split, of.task, of.tokenizer, limit=min(limit or config.eval.outputs, config.eval.outputs),
                                      batch_size=batch_size, progress=progress)
    return likelihood.summary(scores, config.eval.bootstrap, config.objective.name, exact)


CALIBRATION = "calibration.json"  # beside the parameters in a checkpoint: {"temperature", "documents"} of the validation split when it was saved


def classified(of: Subject, params: Any, split: str, *, limit: int = 0, batch_size: int = 0, temperature: float | None = None, bootstrap: int = 0,
               progress: Callable[[int, int], None] | None = None) -> tuple[classify.Result, classify.Answers]:
    """The figures of labelled texts and the answers behind them. In several processes all call this together.

    Args:
      temperature: of the probabilities; None: the one that fits this split best.
      bootstrap: draws behind the intervals; 0: none.

    Raises:
      ValueError: see `classify.answers`.
    """
    name, config = of.config.objective.name, of.config
    found = classify.answers(of.scorer, params, of.mesh, of.corpus, split, of.task, batch_size=batch_size or config.eval.batch_size or config.data.batch_size,
                             limit=limit, progress=progress)
    temperature = classification.fit_temperature(name, found.logits, found.truth) if temperature is None else temperature
    return classify.result(name, of.task.label_names, found, temperature, bootstrap), found


def table(config: Config, summary: dict[str, float]) -> str:
    """A summary as lines to print."""
    return preference.table(summary) if config.objective.name == "preference" else likelihood.table(summary, config.objective.name)


def line(config: Config, summary: dict[str, float]) -> str:
    """The figures of an evaluation during training, on one line."""
    if config.objective.name in LABELLED:
        shown = [name for name in classification.FIGURES[config.objective.name] if name != "loss"][:3]
        return (f"validation loss {summary['loss']:.4f}  " + "  ".join(f"{name.replace('_', ' ')} {summary[name]:.4f}" for name in shown)
                + f" ({summary['documents']} texts)")
    detail = {"next_token": "{bits_per_byte:.4f} bits per byte", "masked_token": "{accuracy:.4f} of the masked tokens right",
              "span_corruption": "{accuracy:.4f} of the hidden spans' tokens right", "seq2seq": "{accuracy:.4f} of the target tokens right",
              "sft": "{accuracy:.4f} of the assistant's tokens right", "preference": "{preferred:.4f} of the chosen answers likelier"}
    text = f"validation loss {summary['loss']:.4f}  {detail[config.objective.name].format(**summary)}"
    if "exact_match" in summary:
        text += f"  {summary['exact_match']:.4f} of {summary['outputs']} outputs exact"
    return f"{text} ({summary['documents']} documents)"


def sample(of: Subject, params: Any) -> str:
    """A prompt in brackets and the model's continuation, or an input and the output; "" for a model that says nothing by itself."""
    config, corpus, tokenizer, stop = of.config, of.corpus, of.tokenizer, of.tokenizer.eos
    if config.model.kind != "decoder" or config.model.output != "tokens" or config.objective.name == "span_corruption":
        return ""
    split, pairs = "validation" if len(corpus.splits["validation"].tokens) else "train", config.objective.name == "seq2seq"
    begin, end = ([], [tokenizer.eos]) if pairs else ([tokenizer.bos], [])
    if config.train.sample_prompt:
        prompt = [*begin, *tokenizer.encode(config.train.sample_prompt)][:config.model.context // 2] + end
    elif pairs:
        prompt = rows.cut_input(of.task, corpus.read(split, 0, 0, int(corpus.splits[split].inputs[0]))).tolist()
    elif corpus.splits[split].turns is not None:  # up to where the assistant begins to speak, which ends as it does there
        begins, ends = (int(place) for place in corpus.splits[split].turns[:2])
        tokens = corpus.read(split, 0, 0, ends)
        prompt, stop = tokens[:begins][-config.model.context // 2:].tolist(), int(tokens[-1])
    else:
        prompt = [int(i) for i in corpus.read(split, 0)[:min(16, config.data.sequence_length // 4)] if i != tokenizer.eos]
    length = min(128, of.task.target_length if pairs else config.model.context - len(prompt))
    settings = generate.Settings(temperature=0.0 if pairs else 0.8, top_p=0.95, seed=config.train.seed)
    [ids] = generate.generate(of.model, params, [prompt], max_tokens=length, context=config.model.context, settings=settings,
                              stop_ids=(tokenizer.eos, stop), vocab_size=tokenizer.vocab_size)
    return f"[{tokenizer.decode(prompt)}]{' ' * pairs}{tokenizer.decode(ids)}"
