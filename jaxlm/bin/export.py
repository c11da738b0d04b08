"""jaxlm export: writes a checkpoint as a Hugging Face directory, which from_pretrained loads with nothing added, as a GGUF file, or as StableHLO.

  jaxlm export --workdir=runs/quickstart --to=exports/quickstart
  jaxlm export --workdir=runs/quickstart --to=exports/quickstart.gguf --dtype=q8_0
  jaxlm export --workdir=runs/qwen3 --step=2000 --to=exports/qwen3 --dtype=bfloat16

It writes config.json, model.safetensors (shards of at most 5 GB with their index when it is larger), the tokenizer's files and the model card as
README.md (see jaxlm report; what you wrote in WORKDIR/MODEL_CARD.md is in it), reads everything back and compares it; a name that ends in .gguf asks for
one file for llama.cpp and Ollama instead, tokenizer inside. The moving average of the parameters is written where the run keeps one. float32 is exact;
bfloat16 (directories) and float16 and q8_0 (GGUF) are smaller.

The architecture is the plainest one that computes what the model does: Llama for most decoders with rotary positions. --architecture chooses
another. It prints which parameter became which tensor.

A run with adapters (lora.rank) is written with these merged into its base. --adapter writes them alone, in the layout of the package PEFT, for
peft.PeftModel.from_pretrained(model, "exports/adapter") on the same base:

  jaxlm export --workdir=runs/sft --to=exports/adapter --adapter

--stablehlo writes programs that jax runs without this package, on CPUs, GPUs and TPUs: the forward pass over rows of --length tokens and, of a decoder, the
step that draws logits for one more token; any number of rows. Weights, a script and a sample lie beside them; it is run in a process of its own before it
says done. Needs pip install 'jaxlm[export]'.

  jaxlm export --workdir=runs/quickstart --to=exports/program --stablehlo --length=256

Next: transformers.AutoModelForCausalLM.from_pretrained("exports/quickstart")
"""

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint to write; without it, the newest whole one.", flag_values=values)
    flags.DEFINE_string("to", None, "Directory or .gguf file to make.", required=True, flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16", "q8_0"],
                      "Of the tensors: float32 or bfloat16 in a directory; float32, float16 or q8_0 in GGUF.", flag_values=values)
    flags.DEFINE_bool("adapter", False, "Write the adapters alone, as PEFT does, rather than the whole model.", flag_values=values)
    flags.DEFINE_bool("stablehlo", False, "Write programs for jax alone, rather than a directory for transformers.", flag_values=values)
    flags.DEFINE_integer("length", 0, "Tokens of a row of a StableHLO program; 0: the model's context, at most 512.", flag_values=values, lower_bound=0)
    flags.DEFINE_string("architecture", "", "Class in transformers, such as MistralForCausalLM; without it, the plainest that fits.", flag_values=values)


def main(values: flags.FlagValues) -> int:
    import dataclasses
    import os
    import pathlib
    import tempfile

    to = pathlib.Path(values.to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to={to} exists and is not an empty directory: choose another")
    allowed = ("float32", "float16", "q8_0") if to.suffix == ".gguf" else ("float32", "bfloat16")
    if values.dtype not in allowed:
        raise ValueError(f"--dtype={values.dtype} is not for {to.name}: allowed here are {', '.join(allowed)}")

    if values.adapter and values.stablehlo:
        raise ValueError("--adapter and --stablehlo do not go together: a StableHLO program has the adapters merged")
    if values.length and not values.stablehlo:
        raise ValueError("--length is of StableHLO programs: add --stablehlo")
    if values.adapter:
        return _write_adapter(values, to)
    if values.stablehlo:
        return _write_stablehlo(values, to)

    from jaxlm import mup
    from jaxlm.data import chat, sums
    from jaxlm.interop import gguf, hf
    from jaxlm.train import card, saved, summary

    run = saved.open_run(values.workdir, values.step)
    if run.config.model.kind == "decoder" and run.config.model.labels:
        raise ValueError(f"{values.workdir} holds a decoder with a head for labels, for which neither format has a place here (encoders with labels can be "
                         "exported): use jaxlm generate --classify")
    cfg, params = mup.folded(run.config.model, run.params)
    tokenizer = run.tokenizer
    if run.chat_template:
        tokenizer = dataclasses.replace(tokenizer, files={**tokenizer.files, chat.FILE: run.chat_template.encode()})
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".gguf":
        file = gguf.write(to, cfg, params, tokenizer, {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}[values.dtype])
        print(f"{to}, step {run.step} of {run.workdir}, read back and compared:\n{gguf.mapping(file)}")
        return 0
    # Whole or not at all.
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        folder = pathlib.Path(temporary) / "export"
        folder.mkdir()
        source = hf.save(folder, cfg, params, dtype=values.dtype, architecture=values.architecture,
                         extra={"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad})
        tokenizer.write_huggingface(folder)
        written = run.workdir / card.FILE
        card.write(summary.gather(run.workdir, run.step), folder / "README.md", written.read_text(encoding="utf-8") if written.is_file() else "")
        sums.write(folder)
        if to.exists():
            to.rmdir()
        os.replace(folder, to)
    print(f"{source.family.architecture} in {to}, step {run.step} of {run.workdir}, read back and compared:\n{hf.mapping(source)}")
    return 0


def _write_stablehlo(values: flags.FlagValues, to) -> int:
    """Whole or not at all, as the model."""
    import os
    import pathlib
    import tempfile

    from jaxlm.data import sums
    from jaxlm.interop import stablehlo
    from jaxlm.train import saved

    if to.suffix == ".gguf":
        raise ValueError(f"--to={to} is the name of a GGUF file: --stablehlo makes a directory")
    run = saved.open_run(values.workdir, values.step)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        folder = pathlib.Path(temporary) / "export"
        folder.mkdir()
        error = stablehlo.write(folder, run.config.model, run.model, run.params, values.length or min(run.config.model.context, 512), values.dtype)
        run.tokenizer.write_huggingface(folder)
        sums.write(folder)
        if to.exists():
            to.rmdir()
        os.replace(folder, to)
    print(f"StableHLO in {to}, step {run.step} of {run.workdir}, computed again by jax alone: largest difference {error:.2g} of the largest value\n"
          f"Next: python {to}/run.py --check")
    return 0


def _write_adapter(values: flags.FlagValues, to) -> int:
    """Whole or not at all, as the model."""
    import os
    import pathlib
    import tempfile

    from jaxlm.data import sums
    from jaxlm.interop import peft
    from jaxlm.train import saved

    if values.dtype != "float32":
        raise ValueError(f"--dtype={values.dtype} is not for --adapter: adapters are small and written in float32")
    config, step, adapters, told = saved.adapters(values.workdir, values.step)
    if config.model.mup_head_size not in (0, config.model.filled().head_size):
        raise ValueError("with model.mup_head_size the exported base has other query weights than the adapters were trained with: merge them, leave --adapter out")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        folder = pathlib.Path(temporary) / "export"
        folder.mkdir()
        modules = peft.save(folder, config.model, config.lora, adapters, base=told["origin"], fingerprint=told["fingerprint"], architecture=values.architecture)
        sums.write(folder)
        if to.exists():
            to.rmdir()
        os.replace(folder, to)
    print(f"adapters of rank {config.lora.rank} for {', '.join(modules)} in {to}, step {step} of {values.workdir}, for the base {told['origin']}, read back "
          "and compared")
    return 0
