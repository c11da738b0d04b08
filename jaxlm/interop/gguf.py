"""GGUF files (llama.cpp) <-> config, parameters and tokenizer, for the families of Llama, Qwen 2 and 3, Gemma 1 to 3 and GPT-2.

What the format does differently, and is undone here: the rows of Llama's queries and keys are permuted so that rotary pairs are neighbours;
Gemma's norms are stored as 1 + w; GPT-2's matrices are transposed; llama3's rotary scaling is a tensor of factors. Weights of any block type
are dequantised, one tensor at a time, by the package `gguf`, whose home this is and which is imported where it is used: pip install 'jaxlm[hf]'.
"""

import functools
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxlm import trees
from jaxlm.config import TransformerConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.interop import gguf_config, gguf_header, gguf_tokenizer, hf_files
from jaxlm.interop.gguf_config import ROPE_FACTORS
from jaxlm.interop.hf_names import FORMS as HF_FORMS
from jaxlm.interop.hf_names import Entry, Form, Shape
from jaxlm.models import decoder

Types = Literal["f32", "f16", "q8_0"]


def _heads_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs from neighbouring rows to the two halves of each head."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _heads_joined(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


_LINEAR = HF_FORMS["linear"]
FORMS: dict[str, Form] = {
    **{name: HF_FORMS[name] for name in ("same", "flat", "linear", "linear_out")}, "qkv_bias": HF_FORMS["qkv_conv_bias"],
    "pairs": Form(_LINEAR.shape, lambda a, s: _LINEAR.read(_heads_apart(a, s[0][1]), s),
                  lambda ours: _heads_joined(_LINEAR.write(ours), ours[0].shape[1])),
    "one_more": Form(lambda s: s[0], lambda a, s: [a - np.float32(1)], lambda ours: ours[0] + np.float32(1)),
    "qkv": Form(lambda s: (3 * s[0][1] * s[0][2], s[0][0]), lambda a, s: list(a.reshape(3, *s[0][1:], s[0][0]).transpose(0, 3, 1, 2)),
                lambda ours: np.stack(ours).transpose(0, 2, 3, 1).reshape(-1, ours[0].shape[0])),
}


def _table(norm: str, qk: str, layers: Mapping[str, str]) -> tuple[Entry, ...]:
    """The tensors of a family: the forms of its norms and of its queries and keys, and its norms by name."""
    attention = [("attn_q.weight", "attn/q", qk), ("attn_k.weight", "attn/k", qk), ("attn_v.weight", "attn/v", "linear"),
                 ("attn_output.weight", "attn/o", "linear_out"), *((f"attn_{x}.bias", f"attn/{x}_bias", "flat") for x in "qkv"),
                 *((f"attn_{x}_norm.weight", f"attn/{x}_norm", norm) for x in "qk")]
    mlp = [(f"ffn_{x}.weight", f"mlp/{x}", "linear") for x in ("gate", "up", "down")]
    norms = [(f"{theirs}.weight", f"{ours}/scale", norm) for theirs, ours in layers.items()]
    ends = [Entry("token_embd.weight", ("embed/tokens",), "same"), Entry("output_norm.weight", ("final_norm/scale",), norm),
            Entry("output.weight", ("head/kernel",), "linear")]
    return (*ends, *(Entry(f"blk.{{layer}}.{theirs}", (f"layers/{ours}",), form) for theirs, ours, form in [*norms, *attention, *mlp]))


