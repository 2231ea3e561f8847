"""YAML texts that are small and mean something large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from ebpfproxy import yaml_text
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.load import parse as parse_configuration
from ebpfproxy.kube.errors import ManifestError
from ebpfproxy.kube.manifests import parse as parse_manifest

_NINE = "[" + ", ".join(["*a{0}"] * 9) + "]"


def bomb(levels: int) -> str:
    """Each level repeats the one before nine times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} {_NINE.format(n - 1)}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("load", [yaml_text.load, yaml_text.load_all])
def test_aliases_that_repeat_billions_of_values_are_refused(load: Callable[[str], Any]) -> None:
    for text in (bomb(12), "x: &x {a: 1, b: 2}\n" + "y: &y {<<: [*x, *x]}\n" + bomb(9)):
        with pytest.raises(yaml.YAMLError, match="aliases repeat more than 1,000,000 values"):
            load(text)


def test_aliases_as_people_use_them_are_not() -> None:
    text = "ports: &ports [{port: 80}, {port: 443}]\n" + "".join(f"s{n}: *ports\n" for n in range(1000))
    assert yaml_text.load(text)["s999"] == [{"port": 80}, {"port": 443}]
    assert len(yaml_text.load(bomb(5))["a4"]) == 9


def test_files_that_mean_too_much_are_an_error_of_the_file() -> None:
    """Whatever field they are in: the error would have to show the value."""
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: x}\n" + bomb(12) + "spec: {ports: *a11}\n"
    with pytest.raises(ManifestError, match="aliases repeat"):
        list(parse_manifest(service))
    head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    with pytest.raises(ConfigurationError, match="aliases repeat"):
        parse_configuration(head + bomb(12) + "nodePortAddresses: *a11\n", "config.yaml")
