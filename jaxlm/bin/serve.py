"""jaxlm serve: serves a checkpoint over HTTP, with OpenAI's interface.

  jaxlm serve --workdir=runs/quickstart
  jaxlm serve --workdir=runs/mine --port=8080 --rows=64 --cache_gib=4 --feedback=feedback.jsonl
  JAXLM_API_KEY=secret jaxlm serve --workdir=runs/mine --host=0.0.0.0

  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "The with statement", "max_tokens": 40}'
  python -c "from openai import OpenAI; c = OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')
  print(c.completions.create(model=c.models.list().data[0].id, prompt='Return the').choices[0].text)"

A decoder serves /v1/completions and, where its checkpoint has a chat template, /v1/chat/completions; an encoder /v1/embeddings, a classifier /v1/classify.
/v1/models, /health, /metrics (Prometheus) and /openapi.json come with each, and a page at / . Needs pip install 'jaxlm[serve]'.

Requests are answered together, --rows at a time; more wait, up to --queue, and those beyond get 429. What a request gets does not depend on the others.
Keys and values live in --cache_gib; beginnings that prompts share are computed once.

It listens on this machine only, unless --host says otherwise, and then asks for a key (--api_key, or the variable JAXLM_API_KEY, which does not show in
the list of processes). SIGTERM and Ctrl-C take no new requests, finish those it has (--drain seconds at most), and exit.
"""

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint to use; without it, the newest whole one.", flag_values=values)
    flags.DEFINE_string("name", "", "The model's id; empty: the name of the workdir.", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine.", flag_values=values)
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free, which is printed.", flag_values=values, lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("api_key", "", "Key that requests must send; empty: $JAXLM_API_KEY, or none on this machine alone.", flag_values=values)
    flags.DEFINE_bool("open", False, "Listen on a network without a key.", flag_values=values)
    flags.DEFINE_multi_string("origin", [], "Web page elsewhere that may use it (CORS), https://example.org; may be given several times.", flag_values=values)
    flags.DEFINE_integer("rows", 32, "Requests that are answered at a time.", flag_values=values, lower_bound=1, upper_bound=512)
    flags.DEFINE_integer("queue", 256, "Requests that may wait.", flag_values=values, lower_bound=1)
    flags.DEFINE_float("cache_gib", 1.0, "Memory for keys and values, over all devices.", flag_values=values, lower_bound=0.0)
    flags.DEFINE_bool("int8_weights", False, "Keep matrices as int8: a quarter of the memory, results a little off, slower on CPUs.", flag_values=values)
    flags.DEFINE_bool("int8_cache", False, "Keep keys and values as int8: room for more, results a little off.", flag_values=values)
    flags.DEFINE_integer("chunk", 256, "Tokens of prompts that are fed between two steps: more for throughput, fewer for an even stream.", flag_values=values,
                         lower_bound=1)
    flags.DEFINE_integer("tensor", 0, "Devices that share each layer; 0: the mesh of the checkpoint's config.", flag_values=values, lower_bound=0)
    flags.DEFINE_integer("max_tokens", 512, "Longest answer of a chat that does not say.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("chat_template", "", "chatml, llama3, gemma or a .jinja file; empty: the checkpoint's own.", flag_values=values)
    flags.DEFINE_float("max_body_mib", 1.0, "Largest request.", flag_values=values, lower_bound=0.001)
    flags.DEFINE_float("timeout", 600.0, "Seconds that a request may take, waiting included.", flag_values=values, lower_bound=0.001)
    flags.DEFINE_float("drain", 60.0, "Seconds that requests have to finish when the server is told to end.", flag_values=values, lower_bound=0.0)
    flags.DEFINE_string("feedback", "", "File to which /v1/feedback appends lines that jaxlm train reads; empty: no feedback.", flag_values=values)
    flags.DEFINE_bool("log_prompts", False, "Write requests to the log, with what people asked.", flag_values=values)


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(values: flags.FlagValues) -> int:
    import functools
    import importlib.util
    import os
    import pathlib
    import sys

    key, local = values.api_key or os.environ.get("JAXLM_API_KEY", ""), values.host in LOOPBACK
    if not (key or local or values.open):
        raise ValueError(f"--host={values.host} is open to the network: set JAXLM_API_KEY or --api_key, or say --open to serve whoever comes")
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ValueError("serving needs starlette and uvicorn: pip install 'jaxlm[serve]'")
    feedback = pathlib.Path(values.feedback) if values.feedback else None
    if feedback:
        feedback.open("a").close()  # that it cannot be written is known now

    from jaxlm.config import MeshConfig
    from jaxlm.serve import http
    from jaxlm.serve.app import Options
    from jaxlm.serve.engine import Limits
    from jaxlm.train.saved import open_run

    mesh = MeshConfig(data=-1, fsdp=1, tensor=values.tensor) if values.tensor else None
    run = open_run(values.workdir, values.step, mesh=mesh, log=functools.partial(print, file=sys.stderr))
    limits = Limits(values.rows, values.queue, int(values.cache_gib * 2**30), chunk=values.chunk, int8_weights=values.int8_weights,
                    int8_cache=values.int8_cache)
    options = Options(values.name or run.workdir.resolve().name, key, (*LOOPBACK, "[::1]") if local and not key else (), tuple(values.origin),
                      int(values.max_body_mib * 2**20), values.max_tokens, values.timeout, feedback, values.log_prompts)
    return http.serve(http.build(run, limits, options, values.chat_template), values.host, values.port, values.drain)
