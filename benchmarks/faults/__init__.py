"""Faults under load: what clients of a running application see of each kind."""
