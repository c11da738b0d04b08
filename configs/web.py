"""Raw web pages to a small model: every step of preparation switched on, with published thresholds.

    jaxlm prepare --config=web --config.data.source='web=crawl/' --out=data/web      .warc.gz, .html, .jsonl ...; then read data/web/report.html
    jaxlm train --config=web --config.data.dir=data/web --workdir=runs/web

English by default: --config.clean.languages=de for German (then also --config.filter.min_stop_words=0, whose words are English).
Leave out of training what you will be measured on: --config.clean.decontaminate='(("hellaswag", "hellaswag.jsonl:ctx"),)'.
The model is a Llama of 30 M parameters; predicted, not run here: 600 M tokens (20 per parameter) are 1.1e17 FLOP, some 10 minutes on one H100.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(validation=0.005, test=0.005, on_error="skip", sequence_length=1024, batch_size=64, threads=4))
    c.clean = ConfigDict(dict(repair=True, normalise=True, languages=("en",), pii=("email", "phone", "ip", "card", "iban", "key")))
    # Gopher (Rae et al. 2021), and of C4 (Raffel et al. 2020) and FineWeb (Penedo et al. 2024) what ablations found to help.
    c.filter = ConfigDict(dict(
        min_words=50, max_words=100_000, min_mean_word_length=3.0, max_mean_word_length=10.0, max_symbols_per_word=0.1, max_bullet_lines=0.9,
        max_ellipsis_lines=0.3, min_alphabetic_words=0.8, min_stop_words=2, max_duplicate_lines=0.3, max_duplicate_line_characters=0.2,
        max_duplicate_paragraphs=0.3, max_duplicate_paragraph_characters=0.2, max_top_2gram=0.20, max_top_3gram=0.18, max_top_4gram=0.16,
        max_duplicate_5grams=0.15, max_duplicate_6grams=0.14, max_duplicate_7grams=0.13, max_duplicate_8grams=0.12, max_duplicate_9grams=0.11,
        max_duplicate_10grams=0.10, drop_javascript_lines=True, lorem_ipsum=1, min_closed_lines=0.12, max_short_lines=0.67, max_newlines_per_word=0.3))
    c.dedup = ConfigDict(dict(exact=True, line_length=100, near=0.75))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=16384))
    c.model = ConfigDict(dict(context=1024, layers=8, width=512, heads=8, feedforward=1408, dtype="bfloat16"))
    c.optim = ConfigDict(dict(name="adamw", lr=1e-3, warmup="2%", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="600e6 tokens", eval_every="5%", eval_documents=500))
    c.checkpoint = ConfigDict(dict(every="5%"))
    return c
