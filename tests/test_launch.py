"""The files of launch/: their syntax, and a dry execution in which every host starts the right command.

Stand-ins for python, srun, gcloud, sudo docker and a cluster's controllers are on the PATH; nothing is trained.
"""

import ast
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from jax._src.clusters import K8sCluster, SlurmCluster
from launch_schemas import JOBSET, SKYPILOT, check_kubernetes

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("cpu", "gpu", "tpu", "local.sh", "slurm.sbatch", "tpu_vm.sh")
MANIFESTS = ("jobset_gpu.yaml", "jobset_tpu.yaml")
DEVICES = ("cpu", "gpu", "tpu")
# Spaces, quotes, patterns and an empty value, all of which must arrive as they are.
ARGUMENTS = [
    "--config=shapes",
    "--workdir=a b",
    "--config.data.shards=*.tar",
    "--config.data.caption=it's $HOME",
    "--x=",
]
COMMAND = ["-m", "lcm_jax.main", *ARGUMENTS]

# Records its arguments and its environment, and exits with the code in the file of its number, if there is one.
PYTHON = """
folder=$STARTED/$(date +%s%N)-$$
mkdir -p "$folder"
env -0 > "$folder/env"
printf '%s\\0' "$@" > "$folder/args"
[ -z "${SLEEPS:-}" ] || { trap 'kill $!; exit 75' TERM; echo ready; sleep 60 & wait; }
exit "${CODES:-0}"
"""
# A task for each of the job's, with the variables that srun sets; it exits with the highest code, as srun does.
SRUN = """
echo "srun $*" >> "$STARTED/log"
while [ "${1#-}" != "$1" ]; do shift; done
export SLURM_NTASKS=$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1})) SLURM_STEP_NODELIST='node[3-4]'
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS highest=0
for ((SLURM_PROCID = 0; SLURM_PROCID < SLURM_NTASKS; SLURM_PROCID++)); do
  export SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % ${SLURM_NTASKS_PER_NODE:-1}))
  code=0
  "$@" || code=$?
  [ "$code" -le "$highest" ] || highest=$code
done
exit "$highest"
"""
# `list` prints the next of the states in $STATES, a comma after each; `ssh` runs the command for four workers.
GCLOUD = """
echo "gcloud $*" >> "$STARTED/log"
case $4 in
  list) number=$(cat "$STARTED/lists" 2>/dev/null || echo 1); echo $((number + 1)) > "$STARTED/lists"
    echo "$STATES" | cut -d, -f "$number" ;;
  ssh) number=$(cat "$STARTED/starts" 2>/dev/null || echo 1); echo $((number + 1)) > "$STARTED/starts"
    code=0
    for argument; do case $argument in --command=*)
      for worker in 0 1 2 3; do
        CODES=$(echo "$SSH_CODES" | cut -d, -f "$number") bash -c "${argument#--command=}" || code=$?
      done ;;
    esac; done
    exit "$code" ;;
esac
"""
SUDO = """
echo "$*" >> "$STARTED/log"
[ "$2" = run ] || exit 1  # there is no container to remove
while [ "$1" != IMAGE ]; do
  case $1 in --env=*) export "${1#--env=}" ;; esac
  shift
done
shift
"$@"
"""