_PRE = {"attn_norm": "attn_norm", "ffn_norm": "mlp_norm"}
_SANDWICH = {"attn_norm": "attn_norm", "post_attention_norm": "attn_out_norm", "ffn_norm": "mlp_norm", "post_ffw_norm": "mlp_out_norm"}
_GPT2 = (
    Entry("token_embd.weight", ("embed/tokens",), "same"), Entry("position_embd.weight", ("embed/positions",), "same"),
    Entry("output_norm.weight", ("final_norm/scale",), "same"), Entry("output_norm.bias", ("final_norm/bias",), "same"),
    Entry("output.weight", ("head/kernel",), "linear"),
    *(Entry(f"blk.{{layer}}.{theirs}", tuple(f"layers/{name}" for name in ours.split()), form) for theirs, ours, form in (
        ("attn_norm.weight", "attn_norm/scale", "same"), ("attn_norm.bias", "attn_norm/bias", "same"),
        ("attn_qkv.weight", "attn/q attn/k attn/v", "qkv"), ("attn_qkv.bias", "attn/q_bias attn/k_bias attn/v_bias", "qkv_bias"),
        ("attn_output.weight", "attn/o", "linear_out"), ("attn_output.bias", "attn/o_bias", "same"),
        ("ffn_norm.weight", "mlp_norm/scale", "same"), ("ffn_norm.bias", "mlp_norm/bias", "same"),
        ("ffn_up.weight", "mlp/up", "linear"), ("ffn_up.bias", "mlp/up_bias", "same"),
        ("ffn_down.weight", "mlp/down", "linear"), ("ffn_down.bias", "mlp/down_bias", "same"))))
TABLES: dict[str, tuple[Entry, ...]] = {
    "llama": _table("same", "pairs", _PRE), "qwen2": _table("same", "linear", _PRE), "qwen3": _table("same", "linear", _PRE),
    "gemma": _table("one_more", "linear", _PRE), "gemma2": _table("one_more", "linear", _SANDWICH),
    "gemma3": _table("one_more", "linear", _SANDWICH), "gpt2": _GPT2,
}


class Place(NamedTuple):
    """One tensor of the file and where it goes."""
    name: str
    entry: Entry
    layer: int | None  # row of our stacks


class Source(NamedTuple):
    """A file whose header is read and fits the model; its weights are not read yet."""
    path: pathlib.Path
    cfg: TransformerConfig
    header: gguf_header.Header
    places: tuple[Place, ...]
    shapes: Mapping[str, Shape]  # of our parameters, by path


