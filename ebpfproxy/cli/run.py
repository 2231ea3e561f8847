"""``ebpfproxy run``: the agent."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ebpfproxy import logs
from ebpfproxy.agent.from_config import agent_options, conntrack_sysctls, in_use, mode_remark
from ebpfproxy.agent.reconciler import Agent
from ebpfproxy.cli import settings
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import echo
from ebpfproxy.config.bind_address import BindAddressError
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.file_watch import ReadFile
from ebpfproxy.config.load import Configuration, effective, ignored_fields, parse, read
from ebpfproxy.config.node_port_addresses import NodePortAddressesError
from ebpfproxy.config.write import configz, to_yaml
from ebpfproxy.kube.errors import ConfigError, ManifestError
from ebpfproxy.logs import get_logger
from ebpfproxy.node.host import set_conntrack, set_oom_score_adj, share_heap
from ebpfproxy.node.identity import NodeNameError
from ebpfproxy.operator.migrate.node.node_handover import NodeHandover

log = get_logger(__name__)


@click.command("run", context_settings={"auto_envvar_prefix": settings.VARIABLES, "show_default": True})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="KubeProxyConfiguration, EbpfProxyConfiguration, or both as two documents; flags win. The agent "
    "starts anew when the file changes.",
)
@click.option(
    "--write-config-to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the effective configuration, flags included, then exit.",
)
@click.option(
    "--cleanup",
    is_flag=True,
    help="Remove the rules that kube-proxy left on this node, then exit. See also: ebpfproxy cleanup.",
)
@click.option(
    "--init-only",
    is_flag=True,
    help="Create the maps, compile and load the programs, then exit; nothing is attached.",
)
@click.option(
    "--standby",
    is_flag=True,
    help="While another agent runs on this node, wait until it ends, and take over its listening sockets; "
    "with --init-only, load nothing then.",
)
@settings.all_settings
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config: Path | None,
    write_config_to: Path | None,
    *,
    init_only: bool,
    cleanup: bool,
    standby: bool,
    **_: Any,
) -> None:
    """Run the agent of this node until SIGTERM. Its programs stay attached afterwards.

    Objects come from the API server (in a pod with its service account, else with --kubeconfig or --master),
    or from --manifests. An option can also be set in the environment: EBPFPROXY_ and its name, as in
    EBPFPROXY_STALE_TCP.
    """
    if cleanup:
        from ebpfproxy.cli.migrate import cleanup_kube_proxy  # noqa: PLC0415 - an agent holds no operator's tables

        cleanup_kube_proxy()
        return
    try:
        text = read(config) if config is not None else b""
        given = parse(text, str(config)) if config is not None else Configuration()
        used = effective(given, settings.given(ctx))
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    if write_config_to is not None:
        try:
            write_config_to.write_text(to_yaml(used))
        except OSError as error:
            raise click.ClickException(f"{write_config_to}: {error.strerror}") from error
        echo(f"configuration written to {write_config_to}")
        return
    share_heap()
    logs.configure(used.kube_proxy.logging.format, used.kube_proxy.logging.verbosity)
    try:
        with one_line():
            agent, remarks = agent_options(used)
            for remark in remarks:
                log.warning("configuration", remark=remark)
            unused = ignored_fields(used)
            if unused:
                log.warning("unsupported, ignored", fields=unused)
            if remark := mode_remark(settings.given(ctx).get("proxy_mode") or given.kube_proxy.mode):
                log.info("configuration", remark=remark)
            # Wrong options are found here, before anything on this node is changed.
            proxy = Agent(
                agent,
                configz(in_use(used, agent)),
                config=ReadFile(config, text) if config is not None else None,
                init_only=init_only,
                standby=standby,
                handover=NodeHandover(),
            )
            if used.kube_proxy.oom_score_adj is not None:
                set_oom_score_adj(used.kube_proxy.oom_score_adj)
            set_conntrack(*conntrack_sysctls(used.kube_proxy.conntrack, os.cpu_count() or 1))
            starts_anew = proxy.run()
    except (
        ConfigError,
        ManifestError,
        NodeNameError,
        BindAddressError,
        NodePortAddressesError,
    ) as error:
        raise click.ClickException(str(error)) from error
    if starts_anew:
        # The same process: nobody has to restart it, and health checks wait in its sockets meanwhile.
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
