"""Values that a JSON file may have in any place."""

import json

DEEP = json.loads("[" * 60 + "]" * 60)
VALUES = (
    None,
    [],
    {},
    [None],
    [1, 2, 3],
    [[]],
    {"a": {"b": None}},
    "",
    "8",
    "epsilon\nTraceback",
    "x" * 10_000,
    -1,
    0,
    1,
    3.5,
    -0.5,
    10**12,
    -(10**12),
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    False,
    DEEP,
)
