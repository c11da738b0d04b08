"""Names of people, places and other things in sentences: a tag for each word (BIO), by a pretrained encoder.

    jaxlm train --config=token_classify --workdir=runs/names --config.data.source=sentences.jsonl --config.train.init_from=hf:bert-base-cased

where a line of sentences.jsonl is {"tokens": ["Anna", "lives", "in", "Rome"], "tags": ["B-PER", "O", "O", "B-LOC"]}; a CSV, Parquet or Hugging Face data set
with such columns will do too, and both may be one text with spaces between the words. Other kinds of tags (parts of speech) work the same: the figures of
"entities" are then those of runs of one tag. The best checkpoint is that of the best entity F1, counted as seqeval does.

Predicted, not run here: 3 epochs of CoNLL-2003 (14,041 sentences, some 32 tokens each with padding) with BERT base are 7e14 FLOP, a few minutes on one GPU;
the paper of BERT reports an F1 of 92.4 on its test split.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(source=("sentences.jsonl",), text_key="tokens", label_key="tags", validation=0.1, test=0.1, sequence_length=128, batch_size=32))
    c.objective = ConfigDict(dict(name="token_classify"))
    c.optim = ConfigDict(dict(name="adamw", lr=5e-5, schedule="linear", warmup="10%", end_lr_ratio=0.0, weight_decay=0.01, b2=0.999))
    c.train = ConfigDict(dict(steps="3 epochs", init_from="hf:bert-base-cased", eval_every="0.5 epochs", eval_documents=0))
    c.checkpoint = ConfigDict(dict(every="0.5 epochs", metric="f1", keep_last=1))
    return c
