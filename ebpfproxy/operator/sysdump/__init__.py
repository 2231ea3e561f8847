"""``ebpfproxy sysdump``: everything that says what a node does, in one archive without secrets.

| module | what |
|---|---|
| ``archive`` | the archive: its limits, and a line for what fails |
| ``secrets`` | takes out what nobody else may read |
| ``scalars`` | the same in YAML texts, of values that are more than a word |
| ``node_files`` | devices, routes, BPF programs, sysctls, netfilter and logs of this node |
| ``cluster_files`` | the same of other nodes, by the agents there, and what the API server has of them |

Nothing here changes a node, or asks for rights that the agent does not have.
"""
