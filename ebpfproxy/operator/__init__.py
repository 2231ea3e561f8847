"""What an operator calls from anywhere: the agent into a cluster, and a cluster from kube-proxy to the agent.

| module | what |
|---|---|
| ``api`` | single objects of one API server, over ``kube.client`` |
| ``kube_proxy_objects`` | kube-proxy's DaemonSet, and the file that it is configured by |
| ``pod_status`` | what a pod's status says |
| ``agents`` | the agents' pods, and commands in them |
| ``image`` | the agents' image, for pods of commands |
| ``names`` | names of objects, labels and annotations |
| ``waiting`` | the loop that waits until something is so |
| ``printing`` | how progress is reported |

``install``, ``migrate`` and ``test`` stand on these.
"""
