"""Services as maps hold them: slots, backends, frontends, and the order in which they are written.

``writer`` is what others call. ``placement`` writes new backends and slots where no program looks yet;
``plan`` says what a change consists of, without a map; ``publish`` lets readers see it, in order; ``adopt``
reads back what a start finds, and ``retirement`` frees what was replaced. Each map has one module that writes
it (``selection_table``, ``backends``, ``frontend_table``, ``redirects``).
"""