def open_file(path: pathlib.Path | str) -> Source:
    """Reads the header and matches every tensor.

    Raises:
      ValueError: one line: not a GGUF file, damaged, of a family that is not known here, or with other tensors than it says.
    """
    path = pathlib.Path(path)
    header = gguf_header.read(path, _block_sizes())
    try:
        family, cfg = gguf_config.read(header.metadata, {name: tensor.shape for name, tensor in header.tensors.items()},
                                       lambda: _read(path, header, ROPE_FACTORS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = _shapes(cfg)
    places = _places(family, shapes, cfg.layers)
    names = {place.name for place in places}
    missing, left = sorted(names - set(header.tensors)), sorted(set(header.tensors) - names - {ROPE_FACTORS})
    if missing or left:
        say = lambda what, some: [f"{what} {some[0]}{f' and {len(some) - 1} more' * (len(some) > 1)}"] if some else []
        raise ValueError(f"{path} {'; '.join(say('lacks the tensor', missing) + say('has a tensor that this model has no place for:', left))}")
    for place in places:
        expected, found = _shape(place, shapes), header.tensors[place.name].shape
        if found != expected:
            raise ValueError(f"{path}: {place.name} has the shape {list(found)}, and by its metadata it must have {list(expected)}")
    return Source(path, cfg, header, places, shapes)


def load(source: Source, shardings: Any = None) -> dict[str, Any]:
    """The parameters, float32, each on its place; the host holds one parameter's part at a time. In several processes all call this together.

    Args:
      shardings: nested dict like the parameters; None: the first device.
    """
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = trees.flatten(shardings) if shardings is not None else dict.fromkeys(source.shapes, single)
    read = functools.lru_cache(maxsize=1)(functools.partial(_read, source.path, source.header))
    found: dict[str, list[tuple[Place, int]]] = {}
    for place in source.places:
        for i, path in enumerate(place.entry.ours):
            found.setdefault(path, []).append((place, i))

    def part(path: str, row: int) -> np.ndarray:
        place, i = found[path][row]
        return FORMS[place.entry.form].read(hf_files.finite(read(place.name), f"{source.path}: {place.name}"), _own_shapes(place, source.shapes))[i]

    def build(path: str, index: tuple[slice, ...]) -> np.ndarray:
        if not path.startswith("layers/"):
            return part(path, 0)[index]
        rows = range(source.cfg.layers)[index[0]]
        return np.stack([part(path, row)[index[1:]] for row in rows])

    return trees.unflatten({path: jax.make_array_from_callback(shape, where[path], functools.partial(build, path))
                            for path, shape in source.shapes.items()})


def tokenizer(source: Source) -> Tokenizer:
    """The tokenizer in the file's metadata, with its chat template and special tokens.

    Raises:
      ValueError: one line, where it has none or one that is not known here.
    """
    return gguf_tokenizer.read(source.header.metadata, str(source.path))


def mapping(source: Source) -> str:
    """A table of what maps to what: one line per kind of tensor."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for place in source.places:
        kinds.setdefault((place.entry.theirs.replace("{layer}", "*"), " ".join(place.entry.ours)), []).append(place.name)
    lines = [(theirs, ours, f"{len(names)} x {list(source.header.tensors[names[0]].shape)} "
              + ", ".join(sorted({_type_name(source.header.tensors[name].type) for name in names}))) for (theirs, ours), names in kinds.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)


def tensors(cfg: TransformerConfig, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The file's tensors of a model by name, float32, one at a time.

    Raises:
      ValueError: one line: no family that GGUF knows computes this model.
    """
    flat, shapes = trees.flatten(params), _shapes(cfg)
    family, _ = gguf_config.write(cfg)
    if cfg.rope_scaling == "llama3":
        yield ROPE_FACTORS, gguf_config.rope_factors(cfg)
    for place in _places(family, shapes, cfg.layers):
        ours = [np.asarray(flat[path] if place.layer is None else flat[path][place.layer], np.float32) for path in place.entry.ours]
        yield place.name, np.ascontiguousarray(FORMS[place.entry.form].write(ours), np.float32)


def write(path: pathlib.Path | str, cfg: TransformerConfig, params: Any, tok: Tokenizer, dtype: Types = "f16", *, name: str = "") -> Source:
    """Writes a GGUF file, whole or not at all, and reads it back.

    Args:
      dtype: of the matrices. f32 keeps every bit (but Gemma's norms, which become 1 + w: 6e-8); f16 is off by at most 2^-11 of a value or 2^-25;
        q8_0 by 1/254 + 2^-11 of the largest in its block of 32. Vectors and positions stay f32, and matrices whose rows are no whole blocks f16.
      name: general.name.

    Raises:
      ValueError: one line: GGUF has no form for this model or this tokenizer, or the type none for a weight.
      OSError: the disk is full, or what was read back is not what was written.
    """
    package = _package()
    path, temporary = pathlib.Path(path), pathlib.Path(f"{path}.tmp")
    family, metadata = gguf_config.write(cfg)
    metadata |= gguf_tokenizer.write(tok, cfg.vocab_size)
    chosen = {"f32": package.GGMLQuantizationType.F32, "f16": package.GGMLQuantizationType.F16, "q8_0": package.GGMLQuantizationType.Q8_0}[dtype]
    metadata |= {"general.name": name or path.stem, "general.file_type": {"f32": 0, "f16": 1, "q8_0": 7}[dtype], "general.quantization_version": 2}
    writer = package.GGUFWriter(None, family)
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has put it there
            _add(writer, key, value)
    shapes = _their_shapes(cfg)
    kinds = {tensor: _kind(package, tensor, shape, chosen) for tensor, shape in shapes.items()}
    for tensor, shape in shapes.items():
        block, size = package.GGML_QUANT_SIZES[kinds[tensor]]
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kinds[tensor])
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, values in tensors(cfg, params):
            writer.write_tensor_data(package.quants.quantize(_fitting(values, tensor, kinds[tensor].name), kinds[tensor]))
        writer.close()
        source = open_file(temporary)
        for tensor, values in tensors(cfg, params):
            if _read_raw(temporary, source.header.tensors[tensor]).tobytes() != package.quants.quantize(values, kinds[tensor]).tobytes():
                raise OSError(f"{path}: {tensor} reads back differently from what was written: check the disk")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return source._replace(path=path)


def _fitting(values: np.ndarray, name: str, kind: str) -> np.ndarray:
    """`values` as they are, which must be finite and small enough: float16 ends at 65504, q8_0 where the scale of a block, its largest / 127, does."""
    largest, most = float(np.abs(hf_files.finite(values, name)).max()), {"F16": 65504.0, "Q8_0": 127 * 65504.0}.get(kind, math.inf)
    if largest > most:
        other = " or q8_0" if kind == "F16" and largest <= 127 * 65504 else ""
        raise ValueError(f"{name} holds {largest:g}, more than {kind} can, {most:g}: take --dtype=float32{other}")
    return values


def _kind(package: Any, name: str, shape: Shape, chosen: Any) -> Any:
    """The type in which one tensor is written, as llama.cpp's own converter chooses it."""
    types = package.GGMLQuantizationType
    if len(shape) == 1 or name == "position_embd.weight":
        return types.F32
    return types.F16 if chosen == types.Q8_0 and shape[-1] % 32 else chosen


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif len(value):  # the format's arrays know their type from their items
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) and value.dtype != np.uint8 else value if isinstance(value, list) else value.tobytes())


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install 'jaxlm[hf]'") from None
    return gguf


