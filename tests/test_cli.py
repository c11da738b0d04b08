"""The command line as a user meets it: help that teaches, one line for a mistake, nothing half-written."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from jaxlm import cli
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]


def test_help_names_every_verb():
    done = subprocess.run([sys.executable, "-m", "jaxlm", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert verb in done.stdout
    assert {p.stem for p in (ROOT / "jaxlm" / "bin").glob("*.py")} - {"__init__"} == set(cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_teaches(verb, capsys):
    assert cli.run(verb, ["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"jaxlm {verb}: ") and len(re.findall(rf"jaxlm {verb} (?:audit \S+ )?--", text)) >= 2 and "Flags:" in text
    assert f"`jaxlm {verb}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["fly"], "unknown verb 'fly'; known: prepare, tokenizer, train"),
    (["train"], "config"),
    (["train", "--config=quickstart"], "workdir"),
    (["train", "--config=quickstrat", "--workdir={tmp}"], "did you mean 'quickstart'?"),
    (["train", "--config=quickstart", "--workdir={tmp}", "--config.optim.lrr=1"], "did you mean config.optim.lr?"),
    (["train", "--config=quickstart", "--workdir={tmp}", "--config.optim.lr"], "write --config.optim.lr=value"),
    (["train", "--config=quickstart", "--workdir={tmp}", "--config.optim.lr=high"], "it must be a number"),
    (["train", "--config=quickstart", "--workdir={tmp}", "--wokrdir=x"], "wokrdir"),
    (["train", "--config=quickstart", "--workdir={tmp}", "more"], "unexpected argument 'more'"),
    (["train", "--config=quickstart", "--workdir={tmp}", "--config.data.source={tmp}/nothing.txt"], "nothing.txt"),
    (["train", "--config=gpt2_124m", "--workdir={tmp}"], "data.source"),
    (["eval", "--workdir={tmp}/none"], "none does not exist"),
    (["generate", "--workdir={tmp}/none", "--prompt=x"], "none does not exist"),
    (["prepare", "--config=quickstart"], "--out"),
])
def test_a_mistake_is_one_line_and_code_2(arguments, words, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main([a.format(tmp=tmp_path / "run") for a in arguments])
    check_mistake(ended.value.code, "".join(capfd.readouterr()), words)
    assert not list((tmp_path / "run").glob("checkpoints/*")) if (tmp_path / "run").exists() else True


def check_mistake(code, output, words):
    assert code == 2, output
    lines = output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("jaxlm: ") and words in lines[0], output


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    """With whatever its imports print."""
    check_mistake(*runs.finish("train", "--config=quickstart", f"--workdir={tmp_path}", f"--config.data.source={tmp_path}/nothing.txt"), "nothing.txt")


def test_our_own_faults_keep_their_traceback(monkeypatch, tmp_path):
    module = tmp_path / "x.py"
    module.write_text("def fault():\n    raise ValueError('from a library')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import jaxlm.bin.tokenizer
    import x
    monkeypatch.setattr(jaxlm.bin.tokenizer, "main", lambda *_: x.fault())
    with pytest.raises(ValueError, match="from a library"):
        cli.run("tokenizer", ["--model=a", "--text=b"])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(tmp_path):
    from jaxlm.train import checkpoint
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        recipe = runs.recipe(tmp_path, steps=400, every=2)
        code, output = runs.finish("train", f"--config={recipe}", f"--workdir={disk / 'run'}", "--config.checkpoint.keep_last=100")
        assert code == 2 and "Traceback" not in output, output
        assert "No space left on device" in output.splitlines()[-1] and output.splitlines()[-1].startswith("jaxlm: ")
        for step in checkpoint.steps(disk / "run"):
            checkpoint.verify(disk / "run", step)
        assert checkpoint.steps(disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_read_only_workdir_is_one_line(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        code, output = runs.finish("train", "--config=quickstart", f"--workdir={tmp_path / 'run'}")
        assert code == 2 and "Read-only file system" in output and len(output.strip().splitlines()) == 1
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_the_compiler_flag_that_keeps_sums_right():
    """jaxlib 0.10.2 on CPUs gives 1071645696 here without the flag that the command line sets."""
    code = ("import jaxlm.cli; jaxlm.cli.set_environment(False)\nimport jax, jax.numpy as jnp, numpy as np\n"
            "rows = np.zeros((32769, 3), np.float32); rows[:, 0] = np.arange(32769)\n"
            "out = jax.jit(jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2)))(rows)\nassert out[-1] == 1073741824, out[-1]")
    subprocess.run([sys.executable, "-c", code], check=True, env=runs.environment(optimised=True))


def test_huge_pages_are_asked_for_once_and_only_where_linux_gives_them_on_request(tmp_path, monkeypatch):
    started, setting = [], tmp_path / "enabled"
    monkeypatch.setattr(cli.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(cli, "_PAGES_ON_REQUEST", setting)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # restored at the end, whatever is done to it
    monkeypatch.delenv("GLIBC_TUNABLES")
    for text in ("always madvise [never]", "[always] madvise never", None):
        setting.write_text(text) if text else setting.unlink()
        cli.use_huge_pages()
    assert not started and "GLIBC_TUNABLES" not in os.environ
    setting.write_text("always [madvise] never")
    for _ in range(2):  # the second time as the process that was started anew
        cli.use_huge_pages()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])] and os.environ["GLIBC_TUNABLES"].startswith("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=")


@pytest.mark.parametrize("flags, threads", [("--xla_force_host_platform_device_count=4", "64"), ("", None)])
def test_emulated_devices_get_threads_to_meet_in_collectives(monkeypatch, flags, threads):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PJRT_NPROC", "1")  # restored at the end
    cli.let_emulated_devices_meet()
    assert os.environ["PJRT_NPROC"] == "1"  # the user's wins
    monkeypatch.delenv("PJRT_NPROC")
    cli.let_emulated_devices_meet()
    assert os.environ.get("PJRT_NPROC") == threads
