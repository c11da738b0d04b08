"""Everything in jaxlm that reads bytes of others, each as seeds (valid inputs) and a function that is fed with changed ones.

A function may raise what a user is shown as one line (`allowed`), and nothing else. It gets the folder in which the files of the input lie.
"""

import asyncio
import functools
import gzip
import hashlib
import io
import itertools
import json
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlm import cli
from tests.fuzz.mutate import Files

HERE = pathlib.Path(__file__).parent
TOKENIZERS = HERE.parent / "data" / "fixtures" / "tokenizers"
MODELS = HERE.parent / "interop" / "fixtures"
TEXT = "Once upon a time, there was a fox: “quick”, brown & 語 🙂.\n\nIt said: one\ttwo  three.\n" * 8


class Target(NamedTuple):
    seeds: Callable[[], Sequence[Files]]
    feed: Callable[[pathlib.Path], Any]


def allowed(error: BaseException) -> bool:
    """Whether the command line shows it as one line (see `cli.run`): an OSError, or a ValueError that jaxlm itself raised."""
    return isinstance(error, OSError) or isinstance(error, ValueError) and cli._raised_here(error)


# --- texts --------------------------------------------------------------------------------------------------------------------------------


def _keys():
    from jaxlm.data.readers import Keys
    return Keys("text", id="id", licence="licence")


def _reader(name: str, keys=None):
    def feed(folder: pathlib.Path) -> None:
        from jaxlm.data import extract, readers, web
        reader = {"table": readers.table, "json_lines": readers.json_lines, "text": readers.text, "parquet": readers.parquet, "arrow": readers.arrow,
                  "warc": web.warc, "page": web.page}[name]
        for path in sorted(folder.iterdir()):
            for record in itertools.islice(reader(str(path), keys() if keys else _keys()), 20_000):
                if isinstance(record, readers.Record) and isinstance(record.text, bytes):
                    text = extract.decode(record.text, record.html)[0]
                    if record.html:
                        text = extract.main_content(text, "resiliparse")
                    text.encode()
    return feed


