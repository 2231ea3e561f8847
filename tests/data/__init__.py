"""What real programs sent and printed; each folder's README says how it was made."""

from pathlib import Path

#: What a kube-apiserver v1.36 sent.
RECORDINGS = Path(__file__).parent / "recordings"
#: What a kube-proxy v1.36 printed beside the objects of ``RECORDINGS``.
SAMPLES = Path(__file__).parent / "kube-proxy"
