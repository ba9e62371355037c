"""What is promised to clients, as dashboards draw it; the alerts watch the same numbers."""

AVAILABILITY = 0.999
"""Share of images that must not fail on the server's side (5xx or 429), wherever they were sent."""
LATENCY_SECONDS = 0.25
LATENCY_SHARE = 0.99
"""Share of answers to `/classify` that must take no longer than that; a bucket ends there."""
AUDIT_AGREEMENT = 0.8
"""Least share of audited early answers of an exit that the last one must agree with.

Not nearer to 1, since a policy may let images go of which every exit is unsure: at an exit whose
last threshold is low the two differ often, and are wrong alike.
"""
DEGRADED_SHARE = 0.2
"""Most answers that may be shallower than asked for before somebody is told."""
