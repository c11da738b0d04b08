"""jaxlm generate: continues prompts with a model that `jaxlm train` has saved.

  jaxlm generate --workdir=runs/quickstart --prompt="The with statement"
  jaxlm generate --workdir=runs/quickstart --prompt="Return" --prompt="Raise" --samples=3 --seed=7
  jaxlm generate --workdir=runs/quickstart --prompt="def" --temperature=0 --stop='\\n\\n'
  jaxlm generate --workdir=runs/quickstart --prompts_file=prompts.txt --json > samples.jsonl
  echo "Once upon" | jaxlm generate --workdir=runs/quickstart
  jaxlm generate --workdir=runs/mine --chat

Reads the newest whole checkpoint of the run (or --step=N), with its tokenizer; no config is needed. It prints each prompt, dim on a
terminal, and the continuation as it is drawn; several get a header each. With no prompt it asks for one on a terminal, and else takes the
standard input as one prompt. --json prints a line per continuation instead: prompt, sample, text, step, seed.

An encoder-decoder reads the prompt as its input, and its output is printed on the next line. One that was trained on hidden spans only fills gaps:
--prompt="Return the <extra_id_0> of the list".

With --classify a model with labels (jaxlm train --config=sentiment) answers each text with its label and the calibrated probability of it; tags come with
their words, numbers alone. Of a pair write the two texts with " ||| " between them. Each line of the standard input is a text then.

  jaxlm generate --workdir=runs/sentiment --classify --prompt="I would buy it again."

A continuation ends with the end-of-text token, at a --stop text (neither is printed), or after --max_tokens. The same seed gives the same
text. To make it more daring raise --temperature, more careful lower it or --top_p; 0 always takes the likeliest token. Against repetition
try --repetition_penalty=1.2.

--chat talks with a model that was trained on chats: it keeps what was said, prints answers as they come, and /help lists its commands.
"""

from absl import flags

