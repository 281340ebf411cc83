"""Curves: a grid of runs, each trained and audited, and what they say about which tuning, codec and budget to take.

``grid`` is the table, ``cells`` its runs, ``schedule`` and ``work`` make them, ``store`` keeps them, ``measures`` and
``compare`` read them, ``tables`` and ``page`` show them, ``recommend`` picks.
"""
