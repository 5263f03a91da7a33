"""Every script of launch/: linted; dry runs against what is committed; and run with stand-ins for the cloud.

`python tests/test_launch_scripts.py` writes the dry runs anew.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import jsonschema
import pytest
import yaml

from attnres_jax.bench import target

ROOT = Path(__file__).parent.parent
LAUNCH, GOLDEN = ROOT / "launch", ROOT / "tests/golden/launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
README = (LAUNCH / "README.md").read_text()
WORDS = ["--config=lm:d12,block8", "--workdir=/mnt/attnres/d12"]
TPU = {"NAME": "d12", "ZONE": "us-east5-b", "TYPE": "v6e-64"}
GKE = {"NAME": "d12", "IMAGE": "here/attnres:1", "BUCKET": "my-bucket", "ACCELERATOR": "tpu-v6e-slice"}
XPK = {
    "CLUSTER": "mine",
    "ZONE": "us-east5-b",
    "TYPE": "v6e-64",
    "IMAGE": "here/attnres:1",
    "STORAGE": "runs",
}
# Enough for any script to tell what it would run.
DRY_RUN = TPU | GKE | XPK | {"TOPOLOGY": "8x8", "SLURM_SUBMIT_DIR": ".", "DRY_RUN": "1"}
DRY = {
    "tpu_vm-up": ("tpu_vm.sh", TPU | {"MOUNT": "10.0.0.2:/runs"}, ["up", *WORDS]),
    "tpu_vm-create-spot": ("tpu_vm.sh", TPU | {"SPOT": "1", "PROJECT": "p"}, ["create"]),
    "tpu_vm-create-two-reserved": (
        "tpu_vm.sh",
        TPU | {"SLICES": "2", "RESERVED": "1", "TYPE": "v5p-128"},
        ["create"],
    ),
    "tpu_vm-start-eval": ("tpu_vm.sh", TPU, ["start", "eval", "--workdir=/mnt/attnres/d12"]),
    "tpu_vm-wait": ("tpu_vm.sh", TPU, ["wait"]),
    "tpu_vm-logs-all": ("tpu_vm.sh", TPU | {"HOSTS": "all"}, ["logs"]),
    "tpu_vm-code": ("tpu_vm.sh", TPU, ["code"]),
    "tpu_vm-stop": ("tpu_vm.sh", TPU, ["stop"]),
    "tpu_vm-profile": ("tpu_vm.sh", TPU, ["profile", *WORDS]),
    "tpu_vm-state": ("tpu_vm.sh", TPU, ["state"]),
    "tpu_vm-ssh": ("tpu_vm.sh", TPU, ["ssh", "df -h"]),
    "tpu_vm-delete": ("tpu_vm.sh", TPU, ["delete"]),
    "retry_spot": ("retry_spot.sh", TPU, WORDS),
    "host-setup-nfs": ("host.sh", {"MOUNT": "10.0.0.2:/runs"}, ["setup"]),
    "host-setup-bucket": ("host.sh", {"MOUNT": "gs://my-bucket"}, ["setup"]),
    "host-start": ("host.sh", {}, ["start", *WORDS, "--config.data.corpus=/a b"]),
    "worker": ("worker.sh", {}, WORDS),
    "worker-sample": ("worker.sh", {}, ["sample", "--workdir=/mnt/attnres/d12", "--prompt=It is"]),
    "gke-build": ("gke.sh", GKE, ["build"]),
    "gke-apply": ("gke.sh", GKE | {"TOPOLOGY": "8x8"}, ["apply", *WORDS]),
    "gke-apply-two": (
        "gke.sh",
        GKE | {"TOPOLOGY": "4x4x8", "SLICES": "2", "ACCELERATOR": "tpu-v5p-slice"},
        ["apply", *WORDS],
    ),
    "gke-logs": ("gke.sh", GKE, ["logs"]),
    "gke-state": ("gke.sh", GKE, ["state"]),
    "gke-delete": ("gke.sh", GKE, ["delete"]),
    "slurm": ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "."}, WORDS),
    "xpk": ("xpk.sh", XPK | {"SLICES": "2"}, [*WORDS, "--config.data.corpus=/a b"]),
}
STAND_IN = """#!/usr/bin/env bash
{ basename "$0"; printf '%s\\n' "$@"; echo; } >> "$RECORD"
answer() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *" list --filter"*) answer "$STATES" ;;
  *"host.sh code"*) answer "$CODES" ;;
  *"host.sh setup"*) exit "${SETUP:-0}" ;;
