"""A pretrained model reads more text, of your field for example: the next token, all weights, a small learning rate that is warmed up again.

    jaxlm train --config=continue_pretraining --workdir=runs/more --config.data.source=field/*.jsonl --config.train.init_from=hf:models/SmolLM2-135M

Mix in some text of the kind that the model was trained on, or it forgets: --config.data.source='field=field/,general=general/' with
--config.data.weights="(('field', 0.7), ('general', 0.3))". jaxlm eval --data=FOLDER compares before (the import's workdir) and after.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(sequence_length=1024, batch_size=8, validation=0.02, test=0.02))
    c.objective = ConfigDict(dict(chunk_rows=2048))
    c.optim = ConfigDict(dict(lr=1e-4, schedule="wsd", warmup="5%", decay="20%", end_lr_ratio=0.0))
    c.model = ConfigDict(dict(remat="dots"))
    c.train = ConfigDict(dict(init_from="hf:models/base", steps="1 epoch", eval_every="10%"))
    c.checkpoint = ConfigDict(dict(every="10%"))
    return c