ROWS = [{"text": TEXT, "id": i, "licence": "MIT"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()
TABLE = "id,licence,text\n" + "".join(f'{i},MIT,"a ""quoted""\ntext, with {i}"\n' for i in range(5))


def _texts() -> list[Files]:
    return [{"a.txt": TEXT.encode()}, {"a.txt": TEXT.encode("utf-16")}, {"a.txt": (TEXT * 300).encode()}, {"a.txt": b"caf\xe9 " * 20_000}]


def _tables() -> list[Files]:
    return [{"a.csv": TABLE.encode()}, {"a.tsv": TABLE.replace(",", "\t").replace('"', "").encode()}, {"a.csv": ("\ufeff" + TABLE * 40).encode()}]


def _packed() -> list[Files]:
    import zstandard
    zst = zstandard.ZstdCompressor().compress
    plain = [("a.jsonl", LINES), ("a.csv", TABLE.encode()), ("a.txt", TEXT.encode())]
    bombs = [b"x" * (70 << 20), b'{"text": "' + b"y" * (70 << 20) + b'"}\n']
    return [*({f"{name}.gz": gzip.compress(data) + gzip.compress(data)} for name, data in plain), *({f"{name}.zst": zst(data) + zst(data)} for name, data in plain),
            {"a.jsonl.gz": gzip.compress(bombs[1], 1)}, {"a.jsonl.zst": zst(bombs[1])}, {"a.csv.zst": zst(bombs[0])}]


def _feed_packed(folder: pathlib.Path) -> None:
    kinds = {".jsonl": "json_lines", ".csv": "table", ".txt": "text"}
    _reader(kinds[next(iter(folder.iterdir())).suffixes[-2]])(folder)


def _columns() -> list[Files]:
    import pyarrow
    from pyarrow import parquet
    found = []
    for compression in ("none", "snappy", "zstd", "gzip"):
        out = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": [TEXT, "b"] * 30, "id": list(range(60)), "licence": ["MIT", None] * 30}), out, compression=compression)
        found.append({"a.parquet": out.getvalue()})
    return found


def _arrows() -> list[Files]:
    import pyarrow
    from pyarrow import ipc
    table, found = pyarrow.table({"text": [TEXT, "b"] * 3, "id": list(range(6)), "licence": ["MIT", None] * 3}), []
    for writer in (ipc.new_stream, ipc.new_file):
        out = io.BytesIO()
        with writer(out, table.schema) as file:
            file.write_table(table)
        found.append({"a.arrow": out.getvalue()})
    return found


PAGE = ("<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>A fox</title><script>var x = '<p>';</script><style>p {}</style></head><body><nav><ul><li>"
        "<a href=/>Home</a></ul></nav><main><article><h1>The fox</h1>" + "<p>It was a <b>quick</b> fox &amp; it ran &#8212; far, far away over the hills.</p>" * 6
        + "<table><tr><td>1<td>2</table><pre>a\n b</pre></article></main><footer>(c) <!-- x --></footer></body></html>")


def _pages() -> list[Files]:
    return [{"a.html": PAGE.encode()}, {"a.html": PAGE.replace("utf-8", "windows-1251").encode("cp1251")}, {"a.html": PAGE.encode("utf-16")},
            {"a.html": PAGE.replace("utf-8", "gb2312").replace("fox", "狐狸").encode("gb18030")}, {"a.html": ("<div>" * 500 + PAGE).encode()}]


def _feed_page(folder: pathlib.Path) -> None:
    from jaxlm.data import extract
    data = (folder / "a.html").read_bytes()
    text = extract.decode(data, html=True)[0]
    for extractor in ("resiliparse", "trafilatura"):
        extract.main_content(text, extractor).encode()


def _warcs() -> list[Files]:
    http = lambda body, *fields: b"\r\n".join([b"HTTP/1.1 200 OK", b"content-type: text/html; charset=utf-8", *fields, b"", body])
    body = PAGE.encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i:i + 300]), body[i:i + 300]) for i in range(0, len(body), 300)) + b"0\r\n\r\n"
    answers = [http(body), http(gzip.compress(body), b"content-encoding: gzip"), http(zlib.compress(body), b"content-encoding: deflate"),
               http(chunks, b"transfer-encoding: chunked"), http(gzip.compress(b"z" * (70 << 20), 1), b"content-encoding: gzip")]

    def record(kind: bytes, mime: bytes, data: bytes) -> bytes:
        head = [b"WARC/1.0", b"WARC-Type: " + kind, b"WARC-Target-URI: http://x.example/", b"WARC-Record-ID: <urn:uuid:1>", b"Content-Type: " + mime,
                b"Content-Length: %d" % len(data), b"", b""]
        return b"\r\n".join(head) + data + b"\r\n\r\n"

    records = [record(b"warcinfo", b"application/warc-fields", b"a: b\r\n"), *(record(b"response", b"application/http; msgtype=response", one) for one in answers),
               record(b"conversion", b"text/plain", TEXT.encode())]
    return [{"a.warc": b"".join(records)}, {"a.warc.gz": b"".join(map(gzip.compress, records))}, {"a.warc": records[1]}, {"a.warc.gz": gzip.compress(records[1] * 3)}]


def _chats() -> list[Files]:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": TEXT[:60]}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": chat}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"instruction": "Do it", "input": "x", "output": "done"}]
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": chat, "rejected": [*chat[:-1], {"role": "assistant", "content": "No."}]}]
    lines = lambda some: "".join(json.dumps(row) + "\n" for row in some).encode()
    return [{"chat.jsonl": lines(rows)}, {"chat.json": json.dumps(rows).encode()}, {"preference.jsonl": lines(pairs)}, {"preference.json": json.dumps(pairs).encode()},
            *({"chat.jsonl": lines([row])} for row in rows), *({"preference.jsonl": lines([row])} for row in pairs)]


def _feed_chats(folder: pathlib.Path) -> None:
    from jaxlm.data import chat, conversations, readers
    tokenizer = _bytes_tokenizer()
    for path in folder.iterdir():
        for record in readers.json_lines(str(path), readers.Keys("text", form=path.stem)):
            if isinstance(record, readers.Record):
                for messages in conversations.sides(record.text):
                    chat.template("chatml", tokenizer).encode_spans(tokenizer, messages)


