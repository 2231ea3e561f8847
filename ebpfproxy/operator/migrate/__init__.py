"""Migrates from kube-proxy and back: ``node`` for one node, ``cluster`` for many, by a pod on each.

Functions that decide (what to remove, what is a conflict) take texts and values and return values; functions
that do something are few and named after it. This package knows netfilter's tools, kube-proxy's names and the
API's DaemonSets, nodes and pods; it does not know BPF: of the agent it reads what ``datapath.dump`` and
``agent.state`` say.

Modules beside the two packages are what both need.

The user who calls needs more than the agent may: get, list and patch of nodes; get and patch of DaemonSets;
get, list, create and delete of pods; get of pods' logs and ConfigMaps; list of events.
"""
