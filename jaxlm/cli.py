"""`jaxlm <verb>`: finds the verb's binary, reads its flags, and turns a user's mistake into one line and exit code 2."""

import importlib
import importlib.metadata
import os
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Sequence

from jaxlm import bin

VERBS = {
    "prepare": "read, clean and de-duplicate text, split it, train a tokenizer, write token shards and a report",
    "tokenizer": "train a tokenizer alone, or look at what one does to a text",
    "train": "train a model, or resume the run in a workdir",
    "search": "which learning rate, batch size, width ...: many short runs, the worse ones stopped early, over any number of processes",
    "fit": "before you rent: does a config fit on these TPUs or GPUs, how fast, at what cost",
    "eval": "loss and bits per byte of a checkpoint, figures of a classifier, tasks (HellaSwag, your own), which of two is better, is it biased; --watch follows a run",
    "report": "a page about a run (curves, data, figures, bias, samples, how to reproduce) and a model card",
    "generate": "continue prompts with a checkpoint, or label texts",
    "serve": "serve a checkpoint over HTTP, with OpenAI's interface",
    "data": "which documents a checkpoint has seen, how often and when (data audit)",
    "replay": "do one step of a run again, and name the documents and the layer that made it what it was",
    "import": "turn a Hugging Face directory into a checkpoint",
    "verify": "compare a config's training on many meshes with one device",
    "export": "write a checkpoint as a Hugging Face directory",
}

_LONGEST_LINE = 2000  # characters of an error
_HELP = """jaxlm {version}: from raw text to a trained, evaluated language model

Usage: jaxlm VERB [--flag=value ...] [--config.part.key=value ...]

{verbs}

Start here, no data needed:
  jaxlm train --config=quickstart --workdir=runs/quickstart
  jaxlm eval --workdir=runs/quickstart
  jaxlm generate --workdir=runs/quickstart --prompt="The with statement"

`jaxlm VERB --help` explains a verb. Config files are Python programs: run only those you trust.
"""


def main(given: Sequence[str] | None = None) -> None:
    """The console script. Exits 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C, else what the verb returns."""
    argv = list(sys.argv[1:] if given is None else given)
    verb = argv[0] if argv else "--help"
    if verb in ("--help", "-h", "help", "--version"):
        from jaxlm import __version__
        verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
        print(__version__ if verb == "--version" else _HELP.format(version=__version__, verbs=verbs), end="\n" if verb == "--version" else "")
        sys.exit(0)
    if verb not in VERBS:
        _fail(f"unknown verb {verb!r}; known: {', '.join(VERBS)}; see jaxlm --help")
    if given is None:
        use_huge_pages()
    sys.exit(run(verb, argv[1:]))