def _labels() -> list[Files]:
    rows = [{"text": "good", "label": 1, "about": "x"}, {"text": ["a", "b"], "label": ["N", "O"], "about": 2}, {"text": "bad", "label": "b", "about": None}]
    return [{"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}, *({"a.jsonl": json.dumps(row).encode()} for row in rows)]


def _label_keys():
    from jaxlm.data.readers import Keys
    return Keys("text", label="label", fields=("about",))


def _states() -> list[Files]:
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_indices_data_files": None}
    return [{"state.json": json.dumps(state).encode(), "data-00000-of-00001.arrow": b"x"}, {"dataset_dict.json": b'{"splits": ["test", "validation"]}'}]


def _feed_state(folder: pathlib.Path) -> None:
    from jaxlm.data import hub
    for path in hub.files(str(folder)):
        assert pathlib.Path(path).resolve().is_relative_to(folder), path


# --- tokenizers ---------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _bytes_tokenizer():
    from jaxlm.data import tokenizer
    return tokenizer.from_bytes(b'{"kind": "bytes"}\n')


@functools.cache
def _own(kind: str) -> bytes:
    from jaxlm.config import TokenizerConfig
    from jaxlm.data import tokenizer
    return tokenizer.train([TEXT, "the quick brown fox jumps over the lazy dog " * 20], TokenizerConfig(kind=kind, vocab_size=308, sentinels=2)).model


def _folder(path: pathlib.Path) -> Files:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "reference.json" and file.stat().st_size < 1 << 20}


def _sentencepieces() -> list[Files]:
    return [{"tokenizer.model": _own("bpe")}, {"tokenizer.model": _own("unigram")}, *(files for path in sorted(TOKENIZERS.iterdir())
            if {"tokenizer.model", "spiece.model"} & (files := _folder(path)).keys() and not (files := dict(files)).pop("tokenizer.json", None))]


def _tokenizer_folders() -> list[Files]:
    from jaxlm.data import tokenizer
    folders = [_folder(path) for path in sorted(TOKENIZERS.iterdir())]
    held = [{"tokenizer.hf.json": tokenizer.load(path).model} for path in sorted(TOKENIZERS.iterdir())]
    return [*folders, *held[:3]]


def _feed_tokenizer(folder: pathlib.Path) -> None:
    from jaxlm.data import tokenizer
    tok = tokenizer.load(folder)
    for special in (False, True):
        ids = tok.encode(TEXT[:200], special)
        tok.decode([*ids, -1, tok.vocab_size, 2**31])
    tok.pieces(ids)
    tok.special_tokens, tok.separators, tok.chat_template, tok.begins_word
    (folder / "out").mkdir()
    tok.save(folder / "out")
    tok.write_huggingface(folder / "out")


# --- weights ------------------------------------------------------------------------------------------------------------------------------


def _hf_folders() -> list[Files]:
    found = []
    for name in ("llama", "gpt2", "mixtral", "gemma3", "qwen3_moe", "encoders/bert_sequence", "encdec/t5", "mistral", "gpt_neox", "olmo2"):
        found.append({file: (MODELS / name / file).read_bytes() for file in ("config.json", "model.safetensors")})
    weights = found[0]["model.safetensors"]
    names = [name for name in json.loads(weights[8:8 + int.from_bytes(weights[:8], "little")]) if name != "__metadata__"]
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}).encode()
    return [*found, {"config.json": found[0]["config.json"], "model.safetensors.index.json": index, "model-00001-of-00001.safetensors": weights}]


def _feed_hf(folder: pathlib.Path) -> None:
    from jaxlm.interop import hf, hf_files
    source = hf.open_directory(folder)
    for name in source.files.tensors:
        hf_files.finite(source.files.read(name), name)
    hf.mapping(source)


