"""Read manifests from stdin, hold them against Kubernetes' schemas: `validate.py VERSION...`, JSON on stdout.

Runs on the interpreter of .venv-deploy, which has PyYAML, jsonschema and kubernetes-validate. Says {"objects": [...],
"problems": ["1.29 Deployment/x: spec.foo: ..."]}. Unknown fields are problems; a kind without a schema is one too.
"""

from __future__ import annotations

import functools
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import referencing
import yaml
from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent / "schemas"
CORE = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


@functools.cache
def _core(version: str, api: str, kind: str) -> Draft202012Validator | None:
    """What checks one of Kubernetes' own kinds; None where that version has no such kind."""
    folder = CORE / f"v{version}.0-local-strict"
    group, _, name = api.rpartition("/")
    stem = f"{kind}-{group.partition('.')[0]}-{name}" if group else f"{kind}-{name}"
    path = folder / f"{stem.lower()}.json"
    if not path.is_file():
        return None
    return Draft202012Validator(json.loads(path.read_text()), registry=_definitions(folder))


@functools.cache
def _definitions(folder: Path) -> Any:
    contents = json.loads((folder / "_definitions.json").read_text())
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


@functools.cache
def _custom(api: str, kind: str) -> Draft202012Validator | None:
    path = SCHEMAS / f"{kind.lower()}_{api.rpartition('/')[2]}.json.gz"
    if not path.is_file():
        return None
    return Draft202012Validator(_strict(json.loads(gzip.decompress(path.read_bytes()))))


def _strict(schema: Any) -> Any:
    """The same schema, that takes no field it does not name: a cluster drops such a field without a word."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: _strict(value) for key, value in schema.items()}
    named = new.get("type") == "object" and isinstance(new.get("properties"), dict)
    if named and "additionalProperties" not in new and not new.get("x-kubernetes-preserve-unknown-fields"):
        if "metadata" in new["properties"] and "kind" in new["properties"]:
            new["properties"]["metadata"] = {"type": "object"}
        new["additionalProperties"] = False
    return new


def _problems(item: dict[str, Any], version: str) -> list[str]:
    api, kind = item.get("apiVersion", ""), item.get("kind", "")
    name = f"{version} {kind}/{item.get('metadata', {}).get('name', '')}"
    validator = _core(version, api, kind) or _custom(api, kind)
    if validator is None:
        return [f"{name}: no schema of {api} {kind}"]
    return [f"{name}: {'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(item)]


def main(versions: list[str]) -> int:
    objects = [item for item in yaml.safe_load_all(sys.stdin) if item]
    problems = [problem for version in versions for item in objects for problem in _problems(item, version)]
    json.dump({"objects": objects, "problems": problems}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
