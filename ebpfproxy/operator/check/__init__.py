"""``ebpfproxy check``: what is not as it should be on this node.

| module | what |
|---|---|
| ``map_checks`` | maps that contradict themselves, where no agent runs |
| ``attachment_checks`` | attachments, and programs of others that run before ours |
| ``node_checks`` | kernel, sysctls, clock, MTU |
| ``proxies`` | other proxies, as ``operator.migrate.node`` knows them |
| ``all_checks`` | all of it |

The agent's part, which alone knows what the API says, is an argument. Functions that decide take values and
return findings; nothing here changes the node.
"""
