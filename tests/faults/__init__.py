"""Faults under load, with one assertion for all: no connection is lost or answered by a wrong backend, and in the
end the maps hold what the API says.

``make test-faults`` runs all of them; ``make test`` a few steps of each kind (no mark ``faults``).
"""