def _block_sizes() -> dict[int, tuple[int, int]]:
    """ggml type -> elements and bytes of a block, of the types that can be dequantised."""
    package = _package()
    return {int(kind): size for kind, size in package.GGML_QUANT_SIZES.items() if kind.name[0] in "FBQIMNT" and kind.name not in
            ("I8", "I16", "I32", "I64", "F64") and not kind.name.startswith("Q8_1") and kind.name != "Q8_K"}


def _type_name(kind: int) -> str:
    return _package().GGMLQuantizationType(kind).name


def _read_raw(path: pathlib.Path, tensor: gguf_header.Tensor) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise ValueError(f"{path} has become shorter while it was read")
    return np.frombuffer(data, np.uint8)


def _read(path: pathlib.Path, header: gguf_header.Header, name: str) -> np.ndarray:
    """A tensor as float32, dequantised."""
    package, tensor = _package(), header.tensors[name]
    kind = package.GGMLQuantizationType(tensor.type)
    rows = _read_raw(path, tensor).reshape(*tensor.shape[:-1], -1)
    if kind in (package.GGMLQuantizationType.F32, package.GGMLQuantizationType.F16):
        return rows.view("<f4" if kind == package.GGMLQuantizationType.F32 else "<f2").astype(np.float32)
    try:
        return package.quants.dequantize(rows, kind).reshape(tensor.shape)
    except NotImplementedError:
        raise ValueError(f"{path}: {name} is of the type {kind.name}, which the package gguf cannot dequantise: convert it with llama-quantize") from None


def _shapes(cfg: TransformerConfig) -> dict[str, Shape]:
    return {path: leaf.shape for path, leaf in trees.flatten(jax.eval_shape(decoder.build(cfg).init, jax.random.key(0))).items()}


def _places(architecture: str, shapes: Mapping[str, Shape], layers: int) -> tuple[Place, ...]:
    """All tensors of a model, in the order of layers; each parameter has exactly one."""
    entries = [entry for entry in TABLES[architecture] if set(entry.ours) <= set(shapes)]
    covered = [path for entry in entries for path in entry.ours]
    assert sorted(covered) == sorted(shapes), f"{architecture}: {sorted(set(shapes) ^ set(covered))} are not mapped, or twice"
    ends = [Place(entry.theirs, entry, None) for entry in entries if "{layer}" not in entry.theirs]
    return (*ends, *(Place(entry.theirs.format(layer=i), entry, i) for i in range(layers) for entry in entries if "{layer}" in entry.theirs))


def _own_shapes(place: Place, shapes: Mapping[str, Shape]) -> list[Shape]:
    return [shapes[path][0 if place.layer is None else 1:] for path in place.entry.ours]


def _shape(place: Place, shapes: Mapping[str, Shape]) -> Shape:
    return tuple(FORMS[place.entry.form].shape(_own_shapes(place, shapes)))


def _their_shapes(cfg: TransformerConfig) -> dict[str, Shape]:
    """Every tensor of the file in order."""
    shapes = _shapes(cfg)
    factors = {ROPE_FACTORS: (cfg.filled().head_size // 2,)} if cfg.rope_scaling == "llama3" else {}
    return factors | {place.name: _shape(place, shapes) for place in _places(gguf_config.write(cfg)[0], shapes, cfg.layers)}
