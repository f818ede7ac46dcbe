"""The fields of JobSet and SkyPilot files that launch/ uses, and a check of Kubernetes' own by its Python client.

JobSet: v1alpha2 of jobset.x-k8s.io, whose job template is Kubernetes' (`$ref` names a class of the client). SkyPilot: a
task. A field that is not listed is an error, as it is for `kubectl apply --validate=strict` and for `sky`.
"""

from typing import Any


def record(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def each(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items} | more


NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
ACTIONS = "FailJobSet RestartJobSet RestartJobSetAndIgnoreMaxRestarts RestartJob RestartJobAndIgnoreMaxRestarts".split()
REASONS = "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded PodFailurePolicy".split()

JOBSET = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={},  # V1ObjectMeta, as of every object
    spec=record(
        "replicatedJobs",
        failurePolicy=record(
            "",
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules=each(
                record(
                    "name action",
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ACTIONS},
                    onJobFailureReasons=each({"enum": REASONS}, uniqueItems=True),
                    targetReplicatedJobs=each(NAME),
                )
            ),
        ),
        replicatedJobs=each(
            record("name template", name=NAME, replicas=COUNT, template={}),  # V1JobTemplateSpec
            minItems=1,
        ),
    ),
)

EXIT_CODE = {"type": "integer", "minimum": 0, "maximum": 255}
SKYPILOT = record(
    "run",
    name=TEXT,
    num_nodes={"type": "integer", "minimum": 1},
    resources=record(
        "",
        accelerators=TEXT,
        use_spot={"type": "boolean"},
        image_id=TEXT,
        job_recovery=record("", max_restarts_on_errors=COUNT, recover_on_exit_codes=each(EXIT_CODE, uniqueItems=True)),
    ),
    file_mounts={
        "type": "object",
        "additionalProperties": record("name", name=TEXT, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}),
    },
    envs={"type": "object", "additionalProperties": TEXT},
    run=TEXT,
)


def check_kubernetes(client: Any, value: Any, kind: str, place: str = "") -> None:
    """Compare a parsed YAML value with a class of the `kubernetes` package, such as V1Job, field by field.

    Raises AssertionError that names the place of an unknown field or a wrong type, ValueError for a missing field.
    """
    place = place or kind
    if kind.startswith("List["):
        assert isinstance(value, list), f"{place} is not a list"
        for number, item in enumerate(value):
            check_kubernetes(client, item, kind[5:-1], f"{place}[{number}]")
    elif kind.startswith("Dict[str, "):
        assert isinstance(value, dict) and all(isinstance(item, str) for item in value.values()), place
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{place} is {value!r}, not {kind}"
    else:
        model = getattr(client, kind)
        names = {there: here for here, there in model.attribute_map.items()}
        assert isinstance(value, dict) and value.keys() <= names.keys(), f"{place}: {value.keys() - names.keys()}"
        for name, item in value.items():
            check_kubernetes(client, item, model.openapi_types[names[name]], f"{place}.{name}")
        model(**{names[name]: item for name, item in value.items()})  # which checks the required fields