esac
if [[ ! -t 0 && $1 == apply ]]; then cat > "$RECORD.applied"; fi
if [[ ${0##*/} == srun ]]; then exit "${SRUN:-0}"; fi
"""


def tool(name):
    """A program of the test extra."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is not installed: pip install the test extra"
    return found


def run(script, variables=None, words=(), **more):
    """Of launch/, with no variables but these."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/home/me"}
    options = {"capture_output": True, "text": True, "check": False, "timeout": 60, "cwd": ROOT} | more
    return subprocess.run([LAUNCH / script, *words], env=clean | (variables or {}), **options)


def dry(name):
    script, variables, words = DRY[name]
    return run(script, variables | {"DRY_RUN": "1"}, words)


@pytest.fixture
def stand_ins(tmp_path):
    """Variables that put recording stand-ins first on PATH; `calls` reads what they were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "xpk", "docker", "srun", "scontrol"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    files = {name: tmp_path / name.lower() for name in ("RECORD", "STATES", "CODES")}
    for file in files.values():
        file.touch()
    return {name: str(file) for name, file in files.items()} | {"PATH": f"{folder}:{os.environ['PATH']}"}


def calls(variables):
    """Each call: program and arguments."""
    return [call.splitlines() for call in Path(variables["RECORD"]).read_text().split("\n\n") if call]


def answers(variables, states, codes=()):
    Path(variables["STATES"]).write_text("".join(f"{state}\n" for state in states))
    Path(variables["CODES"]).write_text("".join(f"{code}\n" for code in codes))


def verbs(variables):
    """What each gcloud call was for: create, list, delete, scp, or the verb of host.sh."""
    remote = [re.search(r"host\.sh (\w+)", " ".join(call)) for call in calls(variables)]
    return [found[1] if found else call[4] for found, call in zip(remote, calls(variables), strict=True)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_silent(script):
    ran = subprocess.run(
        [tool("shellcheck"), "-x", "-P", "SCRIPTDIR", "--enable=quote-safe-variables", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_hadolint_is_silent():
    ran = subprocess.run([tool("hadolint"), LAUNCH / "gke/Dockerfile"], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_the_image_has_what_it_copies():
    """What the ignore file lets through exists, and is all that an install needs."""
    ignored = (LAUNCH / "gke/Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"attnres_jax", "configs", "pallas_kernels", "launch", "pyproject.toml", "requirements"} <= set(
        kept
    )
    assert "requirements/tpu.txt" in (LAUNCH / "gke/Dockerfile").read_text()


@pytest.mark.parametrize("name", DRY)
def test_dry_runs(name):
    """They print what is committed, run nothing, and succeed."""
    ran = dry(name)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout == (GOLDEN / f"{name}.txt").read_text()


def test_words_arrive_as_they_were_given(stand_ins):
    """Through the shells of ssh and of a pod."""
    words = [*WORDS, """--config.data.corpus=/a  'b' "c" $d"""]
    assert run("tpu_vm.sh", stand_ins | TPU, ["start", *words]).returncode == 0
    assert run("xpk.sh", stand_ins | XPK, words).returncode == 0
    found = [
        arg.partition("=")[2] for call in calls(stand_ins) for arg in call if arg.startswith("--command")
    ]
    starts = [["attnres/launch/host.sh", "start"], ["launch/worker.sh"]]
    assert [shlex.split(command) for command in found] == [[*start, *words] for start in starts]


def test_the_pod_command_of_the_readme(stand_ins):
    """Verbatim: what gcloud gets is what the dry run of the same words said."""
    (command,) = re.findall(r"^NAME=.*tpu_vm\.sh up.*$", README, re.MULTILINE)
    answers(stand_ins, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    home = {"HOME": "/home/me", "POLL": "0"}
    ran = subprocess.run(
        ["bash", "-ec", command], env=stand_ins | home, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert verbs(stand_ins) == ["create", "list", "list", "list", "scp", "ssh", "setup", "start", "logs"]
    golden = (GOLDEN / "tpu_vm-up.txt").read_text().splitlines()
    wanted = [shlex.split(line) for line in golden if line.startswith("gcloud")]
    found = calls(stand_ins)
    assert found[0] == wanted[0]
    start = wanted[-2]
    start[8] += " --config.mesh.fsdp=8"
    assert found[-2:] == [start, wanted[-1]]
    archive = Path(found[4][5])
    assert archive.name == "attnres.tar.gz"
    assert not archive.exists()  # it was sent and is gone


def test_the_other_commands_of_the_readme(stand_ins, tmp_path):
    """All lines of the second block run, and mistakes in them would not."""
    (block,) = re.findall(r"```sh\n(export NAME=.*?)```", README, re.DOTALL)
    answers(stand_ins, [], [0])
    ran = subprocess.run(
        ["bash", "-ec", block],
        env=stand_ins | {"OUT": str(tmp_path / "profile")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert verbs(stand_ins) == ["logs", "code", "stop", "start", "scp", "delete"]


def test_the_readme_names_every_script():
    for script in SCRIPTS:
        assert script.name in README or script.name in ("lib.sh", "technical_corpus.sh"), script.name


@pytest.mark.parametrize(
    ("states", "codes", "code", "wanted"),
    [
        # There is none; it comes; the run ends.
        (["", "PROVISIONING", "ACTIVE", "ACTIVE"], ["running", 0], 0, ["create", "setup", "start"]),
        # Taken away in the middle: another, which goes on.
        (
            ["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"],
            ["running", 0],
            0,
            ["setup", "start", "delete", "create", "setup", "start"],
        ),
        # One host dies first, the slice says so later.
        (
            ["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"],
            [1, 0],
            0,
            ["setup", "start", "delete", "create", "setup", "start"],
        ),
        # The hosts were started anew.
        (["ACTIVE", "ACTIVE"], ["lost", 0], 0, ["setup", "start", "setup", "start"]),
        # The run's own fault, and a stop that was asked for.
        (["ACTIVE", "ACTIVE"], [2], 2, ["setup", "start"]),
        (["ACTIVE", "ACTIVE"], [75], 75, ["setup", "start"]),
    ],
    ids=["created", "taken", "host first", "restarted", "fails", "stopped"],
)
def test_spot_slices(stand_ins, states, codes, code, wanted):
    """`states` are what looks at the slice find, one after the other, `codes` those at the run."""
    answers(stand_ins, states, codes)
    ran = run("retry_spot.sh", stand_ins | TPU | {"POLL": "0"}, WORDS)
    assert ran.returncode == code, ran.stderr
    done = [verb for verb in verbs(stand_ins) if verb not in ("list", "code", "scp", "ssh")]
    assert done == wanted
    assert all("--spot" in call for call in calls(stand_ins) if call[4] == "create")


def test_spot_slices_that_never_work(stand_ins):
    answers(stand_ins, ["ACTIVE"] * 9)
    ran = run("retry_spot.sh", stand_ins | TPU | {"POLL": "0", "SETUP": "1"}, WORDS)
    assert ran.returncode == 2
    assert "error: the run could not be started" in ran.stderr
    answers(stand_ins, ["ACTIVE"] * 9, ["lost"] * 9)
    ran = run("retry_spot.sh", stand_ins | TPU | {"POLL": "0", "RETRIES": "3"}, WORDS)
    assert ran.returncode == 2
    assert "error: 3 slices were taken away" in ran.stderr


@pytest.mark.parametrize(
    ("script", "variables", "words", "message"),
    [
        ("tpu_vm.sh", {}, ["create"], "ZONE is not set: the zone that has the chips, such as"),
        (
            "tpu_vm.sh",
            {"ZONE": "z"},
            ["create"],
            "TYPE is not set: the accelerator type, such as TYPE=v6e-64",
        ),
        ("tpu_vm.sh", TPU | {"TYPE": "v9-8"}, ["create"], "TYPE=v9-8 is none of v4-N"),
        ("tpu_vm.sh", TPU, ["upp"], "expected a verb such as up, got 'upp'"),
        ("tpu_vm.sh", TPU, ["up", "--config=quick"], "--workdir is missing"),
        ("tpu_vm.sh", TPU, ["up", "--workdir=runs/a"], "it must be absolute, such as /mnt/attnres/d12"),
        (
            "tpu_vm.sh",
            TPU,
            ["start", "--workdir=gs://b/a"],
            "--workdir=gs://b/a is no path: mount the bucket",
        ),
        ("retry_spot.sh", TPU, [], "--workdir is missing"),
        ("host.sh", {}, [], "expected setup, start, logs, code or stop, got ''"),
        ("worker.sh", {}, ["--config=quick"], "--workdir is missing"),
        ("xpk.sh", {}, WORDS, "CLUSTER is not set: the cluster that xpk made"),
        ("gke.sh", {}, ["apply", *WORDS], "IMAGE is not set"),
        ("gke.sh", {}, ["aply"], "expected build, print, apply"),
        ("gke.sh", GKE | {"TOPOLOGY": "8"}, ["print", *WORDS], "TOPOLOGY=8 is not like 4x4"),
        ("gke.sh", GKE | {"TOPOLOGY": "3x3"}, ["print", *WORDS], "has 9 chips, which CHIPS=4"),
    ],
)
def test_mistakes_end_in_one_line(script, variables, words, message, stand_ins):
    ran = run(script, stand_ins | variables, words)
    assert ran.returncode == 2, ran.stdout
    assert ran.stderr.startswith("error: ")
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert calls(stand_ins) == []


@pytest.mark.parametrize(("srun", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm(stand_ins, srun, requeued):
    """What srun runs, and that only a run that was stopped is queued again."""
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SRUN": str(srun)}
    ran = run("slurm.sbatch", stand_ins | job, WORDS, cwd="/")
    assert ran.returncode == srun, ran.stderr
    found = calls(stand_ins)
    assert found[0] == ["srun", "--kill-on-bad-exit=1", "--label", "launch/worker.sh", *WORDS]
    assert found[1:] == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_manifests_are_jobsets():
    """As committed, and as gke.sh makes them; and the schema finds mistakes."""
    schema = json.loads((GOLDEN / "jobset-v0.12.0.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema).validate
    for kind, slices in (("single-slice", "1"), ("multislice", "2")):
        check(yaml.safe_load((LAUNCH / f"gke/{kind}.yaml").read_text()))
        words = ["print", *WORDS, '--config.data.corpus=/a "b" \\']
        made = run("gke.sh", GKE | {"TOPOLOGY": "8x16", "SLICES": slices, "CHIPS": "8"}, words)
        manifest = yaml.safe_load(made.stdout)
        check(manifest)
        (job,) = manifest["spec"]["replicatedJobs"]
        assert (job["replicas"], job["template"]["spec"]["completions"]) == (int(slices), 16)
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["args"] == words[1:]
        assert container["resources"]["limits"] == {"google.com/tpu": 8}
        job["template"]["spec"]["backofLimit"] = 0
        with pytest.raises(jsonschema.ValidationError, match="'backofLimit' was unexpected"):
            check(manifest)


def test_apply_sends_the_manifest(stand_ins):
    variables = GKE | {"TOPOLOGY": "8x8"}
    ran = run("gke.sh", stand_ins | variables, ["apply", *WORDS])
    assert ran.returncode == 0, ran.stderr
    assert calls(stand_ins) == [["kubectl", "apply", "--filename=-"]]
    assert (
        Path(stand_ins["RECORD"] + ".applied").read_text()
        == run("gke.sh", variables, ["print", *WORDS]).stdout
    )


TRAINING = """#!/usr/bin/env bash
echo "began: $*; cache $JAX_COMPILATION_CACHE_DIR"
trap 'echo saved; exit 75' TERM
for ((i = 0; i < 600; i++)); do sleep 0.1; if [[ -e $HOME/end ]]; then exit 0; fi; done
"""


def test_a_host_for_real(tmp_path):
    """Start, look, stop, go on to the end, with a stand-in for the training only."""
    python = tmp_path / "python"
    python.write_text(TRAINING)
    python.chmod(0o755)
    variables = {"HOME": str(tmp_path), "PYTHON": str(python)}

    def host(*words):
        ran = run("host.sh", variables, words)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    assert host("code") == "lost"
    host("start", *WORDS)
    assert host("code") == "running"
    again = run("host.sh", variables, ["start", *WORDS])
    assert again.returncode == 2
    assert "a run is going on here" in again.stderr
    wait_for(lambda: "began" in (tmp_path / "attnres.log").read_text())
    host("stop")
    wait_for(lambda: host("code") == "75")
    assert host("logs").splitlines() == [
        f"began: -m attnres_jax train --requeue {' '.join(WORDS)}; cache /mnt/attnres/compiled",
        "saved",
    ]
    assert host("stop") == "nothing runs here"
    host("start", *WORDS)
    wait_for(lambda: "began" in (tmp_path / "attnres.log").read_text())
    # A host that shuts down signals all: the code is written down all the same.
    os.killpg(os.getpgid(int((tmp_path / "attnres.pid").read_text())), signal.SIGTERM)
    wait_for(lambda: host("code") == "75")
    host("start", *WORDS)
    (tmp_path / "end").touch()
    wait_for(lambda: host("code") == "0")


ON_A_CHIP = """
import jax, jax.numpy as jnp
from attnres_jax.bench import target
place = jax.sharding.SingleDeviceSharding(target.topology("v5e:2x2")[0])
jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=place)).compile()
"""


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("more", "code"), [("", 0), ("--xla_no_such_flag=1", 1)])
def test_libtpu_knows_the_flags(more, code):
    """That README names; it would say so if it did not."""
    (named,) = re.findall(r"LIBTPU_INIT_ARGS=(--\S+?)`", README)
    flags = {"LIBTPU_INIT_ARGS": f"{named} {more}"}
    words = [sys.executable, "-c", ON_A_CHIP]
    ran = subprocess.run(words, env=os.environ | target.ENVIRONMENT | flags, capture_output=True, check=False)
    assert (ran.returncode != 0) == bool(code), ran.stderr


@pytest.mark.slow
def test_a_run_for_real(tmp_path):
    """Stopped and started again as tpu_vm.sh does, the training real."""
    folder = tmp_path / "run"
    words = [f"--workdir={folder}", *cluster.command(folder, train__steps=400, checkpoint__every=100)[6:]]
    words.insert(0, "--config=quick")
    variables = cluster.environment() | {"HOME": str(tmp_path), "PYTHON": sys.executable}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    }

    def host(*more):
        return run("host.sh", variables | cache, more).stdout.strip()

    host("start", *words)
    wait_for(lambda: cluster.losses(folder) or host("code") != "running", 120)
    host("stop")
    wait_for(lambda: host("code") == "75")
    (saved,) = cluster.finished(folder)[-1:]
    assert 0 < saved < 400
    host("start", *words)
    wait_for(lambda: host("code") == "0", 120)
    assert cluster.finished(folder)[-1] == 400
    assert f"updates {saved} to 400" in host("logs")


def wait_for(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


if __name__ == "__main__":
    for each in DRY:
        (GOLDEN / f"{each}.txt").write_text(dry(each).stdout)