def _headers() -> list[Files]:
    """Headers alone, much faster to read than models."""
    def file(header: Any, size: int) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(size)

    two = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
           "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}
    return [{"model.safetensors": file(two, 32)}, {"model.safetensors": file({}, 0)},
            {"model.safetensors": file({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, 8)}]


def _feed_header(folder: pathlib.Path) -> None:
    from jaxlm.interop import hf_files
    files = hf_files.open_files(folder)
    for name in files.tensors:
        files.read(name)


@functools.cache
def _ggufs() -> list[Files]:
    from tests.interop.test_gguf import FIXTURES, random_params
    from jaxlm.config import TransformerConfig
    from jaxlm.data import tokenizer
    from jaxlm.interop import gguf
    common, found = dict(vocab_size=384, context=64, layers=1, width=32, heads=4, feedforward=32), []
    llama = TransformerConfig(**common, kv_heads=2, head_size=16, norm_eps=1e-6, rope_scaling="llama3", rope_factor=8.0, rope_theta=500_000.0)
    gpt2 = TransformerConfig(**common, norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "m.gguf"
        for cfg, tok, dtype in ((llama, tokenizer.load(FIXTURES / "byte_level"), "f32"), (gpt2, tokenizer.from_bytes(_own("bpe")), "q8_0"),
                                (llama, tokenizer.from_bytes(_own("unigram")), "f16")):
            gguf.write(path, cfg, random_params(cfg), tok, dtype)
            found.append({"m.gguf": path.read_bytes()})
    # Headers alone are small, so that a change hits something; the weights are 40 to 160 KB.
    return found + [{"m.gguf": one["m.gguf"][:one["m.gguf"].index(b"output_norm.weight") + 2000]} for one in found]


def _feed_gguf(folder: pathlib.Path) -> None:
    from jaxlm.interop import gguf, gguf_header, hf_files
    path = folder / "m.gguf"
    header = gguf_header.read(path, gguf._block_sizes())
    for name in itertools.islice(header.tensors, 50):
        hf_files.finite(gguf._read(path, header, name), name)
    source = gguf.open_file(path)
    tok = gguf.tokenizer(source)
    tok.decode(tok.encode(TEXT[:100]))
    gguf.mapping(source)


def _adapters() -> list[Files]:
    from jaxlm.interop import hf_files
    import numpy as np
    cfg, adapters = _adapter_base()
    names = {f"base_model.model.model.layers.{layer}.self_attn.{x}_proj.lora_{side}.weight": shape for layer in range(2)
             for x, out in (("q", 16), ("v", 8)) for side, shape in (("A", (3, 16)), ("B", (out, 3)))}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6.0, "use_rslora": False, "use_dora": False, "bias": "none",
              "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        tensors = ((name, np.ones(shape, np.float32)) for name, shape in names.items())
        [path] = hf_files.write_files(pathlib.Path(folder), {name: (shape, np.dtype(np.float32)) for name, shape in names.items()}, tensors)
        weights = path.read_bytes()
    return [{"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights,
             "jaxlm.json": json.dumps({"base": "x", "fingerprint": "0" * 64}).encode()}]


def _adapter_base():
    from jaxlm.config import LoraConfig, TransformerConfig
    return TransformerConfig(vocab_size=64, context=32, layers=2, width=16, heads=4, kv_heads=2, feedforward=24), LoraConfig(rank=3, alpha=6.0)


def _feed_adapter(folder: pathlib.Path) -> None:
    from jaxlm.interop import peft
    cfg, adapters = _adapter_base()
    _, found = peft.load(folder, cfg, adapters)
    peft.check(folder, {path: leaf.shape for path, leaf in found.items()}, {})


# --- corpora ------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _corpora() -> list[Files]:
    from jaxlm.config import DataConfig, TokenizerConfig
    from jaxlm.data import prepare
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{TEXT} {i}", "label": "ab"[i % 2]}) + "\n" for i in range(12)))
        for name, more in (("plain", {}), ("labelled", {"label_key": "label"})):
            data = DataConfig(source=(str(folder / "a.jsonl"),), validation=0.2, test=0.2, shard_bytes=4000, **more)
            corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), folder / name, log=lambda line: None)
            kept = [shard_file for shard_file in corpus.folder.iterdir() if not shard_file.name.startswith("report")]
            found.append({path.name: path.read_bytes() for path in kept})
    return found


