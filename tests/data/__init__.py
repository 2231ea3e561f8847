"""What real programs sent and printed; each folder's README says how it was made."""

from pathlib import Path

#: A kube-apiserver v1.36 sent these.
RECORDINGS = Path(__file__).parent / "recordings"
#: A kube-proxy v1.36 printed these for the objects of ``RECORDINGS``.
SAMPLES = Path(__file__).parent / "kube-proxy"
