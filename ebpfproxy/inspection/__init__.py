"""What commands and the page show of this node, read from the kernel, the maps and the running agent.

Nothing is printed here, and nothing is changed.
"""
