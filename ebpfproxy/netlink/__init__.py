"""The kernel's netlink sockets, in this and in other network namespaces: routes, sockets, conntrack."""
