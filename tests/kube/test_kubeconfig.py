"""An invalid kubeconfig is one error that names file and field, and no traceback."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.errors import ConfigError
from tests.apiserver.certificates import Authority

GARBAGE = base64.b64encode(b"no certificate").decode()


def config(user: Any, **cluster: Any) -> dict[str, Any]:
    return {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1", **cluster}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }


def exec_plugin(command: str, *args: str) -> dict[str, Any]:
    api_version = "client.authentication.k8s.io/v1"
    return {
        "exec": {
            "apiVersion": api_version,
            "command": command,
            "args": list(args),
            "interactiveMode": "Never",
        }
    }


def error_of(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        ApiConnection.from_options(path, None)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text.partition("not YAML")[0]
    return text


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{", "not YAML"),
        ("", "Expected `object`"),
        ("- a list\n", "Expected `object`"),
        ("only text\n", "Expected `object`"),
        ("apiVersion: v1\nkind: Config\n", "current-context"),
        ({"current-context": "x", "contexts": []}, "contexts has no 'x'"),
        ({**config({}), "users": []}, "users has no 'u'"),
        ({**config({}), "clusters": None}, "clusters has no 'c'"),
        ({**config({}), "users": "u"}, "users: "),
        (
            {**config({}), "contexts": [{"name": "x", "context": None}]},
            "contexts[0]: Object missing required field `context`",
        ),
        (config({}, server=5), "clusters[0].cluster.server: "),
        (config({}, server="10.0.0.1:6443"), "clusters[c].cluster.server: "),
        (config({}, **{"proxy-url": "bogus"}), "clusters[c].cluster.proxy-url: "),
        (config({}, **{"certificate-authority": "/nowhere"}), "/nowhere"),
        (config({}, **{"certificate-authority-data": "!!"}), "certificate-authority-data: not base64"),
        (config({}, **{"certificate-authority-data": GARBAGE}), "certificate-authority ("),
        (config({"client-certificate-data": GARBAGE, "client-key-data": GARBAGE}), "client-certificate ("),
        (config({"client-key-data": "?"}), "users[u].user.client-key-data: not base64"),
        (config({"token": 5}), "users[0].user.token: "),
        (config({"tokenFile": "nowhere"}), "nowhere"),
        (config({"username": "a", "password": 5}), "users[0].user.password: "),
        (
            config({"exec": {"apiVersion": "v1"}}),
            "users[0].user.exec: Object missing required field `command`",
        ),
        (config(exec_plugin("/no/such/plugin")), "user.exec: no credentials: "),
        (config(exec_plugin("false")), "process returned 1"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, content: object, field: str) -> None:
    assert field in error_of(tmp_path / "config", content)


def test_missing_and_binary_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ApiConnection.from_options(tmp_path / "missing", None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        ApiConnection.from_options(tmp_path / "binary", None)


def test_master_without_a_scheme_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--master: .* does not begin with http://"):
        ApiConnection.from_options(None, "10.0.0.1:6443")


def test_ca_data_may_have_comments(tmp_path: Path) -> None:
    """Other text than certificates is ignored in any encoding, as in a file."""
    text = "# Autorité de certification\n".encode("latin-1") + Authority(tmp_path).path.read_bytes()
    data = base64.b64encode(text).decode()
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config({}, **{"certificate-authority-data": data})))
    assert ApiConnection.from_options(path, None).host == "https://127.0.0.1:1"
    data = base64.b64encode(b"\xff\xfe").decode()
    assert "certificate-authority-data" in error_of(path, config({}, **{"certificate-authority-data": data}))


def test_base64_may_be_folded(tmp_path: Path) -> None:
    """Block scalars of YAML are folded; entries that the context does not use may be wrong."""
    folded = "\n".join([GARBAGE[:8], GARBAGE[8:]])
    content = config({"client-key-data": folded})
    content["users"].append({"name": "other", "user": {"client-key-data": "?"}})
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(content))
    assert ApiConnection.from_options(path, None).host == "https://127.0.0.1:1"


def test_null_is_an_absent_field(tmp_path: Path) -> None:
    """So kubectl reads files that name every field."""
    path = tmp_path / "config"
    content = config({"token": None, "exec": None}, **{"tls-server-name": None, "proxy-url": None})
    content["contexts"].append({"name": "y", "context": {"cluster": "c", "user": None}})
    content["clusters"].append({"name": "d", "cluster": {"server": None}})
    path.write_text(yaml.safe_dump(content))
    assert ApiConnection.from_options(path, None, context="y").host == "https://127.0.0.1:1"


def test_empty_user_is_null(tmp_path: Path) -> None:
    """The DaemonSet copies a kubelet's kubeconfig in this form, without credentials."""
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config(None)))
    assert ApiConnection.from_options(path, None).kubeconfig_server == "https://127.0.0.1:1"