class Host:
    """A PATH with stand-ins, and what they have started."""

    def __init__(self, folder: Path):
        self.bin, self.started = folder / "bin", folder / "started"
        self.bin.mkdir()
        self.started.mkdir()
        for name, body in {"python": PYTHON, "srun": SRUN, "gcloud": GCLOUD, "sudo": SUDO}.items():
            self.add(name, body)
        self.add("scontrol", 'echo "scontrol $*" >> "$STARTED/log"')
        self.environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "STARTED": str(self.started), "HOME": "/root"}

    def add(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (self.bin / name).chmod(0o755)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        environment = self.environment | variables
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def log(self) -> list[str]:
        return (self.started / "log").read_text().splitlines()

    def processes(self) -> list[SimpleNamespace]:
        """Return the arguments and the environment of each python that was started, in their order."""
        read = lambda path: path.read_text().split("\0")[:-1]  # noqa: E731
        folders = sorted(path for path in self.started.iterdir() if path.is_dir())
        return [
            SimpleNamespace(args=read(path / "args"), env=dict(item.split("=", 1) for item in read(path / "env")))
            for path in folders
        ]


@pytest.fixture
def host(tmp_path) -> Host:
    return Host(tmp_path)


def manifest(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name):
    path = ROOT / "launch" / name
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/usr/bin/env bash\n# ")
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_each_device_starts_the_command(host, device):
    ran = host.run(f"launch/{device}", *ARGUMENTS, CODES="75")
    assert ran.returncode == 75, "the command's own exit code"
    [process] = host.processes()
    assert process.args == COMMAND
    if device != "cpu":
        platform = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}[device]
        assert process.env["JAX_PLATFORMS"] == platform and process.env["PYTHONUNBUFFERED"] == "1"
    printed = host.run(f"launch/{device}", *ARGUMENTS, PRINT_ONLY="1")
    assert printed.returncode == 0 and len(host.processes()) == 1, "nothing was started"
    assert shlex.split(printed.stdout)[-len(COMMAND) - 1 :] == ["python", *COMMAND]
    host.run(f"launch/{device}", MODULE="lcm_jax.cache")
    assert host.processes()[1].args == ["-m", "lcm_jax.cache"]


def test_variables_that_are_set_take_precedence(host):
    mine = {"JAX_PLATFORMS": "cpu", "XLA_CLIENT_MEM_FRACTION": "0.5", "XLA_FLAGS": "--xla_mine=1"}
    host.run("launch/gpu", **mine)
    environment = host.processes()[0].env
    assert environment["XLA_FLAGS"].endswith(" --xla_mine=1")
    assert {name: environment[name] for name in mine} == mine | {"XLA_FLAGS": environment["XLA_FLAGS"]}


def test_xla_knows_the_flags(host):
    """An unknown flag aborts the process; a build for CPUs parses those of GPUs too."""
    host.run("launch/gpu")
    flags = host.processes()[0].env["XLA_FLAGS"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_local_starts_processes_that_find_each_other(host):
    assert host.run("launch/local.sh", *ARGUMENTS, DEVICE="cpu").returncode == 0
    [alone] = host.processes()
    assert alone.args == COMMAND, "one process needs no address"
    assert host.run("launch/local.sh", *ARGUMENTS, PROCESSES="3", PORT="4321").returncode == 0
    several = host.processes()[1:]
    addresses = [f"--coordinator=127.0.0.1:4321 --num_processes=3 --process_id={number}".split() for number in range(3)]
    assert sorted(process.args for process in several) == [[*COMMAND, *address] for address in addresses]
    assert all(process.args[-1][-1] == process.env["JAX_LOCAL_DEVICE_IDS"] for process in several)
    printed = host.run("launch/local.sh", *ARGUMENTS, PROCESSES="2", PORT="4321", PRINT_ONLY="1").stdout
    assert len(printed.splitlines()) == 2 and "--process_id=1" in printed.splitlines()[1]
    for code in ("75", "1"):
        assert host.run("launch/local.sh", PROCESSES="2", PORT="4321", CODES=code).returncode == int(code)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DEVICE": "abacus"}, "DEVICE abacus is not supported; use gpu, tpu or cpu"),
        ({"PROCESSES": "two"}, "PROCESSES two is not a number of processes; use 1 or more"),
        (
            {"PROCESSES": "2", "DEVICE": "tpu"},
            "PROCESSES 2 is not supported with DEVICE=tpu; use one, which has all chips",
        ),
    ],
)
def test_local_refuses_what_it_cannot_start(host, variables, message):
    ran = host.run("launch/local.sh", **variables)
    assert ran.returncode == 1 and message in ran.stderr and not host.processes()


