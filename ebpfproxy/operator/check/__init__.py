"""``ebpfproxy check``: what is not as it should be on this node.

| module | what |
|---|---|
| ``maps`` | maps that contradict themselves, where no agent runs |
| ``programs`` | attachments, and programs of others that run before ours |
| ``node`` | kernel, sysctls, clock, MTU |
| ``proxies`` | other proxies, as ``operator.migrate.node`` knows them |
| ``run`` | all of it |

The agent's part, which alone knows what the API says, is an argument. Functions that decide take values and
return findings; nothing here changes the node.
"""
