"""From kube-proxy and back: real rules of a real kube-proxy, in namespaces, with traffic going through them."""
