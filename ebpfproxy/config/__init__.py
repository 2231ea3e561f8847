"""The agent's configuration: kube-proxy's document, a second one for ebpfproxy, and flags that override both.

| module | what |
|---|---|
| ``declarations`` | how a field declares its flag |
| ``kube_proxy`` | KubeProxyConfiguration: fields, flags, the API's defaults |
| ``validation`` | kube-proxy's checks of it |
| ``own`` | EbpfProxyConfiguration: fields, flags, checks, JSON schema |
| ``durations`` | Go's durations |
| ``documents`` | strict conversion of YAML documents to structs, with all problems |
| ``flags`` | applies flags to the documents |
| ``load`` | reads a file, applies flags, lists ignored fields |
| ``write`` | writes YAML and the content of ``/configz`` |
| ``masquerade_ports`` | source ports for masquerading: a given range, or one that this host leaves free |
| ``datapath`` | values of settings that the datapath knows, too: sizes of maps, kernel features, modes |
| ``node_port_addresses``, ``bind_address``, ``urls`` | values of single fields |
| ``file_watch`` | notices a changed file |

Must not know: maps, BPF, the agent.
"""
