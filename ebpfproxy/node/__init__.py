"""This node: its name, and the devices and addresses of its network namespace, from netlink.

It knows no Services, maps or API server.
"""
