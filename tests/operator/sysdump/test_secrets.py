"""What is taken out of objects and texts, and what stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ebpfproxy.operator.sysdump.secrets import Secrets, without

#: Each has PLANTED where the secret is.
_TEXTS = (
    "token: PLANTED",
    "{Name:a Token:PLANTED Password:PLANTED}",
    '"password":"PLANTED and no end',
    "token=PLANTED",
    '{"token":"PLANTED","a":1}',
    '{"text":"{\\"password\\": \\"PLANTED with a space\\", \\"a\\": 1}"}',
    "password='PLANTED with a space'",
    "--token PLANTED",
    '{"text": "a\\n--token PLANTED"}',
    "--api-token=PLANTED --v=2",
    "Authorization: Bearer PLANTED",
    "authorization=basic PLANTED",
    "curl -H 'authorization: bearer PLANTED'",
    "sent Bearer PLANTEDPLANTED to the server",
    "client-key-data: PLANTED",
    "AWS_SECRET_ACCESS_KEY=PLANTED",
    "https://user:PLANTED@proxy.example:3128/path",
    "https://PLANTED@proxy.example:3128/path",
    "https://PLANTED:@proxy.example",
    "https://user:PLAN/PLANTED@proxy.example",
    "https://user:PLAN@PLANTED@proxy.example/",
    "https://user:PLAN?PLAN#PLANTED@proxy.example/",
    '{"proxy":"http://user:PLANTED@proxy.example","a":1}',
    "password: PLANTED PLANTED",
    "password: PLANTED PLANTED\n  PLANTED",
    "- password: 'PLANTED\n    PLANTED'",
    'password: "PLANTED\n  PLANTED"',
    "password: >-\n  PLANTED\n\n  PLANTED PLANTED",
    "a:\n- name: b\n  password: |2-\n    PLANTED\n      PLANTED\n  c: d",
    "password: !!str | # why\n  PLANTED",
    "password:\n  PLANTED PLANTED",
    '{"config.yaml":"password: PLANTED PLANTED","a":1}',
    '{"config.yaml":"a: b\\npassword: >-\\n  PLANTED\\n  PLANTED\\nc: d\\n","a":1}',
    '{"config.yaml":"a:\\n  password: PLANTED PLANTED\\n    PLANTED"}',
    "-----BEGIN RSA PRIVATE KEY-----\nPLANTED\nPLANTED\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----\\nPLANTED",
    "it was LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0tPLANTED==",
    "eyJhbGciOiJSUzI1NiJ9.PLANTED.PLANTED",
    "a kubeconfig's own-opaque-PLANTED-string in an error",
    "exec plugin said by-the-environment-PLANTED",
)
_KUBECONFIG = {
    "clusters": [{"name": "c", "cluster": {"server": "https://cp.example:6443"}}],
    "users": [
        {
            "name": "some-user-name",
            "user": {"token": "own-opaque-PLANTED-string", "client-key": "/etc/the.key"},
        },
        {
            "name": "other",
            "user": {
                "exec": {
                    "command": "aws-get-token",
                    "env": [
                        {"name": "AWS_PROFILE", "value": "production"},
                        {"name": "AWS_SECRET_ACCESS_KEY", "value": "by-the-environment-PLANTED"},
                    ],
                }
            },
        },
    ],
}


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(_KUBECONFIG))
    return Secrets([path, tmp_path / "nothing"])


@pytest.mark.parametrize("text", _TEXTS)
def test_secrets_of_texts_are_removed(secrets: Secrets, text: str) -> None:
    found = secrets.text(f"before\n{text}\nafter")
    assert "PLAN" not in found
    assert "(removed)" in found
    assert found.startswith("before\n")
    assert found.endswith("\nafter") or "BEGIN EC" in text


@pytest.mark.parametrize(
    "text",
    [
        "info  a node of production, some-user-name at https://cp.example:6443, /etc/the.key",
        '{"host_netns_cookie":4711,"automountServiceAccountToken":true,"netns":"cookie"}',
        "apiVersion: rbac.authorization.k8s.io/v1",
        "shop/tokens:http 10.96.0.10:80 => [fd00::1]:8080",
        '["IFLA_INET6_TOKEN","::"]',
        "docker-pullable://registry.example:5000/ebpfproxy@sha256:0123",
        "https://[fd00::1]:6443/api/v1/pods, https://registry.example/a/@scope/b",
        "secret:\n  items:\n  - key: a\n    path: b",
        '{"secret":{"items":[]}}',
    ],
)
def test_other_texts_stay(secrets: Secrets, text: str) -> None:
    assert secrets.text(text) == text


def test_what_follows_a_secret_of_several_lines_stays(secrets: Secrets) -> None:
    text = "a:\n- password: |\n    PLANTED\n\n     PLANTED\n  b: c\n- token: x y\n   z\n  d: e"
    wanted = (
        "a:\n- password: |\n    (removed)\n\n     (removed)\n  b: c\n- token: (removed)\n   (removed)\n  d: e"
    )
    assert secrets.text(text) == wanted
    escaped = json.dumps({"text": text, "b": 1})
    assert json.loads(secrets.text(escaped)) == {"text": wanted, "b": 1}
    assert secrets.text(json.dumps(["password: two words", 1])) == '["password: (removed)", 1]'


def test_json_stays_json(secrets: Secrets) -> None:
    value = {"token": 'a "quoted" PLANTED \\', "list": [{"clientSecret": "PLANTED"}], "n": {"secret": None}}
    found = json.loads(secrets.text(json.dumps(value)))
    assert found == {"token": "(removed)", "list": [{"clientSecret": "(removed)"}], "n": {"secret": None}}


def test_secrets_of_objects_are_removed_by_their_names() -> None:
    pod = {
        "metadata": {
            "name": "a",
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": '{"x":"PLANTED"}',
                "ebpfproxy.io/control-plane": "https://cp:6443",
            },
            "managedFields": [{"manager": "kubectl"}],
        },
        "spec": {
            "automountServiceAccountToken": True,
            "tolerations": [{"key": "a", "value": "b"}],
            "containers": [
                {
                    "args": ["--token", "PLANTED", "--v", "4"],
                    "env": [
                        {"name": "HTTPS_PROXY", "value": "PLANTED"},
                        {"name": "EBPFPROXY_BPF_ROOT", "value": "/host/bpf"},
                        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    ],
                }
            ],
        },
        "users": [{"user": {"auth-provider": {"config": {"id": "PLANTED"}}, "password": 12345678}}],
    }
    assert without(pod) == {
        "metadata": {
            "name": "a",
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": "(removed)",
                "ebpfproxy.io/control-plane": "https://cp:6443",
            },
        },
        "spec": {
            "automountServiceAccountToken": True,
            "tolerations": [{"key": "a", "value": "b"}],
            "containers": [
                {
                    "args": ["--token", "(removed)", "--v", "4"],
                    "env": [
                        {"name": "HTTPS_PROXY", "value": "(removed)"},
                        {"name": "EBPFPROXY_BPF_ROOT", "value": "/host/bpf"},
                        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    ],
                }
            ],
        },
        "users": [{"user": {"auth-provider": "(removed)", "password": "(removed)"}}],
    }


@pytest.mark.parametrize(
    "text",
    [
        "token " + "-" * 200_000,
        "token " + "-a" * 100_000,
        "token" * 50_000,
        "token: " + "\\" * 200_000,
        "token://" + "a:" * 100_000,
        "token " + "eyJaaaaaaaa." * 20_000,
        "token " + "://a:" * 40_000,
        "token: a" + "\n " * 100_000,
        '"token' * 40_000,
        "token: a" + "\\n " * 60_000 + "\\" * 60_000,
        "token: '" + "a''" * 60_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_long_word_takes_no_longer_than_others_of_its_length(text: str) -> None:
    """Who may write an annotation must not be able to hold up a sysdump: four thousand dashes took seven seconds."""
    assert Secrets().text(text)


def test_headers_for_a_collector_are_taken_out() -> None:
    """As the variable has them, and as they are sent."""
    secrets = Secrets()
    secrets.learn_variables(
        {
            "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20abc%2Fdefgh,X-Scope=opaque-key==",
            "OTEL_EXPORTER_OTLP_LOGS_HEADERS": "x=another-one",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        }
    )
    said = "Bearer%20abc%2Fdefgh, Bearer abc/defgh, opaque-key==, another-one, http://collector:4318"
    assert secrets.text(said) == "(removed), (removed), (removed), (removed), http://collector:4318"