def _feed_corpus(folder: pathlib.Path, sign: bool = False) -> None:
    from jaxlm.data import shards
    if sign:
        _sign(folder)
    corpus = shards.open_corpus(folder)
    for split, index in corpus.splits.items():
        for document in range(min(3, len(index.tokens))):
            corpus.read(split, document)
            corpus.document_id(split, document)
            corpus.licence(split, document)
        corpus.examples(split)
    shards.verify(folder)


def _sign(folder: pathlib.Path) -> None:
    """Makes every checksum and size fit what the files hold: what somebody does who wants the corpus to be taken for whole."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        manifest.pop("sha256", None)

        def mend(tree):
            if isinstance(tree, dict):
                if isinstance(tree.get("file"), str) and (folder / tree["file"]).is_file() and (folder / tree["file"]).parent == folder:
                    data = (folder / tree["file"]).read_bytes()
                    tree |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                list(map(mend, tree.values()))
            elif isinstance(tree, list):
                list(map(mend, tree))

        mend(manifest)
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest))
    except (ValueError, AttributeError, TypeError, RecursionError, OSError):
        pass


# --- templates and tasks ------------------------------------------------------------------------------------------------------------------


HOSTILE = [
    "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}", "{{ 'x' * 1000000000 }}", "{{ ''.__class__.__mro__ }}",
    "{% set x = messages|list %}{% for a in 'x' * 1000000 %}{% for b in 'x' * 1000000 %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=7) %}{% for i in range(90000) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n > 1 }}",
    "{{ ([''] * 100000) | join('x' * 100000) }}", "{{ 'x' | indent(1000000000, true) }}", "{{ messages | tojson(indent=1000000000) }}",
    "{% set a = ['x'] * 9000 %}{% set b = [a] * 9000 %}{{ [b] * 9000 }}", "{{ ([['x'] * 9000] * 9000) | sum(start=[]) | length }}",
    "{{ messages | batch(1000000000, 'x') | list }}", "{{ messages | slice(1000000000) | list }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = ns.l + ['x' * 1000000 ~ i] %}{% endfor %}",
    "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ raise_exception('no\nway') }}", "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{{ cycler.__init__.__globals__ }}", "{{ strftime_now('%9999999999d') }}",
    "{% set x = 'a' * 1000000 %}{% for i in range(90000) %}{% set y = x | upper | lower | title %}{% endfor %}", "{{ ('a ' * 8000000).split() | length }}",
    "{{ dict(a=1) | xmlattr }}", "{{ 'x' | format }}", "{{ '%999999999d' % 1 }}", "{{ 'a'.ljust(1000000000) }}", "{{ 2 ** 10000000 }}", "{{ '{:>9999999}'.format(1) }}",
    "{{ (1, 2) * 99999999 }}", "{{ messages | map(attribute='__class__') | list }}", "{{ 'x' | attr('__class__') }}", "{{ [1] | map('format') | list }}",
    "{% generation %}{{ 'x' * 99999 }}{% endgeneration %}", "{{ 'aaaaaaaa' | replace('', 'x' * 9999999) }}", "{{ 'a'.replace('a', 'b' * 9999999999) }}",
    "{{ range(1000000000) | list }}", "{{ range(90000000) | unique | list | length }}", "{{ range(90000000) | groupby('a') }}",
    "{% call(x) m() %}{% endcall %}", "{% set x %}{{ 'y' * 999999 }}{% endset %}{{ x * 999999 }}", "{{ 'x'|string * 10|int }}", "{{ lipsum(9999) }}",
    "{{ ('x' * 1000000) | urlize }}", "{{ range(1000000000000) | list | length }}", "{{ ('<' * 1000000) | escape | escape | escape | escape | length }}",
    "{{ 'x'.encode('utf-16') }}", "{{ 0 / 0 }}", "{{ [] | first | upper }}", "{{ ('\\ud800') }}", "{{ messages[100000000000000000000] }}", "{% raw %}{% endraw %}",
    "{{ 'x'.join(['y'] * 1000000) | wordcount }}", "{{ (('(' * 3000) ~ (')' * 3000)) }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "not " * 5000 + "1 }}", "{% if 1 %}" * 2000 + "{% endif %}" * 2000, "{{ " + "1 + " * 20_000 + "1 }}", "{{ " + "[" * 5000 + "]" * 5000 + " }}"]


def _templates() -> list[Files]:
    from jaxlm.data import chat
    real = [json.loads((TOKENIZERS / "byte_level" / "tokenizer_config.json").read_bytes()).get("chat_template", "")]
    return [{"t.jinja": text.encode("utf-8", "surrogatepass")} for text in (*chat.BUILT_IN.values(), *filter(None, real), *HOSTILE)]


def _feed_template(folder: pathlib.Path) -> None:
    from jaxlm.data import chat
    try:
        text = (folder / "t.jinja").read_bytes().decode()
    except UnicodeDecodeError:
        text = (folder / "t.jinja").read_bytes().decode("latin-1")
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": TEXT[:99]}, {"role": "assistant", "content": "b"}]
    found = chat.Template(text, (("bos_token", "<s>"), ("eos_token", "</s>")))
    for use in (lambda: found.render(messages, generate=True), lambda: found.encode_spans(_bytes_tokenizer(), messages)):
        use()


TASK = """
[questions]
kind = "choice"
prompt = "Q: {question}\\nA:"
metrics = ["acc", "acc_norm"]
licence = "CC0-1.0"
get = "make it yourself"
[[questions.from]]
file = "q.jsonl"
first = 1
examples = "q.jsonl"
[questions.from.fields]
question = "a.b"
choices = "choices.*.text"
target = {at = "target", find = "is (.*)", replace = [["x", "1"]]}
[texts]
kind = "loss"
metrics = ["bits_per_byte"]
licence = "CC0-1.0"
get = "make it yourself"
[[texts.from]]
file = "t.txt"
split = "\\n\\n+"
[said]
kind = "generate"
prompt = "{question}"
metrics = ["exact_match", "f1"]
max_tokens = 3
answer = "(.*)!"
licence = "CC0-1.0"
get = "make it yourself"
[[said.from]]
file = "c.csv"
"""


def _tasks() -> list[Files]:
    rows = [{"a": {"b": "2 + 2?"}, "choices": [{"text": "four"}, {"text": "five"}], "target": "it is x"} for _ in range(3)]
    files = {"tasks.toml": TASK.encode(), "q.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(), "t.txt": TEXT.encode(),
             "c.csv": b"question,target\na,b\nc,d\n"}
    packed = {**files, "tasks.toml": TASK.replace("q.jsonl", "q.jsonl.gz").encode(), "q.jsonl.gz": gzip.compress(files["q.jsonl"])}
    bomb = {**packed, "q.jsonl.gz": _gzip_bomb()}
    listed = {**files, "tasks.toml": TASK.replace("q.jsonl", "q.json").encode(), "q.json": json.dumps(rows).encode()}
    return [*[files, packed, listed] * 8, bomb]


@functools.cache
def _gzip_bomb() -> bytes:
    """4 MB that unpack to 4 GB."""
    member = gzip.compress(bytes(64 << 20).replace(b"\0", b" "), 9)
    return member * 64


def _feed_task(folder: pathlib.Path) -> None:
    from jaxlm.evaluate import definition, sources
    for task in definition.load(folder / "tasks.toml").values():
        task.fingerprint()
        try:
            sources.read(task, [folder], str(folder), shots=1)
        except ValueError as error:
            if not allowed(error):
                raise


# --- HTTP ---------------------------------------------------------------------------------------------------------------------------------


def _bodies() -> list[Files]:
    chat = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 2, "top_p": 0.9}
    text = {"prompt": "Hello", "max_tokens": 2, "temperature": 0.5, "seed": 1, "stop": ["x", "y"], "n": 2, "logprobs": 2, "echo": True}
    bodies = {"completions": [text, {"prompt": ["a", "b"], "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}, {"prompt": [1, 2, 3]}],
              "chat": [chat, {**chat, "stream": True, "logprobs": True, "top_logprobs": 1, "max_completion_tokens": 2}],
              "embeddings": [{"input": ["a", [1, 2]], "encoding_format": "base64"}], "classify": [{"input": "a"}],
              "feedback": [{"messages": chat["messages"], "answer": "y", "rating": 1, "correction": "z"}, {"prompt": "p", "answer": "a", "rating": -1}],
              "invocations": [chat, text, {"instances": [text, chat], "parameters": {"max_tokens": 1}}]}
    return [{f"{name}.json": json.dumps(body).encode()} for name, some in bodies.items() for body in some]


_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "embeddings": "/v1/embeddings", "classify": "/v1/classify",
          "feedback": "/v1/feedback", "invocations": "/invocations"}


@functools.cache
def _application():
    from jaxlm.config import TransformerConfig
    from jaxlm.serve import talk
    from jaxlm.serve.app import Options, Server
    from jaxlm.serve.engine import Engine, Limits
    from tests.serve import live
    cfg = TransformerConfig(vocab_size=320, context=32, layers=1, width=16, heads=2)
    found, params = live.model(cfg)
    engine = Engine(found, params, cfg, live.BYTES, Limits(rows=8, queue=64, page=16, chunk=32))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxlm-fuzz-http-"))
    return Server(engine, Options("tiny", hosts=("localhost",), feedback=folder / "feedback.jsonl", max_tokens=4), talk.chatting(live.BYTES, "chatml")).app(), folder


def _feed_body(folder: pathlib.Path) -> None:
    """Through the application as uvicorn calls it; a status of 500 is a crash that was caught late."""
    [path] = folder.iterdir()
    app, kept = _application()
    status, body = _asked(app, _PATHS[path.stem], path.read_bytes())
    assert status in (200, 400, 404, 413, 422, 429), f"status {status}: {body[:300]}"
    if status != 200:
        json.loads(body)["error"]["message"]
    with open(kept / "feedback.jsonl", "r+b") as file:  # each line must be a line that training reads
        for line in file:
            json.loads(line)
        file.truncate(0)


def _asked(app, path: str, data: bytes) -> tuple[int, bytes]:
    async def run():
        sent, received = [{"type": "http.request", "body": data, "more_body": False}], []

        async def receive():
            if sent:
                return sent.pop()
            await asyncio.sleep(60)

        async def send(message):
            received.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1", "scheme": "http",
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())],
                 "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": ""}
        await app(scope, receive, send)
        return received[0]["status"], b"".join(message.get("body", b"") for message in received[1:])

    return asyncio.run(run())


TARGETS: dict[str, Target] = {
    "text": Target(_texts, _reader("text")), "jsonl": Target(lambda: [{"a.jsonl": LINES}, {"a.jsonl": json.dumps(ROWS[0]).encode()}], _reader("json_lines")),
    "labels": Target(_labels, _reader("json_lines", _label_keys)), "chats": Target(_chats, _feed_chats),
    "table": Target(_tables, _reader("table")), "packed": Target(_packed, _feed_packed), "parquet": Target(_columns, _reader("parquet")),
    "arrow": Target(_arrows, _reader("arrow")), "datasets": Target(_states, _feed_state), "html": Target(_pages, _feed_page), "warc": Target(_warcs, _reader("warc")),
    "sentencepiece": Target(_sentencepieces, _feed_tokenizer), "tokenizer": Target(_tokenizer_folders, _feed_tokenizer),
    "safetensors": Target(_headers, _feed_header), "huggingface": Target(_hf_folders, _feed_hf), "gguf": Target(_ggufs, _feed_gguf),
    "adapter": Target(_adapters, _feed_adapter), "corpus": Target(_corpora, _feed_corpus),
    "forged": Target(_corpora, functools.partial(_feed_corpus, sign=True)), "template": Target(_templates, _feed_template),
    "task": Target(_tasks, _feed_task), "http": Target(_bodies, _feed_body),
}
