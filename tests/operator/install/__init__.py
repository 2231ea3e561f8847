"""Installation and removal over real HTTPS; ``controller`` stands for kubelets and the DaemonSet controller."""