def test_local_passes_a_stop_to_every_process(host):
    variables = host.environment | {"PROCESSES": "2", "PORT": "4321", "SLEEPS": "1"}
    with subprocess.Popen(["launch/local.sh"], cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE) as running:
        assert [running.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == 75


@pytest.mark.parametrize(("tasks", "nodes"), [(1, 2), (4, 2)])
def test_slurm_starts_a_task_for_each_node_or_gpu(host, tasks, nodes):
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_ON_NODE": "32",
    }
    assert host.run("bash", "launch/slurm.sbatch", *ARGUMENTS, **job).returncode == 0
    processes = host.processes()
    assert [process.args for process in processes] == [COMMAND] * tasks * nodes
    assert f"--cpus-per-task={32 // tasks} " in host.log[0]
    assert len(host.log) == 1, "a complete run is not queued again"
    for number, process in enumerate(processes):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in process.env.items():
                patch.setenv(name, value)
            assert SlurmCluster.is_env_present()
            assert (SlurmCluster.get_process_id(), SlurmCluster.get_process_count()) == (number, tasks * nodes)
            assert SlurmCluster.get_coordinator_address(60, None) == f"node3:{61440 + 7}"
        # Without these JAX would use one GPU of each node.
        assert process.env.get("JAX_LOCAL_DEVICE_IDS") == ("0,1,2,3" if tasks == 1 else None)


