"""The rules: which frontends a Service has, and which endpoints each of them may use.

Knows what Services, EndpointSlices and Nodes mean (``ebpfproxy.kube.objects`` has their records). Everything
is a function over immutable values, or (``tracker``, ``conflicts``) a plain index over them: no I/O, no
clock, no threads, no logging.

Must not know: HTTP, maps, BPF, the agent.

The specification is kube-proxy's behaviour (KEP-2086 internal traffic policy, KEP-1669 terminating
endpoints, KEP-2433 topology hints, KEP-3015 same-node distribution).
"""
