"""Feeds everything in jaxlm that reads bytes with thousands of damaged and hostile inputs, and reports what broke a promise.

  python tools/fuzz.py                                    # 10,000 inputs to each target
  python tools/fuzz.py --target=gguf --inputs=100000
  python tools/fuzz.py --target=gguf --first=4711 --inputs=1 --keep=/tmp/found    # one input again, and its files
  python tools/fuzz.py --target=warc --atheris            # inputs chosen by what they reach (pip install atheris); ends at the first finding

The promise (SECURITY.md): an error of one line or none, at most 5 s of CPU and 1 GiB more for an input of a few KB, no file written outside the input's folder,
no program started, no connection made, no pickle read. Targets, seeds and changes are in tests/fuzz; an input is made again from its number. Each target
runs in a process of its own, which is started again after an input that kills it. Exit code 1 if anything was found.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
STUCK = 300.0  # seconds without a new input


def fuzz(name: str, first: int, count: int) -> tuple[list[dict], float, int]:
    """Findings, one of each kind with how often it came, seconds, and the peak of memory in bytes."""
    found: dict[str, dict] = {}
    begun, end, peak = time.monotonic(), first + count, 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "4"}
    with tempfile.NamedTemporaryFile() as progress, tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as scratch:
        while first < end:
            with tempfile.TemporaryFile("w+") as output:
                process = subprocess.Popen([sys.executable, "-m", "tests.fuzz.driver", name, str(first), str(end - first), progress.name], stdout=output,
                                           stderr=errors, env=environment | {"TMPDIR": scratch}, cwd=ROOT)
                number, since = -1, time.monotonic()
                while process.poll() is None:
                    time.sleep(0.2)
                    now = int(pathlib.Path(progress.name).read_bytes() or b"-1")
                    number, since = (now, time.monotonic()) if now != number else (number, since)
                    if time.monotonic() - since > STUCK:
                        process.kill()
                output.seek(0)
                lines = [json.loads(line) for line in output if line.startswith("{")]
            number = int(pathlib.Path(progress.name).read_bytes() or b"-1")
            for line in lines:
                peak = max(peak, line.get("peak", 0))
                if "what" in line:
                    found.setdefault(line["where"], line | {"times": 0})["times"] += 1
            if process.returncode == 0:
                break
            if number < first:
                errors.seek(0)
                raise RuntimeError(f"{name} cannot be run: {errors.read()[-2000:]}")
            what = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"ended with {process.returncode}"
            errors.seek(max(0, errors.seek(0, 2) - 400))
            found.setdefault(f"process {what}", {"target": name, "number": number, "what": f"{what}: {' '.join(errors.read().split())[-200:]}", "where": "process",
                                                 "times": 0})["times"] += 1
            first = number + 1
    return list(found.values()), time.monotonic() - begun, peak


def guided(name: str, count: int) -> None:
    """Lets libFuzzer change the first file of the seeds, towards lines of jaxlm that no input has reached. Does not return."""
    import atheris
    with atheris.instrument_imports(include=["jaxlm"]):
        from tests.fuzz import driver, targets
    seeds = targets.TARGETS[name].seeds()
    key = sorted(seeds[0])[-1]

    def one(data: bytes) -> None:
        if found := driver.feed(name, {**seeds[0], key: data}):
            raise RuntimeError(str(found))

    folder = pathlib.Path(tempfile.mkdtemp())
    for i, files in enumerate(seeds):
        (folder / str(i)).write_bytes(files.get(key, b""))
    atheris.Setup([sys.argv[0], f"-runs={count}", "-rss_limit_mb=4096", "-timeout=60", f"-artifact_prefix={folder}/", str(folder)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--target", default="", help="one or several, with commas; empty: all")
    parser.add_argument("--keep", default="", help="folder for the files of the inputs [first, first + inputs)")
    parser.add_argument("--atheris", action="store_true")
    given = parser.parse_args()
    from tests.fuzz import driver, targets
    names = given.target.split(",") if given.target else list(targets.TARGETS)
    if unknown := sorted(set(names) - set(targets.TARGETS)):
        parser.error(f"--target={unknown[0]} is not known; known: {', '.join(targets.TARGETS)}")
    if given.keep:
        for number in range(given.first, given.first + given.inputs):
            folder = pathlib.Path(given.keep) / f"{names[0]}-{number}"
            folder.mkdir(parents=True)
            for file, data in driver.made(names[0], number, targets.TARGETS[names[0]].seeds()).items():
                (folder / file).write_bytes(data)
    if given.atheris:
        guided(names[0], given.inputs)
    print("| target | inputs | seconds | peak MiB | findings |\n|---|---|---|---|---|", flush=True)
    everything = []
    for name in names:
        found, seconds, peak = fuzz(name, given.first, given.inputs)
        everything += found
        print(f"| {name} | {given.inputs:,} | {seconds:.0f} | {peak >> 20:,} | {sum(one['times'] for one in found)} of {len(found)} kinds |", flush=True)
        for one in found:
            print(f"  {name} {one['number']} ({one['times']} times): {one['what']}  [{one['where']}]", flush=True)
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
