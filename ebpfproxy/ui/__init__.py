"""``ebpfproxy ui``: a page that shows this node's Services, decisions and health, and changes nothing.

One process: starlette answers (``app``) behind ``guard``, which says who may ask; ``live`` runs one trace for
all who look; ``static`` has the page itself, plain JavaScript, which puts all data into text nodes. What is
shown comes from ``inspection``, as in commands. Both libraries are the extra ``ui`` of the package: nothing
else imports these modules.
"""
