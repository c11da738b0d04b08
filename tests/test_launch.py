"""The scripts that start runs elsewhere: the exact commands they send, what they do about what is there already, and a Ctrl-C that saves everywhere.

No cloud and no other machine is here: `gcloud`, `srun`, `scontrol` and `ssh` are stand-ins that write down what they are asked.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TPU, LAUNCH = ROOT / "tools" / "tpu_vm.sh", ROOT / "tools" / "launch"
QUEUE = "gcloud compute tpus queued-resources"
STATE = "'--format=value(state.state)'"
AT = "--zone=us-west4-a"


def program(folder: pathlib.Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def call(script: pathlib.Path, *arguments: str, folder: pathlib.Path | None = None, **environment: str) -> tuple[int, str, str]:
    """Exit code, output, errors; programs in `folder` come before those of this machine."""
    path = f"{folder}:{os.environ['PATH']}" if folder else os.environ["PATH"]
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env={**os.environ, "PATH": path, **environment}, cwd=folder, timeout=60)
    return done.returncode, done.stdout, done.stderr


def dry(verb: str, *arguments: str) -> list[str]:
    code, output, error = call(TPU, verb, "mine", AT, "--dry_run", *arguments)
    assert code == 0, error
    return output.splitlines()


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not here: pip install 'jaxlm[dev]'")
    done = subprocess.run(["shellcheck", *sorted((ROOT / "tools").rglob("*.sh"))], capture_output=True, text=True)
    assert not done.returncode, done.stdout


def test_commands_of_one_slice():
    describe = f"{QUEUE} describe mine {AT} {STATE}"
    assert dry("create", "--type=v5litepod-16", "--spot") == [
        describe, f"{QUEUE} create mine {AT} --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=mine --spot", describe]
    archive, copy, *install = dry("setup", "--nfs=10.0.0.2:/share")
    assert archive == f"tar -czf /tmp/jaxlm-mine.tgz -C {ROOT} pyproject.toml README.md LICENSE configs jaxlm"
    assert copy == f"{QUEUE} scp /tmp/jaxlm-mine.tgz mine:jaxlm.tgz {AT} --node=all --worker=all"
    install = "\n".join(install)
    assert install.startswith(f"{QUEUE} ssh mine {AT} --node=all --worker=all '--command=set -e; ") and "mount -t nfs 10.0.0.2:/share /mnt/jaxlm" in install
    assert "'\\''./source[tpu]'\\''" in install and "mount" not in "\n".join(dry("setup"))
    assert dry("logs") == [f"{QUEUE} ssh mine {AT} --node=0 --worker=0 '--command=tail -n 200 -F run.log'"]
    assert dry("delete") == [describe, f"{QUEUE} delete mine {AT} --force --quiet"]
    [stop] = dry("stop")
    assert stop.startswith(f"{QUEUE} ssh mine {AT} --node=all --worker=all '--command=") and "pkill -TERM" in stop


def test_commands_of_several_slices_and_other_chips():
    assert dry("create", "--type=v5p-32", "--slices=2", "--project=p")[1] == (
        f"{QUEUE} create mine {AT} --project=p --accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=mine")
    assert "--runtime-version=v2-alpha-tpuv6e " in dry("create", "--type=v6e-8")[1] and "--runtime-version=mine" in dry("create", "--runtime=mine")[1]


def test_a_resume_makes_the_request_anew():
    lines = [line for line in dry("resume", "--", "train", "--workdir=/mnt/jaxlm/a") if line.startswith(("gcloud", "tar"))]
    verbs = [line.split()[4] if line.startswith("gcloud") else "tar" for line in lines]
    assert verbs == ["describe", "delete", "describe", "create", "describe", "tar", "scp", "ssh", "ssh"]


def test_arguments_arrive_as_they_were_given(tmp_path):
    """What `run` sends is run here, by a shell, as the worker would."""
    program(tmp_path / "venv" / "bin", "jaxlm", 'printf "%s\\n" "$@"; exit 3')
    program(tmp_path, "gcloud", 'for a in "$@"; do case $a in --command=*) bash -c "${a#--command=}" ;; esac; done')
    given = ["train", "--config.train.steps=2 epochs", "--config.data.licences=(('web', \"CC $HOME\"),)"]
    for _ in range(2):
        code, output, error = call(TPU, "run", "mine", AT, "--", *given, folder=tmp_path)
        assert code == 0, error
        wait_for(lambda: (tmp_path / "run.code").exists() and (tmp_path / "run.code").read_text())
        assert (tmp_path / "run.log").read_text().splitlines()[-3:] == given and (tmp_path / "run.code").read_text() == "3\n"


def wait_for(done, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def cloud(folder: pathlib.Path, state: str) -> None:
    """A gcloud where the request is in a state, "" for none; a request made is active at once."""
    (folder / "state").write_text(state)
    program(folder, "gcloud", f"""cd {folder}; echo "$4" >> asked
        case $4 in
          describe) if [ -s state ]; then cat state; else echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi ;;
          create) echo ACTIVE > state ;;
          delete) : > state ;;
        esac""")


@pytest.mark.parametrize(("verb", "state", "asked", "code"), [
    ("create", "", ["describe", "create", "describe"], 0), ("create", "ACTIVE", ["describe", "describe"], 0), ("create", "SUSPENDED", ["describe"], 2),
    ("delete", "", ["describe"], 0), ("delete", "ACTIVE", ["describe", "delete"], 0),
    ("resume", "ACTIVE", ["describe", "describe", "describe", "scp", "ssh", "ssh"], 0),
    ("resume", "SUSPENDED", ["describe", "delete", "describe", "create", "describe", "scp", "ssh", "ssh"], 0)])
def test_what_is_there_is_not_made_twice(tmp_path, verb, state, asked, code):
    cloud(tmp_path, state)
    found, _, error = call(TPU, verb, "mine", AT, *["--", "train"] * (verb == "resume"), folder=tmp_path)
    assert (found, (tmp_path / "asked").read_text().split()) == (code, asked), error


def test_a_cloud_that_does_not_answer_is_not_an_absent_request(tmp_path):
    program(tmp_path, "gcloud", 'echo "$4" >> asked; echo "ERROR: you do not have permission" >&2; exit 1')
    code, _, error = call(TPU, "create", "mine", AT, folder=tmp_path)
    assert code == 2 and "permission" in error and (tmp_path / "asked").read_text().split() == ["describe"]


@pytest.mark.parametrize(("script", "arguments", "words"), [
    (TPU, ["create", "mine"], "--zone"), (TPU, ["create", "Mine", AT], "lower-case"), (TPU, ["make", "mine", AT], "unknown verb make"),
    (TPU, ["create", "mine", AT, "--slices=0"], "--slices=0"), (TPU, ["create", "mine", AT, "--type=h100-8"], "--type=h100-8"),
    (TPU, ["setup", "mine", AT, "--nfs=a:/b;reboot"], "ADDRESS:/SHARE"), (TPU, ["run", "mine", AT], "after --"),
    (LAUNCH / "ssh.sh", ["a,b"], "after --"), (LAUNCH / "ssh.sh", ["a;reboot", "--", "train"], "HOST=a;reboot"),
    (LAUNCH / "xpk.sh", ["mine", "--", "train"], "--cluster"), (LAUNCH / "slurm.sh", ["train"], "usage")])
def test_mistakes_are_one_line(script, arguments, words):
    code, output, error = call(script, *arguments)
    assert code == 2 and not output and words in error and error.count("\n") == 1


def test_xpk_command():
    code, output, _ = call(LAUNCH / "xpk.sh", "mine", "--cluster=c", "--zone=z", "--type=v5litepod-16", "--slices=2", "--image=i:tpu", "--dry_run",
                           "--", "train", "--config.train.steps=2 epochs")
    assert code == 0 and output == ("xpk workload create --workload=mine --cluster=c --zone=z --tpu-type=v5litepod-16 --num-slices=2 --docker-image=i:tpu "
                                    "--max-restarts=100 --restart-on-exit-codes=75 --command=jaxlm\\ train\\ --config.train.steps=2\\\\\\ epochs \n")


@pytest.mark.parametrize(("code", "finished", "restarts", "queued"), [(0, True, 0, False), (0, False, 3, True), (75, False, 0, True), (2, False, 0, False),
                                                                    (1, False, 100, False)])
def test_slurm_queues_an_unfinished_run_again(tmp_path, code, finished, restarts, queued):
    program(tmp_path, "srun", f'echo "$@" > ran; exit {code}')
    program(tmp_path, "scontrol", 'echo "$@" > queued')
    if finished:
        (tmp_path / "FINISHED").touch()
    found, _, _ = call(LAUNCH / "slurm.sh", "train", "--config=a b", f"--workdir={tmp_path}", folder=tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    assert found == code and (tmp_path / "ran").read_text() == f"--kill-on-bad-exit=1 .venv/bin/jaxlm train --config=a b --workdir={tmp_path}\n"
    assert (tmp_path / "queued").exists() == queued and (not queued or (tmp_path / "queued").read_text() == "requeue 7\n")


def test_ctrl_c_ends_every_host_with_a_checkpoint(tmp_path):
    program(tmp_path, "ssh", 'bash -c "${@: -1}"')
    program(tmp_path / ".venv" / "bin", "jaxlm", 'me=${@: -1}; trap "echo saved; exit 0" TERM; echo "$@" > "$me.args"; while true; do sleep 0.05; done')
    script = subprocess.Popen(["bash", LAUNCH / "ssh.sh", "node1,me@node2", f"--folder={tmp_path}", "--", "train", "--steps=2 epochs"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, start_new_session=True)
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.args"))) == 2)
        os.killpg(script.pid, signal.SIGINT)  # as a terminal does
        output, _ = script.communicate(timeout=20)
    finally:
        script.kill()
    assert script.returncode == 0 and "[node1] saved" in output and "[me@node2] saved" in output, output
    assert [(tmp_path / f"--process={i}.args").read_text() for i in range(2)] == [
        f"train --steps=2 epochs --coordinator=node1:8476 --processes=2 --process={i}\n" for i in range(2)]
