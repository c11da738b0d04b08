"""jaxlm import: turns a Hugging Face directory or a GGUF file into a checkpoint that train, eval, generate and export use.

  jaxlm import --from=models/Qwen3-0.6B --to=runs/qwen3
  jaxlm import --from=models/SmolLM2-135M-Instruct.Q4_1.gguf --to=runs/smollm2
  jaxlm generate --workdir=runs/qwen3 --prompt="The capital of France is"
  jaxlm train --config=my_recipe.py --workdir=runs/mine --config.train.init_from=runs/qwen3      (or hf:models/Qwen3-0.6B, without an import)

The directory holds config.json, model.safetensors (or its shards with their index) and the tokenizer's files, as save_pretrained of
transformers writes them and huggingface.co offers them. Known are GPT-2, GPT-NeoX (Pythia), Llama 1 to 3, Mistral, Mixtral, Qwen 2, 2.5 and
3, Qwen 2 and 3 MoE, OLMo 2, Gemma 1 to 3 (text) and T5, and the encoders BERT, RoBERTa and DistilBERT (masked tokens, the base model, labels of sequences or
of tokens). Pickled weights (.bin) are refused: reading them runs code. A .gguf file (Llama, Qwen, Gemma and GPT-2 families) holds everything itself;
its weights are dequantised.

It prints which tensor becomes which parameter and fails if one is missing, left over or of another shape. Tensors are read one at a time onto
the devices, written as the checkpoint of step 0 of the new folder --to, read back and compared bit by bit with the files.
"""

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("from", None, "Hugging Face directory, or a .gguf file.", required=True, flag_values=values)
    flags.DEFINE_string("to", None, "Workdir to make.", required=True, flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in; parameters are kept in float32.", flag_values=values)


def main(values: flags.FlagValues) -> int:
    import pathlib

    from jaxlm.train import initial

    model = initial.import_model(pathlib.Path(values["from"].value), pathlib.Path(values.to), dtype=values.dtype)
    if model.kind == "encoder":
        print(f"next: jaxlm train --config=my_recipe.py --workdir=runs/mine --config.objective.name=masked_token --config.train.init_from={values.to}")
    else:
        print(f'next: jaxlm generate --workdir={values.to} --prompt="..."')
    return 0