def test_slurm_queues_a_stopped_run_again(host):
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}
    for code, restarts, requeued in ((75, 9, True), (137, 2, True), (137, 3, False), (1, 0, False), (130, 0, False)):
        variables = job | {"CODES": str(code), "SLURM_RESTART_COUNT": str(restarts)}
        assert host.run("bash", "launch/slurm.sbatch", **variables).returncode == code
        assert (host.log[-1] == "scontrol requeue 7") == requeued
    refused = host.run("bash", "launch/slurm.sbatch", **job | {"SLURM_NTASKS_PER_NODE": "3"})
    assert refused.returncode == 1 and "use --ntasks-per-node=1 or --ntasks-per-node=4" in refused.stderr
    refused = host.run("bash", "launch/slurm.sbatch")
    assert refused.returncode == 1 and "the job has no GPUs" in refused.stderr
    printed = host.run("bash", "launch/slurm.sbatch", *ARGUMENTS, PRINT_ONLY="1").stdout.splitlines()
    assert printed[0].startswith("JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 srun ")
    assert shlex.split(printed[1])[-len(COMMAND) :] == COMMAND
    directives = re.findall(r"^#SBATCH (\S+)", (ROOT / "launch/slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(directives)


TPU = {"TPU_NAME": "lcm", "ZONE": "zone", "IMAGE": "IMAGE", "RETRY_SECONDS": "0"}


@pytest.mark.parametrize(
    ("states", "codes", "calls", "status"),
    [
        ("READY", "0", "list ssh", 0),
        (",", "0", "list create ssh", 0),  # there is none
        ("PREEMPTED", "0", "list delete create ssh", 0),
        ("REPAIRING,READY", "0", "list list ssh", 0),
        ("READY,READY", "75,0", "list ssh list ssh", 0),
        # Preempted while it runs: the connections end with an error.
        ("READY,PREEMPTED,PREEMPTED", "1,0", "list ssh list list delete create ssh", 0),
        # An error on a slice that is ready: RESTARTS=1.
        ("READY,READY,READY,READY", "1,1", "list ssh list list ssh list", 1),
    ],
)
def test_tpu_vm_starts_every_worker(host, states, codes, calls, status):
    ran = host.run("launch/tpu_vm.sh", *ARGUMENTS, **TPU, STATES=states, SSH_CODES=codes, RESTARTS="1")
    assert ran.returncode == status, ran.stderr
    commands = [line.split() for line in host.log if line.startswith("gcloud ")]
    assert " ".join(words[4] for words in commands) == calls
    starts = [words for words in commands if words[4] == "ssh"]
    assert all("--worker=all" in words for words in starts)
    processes = host.processes()
    assert [process.args for process in processes] == [COMMAND] * 4 * len(starts)
    assert all(process.env["JAX_PLATFORMS"] == "tpu,cpu" for process in processes)


def test_tpu_vm_prints_its_commands(host):
    ran = host.run("launch/tpu_vm.sh", *ARGUMENTS, **TPU, PRINT_ONLY="1", SETUP="mount it")
    created, started = (shlex.split(line) for line in ran.stdout.splitlines())
    assert created[4:6] == ["create", "lcm"] and not host.processes() and not (host.started / "log").exists()
    command = started[-1].removeprefix("--command=")
    assert command.startswith("mount it && ") and shlex.split(command)[-len(ARGUMENTS) :] == ARGUMENTS
    refused = host.run("launch/tpu_vm.sh", ZONE="zone", IMAGE="IMAGE")
    assert refused.returncode == 1 and "TPU_NAME: set it to the name of the slice" in refused.stderr


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_the_fields_of_kubernetes(name):
    jsonschema = pytest.importorskip("jsonschema")
    client = pytest.importorskip("kubernetes").client
    for document in manifest(name):
        check_kubernetes(client, document["metadata"], "V1ObjectMeta")
        if document["kind"] != "JobSet":
            check_kubernetes(client, document, f"V1{document['kind']}")
            continue
        jsonschema.validate(document, JOBSET)
        [job] = document["spec"]["replicatedJobs"]
        check_kubernetes(client, job["template"], "V1JobTemplateSpec")


def pods(jobset: dict) -> Iterator[tuple[int, dict, dict]]:
    """Yield (index, container, environment) of each pod, as the controllers and the kubelet make them."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (
        job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and replicated["replicas"] == 1
    )
    [container] = job["template"]["spec"]["containers"]
    for index in range(job["completions"]):
        environment = {item["name"]: item["value"] for item in container["env"]}
        yield index, container, environment | {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"pod-{index}"}


def expand(text: str, environment: dict[str, str]) -> str:
    """Replace $(NAME) as the kubelet does in a container's command and arguments."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)


@pytest.mark.parametrize(("name", "hosts", "device"), [("jobset_gpu.yaml", 2, "cuda"), ("jobset_tpu.yaml", 4, "tpu")])
def test_jobset_starts_every_pod(host, name, hosts, device):
    jobset = manifest(name)[-1]
    for index, container, environment in pods(jobset):
        words = [expand(word, environment) for word in container["command"] + container["args"]]
        assert host.run(*words, **environment).returncode == 0  # in the folder of the image that is the checkout's
        process = host.processes()[index]
        assert process.args == ["-m", "lcm_jax.main", *container["args"]]
        assert process.env["JAX_PLATFORMS"] == f"{device},cpu" and process.env["JOB_COMPLETION_INDEX"] == str(index)
    assert len(host.processes()) == hosts


@pytest.mark.parametrize("name", MANIFESTS)
def test_jobset_restarts_stopped_and_preempted_runs(name):
    policy = manifest(name)[-1]["spec"]["failurePolicy"]
    job = manifest(name)[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts" and policy["maxRestarts"] > 0
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"], "the reason of FailJob"
    stopped, preempted = job["podFailurePolicy"]["rules"]
    assert stopped["action"] == preempted["action"] == "FailJob" and stopped["onExitCodes"]["values"] == [75]
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0, "what podFailurePolicy requires"
    assert stopped["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in pod["containers"][0]["volumeMounts"]
    }


def test_jax_finds_the_processes_of_the_gpu_jobset(monkeypatch):
    """JAX asks for its pod and its job alone, which is what the Role allows, and finds the address and the numbers."""
    account, role, binding, jobset = manifest("jobset_gpu.yaml")
    asked, name = [], jobset["metadata"]["name"]
    job = jobset["spec"]["replicatedJobs"][0]
    labels = {"jobset.sigs.k8s.io/jobset-name": name, "job-name": f"{name}-{job['name']}-0"}
    metadata = SimpleNamespace(
        name=labels["job-name"], labels=labels, owner_references=[SimpleNamespace(controller=True, kind="Job")]
    )

    def list_pods(namespace, field_selector):
        asked.append(("pods", "list"))
        return SimpleNamespace(items=[SimpleNamespace(metadata=metadata, spec=None)])

    def read_job(name, namespace):
        asked.append(("jobs", "get"))
        assert name == labels["job-name"]
        return SimpleNamespace(
            metadata=metadata, spec=SimpleNamespace(**{"parallelism": job["template"]["spec"]["parallelism"]})
        )

    class Cluster(K8sCluster):
        _core_api = SimpleNamespace(list_namespaced_pod=list_pods)
        _batch_api = SimpleNamespace(read_namespaced_job=read_job)
        _ApiException = ConnectionError

        @classmethod
        def _namespace(cls):
            return "default"

    Cluster._cluster_types.remove(Cluster)  # into which JAX has put it
    monkeypatch.setattr("socket.gethostbyname", lambda host: "10.0.0.1")
    for index, _, environment in pods(jobset):
        monkeypatch.setenv("HOSTNAME", environment["HOSTNAME"])
        monkeypatch.setenv("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"])
        assert Cluster.get_process_id() == index
    assert Cluster.get_coordinator_address(None, None) == f"{name}-{job['name']}-0-0.{name}:55527"
    assert Cluster.get_process_count() == 2 and Cluster.get_local_process_id() is None, "all GPUs of the host"
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert set(asked) == allowed
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    assert job["template"]["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_starts_every_node(host, nodes):
    [task] = manifest("skypilot.yaml")
    pytest.importorskip("jsonschema").validate(task, SKYPILOT)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    arguments = task["envs"]["ARGUMENTS"].split()
    for rank in range(nodes):
        variables = {
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{number}" for number in range(1, nodes + 1)),
        }
        script = task["run"].replace("cd /lcm_jax", f"cd {shlex.quote(str(ROOT))}")
        assert host.run("bash", "-c", script, **task["envs"], **variables, CODES="75").returncode == 75
        address = f"--coordinator=10.0.0.1:8476 --num_processes={nodes} --process_id={rank}".split()
        assert host.processes()[rank].args == ["-m", "lcm_jax.main", *arguments, *(address if nodes > 1 else [])]


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_dockerfiles_copy_what_is_there_and_install_the_extra(device):
    text = (ROOT / f"launch/Dockerfile.{device}").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM" and re.fullmatch(r"python:3\.1[123](-slim)?", lines[0][1])
    assert {word for word, _ in lines} <= {"FROM", "WORKDIR", "COPY", "ARG", "RUN", "ENV", "CMD"}
    sources = list(itertools.chain(*(rest.split()[:-1] for word, rest in lines if word == "COPY")))
    assert {"pyproject.toml", "setup.cfg", "lcm_jax", "configs", "launch"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    [install] = [shlex.split(rest) for word, rest in lines if word == "RUN"]
    assert install[:2] == ["pip", "install"] and ["ARG", "EXTRAS="] in lines
    assert install[-1] == {"gpu": ".[gpu,k8s", "tpu": ".[tpu"}[device] + "${EXTRAS:+,$EXTRAS}]"
    [start] = [ast.literal_eval(rest) for word, rest in lines if word == "CMD"]
    assert (ROOT / start[0]).name == device and ["WORKDIR", "/lcm_jax"] in lines


def test_no_launcher_sets_a_hyper_parameter():
    settings = set()
    for path in (ROOT / "launch").iterdir():
        settings |= set(re.findall(r"--config\.([\w.]+)", path.read_text()))
    assert settings == {"data.shards"}, "a name, as the workdir is"
