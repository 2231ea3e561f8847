"""The agent's configuration: kube-proxy's own file, ours beside it in the same file, and flags over both.

| module | what |
|---|---|
| ``kube_proxy`` | KubeProxyConfiguration: fields, the API's defaults |
| ``validation`` | what kube-proxy refuses in it |
| ``own`` | EbpfProxyConfiguration: fields, checks, JSON schema |
| ``durations`` | Go's durations |
| ``documents`` | YAML documents to structs, strictly, with every problem and not only the first |
| ``flags`` | which flag sets which field |
| ``load`` | a file, flags over it, what of it has no effect |
| ``write`` | back to YAML, and to what ``/configz`` answers |
| ``masquerade_ports`` | source ports for masquerading: a range, or what this host leaves free |
| ``file_watch`` | whether the file has changed |

Must not know: maps, BPF, the agent. May import ``services``.
"""
