"""Into a cluster and out of it, over real HTTPS; no kubelet: ``controller`` plays a DaemonSet's part."""
