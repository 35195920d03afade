"""Names, parameters and defaults that code written against DETR relies on, listed in tests/contract/names.json."""

import importlib
import inspect
import json
from pathlib import Path

import pytest

NAMES = json.loads((Path(__file__).parent / "contract" / "names.json").read_text())
REEXPORTS = "(re-exports)"
CASES = [(file, name) for file, names in NAMES.items() for name in names]


def wanted_parameters(signature):
    """Parse "(self, a, b=1, *args)" into [("a", "b" ...)]: the parameters without self, with their defaults."""
    namespace = {}
    exec(f"def function{signature}: pass", namespace)
    parameters = list(inspect.signature(namespace["function"]).parameters.values())
    return [p for p in parameters if p.name != "self"]


def assert_accepts(function, signature, where):
    """The function takes the wanted parameters in their order with their defaults; more may follow, with defaults."""
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    wanted = wanted_parameters(signature)
    if any(p.kind is p.VAR_POSITIONAL for p in own) and any(p.kind is p.VAR_POSITIONAL for p in wanted):
        return
    for i, parameter in enumerate(wanted):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        assert i < len(own), f"{where}: no parameter {parameter.name}"
        assert own[i].name == parameter.name, f"{where}: parameter {i} is {own[i].name}, not {parameter.name}"
        if parameter.default is not parameter.empty:
            assert own[i].default == parameter.default, f"{where}: default of {parameter.name} is {own[i].default}"
    for parameter in own[len(wanted) :]:
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        assert optional, f"{where}: additional parameter {parameter.name} has no default"


@pytest.mark.parametrize(("file", "name"), CASES, ids=[f"{file}:{name}" for file, name in CASES])
def test_contract_name_exists_with_its_parameters(file, name):
    module = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    wanted = NAMES[file][name]
    if name == REEXPORTS:
        missing = [other for other in wanted if not hasattr(module, other)]
        assert not missing, f"{file}: {missing}"
        return
    found = getattr(module, name)
    if isinstance(wanted, str):
        assert_accepts(found, wanted, f"{file}: {name}")
        return
    for method, signature in wanted["methods"].items():
        attribute = inspect.getattr_static(found, method)
        if not isinstance(attribute, property):
            assert_accepts(getattr(found, method), signature, f"{file}: {name}.{method}")
