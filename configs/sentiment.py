"""Reviews into positive and negative: a pretrained encoder, fine-tuned on a table of texts and labels, beside simpler models.

    jaxlm train --config=sentiment --workdir=runs/sentiment --config.data.source=reviews.csv --config.train.init_from=hf:all-MiniLM-L6-v2

where reviews.csv (or .tsv, .jsonl, .parquet, tfds:NAME, a folder of Hugging Face datasets) has the columns text and label (config.data.text_key and
config.data.label_key say other names), and init_from names the folder of any BERT, RoBERTa, DistilBERT or decoder, or the workdir of a run.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(source=("reviews.csv",), text_key="text", label_key="label", validation=0.05, test=0.2, sequence_length=128, batch_size=16))
    c.objective = ConfigDict(dict(name="classify"))
    c.optim = ConfigDict(dict(name="adamw", lr=5e-5, schedule="linear", warmup="10%", end_lr_ratio=0.0, weight_decay=0.01, b2=0.999, layer_decay=0.9))
    c.train = ConfigDict(dict(steps="3 epochs", init_from="hf:all-MiniLM-L6-v2", eval_every="0.5 epochs", eval_documents=0, patience=3))
    c.checkpoint = ConfigDict(dict(every="0.5 epochs", metric="loss", keep_last=1))
    return c