USUAL_TOKENS = 200


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint to use; without it, the newest whole one.", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times. Empty: a text from nothing.", flag_values=values)
    flags.DEFINE_string("prompts_file", "", "File with a prompt on each line; blank lines do not count.", flag_values=values)
    flags.DEFINE_integer("samples", 1, "Continuations of each prompt.", flag_values=values)
    flags.DEFINE_integer("max_tokens", None, f"Longest continuation. Without it {USUAL_TOKENS}, or as much as the model's context holds.", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0 always takes the likeliest token; 1 is the model's own distribution.", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Choose among the k likeliest tokens; 0: off.", flag_values=values)
    flags.DEFINE_float("top_p", 0.95, "Choose among the likeliest tokens that together reach this share; 1: off.", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "Leave out tokens less than this times as likely as the likeliest; 0: off.", flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens that were there before become less likely.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the random numbers.", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "End before this text; may be given several times. \\n and \\t stand for newline and tab.", flag_values=values)
    flags.DEFINE_bool("stream", True, "Print text as it is drawn.", flag_values=values)
    flags.DEFINE_bool("chat", False, "Talk with the model; needs pip install 'jaxlm[chat]'.", flag_values=values)
    flags.DEFINE_string("system", "", "With --chat: what the assistant is told first.", flag_values=values)
    flags.DEFINE_string("chat_template", "", "With --chat: chatml, llama3, gemma or a .jinja file; empty: the checkpoint's own.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON line per continuation.", flag_values=values)
    flags.DEFINE_bool("classify", False, "Label each prompt instead of continuing it.", flag_values=values)


def main(values: flags.FlagValues) -> int:
    import functools
    import sys

    from jaxlm import generate

    settings = generate.Settings(**{name: values[name].value for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")})
    for name in ("samples", "max_tokens"):
        if values[name].value is not None and values[name].value < 1:
            raise ValueError(f"--{name}={values[name].value} must be at least 1")
    prompts = _prompts(values.prompt, values.prompts_file)
    ask = not prompts and (sys.stdin.isatty() or values.chat)
    if values.chat and (prompts or values.json):
        raise ValueError("--chat asks for what is said: leave out --prompt, --prompts_file and --json")
    if not prompts and not ask:
        piped = sys.stdin.read().removesuffix("\n")
        if not piped:
            raise ValueError("there is no prompt: give --prompt=TEXT (--prompt= for a text from nothing), --prompts_file, or text on the standard input")
        prompts = [line for line in piped.splitlines() if line.strip()] if values.classify else [piped]

    from jaxlm.train.saved import open_run

    run = open_run(values.workdir, values.step, log=functools.partial(print, file=sys.stderr))
    labelled = run.config.model.output.endswith("_labels")
    if values.classify != labelled:
        raise ValueError(f"{values.workdir} holds a model that gives labels: ask with --classify" if labelled else
                         f"--classify needs a model with labels, such as jaxlm train --config=sentiment makes; {values.workdir} holds one without")
    if labelled:
        return _label(run, prompts or [input("text> ")], values.json)
    if run.config.model.kind != "decoder":
        raise ValueError(f"{values.workdir} holds an encoder, which fills in masked tokens and does not continue text: jaxlm eval scores it")
    if values.chat:
        return _chat(run, settings, values)
    if not ask:
        _answer(run, prompts, settings, values)
    while ask:
        try:
            prompt = input("prompt (Ctrl-D ends)> ")
        except EOFError:
            print()
            break
        try:
            _answer(run, [prompt], settings, values)
        except ValueError as error:  # too long: the next may be shorter
            print(f"jaxlm: {error}", file=sys.stderr)
    return 0


def _label(run, prompts: list[str], as_json: bool) -> int:
    import json

    from jaxlm.train import classified

    if empty := [prompt for prompt in prompts if not prompt.strip()]:
        raise ValueError(f"the text {empty[0]!r} is empty: there is nothing to label")
    for prompt, answer in zip(prompts, classified.label(run, prompts)):
        if as_json:
            print(json.dumps({"prompt": prompt, **answer, "step": run.step}, ensure_ascii=False), flush=True)
        elif "tags" in answer:
            print(" ".join(word if tag == "O" else f"{word}[{tag} {p:.2f}]" for word, tag, p in answer["tags"]), flush=True)
        else:
            shown = f"{answer['number']:.6g}" if "number" in answer else ", ".join(f"{name} {p:.3f}" for name, p in answer["labels"]) or "none"
            print(f"{shown:<24}  {prompt}", flush=True)
    return 0


def _chat(run, settings, values: flags.FlagValues) -> int:
    import sys

    from jaxlm.serve import engine, talk

    cfg = run.config.model
    if cfg.encoder_layers:
        raise ValueError(f"{run.workdir} holds an encoder-decoder, which does not chat: give --prompt")
    encode = talk.chatting(run.tokenizer, values.chat_template or run.chat_template)
    # Four chats' worth of pages: what was said stays, whatever is asked next.
    limits = engine.Limits(rows=4, cache_bytes=2**62)
    served = engine.Engine(run.model, run.params, cfg, run.tokenizer, limits)
    talk.talk(served, encode, settings, values.max_tokens or min(512, cfg.context // 2), values.system, sys.stdout)
    served.close()
    return 0


def _prompts(given: list[str], file: str) -> list[str]:
    import pathlib

    if not file:
        return list(given)
    try:
        lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts_file={file} is not UTF-8 (byte {error.start})") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts_file={file} holds no prompt: write one on each line")
    return [*given, *found]


def _answer(run, prompts: list[str], settings, values: flags.FlagValues) -> None:
    import json
    import sys

    from jaxlm import generate

    jobs = [(prompt, sample) for prompt in prompts for sample in range(values.samples)]
    longest = 0 if run.config.model.encoder_layers else 1 + max(len(run.tokenizer.encode(prompt)) for prompt in prompts)  # an encoder has rows of its own
    room = run.config.model.context - longest
    between = "\n" if run.config.model.encoder_layers else ""  # an output does not continue its input
    printer = _Printer([prompt + between for prompt, _ in jobs], sys.stdout, values.samples) if values.stream and not values.json else None
    texts = generate.complete(
        run.model, run.params, run.tokenizer, [prompt for prompt, _ in jobs], max_tokens=values.max_tokens or max(1, min(USUAL_TOKENS, room)),
        context=run.config.model.context, settings=settings, stop=[stop.replace("\\n", "\n").replace("\\t", "\t") for stop in values.stop],
        special=run.config.objective.name == "span_corruption", on_text=printer)
    if values.json:
        for (prompt, sample), text in zip(jobs, texts):
            print(json.dumps({"prompt": prompt, "sample": sample, "text": text, "step": run.step, "seed": settings.seed}, ensure_ascii=False), flush=True)
    elif printer is None:
        printer = _Printer([prompt + between for prompt, _ in jobs], sys.stdout, values.samples)
        for row, text in enumerate(texts):
            printer(row, text)
            printer(row, None)


class _Printer:
    """Prints the first row that has not ended as it comes and keeps back the text of the others until it is their turn."""

    def __init__(self, prompts: list[str], out, samples: int):
        self._prompts, self._out, self._samples = prompts, out, samples
        self._waiting, self._ended, self._row, self._begun = [""] * len(prompts), [False] * len(prompts), 0, False

    def __call__(self, row: int, text: str | None) -> None:
        if text is None:
            self._ended[row] = True
        else:
            self._waiting[row] += text
        while self._row < len(self._prompts):
            if not self._begun:
                self._begin()
            self._out.write(self._waiting[self._row])
            self._waiting[self._row] = ""
            if not self._ended[self._row]:
                break
            self._out.write("\n")
            self._row, self._begun = self._row + 1, False
        self._out.flush()

    def _begin(self) -> None:
        self._begun = True
        dim, plain = ("\x1b[2m", "\x1b[0m") if self._out.isatty() else ("", "")
        if len(self._prompts) > 1:
            number, sample = divmod(self._row, self._samples)
            self._out.write(f"{dim}--- prompt {number + 1}" + (f", sample {sample + 1}" if self._samples > 1 else "") + f" ---{plain}\n")
        self._out.write(f"{dim}{self._prompts[self._row]}{plain}")
