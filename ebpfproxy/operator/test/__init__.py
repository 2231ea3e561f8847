"""``ebpfproxy test``: Services of its own, asked from every node, and what came instead of what was expected.

| module | what |
|---|---|
| ``pod`` | runs in pods: server and client, with the standard library alone |
| ``site`` | the cluster as far as the test needs it: nodes, their addresses, image and pods of the agent |
| ``objects`` | the namespace, Services and pods of the test, as JSON |
| ``questions`` | pure: who asks what, and which answer is right |
| ``results`` | from pods' answers to rows, sentences, and JUnit's XML |
| ``in_cluster`` | the steps, and the removal of everything |
| ``without_cluster`` | without a cluster: the Services of a folder, asked from this node |

Must not know: BPF, maps.
"""
