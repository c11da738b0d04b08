"""A smaller model learns from a larger one: from its distribution over the next token, beside the true tokens.

    jaxlm train --config=distill --workdir=runs/small --config.data.source=text/*.jsonl --config.tokenizer.path=runs/large/data/tokenizer.model
        (objective.teacher: runs/large)
    jaxlm train --config=distill:layers --workdir=runs/small --config.data.source=text/*.jsonl --config.objective.teacher=gguf:FILE
        --config.train.init_from=gguf:FILE --config.train.init_layers="(0,4,8,12)"
    jaxlm train --config=distill:bert --workdir=runs/distilbert --config.data.source=text/*.jsonl
        (objective.teacher and train.init_from: hf:models/bert-base-uncased)

The teacher may be of any size and must have the same tokenizer. With `:layers` the student begins with some of its layers (train.init_layers) and is as wide
as it. `:bert` is DistilBERT's recipe (Sanh et al. 2019): every other layer of a BERT of twelve, masked tokens, and 5 KL + 2 MLM + 1 cosine at temperature 2.
The teacher's weights lie beside the student's, in bfloat16, split over the mesh as these are.
"""

from ml_collections import ConfigDict


def get_config(kind=None):
    if kind not in (None, "layers", "bert"):
        raise ValueError(f"distill:{kind} is not known; allowed: distill, distill:layers, distill:bert")
    c = ConfigDict()
    c.data = ConfigDict(dict(sequence_length=256, batch_size=16, validation=0.02, test=0.05))
    c.optim = ConfigDict(dict(lr=1e-3, warmup="5%", weight_decay=0.1, frozen_dtype="bfloat16"))
    c.train = ConfigDict(dict(steps="1 epoch", eval_every="10%"))
    c.checkpoint = ConfigDict(dict(every="10%"))
    if kind is None:
        c.model = ConfigDict(dict(context=256, layers=4, width=256, heads=4))
    if kind != "bert":
        c.objective = ConfigDict(dict(name="next_token", teacher="runs/large", teacher_kl=0.5, teacher_hard=0.5, teacher_temperature=2.0))
    else:
        c.objective = ConfigDict(dict(name="masked_token", teacher_kl=5.0, teacher_hard=2.0, teacher_cosine=1.0, teacher_temperature=2.0))
        c.objective.teacher = "hf:models/bert-base-uncased"
        c.train.update(init_from="hf:models/bert-base-uncased", init_layers=(0, 2, 4, 7, 9, 11))
        c.data.update(sequence_length=512)
        c.optim.update(lr=5e-4, schedule="linear", end_lr_ratio=0.0, weight_decay=0.01, b2=0.98, eps=1e-6)
    return c