def run(verb: str, argv: Sequence[str]) -> int:
    """Runs one verb with its flags and returns its exit code. The binary's module has a docstring (its help), `define` and `main`."""
    from absl import flags

    module = importlib.import_module(f"jaxlm.bin.{verb}")
    values = flags.FlagValues()
    flags.DEFINE_bool("v", False, "Say more: tracebacks and the environment that jaxlm sets.", flag_values=values)
    module.define(values)
    if any(a in ("--help", "-h", "-help") for a in argv):
        print(module.__doc__.strip() + "\n\nFlags:\n" + _flag_help(values))
        return 0
    try:
        overrides = take_overrides(argv) if "config" in values else []
        rest = values([f"jaxlm {verb}", *(a for a in argv if not ("config" in values and a.startswith("--config.")))])
        words = {"arguments": rest[1:]} if getattr(module, "ARGUMENTS", False) else {}
        if len(rest) > 1 and not words:
            raise ValueError(f"unexpected argument {rest[1]!r}; flags look like --name=value; see jaxlm {verb} --help")
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl's global flags
        set_environment(values.v, dots=verb == "serve")
        return module.main(values, overrides) if "config" in values else module.main(values, **words) or 0
    except flags.Error as error:
        _fail(f"{str(error).replace(chr(10), ' ')}; see jaxlm {verb} --help")
    except KeyboardInterrupt:
        print("\njaxlm: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if values["v"].value or not bin.out_of_memory(error):
            raise
        _fail(f"out of memory ({(str(error) or 'of this machine').splitlines()[0][:200]}): take smaller batches or shorter texts, a smaller model, or a machine "
              "with more; jaxlm fit --config=... says what training needs")
    except (ValueError, OSError) as error:
        if values["v"].value or not (isinstance(error, OSError) or _raised_here(error)):
            raise
        _fail(one_line(error))


def one_line(error: BaseException) -> str:
    """What an error says, for a terminal: it may quote a name or a value out of a file of somebody else, which must not write escape sequences there."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]} ..."
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def take_overrides(argv: Sequence[str]) -> list[tuple[str, str]]:
    """The `--config.key=value` arguments as `(key, value)`, in order."""
    overrides = []
    for argument in argv:
        if argument.startswith("--config."):
            key, equals, text = argument[len("--config."):].partition("=")
            if not equals:
                raise ValueError(f"{argument}: write --config.{key}=value")
            overrides.append((key, text))
    return overrides


def _flag_help(values) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
        lines.append(f"  --{name}\n" + textwrap.fill(" ".join(flag.help.split(";\n")[0].split()) + default, 100, initial_indent="      ", subsequent_indent="      "))
    if "config" in values:
        lines.append("  --config.PART.KEY=VALUE\n      Overrides one key of the config; every key is explained in jaxlm/config.py.")
    return "\n".join(lines)


def _raised_here(error: BaseException) -> bool:
    """Whether jaxlm itself raised the error: then it is a sentence for the user; from anywhere else it is a fault and needs its traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and pathlib.Path(frames[-1][0].f_code.co_filename).is_relative_to(pathlib.Path(__file__).parent)


# jaxlib 0.10.2 on CPUs fuses some reductions wrongly unless this is empty (tests/test_cli.py has the case); others do not know or need it.
_YNN = "--xla_cpu_experimental_ynn_fusion_type"


# Of NVIDIA GPUs (docs.jax.dev, "GPU performance tips"): Triton's matrix products compete with cuBLAS's in the autotuner, and communication is scheduled
# beside computation. jaxlib 0.7.2 to 0.12 know both.
_GPU = ("--xla_gpu_triton_gemm_any=true", "--xla_gpu_enable_latency_hiding_scheduler=true")
_NVIDIA = pathlib.Path("/proc/driver/nvidia/version")  # where the driver runs, whatever jax will find

# Each step of XLA on CPUs allocates its temporaries anew, and the kernel then clears them page by page: 1 GB and 250,000 faults a step for a model of 11 M
# parameters. In pages of 2 MB instead of 4 kB a step takes 0.7 of the time; and with 2 heaps for each core, not 8, less memory lies about in heaps that
# threads have left (docs/performance.md). The C library reads this when a process begins.
_PAGES = ("GLIBC_TUNABLES", f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max={2 * (os.cpu_count() or 1)}")
_PAGES_ON_REQUEST = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this process anew with memory in huge pages, where Linux gives them to those that ask; what the user has set wins."""
    name, value = _PAGES
    if name not in os.environ and sys.executable and _PAGES_ON_REQUEST.exists() and "[madvise]" in _PAGES_ON_REQUEST.read_text():
        os.environ[name] = value
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def let_emulated_devices_meet() -> None:
    """Threads for emulated devices. jaxlib gives its CPU client one thread for each device, and each thread waits inside a collective until all devices have
    come to it; where devices begin two collectives of one program in different orders, all threads wait and after 40 s the process aborts. Seen in 6 of 10
    runs of a small FSDP train step on a loaded machine (jaxlib 0.10.2), and in none of 30 with 64 threads."""
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("PJRT_NPROC", "64")


def set_environment(verbose: bool, dots: bool = False) -> None:
    """Settings that must stand before jax is imported; what the user has set wins.

    Args:
      dots: let jaxlib 0.10.2 compute matrix products of a few rows with its newer library: for 8 to 32 rows, as a server has, 1.4 to 1.6 times as fast.
    """
    chosen = {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jaxlm" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    if importlib.metadata.version("jaxlib").startswith("0.10.") and _YNN not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_YNN}={'individual_dot' if dots else ''}".strip()
    for flag in _GPU if _NVIDIA.exists() else ():
        if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    let_emulated_devices_meet()
    if verbose:
        print("\n".join(f"{name}={os.environ[name]}" for name in (*chosen, "XLA_FLAGS", "PJRT_NPROC", _PAGES[0]) if name in os.environ), file=sys.stderr)


def _fail(message: str) -> None:
    print(f"jaxlm: {message}", file=sys.stderr)
    sys.exit(2)
